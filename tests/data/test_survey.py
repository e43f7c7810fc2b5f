"""The survey of a folder: ignored files, and the sizes of images."""

import os

from PIL import Image

from wuerstchen.data.folder import FolderSource
from wuerstchen.data.survey import ignored, sizes


def write(folder, name, size=(8, 8)):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)
    path.with_suffix(".txt").write_text("a thing")


def test_everything_that_is_not_read_has_its_reason(tmp_path):
    root = tmp_path / "photos"
    write(root, "a.png")
    write(root, "in/b.JPG")
    write(tmp_path, "elsewhere/c.png")
    (root / "more").symlink_to(tmp_path / "elsewhere")
    for name in ("x.heic", "in/a.HEIC", "notes", "in/page.html", ".hidden.png"):
        (root / name).write_text("x")
    found, whole = ignored(root)
    assert whole
    assert {reason: (e.count, e.first, e.images) for reason, e in found.items()} == {
        "that is a link to a folder": (1, "more", True),
        "with a name that begins with a dot": (1, ".hidden.png", False),
        "with the ending .heic": (2, "in/a.HEIC", True),
        "with the ending .html": (1, "in/page.html", False),
        "without an ending": (1, "notes", False),
    }
    read = FolderSource(root)
    assert [read.name(item) for item in range(len(read))] == ["a.png", "in/b.JPG"]


def test_the_time_to_look_for_what_is_not_read_is_limited(tmp_path):
    (tmp_path / "x.heic").write_text("x")
    assert ignored(tmp_path, seconds=-1.0) == ({}, False)


def test_sizes_and_how_much_images_are_enlarged(tmp_path):
    write(tmp_path, "large.png", (300, 200))
    write(tmp_path, "line.png", (1, 5000))
    write(tmp_path, "small.png", (64, 256))
    write(tmp_path, "torn.png")
    (tmp_path / "torn.png").write_bytes(b"no image")
    found = sizes(FolderSource(tmp_path))
    assert found.found == {"large.png": (300, 200), "line.png": (1, 5000), "small.png": (64, 256)}
    assert found.enlarged((128, 128)) == {"line.png": 128, "small.png": 2}
    assert found.enlarged((64, 256)) == {"line.png": 64, "large.png": 256 / 200}


def test_of_large_folders_some_images_are_opened_and_pipes_never(tmp_path):
    for number in range(6):
        write(tmp_path, f"{number}.png", (10 + number, 8))
    source = FolderSource(tmp_path)
    assert len(sizes(source, most=4).found) == 4
    assert sizes(source, most=4).found == sizes(source, most=4).found
    assert sizes(source, seconds=-1.0).found == {}
    (tmp_path / "3.png").unlink()
    os.mkfifo(tmp_path / "3.png")
    assert "3.png" not in sizes(source).found

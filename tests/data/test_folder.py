import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from wuerstchen.data.filters import Tally
from wuerstchen.data.folder import FolderSource
from wuerstchen.data.readers import FolderReader
from wuerstchen.data.sources import Source
from wuerstchen.errors import DataError


def _image(path: Path, colour: str = "red", size: tuple[int, int] = (24, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def _metadata(root: Path, *lines: object) -> None:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (root / "metadata.jsonl").write_text(text + "\n", encoding="utf-8")


@pytest.fixture
def with_metadata(tmp_path: Path) -> Path:
    _image(tmp_path / "b.png", "red")
    _image(tmp_path / "cats" / "a.jpg", "blue")
    _image(tmp_path / "Z.WEBP", "green")
    _metadata(
        tmp_path,
        {"file_name": "cats/a.jpg", "text": "a blue cat", "width": 24},
        {"file_name": "./b.png", "caption": " red\n square "},
        "",
        {"file_name": "Z.WEBP", "text": ["green", "ein grünes Würstchen"]},
    )
    return tmp_path


@pytest.fixture
def with_text_files(tmp_path: Path) -> Path:
    _image(tmp_path / "b.png")
    _image(tmp_path / "cats" / "a.jpg")
    (tmp_path / "b.txt").write_text("ein rotes Würstchen\nauf Rot\n", encoding="utf-8")
    (tmp_path / "cats" / "a.txt").write_bytes("a cat".encode("utf-8-sig"))
    return tmp_path


def _caption(source: FolderSource, item: int, seed: int = 0) -> str:
    return source.example(item, np.random.default_rng(seed), 8).caption


def test_metadata(with_metadata: Path) -> None:
    source: Source = FolderSource(with_metadata)
    assert [source.name(item) for item in range(len(source))] == ["Z.WEBP", "b.png", "cats/a.jpg"]
    example = source.example(2, np.random.default_rng(0), 8)
    assert example.caption == "a blue cat"
    assert example.image.shape == (8, 8, 3)
    assert example.image.dtype == np.uint8
    assert np.abs(example.image.astype(int) - [0, 0, 255]).max() < 10
    assert _caption(FolderSource(with_metadata), 1) == "red square"


def test_text_files(with_text_files: Path) -> None:
    source = FolderSource(with_text_files)
    assert [source.name(item) for item in range(len(source))] == ["b.png", "cats/a.jpg"]
    assert _caption(source, 0) == "ein rotes Würstchen auf Rot"
    assert _caption(source, 1) == "a cat"  # without the byte order mark


def test_one_of_several_captions_is_drawn(with_metadata: Path) -> None:
    source = FolderSource(with_metadata)
    drawn = [_caption(source, 0, seed) for seed in range(40)]
    assert set(drawn) == {"green", "ein grünes Würstchen"}
    assert drawn == [_caption(source, 0, seed) for seed in range(40)]


def test_the_shorter_side_is_scaled_and_the_crop_is_random(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 255, 96).astype(np.uint8)[None, :, None], (32, 1, 3))
    Image.fromarray(ramp).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a ramp")
    source = FolderSource(tmp_path)
    crops = [source.image(0, np.random.default_rng(seed), 16) for seed in range(30)]
    for crop in crops:
        across = crop[8].astype(int)
        assert (
            255 / 3 * 0.8 < across[-1, 0] - across[0, 0] < 255 / 3
        )  # a third of the width: the image is not stretched
    assert max(crop.mean() for crop in crops) - min(crop.mean() for crop in crops) > 100


def test_image_is_the_image_of_example(with_metadata: Path) -> None:
    source = FolderSource(with_metadata)
    for item in range(3):
        example = source.example(item, np.random.default_rng(item), 8)
        assert np.array_equal(source.image(item, np.random.default_rng(item), 8), example.image)


def test_travels_to_worker_processes(with_metadata: Path) -> None:
    source = pickle.loads(pickle.dumps(FolderSource(with_metadata)))
    assert _caption(source, 2) == "a blue cat"


def test_hidden_files_and_other_files_are_left_alone(with_metadata: Path) -> None:
    _image(with_metadata / ".thumbs" / "x.png")
    (with_metadata / "._b.png").write_bytes(b"resource fork")
    (with_metadata / "README.txt").write_text("about")
    (with_metadata / "notes.md").write_text("about")
    assert len(FolderSource(with_metadata)) == 3


def test_fingerprint_is_of_the_content_not_of_the_place(with_text_files: Path, tmp_path_factory) -> None:
    first = FolderSource(with_text_files).fingerprint()
    moved = tmp_path_factory.mktemp("other") / "root"
    os.rename(with_text_files / "cats", with_text_files / "tmp")  # the order on disk changes
    os.rename(with_text_files / "tmp", with_text_files / "cats")
    os.rename(with_text_files, moved)
    assert FolderSource(moved).fingerprint() == first


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "b.txt").write_text("another caption"),
        lambda root: (_image(root / "c.png"), (root / "c.txt").write_text("c")),
        lambda root: ((root / "b.png").unlink(), (root / "b.txt").unlink()),
        lambda root: _image(root / "b.png", size=(300, 200)),
        lambda root: ((root / "b.png").rename(root / "d.png"), (root / "b.txt").rename(root / "d.txt")),
    ],
)
def test_fingerprint_changes_with_files_and_captions(
    with_text_files: Path, change: Callable[[Path], object]
) -> None:
    before = FolderSource(with_text_files).fingerprint()
    change(with_text_files)
    assert FolderSource(with_text_files).fingerprint() != before


def _line(**fields: object) -> Callable[[Path], None]:
    """``metadata.jsonl`` with a valid first line, and ``fields`` in the second."""

    def make(root: Path) -> None:
        _image(root / "a.png")
        _metadata(root, {"file_name": "a.png", "text": "a"}, fields)

    return make


def _named_in_latin_1(root: Path) -> None:
    Image.new("RGB", (4, 4)).save(root / "a.png")
    os.replace(root / "a.png", os.fsencode(root) + b"/caf\xe9.png")


def _second_line(line: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        _image(root / "a.png")
        _metadata(root, {"file_name": "a.png", "text": "a"}, line)

    return make


def _files(**texts: bytes | None) -> Callable[[Path], None]:
    """An image for each name, and its text file unless it is None."""

    def make(root: Path) -> None:
        for name, text in texts.items():
            _image(root / f"{name}.png")
            if text is not None:
                (root / f"{name}.txt").write_bytes(text)

    return make


def _then(*steps: Callable[[Path], object]) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        for step in steps:
            step(root)

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda root: None,
            r"^Data folder '.*' contains no images \(\.avif, ",
        ),
        (
            lambda root: root.rmdir(),
            r"^Data folder '.*' does not exist or is not a folder\. Use a folder of images",
        ),
        (lambda root: (root.rmdir(), root.touch()), "is not a folder"),
        (
            _files(a=b"a", b=None),
            r"^Image 'b\.png' has no caption\. Write one in a \.txt file",
        ),
        (_files(a=None, b=None, c=None), r"^Image 'a\.png' has no caption, and neither have 2 others\. "),
        (
            _then(_files(a=b"a"), lambda root: _metadata(root, {"file_name": "b.png", "text": "b"})),
            r"^File 'a\.txt' conflicts with metadata\.jsonl, .*\. Remove one of the two",
        ),
        (
            _then(_files(a=b"a"), lambda root: (root / "gone.txt").write_text("gone")),
            r"^File 'gone\.txt' has no image next to it\. Add the image",
        ),
        (
            _then(_files(a=b"a"), lambda root: _image(root / "a.jpg")),
            r"^File 'a\.txt' belongs to both 'a\.jpg' and 'a\.png'\. Rename one",
        ),
        (_files(a=b"ok\ncaf\xe9"), r"^File 'a\.txt' is not UTF-8 in line 2\. Save it in UTF-8"),
        (_files(a=b" \n\t"), r"^All captions in data folder '.*' are empty\. Add at least one"),
        (_files(a=b"\xef\xbb\xbf"), r"^All captions in data folder '.*' are empty\. Add at least one"),
        (
            _then(_files(a=None, b=None), lambda root: _metadata(root, {"file_name": "b.png", "text": "b"})),
            r"^Image 'a\.png' has no caption\. Add a line for it to metadata\.jsonl",
        ),
        (
            _then(
                _files(a=None), lambda root: (root / "metadata.jsonl").write_bytes(b'\n{"text": "caf\xe9"}')
            ),
            r"^File 'metadata\.jsonl' is not UTF-8 in line 2\. Save it in UTF-8",
        ),
        (
            _then(
                _files(a=None),
                lambda root: _image(root / "b" / "b.png"),
                lambda root: _metadata(root / "b", {}),
            ),
            r"^File 'b/metadata\.jsonl' is in a subfolder.* only read at the top .*/b' as the data folder",
        ),
        (
            _second_line("{'file_name': 1}"),
            r"^metadata\.jsonl line 2 is not valid JSON \(.*\)\. Write one object",
        ),
        (_second_line("[" * 100_000), "line 2 is not valid JSON"),
        (
            _second_line('["a.png"]'),
            r"line 2 is not a JSON object\. Write one",
        ),
        (
            _line(text="b"),
            r"line 2 must have the name of an image in file_name, got None\. Add it",
        ),
        (_line(file_name=3, text="b"), "line 2 must have the name of an image in file_name, got 3"),
        (
            _line(file_name="b.png", text="b"),
            r"line 2 names 'b\.png', which is not an image in the data folder\. Add",
        ),
        (
            _line(file_name="a.png", text="b"),
            r"line 2 repeats 'a\.png' from line 1\. Remove one",
        ),
        (_line(file_name="b" * 10_000, text="b"), r"line 2 names 'b{195} \.\.\., which is not an image in"),
        (_line(file_name="./a.png", text="b"), r"line 2 repeats 'a\.png' from line 1"),
        (
            _line(file_name="../b.png", text="b"),
            r"line 2 has a file_name outside the data folder: '\.\./b\.png'\. ",
        ),
        (
            _line(file_name="x/../../b.png", text="b"),
            r"line 2 .* outside the data folder: .*\. Name the image",
        ),
        (
            _line(file_name="/etc/b.png", text="b"),
            "line 2 has a file_name outside the data folder: '/etc/b.png'",
        ),
        (_line(file_name="C:\\b.png", text="b"), "line 2 .* outside the data folder"),
        (_line(file_name="\n.png", text="b"), r"line 2 names '\\n\.png', which is not an image"),
        (
            _named_in_latin_1,
            r"^The name of file 'caf\\udce9\.png' is not UTF-8\. Rename it\.$",
        ),
    ],
)
def test_refuses_what_does_not_match_up(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    make(root)
    with pytest.raises(DataError, match=message) as caught:
        FolderSource(root)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({}, r"has neither text nor caption\. Put the caption into the field text"),
        ({"text": "a", "caption": "b"}, r"has both text and caption\. Put the caption into the field text"),
        ({"text": 3}, r"must have a caption or a list of captions in text, got 3\. Write"),
        ({"caption": ["a", 3]}, r"must have a caption or a list of captions in caption, got \['a', 3\]"),
        ({"text": "half \ud83d"}, r"has invalid Unicode in text\. Write the caption again"),
    ],
)
def test_refuses_captions_that_say_nothing(tmp_path: Path, fields: dict[str, object], rule: str) -> None:
    _image(tmp_path / "a.png")
    _metadata(tmp_path, {"file_name": "a.png", **fields})
    with pytest.raises(DataError, match=rf"^metadata\.jsonl line 1 {rule}"):
        FolderSource(tmp_path)


@pytest.mark.parametrize("empty", ["", " \n", None, [], ["", " "]])
def test_images_with_empty_captions_are_left_out_and_named(tmp_path: Path, empty: object) -> None:
    for name in ("a.png", "b.png", "c.png"):
        _image(tmp_path / name)
    lines = [{"file_name": "a.png", "text": "a"}, {"file_name": "b.png", "text": empty}]
    _metadata(tmp_path, *lines, {"file_name": "c.png", "text": ["c", ""]})
    source = FolderSource(tmp_path)
    assert source.without_caption == ["b.png"]
    assert [(source.name(i), source.captions(i)) for i in range(len(source))] == [
        ("a.png", ("a",)),
        ("c.png", ("c",)),
    ]


def test_an_empty_text_file_is_an_empty_caption(with_text_files: Path) -> None:
    before = FolderSource(with_text_files)
    (with_text_files / "b.txt").write_bytes(b"\xef\xbb\xbf \n")
    source = FolderSource(with_text_files)
    assert source.without_caption == ["b.png"]
    assert len(source) == len(before) - 1
    tally = Tally()
    assert len(list(FolderReader(with_text_files).items(tally))) == len(source)
    assert tally.dropped == {"no caption": 1}


def test_a_damaged_image_is_named_when_it_is_read(with_text_files: Path) -> None:
    content = (with_text_files / "b.png").read_bytes()
    (with_text_files / "b.png").write_bytes(content[: len(content) // 2])
    source = FolderSource(with_text_files)
    with pytest.raises(DataError, match=r"^image '.*b\.png' cannot be used: it is damaged or truncated"):
        source.example(0, np.random.default_rng(0), 8)


def test_fingerprint_names_an_image_that_is_gone(with_text_files: Path) -> None:
    source = FolderSource(with_text_files)
    (with_text_files / "b.png").unlink()
    with pytest.raises(DataError, match=r"^Image 'b\.png' cannot be read \(No such file"):
        source.fingerprint()


def _named(source: FolderSource) -> dict[str, tuple[str, ...]]:
    return {source.name(item): source.captions(item) for item in range(len(source))}


@pytest.mark.parametrize("name", ["metadata.jsonl", "b.txt"])
@pytest.mark.parametrize("kind", ["fifo", "endless"])
def test_caption_files_that_never_end_are_refused(tmp_path: Path, name: str, kind: str) -> None:
    """Reading a FIFO blocks forever, and reading /dev/zero fills the memory."""
    _image(tmp_path / "b.png")
    os.mkfifo(tmp_path / name) if kind == "fifo" else (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(DataError, match=rf"^File '{name}' is not a regular file"):
        FolderSource(tmp_path)


def test_a_caption_of_over_a_mebibyte_is_refused(tmp_path: Path) -> None:
    _image(tmp_path / "b.png")
    (tmp_path / "b.txt").write_text("x" * (1 << 20) + "x")
    with pytest.raises(DataError, match=r"File 'b.txt' is too large\. It may have at most 1 MiB"):
        FolderSource(tmp_path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("00.tar", "For the tars in it, use '.*/\\*.tar'"),
        ("a.parquet", "For the parquet files in it, use '.*/\\*.parquet'"),
        ("00.tar.gz", "Decompress the compressed files in it \\(tars to .tar\\)"),
        ("data-00000-of-00001.arrow", "The Arrow files in it lack the other files of save_to_disk"),
    ],
)
def test_other_data_than_images_is_named(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=rf"contains no images .*\. {said}"):
        FolderSource(tmp_path)


def test_names_match_in_any_normal_form_and_with_backslashes(tmp_path: Path) -> None:
    """macOS decomposes é into e and an accent, and Windows writes backslashes."""
    apart, whole = "cafe\u0301", "caf\u00e9"
    _image(tmp_path / f"{apart}.png")
    _image(tmp_path / "cats" / f"{whole}.png")
    _metadata(
        tmp_path,
        {"file_name": f"{whole}.png", "text": "top"},
        {"file_name": f"cats\\{apart}.png", "text": "cat"},
    )
    assert _named(FolderSource(tmp_path)) == {f"{apart}.png": ("top",), f"cats/{whole}.png": ("cat",)}
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / f"{whole}.txt").write_text("beside")
    (tmp_path / "cats" / f"{whole}.txt").write_text("beside too")
    assert _named(FolderSource(tmp_path)) == {
        f"{apart}.png": ("beside",),
        f"cats/{whole}.png": ("beside too",),
    }


def test_a_name_that_could_be_either_of_two_is_refused(tmp_path: Path) -> None:
    for name in ("e\u0301\u0323", "e\u0323\u0301"):  # two orders of the same accents
        _image(tmp_path / f"{name}.png")
    _metadata(tmp_path, {"file_name": "\u1eb9\u0301.png", "text": "which?"})
    with pytest.raises(DataError, match="is not an image in the data folder"):
        FolderSource(tmp_path)


def test_backslashes_do_not_lead_out(tmp_path: Path) -> None:
    _image(tmp_path / "root" / "a.png")
    _image(tmp_path / "b.png")
    _metadata(tmp_path / "root", {"file_name": "x\\..\\..\\b.png", "text": "b"})
    with pytest.raises(DataError, match="outside the data folder"):
        FolderSource(tmp_path / "root")


@pytest.mark.parametrize("ending", [".jfif", ".JPE"])
def test_other_endings_of_jpegs(tmp_path: Path, ending: str) -> None:
    Image.new("RGB", (8, 8), "blue").save(tmp_path / f"a{ending}", "JPEG")
    (tmp_path / "a.txt").write_text("blue")
    source = FolderSource(tmp_path)
    assert _named(source) == {f"a{ending}": ("blue",)}
    assert source.image(0, np.random.default_rng(0), 8).shape == (8, 8, 3)


def test_caption_files_of_kohya(tmp_path: Path) -> None:
    for name in ("a", "b"):
        _image(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.caption").write_text(f"caption {name}")
    (tmp_path / "b.txt").write_text("text b")
    assert _named(FolderSource(tmp_path)) == {"a.png": ("caption a",), "b.png": ("text b",)}
    assert _named(FolderSource(tmp_path, text_column="caption"))["b.png"] == ("caption b",)
    (tmp_path / "c.caption").write_text("of nothing")
    with pytest.raises(DataError, match=r"File 'c.caption' has no image next to it"):
        FolderSource(tmp_path)


def test_metadata_in_csv_and_parquet(tmp_path: Path) -> None:
    _image(tmp_path / "a.png")
    _image(tmp_path / "x" / "b.png")
    (tmp_path / "metadata.csv").write_text("file_name,text,punsafe\na.png,A,0.5\nx\\b.png,B,\n")
    source = FolderSource(tmp_path)
    assert _named(source) == {"a.png": ("A",), "x/b.png": ("B",)}
    assert source.fields(0)["punsafe"] == 0.5
    (tmp_path / "metadata.csv").unlink()
    pq.write_table(
        pa.table({"file_name": ["x/b.png", "a.png"], "caption": [["B", "b"], ["A"]]}),
        tmp_path / "metadata.parquet",
    )
    assert _named(FolderSource(tmp_path)) == {"a.png": ("A",), "x/b.png": ("B", "b")}
    _metadata(tmp_path, {"file_name": "a.png", "text": "1"}, {"file_name": "x/b.png", "text": "2"})
    assert _named(FolderSource(tmp_path))["a.png"] == ("1",)


def test_text_files_come_before_metadata_in_csv(with_text_files: Path) -> None:
    """Folders with text files may have always had such a file."""
    (with_text_files / "metadata.csv").write_text("what,ever\n")
    assert _caption(FolderSource(with_text_files), 1) == "a cat"


def test_metadata_of_a_folder_inside_is_named(tmp_path: Path) -> None:
    _image(tmp_path / "train" / "a.png")
    (tmp_path / "train" / "metadata.csv").write_text("file_name,text\na.png,a\n")
    with pytest.raises(DataError, match=r"File 'train/metadata.csv' .* use '.*/train' as the data folder"):
        FolderSource(tmp_path)


def test_columns_of_the_metadata_file(tmp_path: Path) -> None:
    _image(tmp_path / "a.png")
    _image(tmp_path / "b.png")
    row = {"file_name": "a.png", "other": "b.png", "caption": "short", "caption_llava": "long"}
    (tmp_path / "b.txt").write_text("")
    _metadata(tmp_path, row, {**row, "file_name": "b.png", "other": "a.png", "caption_llava": "longer"})
    named = _named(FolderSource(tmp_path, text_column="caption_llava"))
    assert named == {"a.png": ("long",), "b.png": ("longer",)}
    named = _named(FolderSource(tmp_path, image_column="other", text_column="caption_llava"))
    assert named == {"a.png": ("longer",), "b.png": ("long",)}
    with pytest.raises(
        DataError, match=r"no column 'nothing'\. Its columns are: file_name, other, caption, "
    ):
        FolderSource(tmp_path, text_column="nothing")
    with pytest.raises(DataError, match="must have the name of an image in image, got None"):
        FolderSource(tmp_path, image_column="image", text_column="caption_llava")


def test_columns_without_a_metadata_file(with_text_files: Path) -> None:
    with pytest.raises(DataError, match="no column 'caption_llava'"):
        FolderSource(with_text_files, text_column="caption_llava")
    with pytest.raises(DataError, match=r"no column '\.\./x'"):
        FolderSource(with_text_files, text_column="../x")
    with pytest.raises(DataError, match="no column 'image'"):
        FolderSource(with_text_files, image_column="image")
    assert _caption(FolderSource(with_text_files, text_column="txt"), 1) == "a cat"
    for name in ("b", "cats/a"):
        (with_text_files / f"{name}.json").write_text(json.dumps({"caption_llava": f"long {name}"}))
    assert _caption(FolderSource(with_text_files, text_column="caption_llava"), 1) == "long cats/a"
    with pytest.raises(DataError, match=r"'b.json' has no column 'gone'\. Its columns"):
        FolderSource(with_text_files, text_column="gone")


def test_images_that_are_pipes_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a")
    source = FolderSource(tmp_path)
    assert source.converted() is None
    with pytest.raises(DataError, match="is not a regular file"):
        source.image(0, np.random.default_rng(0), 8)

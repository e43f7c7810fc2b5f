"""The index of images in tars and tables, for access by number."""

import functools
import io
import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from wuerstchen.data import tables
from wuerstchen.data.folder import FolderSource
from wuerstchen.data.index import IndexedSource, cache_folder
from wuerstchen.data.open import open_source
from wuerstchen.data.plan import held_out_names
from wuerstchen.data.tars import TarReader
from wuerstchen.errors import DataError, RunFolderError, UserError


@functools.cache
def image(number: int) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((40, 24)).save(file, "PNG")
    return file.getvalue()


def caption(number: int) -> str:
    return f"thing {number}"


def write_folder(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:04d}.png").write_bytes(image(number))
        (folder / f"{number:04d}.txt").write_text(caption(number))
    return folder


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_tars(folder: Path, count: int, each: int = 50) -> Path:
    """Shards with an image, a caption, and another one in JSON."""
    folder.mkdir()
    for first in range(0, count, each):
        with tarfile.open(folder / f"{first // each:03d}.tar", "w") as tar:
            for number in range(first, min(first + each, count)):
                also = json.dumps({"long": f"a long story of {number}"}).encode()
                add(tar, f"{number:04d}.png", image(number))
                add(tar, f"{number:04d}.txt", caption(number).encode())
                add(tar, f"{number:04d}.json", also)
    return folder


def write_parquet(folder: Path, count: int, each: int = 50) -> Path:
    """Files with several row groups each."""
    folder.mkdir()
    for first in range(0, count, each):
        numbers = range(first, min(first + each, count))
        cells = [{"bytes": image(number), "path": f"{number:04d}.png"} for number in numbers]
        table = pa.table({"image": cells, "text": [caption(number) for number in numbers]})
        pq.write_table(table, folder / f"{first:04d}.parquet", row_group_size=7)
    return folder


def write_saved(folder: Path, count: int) -> Path:
    datasets = pytest.importorskip("datasets")
    rows = {
        "image": [{"bytes": image(number), "path": None} for number in range(count)],
        "text": [caption(number) for number in range(count)],
    }
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(folder))
    return folder


WRITERS = {"tars": write_tars, "parquet": write_parquet, "saved": write_saved}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("WUERSTCHEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "indexes"


def opened(folder: Path, part: str = "train", **columns: str) -> IndexedSource:
    source = open_source(str(folder), part, **columns)
    assert isinstance(source, IndexedSource)
    return source


def names(source: IndexedSource) -> list[str]:
    return [source.name(item) for item in range(len(source))]


@pytest.mark.parametrize("kind", WRITERS)
def test_any_image_is_that_of_a_folder_with_the_same_files(kind, tmp_path):
    """In any order, also in another process."""
    folder = FolderSource(write_folder(tmp_path / "folder", 60))
    source = opened(WRITERS[kind](tmp_path / kind, 60))
    assert len(source) == 60
    sent = pickle.loads(pickle.dumps(source))
    for item in (59, 0, 13, 12, 50, 1):
        for size in (16, (24, 16)):
            wanted = folder.example(item, np.random.default_rng(item), size)
            found = sent.example(item, np.random.default_rng(item), size)
            assert np.array_equal(found.image, wanted.image)
            assert found.caption == wanted.caption == caption(item)
        assert source.size(item) == folder.size(item) == (40, 24)
        assert source.captions(item) == (caption(item),)


@pytest.mark.parametrize("kind", WRITERS)
def test_one_image_in_fifty_is_held_out_by_its_name(kind, tmp_path):
    folder = WRITERS[kind](tmp_path / kind, 260)
    train, kept = opened(folder), opened(folder, "heldout")
    every = names(train) + names(kept)
    assert len(set(every)) == 260
    assert set(names(kept)) == held_out_names(every)
    assert names(kept)
    # Both subsets keep the order of the data, and their numbers refer to their own images.
    numbers = [int(train.captions(item)[0].split()[1]) for item in range(len(train))]
    assert numbers == sorted(numbers)
    for source in (train, kept):
        last = len(source) - 1
        assert source.bytes_of(last) == image(int(source.captions(last)[0].split()[1]))
        with pytest.raises(IndexError):
            source.name(last + 1)


def test_fewer_than_a_hundred_images_hold_out_none(tmp_path):
    folder = write_tars(tmp_path / "tars", 99)
    assert len(opened(folder)) == 99
    assert len(opened(folder, "heldout")) == 0


def test_the_list_is_made_once_and_again_for_other_files(tmp_path, monkeypatch, cache):
    folder, made, items = write_tars(tmp_path / "tars", 12), [], TarReader.items

    def counted(self, tally):
        made.append(self)
        return items(self, tally)

    monkeypatch.setattr(TarReader, "items", counted)
    first = opened(folder)
    assert opened(folder).fingerprint() == first.fingerprint()
    assert len(made) == 1
    (cache / f".{next(cache.glob('*-*')).name}.left").mkdir()  # left by a killed process
    # The same bytes with another time are indexed again, with the same fingerprint.
    os.utime(folder / "000.tar", ns=(1, 1))
    assert opened(folder).fingerprint() == first.fingerprint()
    assert len(made) == 2
    shutil.rmtree(folder)
    write_tars(folder, 13)
    changed = opened(folder)
    assert len(made) == 3
    assert len(changed) == 13
    assert changed.fingerprint() != first.fingerprint()
    assert first.name(11) == "000.tar:0011"  # open files remain readable
    assert len(list(cache.glob("*/index.json"))) == 1  # and no old index is left
    # A damaged index is rebuilt.
    wanted, rows = names(changed), next(cache.glob("*/rows.bin"))
    rows.unlink()
    rows.write_bytes(b"x")
    assert names(opened(folder)) == wanted
    assert len(made) == 4
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]


def test_a_column_is_part_of_the_data(tmp_path):
    folder = write_tars(tmp_path / "tars", 5)
    usual, long = opened(folder), opened(folder, text_column="long")
    assert long.captions(3) == ("a long story of 3",)
    assert usual.captions(3) == ("thing 3",)
    assert usual.fingerprint() != long.fingerprint()
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert opened(moved).fingerprint() == usual.fingerprint()
    with pytest.raises(DataError, match="no column 'gone'"):
        opened(folder, text_column="gone")


def test_what_is_sent_to_another_process_does_not_grow_with_the_data(tmp_path):
    few, many = (opened(write_parquet(tmp_path / str(n), n, each=500)) for n in (120, 420))
    assert len(pickle.dumps(many)) < len(pickle.dumps(few)) + 300  # 16 bytes for one image in fifty


def test_what_cannot_be_used_is_left_out_and_named(tmp_path):
    folder = write_tars(tmp_path / "tars", 4)
    with tarfile.open(folder / "000.tar", "a") as tar:
        for name, data in (
            ("x.png", image(1)),
            ("y.txt", b"no image"),
            ("z.png", image(2)),
            ("z.txt", b"\xff"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    for _ in range(2):  # also with an existing index
        source = opened(folder)
        assert len(source) == 4
        assert source.index.tally.dropped == {"no caption": 1, "no image": 1, "bad text": 1}
        assert [name for name, _ in source.left_out()] == ["000.tar:z"]
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.tar").write_bytes((folder / "000.tar").read_bytes()[:700])
    with pytest.raises(
        DataError, match=r"contains no image with a caption \(1 shard cut short\)\. Use other data"
    ):
        opened(tmp_path / "none")


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    folder = write_tars(tmp_path / "tars", 3)
    source = opened(folder)
    (folder / "000.tar").unlink()
    with pytest.raises(DataError, match=r"Image '000.tar:0001' cannot be read"):
        source.image(1, np.random.default_rng(0), 16)
    assert source.size(1) is None


def test_row_groups_that_are_too_large_are_refused_when_the_list_is_made(tmp_path, monkeypatch):
    folder = write_parquet(tmp_path / "parquet", 20)
    monkeypatch.setattr(tables, "MAX_GROUP", 100)
    with pytest.raises(DataError, match=r"has a row group with 0 MiB .* with row_group_size=100"):
        opened(folder)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    folder = write_tars(tmp_path / "tars", 3)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WUERSTCHEN_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written to .* set WUERSTCHEN_CACHE to another"):
        opened(folder)


def test_the_cache_is_where_others_are(monkeypatch, tmp_path):
    monkeypatch.delenv("WUERSTCHEN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "wuerstchen" / "indexes"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert cache_folder() == tmp_path / "home" / ".cache" / "wuerstchen" / "indexes"


def test_without_a_home_or_locks_the_cache_is_named(monkeypatch, tmp_path):
    folder = write_tars(tmp_path / "tars", 3)

    def lockless(*_: object, **__: object) -> None:
        raise RunFolderError("A file system without locks.")

    monkeypatch.setattr("wuerstchen.data.index.acquired", lockless)
    with pytest.raises(UserError, match=r"without locks\. Set WUERSTCHEN_CACHE to choose the folder"):
        opened(folder)

    def homeless() -> Path:
        raise RuntimeError

    monkeypatch.delenv("WUERSTCHEN_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(UserError, match=r"There is no home folder .* Set WUERSTCHEN_CACHE"):
        opened(folder)

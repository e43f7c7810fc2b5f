"""Captioned images in folders, tars, parquet files and data sets on the hub."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from wuerstchen.data.emoji import CENTRED, EmojiSource, sample_root
from wuerstchen.data.filters import Tally
from wuerstchen.data.items import Item, Reader
from wuerstchen.data.open import open_reader
from wuerstchen.data.plan import generator
from wuerstchen.data.readers import EmojiReader, FolderReader
from wuerstchen.errors import DataError
from wuerstchen.images import decode_image


def image_file(colour: str = "red", suffix: str = "jpeg") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (24, 16), colour).save(file, suffix)
    return file.getvalue()


def colour_of(data: bytes) -> list[int]:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)[0, 0].tolist()


def read(reader: Reader) -> tuple[list[Item], Tally]:
    tally = Tally()
    return list(reader.items(tally)), tally


def member(name: str, data: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def write_tar(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key: str, caption: str, colour: str = "red") -> list[tuple[tarfile.TarInfo, bytes]]:
    return [member(f"{key}.jpg", image_file(colour)), member(f"{key}.txt", caption.encode())]


def test_a_folder_with_its_metadata(tmp_path):
    for name in ("b.jpg", "a.jpg"):
        (tmp_path / name).write_bytes(image_file("blue"))
    lines = [
        {"file_name": "a.jpg", "text": ["one", "two"], "pwatermark": 0.0, "other": 1},
        {"file_name": "b.jpg", "text": "b"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    reader = open_reader(tmp_path)
    assert isinstance(reader, FolderReader)
    items, tally = read(reader)
    assert [(i.name, i.captions, i.fields) for i in items] == [
        ("a.jpg", ("one", "two"), {"pwatermark": 0.0}),
        ("b.jpg", ("b",), {}),
    ]
    assert not tally.dropped
    assert reader.read("a.jpg", items[0].place) == image_file("blue")
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(DataError, match=r"Image 'a.jpg' is not a regular file"):
        reader.read("a.jpg", items[0].place)
    os.mkfifo(tmp_path / "a.jpg")  # reading it would block forever
    with pytest.raises(DataError, match="not a regular file"):
        reader.read("a.jpg", items[0].place)


@pytest.fixture
def three(tmp_path) -> Path:
    return write_tar(tmp_path / "a.tar", *sample("0", "zero"), *sample("1", "one"), *sample("2", "two"))


@pytest.mark.parametrize("source", ["nowhere", "a.tar.gz", "/nowhere/x", "../up", ""])
def test_what_is_no_source(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"does not exist|is compressed|contains no images"):
        read(open_reader(source))


def test_patterns_without_files_and_mixed_folders(tmp_path, three):
    with pytest.raises(DataError, match=r"matches no \.tar file"):
        open_reader(str(tmp_path / "x*.tar"))
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="contains both tars and parquet files"):
        open_reader(tmp_path)


def test_emoji_are_composed_several_times(tmp_path):
    reader = open_reader("sample")
    assert isinstance(reader, EmojiReader)
    reader = EmojiReader(sample_root(), views=2)
    items, tally = read(reader)
    assert len(items) == 200
    assert not tally.dropped
    assert [item.name for item in items[:2]] == [f"fluent-3d/1f604.webp#view={view}" for view in (0, 1)]
    images = [decode_image(reader.read(i.name, i.place), i.name) for i in items[:2]]
    assert {image.size for image in images} == {(256, 256)}
    assert np.asarray(images[0]).tobytes() != np.asarray(images[1]).tobytes()
    # Each view can be read separately, and matches its caption.
    again = EmojiReader(sample_root(), views=2)
    expected = EmojiSource(sample_root(), centred=CENTRED).example(0, generator(0, 1, "view"), 256)
    assert np.array_equal(np.asarray(decode_image(again.read("x", items[1].place), "x")), expected.image)
    assert items[1].captions == (expected.caption,)
    expected = EmojiSource(sample_root(), centred=CENTRED).example(1, generator(0, 2, "view"), 256)
    assert np.array_equal(np.asarray(decode_image(again.read("x", items[2].place), "x")), expected.image)
    assert EmojiReader(sample_root(), views=3).fingerprint() != reader.fingerprint()


def test_a_damaged_emoji_is_skipped_counted_and_named(tmp_path):
    shutil.copytree(sample_root(), tmp_path / "set")
    (tmp_path / "set" / "fluent-3d" / "1f604.webp").write_bytes(b"nothing")
    items, tally = read(EmojiReader(tmp_path / "set", views=1))
    assert len(items) == 99
    assert tally.dropped == {"damaged image": 1}
    assert tally.damaged[0][0] == "fluent-3d/1f604.webp"


def test_what_img2dataset_writes_as_files(tmp_path):
    """Next to the folder of a shard are its list of downloads and its statistics."""
    shard = tmp_path / "00000"
    shard.mkdir()
    for number in range(3):
        key = f"{number:09d}"
        (shard / f"{key}.jpg").write_bytes(image_file())
        (shard / f"{key}.txt").write_text(f"caption {number}")
        (shard / f"{key}.json").write_text(json.dumps({"pwatermark": number / 4, "original_width": 640}))
    (shard / "000000002.json").write_text("{")
    pq.write_table(pa.table({"url": ["u"], "status": ["success"]}), tmp_path / "00000.parquet")
    (tmp_path / "00000_stats.json").write_text("{}")
    reader = open_reader(tmp_path)
    assert isinstance(reader, FolderReader)
    items, tally = read(reader)
    assert [(i.name, i.captions[0], i.fields["pwatermark"]) for i in items] == [
        ("00000/000000000.jpg", "caption 0", 0.0),
        ("00000/000000001.jpg", "caption 1", 0.25),
    ]
    assert tally.dropped == {"bad text": 1}


def test_what_img2dataset_writes_as_tars(tmp_path):
    write_tar(tmp_path / "00000.tar", *sample("000000000", "a"))
    pq.write_table(pa.table({"url": ["u"], "status": ["success"]}), tmp_path / "00000.parquet")
    assert [i.captions for i in read(open_reader(tmp_path))[0]] == [("a",)]


def test_a_folder_with_metadata_in_parquet_is_a_folder(tmp_path):
    (tmp_path / "a.jpg").write_bytes(image_file())
    pq.write_table(pa.table({"file_name": ["a.jpg"], "text": ["a"]}), tmp_path / "metadata.parquet")
    assert isinstance(open_reader(tmp_path), FolderReader)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("shards/x.tar.gz", "is compressed"),  # it could be a name on the hub
        ("shards/*.TGZ", "is compressed"),
        ("shards/x.zip", "is compressed"),
        ("shards/list.csv", "is not a .tar or .parquet file"),
    ],
)
def test_files_of_other_kinds_are_no_names_on_the_hub(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "list.csv").write_text("")
    with pytest.raises(DataError, match=message):
        open_reader(source)


def test_columns_of_folders_and_of_emoji(tmp_path):
    (tmp_path / "a.jpg").write_bytes(image_file())
    row = {"file_name": "a.jpg", "caption": "short", "caption_llava": "long"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    assert read(open_reader(tmp_path, text_column="caption_llava"))[0][0].captions == ("long",)
    with pytest.raises(DataError, match="no column 'gone'"):
        read(open_reader(tmp_path, text_column="gone"))
    with pytest.raises(DataError, match=r"has no split 'valid'\. Only data sets on the hub and saved ones"):
        open_reader(tmp_path, split="valid")
    with pytest.raises(DataError, match="has no selectable columns"):
        open_reader("sample", text_column="caption")

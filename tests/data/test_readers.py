"""Captioned pictures in folders, tars, parquet files and data sets of the hub."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from wuerstchen.data.emoji import CENTRED, EmojiSource, sample_root
from wuerstchen.data.filters import Tally
from wuerstchen.data.plan import generator
from wuerstchen.data.readers import (
    DatasetReader,
    EmojiReader,
    FolderReader,
    Item,
    ParquetReader,
    Reader,
    TarReader,
    open_reader,
)
from wuerstchen.errors import DataError, UserError
from wuerstchen.images import decode_image


def picture(colour: str = "red", suffix: str = "jpeg") -> bytes:
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
    return [member(f"{key}.jpg", picture(colour)), member(f"{key}.txt", caption.encode())]


def test_a_folder_with_its_metadata(tmp_path):
    for name in ("b.jpg", "a.jpg"):
        (tmp_path / name).write_bytes(picture("blue"))
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
    assert reader.read("a.jpg", items[0].place) == picture("blue")
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(DataError, match=r"image 'a.jpg' is wrong because it is no regular file"):
        reader.read("a.jpg", items[0].place)
    os.mkfifo(tmp_path / "a.jpg")  # which would be waited on for ever
    with pytest.raises(DataError, match="no regular file"):
        reader.read("a.jpg", items[0].place)


def test_tars(tmp_path):
    scores = {"pwatermark": 0.0, "original_width": 640, "original_height": 480, "other": "x"}
    write_tar(
        tmp_path / "1.tar",
        *sample("b/000", " a  blue\nthing ", "blue"),
        member("b/000.json", json.dumps(scores).encode()),
        member("b/001.json", json.dumps({"caption": "in json"}).encode()),
        member("b/001.PNG", picture("lime", "png")),
        member("b/001.cls", b"7"),
    )
    write_tar(tmp_path / "0.tar", *sample("000", "first"))
    reader = open_reader(tmp_path)
    assert isinstance(reader, TarReader)
    items, tally = read(reader)
    assert [(i.name, i.captions) for i in items] == [
        ("0.tar:000", ("first",)),
        ("1.tar:b/000", ("a blue thing",)),
        ("1.tar:b/001", ("in json",)),
    ]
    assert items[1].fields == {k: v for k, v in scores.items() if k != "other"}
    assert not tally.dropped
    # In any order, for other processes read other pictures.
    assert reader.read(items[2].name, items[2].place) == picture("lime", "png")
    assert reader.read(items[1].name, items[1].place) == picture("blue")
    before = reader.fingerprint()
    write_tar(tmp_path / "0.tar", *sample("000", "first"), *sample("001", "x"))
    assert open_reader(tmp_path).fingerprint() != before
    assert [i.name for i in read(open_reader(f"{tmp_path}/[1-9].tar"))[0]] == ["1.tar:b/000", "1.tar:b/001"]


def test_members_that_lead_out_or_are_links_are_skipped_counted_and_named(tmp_path):
    path = write_tar(
        tmp_path / "a.tar",
        *sample("000", "good"),
        *sample("/etc/001", "absolute"),
        *sample("../002", "climbs"),
        *sample("x/../../003", "climbs inside"),
        *sample("C:\\004", "Windows"),
        member("005.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("006.jpg", type=tarfile.LNKTYPE, linkname="000.jpg"),
        member("007.jpg", type=tarfile.FIFOTYPE),
        member("dir", type=tarfile.DIRTYPE),
        *sample("008", "good too"),
    )
    items, tally = read(TarReader([path]))
    assert [i.captions[0] for i in items] == ["good", "good too"]
    assert tally.dropped == {"member leads out": 8, "member is a link": 2, "member is a special file": 1}
    assert (f"{path}: ../002.jpg", "its name leads out of the shard") in tally.damaged
    assert (f"{path}: 005.jpg", "it is a link and no regular file") in tally.damaged


def test_a_size_below_zero_ends_its_shard_alone(tmp_path):
    """It leads before the file's beginning, where seeking is an error of the system and not of tarfile."""
    header, data = member("001.jpg", picture("red"))
    header.pax_headers = {"size": "-9000000"}
    bad = write_tar(tmp_path / "a.tar", *sample("000", "first"), (header, data))
    good = write_tar(tmp_path / "b.tar", *sample("000", "second"))
    items, tally = read(TarReader([bad, good]))
    assert items[-1].captions == ("second",)
    assert tally.dropped == {"shard cut short": 1}


def test_samples_that_lack_something_are_dropped(tmp_path):
    path = write_tar(
        tmp_path / "a.tar",
        member("0.jpg", picture()),
        member("1.txt", b"no picture"),
        *sample("2", " \n "),
        *sample("3", "good"),
        member("4.jpg", picture()),
        member("4.txt", b"\xff\xfe"),
        member("5.jpg", picture()),
        member("5.json", b'{"caption": "x"'),
        member("6.jpg", picture()),
        member("6.json", b"[1]"),
        member("7.jpg", picture()),
        member("7.json", b'{"caption": "\\ud83d"}'),
        member("8.jpg", picture()),
        member("8.txt", b"x" * (1 << 20) + b"x"),
        *sample("9", "twice"),
        member("9.txt", b"other"),
        member("10.jpg", picture()),
        member("10.json", b"[" * 100_000),
        member(".hidden", b""),
        member("README", b""),
    )
    items, tally = read(TarReader([path]))
    assert [i.captions for i in items] == [("good",), ("twice",)]
    assert tally.dropped == {"no caption": 3, "no image": 1, "bad text": 5, "member twice": 1}
    assert {name for name, _ in tally.damaged} == {f"a.tar:{n}" for n in (4, 5, 6, 8, 10)} | {
        f"{path}: 9.txt"
    }


@pytest.fixture
def three(tmp_path) -> Path:
    return write_tar(tmp_path / "a.tar", *sample("0", "zero"), *sample("1", "one"), *sample("2", "two"))


def test_a_shard_cut_at_any_byte_gives_what_came_before(three):
    data = three.read_bytes()
    with tarfile.open(three) as tar:
        ends = [m.offset_data + m.size for m in tar.getmembers()]
        begins = [m.offset for m in tar.getmembers()]
    for length in [*range(0, ends[-1] + 1024, 256), *(b + d for b in (*begins, *ends) for d in (-1, 0, 1))]:
        if length < 0:
            continue
        three.write_bytes(data[:length])
        items, tally = read(TarReader([three]))
        # A sample is whole when its last member is, and known to be so when the next one has begun.
        whole = [i for i, end in enumerate(ends[1::2]) if length >= end]
        assert [int(i.name[-1]) for i in items] in (whole, whole[:-1]), length
        assert [i.captions[0] for i in items] == ["zero", "one", "two"][: len(items)]
        if length < ends[-1] + 512:
            assert tally.dropped == {"shard cut short": 1}, length
            assert tally.damaged[0][0] == str(three)
            assert f"of {length}" in tally.damaged[0][1]
    three.write_bytes(data)
    assert len(read(TarReader([three]))[0]) == 3


def test_a_damaged_header_is_noticed(three):
    data = bytearray(three.read_bytes())
    with tarfile.open(three) as tar:
        begin = tar.getmember("1.txt").offset
    data[begin : begin + 100] = b"\xff" * 100
    three.write_bytes(bytes(data))
    items, tally = read(TarReader([three]))
    assert [i.captions[0] for i in items] == ["zero"]
    assert f"damaged at byte {begin}" in tally.damaged[0][1]


def test_a_member_larger_than_any_file(three):
    data = bytearray(three.read_bytes())
    info = tarfile.TarInfo("1.jpg")
    info.size = 1 << 60
    with tarfile.open(three) as tar:
        begin = tar.getmember("1.jpg").offset
    data[begin : begin + 512] = info.tobuf(tarfile.GNU_FORMAT)
    three.write_bytes(bytes(data))
    items, tally = read(TarReader([three]))
    assert [i.captions[0] for i in items] == ["zero"]
    assert tally.dropped == {"shard cut short": 1}


def test_no_tar_at_all_among_others(tmp_path, three):
    (tmp_path / "b.tar").write_bytes(b"")
    (tmp_path / "c.tar").write_bytes(os.urandom(5000))
    items, tally = read(open_reader(tmp_path))
    assert len(items) == 3
    assert tally.dropped == {"shard cut short": 2}


def test_a_picture_that_vanished_from_its_shard(three):
    reader = TarReader([three])
    items, _ = read(reader)
    three.write_bytes(three.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"image 'a.tar:2' is wrong because .* ends in it"):
        reader.read(items[2].name, items[2].place)


@pytest.mark.parametrize("nested", [False, True])
def test_parquet(tmp_path, nested):
    colours = ["red", "lime", "blue", "white", "black"]
    images = [picture(c, "png") for c in colours]
    table = pa.table(
        {
            "image": [{"bytes": i, "path": None} for i in images] if nested else images,
            "caption": ["a", None, "c", " ", "e"],
            "AESTHETIC_SCORE": [5.5, 6.0, 7.0, 8.0, None],
        }
    )
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=2)
    reader = open_reader(tmp_path)
    assert isinstance(reader, ParquetReader)
    items, tally = read(reader)
    assert [(i.name, i.captions, i.fields) for i in items] == [
        ("x.parquet:0", ("a",), {"AESTHETIC_SCORE": 5.5}),
        ("x.parquet:2", ("c",), {"AESTHETIC_SCORE": 7.0}),
        ("x.parquet:4", ("e",), {}),
    ]
    assert tally.dropped == {"no caption": 2}
    assert [reader.read(i.name, i.place) for i in reversed(items)] == [images[4], images[2], images[0]]


def test_parquet_of_a_hostile_user(tmp_path):
    pq.write_table(
        pa.table({"text": ["a", "b"], "image": [{"bytes": None, "path": "/etc/passwd"}, None]}),
        tmp_path / "a.parquet",
    )
    (tmp_path / "b.parquet").write_bytes(b"PAR1" + os.urandom(99) + b"PAR1")
    (tmp_path / "c.parquet").write_bytes(b"")
    reader = open_reader(tmp_path)
    items, tally = read(reader)
    assert tally.dropped == {"file unreadable": 2}
    for item in items:
        with pytest.raises(DataError, match="its cell holds no bytes"):
            reader.read(item.name, item.place)


def test_columns_are_named_where_they_cannot_be_told(tmp_path):
    pq.write_table(pa.table({"url": ["u"], "alt": ["a"], "bild": [picture()]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"\(url, alt, bild\) is called .*; name it with --image-column"):
        read(open_reader(tmp_path))
    with pytest.raises(DataError, match="no column 'picture'; its columns are url, alt, bild"):
        read(open_reader(tmp_path, image_column="picture"))
    items, _ = read(open_reader(tmp_path, image_column="bild", text_column="alt"))
    assert items[0].captions == ("a",)


def test_data_sets_of_the_hub(tmp_path):
    rows = {
        "image": [{"bytes": picture(c), "path": None} for c in ("red", "blue")],
        "text": ["r", ""],
        "punsafe": [0.0, 0.5],
    }
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "punsafe": datasets.Value("float32")}
    )
    reader = DatasetReader(datasets.Dataset.from_dict(rows, features=features))
    items, tally = read(reader)
    assert [(i.name, i.captions, i.fields) for i in items] == [("row 0", ("r",), {"punsafe": 0.0})]
    assert tally.dropped == {"no caption": 1}
    assert reader.read(items[0].name, items[0].place) == picture("red")


def test_a_local_data_set_through_load_dataset(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "0.jpg").write_bytes(picture("blue"))
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "0.jpg", "text": "blue"}))
    reader = open_reader(folder, format="hub")
    assert isinstance(reader, DatasetReader)
    items, _ = read(reader)
    assert [i.captions for i in items] == [("blue",)]
    assert reader.read(items[0].name, items[0].place) == picture("blue")


def test_a_name_that_the_hub_does_not_give(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(DataError, match=r"data 'owner/name' is wrong .* from the hub \(offline\)"):
        open_reader("owner/name")


@pytest.mark.parametrize("source", ["nowhere", "a.tar.gz", "/nowhere/x", "../up", ""])
def test_what_is_no_source(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="is wrong because"):
        read(open_reader(source))


def test_patterns_without_files_and_mixed_folders(tmp_path, three):
    with pytest.raises(DataError, match=r"no \.tar file is there"):
        open_reader(str(tmp_path / "x*.tar"))
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="holds both tars and parquet files"):
        open_reader(tmp_path)


def test_without_the_package_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=r'pip install "wuerstchen\[data\]"'):
        ParquetReader([tmp_path / "a.parquet"])


def test_captions_in_binary_columns_are_texts(tmp_path):
    """As older exports write them; they counted as no caption."""
    table = {"image": [picture("blue")] * 3, "text": pa.array(["é".encode(), b"\xff", None], pa.binary())}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    items, tally = read(ParquetReader([tmp_path / "a.parquet"]))
    assert [i.captions for i in items] == [("é",)]
    assert tally.dropped == {"no caption": 2}


def test_emoji_are_composed_several_times(tmp_path):
    reader = open_reader("sample")
    assert isinstance(reader, EmojiReader)
    reader = EmojiReader(sample_root(), views=2)
    items, tally = read(reader)
    assert len(items) == 200
    assert not tally.dropped
    assert [item.name for item in items[:2]] == [f"fluent-3d/1f604.webp#view={view}" for view in (0, 1)]
    pictures = [decode_image(reader.read(i.name, i.place), i.name) for i in items[:2]]
    assert {picture.size for picture in pictures} == {(256, 256)}
    assert np.asarray(pictures[0]).tobytes() != np.asarray(pictures[1]).tobytes()
    # Any view can be read alone, and is what its caption was made for.
    again = EmojiReader(sample_root(), views=2)
    expected = EmojiSource(sample_root(), centred=CENTRED).example(0, generator(0, 1, "view"), 256)
    assert np.array_equal(np.asarray(decode_image(again.read("x", items[1].place), "x")), expected.image)
    assert items[1].captions == (expected.caption,)
    assert EmojiReader(sample_root(), views=3).fingerprint() != reader.fingerprint()


def test_a_damaged_emoji_is_skipped_counted_and_named(tmp_path):
    shutil.copytree(sample_root(), tmp_path / "set")
    (tmp_path / "set" / "fluent-3d" / "1f604.webp").write_bytes(b"nothing")
    items, tally = read(EmojiReader(tmp_path / "set", views=1))
    assert len(items) == 99
    assert tally.dropped == {"damaged image": 1}
    assert tally.damaged[0][0] == "fluent-3d/1f604.webp"

"""Parquet files, and data sets of Hugging Face's library."""

import io
import json
import os

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from wuerstchen.data.filters import Filters, Tally
from wuerstchen.data.items import Item, NotDownloaded, Reader
from wuerstchen.data.open import open_reader
from wuerstchen.data.tables import DatasetReader, ParquetReader
from wuerstchen.errors import DataError, UserError


def image_file(colour: str = "red", suffix: str = "jpeg") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (24, 16), colour).save(file, suffix)
    return file.getvalue()


def read(reader: Reader) -> tuple[list[Item], Tally]:
    tally = Tally()
    return list(reader.items(tally)), tally


@pytest.mark.parametrize("nested", [False, True])
def test_parquet(tmp_path, nested):
    colours = ["red", "lime", "blue", "white", "black"]
    images = [image_file(c, "png") for c in colours]
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
        with pytest.raises(DataError, match="has an empty cell"):
            reader.read(item.name, item.place)


def test_columns_are_named_where_they_cannot_be_told(tmp_path):
    pq.write_table(pa.table({"url": ["u"], "alt": ["a"], "bild": [image_file()]}), tmp_path / "a.parquet")
    with pytest.raises(
        DataError, match=r"no image column: url, alt, bild\. It must be one of .* with --image-column"
    ):
        read(open_reader(tmp_path))
    with pytest.raises(DataError, match=r"no column 'image'\. Its columns are: url, alt, bild"):
        read(open_reader(tmp_path, image_column="image"))
    items, _ = read(open_reader(tmp_path, image_column="bild", text_column="alt"))
    assert items[0].captions == ("a",)


def test_data_sets_of_the_hub(tmp_path):
    rows = {
        "image": [{"bytes": image_file(c), "path": None} for c in ("red", "blue")],
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
    assert reader.read(items[0].name, items[0].place) == image_file("red")


def test_a_local_data_set_through_load_dataset(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "0.jpg").write_bytes(image_file("blue"))
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "0.jpg", "text": "blue"}))
    reader = open_reader(folder, format="hub")
    assert isinstance(reader, DatasetReader)
    items, _ = read(reader)
    assert [i.captions for i in items] == [("blue",)]
    assert reader.read(items[0].name, items[0].place) == image_file("blue")


def test_a_name_that_the_hub_does_not_give(monkeypatch, tmp_path):
    def offline(*_, **__):
        raise OSError("offline")

    tried = []
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", offline)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: tried.append(1) or offline())
    with pytest.raises(
        DataError, match=r"Data 'owner/name' is neither a local path nor available on the hub \(offline\)"
    ):
        open_reader("owner/name")
    assert not tried  # it would retry for half a minute
    (tmp_path / "datasets--owner--name").mkdir()  # then the data can be in the cache
    with pytest.raises(
        DataError, match=r"Data 'owner/name' is neither a local path nor available on the hub \(offline\)"
    ):
        open_reader("owner/name")
    assert tried


def test_without_the_package_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=r'pip install "wuerstchen\[data\]"'):
        ParquetReader([tmp_path / "a.parquet"])


def test_captions_in_binary_columns_are_texts(tmp_path):
    """Older exports write them. They used to count as missing captions."""
    table = {"image": [image_file("blue")] * 3, "text": pa.array(["é".encode(), b"\xff", None], pa.binary())}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    items, tally = read(ParquetReader([tmp_path / "a.parquet"]))
    assert [i.captions for i in items] == [("é",)]
    assert tally.dropped == {"no caption": 2}


def test_failed_downloads_are_told_from_damage(tmp_path):
    images = [image_file(), None, b"no image"]
    pq.write_table(pa.table({"jpg": images, "caption": ["a", "b", "c"]}), tmp_path / "a.parquet")
    reader = ParquetReader([tmp_path / "a.parquet"])
    items, _ = read(reader)
    assert reader.read(items[0].name, items[0].place) == images[0]
    with pytest.raises(NotDownloaded):
        reader.read(items[1].name, items[1].place)
    assert reader.read(items[2].name, items[2].place) == images[2]


def test_rows_are_read_in_any_order_through_a_window(tmp_path):
    """Threads ask slightly out of order, and at the end of a group for the next. Groups are read in part."""
    count = 1500
    path = tmp_path / "a.parquet"
    table = pa.table({"jpg": [b"%d" % i for i in range(count)], "caption": ["c"] * count})
    pq.write_table(table, path, row_group_size=1000)
    reader = ParquetReader([path])
    items, _ = read(reader)
    order = [1000, 999, 1001, 998, 3, 900, 899, 1499, 0]
    assert [reader.read(items[i].name, items[i].place) for i in order] == [b"%d" % i for i in order]
    with pytest.raises(DataError, match="cannot be read"):
        reader.read("x", (0, 1, 500))


def test_dates_that_python_has_no_place_for(tmp_path):
    far = pa.array([2**31 - 1, 0, None], pa.date32())
    stamps = pa.array([2**62] * 3, pa.timestamp("ms"))
    table = pa.table(
        {"jpg": [image_file()] * 3, "caption": ["a", "b", "c"], "punsafe": far, "aesthetic": stamps}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    items, tally = read(ParquetReader([tmp_path / "a.parquet"]))
    assert [i.fields.get("punsafe") for i in items] == ["date32[day]", "date32[day]", None]
    assert Filters(max_unsafe=0.5).drop_reason(items[0].fields) == "punsafe is no number"
    assert not tally.dropped
    nested = pa.array([[2**62]], pa.list_(pa.timestamp("ms")))
    pq.write_table(pa.table({"jpg": [image_file()], "caption": nested}), tmp_path / "b.parquet")
    items, tally = read(ParquetReader([tmp_path / "b.parquet", tmp_path / "a.parquet"]))
    assert len(items) == 3
    assert tally.dropped == {"file unreadable": 1}


def test_more_rows_than_a_file_can_hold(tmp_path, monkeypatch):
    monkeypatch.setattr("wuerstchen.data.tables._FREE_ROWS", 0)
    table = pa.table({"jpg": pa.nulls(200_000, pa.binary()), "caption": pa.nulls(200_000, pa.string())})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="claims more rows than it can contain"):
        read(ParquetReader([tmp_path / "a.parquet"]))


def small_set():
    rows = {"image": [{"bytes": image_file(), "path": None}], "text": ["red"]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    return datasets.Dataset.from_dict(rows, features=features)


def test_folders_of_save_to_disk(tmp_path):
    one = small_set()
    one.save_to_disk(str(tmp_path / "one"))
    reader = open_reader(tmp_path / "one")
    assert isinstance(reader, DatasetReader)
    items, _ = read(reader)
    assert items[0].captions == ("red",)
    assert reader.read(items[0].name, items[0].place) == image_file()
    datasets.DatasetDict({"valid": one}).save_to_disk(str(tmp_path / "several"))
    assert len(read(open_reader(tmp_path / "several", split="valid"))[0]) == 1
    with pytest.raises(DataError, match=r"no split 'train'\. Choose one of valid with --split"):
        open_reader(tmp_path / "several")


def test_saved_sets_name_no_other_files(tmp_path):
    """A cell can contain a path instead of bytes, which could be any file on this machine."""
    (tmp_path / "secret.jpg").write_bytes(image_file())
    cell = {"bytes": None, "path": str(tmp_path / "secret.jpg")}
    images = pa.array([cell], pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    dataset = datasets.Dataset(pa.table({"image": images, "text": ["a"]}))
    dataset.save_to_disk(str(tmp_path / "set"))
    reader = open_reader(tmp_path / "set")
    items, _ = read(reader)
    with pytest.raises(DataError, match="has an empty cell"):
        reader.read(items[0].name, items[0].place)


def test_a_damaged_saved_set_is_refused(tmp_path):
    small_set().save_to_disk(str(tmp_path / "set"))
    (file,) = (tmp_path / "set").glob("*.arrow")
    content = file.read_bytes()
    for length in (0, 100, len(content) // 2):
        file.write_bytes(content[:length])
        with pytest.raises(DataError, match="cannot be read as a saved data set"):
            open_reader(tmp_path / "set")
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(DataError, match="is not a regular file"):
        open_reader(tmp_path / "set")


def test_a_field_of_json_as_the_column_of_a_hub_set():
    rows = {
        "jpg": [{"bytes": image_file(), "path": None}],
        "json": [{"caption": "short", "caption_llava": "long", "pwatermark": 0.25}],
    }
    dataset = datasets.Dataset.from_dict(rows)
    items, _ = read(DatasetReader(dataset, text_column="caption_llava"))
    assert [(i.captions, i.fields) for i in items] == [(("long",), {"pwatermark": 0.25})]
    assert read(DatasetReader(dataset))[0][0].captions == ("short",)

"""The kind of data of a name, which is the same for training and preparing."""

import dataclasses
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from wuerstchen.data import open as opening
from wuerstchen.data.emoji import EmojiSource, sample_root
from wuerstchen.data.folder import FolderSource
from wuerstchen.data.index import IndexedSource
from wuerstchen.data.open import KINDS, Kind, kind_of, open_data, open_reader, open_source
from wuerstchen.data.readers import FolderReader
from wuerstchen.errors import DataError, UserError


def photos(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name in ("a", "b"):
        Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(name)
    return folder


def test_each_name_is_of_one_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos")
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "0.tar").touch()
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "0.parquet").touch()
    shutil.copytree(sample_root(), tmp_path / "emoji")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_dict.json").touch()
    (tmp_path / "set" / "work").mkdir(parents=True)
    (tmp_path / "set" / "work" / "plan.json").touch()
    (tmp_path / "prompts.txt").touch()
    kinds = {
        "sample": "sample",
        "photos": "folder",
        "tars": "webdataset",
        "tars/0.tar": "webdataset",
        "tars/*.tar": "webdataset",
        "tables": "parquet",
        "tables/0.parquet": "parquet",
        "emoji": "emoji",
        "saved": "saved",
        "set": "prepared",
        "prompts.txt": "captions",
        "owner/name": "hub",
        "photos + owner/name": "mixture",
    }
    assert {text: kind_of(text).name for text in kinds} == kinds
    assert set(kinds.values()) == {kind.name for kind in KINDS}


def test_other_things_in_a_folder_of_captioned_images_change_nothing(tmp_path):
    """Earlier versions trained on the images of such folders, and their runs must resume."""
    folder = photos(tmp_path / "photos")
    before = open_source(str(folder)).fingerprint()
    (folder / "backup.tar").touch()
    (folder / "scores.parquet").touch()
    source = open_source(str(folder))
    assert isinstance(source, FolderSource)
    assert source.fingerprint() == before
    assert isinstance(open_reader(folder), FolderReader)
    # In folders too, and with a metadata file.
    outer = tmp_path / "outer"
    (outer / "x").mkdir(parents=True)
    shutil.copy(folder / "a.png", outer / "x" / "a.png")
    (outer / "metadata.jsonl").write_text(json.dumps({"file_name": "x/a.png", "text": "a"}))
    (outer / "0.tar").touch()
    assert kind_of(str(outer)).name == "folder"


def test_an_image_without_a_caption_beside_tars_is_no_folder_of_images(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "banner.png")
    (tmp_path / "0.tar").touch()
    assert kind_of(str(tmp_path)).name == "webdataset"
    (tmp_path / "0.tar").unlink()
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "0.parquet")
    assert kind_of(str(tmp_path)).name == "parquet"


def test_a_kind_can_be_named(tmp_path):
    folder = photos(tmp_path / "photos")
    (folder / "0.tar").touch()
    assert open_data(folder, format="webdataset").kind.name == "webdataset"
    with pytest.raises(UserError, match=r"format must be one of .*webdataset.*, got tars"):
        open_data(folder, format="tars")


@pytest.mark.parametrize("kind", ["sample", "set"])
def test_columns_of_what_has_none_are_refused_in_training_too(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set" / "work").mkdir(parents=True)
    (tmp_path / "set" / "work" / "plan.json").touch()
    (tmp_path / "prompts.txt").touch()
    with pytest.raises(DataError, match="has no selectable columns"):
        open_source(kind, text_column="caption")


def test_columns_of_a_folder_for_training(tmp_path):
    folder = photos(tmp_path / "photos")
    rows = [{"file_name": f"{n}.png", "text": n, "long": f"a long {n}"} for n in ("a", "b")]
    (folder / "a.txt").unlink()
    (folder / "b.txt").unlink()
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_source(str(folder), text_column="long")
    assert isinstance(source, FolderSource)
    assert source.captions(1) == ("a long b",)


def test_a_prepared_set_is_not_prepared_again(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "plan.json").touch()
    with pytest.raises(DataError, match="is already a prepared set"):
        open_reader(tmp_path)


def test_the_sample_holds_out_none(tmp_path):
    for name in ("sample", str(sample_root())):
        assert isinstance(open_source(name), EmojiSource)
        assert len(open_source(name, "heldout")) == 0


def test_without_the_package_a_missing_folder_is_named_too(monkeypatch):
    """The name of a missing folder can also be a name on the hub."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"'data/photos' is not a local file or folder.*wuerstchen\[data\]"):
        open_source("data/photos")


def test_a_row_without_a_source_of_its_own_is_indexed(monkeypatch, tmp_path):
    kind = Kind(
        name="other",
        matches=lambda name: name.text.startswith("other:"),
        reader=lambda data: FolderReader(tmp_path),
    )
    monkeypatch.setattr(opening, "KINDS", [kind, *KINDS])
    photos(tmp_path)
    source = open_source("other:1")
    assert isinstance(source, IndexedSource)
    assert source.name(0) == "a.png"
    assert dataclasses.is_dataclass(open_data("other:1"))


def test_one_caption_for_all_images_of_a_folder(tmp_path):
    folder = photos(tmp_path / "photos")
    (folder / "a.txt").write_text("")
    (folder / "b.txt").unlink()
    source = open_source(str(folder), caption="a photo of sks dog")
    assert [source.captions(item) for item in range(2)] == [("a photo of sks dog",)] * 2
    assert source.without_caption == []
    assert source.fingerprint() != open_source(str(folder), caption="another").fingerprint()
    with pytest.raises(DataError, match=r"'b\.png' has no caption\. .* --caption"):
        open_source(str(folder))
    with pytest.raises(DataError, match=r"'sample' have captions .* got caption='sks'\. .*Remove --caption"):
        open_source("sample", caption="sks")
    with pytest.raises(DataError, match=r"caption='sks' replaces .* Remove --caption, or --image-column"):
        open_source(str(folder), caption="sks", text_column="text")


def test_a_small_folder_holds_out_images_if_asked(tmp_path):
    for number in range(10):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    settings = {"caption": "sks", "held_out": 0.3}
    seen, held_out = (open_source(str(tmp_path), subset, **settings) for subset in ("train", "heldout"))
    names = [[source.name(item) for item in range(len(source))] for source in (seen, held_out)]
    assert len(names[1]) == 3
    assert sorted([*names[0], *names[1]]) == [f"{number}.png" for number in range(10)]
    assert len(open_source(str(tmp_path), "heldout", caption="sks")) == 0

"""Several captions of an image, tags and trigger words: the same choice for the same seed and index."""

import io
import json
import tarfile
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from wuerstchen.data.caption_options import PLAIN, CaptionOptions
from wuerstchen.data.open import open_source
from wuerstchen.data.plan import generator
from wuerstchen.data.sources import StoredImages
from wuerstchen.errors import DataError, UserError

COLUMNS = CaptionOptions(columns=("long=6", "short=3", "tags"))
WRITTEN = [
    {"long": "a long caption", "short": "short", "tags": "cat, red, mat"},
    {"long": "only long", "short": None, "tags": None},
    {"long": None, "short": "s", "tags": "dog, lawn"},
]


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


def as_jsonl(folder):
    rows = []
    for number, captions in enumerate(WRITTEN):
        (folder / f"{number}.png").write_bytes(png())
        given = {name: text for name, text in captions.items() if text is not None}
        rows.append(json.dumps({"file_name": f"{number}.png", **given}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def as_text_files(folder):
    """kohya's files beside the images, and img2dataset's .json."""
    for number, captions in enumerate(WRITTEN):
        (folder / f"{number}.png").write_bytes(png())
        for name in ("long", "tags"):
            if captions[name] is not None:
                (folder / f"{number}.{name}").write_text(captions[name])
        (folder / f"{number}.json").write_text(json.dumps({"short": captions["short"]}))
    return folder


def as_tar(folder):
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number, captions in enumerate(WRITTEN):
            members = {"png": png(), "json": json.dumps({"short": captions["short"]}).encode()}
            members |= {name: captions[name].encode() for name in ("long", "tags") if captions[name]}
            for ending, data in members.items():
                info = tarfile.TarInfo(f"{number}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder


def as_parquet(folder):
    columns = {name: [row[name] for row in WRITTEN] for name in ("long", "short", "tags")}
    pq.write_table(pa.table({"image": [png()] * len(WRITTEN), **columns}), folder / "0.parquet")
    return folder


def picked(source, item: int, count: int = 4000) -> Counter:
    return Counter(source.caption(item, generator(0, index, "example")) for index in range(count))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("WUERSTCHEN_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("write", [as_jsonl, as_text_files, as_tar, as_parquet])
def test_columns_are_picked_by_their_weights_in_every_kind_of_data(write, tmp_path):
    source = open_source(str(write(tmp_path)), captions=COLUMNS)
    assert isinstance(source, StoredImages)
    assert [source.groups(item) for item in range(3)] == [(1, 1, 1), (1, 0, 0), (0, 1, 1)]
    first, second, third = (picked(source, item) for item in range(3))
    assert abs(first["a long caption"] - 2400) < 150
    assert abs(first["short"] - 1200) < 150
    assert set(second) == {"only long"}
    assert abs(third["s"] - 3000) < 150  # the weights of the columns that it has
    assert third["s"] + third["dog, lawn"] == 4000


@pytest.mark.parametrize("write", [as_jsonl, as_text_files, as_tar, as_parquet])
def test_a_column_that_no_image_has_is_named(write, tmp_path):
    options = CaptionOptions(columns=("long", "gone"))
    with pytest.raises(DataError, match="no column 'gone'"):
        open_source(str(write(tmp_path)), captions=options)


def test_the_defaults_draw_what_earlier_versions_drew(tmp_path):
    """A caption of several is one integer of the image's generator, and nothing else is drawn."""
    captions = ("one", "two", "three")
    for index in range(50):
        mine, theirs = generator(3, index, "example"), generator(3, index, "example")
        assert PLAIN.pick(captions, (), mine) == captions[int(theirs.integers(3))]
        assert mine.random() == theirs.random()


def test_tags_are_shuffled_behind_those_that_are_kept():
    options = CaptionOptions(shuffle_tags=True, keep_tags=1)
    found = Counter(
        options.pick(("sks,a , b,c",), (), generator(0, index, "example")) for index in range(600)
    )
    assert len(found) == 6
    assert all(text.startswith("sks, ") and 60 < count < 140 for text, count in found.items())


def test_tags_are_dropped_but_never_all_of_them():
    options = CaptionOptions(tag_dropout=0.75)
    texts = [options.pick(("a, b",), (), generator(0, index, "example")) for index in range(1000)]
    found = Counter(texts)
    assert set(found) == {"a", "b", "a, b"}
    assert abs(found["a, b"] - 62) < 35  # a quarter of a quarter
    kept = CaptionOptions(tag_dropout=0.75, keep_tags=1)
    assert {kept.pick(("a, b",), (), generator(0, n, "example")) for n in range(50)} == {"a", "a, b"}


def test_only_the_columns_of_tags_are_shuffled_and_a_list_is_one_caption():
    options = CaptionOptions(columns=("long", "tags"), tag_columns=("tags",), shuffle_tags=True)
    captions = ("one, two, three", "x", "y")
    found = {options.pick(captions, (1, 2), generator(0, index, "example")) for index in range(200)}
    assert found == {"one, two, three", "x, y", "y, x"}


def test_the_trigger_begins_every_caption_once():
    options = CaptionOptions(trigger="sks dog")
    rng = np.random.default_rng(0)
    assert options.pick(("on a beach",), (), rng) == "sks dog, on a beach"
    assert options.pick(("sks dog on a beach",), (), rng) == "sks dog on a beach"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"columns": ("a=0",)}, "'a=0'"),
        ({"columns": ("a=-1",)}, "'a=-1'"),
        ({"columns": ("a=nan",)}, "'a=nan'"),
        ({"columns": ("a=much",)}, "'a=much'"),
        ({"columns": ("=2",)}, "'=2'"),
        ({"columns": ("a=1", "a=2")}, "once, got a=1 a=2"),
        ({"tag_columns": ("tags",), "shuffle_tags": True}, "got 'tags'"),
        ({"keep_tags": -1, "shuffle_tags": True}, "got -1"),
        ({"tag_dropout": 1.0}, "got 1.0"),
        ({"trigger": " sks"}, "got ' sks'"),
        ({"keep_tags": 1}, "no effect"),
    ],
)
def test_wrong_options_are_named(wrong, said):
    with pytest.raises(UserError, match=said):
        CaptionOptions(**wrong)


def test_data_without_written_captions_refuse_the_options():
    with pytest.raises(DataError, match=r"\(sample\) have no written captions"):
        open_source("sample", captions=CaptionOptions(trigger="sks"))


def test_two_places_for_captions_are_refused(tmp_path):
    folder = str(as_jsonl(tmp_path))
    with pytest.raises(DataError, match="text_column='long'"):
        open_source(folder, text_column="long", captions=COLUMNS)
    with pytest.raises(DataError, match="caption='a cat'"):
        open_source(folder, caption="a cat", captions=COLUMNS)

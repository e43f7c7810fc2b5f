"""The plan of a prepared set: its settings, filters and shards."""

import json

import pytest

from wuerstchen.data import prepare_plan
from wuerstchen.data.filters import Filters
from wuerstchen.data.items import Item
from wuerstchen.data.prepare_plan import PrepareConfig, make_plan
from wuerstchen.errors import DataError, UserError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crops": 2, "crop": "centre"}, "All centre crops of an image are the same"),
        ({"crops": 0}, "crops must be between 1 and 64, got 0"),
        ({"batch_size": 0}, "batch_size must be between 1 and 4096, got 0"),
        ({"shard_size": 1 << 20}, "shard_size must be between 1 and 65536, got 1048576"),
    ],
)
def test_settings_that_make_no_sense(change, message):
    with pytest.raises(UserError, match=message):
        PrepareConfig(**change)


class Listed:
    """A reader with the given metadata."""

    def __init__(self, *fields):
        self.fields = fields

    def items(self, tally):
        for number, fields in enumerate(self.fields):
            yield Item(f"{number}", (f"caption {number}",), fields, (0, 0, 0))

    def read(self, name, place):
        raise NotImplementedError

    def fingerprint(self):
        return ""


def planned(folder, filters, *fields, shard_size=2):
    config = PrepareConfig(filters=filters, shard_size=shard_size)
    make_plan(folder, Listed(*fields), config, {}, "")
    return json.loads((folder / "plan.json").read_text())


def test_images_without_a_score_are_kept_and_counted(tmp_path):
    fields = [{"watermark_score": 0.1}, {"watermark_score": 0.9}, {}, {}]
    plan = planned(tmp_path, Filters(max_watermark=0.5), *fields)
    assert plan["images"] == 3
    assert plan["without_score"] == {"watermark": 2}
    plan = planned(tmp_path, Filters(max_watermark=0.5, strict=True), *fields)
    assert plan["images"] == 1
    assert plan["without_score"] == {}
    assert plan["dropped"] == {"no watermark score": 2, "watermark score above 0.5": 1}
    assert planned(tmp_path, Filters(), *fields)["without_score"] == {}


def test_a_filter_for_a_score_that_no_image_has_is_refused(tmp_path):
    """Such a filter used to let every image through silently."""
    filters = Filters(max_watermark=0.5, min_aesthetic=5.0)
    message = r"^--min-aesthetic has no effect: none of the 2 images has .* aesthetic, AESTHETIC_SCORE, "
    with pytest.raises(DataError, match=message):
        planned(tmp_path, filters, {"pwatermark": 0.1, "my_score": 6}, {"pwatermark": 0.2})
    assert not (tmp_path / "plan.json").exists()


def test_more_shards_than_can_be_described_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_plan, "MAX_DESCRIPTION", 10 * prepare_plan.BYTES_PER_SHARD)
    fields = [{}] * 6
    with pytest.raises(UserError, match=r"shard_size 2 makes 6 shards, more than prepared.json can describe"):
        planned(tmp_path, Filters(), *fields)
    assert planned(tmp_path, Filters(), *fields, shard_size=3)["shards"] == {"images": 2, "texts": 2}

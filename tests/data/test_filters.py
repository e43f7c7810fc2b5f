"""Filters on metadata."""

import json
import math
from decimal import Decimal

import pytest

from wuerstchen.data.filters import FIELDS, MAX_NAMED, Filters, Tally, size_in
from wuerstchen.errors import UserError

ORIGINAL = Filters(
    min_size=512, max_size=4096, max_aspect=2.0, max_watermark=0.5, min_aesthetic=5.0, max_unsafe=0.99
)


def test_a_perfect_zero_passes():
    assert ORIGINAL.drop_reason({"pwatermark": 0.0, "punsafe": 0, "aesthetic": 9.5}) is None


def test_bounds_pass_and_what_is_beyond_does_not():
    assert ORIGINAL.drop_reason({"pwatermark": 0.5, "punsafe": 0.99, "aesthetic": 5}) is None
    assert ORIGINAL.drop_reason({"pwatermark": 0.51}) == "watermark score above 0.5"
    assert ORIGINAL.drop_reason({"punsafe": 1}) == "unsafe score above 0.99"
    assert ORIGINAL.drop_reason({"aesthetic": 4.9}) == "aesthetic score below 5"
    assert ORIGINAL.drop_reason({"AESTHETIC_SCORE": 4.9}) == "aesthetic score below 5"
    assert ORIGINAL.drop_reason({"aesthetic": None, "AESTHETIC_SCORE": 6}) is None


def test_a_missing_field_passes_unless_strict():
    strict = Filters(max_watermark=0.5, strict=True)
    for fields in ({}, {"pwatermark": None}):
        assert ORIGINAL.drop_reason(fields) is None
        assert strict.drop_reason(fields) == "no watermark score"
    assert strict.drop_reason({"pwatermark": 0.0}) is None  # scores without a bound are not required


@pytest.mark.parametrize("value", ["0.1", True, [0.1], math.nan])
def test_what_is_no_number_is_dropped_as_such(value):
    assert ORIGINAL.drop_reason({"pwatermark": value}) == "pwatermark is no number"


def test_sizes():
    assert ORIGINAL.drop_reason_for_size((512, 1024)) is None
    assert ORIGINAL.drop_reason_for_size((4096, 2048)) is None
    assert ORIGINAL.drop_reason_for_size((511, 600)) == "size below 512"
    assert ORIGINAL.drop_reason_for_size((4097, 4000)) == "size above 4096"
    assert ORIGINAL.drop_reason_for_size((512, 1025)) == "aspect above 2"
    assert Filters().drop_reason_for_size((1, 10_000)) is None


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({"original_width": 640, "original_height": 480.0}, (640, 480)),
        ({"WIDTH": 640, "HEIGHT": 480}, (640, 480)),
        ({"WIDTH": 1, "HEIGHT": 1 << 31}, (1, 1 << 31)),
        ({"WIDTH": 1, "HEIGHT": (1 << 31) + 1}, None),
        ({"original_width": 640, "original_height": None}, None),
        ({"original_width": 640}, None),
        ({"original_width": "640", "original_height": "480"}, None),
        ({"original_width": 0, "original_height": 480}, None),
        ({"original_width": math.nan, "original_height": 480}, None),
        ({"original_width": 10**401, "original_height": 480}, None),
        ({"original_width": 1e300, "original_height": 480}, None),
    ],
)
def test_the_size_in_the_metadata(fields, size):
    assert size_in(fields) == size


@pytest.mark.parametrize(
    "bounds",
    [
        {"min_size": 0},
        {"max_aspect": 0.5},
        {"max_watermark": -1.0},
        {"min_aesthetic": math.nan},
        {"max_unsafe": math.inf},
        {"min_size": 600, "max_size": 500},
    ],
)
def test_bounds_that_make_no_sense(bounds):
    with pytest.raises(UserError, match=f"{next(iter(bounds))} must .*, got"):
        Filters(**bounds)


def test_tallies_add_up_and_survive_json():
    one, other = Tally(), Tally()
    one.drop("no caption")
    one.damage("damaged image", "a.jpg", "cut off")
    other.drop("no caption")
    one.add(other)
    assert one.dropped == {"no caption": 2, "damaged image": 1}
    assert Tally.from_json(one.to_json()) == one


@pytest.mark.parametrize(
    "fields",
    [
        {"pwatermark": 0.6},
        {"watermark_score": 0.6},
        {"aesthetic": 4.0},
        {"AESTHETIC_SCORE": 4.0},
        {"aesthetic_score": 4.0},
        {"aesthetic_score_laion_v2": 4.0},
        {"punsafe": 0.6},
        {"nsfw_score_opennsfw2": 0.6},
        {"nsfw_score_gantman": Decimal("0.6")},
    ],
)
def test_common_names_of_scores(fields):
    filters = Filters(max_watermark=0.5, min_aesthetic=5.0, max_unsafe=0.5)
    (name,) = fields
    assert name in FIELDS  # readers drop all other fields
    assert filters.drop_reason(fields) is not None
    assert filters.drop_reason(dict.fromkeys(fields, 5.0 if "aesthetic" in name.lower() else 0.1)) is None


def test_whole_numbers_of_any_length():
    """They do not fit into a float, for which Python raises OverflowError."""
    filters = Filters(max_watermark=0.5, min_aesthetic=5.0)
    assert filters.drop_reason({"pwatermark": 10**401}) == "watermark score above 0.5"
    assert filters.drop_reason({"aesthetic": -(10**401)}) == "aesthetic score below 5"
    assert filters.drop_reason({"pwatermark": Decimal("NaN")}) == "pwatermark is no number"


def test_scores_that_are_lacking_are_told():
    filters = Filters(max_watermark=0.5, min_aesthetic=5.0)
    assert filters.missing_scores({"pwatermark": 0.0, "punsafe": 0.1}) == ["aesthetic"]
    assert filters.missing_scores({}) == ["watermark", "aesthetic"]
    assert Filters().missing_scores({}) == []


def test_a_tally_names_a_thousand_and_counts_the_rest():
    tally = Tally()
    for number in range(MAX_NAMED + 5):
        tally.damage("damaged image", f"{number}" * 1000, "reason" * 1000)
    assert tally.dropped["damaged image"] == MAX_NAMED + 5
    assert len(tally.damaged) == MAX_NAMED
    assert tally.unnamed == 5
    assert len(json.dumps(tally.to_json())) < 1_000_000
    both = Tally.from_json(tally.to_json())
    both.add(tally)
    assert len(both.damaged) == MAX_NAMED
    assert both.unnamed == MAX_NAMED + 10
    assert sum(both.dropped.values()) == 2 * (MAX_NAMED + 5)


def test_tallies_of_older_versions():
    old = {"dropped": {"damaged image": 1}, "damaged": [["a", "b"]]}
    assert Tally.from_json(old).to_json() == {**old, "unnamed": 0}

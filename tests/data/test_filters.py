"""Filters on metadata."""

import math

import pytest

from wuerstchen.data.filters import Filters, Tally, size_in
from wuerstchen.errors import UserError

ORIGINAL = Filters(
    min_size=512, max_size=4096, max_aspect=2.0, max_watermark=0.5, min_aesthetic=5.0, max_unsafe=0.99
)


def test_a_perfect_zero_passes():
    assert ORIGINAL.verdict({"pwatermark": 0.0, "punsafe": 0, "aesthetic": 9.5}) is None


def test_bounds_pass_and_what_is_beyond_does_not():
    assert ORIGINAL.verdict({"pwatermark": 0.5, "punsafe": 0.99, "aesthetic": 5}) is None
    assert ORIGINAL.verdict({"pwatermark": 0.51}) == "watermark score above 0.5"
    assert ORIGINAL.verdict({"punsafe": 1}) == "unsafe score above 0.99"
    assert ORIGINAL.verdict({"aesthetic": 4.9}) == "aesthetic score below 5"
    assert ORIGINAL.verdict({"AESTHETIC_SCORE": 4.9}) == "aesthetic score below 5"
    assert ORIGINAL.verdict({"aesthetic": None, "AESTHETIC_SCORE": 6}) is None


def test_a_missing_field_passes_unless_strict():
    strict = Filters(max_watermark=0.5, strict=True)
    for fields in ({}, {"pwatermark": None}):
        assert ORIGINAL.verdict(fields) is None
        assert strict.verdict(fields) == "no watermark score"
    assert strict.verdict({"pwatermark": 0.0}) is None  # of scores not asked for none is missed


@pytest.mark.parametrize("value", ["0.1", True, [0.1], math.nan])
def test_what_is_no_number_is_dropped_as_such(value):
    assert ORIGINAL.verdict({"pwatermark": value}) == "pwatermark is no number"


def test_sizes():
    assert ORIGINAL.verdict_on_size((512, 1024)) is None
    assert ORIGINAL.verdict_on_size((4096, 2048)) is None
    assert ORIGINAL.verdict_on_size((511, 600)) == "size below 512"
    assert ORIGINAL.verdict_on_size((4097, 4000)) == "size above 4096"
    assert ORIGINAL.verdict_on_size((512, 1025)) == "aspect above 2"
    assert Filters().verdict_on_size((1, 10_000)) is None


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({"original_width": 640, "original_height": 480.0}, (640, 480)),
        ({"WIDTH": 640, "HEIGHT": 480}, (640, 480)),
        ({"original_width": 640, "original_height": None}, None),
        ({"original_width": 640}, None),
        ({"original_width": "640", "original_height": "480"}, None),
        ({"original_width": 0, "original_height": 480}, None),
        ({"original_width": math.nan, "original_height": 480}, None),
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
    with pytest.raises(UserError, match=f"{next(iter(bounds))} .* is wrong"):
        Filters(**bounds)


def test_tallies_add_up_and_survive_json():
    one, other = Tally(), Tally()
    one.drop("no caption")
    one.damage("damaged image", "a.jpg", "cut off")
    other.drop("no caption")
    one.add(other)
    assert one.dropped == {"no caption": 2, "damaged image": 1}
    assert Tally.from_json(one.to_json()) == one

"""Patterns of layer names match as in peft, and in bounded time."""

import random
import re
import time

import pytest
from peft.utils.other import get_pattern_key

from wuerstchen.checkpoints import patterns
from wuerstchen.checkpoints.patterns import Patterns
from wuerstchen.errors import CheckpointError

NAMES = [
    f"blocks.{block}.{layer}"
    for block in (0, 2, 12, 22)
    for layer in ("attention.to_q", "attention.to_out.0", "channelwise.4", "depthwise", "kv_mapper.1")
]
NAMES += ["projection", "out.1", "text_model.encoder.layers.3.self_attn.q_proj"]
PARTS = ["blocks", ".", r"\.", r"\d+", "2", ".*", "to_q", "to_[qv]", "attention", "(q|out.0)", "^", "$", "e?"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_first_pattern_that_fits_is_pefts():
    draw = random.Random(0)
    found = 0
    for _ in range(400):
        keys = ["".join(draw.choices(PARTS, k=draw.randint(1, 5))) for _ in range(4)]
        keys = [key for key in dict.fromkeys(keys) if compiles(key)]
        ours = Patterns(keys, "the file")
        for name in NAMES:
            theirs = get_pattern_key(keys, name)
            expected = theirs if theirs in keys else None
            assert ours.first([name]) == expected, (keys, name)
            found += expected is not None
    assert found > 200


def compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def test_any_of_the_names_of_a_layer_fits():
    ours = Patterns(["a.b", "c"], "the file")
    assert ours.first(["x", "y.c"]) == "c"
    assert ours.first(["c", "x.a.b"]) == "a.b"
    assert ours.first(["x"]) is None


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "not a regular expression"),
        ("(?R)", "not a regular expression"),  # of an engine that peft does not use
        ("(a+)+b", "repeats a group"),
        ("(" * 60 + "a" + "){9}" * 60, "repeats a group"),
        ("a" * 2000, "more than 1000 characters"),
        ("(" * 499 + ")" * 499, "not a regular expression"),
    ],
)
def test_patterns_that_are_refused(pattern, message):
    with pytest.raises(CheckpointError, match=f"the file.*{message}") as caught:
        Patterns([pattern], "the file")
    assert len(str(caught.value)) < 500


def test_too_many_patterns(monkeypatch):
    monkeypatch.setattr(patterns, "MAX_PATTERNS", 3)
    Patterns(list("abc"), "the file")
    with pytest.raises(CheckpointError, match="more than 3 patterns"):
        Patterns(list("abcd"), "the file")


def test_comparisons_are_given_up_in_time(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.0)
    with pytest.raises(CheckpointError, match=r"patterns, such as '\.\*a', takes more than 0 s"):
        Patterns([".*a"], "the file").first(["a"])


@pytest.mark.parametrize("pattern", [".*a" * 30 + "[^a]", "a?" * 40 + "b", "[ab]*[ac]*" * 15 + "[^abc]{2}"])
def test_patterns_that_go_back_and_forth(pattern):
    """Python's own engine takes years for the first."""
    began = time.monotonic()
    assert Patterns([pattern], "the file").first(["a" * 120]) is None
    assert time.monotonic() - began < 10

"""The committed lists: what they hold, and that they follow from the rules and not from a choice."""

import hashlib
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from wuerstchen.data import emoji
from wuerstchen.data.captions import MONO_STYLE
from wuerstchen.data.colours import COLOURS
from wuerstchen.data.emoji import (
    HUE_SHIFTS,
    STYLES,
    Record,
    listed_heldout,
    listed_validation,
    split_of,
    write_index,
)
from wuerstchen.data.plan import stable_hash
from wuerstchen.errors import DataError
from wuerstchen.evaluate.lists import (
    FILES,
    LISTS,
    RealImages,
    caption_of,
    prompt_text,
    read_list,
    select,
)

PAIRS, PROMPTS = read_list("a"), read_list("b")


@pytest.mark.parametrize("name", LISTS)
def test_entries_are_numbered_and_unique(name):
    entries = read_list(name)
    assert [entry.number for entry in entries] == list(range(len(entries)))
    assert len({entry.id for entry in entries}) == len(entries)
    assert FILES[name].read_text().count("\n") == len(entries)


def test_list_a_is_all_that_is_held_out():
    assert {entry.id for entry in PAIRS} == listed_heldout()
    assert [entry.id for entry in PAIRS] == sorted(
        listed_heldout(), key=lambda key: stable_hash("evaluate pairs", key)
    )
    assert {(entry.background, entry.colour, entry.shift) for entry in PAIRS} == {("white", None, 0)}


def test_validation_while_training_is_on_the_pairs_that_choices_are_made_on():
    assert {entry.id for entry in select("a", ("val",))} == listed_validation()


def test_nothing_is_from_the_training_split():
    """A training image in a list would make every score on it worthless."""
    for entry in (*PAIRS, *PROMPTS):
        assert split_of(entry.style, entry.hex) == "heldout"


def test_val_is_by_hash():
    def smallest(keys: list[str], count: int) -> set[str]:
        digests = {key: hashlib.sha256(f"evaluate val {key}".encode()).hexdigest() for key in keys}
        return set(sorted(keys, key=digests.__getitem__)[:count])

    expected = smallest([entry.id for entry in PAIRS], 150)
    assert {entry.id for entry in PAIRS if entry.split == "val"} == expected
    expected = smallest([str(number) for number in range(480)], 120)
    assert {str(entry.number) for entry in PROMPTS if entry.split == "val"} == expected
    for entries, tests in ((PAIRS, 500), (PROMPTS, 360)):
        assert sum(entry.split == "test" for entry in entries) == tests


@pytest.mark.parametrize("name", LISTS)
def test_captions_follow_from_the_fields(name):
    for entry in read_list(name):
        assert entry.caption == caption_of(name, entry)


def test_prompts_name_what_can_be_scored():
    for entry in PROMPTS:
        assert entry.background in COLOURS
        assert f"{entry.background} background" in entry.caption
        assert entry.background != (entry.colour or "black")
        if entry.style == MONO_STYLE:
            assert (entry.colour, entry.shift) == (None, 0)
        else:
            assert entry.colour in COLOURS.keys() - {"black", "white", "gray"}
            assert f" {entry.colour} " in entry.caption.split(" on a")[0] + " "
            assert entry.shift == 0 or HUE_SHIFTS[0] <= entry.shift < HUE_SHIFTS[1]


def test_colours_and_backgrounds_are_even():
    backgrounds = Counter(entry.background for entry in PROMPTS)
    assert set(backgrounds.values()) == {40}
    colours = Counter(entry.colour for entry in PROMPTS if entry.colour)
    brown = colours.pop("brown")  # few drawings can be brown
    assert brown >= 10
    assert max(colours.values()) - min(colours.values()) <= 1
    assert set(Counter(entry.style for entry in PROMPTS)) == set(STYLES)


def test_prompts_drop_the_colours_of_the_name():
    assert prompt_text("noto", "purple heart", "orange", "black") == (
        "a shaded cartoon of an orange heart on a black background"
    )
    assert prompt_text("fluent-mono", "scissors", None, "orange") == (
        "a black glyph of a pair of scissors on an orange background"
    )
    assert prompt_text("twemoji", "orange", "blue", "red") == (
        "a simple sticker of a blue orange on a red background"
    )


def test_select_takes_the_first_of_each_split():
    few = select("b", limit=3)
    assert Counter(entry.split for entry in few) == {"val": 3, "test": 3}
    assert [entry.number for entry in few] == sorted(entry.number for entry in few)
    assert select("a", ("val",), 2) == [entry for entry in PAIRS if entry.split == "val"][:2]
    assert select("a") == list(PAIRS)


def test_real_images_are_recoloured_and_placed(tmp_path):
    """A red square at the plain scale on its background, in the colour that its caption names."""
    entry = next(entry for entry in PROMPTS if entry.shift and entry.style == "noto")
    rgba = np.zeros((256, 256, 4), np.uint8)
    rgba[8:248, 8:248] = (200, 30, 30, 255)
    record = Record(
        id=entry.id,
        style=entry.style,
        hex=entry.hex,
        names=(entry.name,),
        tags=(),
        group="",
        subgroup="",
        colours=(),
        license="Apache-2.0",
        split="heldout",
    )
    write_index(tmp_path, [record])
    (tmp_path / entry.style).mkdir()
    Image.fromarray(rgba).save(tmp_path / f"{entry.id}.webp", lossless=True)
    real = RealImages(tmp_path)
    real.check([entry])
    image = real.image(entry, 128)
    assert image.shape == (128, 128, 3)
    assert tuple(image[2, 2]) == COLOURS[entry.background]
    assert np.array_equal(image[64, 64], emoji.shift_hue(rgba, entry.shift)[128, 128, :3])
    shown = (image != COLOURS[entry.background]).any(axis=2)
    assert shown.any(axis=0).sum() == pytest.approx(128 * 0.8 * 240 / 256, abs=4)
    other = next(e for e in PROMPTS if e.id != entry.id)
    with pytest.raises(DataError, match=f"does not have the image {other.id}. Build the whole set"):
        real.check([other])


def test_the_files_are_plain_json_lines():
    for path in FILES.values():
        for line in path.read_text().splitlines():
            assert list(json.loads(line)) == [
                *("number", "style", "hex", "name", "colour", "shift", "background", "caption", "split")
            ]

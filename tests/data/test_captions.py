import re

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from wuerstchen.data.captions import (
    STYLE_PHRASES,
    Scene,
    article,
    caption,
    contains_colour,
    noun_phrase,
    plain_caption,
    tidy_name,
    without_colours,
)
from wuerstchen.data.colours import COLOURS, name_colours, to_hsv, to_lab
from wuerstchen.data.emoji import read_index, sample_root
from wuerstchen.data.plan import generator

# Awkward names, in addition to those of the sample.
AWKWARD = [
    ("red heart", "heart"),
    ("light blue heart",),
    ("orange", "tangerine", "mandarin"),
    ("orange",),
    ("leafy green",),
    ("woman: red hair", "red haired woman", "red haired"),
    ("person: blond hair", "blond haired"),
    ("ox",),
    ("eyes",),
    ("boxing gloves",),
    ("women with bunny ears",),
    ("man lifting weights",),
    ("unicorn", "ewe", "one-piece swimsuit", "umbrella", "x-ray", "8ball"),
    ("white sun behind cloud with rain",),
    ("cat2", "point up 2"),
    ("the horns",),
    ("100", "1st place medal"),
]
SAMPLE = [record for record in read_index(sample_root()) if record.style == "noto"]
NAMES = AWKWARD + [record.names for record in SAMPLE]
TAGS = sorted({tag for record in SAMPLE for tag in record.tags} | {"red", "blue-faced", "100", "<3"})

# Draw fields instead of a scene: type checks inside a strategy would use `random`.
fields = st.fixed_dictionaries(
    {
        "style": st.sampled_from(sorted(STYLE_PHRASES)),
        "names": st.sampled_from(NAMES),
        "tags": st.lists(st.sampled_from(TAGS), unique=True, max_size=8).map(tuple),
        "colours": st.lists(st.sampled_from(sorted(COLOURS)), unique=True, max_size=2).map(tuple),
        "recoloured": st.booleans(),
        "background": st.sampled_from(sorted(COLOURS)),
    }
)

CALLED_BY_COLOUR = ("orange", "leafy green")
PHRASES = [phrase for phrases in STYLE_PHRASES.values() for phrase in phrases]


def scene(**changes: object) -> Scene:
    fields = {
        "style": "noto",
        "names": ("dromedary camel",),
        "tags": ("desert", "hump", "one"),
        "colours": ("purple", "pink"),
        "recoloured": True,
        "background": "orange",
    }
    return Scene(**{**fields, **changes})


def many(one: Scene, count: int = 400) -> list[str]:
    return [caption(one, generator(0, index, "caption")) for index in range(count)]


@given(fields=fields, seed=st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_every_caption_is_clean_english(fields: dict, seed: int) -> None:
    text = caption(Scene(**fields), np.random.default_rng(seed))
    assert text == text.strip()
    assert text == caption(Scene(**fields), np.random.default_rng(seed))
    assert not re.search(r"  |, ,|,,| ,|,$|:", text)
    assert not re.search(r"\ba (?:orange|ox|eyes|umbrella|8ball|x-ray)\b", text)
    assert not re.search(r"\ban (?:eyes|unicorn|ewe|one-piece|white|red|light|blue|yellow)\b", text)
    assert not re.search(r"\b(\w+) \1\b", text), "a word stands twice"
    assert not re.search(r"\band (?:on|of|and)\b|\ban? (?:an?|on|of)\b", text)


@given(fields=fields, seed=st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_captions_name_no_colour_that_the_image_lacks(fields: dict, seed: int) -> None:
    scene = Scene(**fields)
    assume(scene.recoloured or scene.style == "fluent-mono")  # otherwise the colours in the names are right
    text = caption(scene, np.random.default_rng(seed))
    for phrase in PHRASES:
        text = text.replace(phrase, "")
    text = re.sub(rf"(on an?|,) {scene.background} background", "", text)
    if scene.names[0] in CALLED_BY_COLOUR:
        text = text.replace(scene.names[0], "")
    for colour in scene.colours:
        text = re.sub(rf"\b{colour}\b", "", text)
    assert not contains_colour(text)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("orange cat", "an"),
        ("ox", "an"),
        ("unicorn", "a"),
        ("unamused face", "an"),
        ("european castle", "a"),
        ("one-piece swimsuit", "a"),
        ("oncoming bus", "an"),
        ("x-ray", "an"),
        ("light blue owl", "a"),
        ("suv", "an"),
    ],
)
def test_article_follows_the_sound(words: str, expected: str) -> None:
    assert article(words) == expected


@pytest.mark.parametrize(
    ("name", "colours", "expected"),
    [
        ("fox", ("orange",), "an orange fox"),
        ("fox", ("red", "white"), "a red and white fox"),
        ("socks", ("red",), "a pair of red socks"),
        ("grapes", ("green",), "green grapes"),
        ("eyes", (), "eyes"),
        ("bus", (), "a bus"),
        ("octopus", ("orange",), "an orange octopus"),
        ("santa claus", (), "a santa claus"),
        ("man lifting weights", (), "a man lifting weights"),
        ("men with bunny ears", (), "men with bunny ears"),
        ("cat with tears of joy", (), "a cat with tears of joy"),
        ("ear of rice", (), "an ear of rice"),
        ("cooked rice", ("white",), "white cooked rice"),
        ("the horns", (), "the horns"),
    ],
)
def test_noun_phrase(name: str, colours: tuple[str, ...], expected: str) -> None:
    assert noun_phrase(name, colours) == expected


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        ("light blue heart", "heart"),
        ("woman with red hair", "woman"),
        ("red haired man", "man"),
        ("blond haired", ""),
        ("orange", "orange"),
        ("leafy green", "leafy green"),
        ("blackbird", "blackbird"),
        ("large orange diamond", "large diamond"),
    ],
)
def test_without_colours(name: str, bare: str) -> None:
    assert without_colours(name) == bare


def test_tidy_name_reads_as_it_is_said() -> None:
    assert tidy_name("woman: bald") == "bald woman"
    assert tidy_name("person: beard") == "person with a beard"
    assert tidy_name("man: curly hair") == tidy_name("man curly hair") == "man with curly hair"
    assert (tidy_name("cat2"), tidy_name("point up 2"), tidy_name("100")) == ("cat", "point up", "100")


def test_changed_colours_are_always_told() -> None:
    assert all("purple" in text for text in many(scene()))


def test_the_colour_of_a_name_is_neither_doubled_nor_contradicted() -> None:
    own = scene(names=("red heart",), colours=("red", "pink"), recoloured=False, tags=())
    assert all("red heart" in text and "pink" not in text for text in many(own))
    changed = scene(names=("red heart",), colours=("green",), tags=())
    assert all("green heart" in text and "red" not in text for text in many(changed))


def test_how_often_the_parts_are_left_out() -> None:
    texts = many(scene(), 3000)
    styled = np.mean([any(phrase in text for phrase in STYLE_PHRASES["noto"]) for text in texts])
    background = np.mean(["orange background" in text for text in texts])
    lists = np.mean(["," in text for text in texts])
    assert styled == pytest.approx(0.85, abs=0.02)
    assert background == pytest.approx(0.98, abs=0.01)
    assert lists == pytest.approx(0.1, abs=0.02)
    white = many(scene(background="white"), 2000)
    assert np.mean(["background" in text for text in white]) == pytest.approx(0.25, abs=0.04)


def test_plain_caption_is_the_style_and_the_name() -> None:
    assert plain_caption("fluent-3d", "orange") == "a 3D render of an orange"
    assert plain_caption("twemoji", "red heart") == "a simple sticker of a red heart"
    assert plain_caption("fluent-mono", "red heart") == "a black glyph of a heart"


@pytest.mark.parametrize("name", sorted(COLOURS))
def test_each_named_colour_is_named_as_itself(name: str) -> None:
    flat = np.full((8, 8, 4), (*COLOURS[name], 255), dtype=np.uint8)
    assert name_colours(flat) == [name]


def test_name_colours_counts_opaque_pixels_only() -> None:
    image = np.zeros((10, 10, 4), dtype=np.uint8)
    image[:] = (*COLOURS["green"], 100)
    image[:6] = (*COLOURS["blue"], 255)
    image[6:8] = (*COLOURS["red"], 255)
    image[8] = (*COLOURS["yellow"], 255)
    assert name_colours(image) == ["blue", "red"]
    assert name_colours(np.zeros((4, 4, 4), dtype=np.uint8)) == []


def test_hsv_agrees_with_the_standard_library() -> None:
    import colorsys

    pixels = np.random.default_rng(0).integers(0, 256, (200, 3)).astype(np.uint8)
    expected = np.array([colorsys.rgb_to_hsv(*(pixel / 255)) for pixel in pixels]) * (360, 1, 1)
    np.testing.assert_allclose(to_hsv(pixels), expected, atol=1e-3)


def test_lab_of_known_colours() -> None:
    # Published values for sRGB and D65, from Lindbloom's calculator.
    pixels = np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 0, 255]], dtype=np.uint8)
    expected = [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86]]
    np.testing.assert_allclose(to_lab(pixels), expected, atol=0.3)

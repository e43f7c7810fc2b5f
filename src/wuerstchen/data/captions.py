"""Composed captions for the emoji images, so that prompt adherence can be measured.

A caption is ``a {style phrase} of {article} {colours} {name} on a {colour} background``, with parts left out
at random, or a list of tags with the same content.
"""

import re
from dataclasses import dataclass

import numpy as np

from wuerstchen.data.colours import COLOURS

STYLE_PHRASES: dict[str, tuple[str, ...]] = {
    "fluent-3d": ("3D render", "glossy 3D icon", "soft 3D model"),
    "fluent-flat": ("flat illustration", "flat vector icon", "flat design"),
    "fluent-mono": ("black glyph", "monochrome icon", "black pictogram"),
    "noto": ("shaded cartoon", "noto emoji", "rounded cartoon drawing"),
    "twemoji": ("simple sticker", "twemoji", "minimal cartoon sticker"),
}

MONO_STYLE = "fluent-mono"

_P_TAGS = 0.1
_P_NO_STYLE = 0.15
_P_SYNONYM = 0.3
_P_COLOURS = 0.5  # for an image in its original colours; changed colours are always mentioned
_P_ONE_COLOUR = 0.4  # mention one colour of two
_P_BACKGROUND = 0.98  # a caption without a background nearly always means white
_P_WHITE_BACKGROUND = 0.25  # white is the default, so it is rarely mentioned

# "light blue" comes before "blue", so that it is matched as a whole.
_COLOUR_WORDS = (*sorted(COLOURS, key=len, reverse=True), "grey", "blonde", "blond")
_COLOUR = re.compile(rf"\b(?:{'|'.join(_COLOUR_WORDS)})\b(?! *$)")
_HAIR = re.compile(rf"(?: with)? *\b(?:{'|'.join(_COLOUR_WORDS)}) hair(?:ed)?\b")
_ANY_COLOUR = re.compile(rf"\b(?:{'|'.join(_COLOUR_WORDS)})\b")

_PREPOSITION = re.compile(r" (?:with|of|in|on|at|and|behind|over|under|to|without|pointed|holding) ")
_ONE_PERSON = re.compile(r"(?:man|woman|person|boy|girl|baby)\b")
_SEVERAL = re.compile(r"\b(?:men|women|people|feet|children|teeth)\b")
_NOT_PLURAL = re.compile(r".*(?:ss|us|is)|rhinoceros|christmas|vhs|yes|americas|sports")
_PAIR = re.compile(
    "briefs|chopsticks|eyeglasses|glasses|gloves|goggles|headphones|jeans|maracas|scissors|shoes|shorts|skis"
    "|socks|sunglasses"
)
_MASS = re.compile(
    "bacon|billiards|bread|broccoli|butter|fire|fog|garlic|ginger|hockey|ice|laundry|milk|money|oil|poo|rain"
    "|rice|sake|salt|snow|soap|soccer|spaghetti|sushi|tea|tennis|water"
)
_CONSONANT_SOUND = re.compile(r"(?:uni(?!n)|eu|ewe|one\b|ufo|us[ae])")
_VOWEL_SOUND = re.compile(r"(?:[aeiou]|8|x\b|xray|suv\b|ng\b|rv\b|sos\b|hour|honest)")


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The contents of an image that a caption can mention."""

    style: str
    names: tuple[str, ...]  # the label first, then its synonyms
    tags: tuple[str, ...]
    colours: tuple[str, ...]  # of the subject in the image
    recoloured: bool  # whether the colours differ from those that the names and tags describe
    background: str


def article(words: str) -> str:
    """``a`` or ``an``, by the first sound of ``words``."""
    lowered = words.lower()
    if _CONSONANT_SOUND.match(lowered):
        return "a"
    return "an" if _VOWEL_SOUND.match(lowered) else "a"


def tidy_name(name: str) -> str:
    """A name from the lists in natural English, without version digits and colons."""
    name = re.sub(r"(?<=[a-z]) ?\d$", "", name)
    if name.endswith(": bald"):
        return f"bald {name.removesuffix(': bald')}"
    name = name.replace(": beard", " with a beard").replace(": ", " with ")
    return re.sub(r"\b(man|woman|person) (?=\w+ hair$)", r"\1 with ", name)


def contains_colour(name: str) -> bool:
    """Whether the name contains a colour, such as "red heart"."""
    return _ANY_COLOUR.search(name) is not None


def without_colours(name: str) -> str:
    """The name without colour words. A colour at the end is kept, because there it is a noun, as in "orange".

    Empty if nothing else is left.
    """
    return re.sub(r" {2,}", " ", _COLOUR.sub("", _HAIR.sub("", name))).strip()


def noun_phrase(name: str, colours: tuple[str, ...] = ()) -> str:
    """The name with its article and its colours: "an orange fox", "a pair of red socks", "green grapes"."""
    words = f"{' and '.join(colours)} {name}".strip()
    head = _PREPOSITION.split(name)[0].split(" ")[-1]
    one_person = _ONE_PERSON.match(name) is not None
    if name.startswith("the ") or _MASS.fullmatch(head):
        return words
    if _PAIR.fullmatch(head) and not one_person:
        return f"a pair of {words}"
    plural = _SEVERAL.search(name) or (
        head.endswith("s") and len(head) > 2 and not _NOT_PLURAL.fullmatch(head)
    )
    if plural and not one_person:
        return words
    return f"{article(words)} {words}"


def background_phrase(colour: str) -> str:
    """``on a red background``."""
    return f"on {article(colour)} {colour} background"


def plain_caption(style: str, name: str) -> str:
    """The caption of an unmodified image: the first phrase of its style, and its name."""
    (name,) = _usable_names((name,), keep_colours=style != MONO_STYLE)
    return f"a {STYLE_PHRASES[style][0]} of {noun_phrase(name)}"


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption of the scene, as a pure function of the scene and ``rng``."""
    style = _pick(STYLE_PHRASES[scene.style], rng) if rng.random() >= _P_NO_STYLE else None
    mention_background = rng.random() < (
        _P_WHITE_BACKGROUND if scene.background == "white" else _P_BACKGROUND
    )
    # Colours in names and tags are right only for the original colours of the image.
    keep_colours = not scene.recoloured and scene.style != MONO_STYLE
    names = _usable_names(scene.names, keep_colours=keep_colours)
    name = _pick(names[1:], rng) if len(names) > 1 and rng.random() < _P_SYNONYM else names[0]
    colours = _mentioned_colours(scene, name, style, rng)
    if rng.random() < _P_TAGS:
        background = f"{scene.background} background" if mention_background else None
        return _tag_list(scene, name, colours, style, background, keep_colours, rng)
    text = noun_phrase(name, colours)
    if style:
        text = f"a {style} of {text}"
    return f"{text} {background_phrase(scene.background)}" if mention_background else text


def _pick(choices: tuple[str, ...], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]


def _usable_names(names: tuple[str, ...], *, keep_colours: bool) -> tuple[str, ...]:
    tidy = [tidy_name(name) for name in names]
    if not keep_colours:
        # Keep a name that consists only of colours if there is no other name.
        tidy = [n for n in (without_colours(name) for name in tidy) if n] or tidy[:1]
    # Drop adjectives without a noun.
    tidy = [n for n in tidy if not re.fullmatch(r"\w+ haired", n)] or tidy[:1]
    return tuple(dict.fromkeys(tidy))


def _mentioned_colours(
    scene: Scene, name: str, style: str | None, rng: np.random.Generator
) -> tuple[str, ...]:
    mention, only_one = rng.random() < _P_COLOURS, rng.random() < _P_ONE_COLOUR
    if scene.style == MONO_STYLE:
        mentioned = style is None and mention  # the style phrase already implies black
    else:
        mentioned = scene.recoloured or (mention and not contains_colour(name))
    if not mentioned:
        return ()
    colours = scene.colours[:1] if only_one else scene.colours
    return tuple(colour for colour in colours if colour not in name.split(" "))


def _tag_list(
    scene: Scene,
    name: str,
    colours: tuple[str, ...],
    style: str | None,
    background: str | None,
    keep_colours: bool,
    rng: np.random.Generator,
) -> str:
    tags = [t for t in scene.tags if t != name and t[0].isalpha()]
    tags = [t for t in tags if keep_colours or not contains_colour(t)]
    count = min(len(tags), int(rng.integers(2, 6)))
    chosen = [tags[i] for i in rng.permutation(len(tags))[:count]]
    subject = f"{' and '.join(colours)} {name}".strip()
    return ", ".join(part for part in (style, subject, *chosen, background) if part)

"""The two fixed lists that every model is scored on, and their real images.

List (a), ``pairs.jsonl``, has the 650 held-out style × subject pairs, plain on white. List (b),
``prompts.jsonl``, has 480 composed prompts over such pairs: style × subject × colour × background. Both are
committed. ``scripts/make_lists.py`` made them once, from hashes and the drawings and without any model. They
are split into *val*, for choosing settings, and *test*, which is scored only for the report.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from jaxtyping import UInt8

from wuerstchen.data.captions import (
    STYLE_PHRASES,
    background_phrase,
    noun_phrase,
    plain_caption,
    tidy_name,
    without_colours,
)
from wuerstchen.data.colours import COLOURS
from wuerstchen.data.emoji import EmojiSource, compose, plain_placement, shift_hue
from wuerstchen.errors import DataError

ListName = Literal["a", "b"]
Split = Literal["val", "test"]
LISTS: tuple[ListName, ...] = get_args(ListName)
SPLITS: tuple[Split, ...] = get_args(Split)

VAL_PROMPTS = 120
"""Entries of list (b) in val. List (a) has ``emoji.VAL_PAIRS``."""

FILES: dict[ListName, Path] = {
    "a": Path(__file__).parent / "pairs.jsonl",
    "b": Path(__file__).parent / "prompts.jsonl",
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of a list: what to draw, and how the real image is composed."""

    number: int
    """Its line, counted from 0. It is also the seed of the images that are drawn for it."""
    style: str
    hex: str
    name: str
    """The subject's label in the data set."""
    colour: str | None
    """The colour of the object in the prompt. None in list (a) and for black glyphs."""
    shift: int
    """How far the hue of the real image is rotated, in 1/256 of a turn. 0 keeps its colours."""
    background: str
    caption: str
    split: Split

    @property
    def id(self) -> str:
        """``STYLE/HEX``."""
        return f"{self.style}/{self.hex}"


@cache
def read_list(name: ListName) -> tuple[Entry, ...]:
    """All entries of a committed list, val and test, in file order."""
    lines = FILES[name].read_text(encoding="utf-8").splitlines()
    return tuple(Entry(**json.loads(line)) for line in lines)


def select(name: ListName, splits: Sequence[Split] = SPLITS, limit: int | None = None) -> list[Entry]:
    """The entries of the splits in file order, at most the first ``limit`` of each split."""
    chosen = [[entry for entry in read_list(name) if entry.split == split][:limit] for split in splits]
    return sorted((entry for part in chosen for entry in part), key=lambda entry: entry.number)


def prompt_text(style: str, name: str, colour: str | None, background: str) -> str:
    """A composed prompt: the style's first phrase, the name with another colour, and the background."""
    noun = noun_phrase(subject_words(name), () if colour is None else (colour,))
    return f"a {STYLE_PHRASES[style][0]} of {noun} {background_phrase(background)}"


def subject_words(name: str) -> str:
    """The tidied name without the colours in it, for prompts that name another colour."""
    return without_colours(tidy_name(name)) or tidy_name(name)


def caption_of(name: ListName, entry: Entry) -> str:
    """The caption composed from the other fields of an entry."""
    if name == "a":
        return plain_caption(entry.style, entry.name)
    return prompt_text(entry.style, entry.name, entry.colour, entry.background)


class RealImages:
    """The real images of entries, composed from a built emoji set."""

    def __init__(self, root: Path) -> None:
        """Raises ``DataError`` for a folder that is not a built emoji set."""
        self.source = EmojiSource(root, split="heldout")
        self.items = {record.id: item for item, record in enumerate(self.source.records)}

    def check(self, entries: Sequence[Entry]) -> None:
        """Raises ``DataError`` naming the first image that is missing."""
        for entry in entries:
            if entry.id not in self.items:
                raise DataError(
                    f"{self.source.root} does not have the image {entry.id}. Build the whole set with "
                    f"`wuerstchen data emoji {self.source.root}`."
                )

    def image(self, entry: Entry, size: int) -> UInt8[np.ndarray, "size size 3"]:
        """The subject in the middle of its background, with the hue of the entry."""
        rgba = self.source.rgba(self.items[entry.id])
        if entry.shift:
            rgba = shift_hue(rgba, entry.shift)
        return compose(rgba, plain_placement(entry.style, size), COLOURS[entry.background], size)

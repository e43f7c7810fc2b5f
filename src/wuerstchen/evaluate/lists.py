"""The two fixed lists that every model is scored on, and the real pictures that belong to them.

(a) ``pairs.jsonl``: the 650 held-out style × subject pairs, plain on white. (b) ``prompts.jsonl``: 480
composed prompts, style × subject × colour × background, over such pairs. Both are committed, made once by
``scripts/make_lists.py`` from hashes and the drawings, never from a model, and split into *val*, on which all
choices are made, and *test*, which is scored only for the report.
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
"""Entries of list (b) set aside for choices; of list (a) they are ``emoji.VAL_PAIRS``."""

FILES: dict[ListName, Path] = {
    "a": Path(__file__).parent / "pairs.jsonl",
    "b": Path(__file__).parent / "prompts.jsonl",
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of a list: what to draw, and how the real picture is made."""

    number: int
    """Its line, counted from 0, and the seed of all that is drawn for it."""
    style: str
    hex: str
    name: str
    """The subject's label as the data set has it."""
    colour: str | None
    """The colour asked of the object; None where none is: all of (a), and black glyphs."""
    shift: int
    """How far the hue of the real picture is turned, of 256; 0 leaves its own colours."""
    background: str
    caption: str
    split: Split

    @property
    def id(self) -> str:
        """``STYLE/HEX``."""
        return f"{self.style}/{self.hex}"


@cache
def read_list(name: ListName) -> tuple[Entry, ...]:
    """All entries of a committed list, val and test, in the order of the file."""
    lines = FILES[name].read_text(encoding="utf-8").splitlines()
    return tuple(Entry(**json.loads(line)) for line in lines)


def select(name: ListName, splits: Sequence[Split] = SPLITS, limit: int | None = None) -> list[Entry]:
    """The entries of the splits in the order of the file, of each split the first ``limit`` only."""
    chosen = [[entry for entry in read_list(name) if entry.split == split][:limit] for split in splits]
    return sorted((entry for part in chosen for entry in part), key=lambda entry: entry.number)


def prompt_text(style: str, name: str, colour: str | None, background: str) -> str:
    """A composed prompt: the style's first phrase, the colour in place of the name's own, the background."""
    noun = noun_phrase(subject_words(name), () if colour is None else (colour,))
    return f"a {STYLE_PHRASES[style][0]} of {noun} {background_phrase(background)}"


def subject_words(name: str) -> str:
    """The name as a prompt with a colour of its own says it: tidy, and without the colours in it."""
    return without_colours(tidy_name(name)) or tidy_name(name)


def caption_of(name: ListName, entry: Entry) -> str:
    """The caption that belongs to the entry's other fields."""
    if name == "a":
        return plain_caption(entry.style, entry.name)
    return prompt_text(entry.style, entry.name, entry.colour, entry.background)


class RealPictures:
    """The real pictures of entries, composed from a built emoji set."""

    def __init__(self, root: Path) -> None:
        """Raises ``DataError`` for a folder that is no built set, or lacks what a list asks for."""
        self.source = EmojiSource(root, split="heldout")
        self.items = {record.id: item for item, record in enumerate(self.source.records)}

    def check(self, entries: Sequence[Entry]) -> None:
        """Raises ``DataError`` naming the first picture that is not there."""
        for entry in entries:
            if entry.id not in self.items:
                raise DataError(
                    f"{self.source.root} lacks the picture {entry.id}; build the whole set with "
                    f"`wuerstchen data emoji {self.source.root}`"
                )

    def picture(self, entry: Entry, size: int) -> UInt8[np.ndarray, "size size 3"]:
        """The subject in the middle of its background, its hue turned as the entry says."""
        rgba = self.source.rgba(self.items[entry.id])
        if entry.shift:
            rgba = shift_hue(rgba, entry.shift)
        return compose(rgba, plain_placement(entry.style, size), COLOURS[entry.background], size)

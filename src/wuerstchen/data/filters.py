"""Which pictures are good enough, told from what their data set says about them."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from wuerstchen.errors import UserError

WIDTH, HEIGHT = ("original_width", "WIDTH"), ("original_height", "HEIGHT")
MAX_SIDE = 1 << 31
"""Sides beyond it are not believed: the picture's own size counts then."""
SCORES = {
    "watermark": ("pwatermark", "PWATERMARK", "p_watermark", "watermark_score", "watermark_probability"),
    "aesthetic": (
        "aesthetic",
        "AESTHETIC_SCORE",
        "aesthetic_score",
        "aesthetic_score_laion_v2",
        "aesthetic_score_laion_v1",
        "laion_aesthetic_score",
        "aes_scorelv2",
    ),
    "unsafe": (
        "punsafe",
        "PUNSAFE",
        "p_unsafe",
        "unsafe_score",
        "nsfw_score",
        "nsfw_score_opennsfw2",
        "nsfw_score_gantman",
    ),
}
"""The names under which sets keep their scores, the first that is there counts: LAION's (``aesthetic`` of
version 1, ``AESTHETIC_SCORE`` of version 2), COYO's, and usual spellings of them. DataComp has sizes alone.
img2dataset keeps the columns of the list that it downloads."""
FIELDS = tuple(name for names in (WIDTH, HEIGHT, *SCORES.values()) for name in names)


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Bounds on what the metadata says; None asks for nothing.

    The original took sizes from 512 to 4096, watermark at most 0.5, aesthetic at least 5, unsafe at most
    0.99. A bound itself passes, and so does a score of 0.

    A picture without a score that is asked for passes, unless ``strict`` drops it. How many there were is
    told at the end, and a filter whose score no picture has is refused (``make_plan``): it would do nothing.
    Without a size in its metadata the picture's own counts, which is always there.
    """

    min_size: int | None = None
    """Of the shorter side, in pixels."""
    max_size: int | None = None
    """Of the longer side."""
    max_aspect: float | None = None
    """Of the longer side over the shorter."""
    max_watermark: float | None = None
    min_aesthetic: float | None = None
    max_unsafe: float | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        least = {"min_size": 1, "max_size": 1, "max_aspect": 1, "max_watermark": 0, "max_unsafe": 0}
        for name in (*least, "min_aesthetic"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= least.get(name, -math.inf)):
                raise UserError(
                    f"{name} {value} is wrong because it must be a number"
                    f"{f' of at least {least[name]}' if name in least else ''}; change it or leave it out"
                )
        if self.min_size is not None and self.max_size is not None and self.min_size > self.max_size:
            raise UserError(
                f"min_size {self.min_size} is wrong because it is above max_size {self.max_size}; swap them"
            )

    def verdict(self, fields: Mapping[str, Any]) -> str | None:
        """Why the scores speak against a picture, None if they do not."""
        for score, (least, most) in self.asked().items():
            name, value = _first(fields, SCORES[score])
            if value is None:
                if self.strict:
                    return f"no {score} score"
                continue
            number = _number(value)
            if number is None:
                return f"{name} is no number"
            if least is not None and number < least:
                return f"{score} score below {least:g}"
            if most is not None and number > most:
                return f"{score} score above {most:g}"
        return None

    def asked(self) -> dict[str, tuple[float | None, float | None]]:
        """The scores that are filtered by, with their least and greatest value."""
        bounds = {
            "watermark": (None, self.max_watermark),
            "aesthetic": (self.min_aesthetic, None),
            "unsafe": (None, self.max_unsafe),
        }
        return {score: pair for score, pair in bounds.items() if pair != (None, None)}

    def lacking(self, fields: Mapping[str, Any]) -> list[str]:
        """The scores that are filtered by and that a picture does not have."""
        return [score for score in self.asked() if _first(fields, SCORES[score])[1] is None]

    def verdict_on_size(self, size: tuple[int, int]) -> str | None:
        """The same for width and height in pixels."""
        short, long = min(size), max(size)
        if self.min_size is not None and short < self.min_size:
            return f"size below {self.min_size}"
        if self.max_size is not None and long > self.max_size:
            return f"size above {self.max_size}"
        if self.max_aspect is not None and long > self.max_aspect * short:
            return f"aspect above {self.max_aspect:g}"
        return None


def size_in(fields: Mapping[str, Any]) -> tuple[int, int] | None:
    """Width and height of the picture as it was found, None where the metadata does not say both."""
    sides = [_number(_first(fields, names)[1]) for names in (WIDTH, HEIGHT)]
    if all(side is not None and 1 <= side <= MAX_SIDE for side in sides):
        return int(sides[0]), int(sides[1])
    return None


def _number(value: Any) -> int | float | None:
    """A number in metadata, None for anything else: a bool is no score, and NaN is within no bounds.

    Whole numbers can have any number of digits, so they are not converted to float.
    """
    if isinstance(value, Decimal):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return None if isinstance(value, float) and math.isnan(value) else value


def _first(fields: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str, Any]:
    for name in names:
        if fields.get(name) is not None:
            return name, fields[name]
    return names[0], None


MAX_NAMED = 1000
"""Damaged pictures that a tally names; the others are counted."""
_MAX_WORDS = 300  # characters of a name, and of a reason


@dataclass
class Tally:
    """What was left out of a set: how often for which reason, and what was damaged by name."""

    dropped: Counter[str] = field(default_factory=Counter)
    damaged: list[tuple[str, str]] = field(default_factory=list)
    """Name and reason of the first ``MAX_NAMED``; the reason in full, where ``dropped`` counts kinds."""
    unnamed: int = 0
    """How many more were damaged: a set can lack half of its pictures, and their names would not fit."""

    def drop(self, kind: str) -> None:
        """Counts a picture that the filters, or the lack of a caption, leave out."""
        self.dropped[kind] += 1

    def damage(self, kind: str, name: str, reason: str) -> None:
        """Counts and names what cannot be read."""
        self.dropped[kind] += 1
        self._name([(_shortened(name), _shortened(reason))])

    def add(self, other: "Tally") -> None:
        self.dropped.update(other.dropped)
        self._name(other.damaged)
        self.unnamed += other.unnamed

    def _name(self, damaged: list[tuple[str, str]]) -> None:
        room = MAX_NAMED - len(self.damaged)
        self.damaged += damaged[: max(0, room)]
        self.unnamed += max(0, len(damaged) - max(0, room))

    def to_json(self) -> dict[str, Any]:
        return {
            "dropped": dict(sorted(self.dropped.items())),
            "damaged": [list(entry) for entry in self.damaged],
            "unnamed": self.unnamed,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Tally":
        """``unnamed`` is missing in what older versions wrote: they named all."""
        tally = cls(Counter(content["dropped"]), unnamed=int(content.get("unnamed", 0)))
        tally._name([(str(name), str(reason)) for name, reason in content["damaged"]])
        return tally


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_WORDS else f"{text[: _MAX_WORDS - 4]} ..."

"""Filters on the metadata of images: their sizes, and scores such as watermark and aesthetic."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from wuerstchen.errors import UserError

WIDTH, HEIGHT = ("original_width", "WIDTH"), ("original_height", "HEIGHT")
MAX_SIDE = 1 << 31
"""Larger sides in metadata are ignored, and the image's actual size is used."""
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
"""The column names of each score, in order of preference: LAION's (``aesthetic`` in version 1,
``AESTHETIC_SCORE`` in version 2), COYO's, and common spellings. DataComp has only sizes. img2dataset keeps
the columns of the list that it downloads."""
FIELDS = tuple(name for names in (WIDTH, HEIGHT, *SCORES.values()) for name in names)


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Bounds on sizes and scores, both inclusive. None means no bound.

    The original used sizes from 512 to 4096, a watermark score of at most 0.5, an aesthetic score of at least
    5, and an unsafe score of at most 0.99.

    An image without a required score passes, unless ``strict`` drops it. Such images are counted and
    reported. A filter is refused if no image has its score, because it would have no effect
    (``make_plan``). If the metadata has no size, the image's actual size counts.
    """

    min_size: int | None = None
    """Smallest shorter side, in pixels."""
    max_size: int | None = None
    """Largest longer side, in pixels."""
    max_aspect: float | None = None
    """Largest ratio of the longer side to the shorter side."""
    max_watermark: float | None = None
    min_aesthetic: float | None = None
    max_unsafe: float | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        least = {"min_size": 1, "max_size": 1, "max_aspect": 1, "max_watermark": 0, "max_unsafe": 0}
        for name in (*least, "min_aesthetic"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= least.get(name, -math.inf)):
                bound = f" of at least {least[name]}" if name in least else ""
                raise UserError(f"{name} must be a number{bound}, got {value}.")
        if self.min_size is not None and self.max_size is not None and self.min_size > self.max_size:
            raise UserError(
                f"min_size must not be above max_size, got min_size {self.min_size} and max_size"
                f" {self.max_size}."
            )

    def drop_reason(self, fields: Mapping[str, Any]) -> str | None:
        """Why the scores of an image exclude it, or None if they do not."""
        for score, (least, most) in self._bounds().items():
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

    def _bounds(self) -> dict[str, tuple[float | None, float | None]]:
        """Lower and upper bound of each score that has one."""
        bounds = {
            "watermark": (None, self.max_watermark),
            "aesthetic": (self.min_aesthetic, None),
            "unsafe": (None, self.max_unsafe),
        }
        return {score: pair for score, pair in bounds.items() if pair != (None, None)}

    def missing_scores(self, fields: Mapping[str, Any]) -> list[str]:
        """The scores with a bound that an image does not have."""
        return [score for score in self._bounds() if _first(fields, SCORES[score])[1] is None]

    def drop_reason_for_size(self, size: tuple[int, int]) -> str | None:
        """Why the width and height in pixels exclude an image, or None if they do not."""
        short, long = min(size), max(size)
        if self.min_size is not None and short < self.min_size:
            return f"size below {self.min_size}"
        if self.max_size is not None and long > self.max_size:
            return f"size above {self.max_size}"
        if self.max_aspect is not None and long > self.max_aspect * short:
            return f"aspect above {self.max_aspect:g}"
        return None


def size_in(fields: Mapping[str, Any]) -> tuple[int, int] | None:
    """Original width and height of an image, or None unless the metadata has both."""
    sides = [_number(_first(fields, names)[1]) for names in (WIDTH, HEIGHT)]
    if all(side is not None and 1 <= side <= MAX_SIDE for side in sides):
        return int(sides[0]), int(sides[1])
    return None


def _number(value: Any) -> int | float | None:
    """A number in metadata, or None for anything else, including booleans and NaN.

    Integers can have any number of digits, so they are not converted to float.
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
"""Damaged images that a tally names. The others are only counted."""
_MAX_CHARACTERS = 300  # of a name, and of a reason


@dataclass
class Tally:
    """What was left out of a set: the count of each reason, and the names of damaged images."""

    dropped: Counter[str] = field(default_factory=Counter)
    damaged: list[tuple[str, str]] = field(default_factory=list)
    """Name and full reason of the first ``MAX_NAMED``. ``dropped`` counts kinds of reasons."""
    unnamed: int = 0
    """How many more were damaged. Half of a large set can be missing, and all the names would not fit."""

    def drop(self, kind: str) -> None:
        """Counts an image that is excluded by the filters or has no caption."""
        self.dropped[kind] += 1

    def damage(self, kind: str, name: str, reason: str) -> None:
        """Counts and names an image or file that cannot be read."""
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
        """Reads ``to_json``. Earlier versions named all damaged images and wrote no ``unnamed``."""
        tally = cls(Counter(content["dropped"]), unnamed=int(content.get("unnamed", 0)))
        tally._name([(str(name), str(reason)) for name, reason in content["damaged"]])
        return tally


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_CHARACTERS else f"{text[: _MAX_CHARACTERS - 4]} ..."

"""Which pictures are good enough, told from what their data set says about them."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from wuerstchen.errors import UserError

WIDTH, HEIGHT = ("original_width", "WIDTH"), ("original_height", "HEIGHT")
SCORES = {
    "watermark": ("pwatermark",),
    "aesthetic": ("aesthetic", "AESTHETIC_SCORE"),
    "unsafe": ("punsafe",),
}
"""The names under which LAION's sets keep their scores."""
FIELDS = tuple(name for names in (WIDTH, HEIGHT, *SCORES.values()) for name in names)


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Bounds on what the metadata says; None asks for nothing.

    The original took sizes from 512 to 4096, watermark at most 0.5, aesthetic at least 5, unsafe at most
    0.99. A bound itself passes, and so does a score of 0. A picture without the field passes unless
    ``strict``; without a size in its metadata the picture's own counts, which is always there.
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
        for score, least, most in (
            ("watermark", None, self.max_watermark),
            ("aesthetic", self.min_aesthetic, None),
            ("unsafe", None, self.max_unsafe),
        ):
            if least is None and most is None:
                continue
            name, value = _first(fields, SCORES[score])
            if value is None:
                if self.strict:
                    return f"no {score} score"
                continue
            # A bool is a number to Python, but no score; NaN is within no bounds.
            if not isinstance(value, int | float) or isinstance(value, bool) or math.isnan(value):
                return f"{name} is no number"
            if least is not None and value < least:
                return f"{score} score below {least:g}"
            if most is not None and value > most:
                return f"{score} score above {most:g}"
        return None

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
    sides = [_first(fields, names)[1] for names in (WIDTH, HEIGHT)]
    if all(
        isinstance(s, int | float) and not isinstance(s, bool) and math.isfinite(s) and s >= 1 for s in sides
    ):
        return int(sides[0]), int(sides[1])
    return None


def _first(fields: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str, Any]:
    for name in names:
        if fields.get(name) is not None:
            return name, fields[name]
    return names[0], None


@dataclass
class Tally:
    """What was left out of a set: how often for which reason, and what was damaged by name."""

    dropped: Counter[str] = field(default_factory=Counter)
    damaged: list[tuple[str, str]] = field(default_factory=list)
    """Name and reason; the reason in full, where ``dropped`` counts kinds."""

    def drop(self, kind: str) -> None:
        """Counts a picture that the filters, or the lack of a caption, leave out."""
        self.dropped[kind] += 1

    def damage(self, kind: str, name: str, reason: str) -> None:
        """Counts and names what cannot be read."""
        self.dropped[kind] += 1
        self.damaged.append((name, reason))

    def add(self, other: "Tally") -> None:
        self.dropped.update(other.dropped)
        self.damaged += other.damaged

    def to_json(self) -> dict[str, Any]:
        return {"dropped": dict(sorted(self.dropped.items())), "damaged": [list(d) for d in self.damaged]}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Tally":
        return cls(Counter(content["dropped"]), [(str(n), str(r)) for n, r in content["damaged"]])

"""The targets of the bundled model, and whether its scores reach them."""

import math
from dataclasses import dataclass

from wuerstchen.evaluate.lists import ListName
from wuerstchen.evaluate.metrics import Score
from wuerstchen.evaluate.scoring import Column, Row


@dataclass(frozen=True, kw_only=True)
class Target:
    """A target for the scores on one split, and whether it is reached."""

    text: str
    list: ListName
    measured: float | None
    """None if a row that it needs was not scored."""
    limit: float | None
    at_least: bool
    """Whether ``limit`` is the lowest allowed value, or the highest."""

    @property
    def reached(self) -> bool | None:
        if self.measured is None or self.limit is None:
            return None
        over = self.measured - self.limit
        # Fractions that are equal in exact arithmetic may differ in their last bit.
        return over >= -1e-9 if self.at_least else over <= 1e-9

    @property
    def limit_text(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {number_text(self.limit)}"


def targets(scores: dict[ListName, dict[Row, dict[Column, Score]]]) -> list[Target]:
    """The targets of the bundled model, compared with the scores of one split by list and row."""

    def value(name: ListName, row: Row, column: Column) -> float:
        score = scores.get(name, {}).get(row, {}).get(column)
        return math.nan if score is None else score.value

    def target(text: str, name: ListName, measured: float, limit: float, *, at_least: bool = True) -> Target:
        return Target(
            text=text,
            list=name,
            measured=None if math.isnan(measured) else measured,
            limit=None if math.isnan(limit) else limit,
            at_least=at_least,
        )

    real_recall, real_style = value("a", "real", "recall_1"), value("a", "real", "style")
    recall, kid_a_b = value("a", "c_b_a", "recall_1"), value("a", "a_b", "kid_e3")
    jpeg_kid = value("a", "jpeg20", "kid_e3")
    lost = value("a", "before", "recall_1") - recall
    return [
        target("Stage A, unquantised: PSNR in dB", "b", value("b", "stage_a", "psnr"), 30.0),
        target("A+B: R@1, 0.85 of real", "a", value("a", "a_b", "recall_1"), 0.85 * real_recall),
        target("A+B: KID×1e3, twice that of JPEG q20", "a", kid_a_b, 2 * jpeg_kid, at_least=False),
        target("C+B+A: R@1, 0.75 of real", "a", recall, 0.75 * real_recall),
        target("C+B+A: style, 0.9 of real", "a", value("a", "c_b_a", "style"), 0.9 * real_style),
        target("C+B+A: background colour", "b", value("b", "c_b_a", "background"), 0.95),
        target("C+B+A: object colour", "b", value("b", "c_b_a", "object"), 0.85),
        target(
            "C+B+A: KID×1e3, that of A+B and of JPEG q20",
            "a",
            value("a", "c_b_a", "kid_e3"),
            kid_a_b + jpeg_kid,
            at_least=False,
        ),
        target("C+B+A: R@1 lost by compression", "a", lost, 0.01, at_least=False),
    ]


def number_text(value: float | None) -> str:
    """A score with three decimals, or a dash if it was not measured."""
    return "–" if value is None else f"{value:.3f}"

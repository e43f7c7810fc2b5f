"""Which caption of an image is used in training, and how its tags are shuffled."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from wuerstchen.errors import UserError


@dataclass(frozen=True, kw_only=True)
class CaptionOptions:
    """How a caption is chosen from those of an image, and what is changed in it.

    Everything random is a function of the run's seed and the image's index. With the defaults, one of the
    captions of an image is picked uniformly and used as it is.
    """

    columns: tuple[str, ...] = ()
    """Several columns with captions, with their weights: ``long=3 short=1 tags``. The weight is 1 if it is
    missing. An image without a caption in some of them uses the others. Replaces ``text_column``."""
    trigger: str = ""
    """Words that begin every caption, for a subject or a style: ``sks dog``. Captions that begin with them
    stay as they are."""
    tag_columns: tuple[str, ...] = ()
    """Those of ``columns`` whose captions are lists of tags, separated by commas. Empty if all captions are.
    A list of values in such a column is one caption."""
    shuffle_tags: bool = False
    """Shuffles the tags of a caption each time."""
    keep_tags: int = 0
    """Number of tags at the beginning of a caption that are neither shuffled nor dropped."""
    tag_dropout: float = 0.0
    """Fraction of the tags that are dropped each time. At least one tag of a caption is kept."""

    def __post_init__(self) -> None:
        names = self.names
        for entry, name, weight in zip(self.columns, names, self.weights, strict=True):
            if not name or not 0 < weight < math.inf:
                raise UserError(
                    f"captions.columns must be names with weights above 0, got {entry!r}. Write them as "
                    "long=3 short=1."
                )
        if len(set(names)) < len(names):
            raise UserError(
                f"captions.columns must name each column once, got {' '.join(self.columns)}. Give it a "
                "weight instead."
            )
        if unknown := [name for name in self.tag_columns if name not in names]:
            raise UserError(
                f"captions.tag_columns must be columns of captions.columns, got {unknown[0]!r}. Add it there."
            )
        if self.keep_tags < 0:
            raise UserError(f"captions.keep_tags must be at least 0, got {self.keep_tags}. 1 is common.")
        if not 0 <= self.tag_dropout < 1:
            raise UserError(
                f"captions.tag_dropout must be at least 0 and below 1, got {self.tag_dropout}. 0.1 is common."
            )
        if self.trigger != " ".join(self.trigger.split()):
            raise UserError(
                f"captions.trigger must not have spaces at its ends or in a row, got {self.trigger!r}. "
                "Remove them."
            )
        if not (self.shuffle_tags or self.tag_dropout) and (self.tag_columns or self.keep_tags):
            raise UserError(
                f"captions.tag_columns={' '.join(self.tag_columns)} and keep_tags={self.keep_tags} have no "
                "effect without captions.shuffle_tags or captions.tag_dropout. Add one of them."
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The names in ``columns``."""
        return tuple(_parsed(entry)[0] for entry in self.columns)

    @property
    def weights(self) -> tuple[float, ...]:
        """The weights in ``columns``."""
        return tuple(_parsed(entry)[1] for entry in self.columns)

    def pick(self, captions: Sequence[str], groups: Sequence[int], rng: np.random.Generator) -> str:
        """One of the ``captions`` of an image, as training reads it.

        ``groups`` has the number of captions from each of ``columns``. It is empty without ``columns``.
        """
        is_tags = not self.tag_columns
        if groups:
            ends = list(accumulate(groups))
            present = [number for number, count in enumerate(groups) if count]
            weights = np.cumsum([self.weights[number] for number in present])
            place = int(np.searchsorted(weights, rng.random() * weights[-1], side="right"))
            number = present[min(place, len(present) - 1)]
            captions = captions[ends[number] - groups[number] : ends[number]]
            if self.names[number] in self.tag_columns:
                captions, is_tags = (", ".join(captions),), True
        text = captions[int(rng.integers(len(captions)))]
        if is_tags and (self.shuffle_tags or self.tag_dropout):
            text = self._with_tags_changed(text, rng)
        return self.with_trigger(text)

    def with_trigger(self, text: str) -> str:
        """The caption with the trigger words at its beginning."""
        if not self.trigger or text.startswith(self.trigger):
            return text
        return f"{self.trigger}, {text}"

    def _with_tags_changed(self, text: str, rng: np.random.Generator) -> str:
        tags = [tag for part in text.split(",") if (tag := part.strip())]
        kept, others = tags[: self.keep_tags], tags[self.keep_tags :]
        stay = rng.random(len(others)) >= self.tag_dropout
        if others and not kept and not stay.any():
            stay[int(rng.integers(len(others)))] = True
        chosen = [tag for tag, stays in zip(others, stay, strict=True) if stays]
        if self.shuffle_tags:
            chosen = [chosen[place] for place in rng.permutation(len(chosen))]
        return ", ".join((*kept, *chosen)) or text


def _parsed(entry: str) -> tuple[str, float]:
    """The name and the weight of an entry of ``columns``. The weight is NaN if it is not a number."""
    name, equals, weight = entry.rpartition("=")
    if not equals:
        return entry, 1.0
    try:
        return name, float(weight)
    except ValueError:
        return name, math.nan


PLAIN = CaptionOptions()
"""One of the captions, unchanged."""

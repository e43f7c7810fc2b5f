"""Where captioned pictures come from: the one interface that every data set offers to training."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

Size = tuple[int, int]
"""Width and height."""


@dataclass(frozen=True)
class Example:
    """One picture ready for training."""

    image: np.ndarray  # uint8, (height, width, 3), RGB
    caption: str


@runtime_checkable
class Source(Protocol):
    """A set of captioned pictures with random access.

    ``example`` is a pure function of the item and of ``rng``: a source never draws from anywhere else. It
    draws what the image needs before what the caption needs, so ``image`` shows the same picture.
    """

    def __len__(self) -> int: ...

    def name(self, item: int) -> str:
        """What the item is called in messages: its file, as a rule."""
        ...

    def example(self, item: int, rng: np.random.Generator, size: int | Size) -> Example:
        """The item as a picture of a size, or side, with a caption. Raises ``DataError`` if unreadable."""
        ...

    def image(self, item: int, rng: np.random.Generator, size: int | Size) -> np.ndarray:
        """The picture of ``example`` alone, without the work of a caption."""
        ...

    def fingerprint(self) -> str:
        """A hash of what the source holds; it changes when a file is added, removed or replaced."""
        ...

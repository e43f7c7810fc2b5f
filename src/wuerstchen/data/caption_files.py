"""Captions without images, for stages that read nothing else."""

import hashlib
from pathlib import Path
from typing import Literal

import numpy as np

from wuerstchen.data.emoji import EmojiSource
from wuerstchen.data.plan import held_out_names
from wuerstchen.data.sources import Example, Size, StoredImages, Subset
from wuerstchen.errors import DataError

MOST_BYTES = 2**30


class CaptionsOnly:
    """A ``Source`` with black images. Only its captions count."""


def _black(size: int | Size) -> np.ndarray:
    width, height = (size, size) if isinstance(size, int) else size
    return np.zeros((height, width, 3), dtype=np.uint8)


class CaptionFile(CaptionsOnly):
    """The captions in a UTF-8 text file, one a line."""

    def __init__(self, path: Path, subset: Literal["all"] | Subset = "train") -> None:
        """Empty lines are left out. Equal captions count once. Raises ``DataError`` for a file that cannot be
        read."""
        try:
            if path.stat().st_size > MOST_BYTES:
                raise DataError(
                    f"{path} has more than {MOST_BYTES:,} bytes. Use a smaller file of captions, one a line."
                )
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read as UTF-8 text ({error}). Check the file.") from error
        found = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
        if not found:
            raise DataError(f"{path} has no captions. Write one a line.")
        held_out = held_out_names(found)
        chosen = {"all": set(found), "train": set(found) - held_out, "heldout": held_out}[subset]
        self._captions = [caption for caption in found if caption in chosen]

    def __len__(self) -> int:
        return len(self._captions)

    def name(self, item: int) -> str:
        """The caption itself."""
        return self._captions[item]

    def example(self, item: int, rng: np.random.Generator, size: int | Size) -> Example:
        return Example(_black(size), self._captions[item])

    def image(self, item: int, rng: np.random.Generator, size: int | Size) -> np.ndarray:
        return _black(size)

    def fingerprint(self) -> str:
        return hashlib.sha256("\n".join(self._captions).encode()).hexdigest()


class WithoutImages(CaptionsOnly):
    """The captions of a source, whose images are not opened or composed."""

    def __init__(self, source: StoredImages | EmojiSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def name(self, item: int) -> str:
        return self.source.name(item)

    def example(self, item: int, rng: np.random.Generator, size: int | Size) -> Example:
        if isinstance(self.source, EmojiSource):
            return Example(_black(size), self.source.captions(item, [rng])[0])
        return Example(_black(size), self.source.caption(item, rng))

    def image(self, item: int, rng: np.random.Generator, size: int | Size) -> np.ndarray:
        return _black(size)

    def fingerprint(self) -> str:
        """A hash of the stored set, images included."""
        return self.source.fingerprint()

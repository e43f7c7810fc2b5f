"""Sources of captioned images: the interface that every data set offers to training."""

import io
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from wuerstchen.data.caption_options import PLAIN, CaptionOptions
from wuerstchen.images import resize_crop
from wuerstchen.png_text import open_any

Subset = Literal["train", "heldout"]
"""``train`` is what training sees. ``heldout`` is what validation uses, and training never sees."""
Size = tuple[int, int]
"""Width and height."""


@dataclass(frozen=True)
class Example:
    """An image ready for training."""

    image: np.ndarray  # uint8, (height, width, 3), RGB
    caption: str


@runtime_checkable
class Source(Protocol):
    """A set of captioned images with random access.

    ``example`` is a pure function of the item and ``rng``, its only source of randomness. It draws everything
    for the image before anything for the caption, so ``image`` returns the same image.
    """

    def __len__(self) -> int: ...

    def name(self, item: int) -> str:
        """The name of the item in messages, usually its file."""
        ...

    def example(self, item: int, rng: np.random.Generator, size: int | Size) -> Example:
        """The item as an image of this size (an int means a square), with a caption.

        Raises ``DataError`` if it cannot be read.
        """
        ...

    def image(self, item: int, rng: np.random.Generator, size: int | Size) -> np.ndarray:
        """The image of ``example`` without its caption, which is faster."""
        ...

    def fingerprint(self) -> str:
        """A hash of the contents, which changes when a file is added, removed or replaced."""
        ...


class StoredImages(ABC):
    """A ``Source`` of image files with written captions.

    Each image is scaled to cover the requested size and cropped at random. If it has several captions, one is
    picked at random, as ``options`` say.
    """

    options: CaptionOptions = PLAIN

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, item: int) -> str:
        """The name of the image in messages."""

    @abstractmethod
    def captions(self, item: int) -> tuple[str, ...]:
        """All captions of the image, at least one."""

    def groups(self, item: int) -> tuple[int, ...]:
        """How many of its captions are from each column. Empty if the captions are from one column."""
        return ()

    def caption(self, item: int, rng: np.random.Generator) -> str:
        """One of the captions of the image, as ``options`` say."""
        return self.options.pick(self.captions(item), self.groups(item), rng)

    @abstractmethod
    def load(self, item: int) -> Image.Image:
        """The whole image in sRGB. Raises ``DataError`` if it cannot be read."""

    @abstractmethod
    def size(self, item: int) -> Size | None:
        """Width and height in pixels from the header of the file, or None if it cannot be read."""

    def image(self, item: int, rng: np.random.Generator, size: int | Size) -> UInt8[np.ndarray, "h w 3"]:
        """The image, scaled to cover ``size`` (or a square of that side) and cropped at random."""
        width, height = (size, size) if isinstance(size, int) else size
        return np.array(resize_crop(self.load(item), width, height, rng))

    def example(self, item: int, rng: np.random.Generator, size: int | Size) -> Example:
        """The result of ``image``, and one of the captions. Raises ``DataError`` if it cannot be read."""
        image = self.image(item, rng, size)
        return Example(image, self.caption(item, rng))


def size_in_header(file: Path | io.BytesIO) -> Size | None:
    """Width and height of an image file, or None if its header cannot be read."""
    if isinstance(file, Path) and not file.is_file():  # opening a pipe would block
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with open_any(file) as image:
                width, height = image.size
    except Exception:  # decoders raise anything; training names these images when it reads them
        return None
    return (width, height) if width > 0 and height > 0 else None

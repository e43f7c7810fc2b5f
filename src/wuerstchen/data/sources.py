"""Where captioned pictures come from: the one interface that every data set offers to training."""

import io
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from wuerstchen.images import resize_crop
from wuerstchen.png_text import open_any

Part = Literal["train", "heldout"]
"""What training sees, or what it never sees and the validation loss is measured on."""
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


class StoredImages(ABC):
    """A ``Source`` of image files with the captions that people wrote for them.

    An image is scaled until it just covers the size that is asked for, and cropped at random. Of several
    captions one is picked at random.
    """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, item: int) -> str:
        """What the image is called in messages."""

    @abstractmethod
    def captions(self, item: int) -> tuple[str, ...]:
        """All captions of the image, at least one."""

    @abstractmethod
    def opened(self, item: int) -> Image.Image:
        """The whole image in sRGB. Raises ``DataError`` if it cannot be read."""

    @abstractmethod
    def size(self, item: int) -> Size | None:
        """Width and height in pixels as the header of the file has them; None where there is none to read."""

    def image(self, item: int, rng: np.random.Generator, size: int | Size) -> UInt8[np.ndarray, "h w 3"]:
        """The image, scaled until it just covers ``size`` or a square of that side, cropped at random."""
        width, height = (size, size) if isinstance(size, int) else size
        return np.array(resize_crop(self.opened(item), width, height, rng))

    def example(self, item: int, rng: np.random.Generator, size: int | Size) -> Example:
        """The image as ``image`` gives it, and one of its captions. Raises ``DataError`` if unreadable."""
        image = self.image(item, rng, size)
        captions = self.captions(item)
        return Example(image, captions[int(rng.integers(len(captions)))])


def size_in_header(file: Path | io.BytesIO) -> Size | None:
    """Width and height of an image file; None where it has no header that can be read."""
    if isinstance(file, Path) and not file.is_file():  # a pipe would be waited for
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with open_any(file) as image:
                width, height = image.size
    except Exception:  # decoders fail in ways of every kind; training names these images when it reads them
        return None
    return (width, height) if width > 0 and height > 0 else None

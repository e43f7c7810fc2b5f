"""Masks of edits: reads them, extends images, and finds the region that a mask covers.

A mask says how far each pixel of an image may change: black keeps it, white repaints it.
"""

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from wuerstchen.errors import DataError, UserError
from wuerstchen.images import crop_box, opened_image, to_rgb, turned_upright

SNAP = 12
"""Values this close to black or white, out of 255, count as black or white: JPEG changes them a little."""


def open_mask(path: Path | str) -> Image.Image:
    """Decodes the mask in ``path``, as ``mask_of`` does. Raises ``DataError`` as ``open_image`` does."""
    with _named_masks():
        return opened_image(path, path, lambda image: _mask_in(image, f"mask {str(path)!r}"))


def decode_mask(data: bytes, name: str) -> Image.Image:
    """``open_mask`` for the bytes of an image file. ``name`` is its name in messages."""
    with _named_masks():
        return opened_image(io.BytesIO(data), name, lambda image: _mask_in(image, f"mask {name!r}"))


@contextlib.contextmanager
def _named_masks() -> Iterator[None]:
    """Lets messages about images that cannot be read say "mask"."""
    try:
        yield
    except DataError as error:
        raise DataError(re.sub(r"^image\b", "mask", str(error))) from error.__cause__


def scaled_mask(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The mask scaled and cropped to ``size``, as ``images.resize_crop`` does with its image.

    The largest value counts where pixels are joined, so that thin lines stay.
    """
    if mask.size == size:
        return mask
    left, top, right, bottom = crop_box(mask.size, *size)
    rows = _joined(np.asarray(mask), top, bottom, size[1])
    return Image.fromarray(_joined(rows.T, left, right, size[0]).T.copy())


def _joined(
    values: UInt8[np.ndarray, "n m"], first: float, last: float, count: int
) -> UInt8[np.ndarray, "c m"]:
    """The largest values in ``count`` equal intervals of the rows from ``first`` to ``last``."""
    edges = np.linspace(first, last, count + 1)
    starts, ends = np.floor(edges[:-1] + 1e-6).astype(int), np.ceil(edges[1:] - 1e-6).astype(int)
    bounds = np.stack([starts, ends], 1).ravel()
    # reduceat reduces from each bound to the next. The results from an end to the next start are not used.
    padded = np.concatenate([values, np.zeros_like(values[:1])])
    return np.maximum.reduceat(padded, bounds)[::2]


def mask_of(image: Any, name: str = "mask") -> Image.Image:
    """A mask as 8-bit grey, upright: 0 keeps a pixel, 255 repaints it.

    If the image has transparent pixels, they are repainted, as in OpenAI's API. Otherwise its luminance
    counts. Raises ``UserError`` if it is not an image.
    """
    if not isinstance(image, Image.Image):
        raise UserError(f"{name} must be a PIL image, got {type(image)}. Open files with PIL.Image.open.")
    if 0 in image.size:
        raise UserError(f"{name} has {image.width}×{image.height} pixels. Both sides must be at least 1.")
    return _mask_in(turned_upright(image), name)


def _mask_in(upright: Image.Image, name: str) -> Image.Image:
    if upright.has_transparency_data:
        alpha = upright.convert("RGBA").getchannel("A")
        if alpha.getextrema() != (255, 255):
            mask = alpha.point(lambda value: 255 - value)
            mask.info = {}  # the image is upright already: its EXIF must not turn the mask again
            return mask
    mask = to_rgb(upright, name).convert("L")
    mask.info = {}
    return mask


def extended(image: Image.Image, sides: tuple[int, int, int, int]) -> Image.Image:
    """The image with ``sides`` (left, top, right, bottom) more pixels, which repeat its edges."""
    left, top, right, bottom = sides
    pixels = np.asarray(image)
    widths = [(top, bottom), (left, right), *[(0, 0)] * (pixels.ndim - 2)]
    return Image.fromarray(np.pad(pixels, widths, mode="edge"))


def extended_mask(mask: Image.Image, sides: tuple[int, int, int, int]) -> Image.Image:
    """The mask of ``extended``: the new pixels are white."""
    left, top, right, bottom = sides
    whole = Image.new("L", (mask.width + left + right, mask.height + top + bottom), 255)
    whole.paste(mask, (left, top))
    return whole


def strengths_of(mask: Image.Image) -> Float[np.ndarray, "h w"]:
    """The values of a mask from 0 to 1. Raises ``UserError`` if it is black or white everywhere."""
    check_mask(mask)
    values = np.asarray(mask).astype(np.int32)
    values[values <= SNAP] = 0
    values[values >= 255 - SNAP] = 255
    return (values / 255).astype(np.float32)


def check_mask(
    mask: Image.Image, *, given: tuple[int, int] | None = None, may_be_black: bool = False
) -> None:
    """Raises ``UserError`` if the mask is black or white everywhere.

    ``given`` is the size that it had before ``scaled_mask``, for the message. With ``may_be_black``, black
    everywhere is fine: the image is extended.
    """
    lowest, highest = mask.getextrema()
    is_black, is_white = highest <= SNAP and not may_be_black, lowest >= 255 - SNAP
    size = f"{mask.width}x{mask.height}"
    if (is_black or is_white) and given is not None:
        raise UserError(
            f"mask has no {'white' if is_black else 'black'} pixel left: size {size} scales and crops its "
            f"{given[0]}x{given[1]} pixels to the center. Choose a size of the same shape, or omit it."
        )
    if is_black:
        raise UserError(
            f"mask is empty: all of its {size} pixels are black, which keeps them. Paint the part to change "
            "white."
        )
    if is_white:
        raise UserError(
            f"mask is full: all of its {size} pixels are white, so nothing would be kept. Paint the part to "
            "keep black, or omit the mask."
        )


def opacity_of(strengths: Float[np.ndarray, "h w"], feather: int) -> Float[np.ndarray, "h w"]:
    """The opacity of the result over the image: 1 in the mask, and falling to 0 over ``feather`` pixels.

    It is exactly 0 at pixels further from the mask than that, in a square neighbourhood.
    """
    outer, inner = feather - feather // 2, feather // 2
    grown = _box_sum((strengths > 0).astype(np.int32), outer) > 0
    return (_box_sum(grown.astype(np.int32), inner) / (2 * inner + 1) ** 2).astype(np.float32)


def _box_sum(values: Int[np.ndarray, "h w"], radius: int) -> Int[np.ndarray, "h w"]:
    """The sum over a square of ``2·radius + 1`` pixels around each pixel. Repeats the edges."""
    for axis in (0, 1):
        padded = np.pad(values, [(radius + 1, radius) if a == axis else (0, 0) for a in (0, 1)], mode="edge")
        sums = padded.cumsum(axis, dtype=np.int64)
        side = values.shape[axis]
        last = np.take(sums, range(2 * radius + 1, 2 * radius + 1 + side), axis)
        values = last - np.take(sums, range(side), axis)
    return values


def region_of(opacity: Float[np.ndarray, "h w"], padding: int, ratio: float) -> tuple[int, int, int, int]:
    """The box (left, top, right, bottom) around everything with an opacity above 0 and ``padding`` pixels.

    Where the image has room, the box is enlarged to the ``ratio`` of width to height.
    """
    height, width = opacity.shape
    left, right = _bounds(opacity.any(0), padding)
    top, bottom = _bounds(opacity.any(1), padding)
    left, right = _enlarged(left, right, round((bottom - top) * ratio), width)
    top, bottom = _enlarged(top, bottom, round((right - left) / ratio), height)
    return left, top, right, bottom


def _bounds(used: Any, padding: int) -> tuple[int, int]:
    positions = used.nonzero()[0]
    return max(0, int(positions[0]) - padding), min(len(used), int(positions[-1]) + 1 + padding)


def _enlarged(first: int, last: int, wanted: int, side: int) -> tuple[int, int]:
    """The interval with a length of at least ``wanted``, if the ``side`` has room, around its middle."""
    length = min(max(wanted, last - first), side)
    first = min(max(0, first - (length - (last - first)) // 2), side - length)
    return first, first + length

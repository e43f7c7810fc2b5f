"""Aspect-ratio buckets and crops: the size of each image and the part of it to keep. Pure functions."""

import math
from typing import Literal

import numpy as np
from jaxtyping import Float
from PIL import Image

from wuerstchen.data.plan import generator
from wuerstchen.data.sources import Size
from wuerstchen.errors import UserError
from wuerstchen.images import crop_box

STEP = 128
"""Sides are multiples of this: three positions of the latents at the published view scale of 0.75."""
Crop = Literal["centre", "random", "saliency"]

_SALIENCY_SIDE = 256  # longer side of the small copy on which saliency is computed


def bucket_sizes(size: int, max_ratio: float) -> list[Size]:
    """The sizes of the buckets, from tall to wide, each with about ``size`` × ``size`` pixels.

    Shorter sides come in steps of 128. The longer side is the one that comes closest to that number of
    pixels, if it is at most ``max_ratio`` times the shorter side. Each size appears in portrait and
    landscape. With a ``max_ratio`` of 1 only the square is left. Raises ``UserError`` for a size that is not
    a multiple of 128, and for a ratio below 1.
    """
    if size < STEP or size % STEP:
        near = max(STEP, round(size / STEP) * STEP)
        raise UserError(f"size must be a multiple of {STEP}, got {size}. Use {near}.")
    if not 1 <= max_ratio <= 16:
        raise UserError(
            f"max_ratio must be between 1 and 16, got {max_ratio}. It is the longer side divided by the"
            " shorter side. 2 is common, and 1 makes all images square."
        )
    found: set[Size] = set()
    for short in range(STEP, size + 1, STEP):
        long = max(STEP, round(size * size / short / STEP) * STEP)
        if short <= long <= max_ratio * short:
            found |= {(short, long), (long, short)}
    return sorted(found, key=lambda bucket: bucket[0] / bucket[1])


def bucket_of(size: Size, buckets: list[Size]) -> int:
    """The index of the bucket with the aspect ratio closest to that of ``size``.

    Distances are between logarithms of ratios, so that portrait and landscape images are treated the same.
    The first bucket wins a tie.
    """
    ratio = math.log(size[0] / size[1])
    return min(range(len(buckets)), key=lambda i: abs(math.log(buckets[i][0] / buckets[i][1]) - ratio))


def crop_boxes(
    image: Image.Image, bucket: Size, mode: Crop, crops: int, seed: int, item: int
) -> list[tuple[float, float, float, float]]:
    """The windows of the image to scale to ``bucket``: left, top, right and bottom in pixels of the image.

    Each window is as large as possible, so only its place along one direction is left to choose: the centre,
    a random place, or a salient one (``saliency_places``). Crop number i depends only on the image, ``seed``,
    ``item`` and i, so adding crops does not change the first ones.
    """
    if mode == "centre":
        places = [0.5] * crops
    elif mode == "random":
        places = [float(generator(seed, item, f"crop {crop}").random()) for crop in range(crops)]
    else:
        places = saliency_places(image, bucket, crops, seed, item)
    return [crop_box(image.size, *bucket, place, place) for place in places]


def saliency_places(image: Image.Image, bucket: Size, crops: int, seed: int, item: int) -> list[float]:
    """Places of windows that contain many edges, from 0 (left or top) to 1.

    The saliency of a window is its gradient energy: the sum of squared differences between neighbouring
    pixels of the luminance, on a copy of at most 256 pixels per side. The first crop is the most salient
    window, and in a tie the one closest to the centre. Further crops are drawn with probabilities
    proportional to a window's saliency minus that of the least salient window.
    """
    scale = min(1, _SALIENCY_SIDE / max(image.size))
    small = image.convert("L").resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BOX
    )
    box = crop_box(small.size, *bucket, 0.0, 0.0)
    energy = _gradient_energy(np.asarray(small, dtype=np.float64))
    # The window can move along one direction, unless the image has exactly the bucket's aspect ratio.
    along = box[2] - box[0] < small.width - 0.5
    line = energy.sum(axis=0 if along else 1)
    window = max(1, round(box[2] - box[0] if along else box[3] - box[1]))
    room = len(line) - window
    if room < 1:
        return [0.5] * crops
    total = np.concatenate([[0.0], np.cumsum(line)])
    saliency = np.round(total[window:] - total[:-window], 6)  # rounding must not break ties
    best = np.flatnonzero(saliency == saliency.max())
    starts = [int(best[np.argmin(np.abs(best - room / 2))])]
    over = saliency - saliency.min()
    probabilities = over / over.sum() if over.any() else None
    starts += [
        int(generator(seed, item, f"crop {crop}").choice(room + 1, p=probabilities))
        for crop in range(1, crops)
    ]
    return [start / room for start in starts]


def _gradient_energy(grey: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    energy = np.zeros_like(grey)
    energy[:, 1:] += np.square(np.diff(grey, axis=1))
    energy[1:, :] += np.square(np.diff(grey, axis=0))
    return energy

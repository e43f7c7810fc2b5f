"""Aspect buckets and crops: which size a picture gets, and which part of it is shown. Pure functions."""

import math
from typing import Literal

import numpy as np
from jaxtyping import Float
from PIL import Image

from wuerstchen.data.plan import generator
from wuerstchen.errors import UserError
from wuerstchen.images import crop_box

STEP = 128
"""Sides are multiples of this: three positions of the map, with the published view of 0.75."""
Size = tuple[int, int]
"""Width and height."""
Crop = Literal["centre", "random", "saliency"]

_SALIENCY_SIDE = 256  # the longer side of the small copy that saliency is looked for in


def bucket_sizes(size: int, max_ratio: float) -> list[Size]:
    """The sizes that pictures may get, from tall to wide: about ``size`` × ``size`` pixels each.

    For every shorter side in steps of 128 the longer side comes nearest to that number of pixels, as long as
    it is at most ``max_ratio`` times the shorter; every size is there upright and lying. With ``max_ratio`` 1
    only the square is left. Raises ``UserError`` for a size that is no multiple of 128, and a ratio under 1.
    """
    if size < STEP or size % STEP:
        near = max(STEP, round(size / STEP) * STEP)
        raise UserError(f"size {size} is wrong because it must be a multiple of {STEP}; use {near}")
    if not 1 <= max_ratio <= 16:
        raise UserError(
            f"max_ratio {max_ratio} is wrong because it is the longer side over the shorter, from 1 to 16;"
            " 2 is common, 1 makes all pictures square"
        )
    found: set[Size] = set()
    for short in range(STEP, size + 1, STEP):
        long = max(STEP, round(size * size / short / STEP) * STEP)
        if short <= long <= max_ratio * short:
            found |= {(short, long), (long, short)}
    return sorted(found, key=lambda bucket: bucket[0] / bucket[1])


def bucket_of(size: Size, buckets: list[Size]) -> int:
    """The place in ``buckets`` of the one whose aspect is nearest to that of ``size``.

    Nearest in the logarithm of the ratio, so that upright and lying pictures are treated alike. Of two that
    are as near the first is taken.
    """
    ratio = math.log(size[0] / size[1])
    return min(range(len(buckets)), key=lambda i: abs(math.log(buckets[i][0] / buckets[i][1]) - ratio))


def crop_boxes(
    image: Image.Image, bucket: Size, mode: Crop, crops: int, seed: int, item: int
) -> list[tuple[float, float, float, float]]:
    """The windows of the picture to scale to ``bucket``: left, top, right, bottom in its pixels.

    Each is as large as fits, so what is left to choose is its place along one direction: the middle,
    anywhere, or where there is most to see (``saliency_places``). Crop number i is a function of the picture,
    ``seed``, ``item`` and i alone: more crops leave the first ones as they are.
    """
    if mode == "centre":
        places = [0.5] * crops
    elif mode == "random":
        places = [float(generator(seed, item, f"crop {crop}").random()) for crop in range(crops)]
    else:
        places = saliency_places(image, bucket, crops, seed, item)
    return [crop_box(image.size, *bucket, place, place) for place in places]


def saliency_places(image: Image.Image, bucket: Size, crops: int, seed: int, item: int) -> list[float]:
    """Places of windows, 0 (left or top) to 1, where the picture has most edges.

    A window's saliency is the sum of the squared differences between neighbouring pixels (gradient energy) of
    the luminance in it, on a copy of at most 256 pixels a side. The first crop is the most salient window,
    nearest to the middle where several are; each further one is drawn with probabilities in proportion to
    what a window has over the least salient one.
    """
    scale = min(1, _SALIENCY_SIDE / max(image.size))
    small = image.convert("L").resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BOX
    )
    box = crop_box(small.size, *bucket, 0.0, 0.0)
    energy = _gradient_energy(np.asarray(small, dtype=np.float64))
    # Where the window can move; a picture of just the bucket's aspect leaves it no room.
    along = box[2] - box[0] < small.width - 0.5
    line = energy.sum(axis=0 if along else 1)
    window = max(1, round(box[2] - box[0] if along else box[3] - box[1]))
    room = len(line) - window
    if room < 1:
        return [0.5] * crops
    total = np.concatenate([[0.0], np.cumsum(line)])
    saliency = np.round(total[window:] - total[:-window], 6)  # equal windows stay equal in spite of rounding
    best = np.flatnonzero(saliency == saliency.max())
    starts = [int(best[np.argmin(np.abs(best - room / 2))])]
    over = saliency - saliency.min()
    chances = over / over.sum() if over.any() else None
    starts += [
        int(generator(seed, item, f"crop {crop}").choice(room + 1, p=chances)) for crop in range(1, crops)
    ]
    return [start / room for start in starts]


def _gradient_energy(grey: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    energy = np.zeros_like(grey)
    energy[:, 1:] += np.square(np.diff(grey, axis=1))
    energy[1:, :] += np.square(np.diff(grey, axis=0))
    return energy

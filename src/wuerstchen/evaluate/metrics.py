"""Metrics: pure functions of pixels, features and ranks."""

import io
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from wuerstchen.data.colours import COLOURS, NAMES, classify, to_lab

MAX_PSNR = 100.0
"""PSNR of equal images, in dB. The smallest difference of 8-bit images of 256 × 256 pixels gives 101."""

BORDER = 4
"""Width in pixels of the border that the background colour is measured on."""

OBJECT_DISTANCE = 20.0
"""Distance in L*a*b*. Pixels closer to the background colour belong to the background."""

MIN_OBJECT = 0.005
"""Smallest object, as a fraction of the image."""

_LAB = to_lab(np.array(list(COLOURS.values()), dtype=np.uint8))


@dataclass(frozen=True, kw_only=True)
class Score:
    """A value with its standard error."""

    value: float
    error: float
    """Standard error over the choice of entries."""
    n: int
    """Number of images."""


def mean(values: Float[np.ndarray, " n"] | list[float] | list[bool]) -> Score:
    """The mean of one value per image. The error is the standard deviation over √n. Needs one value."""
    array = np.asarray(values, dtype=np.float64)
    assert len(array)
    deviation = float(array.std(ddof=1)) if len(array) > 1 else 0.0
    return Score(value=float(array.mean()), error=deviation / len(array) ** 0.5, n=len(array))


def recall(ranks: Int[np.ndarray, " n"] | list[int], k: int) -> Score:
    """The fraction of images whose own caption is among the first ``k``. Rank 0 is the best."""
    return mean([rank < k for rank in ranks])


def kid(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "n d"]) -> Score:
    """Kernel Inception distance between features. Row i of ``x`` and row i of ``y`` belong to the same entry.

    This is MMD² with the kernel (x·y / d + 1)³ of Bińkowski et al. (arXiv 1801.01401, section 4), estimated
    without bias over pairs i ≠ j in all terms (Gretton et al. 2012, JMLR 13, equation 4). It stays unbiased
    if x_i depends on y_i, as an image and its reconstruction do, and what they have in common cancels instead
    of adding noise. All images are used at once. Subsets are only needed for sets too large for one kernel
    matrix. The error is the jackknife's over entries. Values near 0 can be negative. Needs 3 rows. Usually
    multiplied by 1000.
    """
    n, d = x.shape
    assert n >= 3
    x, y = x.astype(np.float64), y.astype(np.float64)

    def kernel(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        return (u @ v.T / d + 1) ** 3

    crossed = kernel(x, y)
    h = kernel(x, x) + kernel(y, y) - crossed - crossed.T
    np.fill_diagonal(h, 0)
    total, of_row = h.sum(), h.sum(axis=1)
    without = (total - 2 * of_row) / ((n - 1) * (n - 2))
    error = np.sqrt((n - 1) / n * np.square(without - without.mean()).sum())
    return Score(value=float(total / (n * (n - 1))), error=float(error), n=n)


def psnr(a: UInt8[np.ndarray, "b h w 3"], b: UInt8[np.ndarray, "b h w 3"]) -> Float[np.ndarray, " b"]:
    """Peak signal-to-noise ratio of each pair of images in dB, over all pixels and channels. At most 100."""
    error = np.square(a.astype(np.float64) - b).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return np.minimum(10 * np.log10(255**2 / error), MAX_PSNR)


def ssim(a: UInt8[np.ndarray, "b h w 3"], b: UInt8[np.ndarray, "b h w 3"]) -> Float[np.ndarray, " b"]:
    """Structural similarity of each pair of images, at most 1 (Wang et al. 2004, equation 13).

    Gaussian window of 11 × 11 with σ = 1.5, K = (0.01, 0.03), over the windows that lie entirely within the
    image. R, G and B are compared separately and averaged, because grey would hide a wrong colour of the same
    lightness. Sides are at least 11 pixels.
    """
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    u, v = (torch.from_numpy(p).permute(0, 3, 1, 2).flatten(0, 1)[:, None].double() for p in (a, b))
    moments = _blurred(torch.cat([u, v, u * u, v * v, u * v]))
    mu, nu, uu, vv, uv = moments.chunk(5)
    covariance = uv - mu * nu
    variances = uu - mu * mu + vv - nu * nu
    similarity = (2 * mu * nu + c1) * (2 * covariance + c2) / ((mu * mu + nu * nu + c1) * (variances + c2))
    return similarity.unflatten(0, (len(a), 3)).mean(dim=(1, 2, 3, 4)).numpy()


def _blurred(x: Float[Tensor, "n 1 h w"]) -> Float[Tensor, "n 1 h2 w2"]:
    offsets = torch.arange(-5, 6, dtype=x.dtype, device=x.device)
    window = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = window / window.sum()

    def band(n: int) -> Tensor:
        return torch.stack([F.pad(window, (i, n - 11 - i)) for i in range(n - 10)])

    # Two products with banded matrices are four times as fast on a CPU as a convolution in fp64.
    return band(x.shape[2]) @ x @ band(x.shape[3]).T


def jpeg(image: UInt8[np.ndarray, "h w 3"], quality: int) -> UInt8[np.ndarray, "h w 3"]:
    """The image after JPEG compression by libjpeg at this quality, with 4:2:0 chroma subsampling."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    with Image.open(buffer) as stored:
        return np.array(stored.convert("RGB"))


def background_pixel(image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "3"]:
    """The per-channel median of the 4-pixel-wide border."""
    inner = np.zeros(image.shape[:2], dtype=bool)
    inner[BORDER:-BORDER, BORDER:-BORDER] = True
    return np.median(image[~inner], axis=0).astype(np.uint8)


def background_colour(image: UInt8[np.ndarray, "h w 3"]) -> str:
    """The named colour that is closest to the background, in L*a*b*."""
    distance = np.linalg.norm(to_lab(background_pixel(image)[None]) - _LAB, axis=1)
    return NAMES[int(distance.argmin())]


def object_colour(image: UInt8[np.ndarray, "h w 3"]) -> str | None:
    """The most frequent named colour among the pixels outside the background (``colours.classify``).

    The background is everything within 20 in L*a*b* of the median border pixel. Using the image's own
    background keeps a wrong background from being counted as the object. None if less than 0.5 % of the image
    is left.
    """
    pixels = image.reshape(-1, 3)
    distance = np.linalg.norm(to_lab(pixels) - to_lab(background_pixel(image)[None]), axis=1)
    shown = pixels[distance > OBJECT_DISTANCE]
    if len(shown) < MIN_OBJECT * len(pixels):
        return None
    return NAMES[int(np.bincount(classify(shown), minlength=len(NAMES)).argmax())]

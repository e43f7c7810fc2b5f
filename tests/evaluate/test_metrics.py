"""Each metric against the formula written out once more, slowly and in fp64."""

import math

import numpy as np
import pytest

from wuerstchen.data.colours import COLOURS
from wuerstchen.evaluate.metrics import (
    background_colour,
    jpeg,
    kid,
    mean,
    object_colour,
    psnr,
    recall,
    ssim,
)


def random_images(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# --- KID ---


def kernel(u: np.ndarray, v: np.ndarray) -> float:
    return (float(np.dot(u, v)) / len(u) + 1) ** 3


def kid_by_loops(x: np.ndarray, y: np.ndarray) -> float:
    n, total = len(x), 0.0
    for i in range(n):
        for j in range(n):
            if i != j:
                total += kernel(x[i], x[j]) + kernel(y[i], y[j]) - kernel(x[i], y[j]) - kernel(x[j], y[i])
    return total / (n * (n - 1))


def test_kid_is_the_sum_over_pairs():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 5)), rng.normal(0.3, 1.2, size=(7, 5))
    score = kid(x.astype(np.float32), y.astype(np.float32))
    assert score.value == pytest.approx(kid_by_loops(x, y), rel=1e-5)
    without = [kid_by_loops(np.delete(x, i, axis=0), np.delete(y, i, axis=0)) for i in range(7)]
    assert score.error == pytest.approx(
        math.sqrt(6 / 7 * np.square(without - np.mean(without)).sum()), rel=1e-4
    )
    assert score.n == 7


def test_kid_of_equals_is_zero_and_of_halves_about_zero():
    x = np.random.default_rng(1).normal(size=(400, 8))
    assert kid(x, x).value == 0
    halves = kid(x[::2], x[1::2])
    assert abs(halves.value) < 3 * halves.error
    assert kid(x, x + 0.5).value > 10 * kid(x, x + 0.5).error


def test_kid_of_pairs_is_not_biased():
    """An image resembles its own reconstruction: the diagonal of the cross term would pull KID down."""
    rng = np.random.default_rng(2)
    paired, apart = [], []
    for _ in range(300):
        x, other, noise = rng.normal(size=(3, 12, 4))
        paired.append(kid(x, 1.2 * x + 0.1 * noise).value)
        apart.append(kid(x, 1.2 * other + 0.1 * noise).value)
    spread = math.hypot(np.std(paired), np.std(apart)) / math.sqrt(300)
    assert abs(np.mean(paired) - np.mean(apart)) < 3 * spread
    assert np.std(paired) < np.std(apart)


# --- Likeness to an original ---


def test_psnr_is_the_formula():
    a, b = random_images(0, 2, 12, 13, 3), random_images(1, 2, 12, 13, 3)
    for i, value in enumerate(psnr(a, b)):
        squares = [(int(p) - int(q)) ** 2 for p, q in zip(a[i].ravel(), b[i].ravel(), strict=True)]
        assert value == pytest.approx(10 * math.log10(255**2 / (sum(squares) / len(squares))))
    assert psnr(a, a).tolist() == [100, 100]
    assert psnr(np.zeros_like(a), np.full_like(a, 255)).tolist() == [0, 0]


def ssim_by_loops(a: np.ndarray, b: np.ndarray) -> float:
    window = np.array([[math.exp(-(i * i + j * j) / 4.5) for j in range(-5, 6)] for i in range(-5, 6)])
    window /= window.sum()
    found = []
    for channel in range(3):
        x, y = a[..., channel].astype(float), b[..., channel].astype(float)
        for top in range(a.shape[0] - 10):
            for left in range(a.shape[1] - 10):
                u, v = (p[top : top + 11, left : left + 11] for p in (x, y))
                mu, nu = (window * u).sum(), (window * v).sum()
                su, sv = (window * (u - mu) ** 2).sum(), (window * (v - nu) ** 2).sum()
                suv = (window * (u - mu) * (v - nu)).sum()
                c1, c2 = 2.55**2, 7.65**2
                found.append((2 * mu * nu + c1) * (2 * suv + c2) / ((mu**2 + nu**2 + c1) * (su + sv + c2)))
    return float(np.mean(found))


def test_ssim_is_the_formula():
    a, noise = random_images(3, 2, 17, 14, 3), random_images(4, 2, 17, 14, 3)
    b = (0.7 * a + 0.3 * noise).astype(np.uint8)
    values = ssim(a, b)
    for i in range(2):
        assert values[i] == pytest.approx(ssim_by_loops(a[i], b[i]), abs=1e-10)
    assert ssim(a, a) == pytest.approx([1, 1])


def test_ssim_sees_a_wrong_colour_of_the_same_lightness():
    red, green = np.zeros((1, 16, 16, 3), np.uint8), np.zeros((1, 16, 16, 3), np.uint8)
    red[..., 0], green[..., 1] = 200, 102  # the same luma
    assert ssim(red, green)[0] < 0.5


def test_jpeg_is_lossy_and_lossier_with_less_quality():
    y, x = np.mgrid[:64, :64]
    image = np.stack([4 * x, 4 * y, 2 * (x + y)], axis=2).astype(np.uint8)
    errors = [psnr(jpeg(image, quality)[None], image[None])[0] for quality in (20, 90)]
    assert 20 < errors[0] < errors[1] < 60


# --- Shares ---


def test_recall_counts_the_first_k():
    ranks = [0, 0, 1, 4, 5, 600]
    assert recall(ranks, 1).value == pytest.approx(2 / 6)
    assert recall(ranks, 5).value == pytest.approx(4 / 6)
    p = 2 / 6
    assert recall(ranks, 1).error == pytest.approx(math.sqrt(p * (1 - p) / 5))


def test_a_single_value_has_a_mean():
    assert (mean([0.5]).value, mean([0.5]).error, mean([0.5]).n) == (0.5, 0, 1)


# --- Colours ---


def scene(background: str, subject: str | None, side: int = 20) -> np.ndarray:
    """A noisy square in the middle of a noisy background."""
    image = np.empty((64, 64, 3))
    image[:] = COLOURS[background]
    if subject is not None:
        middle = slice(32 - side // 2, 32 + side // 2)
        image[middle, middle] = COLOURS[subject]
    noise = np.random.default_rng(0).normal(0, 2, image.shape)
    return (image + noise).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("background", COLOURS)
def test_background_and_object_are_told_apart(background):
    subject = "green" if background != "green" else "purple"
    image = scene(background, subject)
    assert background_colour(image) == background
    assert object_colour(image) == subject


def test_an_object_over_the_border_is_not_the_background():
    image = scene("yellow", "blue")
    image[:20, :, :] = COLOURS["blue"]  # over 40 % of the border
    assert background_colour(image) == "yellow"


def test_a_wrong_background_is_not_taken_for_the_object():
    # Asked was a red object on white; the background came out blue, and is the larger part.
    assert object_colour(scene("blue", "red")) == "red"


def test_an_empty_image_has_no_object():
    assert object_colour(scene("white", None)) is None
    assert object_colour(scene("white", "red", side=4)) is None  # 16 of 4096 pixels
    assert object_colour(scene("white", "red", side=6)) == "red"


def test_the_larger_colour_counts():
    image = scene("white", "red", side=20)
    image[26:38, 26:38] = COLOURS["blue"]  # 144 of the 400 pixels
    assert object_colour(image) == "red"
    image[24:40, 24:40] = COLOURS["blue"]  # 256 of them
    assert object_colour(image) == "blue"

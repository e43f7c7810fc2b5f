"""Aspect-ratio buckets and crops."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from wuerstchen.data.buckets import bucket_of, bucket_sizes, crop_boxes
from wuerstchen.errors import UserError


@pytest.mark.parametrize("size", [128, 256, 512, 768, 1024, 2048])
@pytest.mark.parametrize("max_ratio", [1.0, 1.5, 2.0, 4.0])
def test_buckets_hold_about_as_many_pixels_as_the_square(size, max_ratio):
    buckets = bucket_sizes(size, max_ratio)
    assert (size, size) in buckets
    for width, height in buckets:
        assert width % 128 == height % 128 == 0
        assert max(width, height) <= max_ratio * min(width, height)
        assert (height, width) in buckets
        # The longer side is rounded by at most half a step.
        assert abs(width * height - size * size) <= 64 * min(width, height)
    assert buckets == sorted(set(buckets), key=lambda b: b[0] / b[1])


def test_buckets_of_1024_pixels():
    assert bucket_sizes(1024, 2.0) == [(768, 1408), (896, 1152), (1024, 1024), (1152, 896), (1408, 768)]
    assert bucket_sizes(1024, 1.0) == [(1024, 1024)]


@pytest.mark.parametrize("size", [0, -128, 100, 1000])
def test_a_size_off_the_grid_is_refused(size):
    with pytest.raises(UserError, match=r"must be a multiple of 128, got -?\d+\. Use"):
        bucket_sizes(size, 2.0)


@pytest.mark.parametrize("ratio", [0.5, 0.0, -1.0, math.nan, math.inf])
def test_a_ratio_under_one_is_refused(ratio):
    with pytest.raises(UserError, match=r"max_ratio must be between 1 and 16"):
        bucket_sizes(512, ratio)


@given(st.integers(1, 100_000), st.integers(1, 100_000))
def test_the_nearest_aspect_is_taken_and_upright_is_as_lying(width, height):
    buckets = bucket_sizes(1024, 4.0)
    found = buckets[bucket_of((width, height), buckets)]
    distances = {b: abs(math.log(b[0] / b[1] * height / width)) for b in buckets}
    assert distances[found] == pytest.approx(min(distances.values()), abs=1e-12)
    turned = buckets[bucket_of((height, width), buckets)]
    assert distances[(turned[1], turned[0])] == pytest.approx(distances[found], abs=1e-9)


def with_detail_at(left: int, width: int = 300, height: int = 100) -> Image.Image:
    pixels = np.full((height, width, 3), 128, np.uint8)
    pixels[:, left : left + 60] = np.random.default_rng(0).integers(0, 256, (height, 60, 3))
    return Image.fromarray(pixels)


def test_a_crop_has_the_buckets_aspect_and_is_as_large_as_fits():
    for mode in ("centre", "random", "saliency"):
        for size in ((300, 100), (100, 300), (128, 128), (7, 5)):
            (box,) = crop_boxes(Image.new("RGB", size), (640, 384), mode, 1, 0, 0)
            left, top, right, bottom = box
            assert 0 <= left < right <= size[0]
            assert 0 <= top < bottom <= size[1]
            assert (right - left) / (bottom - top) == pytest.approx(640 / 384)
            assert right - left == pytest.approx(size[0]) or bottom - top == pytest.approx(size[1])


def test_centre():
    assert crop_boxes(Image.new("RGB", (300, 100)), (128, 128), "centre", 1, 0, 0) == [(100, 0, 200, 100)]


@pytest.mark.parametrize("mode", ["random", "saliency"])
def test_crops_are_functions_of_seed_item_and_their_number(mode):
    image = with_detail_at(40)

    def boxes(crops=4, seed=0, item=0):
        return crop_boxes(image, (128, 128), mode, crops, seed, item)

    assert boxes() == boxes()
    assert boxes(crops=9)[:4] == boxes()
    assert len(set(boxes(crops=9))) > 5
    assert boxes(seed=1)[1:] != boxes()[1:]
    assert boxes(item=1)[1:] != boxes()[1:]


@pytest.mark.parametrize("left", [0, 90, 240])
def test_saliency_finds_the_detail(left):
    for turned in (False, True):
        image = with_detail_at(left)
        image = image.transpose(Image.Transpose.ROTATE_90) if turned else image
        boxes = crop_boxes(image, (128, 128), "saliency", 30, 0, 0)
        begin = [300 - box[3] if turned else box[0] for box in boxes]
        assert begin[0] <= left + 2
        assert begin[0] + 100 >= left + 58
        # The other crops contain it more often than random crops would.
        assert np.mean([max(0, min(b + 100, left + 60) - max(b, left)) for b in begin]) > 25


def test_edges_count_in_both_directions():
    """Horizontal stripes have no differences along a row."""
    pixels = np.full((100, 300), 128, dtype=np.uint8)
    pixels[::2, 220:280] = 0
    pixels[:, 10:30:2] = 0  # fewer edges, all of them along rows
    for stripes, top in ((pixels, 0), (pixels.T, 1)):
        (box,) = crop_boxes(Image.fromarray(np.ascontiguousarray(stripes)), (128, 128), "saliency", 1, 0, 0)
        assert 175 <= box[top] <= 222


def test_an_image_without_detail_is_cropped_in_the_centre():
    (box,) = crop_boxes(Image.new("RGB", (301, 100), "red"), (128, 128), "saliency", 1, 0, 0)
    assert box[0] == pytest.approx(100.5, abs=1.5)
    boxes = crop_boxes(Image.new("RGB", (301, 100), "red"), (128, 128), "saliency", 9, 0, 0)
    assert len(set(boxes)) > 4

"""Masks: how they are read, what is extended, and which pixels the result may touch."""

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageDraw

from wuerstchen.edit_options import checked_extend
from wuerstchen.errors import DataError, UserError
from wuerstchen.images import crop_box
from wuerstchen.masks import (
    extended,
    extended_mask,
    mask_of,
    opacity_of,
    open_mask,
    region_of,
    scaled_mask,
    strengths_of,
)


def rectangle(size, box, value=255) -> Image.Image:
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=value)
    return mask


def test_white_repaints_and_so_does_transparency(tmp_path):
    """Bug: the white strokes of a mask saved with an opaque alpha channel count as opaque, and nothing is
    repainted."""
    grey = rectangle((6, 4), (1, 1, 3, 3), 200)
    cut = Image.new("RGBA", (6, 4), (9, 9, 9, 255))
    cut.putpixel((2, 1), (255, 255, 255, 0))
    opaque = Image.merge("RGBA", [grey, grey, grey, Image.new("L", grey.size, 255)])
    for image, expected in (
        (grey, np.asarray(grey)),
        (opaque, np.asarray(grey)),
        (cut, 255 - np.asarray(cut)[..., 3]),
        (grey.point(lambda v: v > 99, "1"), np.where(np.asarray(grey) > 99, 255, 0)),
    ):
        image.save(tmp_path / "mask.png")
        for mask in (mask_of(image), open_mask(tmp_path / "mask.png")):
            assert mask.mode == "L"
            assert np.array_equal(np.asarray(mask), expected)


def test_masks_are_turned_once(tmp_path):
    """Bug: a transparent mask of a turned photograph was turned twice."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    grey = rectangle((6, 4), (0, 0, 1, 1))
    cut = Image.new("RGBA", grey.size, "red")
    cut.putalpha(grey.point(lambda value: 255 - value))
    for given in (grey, cut, cut.convert("LA"), cut.quantize()):
        given.save(tmp_path / "mask.png", exif=exif)
        mask = mask_of(open_mask(tmp_path / "mask.png"))
        assert (mask.size, mask.getpixel((3, 0)), mask.getbbox()) == ((4, 6), 255, (3, 0, 4, 1))
        with Image.open(tmp_path / "mask.png") as image:
            assert np.array_equal(np.asarray(mask_of(mask_of(image))), np.asarray(mask))


@pytest.mark.parametrize("size", [(64, 64), (100, 50), (37, 90), (700, 500)])
def test_scaled_masks_keep_thin_lines(size):
    """Bug: an average weakened a white line of 1 pixel, or erased it."""
    for box in ((150, 0, 151, 200), (0, 100, 300, 101), (149, 99, 150, 100)):
        given = rectangle((300, 200), box)
        mask = scaled_mask(given, size)
        assert (mask.mode, mask.size, mask.getextrema()) == ("L", size, (0, 255))
        left, top, right, bottom = crop_box(given.size, *size)
        across, down = size[0] / (right - left), size[1] / (bottom - top)
        expected = (
            max(0, (box[0] - left) * across),
            max(0, (box[1] - top) * down),
            min(size[0], (box[2] - left) * across),
            min(size[1], (box[3] - top) * down),
        )
        found = mask.getbbox()
        assert all(-1 < wanted - value < 1 for wanted, value in zip(expected, found, strict=True))
    assert scaled_mask(given, given.size) is given


def test_bad_masks_are_named(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match=r"^mask '.*text\.png' cannot be used"):
        open_mask(tmp_path / "text.png")
    with pytest.raises(DataError, match=r"^mask '.*none\.png' cannot be used"):
        open_mask(tmp_path / "none.png")
    with pytest.raises(UserError, match="mask must be a PIL image, got"):
        mask_of("mask.png")
    with pytest.raises(UserError, match="mask is empty: all of its 5x4 pixels are black"):
        strengths_of(Image.new("L", (5, 4), 12))
    with pytest.raises(UserError, match="mask is full: all of its 5x4 pixels are white"):
        strengths_of(Image.new("L", (5, 4), 243))


def test_values_next_to_black_and_white_are_black_and_white():
    """JPEG changes them a little, and a black that is not quite black would be repainted."""
    mask = Image.fromarray(np.array([[0, 12, 13, 128, 242, 243, 255]], np.uint8))
    assert strengths_of(mask)[0].tolist() == pytest.approx([0, 0, 13 / 255, 128 / 255, 242 / 255, 1, 1])
    assert strengths_of(mask)[0, [0, 1, 5, 6]].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("feather", [0, 1, 2, 5, 8])
def test_the_opacity_is_1_in_the_mask_and_0_outside_its_feather(feather):
    strengths = strengths_of(rectangle((40, 30), (12, 10, 20, 18), 100))
    opacity = opacity_of(strengths, feather)
    rows, columns = np.indices(opacity.shape)
    distance = np.maximum.reduce([12 - columns, columns - 19, 10 - rows, rows - 17])
    assert (opacity[distance <= 0] == 1).all()
    assert (opacity[distance > feather] == 0).all()
    middle = opacity[14, 19:]
    assert (np.diff(middle) <= 0).all()
    if feather > 1:
        assert 0 < middle[1 + feather // 2] < 1


def test_the_feather_does_not_fade_at_the_edges_of_the_image():
    opacity = opacity_of(strengths_of(rectangle((20, 20), (0, 0, 20, 10))), 6)
    assert (opacity[:10] == 1).all()
    assert (opacity[16:] == 0).all()


def test_extensions_are_read():
    assert (
        checked_extend("left=256, bottom=8") == checked_extend({"left": 256, "bottom": 8}) == (256, 0, 0, 8)
    )
    for wrong, words in (
        ("left", "cannot be read: 'left'"),
        ("left=1,left=2", "cannot be read"),
        ("left=-1", "cannot be read"),
        ("middle=3", "unknown side: 'middle'"),
        ({"left": 0}, "adds no pixels"),
        ({"left": 1.5}, r"got left=1\.5"),
        ({"left": -1}, "got left=-1"),
        (256, "must name sides of the image, got 256"),
    ):
        with pytest.raises(UserError, match=words):
            checked_extend(wrong)


def test_an_extended_image_contains_the_image():
    image = Image.effect_noise((7, 5), 60).convert("RGB")
    whole = extended(image, (3, 0, 2, 4))
    assert whole.size == (12, 9)
    assert whole.crop((3, 0, 10, 5)).tobytes() == image.tobytes()
    mask = np.asarray(extended_mask(Image.new("L", (7, 5), 0), (3, 0, 2, 4)))
    assert (mask[:5, 3:10] == 0).all()
    assert (mask == 255).sum() == 12 * 9 - 35


def test_the_region_of_a_mask_has_the_wanted_ratio_where_there_is_room():
    opacity = opacity_of(strengths_of(rectangle((100, 80), (40, 30, 60, 34))), 0)
    assert region_of(opacity, 0, 1.0) == (40, 22, 60, 42)
    assert region_of(opacity, 5, 1.0) == (35, 17, 65, 47)
    left, top, right, bottom = region_of(opacity, 0, 0.1)  # 200 rows are not there
    assert (left, right, top, bottom) == (40, 60, 0, 80)
    corner = opacity_of(strengths_of(rectangle((100, 80), (0, 0, 10, 4))), 0)
    assert region_of(corner, 3, 1.0) == (0, 0, 13, 13)

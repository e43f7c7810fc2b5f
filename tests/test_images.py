import io
import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps
from PIL.PngImagePlugin import PngInfo

from wuerstchen import images
from wuerstchen.errors import DataError, UserError, UserNotice
from wuerstchen.image_files import read_settings, save_animation, save_new_png, save_png
from wuerstchen.images import center_crop_resize, grid, open_image, resize_crop, to_images, to_rgb, to_tensor


def _photo(width: int = 48, height: int = 32) -> Image.Image:
    """A smooth image with different corners, so that rotations and flips are visible."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 / (width - 1), y * 255 / (height - 1), np.full_like(x, 90)], -1)
    return Image.fromarray(pixels.astype(np.uint8))


def _difference(left: Image.Image, right: Image.Image) -> int:
    assert left.size == right.size
    return int(np.abs(np.asarray(left).astype(int) - np.asarray(right).astype(int)).max())


def _png(width: int, height: int, bits: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG written by hand, for what Pillow cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tiff"])
def test_orientation_is_applied_once(tmp_path: Path, orientation: int, suffix: str) -> None:
    photo = _photo()
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo.save(
        tmp_path / f"a{suffix}", exif=exif, quality=95, **({"lossless": True} if suffix == ".webp" else {})
    )
    opened = open_image(tmp_path / f"a{suffix}")
    tagged = photo.copy()
    tagged.getexif()[0x0112] = orientation
    assert _difference(opened, ImageOps.exif_transpose(tagged)) <= 12  # JPEG's loss; a turn would give 200
    assert not opened.getexif()


def test_images_with_damaged_exif_are_read(tmp_path: Path) -> None:
    _photo().save(tmp_path / "a.jpg", exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff\x12\x01")
    assert open_image(tmp_path / "a.jpg").size == (48, 32)


@pytest.mark.parametrize("suffix", [".jpg", ".tiff"])
@pytest.mark.parametrize(
    ("ink", "colour"),
    [((0, 0, 0, 0), (255,) * 3), ((255, 0, 0, 0), (0, 255, 255)), ((0, 0, 0, 255), (0,) * 3)],
)
def test_cmyk_is_not_inverted(
    tmp_path: Path, suffix: str, ink: tuple[int, ...], colour: tuple[int, ...]
) -> None:
    Image.new("CMYK", (16, 16), ink).save(tmp_path / f"a{suffix}")
    content = (tmp_path / f"a{suffix}").read_bytes()
    assert (b"Adobe" in content) == (suffix == ".jpg")  # JPEG stores it inverted, and says so
    picture = open_image(tmp_path / f"a{suffix}")
    assert picture.mode == "RGB"
    assert np.abs(np.asarray(picture)[8, 8].astype(int) - colour).max() <= 3


def test_16_bit_grey_is_scaled(tmp_path: Path) -> None:
    values = np.array([[0, 128, 257, 30000, 65535]], np.uint16)
    expected = [0, 0, 1, 117, 255]
    (tmp_path / "a.png").write_bytes(_png(5, 1, 16, 0, b"\0" + values.astype(">u2").tobytes()))
    Image.fromarray(values).save(tmp_path / "a.tiff")
    (tmp_path / "a.pgm").write_bytes(b"P5 5 1 65535\n" + values.astype(">u2").tobytes())
    for name in ("a.png", "a.tiff", "a.pgm"):
        assert np.asarray(open_image(tmp_path / name))[0].tolist() == [[v] * 3 for v in expected], name


def test_16_bit_grey_with_a_transparent_value_is_white_there(tmp_path: Path) -> None:
    extra = struct.pack(">I", 2) + b"tRNS" + b"\x00\x80" + struct.pack(">I", zlib.crc32(b"tRNS\x00\x80"))
    rows = b"\0" + np.array([128, 0], ">u2").tobytes()
    (tmp_path / "a.png").write_bytes(_png(2, 1, 16, 0, rows, extra))
    assert np.asarray(open_image(tmp_path / "a.png"))[0].tolist() == [[255] * 3, [0] * 3]


def test_16_bit_colour_is_scaled(tmp_path: Path) -> None:
    values = np.array([[0, 30000, 65535], [65535, 257, 0]], np.uint16)
    (tmp_path / "a.png").write_bytes(_png(2, 1, 16, 2, b"\0" + values.astype(">u2").tobytes()))
    expected = np.rint(values / 257)
    assert np.abs(np.asarray(open_image(tmp_path / "a.png"))[0] - expected).max() <= 1


def test_16_bit_alpha_is_laid_on_white(tmp_path: Path) -> None:
    grey_alpha = np.array([[0, 0], [0, 65535], [65535, 65535]], ">u2")
    (tmp_path / "a.png").write_bytes(_png(3, 1, 16, 4, b"\0" + grey_alpha.tobytes()))
    assert np.asarray(open_image(tmp_path / "a.png"))[0, :, 0].tolist() == [255, 0, 255]


@pytest.mark.parametrize(
    ("low", "high", "accepted"), [(0, 1, True), (0, 255, False), (-1, 1, False), (0, np.nan, False)]
)
def test_floats_are_scaled_or_refused_and_never_clipped(
    tmp_path: Path, low: float, high: float, accepted: bool
) -> None:
    Image.fromarray(np.array([[low, 0.5, high]], np.float32)).save(tmp_path / "a.tiff")
    if accepted:
        assert np.asarray(open_image(tmp_path / "a.tiff"))[0, :, 0].tolist() == [0, 128, 255]
    else:
        with pytest.raises(DataError, match=r"^image '.*a\.tiff' has values from .*\. Save"):
            open_image(tmp_path / "a.tiff")


def test_transparency_becomes_white(tmp_path: Path) -> None:
    rgba = np.array([[[255, 0, 0, 0], [255, 0, 0, 255], [0, 0, 0, 128]]], np.uint8)
    expected = [[255, 255, 255], [255, 0, 0], [127, 127, 127]]
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    Image.fromarray(rgba).save(tmp_path / "rgba.webp", lossless=True, exact=True)
    for name in ("rgba.png", "rgba.webp"):
        assert np.abs(np.asarray(open_image(tmp_path / name))[0].astype(int) - expected).max() <= 1, name
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putdata([0, 1])
    palette.save(tmp_path / "p.png", transparency=0)
    palette.save(tmp_path / "p.gif", transparency=0)
    palette.save(tmp_path / "bytes.png", transparency=bytes([0, 255]))
    for name in ("p.png", "p.gif", "bytes.png"):
        assert np.asarray(open_image(tmp_path / name))[0].tolist() == [[255] * 3, [200, 100, 50]], name
    Image.fromarray(np.array([[7, 9]], np.uint8)).save(tmp_path / "l.png", transparency=7)
    assert np.asarray(open_image(tmp_path / "l.png"))[0].tolist() == [[255] * 3, [9] * 3]
    Image.fromarray(np.array([[[50, 0], [50, 255]]], np.uint8)).save(tmp_path / "la.png")
    assert np.asarray(open_image(tmp_path / "la.png"))[0].tolist() == [[255] * 3, [50] * 3]


@pytest.mark.parametrize("mode", ["1", "L", "P", "YCbCr"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    white = Image.new("RGB", (4, 4), "white").convert(mode)
    white.save(tmp_path / ("a.jpg" if mode == "YCbCr" else "a.png"))
    (path,) = tmp_path.iterdir()
    assert open_image(path).getpixel((2, 2)) == (255, 255, 255)


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_the_first_frame_of_an_animation(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:], duration=100)
    red, _, blue = open_image(tmp_path / f"a{suffix}").getpixel((4, 4))
    assert red > 240
    assert blue < 15


def test_metadata_of_the_source_is_dropped(tmp_path: Path) -> None:
    info = PngInfo()
    info.add_text("secret", "x")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    _photo().save(tmp_path / "a.png", pnginfo=info, icc_profile=profile)
    assert open_image(tmp_path / "a.png").info == {}


def _write(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda path: None, "it cannot be read (No such file or directory). Give the path of an image."),
        (lambda path: path.mkdir(), "it is a folder. Give the path of one image."),
        (lambda path: os.mkfifo(path), "it is not a regular file. Give the path of an image."),
        (lambda path: path.touch(), "it is empty. Download it again or remove it."),
        (_write(b"hello"), "it is not an image in a known format. Save it as PNG or JPEG."),
        (_write(b"<html>404</html>" * 99), "it is not an image in a known format. Save it as PNG or JPEG."),
        (
            _write(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"),
            "EPS files are programs, which are never run. Save it as PNG or JPEG.",
        ),
    ],
)
def test_refuses_what_is_not_an_image(tmp_path: Path, make: Callable[[Path], None], rule: str) -> None:
    make(tmp_path / "a.png")
    with pytest.raises(DataError) as caught:
        open_image(tmp_path / "a.png")
    assert str(caught.value) == f"image '{tmp_path / 'a.png'}' cannot be used: {rule}"


def test_refuses_an_invalid_path() -> None:
    with pytest.raises(
        DataError, match=r"^image 'a\\x00\.png' cannot be used: it cannot be read \(embedded null"
    ):
        open_image("a\0.png")


@pytest.mark.parametrize(
    "options",
    [
        {"format": "JPEG"},
        {"format": "JPEG", "progressive": True},
        {"format": "PNG"},
        {"format": "WEBP"},
        {"format": "GIF"},
        {"format": "BMP"},
        {"format": "TIFF"},
    ],
)
@pytest.mark.parametrize("part", [0.05, 0.5, 0.9])
def test_refuses_cut_off_files_in_one_line(tmp_path: Path, options: dict, part: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, **options)
    (tmp_path / "a").write_bytes(file.getvalue()[: int(len(file.getvalue()) * part)])
    with pytest.raises(DataError, match=r"^image '.*a' cannot be used: it is .*\. ") as caught:
        open_image(tmp_path / "a")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["webp", "gif"])
def test_equal_images_of_an_animation_are_said_to_be_joined(tmp_path: Path, suffix: str) -> None:
    """Bug: files with fewer images than were reported, without a word."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "red", "blue", "red")]
    path = tmp_path / f"morph.{suffix}"
    with pytest.warns(UserNotice, match=rf"1 of 4 images are equal to the one before\. morph\.{suffix}"):
        save_animation(frames, path, {}, seconds_per_frame=0.1)
    with Image.open(path) as image:
        assert image.n_frames == 3
        image.load()
        assert image.info["duration"] == 200


@pytest.mark.parametrize(
    ("fps", "milliseconds"), [(100, 20), (60, 20), (50, 20), (40, 30), (25, 40), (8, 130), (0.5, 2000)]
)
def test_times_of_a_gif_are_steps_that_browsers_play(tmp_path: Path, fps: float, milliseconds: int) -> None:
    """Bug: 100 images per second were stored as 10 ms, which browsers play as 100 ms."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    save_animation(frames, tmp_path / "morph.gif", {}, seconds_per_frame=1 / fps)
    with Image.open(tmp_path / "morph.gif") as image:
        assert image.info["duration"] == milliseconds


@pytest.mark.parametrize("side", [10_001, 12_000, 30_000])
def test_bombs_are_refused_before_they_are_decoded(tmp_path: Path, side: int, monkeypatch) -> None:
    """The data after the header is damaged: only a decoder would notice."""
    (tmp_path / "a.png").write_bytes(_png(side, side, 8, 2, b"")[:-20] + b"damaged")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(DataError) as caught:
        open_image(tmp_path / "a.png")
    message = (
        f"image '{tmp_path / 'a.png'}' cannot be used: it has over 100 megapixels. Resize it or remove it."
    )
    assert str(caught.value) == message


def test_large_images_below_the_limit_open_without_a_warning(tmp_path: Path) -> None:
    Image.new("1", (9_600, 10_000)).save(tmp_path / "a.png")  # over the size at which Pillow warns
    assert open_image(tmp_path / "a.png").size == (9_600, 10_000)


@pytest.mark.parametrize(("width", "height"), [(16, 16), (24, 8), (7, 30), (48, 32), (100, 90)])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_crops_keep_the_aspect(width: int, height: int, seed: int | None) -> None:
    """In an image whose colours are its coordinates, the slopes give the scale."""
    rng = None if seed is None else np.random.default_rng(seed)
    photo = _photo(120, 100)
    crop = resize_crop(photo, width, height, rng)
    assert crop.size == (width, height)
    pixels = np.asarray(crop).astype(float)
    per_column = (pixels[:, -2, 0] - pixels[:, 1, 0]).mean() / (width - 3) / 255 * 119
    per_row = (pixels[-2, :, 1] - pixels[1, :, 1]).mean() / (height - 3) / 255 * 99
    expected = min(120 / width, 100 / height)  # source pixels a pixel
    assert per_column == pytest.approx(expected, rel=0.07)
    assert per_row == pytest.approx(expected, rel=0.07)


def test_the_centre_crop_is_centred() -> None:
    pixels = np.asarray(center_crop_resize(_photo(128, 64), 32)).astype(float)
    assert abs(pixels[..., 0].mean() - 127.5) < 1
    assert abs(pixels[..., 1].mean() - 127.5) < 1
    assert pixels[..., 0].max() - pixels[..., 0].min() < 140  # half of the width


def test_random_crops_reach_both_ends_and_repeat() -> None:
    rng = np.random.default_rng(0)
    means = [np.asarray(resize_crop(_photo(128, 32), 16, 16, rng))[..., 0].mean() for _ in range(100)]
    assert min(means) < 45
    assert max(means) > 210
    again = np.asarray(resize_crop(_photo(128, 32), 16, 16, np.random.default_rng(0)))[..., 0].mean()
    assert again == means[0]


def test_an_image_of_the_right_size_is_not_changed() -> None:
    photo = _photo()
    assert _difference(resize_crop(photo, 48, 32, np.random.default_rng(0)), photo) == 0


def test_shrinking_is_antialiased() -> None:
    board = np.indices((64, 64)).sum(0) % 2 * 255
    small = np.asarray(center_crop_resize(Image.fromarray(board.astype(np.uint8)).convert("RGB"), 16))
    assert np.abs(small.astype(int) - 127).max() <= 8


def test_refuses_sizes_under_one() -> None:
    with pytest.raises(UserError, match=r"^both sides must be at least 1, got 0×8"):
        resize_crop(_photo(), 0, 8)


def test_tensors_and_back() -> None:
    photo = _photo()
    tensor = to_tensor(photo)
    assert tensor.shape == (3, 32, 48)
    assert tensor.dtype == torch.float32
    assert tensor[0, 0, -1] == 1
    assert tensor[1, -1, 0] == 1
    assert tensor[0, 0, 0] == 0
    (again,) = to_images(tensor[None])
    assert _difference(again, photo) == 0
    assert _difference(to_images(tensor[None].to(torch.float64).requires_grad_())[0], photo) == 0


def test_tensors_of_other_modes_are_converted() -> None:
    assert to_tensor(Image.new("RGBA", (2, 2), (0, 0, 0, 0))).min() == 1
    assert to_tensor(Image.fromarray(np.full((2, 2), 65535, np.uint16))).min() == 1


def test_values_are_rounded_and_clamped() -> None:
    values = torch.tensor([-0.5, 0.4 / 255, 0.6 / 255, 254.6 / 255, 2.0])
    (image,) = to_images(values.expand(1, 3, 1, 5))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 1, 255, 255]


def test_nan_does_not_become_black() -> None:
    with pytest.raises(UserError, match=r"^the image tensor contains NaN, .*\. Use bfloat16 or float32\.$"):
        to_images(torch.full((1, 3, 2, 2), torch.nan))


def test_grid_places_row_by_row() -> None:
    colours = ["red", "green", "blue", "yellow", "purple"]
    sheet = grid([Image.new("RGB", (10, 8), colour) for colour in colours], columns=3, padding=2)
    assert sheet.size == (2 + 3 * 12, 2 + 2 * 10)
    for index, colour in enumerate(colours):
        row, column = divmod(index, 3)
        expected = Image.new("RGB", (1, 1), colour).getpixel((0, 0))
        for dx, dy in ((0, 0), (9, 7)):
            assert sheet.getpixel((2 + column * 12 + dx, 2 + row * 10 + dy)) == expected
    assert sheet.getpixel((0, 0)) == sheet.getpixel((13, 5)) == sheet.getpixel((37, 19)) == (255, 255, 255)
    assert grid([_photo()], columns=4, padding=0).size == (48, 32)


def test_labels_are_below_their_image() -> None:
    black = [Image.new("RGB", (80, 40), "black")] * 2
    plain = grid(black, 2, padding=4)
    labelled = np.asarray(grid(black, 2, padding=4, labels=["a purple dromedary camel on blue", ""]))
    assert labelled.shape[0] > plain.height + 20  # two lines and more
    below = labelled[44:, :, 0] < 128
    assert below[:, 4:84].any()
    assert not below[:, 84:].any()
    assert not below[-4:].any()
    grid(black, 2, labels=["Würstchen 猫 🐫", "\n"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 2), "^a grid needs at least one image"),
        (([_photo()], 0), "^columns must be at least 1, got 0"),
        (([_photo()], 1, -1), "^padding must be at least 0, got -1"),
        (
            ([_photo()], 1, 0, ["a", "b"]),
            "^2 labels do not match 1 images",
        ),
    ],
)
def test_grid_refuses(arguments: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message):
        grid(*arguments)


SETTINGS = {
    "prompt": "ein Würstchen, 猫 🐫\nsecond line",
    "negative_prompt": "",
    "model": "small",
    "seed": 2**63,
    "guidance_scale": 4.5,
    "steps": [20, 10],
    "image": None,
    "tiled": True,
}


def test_settings_come_back_with_their_types(tmp_path: Path) -> None:
    save_png(_photo(), tmp_path / "a.PNG", SETTINGS)
    again = read_settings(tmp_path / "a.PNG")
    assert again == SETTINGS
    assert type(again["seed"]) is int
    assert type(again["tiled"]) is bool
    assert _difference(open_image(tmp_path / "a.PNG"), _photo()) == 0


def test_settings_can_be_read_by_other_programs(tmp_path: Path) -> None:
    save_png(_photo(), tmp_path / "a.png", SETTINGS)
    with Image.open(tmp_path / "a.png") as image:
        assert image.info["prompt"] == SETTINGS["prompt"]
        assert image.info["seed"] == str(2**63)
        assert image.info["steps"] == "[20, 10]"
    content = (tmp_path / "a.png").read_bytes()
    assert b"iTXtprompt" in content  # Unicode
    assert b"tEXtmodel" in content
    assert content.index(b"iTXtprompt") < content.index(b"IDAT")


def test_a_prompt_that_is_not_unicode_can_be_saved(tmp_path: Path) -> None:
    save_png(_photo(), tmp_path / "a.png", {"prompt": "caf\udce9"})
    assert read_settings(tmp_path / "a.png") == {"prompt": "caf\udce9"}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch) -> None:
    save_png(_photo(), tmp_path / "a.png", {"seed": 1})

    def fail(*arguments: object, **options: object) -> None:
        arguments[1].write(b"half")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(UserError, match="cannot be written \\(No space left on device\\)\\. Choose"):
        save_png(_photo(), tmp_path / "a.png", {"seed": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert read_settings(tmp_path / "a.png") == {"seed": 1}


def test_processes_that_save_at_once_replace_nothing_of_each_other(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from PIL import Image
from wuerstchen.image_files import save_new_png
sys.stdin.readline()
for number in range(15):
    save_new_png(Image.new("RGB", (8, 8)), Path(sys.argv[1]), "a", {"by": sys.argv[2], "number": number})
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(n)], stdin=subprocess.PIPE)
        for n in range(3)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.close()
    assert [process.wait() for process in processes] == [0, 0, 0]
    kept = {tuple(read_settings(path).values()) for path in tmp_path.glob("*.png")}
    assert kept == {(str(by), number) for by in range(3) for number in range(15)}
    assert len(list(tmp_path.iterdir())) == 45


@pytest.mark.parametrize("links", [True, False])
def test_a_taken_name_is_numbered(tmp_path: Path, monkeypatch, links: bool) -> None:
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(1, "not permitted")))
    (tmp_path / "a.png").write_bytes(b"someone's")
    (tmp_path / "a-2.png").symlink_to(tmp_path / "nowhere")
    assert save_new_png(_photo(), tmp_path, "a", {"n": 3}) == tmp_path / "a-3.png"
    assert read_settings(tmp_path / "a-3.png") == {"n": 3}
    assert (tmp_path / "a.png").read_bytes() == b"someone's"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-2.png", "a-3.png", "a.png"]


def test_saved_files_have_ordinary_permissions(tmp_path: Path) -> None:
    save_png(_photo(), tmp_path / "a.png", {})
    (tmp_path / "b").touch()
    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "missing/a.png",
            r"a\.png' cannot be written \(No such file or directory\)\. Choose",
        ),
        ("file/a.png", r"a\.png' cannot be written \(Not a directory\)\. Choose a file"),
        (
            "folder.png",
            r"folder\.png' cannot be written \(Is a directory\)\. Choose a file",
        ),
        ("a.jpg", r"a\.jpg' must end in \.png"),
    ],
)
def test_refuses_places_it_cannot_write(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=message):
        save_png(_photo(), tmp_path / name, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def test_refuses_files_without_settings(tmp_path: Path) -> None:
    _photo().save(tmp_path / "plain.png")
    _photo().save(tmp_path / "a.jpg")
    for name, text in (("damaged.png", "{"), ("list.png", json.dumps([1]))):
        info = PngInfo()
        info.add_text("wuerstchen", text)
        _photo().save(tmp_path / name, pnginfo=info)
    for name, message in (
        ("plain.png", "it contains no settings. Use a PNG saved by wuerstchen"),
        ("damaged.png", "its settings are not JSON"),
        ("list.png", "its settings are not an object"),
        ("a.jpg", "it is not an image in a known format"),
        ("missing.png", "it cannot be read"),
    ):
        with pytest.raises(DataError, match=f"^image '.*{name}' cannot be used: {message}"):
            read_settings(tmp_path / name)


def test_to_rgb_names_what_it_refuses() -> None:
    with pytest.raises(DataError, match=r"^image has values from 0 to 70000\. In Pillow's"):
        to_rgb(Image.fromarray(np.array([[0, 70000]], np.int32)))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F", "RGBA", "LA", "PA", "P", "L", "RGB", "CMYK"])
def test_images_are_converted_in_strips_as_they_are_whole(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A palette, a transparent colour, or a grey range taken from one strip instead of the whole image."""
    rng = np.random.default_rng(0)
    if mode == "I;16B":
        data = rng.integers(0, 65535, (13, 7)).astype(">u2").tobytes()
        image = Image.frombytes(mode, (7, 13), data)
    elif mode in ("I;16", "I", "F"):
        kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        values = rng.random((13, 7)) if mode == "F" else rng.integers(0, 65535, (13, 7))
        image = Image.fromarray(values.astype(kind))
    else:
        image = Image.fromarray(rng.integers(0, 255, (13, 7, 4), np.uint8), "RGBA").convert(mode)
    if mode in ("P", "L", "I;16"):
        image.info["transparency"] = image.getpixel((3, 11))
    whole = to_rgb(image)
    monkeypatch.setattr(images, "STRIP_PIXELS", 15)  # two rows, and one that is left over
    assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(whole))
    if mode in ("P", "L", "I;16"):
        assert whole.getpixel((3, 11)) == (255, 255, 255)


def test_grey_values_out_of_range_are_found_in_every_strip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "STRIP_PIXELS", 1)
    for wrong in (-0.5, 1.5, float("nan")):
        for row in range(3):
            values = np.zeros((3, 2), np.float32)
            values[row, 1] = wrong
            with pytest.raises(DataError, match="has values from"):
                to_rgb(Image.fromarray(values))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc to read the memory from")
@pytest.mark.parametrize(("mode", "most"), [("I;16", 10), ("RGBA", 11), ("RGB", 11)])
def test_decoding_takes_a_few_bytes_for_a_pixel(mode: str, most: int, tmp_path: Path) -> None:
    """A 16-bit PNG of 78 kB took a gigabyte: 25 bytes for each of 40 million pixels."""
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    Image.new(mode, (4000, 2500)).save(tmp_path / "a.png", exif=turned)
    code = (
        "import re, sys, numpy\n"
        "from wuerstchen.images import open_image\n"
        "most = lambda: int(re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read())[1]) * 1024\n"
        "before = most()\n"
        "assert open_image(sys.argv[1]).size == (2500, 4000)\n"
        "print((most() - before) / 1e7)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.png")], capture_output=True, text=True, check=True
    )
    assert 3 <= float(done.stdout) < most


def test_importing_loads_neither_torch_nor_numpy() -> None:
    code = "import sys, wuerstchen.images; sys.exit(any(name in sys.modules for name in ('torch', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Conversion to sRGB by embedded profiles. The profiles are written by hand; the expected colours come from
the definitions of the colour spaces, in float64."""

import io
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from wuerstchen.colour_profiles import MAX_PROFILE, differs_from_srgb, to_srgb
from wuerstchen.errors import UserNotice
from wuerstchen.images import decode_image, open_image, to_rgb, upright_rgb

D50 = np.array([0.9642, 1.0, 0.8249])
D65 = np.array([0.3127 / 0.3290, 1.0, (1 - 0.3127 - 0.3290) / 0.3290])
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
SRGB = [(0.64, 0.33), (0.30, 0.60), (0.15, 0.06)]
ADOBE = [(0.64, 0.33), (0.21, 0.71), (0.15, 0.06)]
PROPHOTO = [(0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001)]


def to_xyz(primaries: list[tuple[float, float]], white: np.ndarray) -> np.ndarray:
    """The matrix from linear RGB to XYZ under D50, of primaries and their white."""
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in primaries]).T
    matrix = columns * np.linalg.solve(columns, white)
    scale = np.diag((BRADFORD @ D50) / (BRADFORD @ white))
    return np.linalg.inv(BRADFORD) @ scale @ BRADFORD @ matrix


def srgb_of(xyz: np.ndarray) -> np.ndarray:
    """8-bit sRGB, in floats, of XYZ (n, 3) under D50 (IEC 61966-2-1)."""
    linear = np.clip(np.linalg.solve(to_xyz(SRGB, D65), xyz.T).T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def profile(space: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr", pcs: bytes = b"XYZ ") -> bytes:
    at, table, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", at + len(body), len(content))
        body += content
    header = bytearray(128)
    struct.pack_into(">I", header, 0, at + len(body))
    header[8:12] = b"\x02\x40\0\0"
    header[12:24] = kind + space + pcs
    header[36:40] = b"acsp"
    struct.pack_into(">3i", header, 68, *(round(value * 65536) for value in D50))
    return bytes(header) + table + body


def xyz_tag(values: np.ndarray) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(float(value) * 65536) for value in values))


def gamma_tag(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def rgb_profile(matrix: np.ndarray, gamma: float) -> bytes:
    tags = {name + b"XYZ": xyz_tag(matrix[:, i]) for i, name in enumerate((b"r", b"g", b"b"))}
    tags |= {name + b"TRC": gamma_tag(gamma) for name in (b"r", b"g", b"b")}
    return profile(b"RGB ", {b"wtpt": xyz_tag(D50), **tags})


def grey_profile(gamma: float) -> bytes:
    return profile(b"GRAY", {b"wtpt": xyz_tag(D50), b"kTRC": gamma_tag(gamma)})


INKS = {"cyan": (0.1, 0.4, 0.8), "magenta": (0.7, 0.1, 0.3), "yellow": (0.9, 0.8, 0.1), "black": (0, 0, 0)}


def cmyk_colours() -> np.ndarray:
    """Linear sRGB of the 16 solid overprints: inks multiply."""
    inks = np.array(list(INKS.values()))
    return np.array(
        [np.prod([inks[i] for i in range(4) if on[i]] or [[1] * 3], axis=0) for on in np.ndindex(2, 2, 2, 2)]
    )


def cmyk_profile() -> bytes:
    """A printer whose table holds the 16 overprints; version 2, XYZ, 16 bits."""
    xyz = cmyk_colours() @ to_xyz(SRGB, D65).T
    table = np.rint(np.clip(xyz, 0, 1.99) * 32768).astype(">u2").tobytes()
    ramp = struct.pack(">2H", 0, 65535)
    identity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    lut = b"mft2\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + struct.pack(">2H", 2, 2)
    return profile(b"CMYK", {b"wtpt": xyz_tag(D50), b"A2B0": lut + ramp * 4 + table + ramp * 3}, b"prtr")


def noise(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def pixels_of(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(float)


@pytest.mark.parametrize(
    ("primaries", "white", "gamma"),
    [(ADOBE, D65, 563 / 256), (PROPHOTO, D50, 1.8)],
    ids=["Adobe RGB", "ProPhoto"],
)
@pytest.mark.parametrize("suffix", [".png", ".tiff", ".webp"])
def test_rgb_profiles_are_applied(tmp_path: Path, primaries, white, gamma, suffix: str) -> None:
    pixels = noise((20, 30, 3))
    matrix = to_xyz(primaries, white)
    Image.fromarray(pixels).save(
        tmp_path / f"a{suffix}",
        icc_profile=rgb_profile(matrix, gamma),
        **({"lossless": True} if suffix == ".webp" else {}),
    )
    expected = srgb_of((pixels.reshape(-1, 3) / 255) ** (round(gamma * 256) / 256) @ matrix.T)
    opened = open_image(tmp_path / f"a{suffix}")
    error = np.abs(pixels_of(opened).reshape(-1, 3) - expected)
    assert error.max() < 1.6
    assert error.mean() < 0.4
    assert np.abs(pixels - pixels_of(opened)).mean() > 5  # what ignoring the profile costs
    assert opened.info == {}


def test_cameras_mark_adobe_rgb_in_exif() -> None:
    pixels = np.broadcast_to(noise((4, 6, 1, 1, 3)), (4, 6, 16, 16, 3)).swapaxes(1, 2).reshape(64, 96, 3)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ColorSpace] = 65535
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.IFD.Interop] = {1: "R03"}
    file = io.BytesIO()
    Image.fromarray(np.rot90(pixels)).save(file, "JPEG", exif=exif, quality=100, subsampling=0)
    matrix = to_xyz(ADOBE, D65)
    expected = srgb_of((pixels.reshape(-1, 3) / 255) ** (563 / 256) @ matrix.T)
    error = np.abs(pixels_of(decode_image(file.getvalue(), "a.jpg")).reshape(-1, 3) - expected)
    assert error.mean() < 1.5


@pytest.mark.parametrize("suffix", [".jpg", ".tiff"])
def test_cmyk_is_converted_by_its_profile(tmp_path: Path, suffix: str) -> None:
    inks = np.array(list(np.ndindex(2, 2, 2, 2)), np.uint8) * 255
    blocks = np.repeat(np.repeat(inks.reshape(4, 4, 4), 16, 0), 16, 1)
    Image.fromarray(blocks, "CMYK").save(tmp_path / f"a{suffix}", icc_profile=cmyk_profile(), quality=100)
    expected = srgb_of(cmyk_colours() @ to_xyz(SRGB, D65).T)
    found = pixels_of(open_image(tmp_path / f"a{suffix}"))[8::16, 8::16].reshape(-1, 3)
    assert np.abs(found - expected).max() <= 3
    plain = pixels_of(Image.fromarray(inks.reshape(4, 4, 4), "CMYK").convert("RGB")).reshape(-1, 3)
    assert np.abs(plain - expected).mean() > 20


def test_grey_profiles_are_applied_in_8_and_16_bits() -> None:
    levels = np.array([[0, 1, 5, 20, 100, 180, 255]], np.uint8)
    linear = grey_profile(1.0)
    expected = srgb_of((levels[0] / 255)[:, None] * D50)[:, 0]
    for values in (levels, levels.astype(np.uint16) * 257):
        image = Image.fromarray(values)
        image.info["icc_profile"] = linear
        assert np.abs(pixels_of(to_rgb(image))[0] - expected[:, None]).max() < 1.6, image.mode
    deep = Image.fromarray(np.arange(0, 2570, 10, dtype=np.uint16)[None])
    deep.info["icc_profile"] = linear
    assert len(np.unique(np.asarray(to_rgb(deep)))) > 50  # in 8 bits eleven levels would be left


def test_grey_images_may_carry_the_profile_of_a_screen() -> None:
    image = Image.fromarray(noise((4, 5)))
    image.info["icc_profile"] = rgb_profile(to_xyz(ADOBE, D65), 1.0)
    expected = srgb_of((np.asarray(image).ravel() / 255)[:, None] * D50)
    assert np.abs(pixels_of(to_rgb(image)).reshape(-1, 3) - expected).max() < 1.6


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA"])
def test_transparent_images_are_converted_before_they_are_laid_on_white(mode: str) -> None:
    rgba = noise((6, 6, 4))
    rgba[..., 3] = np.where(np.arange(6) < 3, 0, 255)
    image = Image.fromarray(rgba).convert(mode) if mode != "P" else Image.fromarray(rgba).quantize(20)
    opaque = image.convert("L" if mode == "LA" else "RGB")
    opaque.info = {}
    opaque.info["icc_profile"] = grey_profile(1.0) if mode == "LA" else rgb_profile(to_xyz(ADOBE, D65), 2.0)
    image.info["icc_profile"] = opaque.info["icc_profile"]
    found, expected = np.asarray(to_rgb(image)), np.asarray(to_srgb(opaque).convert("RGB"))
    assert (found[:, :3] == 255).all()
    assert (found[:, 3:] == expected[:, 3:]).all()
    assert (expected[:, 3:] != np.asarray(image.convert("RGB"))[:, 3:]).any()


def test_srgb_s_own_profiles_change_no_bit() -> None:
    """Nor do those whose curve is rounded, as TINYsRGB's is."""
    points = np.rint(65535 * ((np.arange(1024) / 1023 + 0.055) / 1.055) ** 2.4)
    points[: int(1023 * 0.04045) + 1] = np.rint(65535 * np.arange(int(1023 * 0.04045) + 1) / 1023 / 12.92)
    curve = b"curv\0\0\0\0" + struct.pack(">I", 1024) + points.astype(">u2").tobytes()
    matrix = to_xyz(SRGB, D65)
    tags = {name + b"XYZ": xyz_tag(matrix[:, i]) for i, name in enumerate((b"r", b"g", b"b"))}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    pillows = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for content in (pillows, profile(b"RGB ", {b"wtpt": xyz_tag(D50), **tags})):
        image = Image.fromarray(noise((40, 40, 3)))
        image.info["icc_profile"] = content
        assert to_srgb(image) is image
        assert not differs_from_srgb(content)
    assert differs_from_srgb(rgb_profile(to_xyz(ADOBE, D65), 2.2))
    assert not differs_from_srgb(b"nonsense")


def test_an_open_image_is_converted_once() -> None:
    image = Image.fromarray(noise((8, 8, 3)))
    image.info["icc_profile"] = rgb_profile(to_xyz(ADOBE, D65), 2.2)
    once = upright_rgb(image)
    assert (np.asarray(once) != np.asarray(image)).any()
    assert (np.asarray(upright_rgb(once)) == np.asarray(once)).all()
    assert "icc_profile" in image.info  # the caller's own is left alone


def test_lab_images_are_read(tmp_path: Path) -> None:
    Image.new("LAB", (4, 4), (255, 128, 128)).save(tmp_path / "a.tiff")
    assert min(open_image(tmp_path / "a.tiff").getpixel((1, 1))) >= 253


@pytest.mark.parametrize(
    ("content", "mode", "reason"),
    [
        (b"profile", "RGB", "it is not an ICC profile"),
        (grey_profile(2.2), "RGB", "it is for L, but the image is RGB"),
        (cmyk_profile(), "RGB", "it is for CMYK, but the image is RGB"),
        (rgb_profile(to_xyz(ADOBE, D65), 2.2), "CMYK", "it is for RGB, but the image is CMYK"),
        (rgb_profile(to_xyz(ADOBE, D65), 2.2)[:200], "RGB", "damaged"),
        (profile(b"RGB ", {}), "RGB", "cannot build transform"),
        (
            profile(b"RGB ", {}, kind=b"link"),
            "RGB",
            "its class b'link' or colour space b'RGB ' is not supported",
        ),
        (
            rgb_profile(to_xyz(ADOBE, D65), 2.2) + bytes(MAX_PROFILE),
            "RGB",
            "it has more than 8,388,608 bytes",
        ),
    ],
    ids=range(8),
)
def test_unusable_profiles_are_ignored(content: bytes, mode: str, reason: str) -> None:
    image = Image.new(mode, (4, 4), (1, 2, 3, 4)[: len(mode)])
    image.info["icc_profile"] = content
    with pytest.warns(UserNotice, match=f"cannot be used: .*{reason}"):
        picture = to_rgb(image)
    assert picture.tobytes() == image.convert("RGB").tobytes()


def program_profile() -> bytes:
    """Adobe RGB with a floating-point table that is a program of 400,000 matrices at one offset."""
    matrix = b"matf\0\0\0\0" + struct.pack(">2H", 3, 3) + struct.pack(">12f", *np.eye(3).ravel(), 0, 0, 0)
    count = 400_000
    head = b"mpet\0\0\0\0" + struct.pack(">2HI", 3, 3, count)
    places = struct.pack(">2I", len(head) + 8 * count, len(matrix)) * count
    base = to_xyz(ADOBE, D65)
    tags = {name + b"XYZ": xyz_tag(base[:, i]) for i, name in enumerate((b"r", b"g", b"b"))}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma_tag(2.2))
    return profile(b"RGB ", {b"wtpt": xyz_tag(D50), **tags, b"D2B0": head + places + matrix})


def test_programs_in_profiles_are_not_run() -> None:
    """LittleCMS alone computes for minutes here."""
    image = Image.fromarray(noise((8, 8, 3)))
    image.info["icc_profile"] = program_profile()
    began = time.process_time()
    found = np.asarray(to_rgb(image))
    assert time.process_time() - began < 10
    image.info["icc_profile"] = rgb_profile(to_xyz(ADOBE, D65), 2.2)
    assert (found == np.asarray(to_rgb(image))).all()


def test_damaged_profiles_never_end_the_process() -> None:
    """Random damage, in a separate process: LittleCMS is written in C, and could crash it."""
    code = f"""
import random, sys, warnings
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_colour_profiles import *
warnings.simplefilter("ignore")
random.seed(0)
adobe = rgb_profile(to_xyz(ADOBE, D65), 2.2)
for content, mode in ((adobe, "RGB"), (cmyk_profile(), "CMYK"), (grey_profile(2), "L")):
    for _ in range(50):
        damaged = bytearray(content)
        for _ in range(random.choice([1, 2, 8])):
            at = random.randrange(128, len(damaged)) if random.random() < 0.9 else random.randrange(128)
            damaged[at] = random.choice([0, 1, 255, random.randrange(256)])
        image = Image.new(mode, (3, 3))
        image.info["icc_profile"] = bytes(damaged)
        assert to_rgb(image).size == (3, 3)
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "done\n", done.stderr


def test_threads_share_a_conversion() -> None:
    image = Image.fromarray(noise((200, 200, 3)))
    image.info["icc_profile"] = rgb_profile(to_xyz(ADOBE, D65), 2.2)
    expected, found = np.asarray(to_rgb(image)), []
    threads = [
        threading.Thread(target=lambda: found.extend(np.asarray(to_rgb(image)) for _ in range(5)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20
    assert all((one == expected).all() for one in found)

"""PNG files with more text, or a larger profile, than Pillow reads."""

import base64
import io
import random
import runpy
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from wuerstchen.colour_profiles import MAX_PROFILE
from wuerstchen.errors import DataError, UserNotice
from wuerstchen.image_files import read_settings, save_png
from wuerstchen.images import decode_image, open_image
from wuerstchen.png_text import open_any
from wuerstchen.serve.decoding import Upload, read_upload

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
LONG = b"x" * (2**20 + 1)


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def saved(**options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG", **options)
    return file.getvalue()


def with_chunks(png: bytes, *chunks: bytes, behind: bool = False) -> bytes:
    """The file with more chunks before or after its pixels."""
    at = len(png) - 12 if behind else 8 + 25
    return png[:at] + b"".join(chunks) + png[at:]


ZTXT = chunk(b"zTXt", b"history\0\0" + zlib.compress(LONG))
ITXT = chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(LONG))


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("text", [ZTXT, ITXT], ids=["zTXt", "iTXt"])
def test_long_text_is_accepted(tmp_path: Path, text: bytes, behind: bool) -> None:
    content = with_chunks(saved(), text, behind=behind)
    with pytest.raises(ValueError, match="MAX_TEXT_CHUNK"), Image.open(io.BytesIO(content)) as image:
        image.load()
    (tmp_path / "a.png").write_bytes(content)
    assert np.array_equal(np.asarray(decode_image(content, "a.png")), PIXELS)
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png")), PIXELS)
    text64 = base64.b64encode(content).decode()
    upload = Upload(text64, width=16, height=16, max_bytes=10**7, max_pixels=10**6, seconds=10.0)
    assert np.array_equal(np.asarray(read_upload(upload)), PIXELS)


def test_many_short_texts_are_accepted(monkeypatch) -> None:
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 100)
    texts = [chunk(b"tEXt", b"k%d\0" % n + b"x" * 40) for n in range(9)]
    with pytest.raises(ValueError, match="MAX_TEXT_MEMORY"):
        Image.open(io.BytesIO(with_chunks(saved(), *texts)))
    monkeypatch.setattr("wuerstchen.png_text._MAX_TEXTS", 80)
    assert np.array_equal(np.asarray(decode_image(with_chunks(saved(), *texts), "a.png")), PIXELS)


def test_settings_are_read_despite_long_text(tmp_path: Path) -> None:
    save_png(Image.fromarray(PIXELS), tmp_path / "a.png", {"prompt": "ümlaut", "seed": 3})
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(with_chunks(content, ZTXT, ITXT))
    assert read_settings(tmp_path / "a.png") == {"prompt": "ümlaut", "seed": 3}


def with_profile(size: int, compressible: bool = False) -> bytes:
    """A profile of this size that swaps green and red."""
    made = runpy.run_path(str(Path(__file__).with_name("test_colour_profiles.py")))
    matrix = made["to_xyz"](made["SRGB"], made["D65"])[:, [1, 0, 2]]
    profile = made["rgb_profile"](matrix, 2.2)
    rest = bytes(size) if compressible else random.Random(0).randbytes(size)
    content = b"large\0\0" + zlib.compress(profile + rest, 1)
    return with_chunks(saved(), chunk(b"iCCP", content))


def test_a_large_profile_is_applied() -> None:
    content = with_profile(3 * 2**20)
    with pytest.raises(ValueError, match="MAX_TEXT_CHUNK"):
        Image.open(io.BytesIO(content))
    picture = np.asarray(decode_image(content, "a.png")).astype(int)
    swapped = PIXELS[..., [1, 0, 2]].astype(int)
    assert np.abs(picture - swapped).mean() < 4


def test_a_profile_that_is_too_large_is_ignored() -> None:
    with pytest.warns(UserNotice, match=f"it has more than {MAX_PROFILE:,} bytes"):
        picture = decode_image(with_profile(500 * 2**20 // 8, compressible=True), "a.png")
    assert np.array_equal(np.asarray(picture), PIXELS)


def test_of_an_animation_the_frames_are_still_counted() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    file = io.BytesIO()
    frames[0].save(file, "PNG", save_all=True, append_images=frames[1:])
    content = with_chunks(file.getvalue(), ZTXT)
    with open_any(io.BytesIO(content)) as image:
        assert image.n_frames == 2
    assert decode_image(content, "a.png").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_cut_off_files_are_still_damaged(part: float) -> None:
    content = with_chunks(saved(), ZTXT)
    pixels = content.index(b"IDAT")
    with pytest.raises(DataError, match=r"^image 'a\.png' cannot be used: it is"):
        decode_image(content[: pixels + int(part * (len(content) - 20 - pixels))], "a.png")


def test_pixels_that_nobody_needs_are_not_read() -> None:
    content = with_chunks(saved(), ZTXT)
    at = content.index(b"IDAT") - 4
    large = content[:at] + struct.pack(">I", 2**31 - 1) + content[at + 4 :]
    with pytest.raises(DataError, match="is too large for its number of pixels"):
        decode_image(large, "a.png")

"""Opens PNG files whose text or colour profile is too long for Pillow, which calls them damaged.

Pillow stops at 1 MiB for each compressed chunk of text and for the profile, as protection from files that
unpack to gigabytes. Valid files have more: photographs with large profiles, or images with a long history
in XMP. Importing this loads neither torch nor numpy.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from wuerstchen.colour_profiles import MAX_PROFILE

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MAX_TEXT = 2**20
_MAX_TEXTS = 16 * 2**20
_MAX_PIXELS = 100_000_000
_SPARE = 64 * 2**20  # bytes of chunks that hold neither pixels nor text


def open_any(file: Path | str | io.BytesIO, formats: Sequence[str] | None = None) -> Image.Image:
    """``PIL.Image.open``, and PNG files with more text than Pillow reads, without that text.

    Their profile is kept up to ``MAX_PROFILE``. Raises what ``PIL.Image.open`` raises. Text after the pixels
    is met by ``load`` only: see ``open_without_text``.
    """
    try:
        return Image.open(file, formats=formats)
    except ValueError as error:
        if not is_about_text(error):
            raise
    return open_without_text(file, formats)


def is_about_text(error: ValueError) -> bool:
    """Whether Pillow raised it for a file with more text than it reads."""
    return "MAX_TEXT" in str(error)


def open_without_text(file: Path | str | io.BytesIO, formats: Sequence[str] | None = None) -> Image.Image:
    """A PNG file without its compressed and its long text."""
    if isinstance(file, io.BytesIO):
        file.seek(0)
        rest, profile = _without_text(file)
    else:
        with open(file, "rb") as opened:
            rest, profile = _without_text(opened)
    image = Image.open(rest, formats=formats)
    if profile is not None:
        image.info["icc_profile"] = profile
    return image


def _without_text(file: io.BufferedIOBase) -> tuple[io.BytesIO, bytes | None]:
    """The file's other chunks, and its profile (one that is too long is cut behind ``MAX_PROFILE``).

    PNG specification, third edition, 5.3: a chunk is its length, its name, its content and a checksum.
    """
    kept, texts, room, profile = io.BytesIO(), 0, _SPARE, None
    kept.write(file.read(len(_SIGNATURE)))
    while len(head := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", head)
        if name in (b"zTXt", b"fdAT") or (name in (b"tEXt", b"iTXt") and length > _MAX_TEXT):
            file.seek(length + 4, io.SEEK_CUR)
            continue
        if length > room:
            raise ValueError(f"its chunk {name!a} is larger than its pixels need")
        content = file.read(length + 4)
        if name == b"IHDR" and length == 13:
            width, height = struct.unpack(">II", content[:8])
            room += 9 * min(width * height, _MAX_PIXELS)  # 16 bits of four channels, and some more
        elif name == b"iCCP":
            profile = _unpacked(content[:-4])
            continue
        elif name in (b"tEXt", b"iTXt"):
            texts += length
            if texts > _MAX_TEXTS or (name == b"iTXt" and _is_compressed(content)):
                continue
        room -= length
        kept.write(head + content)
        if name == b"IEND":
            break
    kept.seek(0)
    return kept, profile


def _unpacked(content: bytes) -> bytes | None:
    """The profile in a chunk iCCP: name, a zero, the method 0, and the profile as zlib packs it."""
    _, zero, packed = content.partition(b"\0")
    if not zero or packed[:1] != b"\0":
        return None
    try:
        return zlib.decompressobj().decompress(packed[1:], MAX_PROFILE + 1)
    except zlib.error:
        return None


def _is_compressed(content: bytes) -> bool:
    """Of a chunk iTXt: keyword, a zero, a flag."""
    return content.partition(b"\0")[2][:1] != b"\0"

"""Opens PNG files with a text or colour profile that is too long for Pillow.

Pillow refuses more than 1 MiB in a compressed text chunk and in the profile, as a protection from files that
expand to gigabytes. But valid files can have more: photographs with large profiles, or images with a long
history in XMP. Importing this module loads neither torch nor numpy.
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
_SPARE = 64 * 2**20  # bytes of chunks with neither pixels nor text


def open_any(file: Path | str | io.BytesIO, formats: Sequence[str] | None = None) -> Image.Image:
    """Like ``PIL.Image.open``, but leaves out PNG text that exceeds Pillow's limits instead of failing.

    Profiles up to ``MAX_PROFILE`` are kept. Raises the errors of ``PIL.Image.open``. Text after the pixels
    only causes an error in ``load``: see ``open_without_text``.
    """
    try:
        return Image.open(file, formats=formats)
    except ValueError as error:
        if not is_about_text(error):
            raise
    return open_without_text(file, formats)


def is_about_text(error: ValueError) -> bool:
    """Whether Pillow raised this error because of too much text."""
    return "MAX_TEXT" in str(error)


def open_without_text(file: Path | str | io.BytesIO, formats: Sequence[str] | None = None) -> Image.Image:
    """Opens a PNG file without its compressed text and its long text."""
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
    """The other chunks of the file, and its profile, truncated after ``MAX_PROFILE``.

    PNG specification, third edition, 5.3: a chunk has a length, a name, a content and a checksum.
    """
    kept, texts, room, profile = io.BytesIO(), 0, _SPARE, None
    kept.write(file.read(len(_SIGNATURE)))
    while len(head := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", head)
        if name in (b"zTXt", b"fdAT") or (name in (b"tEXt", b"iTXt") and length > _MAX_TEXT):
            file.seek(length + 4, io.SEEK_CUR)
            continue
        if length > room:
            raise ValueError(f"its chunk {name!a} is too large for its number of pixels")
        content = file.read(length + 4)
        if name == b"IHDR" and length == 13:
            width, height = struct.unpack(">II", content[:8])
            room += 9 * min(width * height, _MAX_PIXELS)  # four channels of 16 bits, and some more
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
    """The profile in an iCCP chunk: a name, a zero, the method 0, and the profile compressed by zlib."""
    _, zero, packed = content.partition(b"\0")
    if not zero or packed[:1] != b"\0":
        return None
    try:
        return zlib.decompressobj().decompress(packed[1:], MAX_PROFILE + 1)
    except zlib.error:
        return None


def _is_compressed(content: bytes) -> bool:
    """Whether an iTXt chunk (keyword, a zero, a flag) is compressed."""
    return content.partition(b"\0")[2][:1] != b"\0"

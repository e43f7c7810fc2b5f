"""Converts images to sRGB with their embedded colour profiles.

LittleCMS, through Pillow, reads the profiles. Profiles are untrusted, so LittleCMS only gets the tags that a
conversion to sRGB needs. Reading those takes milliseconds, whatever they contain. Importing this module loads
neither torch nor numpy.
"""

from __future__ import annotations

import functools
import io
import struct
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from PIL import ExifTags, Image

from wuerstchen.errors import UserNotice

if TYPE_CHECKING:
    from PIL import ImageCms

MAX_PROFILE = 8 * 2**20
"""Size limit of profiles in bytes. Profiles of printing presses have up to 3 MB."""
MAX_DIFFERENCE = 2
"""A profile counts as sRGB if no colour changes by more than this, of 255. Many programs write sRGB with
slightly rounded curves, and converting them would only add rounding errors."""

_HEADER = 128
_CLASSES = frozenset({b"scnr", b"mntr", b"prtr", b"spac"})
_SPACES = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}
# All other tags describe other conversions or device classes, or hold text. The "D2B" tags must be removed
# because they contain programs of any length, and one of 4 MB runs for minutes.
_TAGS = frozenset(
    {
        b"A2B0",
        b"A2B1",
        b"A2B2",
        b"rXYZ",
        b"gXYZ",
        b"bXYZ",
        b"rTRC",
        b"gTRC",
        b"bTRC",
        b"kTRC",
        b"wtpt",
        b"chad",
    }
)


class _Unusable(Exception):
    """A profile that cannot be used. The message says why."""


def to_srgb(image: Image.Image) -> Image.Image:
    """Converts ``image`` (mode RGB, L, CMYK or LAB) to sRGB with its profile. Without one it is not changed.

    A converted image has mode RGB (L for grey images) and no profile. Embedded ICC profiles are used, and the
    EXIF mark of cameras for Adobe RGB. The rendering intent is perceptual, with black point compensation. A
    profile that is damaged, larger than ``MAX_PROFILE``, or for other colours than the image's is ignored,
    with a ``UserNotice``.
    """
    if image.mode == "LAB":
        return _stripped(_lab_transform().apply(image))
    profile = profile_of(image)
    if profile is None:
        return image
    try:
        mode, transform = _transform(profile)
        if mode == "RGB" and image.mode == "L":  # a grey image with an RGB profile
            image = image.convert("RGB")
        if mode != image.mode:
            raise _Unusable(f"it is for {mode}, but the image is {image.mode}")
    except _Unusable as error:
        warnings.warn(
            f"The colour profile of an image cannot be used: {error}. Its colours are read as sRGB.",
            UserNotice,
            stacklevel=2,
        )
        return image
    return image if transform is None else _stripped(transform(image))


def profile_of(image: Image.Image) -> bytes | None:
    """The ICC profile of ``image``. None means sRGB."""
    profile = image.info.get("icc_profile")
    if isinstance(profile, bytes) and profile:
        return profile
    return _adobe_rgb() if image.mode == "RGB" and _is_marked_adobe_rgb(image) else None


def differs_from_srgb(profile: bytes) -> bool:
    """Whether converting an image with this profile changes colours. False if the profile is damaged."""
    try:
        mode, transform = _transform(profile)
    except _Unusable:
        return False
    return transform is not None or mode == "CMYK"


def _stripped(image: Image.Image) -> Image.Image:
    image.info = {}
    return image


def _is_marked_adobe_rgb(image: Image.Image) -> bool:
    """Whether the EXIF data name Adobe RGB, as cameras mark it (DCF 2.0: "R03")."""
    if "exif" not in image.info:
        return False
    try:
        index = image.getexif().get_ifd(ExifTags.IFD.Interop).get(ExifTags.Interop.InteropIndex)
    except Exception:  # damaged EXIF does not matter for the pixels
        return False
    return isinstance(index, str) and index.rstrip("\0 ") == "R03"


@functools.lru_cache(maxsize=8)
def _transform(profile: bytes) -> tuple[str, Callable[[Image.Image], Image.Image] | None]:
    """The mode of a profile, and the conversion of images, None if it changes nothing.

    Raises ``_Unusable``.
    """
    mode, needed = _needed_parts(profile)
    try:
        from PIL import ImageCms

        source = ImageCms.ImageCmsProfile(io.BytesIO(needed))
        transform = _build(source, mode).apply
    except (ImportError, OSError, ValueError, TypeError) as error:
        raise _Unusable(f"{' '.join(str(error).split()) or type(error).__name__}") from error
    if _changes_nothing(mode, transform):
        return mode, None
    if mode == "L":
        curve = list(transform(_grey_ramp()).getchannel("G").tobytes())
        return mode, lambda image: image.point(curve)
    return mode, transform


def _build(source: ImageCms.ImageCmsProfile, mode: str) -> ImageCms.ImageCmsTransform:
    from PIL import ImageCms

    target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
    if mode == "L":
        flags |= ImageCms.Flags.NOOPTIMIZE  # otherwise LittleCMS rounds too coarsely for 256 levels
    return ImageCms.ImageCmsTransform(
        source, target, mode, "RGB", intent=ImageCms.Intent.PERCEPTUAL, flags=flags
    )


@functools.cache
def _lab_transform() -> ImageCms.ImageCmsTransform:
    from PIL import ImageCms

    return _build(ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")), "LAB")


def _changes_nothing(mode: str, transform: Callable[[Image.Image], Image.Image]) -> bool:
    """Whether a conversion changes a lattice of colours by at most ``MAX_DIFFERENCE``."""
    if mode == "CMYK":
        return False
    if mode == "L":
        lattice = _grey_ramp()
    else:
        levels = range(0, 256, 15)  # 18 values per channel
        colours = bytes(value for r in levels for g in levels for b in levels for value in (r, g, b))
        greys = bytes(value for level in range(256) for value in (level, level, level))
        content = colours + greys
        lattice = Image.frombytes("RGB", (len(content) // 3, 1), content)
    before = lattice.convert("RGB").tobytes()
    after = transform(lattice).tobytes()
    return all(abs(a - b) <= MAX_DIFFERENCE for a, b in zip(before, after, strict=True))


def _grey_ramp() -> Image.Image:
    return Image.frombytes("L", (256, 1), bytes(range(256)))


def _needed_parts(profile: bytes) -> tuple[str, bytes]:
    """The mode of a profile, and the profile without the parts that ``to_srgb`` does not need.

    ICC.1:2022, 7.2 and 7.3: a header of 128 bytes, the number of tags, and the name, offset and size of each.
    """
    if len(profile) > MAX_PROFILE:
        raise _Unusable(f"it has more than {MAX_PROFILE:,} bytes")
    if len(profile) < _HEADER + 4 or profile[36:40] != b"acsp":
        raise _Unusable("it is not an ICC profile")
    kind, space = profile[12:16], profile[16:20]
    if kind not in _CLASSES or space not in _SPACES:
        raise _Unusable(f"its class {kind!a} or colour space {space!a} is not supported")
    (count,) = struct.unpack_from(">I", profile, _HEADER)
    if count > 100 or len(profile) < _HEADER + 4 + 12 * count:
        raise _Unusable("its table of contents is damaged")
    entries = [profile[at : at + 12] for at in range(_HEADER + 4, _HEADER + 4 + 12 * count, 12)]
    kept = [entry for entry in entries if entry[:4] in _TAGS]
    table = struct.pack(">I", len(kept)) + b"".join(kept)
    # The rest of the table becomes a gap, so offsets stay valid.
    return _SPACES[space], profile[:_HEADER] + table + profile[_HEADER + len(table) :]


@functools.cache
def _adobe_rgb() -> bytes:
    """A profile for Adobe RGB (1998): its primaries adapted to D50, and its gamma, 2 + 51/256."""
    fixed = 65536
    points = {
        b"rXYZ": (0.60974, 0.31111, 0.01947),
        b"gXYZ": (0.20528, 0.62567, 0.06087),
        b"bXYZ": (0.14919, 0.06322, 0.74457),
        b"wtpt": (0.9642, 1.0, 0.8249),
    }
    parts = {
        name: b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * fixed) for value in values))
        for name, values in points.items()
    }
    gamma = b"curv\0\0\0\0" + struct.pack(">IH", 1, 563) + b"\0\0"
    parts |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma)
    at = _HEADER + 4 + 12 * len(parts)
    table = struct.pack(">I", len(parts))
    for name, content in parts.items():
        table += name + struct.pack(">II", at, len(content))
        at += len(content)
    header = struct.pack(">I4xI4s4s4s12x4s", at, 0x02400000, b"mntr", b"RGB ", b"XYZ ", b"acsp")
    header += bytes(28) + struct.pack(">3i", 63190, 65536, 54061)  # D50
    return header.ljust(_HEADER, b"\0") + table + b"".join(parts.values())

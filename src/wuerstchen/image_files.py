"""Writes images with their settings to PNG files atomically, and reads the settings within limits."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import secrets
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from wuerstchen.errors import UserError, UserNotice
from wuerstchen.images import bad_image, check_file, pillow_errors
from wuerstchen.png_text import open_any

_SETTINGS_KEY = "wuerstchen"
MADE_BY_A_MODEL = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""The DigitalSourceType that IPTC defines for generated images."""
ANIMATIONS = (".webp", ".gif")
_XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
    'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
    'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    f'Iptc4xmpExt:DigitalSourceType="{MADE_BY_A_MODEL}"/></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)


def check_writable(folder: Path | str) -> None:
    """Creates ``folder`` if it is missing. Raises ``UserError`` if no file can be written to it."""
    folder = Path(folder)
    probe = folder / f".{secrets.token_hex(4)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"folder {str(folder)!r} cannot be written ({error.strerror or error}). Choose a writable folder."
        ) from error


def save_png(
    image: Image.Image, path: Path | str, settings: Mapping[str, Any], *, is_generated: bool = False
) -> None:
    """Writes ``image`` as PNG with ``settings`` (JSON values) in its text chunks.

    Each setting has its own chunk, for people and other programs. The chunk "wuerstchen" contains all of them
    as JSON, for ``read_settings``. With ``is_generated`` the file is marked as generated: in the chunks
    Software and Source, and in XMP with IPTC's DigitalSourceType. The file is written atomically and replaces
    an existing one. Raises ``UserError`` if it cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise UserError(f"path {str(path)!r} must end in .png, because a PNG is written.")
    with _written(image, path, settings, is_generated) as temporary:
        os.replace(temporary, path)


def save_new_png(
    image: Image.Image,
    folder: Path,
    stem: str,
    settings: Mapping[str, Any],
    *,
    is_generated: bool = False,
) -> Path:
    """``save_png`` with an unused name: ``stem.png`` in ``folder``, otherwise ``stem-2.png`` and so on.

    Never replaces an existing file, even if several processes write to the folder. Returns the path.
    """
    path, number = folder / f"{stem}.png", 1
    with _written(image, path, settings, is_generated) as temporary:
        while not _placed(temporary, path):
            number += 1
            path = folder / f"{stem}-{number}.png"
    return path


def save_animation(
    frames: Sequence[Image.Image], path: Path, settings: Mapping[str, Any], *, seconds_per_frame: float
) -> None:
    """Writes generated images as an endless animation: WebP or GIF, by the suffix of ``path``.

    A WebP is lossless and is marked as generated in its XMP. A GIF has the settings in its comment, at most
    256 colours, and times in steps of 10 ms from 20 ms. Prints a ``UserNotice`` if neighboring images are
    equal, because both formats store them as one that stays longer. The file is written atomically and
    replaces an existing one. Raises ``UserError``.
    """
    suffix = path.suffix.lower()
    if suffix not in ANIMATIONS:
        raise UserError(f"path {str(path)!r} must end in {' or '.join(ANIMATIONS)}.")
    equal = sum(one.tobytes() == other.tobytes() for one, other in itertools.pairwise(frames))
    if equal:
        warnings.warn(
            f"{equal} of {len(frames)} images are equal to the one before. {path.name} stores them as one "
            "image that stays longer",
            UserNotice,
            stacklevel=2,
        )
    text = json.dumps(dict(settings), allow_nan=False)
    duration = round(1000 * seconds_per_frame)
    if suffix == ".webp":
        exif = Image.Exif()
        exif[ExifTags.Base.ImageDescription] = text
        options: dict[str, Any] = {"lossless": True, "xmp": _XMP.encode(), "exif": exif.tobytes()}
    else:
        options = {"comment": text.encode(), "disposal": 2}
        duration = max(20, 10 * math.floor(100 * seconds_per_frame + 0.5))
    options |= {"save_all": True, "append_images": list(frames[1:]), "duration": duration, "loop": 0}
    with _temporary(path, frames[0], suffix[1:].upper(), options) as temporary:
        os.replace(temporary, path)


def _placed(temporary: Path, path: Path) -> bool:
    """Renames the temporary file to ``path``, unless that exists."""
    try:
        os.link(temporary, path)
        return True
    except FileExistsError:
        return False
    except OSError:  # without hard links, reserve the name with an empty file
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        os.replace(temporary, path)
        return True


@contextlib.contextmanager
def _written(
    image: Image.Image, path: Path, settings: Mapping[str, Any], is_generated: bool
) -> Iterator[Path]:
    """The image as a PNG in a temporary file, as in ``_temporary``."""
    chunks = PngInfo()
    for key, value in settings.items():
        assert key != _SETTINGS_KEY
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        chunks.add_text(key, text.encode("utf-8", "replace").decode())
    chunks.add_text(_SETTINGS_KEY, json.dumps(dict(settings), allow_nan=False))
    if is_generated:
        chunks.add_text("Software", "wuerstchen")
        chunks.add_text("Source", "drawn by a generative model")
        chunks.add_itxt("XML:com.adobe.xmp", _XMP)
    with _temporary(path, image, "PNG", {"pnginfo": chunks}) as temporary:
        yield temporary


@contextlib.contextmanager
def _temporary(path: Path, image: Image.Image, format: str, options: Mapping[str, Any]) -> Iterator[Path]:
    """The image in a temporary file in the folder of ``path``, which is removed afterwards.

    Raises ``UserError`` if it cannot be written, or moved to ``path`` in the block.
    """
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            image.save(file, format, **options)
        yield temporary
    except OSError as error:
        raise UserError(
            f"path {str(path)!r} cannot be written ({error.strerror or error}). "
            "Choose a file in an existing, writable folder."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def read_settings(path: Path | str) -> dict[str, Any]:
    """The settings in a PNG by ``save_png``. Raises ``DataError`` if ``path`` is not one."""
    check_file(path)
    with pillow_errors(path), open_any(path, ["PNG"]) as image:
        text = image.info.get(_SETTINGS_KEY)
    if text is None:
        raise bad_image(path, "it contains no settings", "use a PNG saved by wuerstchen")
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise bad_image(
            path, "its settings are not JSON", "use an unchanged PNG saved by wuerstchen"
        ) from error
    if not isinstance(settings, dict):
        raise bad_image(path, "its settings are not an object", "use an unchanged PNG saved by wuerstchen")
    return settings

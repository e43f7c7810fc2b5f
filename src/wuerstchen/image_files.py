"""Images and their settings in files: written whole, read within bounds."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from wuerstchen.errors import UserError
from wuerstchen.images import bad_image, check_file, pillow_errors
from wuerstchen.png_text import open_any

_SETTINGS_KEY = "wuerstchen"
MADE_BY_A_MODEL = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's word for it, DigitalSourceType."""
_XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
    'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
    'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    f'Iptc4xmpExt:DigitalSourceType="{MADE_BY_A_MODEL}"/></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)


def check_writable(folder: Path | str) -> None:
    """Make ``folder`` if it is missing, and raise ``UserError`` now if no file can be written into it."""
    folder = Path(folder)
    probe = folder / f".{secrets.token_hex(4)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"folder {str(folder)!r}: it cannot be written ({error.strerror or error})."
            " Choose one that you may write to."
        ) from error


def save_png(
    image: Image.Image, path: Path | str, settings: Mapping[str, Any], *, drawn_by_a_model: bool = False
) -> None:
    """Write ``image`` as PNG with ``settings`` (whatever JSON can hold) in its text chunks.

    Each setting is a chunk under its own name, for people and other programs to read; all together, with
    their types, are JSON in the chunk "wuerstchen", for ``read_settings``. With ``drawn_by_a_model`` the file
    says so too: in the chunks Software and Source, and in XMP by IPTC's DigitalSourceType. The file appears
    under its name only when it is whole, and replaces one that is there. Raises ``UserError`` if it cannot be
    written.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise UserError(f"path {str(path)!r}: a PNG is written. End the name in .png.")
    with _written(image, path, settings, drawn_by_a_model) as temporary:
        os.replace(temporary, path)


def save_new_png(
    image: Image.Image,
    folder: Path,
    stem: str,
    settings: Mapping[str, Any],
    *,
    drawn_by_a_model: bool = False,
) -> Path:
    """``save_png`` under a free name: ``stem.png`` in ``folder``, else ``stem-2.png`` and so on.

    No file that is there is replaced, even if several processes write into the folder at once. Returns the
    path.
    """
    path, number = folder / f"{stem}.png", 1
    with _written(image, path, settings, drawn_by_a_model) as temporary:
        while not _placed(temporary, path):
            number += 1
            path = folder / f"{stem}-{number}.png"
    return path


def _placed(temporary: Path, path: Path) -> bool:
    """Gives a whole file its name, unless that is taken."""
    try:
        os.link(temporary, path)
        return True
    except FileExistsError:
        return False
    except OSError:  # no hard links here: the name is taken by an empty file first
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        os.replace(temporary, path)
        return True


@contextlib.contextmanager
def _written(
    image: Image.Image, path: Path, settings: Mapping[str, Any], drawn_by_a_model: bool
) -> Iterator[Path]:
    """The image in a temporary file beside ``path``, which is gone afterwards."""
    chunks = PngInfo()
    for key, value in settings.items():
        assert key != _SETTINGS_KEY
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        chunks.add_text(key, text.encode("utf-8", "replace").decode())
    chunks.add_text(_SETTINGS_KEY, json.dumps(dict(settings), allow_nan=False))
    if drawn_by_a_model:
        chunks.add_text("Software", "wuerstchen")
        chunks.add_text("Source", "drawn by a generative model")
        chunks.add_itxt("XML:com.adobe.xmp", _XMP)
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            image.save(file, "PNG", pnginfo=chunks)
        yield temporary
    except OSError as error:
        raise UserError(
            f"path {str(path)!r}: it cannot be written ({error.strerror or error})."
            " Choose a file in a folder that exists and that you may write to."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def read_settings(path: Path | str) -> dict[str, Any]:
    """The settings that ``save_png`` wrote. Raises ``DataError`` if ``path`` is no PNG or holds none."""
    check_file(path)
    with pillow_errors(path), open_any(path, ["PNG"]) as image:
        text = image.info.get(_SETTINGS_KEY)
    if text is None:
        raise bad_image(path, "it holds no settings", "give a PNG that wuerstchen saved")
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise bad_image(path, "its settings are not JSON", "give a PNG as wuerstchen saved it") from error
    if not isinstance(settings, dict):
        raise bad_image(path, "its settings are not an object", "give a PNG as wuerstchen saved it")
    return settings

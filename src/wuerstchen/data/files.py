"""Safe reading of untrusted files: only regular files, and only up to a limit.

A caption file can be a FIFO, on which a reader blocks forever, or a link to an endless device.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from wuerstchen.errors import DataError

MAX_TEXT = 1 << 20
"""Largest size in bytes of a caption file, or of the metadata of one image."""
_OBJECT = '{"text": "a cat"}'


def open_file(path: Path, name: str | None = None) -> BinaryIO:
    """Opens ``path`` for reading without blocking. Messages call it ``name``.

    Raises ``DataError`` if it is missing, cannot be read, or is not a regular file. Links to regular files
    are followed.
    """
    shown = repr(str(path) if name is None else name)
    try:
        # Opening a FIFO without O_NONBLOCK blocks until there is a writer. Regular files ignore the flag.
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(
            f"File {shown} cannot be read ({reason}). Restore it, or change its permissions."
        ) from error
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise DataError(f"File {shown} is not a regular file. Replace it with one, or remove it.")
    return open(number, "rb")


def read_file(path: Path, most: int, name: str | None = None) -> bytes:
    """All bytes of a regular file.

    Raises ``DataError`` as ``open_file`` does, and for files of more than ``most`` bytes.
    """
    with open_file(path, name) as file:
        try:
            data = file.read(most + 1)
        except OSError as error:
            shown = repr(str(path) if name is None else name)
            raise DataError(f"File {shown} cannot be read ({error.strerror}). Download it again.") from error
    if len(data) > most:
        raise too_large(str(path) if name is None else name, most)
    return data


def read_text(path: Path, name: str, most: int = MAX_TEXT) -> str:
    """Reads a text file in UTF-8, with or without a byte order mark.

    Raises ``DataError`` as ``read_file`` does, and for text in other encodings.
    """
    data = read_file(path, most, name)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(name, data[: error.start].count(b"\n") + 1) from error


def parse_object(text: str, where: str) -> dict[str, Any]:
    """Parses a JSON object. Raises ``DataError`` with a message that begins with ``where``."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:  # deep nesting raises RecursionError
        raise DataError(
            f"{where} is not valid JSON ({error}). Write one object, such as {_OBJECT}."
        ) from error
    if not isinstance(fields, dict):
        raise DataError(f"{where} is not a JSON object. Write one, such as {_OBJECT}.")
    return fields


def too_large(name: str, most: int) -> DataError:
    size = f"{most >> 20} MiB" if most >= 1 << 20 else f"{most} bytes"
    return DataError(f"File {name!r} is too large. It may have at most {size}. Shorten it.")


def not_utf8(name: str, line: int) -> DataError:
    return DataError(f"File {name!r} is not UTF-8 in line {line}. Save it in UTF-8.")

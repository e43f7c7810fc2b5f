"""Files that other people made: opened only if they are regular files, and read up to a limit.

A caption file can be a FIFO, which a reader waits on for ever, or a link to an endless device.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from wuerstchen.errors import DataError

MAX_TEXT = 1 << 20
"""Bytes of a caption file, or of the metadata of one image."""


def open_file(path: Path, name: str | None = None) -> BinaryIO:
    """``path`` opened for reading; messages call it ``name``.

    Raises ``DataError`` if it is missing, not a regular file (links to regular files are followed), or may
    not be read. Never waits.
    """
    shown = repr(str(path) if name is None else name)
    try:
        # Opening a FIFO without O_NONBLOCK waits for a writer. Regular files ignore the flag.
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(
            f"file {shown} is wrong because it cannot be read ({reason});"
            " put it back, or change its permissions"
        ) from error
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise DataError(
            f"file {shown} is wrong because it is no regular file; replace it with one, or remove it"
        )
    return open(number, "rb")


def read_file(path: Path, most: int, name: str | None = None) -> bytes:
    """All bytes of a regular file. Raises ``DataError`` as ``open_file`` does, and for more than ``most``."""
    with open_file(path, name) as file:
        try:
            data = file.read(most + 1)
        except OSError as error:
            shown = repr(str(path) if name is None else name)
            raise DataError(
                f"file {shown} is wrong because it cannot be read ({error.strerror}); fetch it again"
            ) from error
    if len(data) > most:
        raise too_large(str(path) if name is None else name, most)
    return data


def read_text(path: Path, name: str, most: int = MAX_TEXT) -> str:
    """A text file in UTF-8, with or without a byte order mark. Raises ``DataError`` as ``read_file`` does."""
    data = read_file(path, most, name)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(name, data[: error.start].count(b"\n") + 1) from error


def parse_object(text: str, where: str) -> dict[str, Any]:
    """The JSON object in ``text``. Raises ``DataError`` that begins with ``where``."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:  # the latter for deep nesting
        raise DataError(
            f"{where} is wrong because it is not JSON ({error}); write one object a line"
        ) from error
    if not isinstance(fields, dict):
        raise DataError(f"{where} is wrong because it is not a JSON object; write one object a line")
    return fields


def too_large(name: str, most: int) -> DataError:
    size = f"{most >> 20} MiB" if most >= 1 << 20 else f"{most} bytes"
    return DataError(f"file {name!r} is wrong because it has over {size}; shorten it")


def not_utf8(name: str, line: int) -> DataError:
    return DataError(f"file {name!r} is wrong because line {line} is not UTF-8; save it in UTF-8")

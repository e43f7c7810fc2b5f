"""What every reader of captioned pictures yields and offers, and what readers share."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from wuerstchen.data.files import MAX_TEXT, open_file
from wuerstchen.data.filters import FIELDS, Tally
from wuerstchen.errors import DataError

TEXT_COLUMNS = ("text", "caption", "TEXT", "txt", "prompt")
MAX_IMAGE = 1 << 28
"""Bytes of a picture file."""
_END = 1 << 14  # bytes at either end of a file that its fingerprint reads
_SHOWN = 30  # names of columns that a message lists


@dataclass(frozen=True)
class Item:
    """A captioned picture in its source."""

    name: str
    captions: tuple[str, ...]
    fields: Mapping[str, Any]
    """What the source says about it, under the names of ``filters.FIELDS``."""
    place: tuple[int, int, int]
    """Where its bytes are; what the numbers mean is the reader's affair."""


@runtime_checkable
class Reader(Protocol):
    """A source of captioned pictures."""

    def items(self, tally: Tally) -> Iterator[Item]:
        """All pictures that have a caption, in the same order every time; others are counted in ``tally``."""
        ...

    def read(self, name: str, place: tuple[int, int, int]) -> bytes:
        """The bytes of the picture file. Raises ``DataError`` if they cannot be had."""
        ...

    def fingerprint(self) -> str:
        """A hash that changes when files are added, removed or replaced.

        It is fast because it reads names, sizes and little more, so a change inside a file can go unnoticed.
        """
        ...


class NotDownloaded(DataError):
    """A cell that holds no picture, as lists keep them of downloads that failed."""


def bytes_of(path: Path, offset: int, size: int, name: str) -> bytes:
    """At most ``size`` bytes of a regular file, of the picture ``name``. Raises ``DataError``."""
    try:
        with open_file(path) as stream:
            stream.seek(offset)
            return stream.read(size)
    except (OSError, DataError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"image {name!r} is wrong because {path} cannot be read ({reason}); put it back"
        ) from error


def fingerprint_of(files: list[Path]) -> str:
    """Of names, sizes, and the bytes at both ends."""
    digest = hashlib.sha256()
    for path in files:
        with open_file(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            digest.update(json.dumps([path.name, size]).encode() + stream.read(_END))
            # Tars are padded, so other members may have the same size in all; parquet describes itself here.
            stream.seek(max(0, size - _END))
            digest.update(stream.read(_END))
    return digest.hexdigest()


def known_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Those that filters read."""
    return {name: fields[name] for name in FIELDS if fields.get(name) is not None}


def text_in(fields: Mapping[str, Any]) -> Any:
    """The caption, under the first of the usual names that is there."""
    return next((fields[name] for name in TEXT_COLUMNS if fields.get(name) is not None), None)


def captions_in(value: Any) -> tuple[str, ...]:
    """The captions in a cell: a text or a list of them, without those that are empty, no Unicode, or longer
    than a mebibyte."""
    found = []
    for caption in value if isinstance(value, list | tuple) else [value]:
        try:
            text = caption.decode() if isinstance(caption, bytes) else caption  # a column of binary strings
            if not isinstance(text, str) or len(text) > MAX_TEXT:
                continue
            words = " ".join(text.split())
            words.encode()
        except UnicodeError:
            continue
        if words:
            found.append(words)
    return tuple(dict.fromkeys(found))


def column_of(where: str, names: list[str], asked: str | None, usual: tuple[str, ...], kind: str) -> str:
    """The column of images or texts: the one that is asked for, or the first of the usual names."""
    if asked is not None:
        if asked in names:
            return asked
        raise no_column(where, asked, names)
    for name in usual:
        if name in names:
            return name
    raise DataError(
        f"{where} is wrong because none of its columns ({listed(names)}) is called {', '.join(usual)};"
        f" name it with --{kind}-column"
    )


def no_column(where: str, asked: str, names: list[str]) -> DataError:
    return DataError(f"{where} is wrong because it has no column {asked!r}; its columns are {listed(names)}")


def listed(names: list[str]) -> str:
    """The first names, to be shown."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(name[:80] for name in names[:_SHOWN]) or "none") + more

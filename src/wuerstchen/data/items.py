"""The interface of readers of captioned images, and helpers that readers share."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from wuerstchen.data.files import MAX_TEXT, open_file
from wuerstchen.data.filters import FIELDS, Tally
from wuerstchen.errors import DataError

TEXT_COLUMNS = ("text", "caption", "TEXT", "txt", "prompt")
MAX_IMAGE = 1 << 28
"""Largest size of an image file, in bytes."""
_END = 1 << 14  # bytes at each end of a file that go into its fingerprint
_SHOWN = 30  # column names in a message


@dataclass(frozen=True)
class Item:
    """A captioned image in its source."""

    name: str
    captions: tuple[str, ...]
    fields: Mapping[str, Any]
    """Metadata, with the keys of ``filters.FIELDS``."""
    place: tuple[int, int, int]
    """Where its bytes are. Only the reader knows what the numbers mean."""
    groups: tuple[int, ...] = ()
    """How many captions are from each column, if the reader was given several."""


@runtime_checkable
class Reader(Protocol):
    """Lists captioned images in order, and reads the file of any of them."""

    def items(self, tally: Tally) -> Iterator[Item]:
        """All images that have a caption, always in the same order. Others are counted in ``tally``."""
        ...

    def read(self, name: str, place: tuple[int, int, int]) -> bytes:
        """The bytes of the image file. Raises ``DataError`` if they cannot be read."""
        ...

    def fingerprint(self) -> str:
        """A hash that changes when files are added, removed or replaced.

        It reads little more than names and sizes. This is fast, but can miss a change inside a file.
        """
        ...


class NotDownloaded(DataError):
    """The cell of an image is empty. Lists of downloads contain such cells for failed downloads."""


def bytes_of(path: Path, offset: int, size: int, name: str) -> bytes:
    """Up to ``size`` bytes of the image ``name`` in a regular file. Raises ``DataError``."""
    try:
        with open_file(path) as stream:
            stream.seek(offset)
            return stream.read(size)
    except (OSError, DataError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"Image {name!r} cannot be read from {path} ({reason}). Restore the file, or remove the image."
        ) from error


def fingerprint_of(files: list[Path]) -> str:
    """A hash of the names, sizes, and first and last bytes of files."""
    digest = hashlib.sha256()
    for path in files:
        with open_file(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            digest.update(json.dumps([path.name, size]).encode() + stream.read(_END))
            # Padding can give different tars the same size. Parquet keeps its metadata at the end.
            stream.seek(max(0, size - _END))
            digest.update(stream.read(_END))
    return digest.hexdigest()


def known_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that filters read."""
    return {name: fields[name] for name in FIELDS if fields.get(name) is not None}


def text_in(fields: Mapping[str, Any]) -> Any:
    """The caption, from the first of ``TEXT_COLUMNS`` that is present."""
    return next((fields[name] for name in TEXT_COLUMNS if fields.get(name) is not None), None)


def captions_in(value: Any) -> tuple[str, ...]:
    """The captions in a cell, which is a string or a list of strings.

    Captions that are empty, not valid Unicode, or longer than 1 MiB are left out.
    """
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


def captions_of(values: Iterable[Any]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The captions in the cells of several columns, and how many are from each."""
    found = [captions_in(value) for value in values]
    return tuple(itertools.chain.from_iterable(found)), tuple(map(len, found))


def column_of(
    where: str, names: list[str], requested: str | None, defaults: tuple[str, ...], kind: str
) -> str:
    """The column of images or texts: the requested one, or the first of the default names."""
    if requested is not None:
        if requested in names:
            return requested
        raise no_column(where, requested, names)
    for name in defaults:
        if name in names:
            return name
    raise DataError(
        f"{where} has no {kind} column: {listed(names)}. It must be one of {', '.join(defaults)}. Name"
        f" another one with --{kind}-column."
    )


def no_column(where: str, requested: str, names: list[str]) -> DataError:
    return DataError(f"{where} has no column {requested!r}. Its columns are: {listed(names)}.")


def listed(names: list[str]) -> str:
    """The first names, for a message."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(name[:80] for name in names[:_SHOWN]) or "none") + more

"""Reader of WebDataset shards: tars of images with their captions and metadata."""

import os
import tarfile
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

from wuerstchen.data.files import MAX_TEXT, open_file, parse_object
from wuerstchen.data.filters import Tally
from wuerstchen.data.items import (
    MAX_IMAGE,
    Item,
    bytes_of,
    captions_in,
    captions_of,
    fingerprint_of,
    known_fields,
    no_column,
    text_in,
)
from wuerstchen.errors import DataError

IMAGES = ("jpeg", "jpg", "png", "webp", "jfif", "jpe", "avif", "bmp", "gif", "ppm", "tif", "tiff")
"""Extensions of images, in order of preference."""

_BLOCK = 512  # bytes of a block in a tar
_MAX_HEADER = 1 << 20  # bytes of a header with its long names and pax records
_MAX_NAME = 4096  # characters of a member's name
_MAX_GLOBAL = 1000  # global pax records
_MAX_MEMBERS = 1 << 22  # in a shard, because their names and places are kept in memory


@dataclass
class _Sample:
    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Offset and size of the data of each extension."""


@dataclass
class _Seen:
    """What has appeared in the samples so far, to detect columns that do not exist."""

    image: bool = False
    texts: set[str] = field(default_factory=set)
    """Columns of captions that have appeared."""
    extensions: dict[str, None] = field(default_factory=dict)
    fields: dict[str, None] = field(default_factory=dict)


class TarReader:
    """Samples from tars. The members with the same key form a sample, in any order.

    The key is a member's name up to the first dot of its last part. A sample has an image, a caption in
    ``.txt``, in the fields ``caption`` or ``text`` of its ``.json``, or in ``.caption``, and metadata in
    ``.json``. ``image_column`` chooses the extension of the images instead ("png", "seg.png"), and
    ``text_column`` the extension of the captions, or a field of ``.json``. A column that no sample of the
    first shard has is an error.

    Members outside of samples are ignored: folders, hidden files such as those of macOS (``._0001.jpg``), and
    names without an extension. Links, special files, absolute names and names with ``..`` are also ignored,
    but counted and named. A truncated shard is used up to the cut, without a last sample that may be
    incomplete.
    """

    def __init__(
        self,
        files: list[Path],
        image_column: str | None = None,
        text_column: str | None = None,
        text_columns: tuple[str, ...] = (),
    ) -> None:
        """``text_columns`` are several columns of captions, in place of ``text_column``."""
        self.files = files
        self.image_column = image_column
        self.text_columns = text_columns or (() if text_column is None else (text_column,))
        self._is_grouped = bool(text_columns)

    def items(self, tally: Tally) -> Iterator[Item]:
        seen = _Seen()
        for number, path in enumerate(self.files):
            with open_file(path) as stream:
                samples = _samples(path, stream, tally)
                for sample in samples:
                    item = self._item(number, path, sample, stream, tally, seen)
                    if item is not None:
                        yield item
            if samples:
                self._check_columns(path, seen)

    def read(self, name: str, place: tuple[int, int, int]) -> bytes:
        file, offset, size = place
        data = bytes_of(self.files[file], offset, size, name)
        if len(data) < size:
            raise DataError(f"Image {name!r} is truncated in {self.files[file]}. Download the file again.")
        return data

    def fingerprint(self) -> str:
        return fingerprint_of(self.files)

    def _check_columns(self, path: Path, seen: _Seen) -> None:
        if self.image_column is not None and not seen.image:
            raise no_column(str(path), self.image_column, list(seen.extensions))
        for column in self.text_columns:
            if column not in seen.texts:
                raise no_column(str(path), column, [*seen.extensions, *seen.fields])

    def _item(
        self, number: int, path: Path, sample: _Sample, stream: BinaryIO, tally: Tally, seen: _Seen
    ) -> Item | None:
        # tarfile decodes names that are not UTF-8 to lone surrogates.
        name = f"{path.name}:{sample.key}".encode(errors="backslashreplace").decode()
        members = sample.members
        seen.extensions.update(dict.fromkeys(members))
        images = IMAGES if self.image_column is None else (self.image_column.lower(),)
        image = next((members[extension] for extension in images if extension in members), None)
        if image is None:
            tally.drop("no image")
            return None
        seen.image = True
        if image[1] > MAX_IMAGE:
            tally.damage("damaged image", name, f"it is larger than {MAX_IMAGE >> 20} MiB")
            return None
        try:
            captions, groups, fields = self._texts(members, stream, seen)
        except DataError as error:
            tally.damage("bad text", name, str(error))
            return None
        if not captions:
            tally.drop("no caption")
            return None
        return Item(name, captions, known_fields(fields), (number, *image), groups)

    def _texts(
        self, members: dict[str, tuple[int, int]], stream: BinaryIO, seen: _Seen
    ) -> tuple[tuple[str, ...], tuple[int, ...], Mapping[str, Any]]:
        """Captions of a sample, how many are from each column, and its metadata. Raises ``DataError`` if they
        cannot be read."""

        def text(extension: str) -> str | None:
            return _text_of(members[extension], extension, stream) if extension in members else None

        json_text = text("json")
        fields = {} if json_text is None else parse_object(json_text, "its .json")
        seen.fields.update(dict.fromkeys(list(fields)[:100]) if len(seen.fields) < 1000 else {})
        if not self.text_columns:
            found = text("txt")
            if found is None:
                found = text_in(fields)
            if found is None:
                found = text("caption")
            return captions_in(found), (), fields
        values = []
        for column in self.text_columns:
            value = text(column.lower())
            values.append(fields.get(column) if value is None else value)
            seen.texts |= {column} if values[-1] is not None else set()
        captions, groups = captions_of(values)
        return captions, groups if self._is_grouped else (), fields


class _Headers:
    """A stream for tarfile with a limit on headers, which it would otherwise read into memory at any size."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.seek = stream.seek
        self.tell = stream.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError("a header is too large")
        return self.stream.read(size)


def _samples(path: Path, stream: BinaryIO, tally: Tally) -> list[_Sample]:
    """Reads the samples of a shard from its headers."""
    length = os.fstat(stream.fileno()).st_size
    samples: list[_Sample] = []
    latest: dict[str, _Sample] = {}
    last: _Sample | None = None  # the sample of the previous member
    offset = count = 0
    complete = False
    try:
        with tarfile.open(fileobj=_Headers(stream), mode="r:") as tar:  # type: ignore[arg-type]
            for member in tar:
                tar.members = []  # otherwise tarfile keeps them all
                key, extension = _key_of(member.name)
                if member.isreg() and member.offset_data + member.size > length:
                    last = last if last is not None and _same(last.key) == _same(key) else None
                    break
                count += 1
                if count > _MAX_MEMBERS or len(tar.pax_headers) > _MAX_GLOBAL:
                    tally.damage(
                        "shard too long",
                        str(path),
                        f"it has more than {_MAX_MEMBERS} members or {_MAX_GLOBAL} global records, and is"
                        f" read up to byte {offset} of {length}; split it",
                    )
                    return samples
                offset = tar.offset
                if member.isdir() or not _is_safe(path, member, tally) or not extension:
                    continue
                sample = latest.get(_same(key))
                if sample is not None and extension in sample.members:
                    if sample is last:
                        tally.damage("member twice", f"{path}: {member.name}", "the name appears twice")
                        continue
                    sample = None  # concatenated tars can repeat keys
                if sample is None:
                    sample = latest[_same(key)] = _Sample(key)
                    samples.append(sample)
                sample.members[extension] = (member.offset_data, member.size)
                last = sample
            else:
                # tarfile stops at a damaged header. A complete shard ends in zeros.
                stream.seek(offset := tar.offset)
                end = stream.read(_BLOCK)
                complete = len(end) == _BLOCK and not end.strip(b"\0")
    except (tarfile.TarError, EOFError, ValueError, OverflowError, MemoryError, OSError, RecursionError):
        pass  # headers that are truncated, damaged, point before the file's beginning, or nest too deeply
    if not complete:
        tally.damage("shard cut short", str(path), f"it is truncated or damaged at byte {offset} of {length}")
        return [sample for sample in samples if sample is not last]
    return samples


def _is_safe(path: Path, member: tarfile.TarInfo, tally: Tally) -> bool:
    name = member.name
    if not member.isreg() or member.sparse is not None:
        kind = "link" if member.issym() or member.islnk() else "special file"
        tally.damage(f"member is a {kind}", f"{path}: {name}", f"it is a {kind}, not a regular file")
        return False
    if len(name) > _MAX_NAME:
        tally.damage(
            "member with a long name", f"{path}: {name}", f"its name is longer than {_MAX_NAME} characters"
        )
        return False
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or PureWindowsPath(name).anchor or ".." in parts.parts:
        tally.damage("member leads out", f"{path}: {name}", "its name points outside the shard")
        return False
    return True


def _key_of(name: str) -> tuple[str, str]:
    """The key and the extension of a member's name. The extension is empty outside of samples."""
    place = PurePosixPath(name)
    stem, _, extension = place.name.partition(".")
    return (str(place.with_name(stem)), extension.lower()) if stem else (name, "")


def _same(key: str) -> str:
    """The key in the Unicode normal form for comparisons: macOS decomposes "é" into "e" and an accent."""
    return key if key.isascii() else unicodedata.normalize("NFC", key)


def _text_of(place: tuple[int, int], extension: str, stream: BinaryIO) -> str:
    offset, size = place
    if size > MAX_TEXT:
        raise DataError(f"its .{extension} is larger than the limit of {MAX_TEXT >> 20} MiB. Shorten it.")
    stream.seek(offset)
    try:
        return stream.read(size).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"its .{extension} is not UTF-8.") from error

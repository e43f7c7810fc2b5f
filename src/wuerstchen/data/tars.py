"""WebDataset shards: tars of images with captions and metadata beside them."""

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
    fingerprint_of,
    known_fields,
    no_column,
    text_in,
)
from wuerstchen.errors import DataError

IMAGES = ("jpeg", "jpg", "png", "webp", "jfif", "jpe", "avif", "bmp", "gif", "ppm", "tif", "tiff")
"""Extensions of images, the first that a sample has counts."""

_BLOCK = 512  # of a tar
_MAX_HEADER = 1 << 20  # bytes that one header may take: long names, pax records
_MAX_NAME = 4096  # characters of a member's name
_MAX_GLOBAL = 1000  # pax records that hold for all members
_MAX_MEMBERS = 1 << 22  # of a shard: their names and places are kept in memory


@dataclass
class _Sample:
    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Offset and size of the data by extension."""


@dataclass
class _Seen:
    """What the samples so far have had, to tell a column that does not exist."""

    image: bool = False
    text: bool = False
    extensions: dict[str, None] = field(default_factory=dict)
    fields: dict[str, None] = field(default_factory=dict)


class TarReader:
    """Members of one key are a sample, in whatever order they come; samples come as they begin.

    The key is a member's name up to the first dot of its last part. A sample has an image, a caption in
    ``.txt``, under ``caption`` or ``text`` of its ``.json``, or in ``.caption``, and metadata in ``.json``.
    ``image_column`` is the extension of the images instead ("png", "seg.png"), ``text_column`` that of the
    captions, or else a field of ``.json``. A column that no sample of the first shard has is refused.

    Members that are no part of a sample are passed over: folders, hidden files as macOS adds them
    (``._0001.jpg``), names without an extension. So are, counted and named, links, other things that are no
    file, and names that are absolute or climb by ``..``. Of a shard that is cut short what comes before the
    cut is used, but for a last sample that may lack members.
    """

    def __init__(
        self, files: list[Path], image_column: str | None = None, text_column: str | None = None
    ) -> None:
        self.files = files
        self.image_column = image_column
        self.text_column = text_column

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
            raise DataError(f"image {name!r} is wrong because {self.files[file]} ends in it; fetch it again")
        return data

    def fingerprint(self) -> str:
        return fingerprint_of(self.files)

    def _check_columns(self, path: Path, seen: _Seen) -> None:
        if self.image_column is not None and not seen.image:
            raise no_column(str(path), self.image_column, list(seen.extensions))
        if self.text_column is not None and not seen.text:
            raise no_column(str(path), self.text_column, [*seen.extensions, *seen.fields])

    def _item(
        self, number: int, path: Path, sample: _Sample, stream: BinaryIO, tally: Tally, seen: _Seen
    ) -> Item | None:
        # A lone surrogate is what tarfile makes of a name that is not UTF-8.
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
            tally.damage("damaged image", name, f"it has over {MAX_IMAGE >> 20} MiB")
            return None
        try:
            captions, fields = self._texts(members, stream, seen)
        except DataError as error:
            tally.damage("bad text", name, str(error))
            return None
        if not captions:
            tally.drop("no caption")
            return None
        return Item(name, captions, known_fields(fields), (number, *image))

    def _texts(
        self, members: dict[str, tuple[int, int]], stream: BinaryIO, seen: _Seen
    ) -> tuple[tuple[str, ...], Mapping[str, Any]]:
        """Captions and metadata of a sample. Raises ``DataError`` for what cannot be read."""

        def text(extension: str) -> str | None:
            return _text_of(members[extension], extension, stream) if extension in members else None

        json_text = text("json")
        fields = {} if json_text is None else parse_object(json_text, "its .json")
        seen.fields.update(dict.fromkeys(list(fields)[:100]) if len(seen.fields) < 1000 else {})
        if self.text_column is None:
            found = text("txt")
            if found is None:
                found = text_in(fields)
            if found is None:
                found = text("caption")
        else:
            found = text(self.text_column.lower())
            if found is None:
                found = fields.get(self.text_column)
            seen.text |= found is not None
        return captions_in(found), fields


class _Headers:
    """What tarfile reads headers from: it would read a header of any size into memory."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.seek = stream.seek
        self.tell = stream.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError("a header is too large")
        return self.stream.read(size)


def _samples(path: Path, stream: BinaryIO, tally: Tally) -> list[_Sample]:
    """The samples of a shard, from its headers alone."""
    length = os.fstat(stream.fileno()).st_size
    samples: list[_Sample] = []
    latest: dict[str, _Sample] = {}
    last: _Sample | None = None  # the one that the member before belongs to
    offset = count = 0
    whole = False
    try:
        with tarfile.open(fileobj=_Headers(stream), mode="r:") as tar:  # type: ignore[arg-type]
            for member in tar:
                tar.members = []  # tarfile would keep them all
                key, extension = _key_of(member.name)
                if member.isreg() and member.offset_data + member.size > length:
                    last = last if last is not None and _same(last.key) == _same(key) else None
                    break
                count += 1
                if count > _MAX_MEMBERS or len(tar.pax_headers) > _MAX_GLOBAL:
                    tally.damage(
                        "shard too long",
                        str(path),
                        f"it has more than {_MAX_MEMBERS} members, or {_MAX_GLOBAL} records for all of them,"
                        f" and is read to byte {offset} of {length}; split it",
                    )
                    return samples
                offset = tar.offset
                if member.isdir() or not _is_safe(path, member, tally) or not extension:
                    continue
                sample = latest.get(_same(key))
                if sample is not None and extension in sample.members:
                    if sample is last:
                        tally.damage("member twice", f"{path}: {member.name}", "the name is there already")
                        continue
                    sample = None  # tars that were put together can have the same keys
                if sample is None:
                    sample = latest[_same(key)] = _Sample(key)
                    samples.append(sample)
                sample.members[extension] = (member.offset_data, member.size)
                last = sample
            else:
                # A damaged header ends the shard for tarfile; a whole one ends in zeros.
                stream.seek(offset := tar.offset)
                end = stream.read(_BLOCK)
                whole = len(end) == _BLOCK and not end.strip(b"\0")
    except (tarfile.TarError, EOFError, ValueError, OverflowError, MemoryError, OSError, RecursionError):
        pass  # of a header that is cut or damaged, leads before the file's beginning, or follows on hundreds
    if not whole:
        tally.damage("shard cut short", str(path), f"it is cut short or damaged at byte {offset} of {length}")
        return [sample for sample in samples if sample is not last]
    return samples


def _is_safe(path: Path, member: tarfile.TarInfo, tally: Tally) -> bool:
    name = member.name
    if not member.isreg() or member.sparse is not None:
        kind = "link" if member.issym() or member.islnk() else "special file"
        tally.damage(f"member is a {kind}", f"{path}: {name}", f"it is a {kind} and no regular file")
        return False
    if len(name) > _MAX_NAME:
        tally.damage(
            "member with a long name", f"{path}: {name}", f"its name has over {_MAX_NAME} characters"
        )
        return False
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or PureWindowsPath(name).anchor or ".." in parts.parts:
        tally.damage("member leads out", f"{path}: {name}", "its name leads out of the shard")
        return False
    return True


def _key_of(name: str) -> tuple[str, str]:
    """Key and extension of a member's name; no extension if it is not one of a sample."""
    place = PurePosixPath(name)
    stem, _, extension = place.name.partition(".")
    return (str(place.with_name(stem)), extension.lower()) if stem else (name, "")


def _same(key: str) -> str:
    """What keys are compared by: macOS writes "e" and an accent where others write "é"."""
    return key if key.isascii() else unicodedata.normalize("NFC", key)


def _text_of(place: tuple[int, int], extension: str, stream: BinaryIO) -> str:
    offset, size = place
    if size > MAX_TEXT:
        raise DataError(f"its .{extension} has over {MAX_TEXT >> 20} MiB")
    stream.seek(offset)
    try:
        return stream.read(size).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"its .{extension} is not UTF-8") from error

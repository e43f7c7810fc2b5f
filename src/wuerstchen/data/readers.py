"""Captioned pictures as people keep them, one after the other and then by their places.

A reader first lists what there is (``items``: names, captions, metadata; no picture is decoded), and later
reads the bytes of any picture again (``read``), from any process and thread. What cannot be used is counted
and, where it is damage, named.
"""

import functools
import glob
import hashlib
import io
import json
import os
import tarfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from wuerstchen.checkpoints.hub import HUB_NAME
from wuerstchen.data.emoji import CENTRED, EmojiSource, sample_root
from wuerstchen.data.filters import FIELDS, Tally
from wuerstchen.data.folder import FolderSource
from wuerstchen.data.plan import VIEW, generator
from wuerstchen.errors import DataError, UserError

if TYPE_CHECKING:
    import datasets

Format = Literal["folder", "emoji", "webdataset", "parquet", "hub"]
TEXT_COLUMNS = ("text", "caption", "TEXT", "txt", "prompt")
IMAGE_COLUMNS = ("image", "jpg", "png", "webp", "jpeg")

_IMAGES = frozenset({"jpg", "jpeg", "png", "webp"})
_MAX_TEXT = 1 << 20  # bytes of a caption or of metadata: more is none
_MAX_IMAGE = 1 << 28  # bytes of a picture file
_BLOCK = 512  # of a tar
_END = 1 << 14  # bytes at either end of a file that its fingerprint reads
_ROWS = 1024  # rows of a column read at a time
_SIDE = 256  # of composed emoji, as large as the drawings themselves


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


def open_reader(
    source: str | Path,
    *,
    format: Format | None = None,
    split: str = "train",
    image_column: str | None = None,
    text_column: str | None = None,
) -> Reader:
    """The reader for ``source``: a folder of images, of ``.tar`` shards or of ``.parquet`` files, one such
    file, a pattern of them (``shards/*.tar``), a built emoji set, ``sample`` for the one in the package, or
    the name of a data set on the hub.

    ``format`` says which one where it cannot be told. ``split`` is of a set on the hub; the columns are of
    parquet files and of the hub. Raises ``DataError`` for what is none of these.
    """
    text = str(source)
    path = Path(source)
    if format is None:
        if text == "sample":
            format, path = "emoji", sample_root()
        elif (path / "index.jsonl").is_file():
            format = "emoji"
        elif path.is_dir():
            kinds = {suffix for suffix in (".tar", ".parquet") if any(path.glob(f"*{suffix}"))}
            if len(kinds) > 1:
                raise DataError(
                    f"data folder {text!r} is wrong because it holds both tars and parquet files;"
                    f" give '{text}/*.tar' or '{text}/*.parquet'"
                )
            format = {".tar": "webdataset", ".parquet": "parquet"}.get("".join(kinds), "folder")
        elif text.endswith(".tar"):
            format = "webdataset"
        elif text.endswith(".parquet"):
            format = "parquet"
        elif HUB_NAME.fullmatch(text) and ".." not in text:
            format = "hub"
        else:
            raise DataError(
                f"data {text!r} is wrong because it is neither a folder, tars, parquet files nor a name on"
                " the hub; give one of them (compressed tars are to be unpacked to .tar first)"
            )
    if format == "folder":
        return FolderReader(path)
    if format == "emoji":
        return EmojiReader(path)
    if format == "webdataset":
        return TarReader(_files(text, ".tar"))
    if format == "parquet":
        return ParquetReader(_files(text, ".parquet"), image_column, text_column)
    return DatasetReader.load(text, split, image_column, text_column)


def import_datasets() -> Any:
    """Hugging Face's ``datasets``. Raises ``UserError`` naming the extra if it is not installed."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            "the package datasets is missing, which prepared data is read and written with;"
            ' install it with: pip install "wuerstchen[data]"'
        ) from error
    return datasets


class FolderReader:
    """A folder by the rules of ``FolderSource``; metadata is what else ``metadata.jsonl`` says."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @functools.cached_property
    def _source(self) -> FolderSource:
        return FolderSource(self.root)

    def items(self, tally: Tally) -> Iterator[Item]:
        for item in range(len(self._source)):
            fields = _known(self._source.fields(item))
            yield Item(self._source.name(item), self._source.captions(item), fields, (0, 0, 0))

    def read(self, name: str, place: tuple[int, int, int]) -> bytes:
        path = self.root / name
        if not path.is_file():
            raise DataError(f"image {name!r} is wrong because it is no regular file; put it back")
        return _bytes_of(path, 0, _MAX_IMAGE + 1, name)

    def fingerprint(self) -> str:
        return self._source.fingerprint()


class EmojiReader:
    """The training part of a built emoji set, each picture composed ``views`` times, with as many captions.

    What is shown is a function of the set and of the number of the view alone.
    """

    def __init__(self, root: Path, views: int = 8) -> None:
        self.source = EmojiSource(root, split="train", centred=CENTRED)
        self.views = views

    def items(self, tally: Tally) -> Iterator[Item]:
        for item in range(len(self.source)):
            name = self.source.name(item)
            try:
                captions = self.source.captions(item, [self._rng(item, view) for view in range(self.views)])
            except DataError as error:
                tally.damage("damaged image", name, str(error))
                continue
            for view, caption in enumerate(captions):
                yield Item(f"{name}{VIEW}{view}", (caption,), {}, (item, view, 0))

    def read(self, name: str, place: tuple[int, int, int]) -> bytes:
        item, view, _ = place
        file = io.BytesIO()
        image = self.source.image(item, self._rng(item, view), _SIDE)
        Image.fromarray(image).save(file, "BMP")  # read again at once: nothing is gained by packing it
        return file.getvalue()

    def fingerprint(self) -> str:
        return f"{self.source.fingerprint()} {self.views}"

    def _rng(self, item: int, view: int) -> np.random.Generator:
        return generator(0, item * self.views + view, "view")


class TarReader:
    """WebDataset shards: members of one key, side by side, are a sample.

    The key is a member's name up to the first dot of its last part. A sample has an image (jpg, png or
    webp), a caption in ``.txt`` or under ``caption`` or ``text`` of its ``.json``, and metadata there.
    Links, other things that are no file, and names that are absolute or climb by ``..`` are skipped. Of a
    shard that is cut short what comes before the cut is used, but for a last sample that may lack members.
    """

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def items(self, tally: Tally) -> Iterator[Item]:
        for number, path in enumerate(self.files):
            yield from self._items_of(number, path, tally)

    def read(self, name: str, place: tuple[int, int, int]) -> bytes:
        file, offset, size = place
        data = _bytes_of(self.files[file], offset, size, name)
        if len(data) < size:
            raise DataError(f"image {name!r} is wrong because {self.files[file]} ends in it; fetch it again")
        return data

    def fingerprint(self) -> str:
        return _fingerprint(self.files)

    def _items_of(self, number: int, path: Path, tally: Tally) -> Iterator[Item]:
        with open_file(path) as stream:
            for key, members in self._samples(path, stream, tally):
                item = self._item(number, path, key, members, stream, tally)
                if item is not None:
                    yield item

    def _samples(
        self, path: Path, stream: BinaryIO, tally: Tally
    ) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
        """Keys with their members by extension."""
        length = os.fstat(stream.fileno()).st_size
        key, members = "", dict[str, tarfile.TarInfo]()
        offset, whole = 0, False
        try:
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                for member in tar:
                    tar.members = []  # tarfile would keep them all
                    found, extension = _key_of(member.name)
                    if found != key and members:
                        yield key, members
                        members = {}
                    if member.isreg() and member.offset_data + member.size > length:
                        break
                    offset = tar.offset
                    if member.isdir() or not self._is_safe(path, member, tally) or not extension:
                        continue
                    key = found
                    if extension in members:
                        tally.damage("member twice", f"{path}: {member.name}", "the name is there already")
                    else:
                        members[extension] = member
                else:
                    # A damaged header ends the shard for tarfile; a whole one ends in zeros.
                    stream.seek(offset := tar.offset)
                    end = stream.read(_BLOCK)
                    whole = len(end) == _BLOCK and not end.strip(b"\0")
        except (tarfile.TarError, EOFError, ValueError, OverflowError, MemoryError, OSError):
            pass  # of a header that is cut or damaged, or leads before the file's beginning
        if not whole:
            tally.damage(
                "shard cut short", str(path), f"it is cut short or damaged at byte {offset} of {length}"
            )
        elif members:
            yield key, members

    def _is_safe(self, path: Path, member: tarfile.TarInfo, tally: Tally) -> bool:
        name = member.name
        if not member.isreg() or member.sparse is not None:
            kind = "link" if member.issym() or member.islnk() else "special file"
            tally.damage(f"member is a {kind}", f"{path}: {name}", f"it is a {kind} and no regular file")
            return False
        parts = PurePosixPath(name.replace("\\", "/"))
        if parts.is_absolute() or PureWindowsPath(name).anchor or ".." in parts.parts:
            tally.damage("member leads out", f"{path}: {name}", "its name leads out of the shard")
            return False
        return True

    def _item(
        self,
        number: int,
        path: Path,
        key: str,
        members: dict[str, tarfile.TarInfo],
        stream: BinaryIO,
        tally: Tally,
    ) -> Item | None:
        # A lone surrogate is what tarfile makes of a name that is not UTF-8.
        name = f"{path.name}:{key}".encode(errors="backslashreplace").decode()
        image = next((members[extension] for extension in sorted(_IMAGES & members.keys())), None)
        if image is None:
            tally.drop("no image")
            return None
        if image.size > _MAX_IMAGE:
            tally.damage("damaged image", name, f"it has over {_MAX_IMAGE >> 20} MiB")
            return None
        texts: dict[str, str] = {}
        for extension in ("txt", "json"):
            member = members.get(extension)
            if member is None:
                continue
            if member.size > _MAX_TEXT:
                tally.damage("bad text", name, f"its .{extension} has over {_MAX_TEXT >> 20} MiB")
                return None
            stream.seek(member.offset_data)
            try:
                texts[extension] = stream.read(member.size).decode("utf-8-sig")
            except UnicodeDecodeError:
                tally.damage("bad text", name, f"its .{extension} is not UTF-8")
                return None
        fields: Mapping[str, Any] = {}
        if "json" in texts:
            try:
                fields = json.loads(texts["json"])
            except (ValueError, RecursionError) as error:
                tally.damage("bad text", name, f"its .json is not JSON ({str(error)[:100]})")
                return None
            if not isinstance(fields, dict):
                tally.damage("bad text", name, "its .json is no object")
                return None
        captions = _captions(texts["txt"] if "txt" in texts else _text_in(fields))
        if not captions:
            tally.drop("no caption")
            return None
        return Item(name, captions, _known(fields), (number, image.offset_data, image.size))


class ParquetReader:
    """Parquet files with a column of images (bytes, or Hugging Face's bytes and path) and one of captions.

    All other columns that the filters know are metadata. A file that cannot be read is left out.
    """

    def __init__(
        self, files: list[Path], image_column: str | None = None, text_column: str | None = None
    ) -> None:
        import_datasets()  # which brings pyarrow
        self.files = files
        self.image_column = image_column
        self.text_column = text_column
        self._lock = threading.Lock()
        self._group: tuple[tuple[int, int], Any] | None = None

    def items(self, tally: Tally) -> Iterator[Item]:
        import pyarrow as pa

        for number, path in enumerate(self.files):
            try:
                with self._open(path) as file:
                    columns = file.schema_arrow.names
                    _, text = self._columns(path, columns)
                    wanted = [text, *(name for name in FIELDS if name in columns)]
                    row = 0
                    for group in range(file.num_row_groups):
                        table = file.read_row_group(group, columns=wanted)
                        for position, fields in enumerate(table.to_pylist()):
                            captions = _captions(fields[text])
                            name = f"{path.name}:{row}"
                            row += 1
                            if captions:
                                yield Item(name, captions, _known(fields), (number, group, position))
                            else:
                                tally.drop("no caption")
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                tally.damage("file unreadable", str(path), " ".join(str(error).split())[:200])

    def read(self, name: str, place: tuple[int, int, int]) -> bytes:
        import pyarrow as pa

        number, group, position = place
        path = self.files[number]
        try:
            with self._lock:  # the next pictures are of the same group
                if self._group is None or self._group[0] != (number, group):
                    with self._open(path) as file:
                        image, _ = self._columns(path, file.schema_arrow.names)
                        column = file.read_row_group(group, columns=[image]).column(0)
                    self._group = (number, group), column
                value = self._group[1][position].as_py()
        except (pa.ArrowException, OSError, IndexError) as error:
            raise DataError(
                f"image {name!r} is wrong because it cannot be read ({error}); fetch it again"
            ) from error
        return _image_bytes(value, name)

    def fingerprint(self) -> str:
        return _fingerprint(self.files)

    def _open(self, path: Path) -> Any:
        import pyarrow.parquet

        return pyarrow.parquet.ParquetFile(path)

    def _columns(self, path: Path, names: list[str]) -> tuple[str, str]:
        return (
            _column(str(path), names, self.image_column, IMAGE_COLUMNS, "image"),
            _column(str(path), names, self.text_column, TEXT_COLUMNS, "text"),
        )


class DatasetReader:
    """A map-style data set of Hugging Face's ``datasets``, with columns as in ``ParquetReader``."""

    def __init__(
        self, dataset: "datasets.Dataset", image_column: str | None = None, text_column: str | None = None
    ) -> None:
        datasets = import_datasets()
        names = dataset.column_names
        self.image = _column("data set", names, image_column, IMAGE_COLUMNS, "image")
        self.text = _column("data set", names, text_column, (*TEXT_COLUMNS, "json"), "text")
        self.key = dataset._fingerprint
        images = dataset.select_columns([self.image])
        if isinstance(dataset.features[self.image], datasets.Image):
            images = images.cast_column(self.image, datasets.Image(decode=False))
        self._images = images
        texts = [self.text, *(name for name in ("json", *FIELDS) if name in names and name != self.text)]
        self._texts = dataset.select_columns(texts)

    @classmethod
    def load(
        cls, name: str, split: str, image_column: str | None = None, text_column: str | None = None
    ) -> "DatasetReader":
        """The data set of that name on the hub, from its ordinary cache if it is there. No code is run."""
        datasets = import_datasets()
        try:
            dataset = datasets.load_dataset(name, split=split)
        except Exception as error:  # the library and the hub's client raise kinds of their own
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise DataError(
                f"data {name!r} is wrong because it is no path here and cannot be had from the hub"
                f" ({reason}); check name, split and network"
            ) from error
        return cls(dataset, image_column, text_column)

    def items(self, tally: Tally) -> Iterator[Item]:
        for start in range(0, len(self._texts), _ROWS):
            columns = self._texts[start : start + _ROWS]
            for position in range(len(columns[self.text])):
                row = {name: values[position] for name, values in columns.items()}
                # WebDataset tars, as the library reads them, keep the metadata together.
                inner = row.get("json")
                fields = {**inner, **row} if isinstance(inner, dict) else row
                value = row[self.text] if self.text != "json" else _text_in(fields)
                captions = _captions(value)
                if captions:
                    number = start + position
                    yield Item(f"row {number}", captions, _known(fields), (number, 0, 0))
                else:
                    tally.drop("no caption")

    def read(self, name: str, place: tuple[int, int, int]) -> bytes:
        try:
            value = self._images[place[0]][self.image]
        except Exception as error:
            raise DataError(
                f"image {name!r} is wrong because it cannot be read ({error}); fetch it again"
            ) from error
        return _image_bytes(value, name, local=True)

    def fingerprint(self) -> str:
        return str(self.key)


def open_file(path: Path) -> BinaryIO:
    """Open for reading. Raises ``DataError`` if that is refused."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(
            f"file {str(path)!r} is wrong because it cannot be read ({error.strerror}); change its"
            " permissions"
        ) from error


def _key_of(name: str) -> tuple[str, str]:
    """Key and extension of a member's name; no extension if it is not one of a sample."""
    place = PurePosixPath(name)
    stem, _, extension = place.name.partition(".")
    return (str(place.with_name(stem)), extension.lower()) if stem else (name, "")


def _files(pattern: str, suffix: str) -> list[Path]:
    path = Path(pattern)
    if path.is_file():
        return [path]
    names = path.glob(f"*{suffix}") if path.is_dir() else map(Path, glob.glob(pattern, recursive=True))
    files = sorted(name for name in names if name.is_file())
    if not files:
        raise DataError(f"data {pattern!r} is wrong because no {suffix} file is there; check the name")
    return files


def _fingerprint(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with open_file(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            digest.update(json.dumps([path.name, size]).encode() + stream.read(_END))
            # Tars are padded, so other members may have the same size in all; parquet describes itself here.
            stream.seek(max(0, size - _END))
            digest.update(stream.read(_END))
    return digest.hexdigest()


def _bytes_of(path: Path, offset: int, size: int, name: str) -> bytes:
    try:
        with open(path, "rb") as stream:
            stream.seek(offset)
            return stream.read(size)
    except OSError as error:
        raise DataError(
            f"image {name!r} is wrong because {path} cannot be read ({error.strerror}); put it back"
        ) from error


def _image_bytes(value: Any, name: str, *, local: bool = False) -> bytes:
    """The bytes in a cell: as they are, or as Hugging Face keeps them, ``local`` files by their path."""
    if isinstance(value, dict):
        path = value.get("path")
        if local and value.get("bytes") is None and isinstance(path, str):
            return _bytes_of(Path(path), 0, _MAX_IMAGE + 1, name)
        value = value.get("bytes")
    if not isinstance(value, bytes):
        raise DataError(f"image {name!r} is wrong because its cell holds no bytes; leave it out")
    return value


def _column(where: str, names: list[str], asked: str | None, usual: tuple[str, ...], kind: str) -> str:
    if asked is not None:
        if asked in names:
            return asked
        raise DataError(
            f"{where} is wrong because it has no column {asked!r}; its columns are {', '.join(names)}"
        )
    for name in usual:
        if name in names:
            return name
    raise DataError(
        f"{where} is wrong because none of its columns ({', '.join(names)}) is called {', '.join(usual)};"
        f" name it with --{kind}-column"
    )


def _known(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: fields[name] for name in FIELDS if fields.get(name) is not None}


def _text_in(fields: Mapping[str, Any]) -> Any:
    return next((fields[name] for name in TEXT_COLUMNS if fields.get(name) is not None), None)


def _captions(value: Any) -> tuple[str, ...]:
    """The captions in a cell: a text or a list of them, without those that are empty or no Unicode."""
    found = []
    for caption in value if isinstance(value, list | tuple) else [value]:
        try:
            text = caption.decode() if isinstance(caption, bytes) else caption  # a column of binary strings
            if not isinstance(text, str):
                continue
            words = " ".join(text.split())
            words.encode()
        except UnicodeError:
            continue
        if words:
            found.append(words)
    return tuple(dict.fromkeys(found))

"""Readers of parquet files and of Hugging Face ``datasets``, on the hub or saved to disk."""

import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wuerstchen.data.cards import check_card, check_regular, unavailable_reason
from wuerstchen.data.files import open_file
from wuerstchen.data.filters import FIELDS, Tally
from wuerstchen.data.items import (
    MAX_IMAGE,
    TEXT_COLUMNS,
    Item,
    NotDownloaded,
    bytes_of,
    captions_of,
    column_of,
    fingerprint_of,
    known_fields,
    text_in,
)
from wuerstchen.errors import DataError, UserError

if TYPE_CHECKING:
    import datasets

IMAGE_COLUMNS = ("image", "jpg", "png", "webp", "jpeg")

_ROWS = 1024  # rows of captions and metadata read at a time
_IMAGE_ROWS = 64  # rows of images read at a time
_KEPT = 8  # batches of images to keep, because threads ask for rows slightly out of order
_MAX_BATCH = 1 << 30  # bytes of a batch
MAX_GROUP = 1 << 29
"""Largest size in bytes of the images of a row group, if images are read in random order."""
_FREE_ROWS = 10_000_000  # rows that any file may claim; more need at least a bit per row


def import_datasets() -> Any:
    """Hugging Face's ``datasets``. Raises ``UserError`` naming the extra if it is not installed."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            "The package datasets is not installed. It reads and writes prepared data."
            ' Install it with: pip install "wuerstchen[data]"'
        ) from error
    return datasets


def open_parquet(path: Path) -> Any:
    """Opens a file as ``pyarrow.parquet.ParquetFile``.

    Raises ``DataError`` if it is not a regular file or claims more rows than it can contain, and one of
    ``damage()`` if it is damaged.
    """
    import pyarrow.parquet

    with open_file(path) as stream:
        size = os.fstat(stream.fileno()).st_size
    file = pyarrow.parquet.ParquetFile(path)
    if file.metadata.num_rows > _FREE_ROWS + 8 * size:
        file.close()
        raise DataError(
            f"File {str(path)!r} is damaged: it claims more rows than it can contain. Write it again."
        )
    return file


def damage() -> tuple[type[Exception], ...]:
    """The exceptions of pyarrow for damaged files, and of Python for values that it cannot represent."""
    import pyarrow as pa

    return (pa.ArrowException, OSError, ValueError, OverflowError)


def parquet_rows(path: Path, columns: Callable[[list[str]], list[str]]) -> Iterator[dict[str, Any]]:
    """Yields the rows of a parquet file, with the columns that ``columns`` selects from all names.

    Raises ``DataError`` if the file cannot be read.
    """
    import_datasets()
    try:
        with open_parquet(path) as file:
            wanted = columns(file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=_ROWS, columns=wanted):
                yield from _rows_of(batch, path)
    except DataError:
        raise
    except damage() as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"File {str(path)!r} cannot be read ({reason}). Download or write it again."
        ) from error


def _rows_of(batch: Any, path: Path) -> Iterator[dict[str, Any]]:
    if batch.nbytes > _MAX_BATCH:
        raise DataError(
            f"File {str(path)!r} has too much text: {_ROWS} rows may have at most {_MAX_BATCH >> 30} GiB."
            " Shorten its texts."
        )
    columns = {name: _values(batch.column(name)) for name in batch.schema.names}
    for row in range(batch.num_rows):
        yield {name: values[row] for name, values in columns.items()}


def _values(column: Any) -> list[Any]:
    """The values of a column. Dates may be out of Python's range, so each becomes the name of its type."""
    import pyarrow as pa

    if pa.types.is_temporal(column.type):
        return [None if missing else str(column.type) for missing in column.is_null().to_pylist()]
    return column.to_pylist()


class ParquetReader:
    """Parquet files with a column of images (bytes, or Hugging Face's bytes and path) and one of captions.

    Other columns are metadata if filters use them. Files that cannot be read are left out.
    """

    def __init__(
        self,
        files: list[Path],
        image_column: str | None = None,
        text_column: str | None = None,
        text_columns: tuple[str, ...] = (),
    ) -> None:
        """``text_columns`` are several columns of captions, in place of ``text_column``."""
        import_datasets()  # datasets depends on pyarrow
        self.files = files
        self.image_column = image_column
        self.text_column = text_column
        self.text_columns = text_columns
        self._close()

    def _close(self) -> None:
        """Drops all open files, because each process must open its own."""
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._windows: OrderedDict[tuple[int, int], _Window] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._close()

    def items(self, tally: Tally) -> Iterator[Item]:
        for number, path in enumerate(self.files):
            try:
                with open_parquet(path) as file:
                    columns = file.schema_arrow.names
                    self._image_column(path, columns)
                    texts = self._text_columns(path, columns)
                    wanted = [*texts, *(name for name in FIELDS if name in columns and name not in texts)]
                    row = 0
                    for group in range(file.num_row_groups):
                        position = 0
                        for batch in file.iter_batches(_ROWS, row_groups=[group], columns=wanted):
                            for fields in _rows_of(batch, path):
                                captions, groups = captions_of(fields[text] for text in texts)
                                if captions:
                                    yield Item(
                                        f"{path.name}:{row}",
                                        captions,
                                        known_fields(fields),
                                        (number, group, position),
                                        groups if self.text_columns else (),
                                    )
                                else:
                                    tally.drop("no caption")
                                row, position = row + 1, position + 1
            except DataError:
                raise
            except damage() as error:
                tally.damage("file unreadable", str(path), " ".join(str(error).split())[:200])

    def read(self, name: str, place: tuple[int, int, int]) -> bytes:
        number, group, position = place
        if self._process != os.getpid():
            self._close()
        try:
            with self._lock:  # the next images are in the same group
                window = self._windows.get((number, group))
                if window is None or position < window.first:
                    window = self._open_window(number, group)
                value = window.cell(position)
        except DataError:
            raise
        except (*damage(), IndexError, MemoryError) as error:
            raise DataError(f"Image {name!r} cannot be read ({error}). Download it again.") from error
        return image_bytes(value, name)

    def fingerprint(self) -> str:
        return fingerprint_of(self.files)

    def check_random_access(self) -> None:
        """Raises ``DataError`` for row groups that are too large to read for a single image."""
        for path in self.files:
            try:
                with open_parquet(path) as file:
                    image = self._image_column(path, file.schema_arrow.names)
                    self._text_columns(path, file.schema_arrow.names)
                    sizes = [
                        _size_of_column(file.metadata.row_group(g), image) for g in range(file.num_row_groups)
                    ]
            except DataError:
                raise
            except damage():
                continue  # ``items`` skips the file and names it
            largest = max(sizes, default=0)
            if largest > MAX_GROUP:
                raise DataError(
                    f"File {str(path)!r} has a row group with {largest >> 20} MiB of images. A row group may"
                    f" have at most {MAX_GROUP >> 20} MiB, because training reads images in random order."
                    " Write the file again with row_group_size=100, or make a prepared set for Stage C with"
                    " wuerstchen data prepare."
                )

    def _open_window(self, number: int, group: int) -> "_Window":
        path = self.files[number]
        file = open_parquet(path)
        image = self._image_column(path, file.schema_arrow.names)
        window = self._windows[number, group] = _Window(file, group, image)
        self._windows.move_to_end((number, group))
        if len(self._windows) > 2:  # at the end of a group, threads already need the next one
            self._windows.popitem(last=False)
        return window

    def _image_column(self, path: Path, names: list[str]) -> str:
        return column_of(str(path), names, self.image_column, IMAGE_COLUMNS, "image")

    def _text_columns(self, path: Path, names: list[str]) -> list[str]:
        requested = self.text_columns or (self.text_column,)
        return [column_of(str(path), names, column, TEXT_COLUMNS, "text") for column in requested]


def _size_of_column(group: Any, name: str) -> int:
    """Uncompressed bytes of a column of a row group."""
    columns = (group.column(number) for number in range(group.num_columns))
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema.partition(".")[0] == name)


class _Window:
    """The images of a row group, read in order. The last few hundred are kept."""

    def __init__(self, file: Any, group: int, column: str) -> None:
        self.file = file  # keeps the file open for the batches
        self.batches = file.iter_batches(_IMAGE_ROWS, row_groups=[group], columns=[column])
        self.kept: deque[Any] = deque()
        self.first = self.end = 0
        """The range of rows that are kept."""

    def cell(self, position: int) -> Any:
        """The value of a row from ``first`` on. Raises ``IndexError`` after the last row."""
        while position >= self.end:
            batch = next(self.batches, None)
            if batch is None:
                raise IndexError(f"row {position} of {self.end}")
            self.kept.append(batch.column(0))
            self.end += len(batch)
            if len(self.kept) > _KEPT:
                self.first += len(self.kept.popleft())
        start = self.first
        for column in self.kept:
            if position < start + len(column):
                return column[position - start].as_py()
            start += len(column)
        raise IndexError(f"row {position} of {self.end}")


class DatasetReader:
    """A map-style Hugging Face data set, with columns as in ``ParquetReader``."""

    def __init__(
        self,
        dataset: "datasets.Dataset",
        image_column: str | None = None,
        text_column: str | None = None,
        text_columns: tuple[str, ...] = (),
        *,
        local: bool = True,
    ) -> None:
        """With ``local``, cells without bytes are read from the local file at their path. ``text_columns``
        are several columns of captions, in place of ``text_column``."""
        datasets = import_datasets()
        names = dataset.column_names
        self.image = column_of("The data set", names, image_column, IMAGE_COLUMNS, "image")
        json = dataset.features.get("json")
        inner = list(json) if isinstance(json, dict) else []
        defaults = (*TEXT_COLUMNS, "json")
        requested = text_columns or (text_column,)
        known = [*names, *inner] if text_column or text_columns else names
        self.texts = [column_of("The data set", known, column, defaults, "text") for column in requested]
        self._is_grouped = bool(text_columns)
        self.key = dataset._fingerprint
        self.files = [Path(file["filename"]) for file in dataset.cache_files]
        self.local = local
        images = dataset.select_columns([self.image])
        if isinstance(dataset.features[self.image], datasets.Image):
            images = images.cast_column(self.image, datasets.Image(decode=False))
        self._images = images
        texts = [name for name in dict.fromkeys((*self.texts, "json", *FIELDS)) if name in names]
        self._texts = dataset.select_columns(texts).with_format("arrow")

    @classmethod
    def load(
        cls,
        name: str,
        split: str,
        image_column: str | None = None,
        text_column: str | None = None,
        text_columns: tuple[str, ...] = (),
    ) -> "DatasetReader":
        """Loads the data set with this name from the hub or its local cache, without running its code."""
        datasets = import_datasets()
        reason = unavailable_reason(name)
        if reason is not None:
            raise _not_from_hub(name, reason)
        check_card(name)
        try:
            dataset = datasets.load_dataset(name, split=split)
        except Exception as error:  # the library and the hub's client have their own exceptions
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise _not_from_hub(name, reason) from error
        return cls(dataset, image_column, text_column, text_columns)

    @classmethod
    def from_disk(
        cls,
        folder: Path,
        split: str,
        image_column: str | None = None,
        text_column: str | None = None,
        text_columns: tuple[str, ...] = (),
    ) -> "DatasetReader":
        """Loads the output of ``save_to_disk``, with or without splits."""
        datasets = import_datasets()
        check_regular(folder)
        try:
            found = datasets.load_from_disk(str(folder))
            if isinstance(found, datasets.DatasetDict):
                if split not in found:
                    raise DataError(
                        f"Data folder {str(folder)!r} has no split {split!r}. Choose one of"
                        f" {', '.join(found)} with --split, or use the folder of a split."
                    )
                found = found[split]
            # A damaged file can refer to bytes that it does not have, which would crash the process.
            found.data.table.validate(full=True)
        except DataError:
            raise
        except Exception as error:  # damaged files raise almost anything
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise DataError(
                f"Data folder {str(folder)!r} cannot be read as a saved data set ({reason}). Save it again"
                " with save_to_disk."
            ) from error
        return cls(found, image_column, text_column, text_columns, local=False)

    def items(self, tally: Tally) -> Iterator[Item]:
        for start in range(0, len(self._texts), _ROWS):
            end = min(start + _ROWS, len(self._texts))
            try:
                table = self._texts[start:end]
                columns = {name: _values(table.column(name)) for name in table.column_names}
            except damage() as error:
                reason = " ".join(str(error).split())[:200]
                tally.damage("rows unreadable", f"rows {start} to {end - 1}", reason)
                continue
            for position in range(end - start):
                row = {name: values[position] for name, values in columns.items()}
                # The library puts the metadata of WebDataset tars into the column json.
                inner = row.get("json")
                fields = {**inner, **row} if isinstance(inner, dict) else row
                captions, groups = captions_of(
                    text_in(fields) if text == "json" else fields.get(text) for text in self.texts
                )
                if captions:
                    number = start + position
                    yield Item(
                        f"row {number}",
                        captions,
                        known_fields(fields),
                        (number, 0, 0),
                        groups if self._is_grouped else (),
                    )
                else:
                    tally.drop("no caption")

    def read(self, name: str, place: tuple[int, int, int]) -> bytes:
        try:
            value = self._images[place[0]][self.image]
        except Exception as error:
            raise DataError(f"Image {name!r} cannot be read ({error}). Download it again.") from error
        return image_bytes(value, name, local=self.local)

    def fingerprint(self) -> str:
        return str(self.key)


def _not_from_hub(name: str, reason: str) -> DataError:
    return DataError(
        f"Data {name!r} is neither a local path nor available on the hub ({reason}). Check the name, the"
        " split and the network."
    )


def image_bytes(value: Any, name: str, *, local: bool = False) -> bytes:
    """The bytes of an image in a cell: plain bytes, or Hugging Face's bytes and path.

    With ``local``, a path without bytes is read from the local file. Raises ``NotDownloaded`` for an empty
    cell, and ``DataError`` for a cell with another type.
    """
    if isinstance(value, dict):
        path = value.get("path")
        if local and value.get("bytes") is None and isinstance(path, str):
            return bytes_of(Path(path), 0, MAX_IMAGE + 1, name)
        value = value.get("bytes")
    if value is None:
        raise NotDownloaded(f"Image {name!r} has an empty cell. Download it again.")
    if not isinstance(value, bytes):
        raise DataError(f"Image {name!r} has a cell that does not contain bytes. Remove it.")
    return value

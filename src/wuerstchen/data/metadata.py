"""The metadata file of a folder of images: ``metadata.jsonl``, ``.csv`` or ``.parquet``.

The formats are those of Hugging Face's imagefolder, with a row per image. Rows are read one at a time.
"""

import csv
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wuerstchen.data.files import MAX_TEXT, not_utf8, open_file, parse_object
from wuerstchen.data.filters import FIELDS
from wuerstchen.errors import DataError

JSONL, CSV, PARQUET = METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE_NAME = "file_name"
CAPTIONS = ("text", "caption")

_MAX_FILE = 1 << 32  # bytes
_MAX_COLUMNS = 1000


def metadata_rows(
    root: Path, name: str, image_column: str | None = None, text_columns: tuple[str, ...] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each row of the metadata file ``name``, after its name in messages ("metadata.jsonl line 3").

    Only the columns in use are read from a parquet file. Raises ``DataError`` for a file that cannot be read,
    is larger than 4 GiB, has a line longer than 1 MiB, or is not in the format of its suffix.
    """
    with open_file(root / name, name) as file:
        if file.seek(0, io.SEEK_END) > _MAX_FILE:
            raise DataError(
                f"File {name!r} is too large. It may have at most {_MAX_FILE >> 30} GiB. Split the folder."
            )
    if name == PARQUET:
        wanted = {image_column or FILE_NAME, *(text_columns or CAPTIONS), *FIELDS}
        return _parquet_rows(root, name, wanted)
    return _csv_rows(root, name) if name == CSV else _json_rows(root, name)


def _json_rows(root: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    with open_file(root / name, name) as file:
        while line := file.readline(MAX_TEXT + 1):
            if len(line) > MAX_TEXT:
                raise DataError(
                    f"{name} line {number + 1} is too long. It may have at most {MAX_TEXT >> 20} MiB. Shorten"
                    " it."
                )
            # Lines can end in \n, \r\n or \r.
            for part in line.rstrip(b"\r\n").split(b"\r"):
                number += 1
                try:
                    text = part.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise not_utf8(name, number) from error
                if text.strip():
                    where = f"{name} line {number}"
                    yield where, parse_object(text, where)


def _csv_rows(root: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with (
        open_file(root / name, name) as file,
        io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text,
    ):
        rows = csv.reader(text, strict=True)
        try:
            header = next(rows, [])
            if len(set(header)) != len(header) or not 0 < len(header) <= _MAX_COLUMNS:
                raise DataError(
                    f"{name} line 1 must contain the names of the columns, each once and at most"
                    f" {_MAX_COLUMNS} of them. Add them."
                )
            for row in rows:
                if not row:
                    continue
                where = f"{name} line {rows.line_num}"
                if len(row) != len(header):
                    raise DataError(
                        f"{where} has {len(row)} cells, but the first line names {len(header)} columns. Each"
                        " row needs a cell per column."
                    )
                yield where, {key: _csv_value(key, cell) for key, cell in zip(header, row, strict=True)}
        except UnicodeDecodeError as error:
            raise DataError(
                f"File {name!r} is not UTF-8 (after line {rows.line_num}). Save it in UTF-8."
            ) from error
        except csv.Error as error:
            raise DataError(f"{name} line {rows.line_num} is not valid CSV ({error}). Correct it.") from error


def _csv_value(key: str, cell: str) -> Any:
    """The text of a cell. Cells that filters read are converted to numbers, or None if they are empty."""
    if key not in FIELDS:
        return cell
    try:
        number = float(cell)
    except ValueError:
        return cell or None
    return int(number) if math.isfinite(number) and number.is_integer() else number


def _parquet_rows(root: Path, name: str, wanted: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    from wuerstchen.data.tables import parquet_rows

    rows = parquet_rows(root / name, lambda columns: [column for column in columns if column in wanted])
    for row, fields in enumerate(rows, start=1):
        yield f"{name} row {row}", fields

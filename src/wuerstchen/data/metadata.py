"""The metadata file of a folder of images: ``metadata.jsonl``, ``.csv`` or ``.parquet``.

The formats are those of Hugging Face's imagefolder, with a row for each image. Rows are read one by one.
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
    root: Path, name: str, image_column: str | None = None, text_column: str | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of the metadata file ``name``, with what messages call it ("metadata.jsonl line 3").

    Of a parquet file only the columns that are used are read. Raises ``DataError`` for a file that cannot be
    read, has over 4 GiB, a line of over 1 MiB, or is not what its ending says.
    """
    with open_file(root / name, name) as file:
        if file.seek(0, io.SEEK_END) > _MAX_FILE:
            raise DataError(
                f"file {name!r} is wrong because it has over {_MAX_FILE >> 30} GiB; split the folder"
            )
    if name == PARQUET:
        wanted = {image_column or FILE_NAME, *((text_column,) if text_column else CAPTIONS), *FIELDS}
        return _parquet_rows(root, name, wanted)
    return _csv_rows(root, name) if name == CSV else _json_rows(root, name)


def _json_rows(root: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    with open_file(root / name, name) as file:
        while line := file.readline(MAX_TEXT + 1):
            if len(line) > MAX_TEXT:
                raise DataError(
                    f"{name} line {number + 1} is wrong because it has over {MAX_TEXT >> 20} MiB; shorten it"
                )
            # Lines can end in \n, in \r\n, and in \r alone.
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
                    f"{name} line 1 is wrong because it must name each column once, and at most"
                    f" {_MAX_COLUMNS} of them; write the names of the columns there"
                )
            for row in rows:
                if not row:
                    continue
                where = f"{name} line {rows.line_num}"
                if len(row) != len(header):
                    raise DataError(
                        f"{where} is wrong because it has {len(row)} cells, and the first line names"
                        f" {len(header)} columns; give each row as many"
                    )
                yield where, {key: _csv_value(key, cell) for key, cell in zip(header, row, strict=True)}
        except UnicodeDecodeError as error:
            raise DataError(
                f"file {name!r} is wrong because it is not UTF-8 (after line {rows.line_num});"
                " save it in UTF-8"
            ) from error
        except csv.Error as error:
            raise DataError(
                f"{name} line {rows.line_num} is wrong because it is not CSV ({error}); mend it"
            ) from error


def _csv_value(key: str, cell: str) -> Any:
    """A cell as it is; those that filters read as numbers, None where they are empty."""
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

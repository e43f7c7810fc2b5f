"""Checks of a prepared set: its description, the checksums of its shards, and the schema of its tables."""

import contextlib
import hashlib
import json
import os
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, get_args

from tqdm import tqdm

from wuerstchen.data.files import open_file, read_file
from wuerstchen.errors import DataError

FORMAT = 1
MAX_DESCRIPTION = 96 << 20
"""Bytes of ``prepared.json``. Earlier versions named every damaged image, with up to 100 bytes each."""
DESCRIPTION = "prepared.json"
TABLES = ("images", "texts")
SHARD_KEYS = ("file", "rows", "bytes", "sha256")
"""What the description records about each shard."""
States = Literal["none", "fp16", "int8"]
Positions = Literal["all", "real"]
"""``all`` keeps the states of the padding, for models that attend to it, as the published models do.
``real`` keeps only the states of the text's own tokens, for models that mask the padding."""
_MOST = 1 << 16  # largest side, length or width in a description


def is_prepared(folder: Path) -> bool:
    """Whether a folder is a prepared set, finished or unfinished."""
    return (folder / DESCRIPTION).is_file() or (folder / "work" / "plan.json").is_file()


def read_description(folder: Path) -> dict[str, Any]:
    """Reads ``prepared.json`` of a finished set. Raises ``DataError`` if it is missing or damaged."""
    path = folder / DESCRIPTION
    if not path.exists():
        reason = "it is not finished" if (folder / "work").is_dir() else f"it has no {DESCRIPTION}"
        raise DataError(
            f"{str(folder)!r} cannot be read as a prepared set: {reason}. Run wuerstchen data prepare. The"
            " same command continues an unfinished set."
        )
    content = _read_json(path)
    if content.get("format") != FORMAT:
        raise DataError(
            f"Prepared set {str(folder)!r} has format {_shown(content.get('format'))}. This version reads"
            f" format {FORMAT}. Upgrade wuerstchen, or prepare the set again."
        )
    try:
        _check_description(content)
    except KeyError as error:
        raise bad_description(path, f"{error} is missing") from error
    except ValueError as error:
        raise bad_description(path, str(error)) from error
    return content


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = read_file(path, MAX_DESCRIPTION)
        # Empty lists are two bytes in the file and 64 in memory.
        if data.count(b"[") + data.count(b"{") > MAX_DESCRIPTION // 32:
            raise ValueError("it has too many lists")
        content = json.loads(data)
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
    except (DataError, ValueError, RecursionError) as error:
        raise bad_description(path, " ".join(str(error).split())[:200]) from error
    return content


def _check_description(content: dict[str, Any]) -> None:
    """Raises ``KeyError`` for missing values, and ``ValueError`` for wrong types and values out of range."""
    for table in TABLES:
        described = _of(content, table, dict)
        shards = _of(described, "shards", list)
        if not shards:
            raise ValueError(f"{table} has no shards")
        for shard in shards:
            if not isinstance(shard, dict):
                raise ValueError(f"a shard of {table} must be an object, got {_shown(shard)}")
            for key in ("file", "sha256"):
                _of(shard, key, str)
            for key in ("rows", "bytes"):
                _count(shard, key)
        _count(described, "rows", least=1)
        _count(described, "bytes")
    for key in ("items", "enlarged", "cut_texts"):
        _count(content, key)
    _count(content["texts"], "state_bytes")
    _of(content, "dropped", dict)
    for count in _of({"without_score": {}, **content}, "without_score", dict).values():
        _count({"without_score": count}, "without_score")
    _count({"unnamed": 0, **content}, "unnamed")
    _shapes(content, "damaged", 2, str)
    _shapes(content, "buckets", 3)
    for key in ("without_states", "with_states"):
        size = _of(_of(content, "bytes_per_image", dict), key, int | float)
        if not 0 <= size <= 1 << 50:
            raise ValueError(f"{key} must be a size in bytes, got {_shown(size)}")
    settings = _of(content, "settings", dict)
    for key in ("compressor", "text_encoder"):
        _of(settings, key, str)
    for key, kind in (("text_states", States), ("text_positions", Positions)):
        if settings[key] not in get_args(kind):
            raise ValueError(f"{key} must be {' or '.join(get_args(kind))}, got {_shown(settings[key])}")
    for key in ("size", "crops", "text_width", "text_length"):
        _count(settings, key, least=1, most=_MOST)
    _count(settings, "vocabulary", least=1, most=1 << 31)
    if not 0 < _of(settings, "view_scale", int | float) <= 4:
        raise ValueError(f"view_scale must be above 0 and at most 4, got {_shown(settings['view_scale'])}")
    buckets = _shapes(settings, "buckets", 2, least=1, most=_MOST)
    latents = _shapes(settings, "maps", 3, least=1, most=_MOST)
    if len(buckets) != len(latents):
        raise ValueError(f"it has {len(buckets)} buckets but {len(latents)} shapes of latents")


def _of(content: dict[str, Any], key: str, kind: Any) -> Any:
    """The value of a key. Raises ``ValueError`` if it has another type."""
    if not isinstance(content[key], kind) or isinstance(content[key], bool):
        names = {dict: "an object", list: "a list", str: "a string", int: "an integer"}
        raise ValueError(f"{key} must be {names.get(kind, 'a number')}, got {_shown(content[key])}")
    return content[key]


def _count(content: dict[str, Any], key: str, *, least: int = 0, most: int = 1 << 50) -> int:
    if not least <= _of(content, key, int) <= most:
        raise ValueError(f"{key} must be between {least} and {most}, got {_shown(content[key])}")
    return content[key]


def _shapes(
    content: dict[str, Any], key: str, length: int, kind: type = int, *, least: int = 0, most: int = 1 << 50
) -> list[Any]:
    """A list of lists that all have ``length`` elements."""
    for shape in _of(content, key, list):
        if not isinstance(shape, list) or len(shape) != length:
            raise ValueError(f"{key} must contain lists of {length}, got {_shown(shape)}")
        if all(type(part) is str for part in shape) and kind is str:
            continue  # there can be hundreds of thousands
        for number in range(length):
            of_shape = {f"a part of {key}": shape[number]}
            if kind is int:
                _count(of_shape, f"a part of {key}", least=least, most=most)
            else:
                _of(of_shape, f"a part of {key}", kind)
    return content[key]


def _shown(value: object) -> str:
    return textwrap.shorten(json.dumps(value), 60, placeholder=" ...")


def bad_description(path: Path, reason: str) -> DataError:
    return DataError(f"{path} does not describe a prepared set ({reason}). Prepare the set again.")


def check_shard(path: Path, shard: dict[str, Any], *, verify: bool) -> None:
    """Raises ``DataError`` unless the shard has its recorded size, and with ``verify`` its SHA-256."""
    if Path(shard["file"]).name != shard["file"]:
        raise bad_shard(path, "its name points outside the set")
    try:
        size = path.stat().st_size
        if not path.is_file():  # a FIFO would be waited on
            raise bad_shard(path, "it is not a regular file")
    except OSError as error:
        raise bad_shard(path, f"it cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise bad_shard(path, f"its name is not valid ({error})") from error
    if size != shard["bytes"]:
        raise bad_shard(path, f"it has {size} bytes instead of {shard['bytes']}")
    if verify and sha256(path) != shard["sha256"]:
        raise bad_shard(path, "it has changed since it was written")


def sha256(path: Path) -> str:
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_Shard = tuple[Path, dict[str, Any]]
"""A shard's file, and its entry in the description."""


def verify_shards(folder: Path, description: dict[str, Any], verify: bool | None) -> None:
    """Checks the sizes of all shards, and the checksums of all, none, or those newer than the description.

    ``verify`` is as in ``PreparedSet``. Raises ``DataError``.
    """
    shards = _shards(folder, description)
    for path, shard in shards:
        check_shard(path, shard, verify=False)
    if verify:
        _verify(folder, shards)
    elif verify is None and verify_newer(folder, description):
        mark_verified(folder)


def verify_newer(folder: Path, description: dict[str, Any], rank: int = 0, count: int = 1) -> bool:
    """Checks the checksums of shards newer than the description. With ``count`` processes, process ``rank``
    checks its part of them. Returns whether any shard is newer, in any part.

    Call ``mark_verified`` once all processes have succeeded. Raises ``DataError``.
    """
    written = (folder / DESCRIPTION).stat().st_mtime_ns
    shards = _shards(folder, description)
    newer = [path.stat().st_mtime_ns > written for path, _ in shards]
    # All shards are divided, not only the newer ones: machines may briefly see different times on a shared
    # disk.
    part = range(rank, len(shards), count)
    _verify(folder, [shards[number] for number in part if newer[number]], shown=rank == 0)
    return any(newer)


def mark_verified(folder: Path) -> None:
    """Makes the description newer than the shards, so that the next start does not verify them again."""
    with contextlib.suppress(OSError):  # a read-only set is verified again next time
        os.utime(folder / DESCRIPTION)


def _shards(folder: Path, description: dict[str, Any]) -> list[_Shard]:
    return [
        (folder / table / shard["file"], shard) for table in TABLES for shard in description[table]["shards"]
    ]


def _verify(folder: Path, shards: list[_Shard], *, shown: bool = True) -> None:
    """Compares checksums, with a progress bar if ``shown``."""
    if not shards:
        return

    def check(entry: _Shard) -> int:
        check_shard(*entry, verify=True)
        return entry[1]["bytes"]

    total, disable = sum(shard["bytes"] for _, shard in shards), None if shown else True
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,  # hashing releases the GIL
        tqdm(total=total, desc=f"verifying {folder}", unit="B", unit_scale=True, disable=disable) as bar,
    ):
        for size in pool.map(check, shards):
            bar.update(size)


def check_table(table: Any, schema: Any) -> None:
    """Raises ``ValueError`` or an error of pyarrow for other columns, missing values, or invalid offsets."""
    import pyarrow as pa

    found = {field.name: str(field.type) for field in table.schema}
    wanted = {field.name: str(field.type) for field in schema}
    if found != wanted:
        columns, theirs = (
            ", ".join(f"{name} {kind}" for name, kind in sorted(kinds.items())) for kinds in (wanted, found)
        )
        raise ValueError(f"its columns must be {columns}, got {theirs}")
    table.validate(full=True)
    for name, column in zip(table.column_names, table.columns, strict=True):
        inner = (chunk.values for chunk in column.chunks if pa.types.is_list(chunk.type))
        if column.null_count or any(values.null_count for values in inner):
            raise ValueError(f"values are missing from its column {name}")


def bad_shard(path: Path, problem: str) -> DataError:
    return DataError(f"Shard {str(path)!r} is damaged: {problem}. Prepare the set again.")

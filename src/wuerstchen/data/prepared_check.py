"""Whether a prepared set is whole: its description, the checksums of its shards, the form of its tables."""

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
"""Bytes of ``prepared.json``. Versions that named every damaged image wrote up to 100 bytes for each."""
DESCRIPTION = "prepared.json"
TABLES = ("images", "texts")
SHARD_KEYS = ("file", "rows", "bytes", "sha256")
"""What the description records about each shard."""
States = Literal["none", "fp16", "int8"]
Positions = Literal["all", "real"]
"""``all``: states of the padding are kept, for models that attend to it, as the published ones do.
``real``: only those of a text's own tokens, for models that hide padding."""
_MOST = 1 << 16  # of a side, a length or a width in a description


def is_prepared(folder: Path) -> bool:
    """Whether a folder is a prepared set, finished or not."""
    return (folder / DESCRIPTION).is_file() or (folder / "work" / "plan.json").is_file()


def read_description(folder: Path) -> dict[str, Any]:
    """``prepared.json`` of a finished set. Raises ``DataError`` if there is none."""
    path = folder / DESCRIPTION
    if not path.exists():
        reason = "it is not finished" if (folder / "work").is_dir() else f"it has no {DESCRIPTION}"
        raise DataError(
            f"prepared set {str(folder)!r} is wrong because {reason};"
            " make it with wuerstchen data prepare (the same command goes on)"
        )
    content = _read_json(path)
    if content.get("format") != FORMAT:
        raise DataError(
            f"prepared set {str(folder)!r} is wrong because its format is {_shown(content.get('format'))} and"
            f" this version reads {FORMAT}; upgrade wuerstchen, or prepare it again"
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
            raise ValueError("it holds more lists than any set has")
        content = json.loads(data)
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
    except (DataError, ValueError, RecursionError) as error:
        raise bad_description(path, " ".join(str(error).split())[:200]) from error
    return content


def _check_description(content: dict[str, Any]) -> None:
    """Raises ``KeyError`` or ``ValueError`` for what is missing, of another kind, or out of range."""
    for table in TABLES:
        described = _of(content, table, dict)
        shards = _of(described, "shards", list)
        if not shards:
            raise ValueError(f"{table} has no shards")
        for shard in shards:
            if not isinstance(shard, dict):
                raise ValueError(f"a shard of {table} is {_shown(shard)} and must be an object")
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
            raise ValueError(f"{key} is {_shown(size)} and must be a size in bytes")
    settings = _of(content, "settings", dict)
    for key in ("compressor", "text_encoder"):
        _of(settings, key, str)
    for key, kind in (("text_states", States), ("text_positions", Positions)):
        if settings[key] not in get_args(kind):
            raise ValueError(f"{key} is {_shown(settings[key])} and must be {' or '.join(get_args(kind))}")
    for key in ("size", "crops", "text_width", "text_length"):
        _count(settings, key, least=1, most=_MOST)
    _count(settings, "vocabulary", least=1, most=1 << 31)
    if not 0 < _of(settings, "view_scale", int | float) <= 4:
        raise ValueError(f"view_scale is {_shown(settings['view_scale'])} and must be above 0 and at most 4")
    buckets = _shapes(settings, "buckets", 2, least=1, most=_MOST)
    maps = _shapes(settings, "maps", 3, least=1, most=_MOST)
    if len(buckets) != len(maps):
        raise ValueError(f"it has {len(buckets)} buckets and maps of {len(maps)}")


def _of(content: dict[str, Any], key: str, kind: Any) -> Any:
    """What is there under a key, of the kind that it must be."""
    if not isinstance(content[key], kind) or isinstance(content[key], bool):
        names = {dict: "an object", list: "a list", str: "a text", int: "a whole number"}
        raise ValueError(f"{key} is {_shown(content[key])} and must be {names.get(kind, 'a number')}")
    return content[key]


def _count(content: dict[str, Any], key: str, *, least: int = 0, most: int = 1 << 50) -> int:
    if not least <= _of(content, key, int) <= most:
        raise ValueError(f"{key} is {_shown(content[key])} and must be from {least} to {most}")
    return content[key]


def _shapes(
    content: dict[str, Any], key: str, length: int, kind: type = int, *, least: int = 0, most: int = 1 << 50
) -> list[Any]:
    """A list of lists of one length."""
    for shape in _of(content, key, list):
        if not isinstance(shape, list) or len(shape) != length:
            raise ValueError(f"{key} has {_shown(shape)}, which is no list of {length}")
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
    return DataError(
        f"{path} is wrong because it does not describe a prepared set ({reason}); prepare the set again"
    )


def check_shard(path: Path, shard: dict[str, Any], *, verify: bool) -> None:
    """Raises ``DataError`` unless the shard has its size, and with ``verify`` its SHA-256."""
    if Path(shard["file"]).name != shard["file"]:
        raise bad_shard(path, "its name leads out of the set")
    try:
        size = path.stat().st_size
        if not path.is_file():  # a FIFO would be waited on
            raise bad_shard(path, "it is no regular file")
    except OSError as error:
        raise bad_shard(path, f"it cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise bad_shard(path, f"that is no name of a file ({error})") from error
    if size != shard["bytes"]:
        raise bad_shard(path, f"it has {size} bytes and was written with {shard['bytes']}")
    if verify and sha256(path) != shard["sha256"]:
        raise bad_shard(path, "it has changed since it was written")


def sha256(path: Path) -> str:
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_Shard = tuple[Path, dict[str, Any]]
"""A shard's file, and what the description says about it."""


def verify_shards(folder: Path, description: dict[str, Any], verify: bool | None) -> None:
    """Checks sizes, and the checksums of all shards, of none, or of those that are newer than the description
    (``PreparedSet``). Raises ``DataError``."""
    shards = _shards(folder, description)
    for path, shard in shards:
        check_shard(path, shard, verify=False)
    if verify:
        _verify(folder, shards)
    elif verify is None and verify_newer(folder, description):
        mark_verified(folder)


def verify_newer(folder: Path, description: dict[str, Any], rank: int = 0, count: int = 1) -> bool:
    """Checks the checksums of shards that are newer than the description: this process's part of them, if
    ``count`` processes share the work. Returns whether there are any, in whatever part.

    ``mark_verified`` is to follow when all parts are good. Raises ``DataError``.
    """
    written = (folder / DESCRIPTION).stat().st_mtime_ns
    shards = _shards(folder, description)
    newer = [path.stat().st_mtime_ns > written for path, _ in shards]
    # The part is one of all shards: two machines may see the times of a shared disk differently for a while.
    part = range(rank, len(shards), count)
    _verify(folder, [shards[number] for number in part if newer[number]], shown=rank == 0)
    return any(newer)


def mark_verified(folder: Path) -> None:
    """Makes the description newer than the shards, so that they are not verified at the next start."""
    with contextlib.suppress(OSError):  # a set that may not be changed is verified again next time
        os.utime(folder / DESCRIPTION)


def _shards(folder: Path, description: dict[str, Any]) -> list[_Shard]:
    return [
        (folder / table / shard["file"], shard) for table in TABLES for shard in description[table]["shards"]
    ]


def _verify(folder: Path, shards: list[_Shard], *, shown: bool = True) -> None:
    """Compares checksums, with a progress bar if it is to be ``shown``."""
    if not shards:
        return

    def check(entry: _Shard) -> int:
        check_shard(*entry, verify=True)
        return entry[1]["bytes"]

    total, disable = sum(shard["bytes"] for _, shard in shards), None if shown else True
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,  # hashing leaves Python's lock
        tqdm(total=total, desc=f"verifying {folder}", unit="B", unit_scale=True, disable=disable) as bar,
    ):
        for size in pool.map(check, shards):
            bar.update(size)


def check_table(table: Any, schema: Any) -> None:
    """Raises ``ValueError`` or one of pyarrow's for a table of other columns, with values missing, or whose
    offsets lead out of it."""
    import pyarrow as pa

    found = {field.name: str(field.type) for field in table.schema}
    wanted = {field.name: str(field.type) for field in schema}
    if found != wanted:
        lacking = sorted(wanted.items() - found.items())
        raise ValueError(f"its columns are {sorted(found)}, and {lacking} are described")
    table.validate(full=True)
    for name, column in zip(table.column_names, table.columns, strict=True):
        inner = (chunk.values for chunk in column.chunks if pa.types.is_list(chunk.type))
        if column.null_count or any(values.null_count for values in inner):
            raise ValueError(f"values of its column {name} are missing")


def bad_shard(path: Path, rule: str) -> DataError:
    return DataError(f"shard {str(path)!r} is wrong because {rule}; prepare the set again")

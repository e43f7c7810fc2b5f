"""Prepared sets: maps of the compressor and texts, stored once so that Stage C need not make them again.

    OUT/prepared.json     what it is: settings, fingerprints, counts, a SHA-256 of every shard; written last
    OUT/images/*.arrow    a row an image: its name, texts, bucket, crops and maps
    OUT/texts/*.arrow     a row a text: the text, its token ids, and its states if they are kept

Both folders are Arrow data sets that ``datasets.load_from_disk`` opens; nothing is read before it is asked
for.
"""

import contextlib
import functools
import hashlib
import json
import os
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Float16, Int, Int64
from torch import nn
from tqdm import tqdm

from wuerstchen.data.files import open_file, read_file
from wuerstchen.data.plan import VIEW, held_out_names
from wuerstchen.data.tables import import_datasets
from wuerstchen.errors import DataError, UserError
from wuerstchen.models.text import TextEncoder

FORMAT = 1
MAX_DESCRIPTION = 96 << 20
"""Bytes of ``prepared.json``. Versions that named every damaged image wrote up to 100 bytes for each."""
BYTES_PER_SHARD = 256
"""What the description of a shard takes of it, at most."""
_MOST = 1 << 16  # of a side, a length or a width in a description
DESCRIPTION = "prepared.json"
States = Literal["none", "fp16", "int8"]
Positions = Literal["all", "real"]
"""``all``: states of the padding are kept, for models that attend to it, as the published ones do.
``real``: only those of a text's own tokens, for models that hide padding."""
MAX_SHORT_ID = 1 << 16  # token ids below are stored in 16 bits


def features(states: States, vocabulary: int) -> dict[str, Any]:
    """The columns of ``images`` and of ``texts``, as ``datasets.Features``."""
    datasets = import_datasets()
    value, listed = datasets.Value, datasets.List
    images = {
        "name": value("string"),
        "item": value("int64"),  # its number in the source, which its crops are drawn by
        "texts": listed(value("int32")),  # rows of the other table
        "width": value("int32"),  # of the picture, before it was cropped
        "height": value("int32"),
        "bucket": value("int16"),
        "boxes": listed(value("float32")),  # left, top, right, bottom of each crop
        "maps": listed(value("float16")),  # (crops, channels, height, width)
    }
    texts = {
        "text": value("string"),
        "tokens": listed(value("uint16" if vocabulary <= MAX_SHORT_ID else "int32")),
    }
    if states != "none":
        texts["states"] = listed(value("float16" if states == "fp16" else "int8"))  # (positions, width)
    if states == "int8":
        texts["scales"] = listed(value("float32"))  # one a position
    return {"images": datasets.Features(images), "texts": datasets.Features(texts)}


def quantize_states(
    states: Float[np.ndarray, "t d"],
) -> tuple[Int[np.ndarray, "t d"], Float[np.ndarray, " t"]]:
    """Each position as int8 with a scale of its own: ``states ≈ int8 · scale``, to half a scale."""
    scales = np.abs(states).max(axis=1).astype(np.float32) / 127
    safe = np.where(scales > 0, scales, 1)
    return np.rint(states / safe[:, None]).astype(np.int8), scales


def bytes_per_image(
    *,
    map_numbers: int,
    crops: int = 1,
    tokens: float = 0,
    positions: float = 0,
    width: int = 0,
    states: States = "none",
    overhead: int = 300,
) -> int:
    """What an image with a text of its own takes on disk, about.

    ``map_numbers`` is channels × height × width of a map, ``tokens`` the average length of a text and
    ``positions`` how many of its states are kept. ``overhead`` is for name, caption and crops.
    """
    state = {"none": 0, "fp16": 2 * width, "int8": width + 4}[states]
    return round(2 * map_numbers * crops + 2 * tokens + positions * state) + overhead


def fingerprint(network: nn.Module, *more: str) -> str:
    """A hash of all weights of a network, whatever file they came from, and of ``more``."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        plain = tensor.detach().cpu().contiguous()
        digest.update(plain.float().numpy() if plain.is_floating_point() else plain.numpy())
    for part in more:
        digest.update(part.encode())
    return digest.hexdigest()


def text_fingerprint(encoder: TextEncoder) -> str:
    """The same for a text encoder with its tokenizer and its length."""
    return fingerprint(
        encoder.model, encoder.tokenizer.to_str(), str(encoder.pad_id), str(encoder.text_positions)
    )


class PreparedSet:
    """A prepared set, to be read at random. It can be sent to worker processes."""

    def __init__(self, folder: Path | str, *, verify: bool | None = None) -> None:
        """Opens the set in ``folder``.

        ``verify`` reads all of it and compares the checksums. By default that is done for shards that are
        newer than ``prepared.json``, which is written last: they were changed, or copied without their times.
        When they are as they were, the time of ``prepared.json`` is set to now if it may be, so that they are
        read once. The structure of the tables is checked always: damaged offsets would end the process.

        Raises ``DataError`` for what is no set, not finished, or damaged.
        """
        datasets = import_datasets()
        self.folder = Path(folder)
        self.description = read_description(self.folder)
        verify_shards(self.folder, self.description, verify)
        settings = self.description["settings"]
        columns = features(settings["text_states"], settings["vocabulary"])
        self._tables: dict[str, Any] = {}
        for table in ("images", "texts"):
            shards = []
            for shard in self.description[table]["shards"]:
                path = self.folder / table / shard["file"]
                try:
                    opened = datasets.Dataset.from_file(str(path))
                    _check_table(opened.data.table, columns[table].arrow_schema)
                except Exception as error:
                    raise _bad_shard(
                        path, f"it cannot be read ({' '.join(str(error).split())[:200]})"
                    ) from error
                shards.append(opened)
            found = self._tables[table] = datasets.concatenate_datasets(shards).with_format("arrow")
            named = self.description[table]["rows"]
            if len(found) != named:
                raise _bad_description(
                    self.folder / DESCRIPTION, f"{table} has {named} rows, and its shards hold {len(found)}"
                )
        self.buckets: list[tuple[int, int]] = [(int(w), int(h)) for w, h in settings["buckets"]]
        """Width and height in pixels of each bucket."""
        self.crops: int = settings["crops"]
        self.states_kept: States = settings["text_states"]
        self.text_positions: Positions = settings["text_positions"]

    def __len__(self) -> int:
        return len(self._tables["images"])

    @functools.cached_property
    def bucket_ids(self) -> Int64[np.ndarray, " n"]:
        """The bucket of every image: what ``BucketPlan`` reads."""
        found = self._tables["images"].data.column("bucket").to_numpy().astype(np.int64)
        if found.min() < 0 or found.max() >= len(self.buckets):
            raise _bad_description(
                self.folder / DESCRIPTION,
                f"it names {len(self.buckets)} buckets, and an image is in number {found.max()}",
            )
        return found

    @property
    def image_size(self) -> int:
        """The side that pictures were prepared for: each has about so many pixels squared."""
        return self.description["settings"]["size"]

    @property
    def maps_precision(self) -> str:
        """What the maps were computed in: float32, or bfloat16 in sets of earlier versions by choice."""
        settings = self.description["settings"]
        return settings.get("maps_precision", settings.get("precision", "float32"))

    def rows(self, split: Literal["train", "heldout"]) -> Int64[np.ndarray, " n"]:
        """The images that training may see, or those that it may not (``plan.held_out_names``); all views
        of a picture are on one side."""
        names = self._tables["images"].data.column("name").to_pylist()
        pictures = [name.split(VIEW)[0] for name in names]
        held_out = held_out_names(set(pictures))
        return np.flatnonzero([(picture in held_out) == (split == "heldout") for picture in pictures])

    def fingerprint(self) -> str:
        """A hash of all that the set holds, from the checksums in ``prepared.json``."""
        shards = [*self.description["images"]["shards"], *self.description["texts"]["shards"]]
        return hashlib.sha256("".join(shard["sha256"] for shard in shards).encode()).hexdigest()

    def size(self, index: int) -> tuple[int, int]:
        """Width and height in pixels that the image was scaled to."""
        return self.buckets[int(self.bucket_ids[index])]

    def name(self, index: int) -> str:
        """What the image is called in its source."""
        return self._value("images", "name", index)

    def map(self, index: int, crop: int = 0) -> Float16[np.ndarray, "c h w"]:
        """The compressor's map of a crop of the image. Raises ``DataError`` naming it if it holds NaN."""
        if not 0 <= crop < self.crops:
            raise UserError(
                f"crop {crop} is wrong because the set holds {self.crops}; use 0 to {self.crops - 1}"
            )
        channels, height, width = self.description["settings"]["maps"][int(self.bucket_ids[index])]
        values = self._list("images", "maps", index)
        count = channels * height * width
        if len(values) != count * self.crops:
            raise self._bad_image(index, f"its maps hold {len(values)} numbers and not {count * self.crops}")
        found = values[crop * count : (crop + 1) * count].reshape(channels, height, width)
        if not np.isfinite(found).all():
            raise self._bad_image(index, "its map holds NaN or infinity")
        return found

    def boxes(self, index: int) -> Float[np.ndarray, "crops 4"]:
        """Left, top, right and bottom of each crop in pixels of the source's picture."""
        boxes = self._list("images", "boxes", index)
        if len(boxes) != 4 * self.crops:
            raise self._bad_image(index, f"its crops have {len(boxes)} sides and not {4 * self.crops}")
        return boxes.reshape(-1, 4)

    def captions(self, index: int) -> list[str]:
        """All captions of the image."""
        return [self._value("texts", "text", text) for text in self._texts_of(index)]

    def tokens(self, index: int, choice: int = 0) -> Int64[np.ndarray, " t"]:
        """The token ids of one of the captions, without padding: for ``TextEncoder.encode_tokens``."""
        found = self._list("texts", "tokens", self._text(index, choice)).astype(np.int64)
        settings = self.description["settings"]
        vocabulary = settings["vocabulary"]
        if len(found) > settings["text_length"] or not ((found >= 0) & (found < vocabulary)).all():
            raise self._bad_image(
                index,
                f"its text has {len(found)} tokens of at most {settings['text_length']},"
                f" each below {vocabulary}",
            )
        return found

    def states(self, index: int, choice: int = 0) -> Float[np.ndarray, "t d"]:
        """The text states of one of the image's captions in fp32, with those of the padding or without
        (``text_positions``). Raises ``UserError`` if the set holds none, ``DataError`` for NaN in them."""
        if self.states_kept == "none":
            raise UserError(
                f"prepared set {str(self.folder)!r} is wrong because it was made without text states;"
                " encode its tokens, or prepare it with --text-states fp16"
            )
        text = self._text(index, choice)
        width = self.description["settings"]["text_width"]
        flat = self._list("texts", "states", text)
        most = width * self.description["settings"]["text_length"]
        if len(flat) % width or len(flat) > most:
            raise self._bad_image(index, f"its text states hold {len(flat)} numbers of at most {most}")
        stored = flat.reshape(-1, width).astype(np.float32)
        if self.states_kept == "int8":
            scales = self._list("texts", "scales", text)
            if len(scales) != len(stored):
                raise self._bad_image(index, f"{len(stored)} states have {len(scales)} scales")
            stored *= scales[:, None]
        if not np.isfinite(stored).all():
            raise self._bad_image(index, "its text states hold NaN or infinity")
        return stored

    def check_model(self, compressor: nn.Module, text_encoder: TextEncoder | None = None) -> None:
        """Raises ``UserError`` unless the set was made with these networks."""
        settings = self.description["settings"]
        found = {"compressor": fingerprint(compressor)}
        if text_encoder is not None:
            found["text_encoder"] = text_fingerprint(text_encoder)
        for part, value in found.items():
            if settings[part] != value:
                raise UserError(
                    f"prepared set {str(self.folder)!r} is wrong because it was made with another"
                    f" {part.replace('_', ' ')}; prepare it with this model"
                )

    def _texts_of(self, index: int) -> list[int]:
        texts = self._list("images", "texts", index).tolist()
        count = len(self._tables["texts"])
        if not texts or min(texts) < 0 or max(texts) >= count:
            raise self._bad_image(index, f"it names the texts {texts[:5]} of {count}")
        return texts

    def _text(self, index: int, choice: int) -> int:
        texts = self._texts_of(index)
        if not 0 <= choice < len(texts):
            raise UserError(
                f"choice {choice} is wrong because {self.name(index)!r} has {len(texts)} captions"
            )
        return texts[choice]

    def _row(self, table: str, index: int) -> Any:
        rows = self._tables[table]
        if not 0 <= index < len(rows):
            raise IndexError(f"row {index} of {len(rows)}")
        return rows[int(index)]

    def _value(self, table: str, column: str, index: int) -> Any:
        return self._row(table, index)[column][0].as_py()

    def _list(self, table: str, column: str, index: int) -> np.ndarray:
        return self._row(table, index)[column][0].values.to_numpy(zero_copy_only=False)

    def _bad_image(self, index: int, rule: str) -> DataError:
        return DataError(
            f"image {self.name(index)!r} of prepared set {str(self.folder)!r} is wrong because {rule};"
            " prepare the set again"
        )


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
        raise _bad_description(path, f"{error} is missing") from error
    except ValueError as error:
        raise _bad_description(path, str(error)) from error
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
        raise _bad_description(path, " ".join(str(error).split())[:200]) from error
    return content


def _check_description(content: dict[str, Any]) -> None:
    """Raises ``KeyError`` or ``ValueError`` for what is missing, of another kind, or out of range."""
    for table in ("images", "texts"):
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


def _bad_description(path: Path, reason: str) -> DataError:
    return DataError(
        f"{path} is wrong because it does not describe a prepared set ({reason}); prepare the set again"
    )


def check_shard(path: Path, shard: dict[str, Any], *, verify: bool) -> None:
    """Raises ``DataError`` unless the shard has its size, and with ``verify`` its SHA-256."""
    if Path(shard["file"]).name != shard["file"]:
        raise _bad_shard(path, "its name leads out of the set")
    try:
        size = path.stat().st_size
        if not path.is_file():  # a FIFO would be waited on
            raise _bad_shard(path, "it is no regular file")
    except OSError as error:
        raise _bad_shard(path, f"it cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise _bad_shard(path, f"that is no name of a file ({error})") from error
    if size != shard["bytes"]:
        raise _bad_shard(path, f"it has {size} bytes and was written with {shard['bytes']}")
    if verify and sha256(path) != shard["sha256"]:
        raise _bad_shard(path, "it has changed since it was written")


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
        (folder / table / shard["file"], shard)
        for table in ("images", "texts")
        for shard in description[table]["shards"]
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


def _check_table(table: Any, schema: Any) -> None:
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


def _bad_shard(path: Path, rule: str) -> DataError:
    return DataError(f"shard {str(path)!r} is wrong because {rule}; prepare the set again")

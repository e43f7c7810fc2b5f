"""Prepared sets: maps of the compressor and texts, stored once so that Stage C need not make them again.

    OUT/prepared.json     what it is: settings, fingerprints, counts, a SHA-256 of every shard; written last
    OUT/images/*.arrow    a row an image: its name, texts, bucket, crops and maps
    OUT/texts/*.arrow     a row a text: the text, its token ids, and its states if they are kept

Both folders are Arrow data sets that ``datasets.load_from_disk`` opens; nothing is read before it is asked
for.
"""

import functools
import hashlib
import json
import textwrap
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Float16, Int, Int64
from torch import nn

from wuerstchen.checkpoints.weights import MAX_JSON, read_json
from wuerstchen.data.plan import VIEW, held_out_names
from wuerstchen.data.tables import import_datasets
from wuerstchen.errors import CheckpointError, DataError, UserError
from wuerstchen.models.text import TextEncoder

FORMAT = 1
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

    def __init__(self, folder: Path | str, *, verify: bool = False) -> None:
        """Opens the set in ``folder``; ``verify`` reads all of it and compares the checksums.

        Raises ``DataError`` for what is no set, not finished, or damaged.
        """
        datasets = import_datasets()
        self.folder = Path(folder)
        self.description = read_description(self.folder)
        self._tables: dict[str, Any] = {}
        for table in ("images", "texts"):
            shards = []
            for shard in self.description[table]["shards"]:
                path = self.folder / table / shard["file"]
                check_shard(path, shard, verify=verify)
                try:
                    shards.append(datasets.Dataset.from_file(str(path)))
                except Exception as error:
                    raise _bad_shard(
                        path, f"it cannot be read ({' '.join(str(error).split())[:200]})"
                    ) from error
            found = self._tables[table] = datasets.concatenate_datasets(shards).with_format("arrow")
            named = self.description[table]["rows"]
            if len(found) != named:
                raise _bad_description(
                    self.folder / DESCRIPTION, f"{table} has {named} rows, and its shards hold {len(found)}"
                )
        settings = self.description["settings"]
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
        return self._list("images", "boxes", index).reshape(-1, 4)

    def captions(self, index: int) -> list[str]:
        """All captions of the image."""
        return [self._value("texts", "text", text) for text in self._texts_of(index)]

    def tokens(self, index: int, choice: int = 0) -> Int64[np.ndarray, " t"]:
        """The token ids of one of the captions, without padding: for ``TextEncoder.encode_tokens``."""
        return self._list("texts", "tokens", self._text(index, choice)).astype(np.int64)

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
            stored *= self._list("texts", "scales", text)[:, None]
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
        return self._list("images", "texts", index).tolist()

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
    try:
        content = read_json(path, MAX_JSON)
    except CheckpointError as error:
        reason = error.__cause__ or "it is no JSON object, or far too large"
        raise _bad_description(path, " ".join(str(reason).split())[:200]) from error
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
        for key in ("rows", "bytes"):
            _count(described, key)
    for key in ("items", "enlarged", "cut_texts"):
        _count(content, key)
    _count(content["texts"], "state_bytes")
    _of(content, "dropped", dict)
    _shapes(content, "damaged", 2, str)
    _shapes(content, "buckets", 3)
    for key in ("without_states", "with_states"):
        _of(_of(content, "bytes_per_image", dict), key, int | float)
    settings = _of(content, "settings", dict)
    for key in ("compressor", "text_encoder"):
        _of(settings, key, str)
    for key, kind in (("text_states", States), ("text_positions", Positions)):
        if settings[key] not in get_args(kind):
            raise ValueError(f"{key} is {_shown(settings[key])} and must be {' or '.join(get_args(kind))}")
    for key in ("size", "crops", "text_width", "text_length"):
        _count(settings, key, least=1, most=_MOST)
    if not 0 < _of(settings, "view_scale", int | float) <= 1:
        raise ValueError(f"view_scale is {_shown(settings['view_scale'])} and must be above 0 and at most 1")
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
    except OSError as error:
        raise _bad_shard(path, f"it cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise _bad_shard(path, f"that is no name of a file ({error})") from error
    if size != shard["bytes"]:
        raise _bad_shard(path, f"it has {size} bytes and was written with {shard['bytes']}")
    if verify and sha256(path) != shard["sha256"]:
        raise _bad_shard(path, "it has changed since it was written")


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bad_shard(path: Path, rule: str) -> DataError:
    return DataError(f"shard {str(path)!r} is wrong because {rule}; prepare the set again")

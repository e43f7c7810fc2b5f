"""Prepared sets: maps of the compressor and texts, stored once so that Stage C need not make them again.

    OUT/prepared.json     what it is: settings, fingerprints, counts, a SHA-256 of every shard; written last
    OUT/images/*.arrow    a row an image: its name, texts, bucket, crops and maps
    OUT/texts/*.arrow     a row a text: the text, its token ids, and its states if they are kept

Both folders are Arrow data sets that ``datasets.load_from_disk`` opens; nothing is read before it is asked
for.
"""

import functools
import hashlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Float16, Int, Int64
from torch import nn

from wuerstchen.data.plan import VIEW, held_out_names
from wuerstchen.data.prepared_check import (
    DESCRIPTION,
    Positions,
    States,
    bad_description,
    bad_shard,
    check_table,
    read_description,
    verify_shards,
)
from wuerstchen.data.tables import import_datasets
from wuerstchen.errors import DataError, UserError
from wuerstchen.models.text import TextEncoder

BYTES_PER_SHARD = 256
"""What the description of a shard takes of it, at most."""
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
    latent_values: int,
    crops: int = 1,
    tokens: float = 0,
    positions: float = 0,
    width: int = 0,
    states: States = "none",
    overhead: int = 300,
) -> int:
    """What an image with a text of its own takes on disk, about.

    ``latent_values`` is channels × height × width of a map, ``tokens`` the average length of a text and
    ``positions`` how many of its states are kept. ``overhead`` is for name, caption and crops.
    """
    state = {"none": 0, "fp16": 2 * width, "int8": width + 4}[states]
    return round(2 * latent_values * crops + 2 * tokens + positions * state) + overhead


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
                    check_table(opened.data.table, columns[table].arrow_schema)
                except Exception as error:
                    raise bad_shard(
                        path, f"it cannot be read ({' '.join(str(error).split())[:200]})"
                    ) from error
                shards.append(opened)
            found = self._tables[table] = datasets.concatenate_datasets(shards).with_format("arrow")
            named = self.description[table]["rows"]
            if len(found) != named:
                raise bad_description(
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
            raise bad_description(
                self.folder / DESCRIPTION,
                f"it names {len(self.buckets)} buckets, and an image is in number {found.max()}",
            )
        return found

    @property
    def image_size(self) -> int:
        """The side that pictures were prepared for: each has about so many pixels squared."""
        return self.description["settings"]["size"]

    @property
    def latents_precision(self) -> str:
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

    def semantic_latents(self, index: int, crop: int = 0) -> Float16[np.ndarray, "c h w"]:
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

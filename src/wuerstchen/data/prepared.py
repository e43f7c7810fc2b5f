"""Prepared sets: semantic latents and texts, computed once and stored for the training of Stage C.

    OUT/prepared.json     settings, fingerprints, counts, and the SHA-256 of each shard; written last
    OUT/images/*.arrow    a row per image: its name, texts, bucket, crops, and semantic latents ("maps")
    OUT/texts/*.arrow     a row per text: the text, its token ids, and optionally its text states

Both folders are Arrow data sets that ``datasets.load_from_disk`` opens. Rows are read on access.
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
    TABLES,
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
"""Bytes that one shard takes in ``prepared.json``, at most."""
MAX_SHORT_ID = 1 << 16  # smaller vocabularies are stored in 16 bits per token


def features(states: States, vocabulary: int) -> dict[str, Any]:
    """The columns of the tables ``images`` and ``texts``, as ``datasets.Features``."""
    datasets = import_datasets()
    value, listed = datasets.Value, datasets.List
    images = {
        "name": value("string"),
        "item": value("int64"),  # its number in the source, which seeds its crops
        "texts": listed(value("int32")),  # rows of the table of texts
        "width": value("int32"),  # of the image, before cropping
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
        texts["scales"] = listed(value("float32"))  # one per position
    return {"images": datasets.Features(images), "texts": datasets.Features(texts)}


def quantize_states(
    states: Float[np.ndarray, "t d"],
) -> tuple[Int[np.ndarray, "t d"], Float[np.ndarray, " t"]]:
    """Quantizes each position to int8 with its own scale: ``states ≈ int8 · scale``, within half a scale."""
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
    """Approximate bytes on disk of an image with one text of its own.

    ``latent_values`` is channels × height × width of the semantic latents, ``tokens`` the average length of a
    text, and ``positions`` the average number of its stored states. ``overhead`` covers the name, the caption
    and the crops.
    """
    state = {"none": 0, "fp16": 2 * width, "int8": width + 4}[states]
    return round(2 * latent_values * crops + 2 * tokens + positions * state) + overhead


def fingerprint(network: nn.Module, *more: str) -> str:
    """A hash of all weights of a network, independent of their file format, and of ``more``."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        plain = tensor.detach().cpu().contiguous()
        digest.update(plain.float().numpy() if plain.is_floating_point() else plain.numpy())
    for part in more:
        digest.update(part.encode())
    return digest.hexdigest()


def text_fingerprint(encoder: TextEncoder) -> str:
    """A hash of a text encoder with its tokenizer and its length."""
    return fingerprint(
        encoder.model, encoder.tokenizer.to_str(), str(encoder.pad_id), str(encoder.text_positions)
    )


class PreparedSet:
    """A prepared set with random access. It can be pickled for worker processes."""

    def __init__(self, folder: Path | str, *, verify: bool | None = None) -> None:
        """Opens the set in ``folder``.

        ``verify`` says whether to read the whole set and compare checksums. The default does so for shards
        newer than ``prepared.json``, which is written last: these were changed, or copied without their
        times. If they are intact, ``prepared.json`` is touched where possible, so that they are verified only
        once. The structure of the tables is always checked, because damaged offsets crash the process.

        Raises ``DataError`` if the folder is not a prepared set, is unfinished, or is damaged.
        """
        datasets = import_datasets()
        self.folder = Path(folder)
        self.description = read_description(self.folder)
        verify_shards(self.folder, self.description, verify)
        settings = self.description["settings"]
        columns = features(settings["text_states"], settings["vocabulary"])
        self._tables: dict[str, Any] = {}
        for table in TABLES:
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
                    self.folder / DESCRIPTION,
                    f"{table} must have {named} rows, but its shards have {len(found)}",
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
        """The bucket of each image, for ``BucketPlan``."""
        found = self._tables["images"].data.column("bucket").to_numpy().astype(np.int64)
        if found.min() < 0 or found.max() >= len(self.buckets):
            raise bad_description(
                self.folder / DESCRIPTION,
                f"it has {len(self.buckets)} buckets, but an image is in bucket {found.max()}",
            )
        return found

    @property
    def image_size(self) -> int:
        """The size that the set was prepared for: each image has about size × size pixels."""
        return self.description["settings"]["size"]

    @property
    def latents_precision(self) -> str:
        """The precision of the compressor. Earlier versions also offered bfloat16."""
        settings = self.description["settings"]
        return settings.get("maps_precision", settings.get("precision", "float32"))

    def rows(self, split: Literal["train", "heldout"]) -> Int64[np.ndarray, " n"]:
        """The images of the training split, or of the held-out split (``plan.held_out_names``).

        All views of an image are in the same split.
        """
        names = self._tables["images"].data.column("name").to_pylist()
        images = [name.split(VIEW)[0] for name in names]
        held_out = held_out_names(set(images))
        return np.flatnonzero([(image in held_out) == (split == "heldout") for image in images])

    def fingerprint(self) -> str:
        """A hash of the contents of the set, computed from the checksums in ``prepared.json``."""
        shards = [*self.description["images"]["shards"], *self.description["texts"]["shards"]]
        return hashlib.sha256("".join(shard["sha256"] for shard in shards).encode()).hexdigest()

    def size(self, index: int) -> tuple[int, int]:
        """Width and height in pixels to which the image was scaled."""
        return self.buckets[int(self.bucket_ids[index])]

    def name(self, index: int) -> str:
        """The name of the image in its source."""
        return self._value("images", "name", index)

    def semantic_latents(self, index: int, crop: int = 0) -> Float16[np.ndarray, "c h w"]:
        """The semantic latents of a crop of the image. Raises ``DataError`` if they contain NaN."""
        if not 0 <= crop < self.crops:
            raise UserError(
                f"crop must be between 0 and {self.crops - 1}, got {crop}. The set stores {self.crops} crops"
                " of each image."
            )
        channels, height, width = self.description["settings"]["maps"][int(self.bucket_ids[index])]
        values = self._list("images", "maps", index)
        count = channels * height * width
        if len(values) != count * self.crops:
            raise self._bad_image(
                index, f"its latents have {len(values)} values instead of {count * self.crops}"
            )
        found = values[crop * count : (crop + 1) * count].reshape(channels, height, width)
        if not np.isfinite(found).all():
            raise self._bad_image(index, "its semantic latents contain NaN or infinity")
        return found

    def boxes(self, index: int) -> Float[np.ndarray, "crops 4"]:
        """Left, top, right and bottom of each crop, in pixels of the source image."""
        boxes = self._list("images", "boxes", index)
        if len(boxes) != 4 * self.crops:
            raise self._bad_image(index, f"its crops have {len(boxes)} sides instead of {4 * self.crops}")
        return boxes.reshape(-1, 4)

    def captions(self, index: int) -> list[str]:
        """All captions of the image."""
        return [self._value("texts", "text", text) for text in self._texts_of(index)]

    def tokens(self, index: int, choice: int = 0) -> Int64[np.ndarray, " t"]:
        """The token ids of one caption, without padding, for ``TextEncoder.encode_tokens``."""
        found = self._list("texts", "tokens", self._text(index, choice)).astype(np.int64)
        settings = self.description["settings"]
        vocabulary = settings["vocabulary"]
        if len(found) > settings["text_length"] or not ((found >= 0) & (found < vocabulary)).all():
            raise self._bad_image(
                index,
                f"its text has {len(found)} tokens from {found.min()} to {found.max()}, but at most"
                f" {settings['text_length']} from 0 to {vocabulary - 1} are allowed",
            )
        return found

    def states(self, index: int, choice: int = 0) -> Float[np.ndarray, "t d"]:
        """The text states of one caption in float32, with those of the padding if ``text_positions`` is all.

        Raises ``UserError`` if the set stores no states, and ``DataError`` if they contain NaN.
        """
        if self.states_kept == "none":
            raise UserError(
                f"Prepared set {str(self.folder)!r} has no text states. Encode its tokens, or prepare the set"
                " with --text-states fp16."
            )
        text = self._text(index, choice)
        width = self.description["settings"]["text_width"]
        flat = self._list("texts", "states", text)
        most = width * self.description["settings"]["text_length"]
        if len(flat) % width or len(flat) > most:
            raise self._bad_image(
                index, f"its text states have {len(flat)} values, and at most {most} are allowed"
            )
        stored = flat.reshape(-1, width).astype(np.float32)
        if self.states_kept == "int8":
            scales = self._list("texts", "scales", text)
            if len(scales) != len(stored):
                raise self._bad_image(index, f"it has {len(stored)} text states but {len(scales)} scales")
            stored *= scales[:, None]
        if not np.isfinite(stored).all():
            raise self._bad_image(index, "its text states contain NaN or infinity")
        return stored

    def check_model(self, compressor: nn.Module, text_encoder: TextEncoder | None = None) -> None:
        """Raises ``UserError`` unless the set was prepared with these networks."""
        settings = self.description["settings"]
        found = {"compressor": fingerprint(compressor)}
        if text_encoder is not None:
            found["text_encoder"] = text_fingerprint(text_encoder)
        for part, value in found.items():
            if settings[part] != value:
                raise UserError(
                    f"Prepared set {str(self.folder)!r} was made with another {part.replace('_', ' ')}."
                    " Prepare it with this model."
                )

    def _texts_of(self, index: int) -> list[int]:
        texts = self._list("images", "texts", index).tolist()
        count = len(self._tables["texts"])
        if not texts or min(texts) < 0 or max(texts) >= count:
            raise self._bad_image(index, f"it refers to the texts {texts[:5]}, but the set has {count}")
        return texts

    def _text(self, index: int, choice: int) -> int:
        texts = self._texts_of(index)
        if not 0 <= choice < len(texts):
            raise UserError(
                f"choice must be between 0 and {len(texts) - 1} for {self.name(index)!r}, got {choice}."
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

    def _bad_image(self, index: int, problem: str) -> DataError:
        return DataError(
            f"Image {self.name(index)!r} of prepared set {str(self.folder)!r} is damaged: {problem}. Prepare"
            " the set again."
        )

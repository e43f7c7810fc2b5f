"""Batches for Stage C from a prepared set: stored semantic latents, and texts as token ids or states.

As with images, there is no state: the images of a batch, and the crop and caption of each, follow from the
number of images seen.
"""

import functools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float16, Int, Int64
from torch import Tensor, nn
from torch.utils.data import Dataset

from wuerstchen.data.plan import BucketPlan, crop_at, generator, item_at, items_at
from wuerstchen.data.prepared import PreparedSet
from wuerstchen.errors import DataError, UserError
from wuerstchen.models.text import TextEncoder, TextStates
from wuerstchen.train.config import StoredTexts


@dataclass(frozen=True)
class StoredImage:
    """One image of a batch."""

    semantic_latents: Float16[np.ndarray, "c h w"]
    tokens: Int64[np.ndarray, " tokens"]
    states: Float[np.ndarray, "t d"] | None


@dataclass(frozen=True)
class StoredBatch:
    """The images of one update, all of the same size."""

    indices: Int[Tensor, " b"]
    """Their indices in the run. All random numbers of an image are a function of the seed and its index."""
    semantic_latents: Float16[Tensor, "b c h w"]
    """The output of the compressor, not normalised."""
    tokens: list[Int64[np.ndarray, " _"]]
    states: Float[Tensor, "b t d"] | None
    """None if texts are read as tokens. 0 at padding that is not stored."""
    skipped: list[tuple[str, str]]
    """Names of images that could not be read, with the reason. The next images took their places."""

    def texts(self, encoder: TextEncoder, device: torch.device) -> TextStates:
        """The states and masks of the texts: stored, or computed by ``encoder``, which prepared the set."""
        if self.states is None:
            return encoder.encode_tokens(self.tokens)
        lengths = torch.tensor([len(tokens) for tokens in self.tokens], dtype=torch.int64, device="cpu")
        mask = torch.arange(self.states.shape[1], device="cpu") < lengths[:, None]
        return TextStates(states=self.states.to(device), mask=mask.to(device))


def _stored_image(prepared: PreparedSet, row: int, seed: int, index: int, texts: StoredTexts) -> StoredImage:
    """The crop and caption of a row for the image with this index. Raises ``DataError`` for NaN."""
    latents = prepared.semantic_latents(row, crop_at(index, prepared.crops, seed))
    choice = int(generator(seed, index, "caption").integers(len(prepared.captions(row))))
    states = prepared.states(row, choice) if texts == "states" else None
    return StoredImage(latents, prepared.tokens(row, choice), states)


def _batch_of(
    prepared: PreparedSet, indices: list[int], images: list[StoredImage], skipped: list[tuple[str, str]]
) -> StoredBatch:
    states = None
    if images[0].states is not None:
        settings = prepared.description["settings"]
        shape = (len(images), settings["text_length"], settings["text_width"])
        states = torch.zeros(shape, dtype=torch.float32, device="cpu")
        for row, image in enumerate(images):
            assert image.states is not None
            states[row, : len(image.states)] = torch.from_numpy(image.states)
    return StoredBatch(
        indices=torch.tensor(indices, dtype=torch.int64, device="cpu"),
        semantic_latents=torch.from_numpy(np.stack([image.semantic_latents for image in images])),
        tokens=[image.tokens for image in images],
        states=states,
        skipped=skipped,
    )


class PreparedFeed(Dataset[tuple[int, StoredImage, list[tuple[str, str]]]]):
    """The images of a run on a prepared set by index, without its held-out part.

    ``BucketPlan`` selects the images of batch number ``index // batch_size``, which all have the same size.
    If a size has fewer images than a batch, its batches repeat them.
    """

    captions = True

    def __init__(
        self,
        source: PreparedSet,
        seed: int,
        images: int,
        batch_size: int,
        texts: StoredTexts = "tokens",
        skip: Collection[str] = (),
    ) -> None:
        """``images`` and ``batch_size`` are totals over all processes. Images named in ``skip`` are left out.
        The next ones of their size take their places.

        Raises ``UserError`` unless ``images`` is a multiple of ``batch_size``.
        """
        if images % batch_size:
            raise UserError(
                f"images must be a multiple of batch_size={batch_size} with a prepared set, got {images}. "
                f"Use {max(images // batch_size, 1) * batch_size} images."
            )
        self.source = source
        self.seed = seed
        self.batch_size = batch_size
        self.texts: StoredTexts = texts
        self.skip = frozenset(skip)
        self.rows = source.rows("train")
        self.plan = BucketPlan(source.bucket_ids[self.rows], batch_size, seed)

    def epoch(self) -> list[str]:
        """Lines to print about an epoch, one for each size."""
        lines = []
        for (width, height), count in zip(self.source.buckets, self._counts, strict=True):
            whole, rest = divmod(count, self.batch_size)
            if not count:
                continue
            line = f"{width}x{height}: {_times(count, 'image')}, "
            if not whole:
                line += (
                    f"fewer than the batch size of {self.batch_size}, so about every "
                    f"{self.batch_size / count:.3g} epochs one batch repeats each image about "
                    f"{self.batch_size / count:.3g} times"
                )
            else:
                line += f"{_times(whole, 'batch', 'batches')} per epoch"
                line += f". {rest} are left over in each epoch, different ones each time" if rest else ""
            lines.append(line)
        return lines

    @functools.cached_property
    def _counts(self) -> list[int]:
        """Number of images of each size."""
        return np.bincount(self.plan.buckets, minlength=len(self.source.buckets)).tolist()

    @property
    def size(self) -> int:
        """The image size that the set was prepared for."""
        return self.source.image_size

    def __getitem__(self, index: int) -> tuple[int, StoredImage, list[tuple[str, str]]]:
        batch, position = divmod(index, self.batch_size)
        item = int(self.plan.ids(batch)[position])
        bucket = self._members[int(self.plan.buckets[item])]
        place = int(np.searchsorted(bucket, item))
        skipped: list[tuple[str, str]] = []
        for after in range(len(bucket)):
            row = int(self.rows[bucket[(place + after) % len(bucket)]])
            if self.skip and self.source.name(row) in self.skip:
                continue
            try:
                image = _stored_image(self.source, row, self.seed, index, self.texts)
                return index, image, skipped
            except DataError as error:
                skipped.append((self.source.name(row), str(error)))
        if not skipped:
            raise DataError(f"skip must leave some images of each size, got the names of all {len(bucket)}.")
        raise DataError(
            f"none of the {len(bucket)} images of a size can be read, the last because: {skipped[-1][1]}"
        )

    def names(self, indices: Sequence[int]) -> list[str]:
        """The names of the images with these indices."""
        places = (divmod(index, self.batch_size) for index in indices)
        items = (int(self.plan.ids(batch)[position]) for batch, position in places)
        return [self.source.name(int(self.rows[item])) for item in items]

    @functools.cached_property
    def _members(self) -> list[Int64[np.ndarray, " n"]]:
        """The items of each bucket, in order."""
        return [np.flatnonzero(self.plan.buckets == bucket) for bucket in range(len(self.source.buckets))]

    def collate(self, samples: list[tuple[int, StoredImage, list[tuple[str, str]]]]) -> StoredBatch:
        return _batch_of(
            self.source,
            [index for index, _, _ in samples],
            [image for _, image, _ in samples],
            [entry for _, _, skipped in samples for entry in skipped],
        )

    def shown(self, count: int, size: int) -> Float[Tensor, "n 3 h w"]:
        """No images: Stage C's previews only show prompts."""
        return torch.empty(0, 3, size, size, dtype=torch.float32, device="cpu")


def _times(count: int, singular: str, plural: str = "") -> str:
    return f"{count:,} {singular if count == 1 else plural or singular + 's'}"


def some_latents(
    prepared: PreparedSet, count: int, seed: int, skip: Collection[str] = ()
) -> Iterator[Float16[np.ndarray, "c h w"]]:
    """Semantic latents of at most ``count`` training images, for measuring statistics.

    Leaves out images that cannot be read, and images named in ``skip``.
    """
    rows, left_out = prepared.rows("train"), frozenset(skip)
    for index in range(count):
        row = int(rows[item_at(index, len(rows), seed)])
        if left_out and prepared.name(row) in left_out:
            continue
        try:
            yield prepared.semantic_latents(row, crop_at(index, prepared.crops, seed))
        except DataError:
            continue


class HeldOutLatents:
    """At most ``count`` held-out images of a prepared set, always the same."""

    def __init__(self, prepared: PreparedSet, seed: int, count: int, texts: StoredTexts = "tokens") -> None:
        rows = prepared.rows("heldout")
        self._prepared = prepared
        self._images: dict[int, list[StoredImage]] = {}
        for number in items_at(range(len(rows)), len(rows), seed) if len(rows) else []:
            if len(self) == count:
                break
            row = int(rows[number])
            try:
                image = _stored_image(prepared, row, seed, number, texts)
            except DataError:
                continue
            self._images.setdefault(int(prepared.bucket_ids[row]), []).append(image)

    def __len__(self) -> int:
        return sum(map(len, self._images.values()))

    def batches(self, batch_size: int) -> Iterator[StoredBatch]:
        """All images, in batches of the same size. Their indices count up from 0."""
        first = 0
        for bucket in sorted(self._images):
            images = self._images[bucket]
            for start in range(0, len(images), batch_size):
                part = images[start : start + batch_size]
                yield _batch_of(self._prepared, [*range(first, first + len(part))], part, [])
                first += len(part)


def check_prepared(
    prepared: PreparedSet,
    *,
    compressor: nn.Module,
    text_encoder: TextEncoder,
    view_scale: float,
    image_size: int,
    texts: StoredTexts,
    text_positions: Literal["real", "all"],
) -> None:
    """Raises ``UserError`` if Stage C cannot train on the set with these settings."""
    prepared.check_model(compressor, text_encoder)
    name, settings = f"prepared set {str(prepared.folder)!r}", prepared.description["settings"]
    if settings["view_scale"] != view_scale:
        raise UserError(
            f"{name} was prepared at view_scale {settings['view_scale']}, and the model has {view_scale}. "
            "Prepare it with this model."
        )
    if prepared.image_size != image_size:
        raise UserError(
            f"image_size must be {prepared.image_size} for {name}, whose {len(prepared.buckets)} sizes have "
            f"about {prepared.image_size}x{prepared.image_size} pixels, got {image_size}. Use "
            f"{prepared.image_size}, or prepare it with --size {image_size}."
        )
    if texts == "tokens":
        return
    if prepared.states_kept == "none":
        raise UserError(
            f"stored_texts=states needs stored text states, and {name} has none. Use tokens, or prepare it "
            "with --text-states fp16."
        )
    if text_positions == "all" and prepared.text_positions == "real":
        raise UserError(
            f"text_positions=all needs the states of padding, and {name} does not have them. Use "
            "stored_texts=tokens, or prepare it with --text-positions all."
        )


def refuse_prepared(data: str, needs_images: str, prepared_images: int = 0, mirrored: float = 0.0) -> None:
    """Raises ``UserError`` for a stage that needs images, for an image cache, and for mirrored images.

    ``needs_images`` says why the stage needs images. It is empty for a stage that does not.
    """
    if needs_images:
        raise UserError(
            f"data={data} is a prepared set, which has no images, and {needs_images}. Use the images, or "
            "train only c."
        )
    if prepared_images:
        raise UserError(
            f"prepared_images must be 0 with a prepared set, got {prepared_images}: data={data} has no "
            "images to cache."
        )
    if mirrored:
        raise UserError(
            f"mirrored must be 0 with a prepared set, got {mirrored}: data={data} has no images to mirror."
        )

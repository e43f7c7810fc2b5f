"""Images kept on the device, with everything that frozen networks compute from them.

Loading an image and running the frozen networks costs more than training a small network on it. So a run can
load a fixed number of images once and draw all batches from them. An update then reads only device memory.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import UInt8
from torch import Tensor

from wuerstchen.data.caption_files import CaptionsOnly
from wuerstchen.errors import out_of_memory_named
from wuerstchen.progress_bar import bar
from wuerstchen.train.feed.images import Batch, Feed, batches
from wuerstchen.train.stages.base import Inputs, LendsEncoders, Stage, autocast

_LOADED, _PREPARED = 64, 256  # images at a time
_ENCODED = 16  # images at a time if they are not kept
_CAPTIONS = 1024  # captions without images at a time


@runtime_checkable
class Cache(Protocol):
    """What the loop reads of a cache."""

    names: list[str]
    """Names of the images in order. Empty if unknown."""

    def __len__(self) -> int: ...

    def prepare(self, stage: Stage, dtype: torch.dtype | None) -> Inputs:
        """What updates read of all images, on the device."""
        ...


@dataclass(frozen=True)
class ImageCache:
    """The first images of a feed, on the device."""

    images: UInt8[Tensor, "n h w 3"]
    """For captions without images a single black pixel, expanded to their number and size."""
    captions: list[str]
    skipped: list[tuple[str, str]]
    """Names of images that could not be read, and why. Others took their places."""
    names: list[str] = field(default_factory=list)
    """Names of the images in order. Empty if unknown."""

    def __len__(self) -> int:
        return len(self.images)

    def prepare(self, stage: Stage, dtype: torch.dtype | None) -> Inputs:
        """``stage.prepare`` of every image, and the images themselves if the stage reads them."""
        inputs: Inputs = {}
        together = _PREPARED if self.images.is_contiguous() else _CAPTIONS
        for start in bar(
            range(0, len(self), together), desc=f"Stage {stage.name.upper()}: preparing", leave=False
        ):
            rows = slice(start, min(start + together, len(self)))
            numbers = torch.arange(rows.start, rows.stop, device="cpu")
            batch = Batch(numbers, self.images[rows], self.captions[rows], [])
            _prepare_batch(stage, batch, dtype, self.images.device, inputs, len(self))
        return inputs | ({"images": self.images} if stage.reads_images else {})


@dataclass(frozen=True)
class InputCache:
    """What updates read of the first images of a feed. The images themselves are not kept."""

    feed: Feed
    count: int
    workers: int
    device: torch.device
    on_skipped: Callable[[str, str], None]
    """Called with the name of each image that could not be read, and why. Others took their places."""

    def __len__(self) -> int:
        return self.count

    @property
    def names(self) -> list[str]:
        return self.feed.names(range(self.count))

    def prepare(self, stage: Stage, dtype: torch.dtype | None) -> Inputs:
        """``stage.prepare`` of every image, for a stage that does not read images."""
        inputs: Inputs = {}
        lent = (
            stage.lent_encoders(self.device) if isinstance(stage, LendsEncoders) else contextlib.nullcontext()
        )
        with lent, bar(total=self.count, desc="encoding images", unit="img", dynamic_ncols=True) as shown:
            for batch in batches(self.feed, 0, self.count, _ENCODED, self.workers):
                _prepare_batch(stage, batch, dtype, self.device, inputs, self.count)
                for name, reason in batch.skipped:
                    self.on_skipped(name, reason)
                shown.update(len(batch.images))
        return inputs


def _prepare_batch(
    stage: Stage, batch: Batch, dtype: torch.dtype | None, device: torch.device, inputs: Inputs, count: int
) -> None:
    """Adds ``stage.prepare`` of a batch, whose indices count from 0, to those of all ``count`` images."""
    with torch.no_grad(), autocast(device, dtype):
        made = stage.prepare(batch, device)
    first = int(batch.indices[0])
    for name, tensor in made.items():
        if name not in inputs:
            with out_of_memory_named(f"prepared_images={count}"):
                inputs[name] = tensor.new_empty(count, *tensor.shape[1:])
        inputs[name][first : first + len(tensor)] = tensor


def fill_image_cache(feed: Feed, count: int, workers: int, device: torch.device) -> ImageCache:
    """Loads the first ``count`` images of the feed. Raises ``UserError`` if they do not fit into memory.

    The black images of sources that have captions only are not stored.
    """
    if isinstance(feed.source, CaptionsOnly):
        return _captions(feed, count, workers, device)
    with out_of_memory_named(f"prepared_images={count}"):
        images = torch.empty(count, feed.size, feed.size, 3, dtype=torch.uint8, device=device)
    captions: list[str] = []
    skipped: list[tuple[str, str]] = []
    with bar(total=count, desc="filling the image cache", unit="img", dynamic_ncols=True) as shown:
        for batch in batches(feed, 0, count, _LOADED, workers):
            images[len(captions) : len(captions) + len(batch.images)] = batch.images.to(device)
            captions += batch.captions
            skipped += batch.skipped
            shown.update(len(batch.images))
    return ImageCache(images, captions, skipped, feed.names(range(count)))


def _captions(feed: Feed, count: int, workers: int, device: torch.device) -> ImageCache:
    """The first ``count`` captions of a feed without images."""
    pixel = torch.zeros(1, 1, 1, 3, dtype=torch.uint8, device=device)
    smallest = Feed(feed.source, feed.seed, 1, captions=True, skip=feed.skip)
    captions: list[str] = []
    with bar(total=count, desc="reading captions", unit="captions", dynamic_ncols=True) as shown:
        for batch in batches(smallest, 0, count, _CAPTIONS, workers):
            captions += batch.captions
            shown.update(len(batch.captions))
    images = pixel.expand(count, feed.size, feed.size, 3)
    return ImageCache(images, captions, [], feed.names(range(count)))

"""Pictures composed once and held on the device, with all that the frozen networks make of them.

Composing a picture and running frozen networks over it costs more than training a small network on it. So a
run may compose a fixed number of pictures at its start and draw its batches from them: an update then reads
everything it needs out of the device's memory.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import UInt8
from torch import Tensor

from wuerstchen.errors import out_of_memory_named
from wuerstchen.progress_bar import bar
from wuerstchen.train.feed.images import Batch, Feed, batches
from wuerstchen.train.stages.base import Inputs, Stage, autocast

_COMPOSED, _PREPARED = 64, 256  # pictures at a time


@dataclass(frozen=True)
class ImageCache:
    """The first pictures of a feed, on the device."""

    images: UInt8[Tensor, "n h w 3"]
    captions: list[str]
    skipped: list[tuple[str, str]]
    """Names of pictures that could not be read, with the reason; others took their places."""
    names: list[str] = field(default_factory=list)
    """Of the pictures that were asked for, in order; empty where they are not known."""

    def __len__(self) -> int:
        return len(self.images)

    def prepare(self, stage: Stage, dtype: torch.dtype | None) -> Inputs:
        """What ``stage.prepare`` makes of every picture, and the pictures too if the stage reads them."""
        device = self.images.device
        inputs: Inputs = {}
        for start in bar(
            range(0, len(self), _PREPARED), desc=f"Stage {stage.name.upper()}: preparing", leave=False
        ):
            rows = slice(start, min(start + _PREPARED, len(self)))
            numbers = torch.arange(rows.start, rows.stop, device="cpu")
            batch = Batch(numbers, self.images[rows], self.captions[rows], [])
            with torch.no_grad(), autocast(device, dtype):
                made = stage.prepare(batch, device)
            for name, tensor in made.items():
                if name not in inputs:
                    with out_of_memory_named(f"prepared_images={len(self)}"):
                        inputs[name] = tensor.new_empty(len(self), *tensor.shape[1:])
                inputs[name][rows] = tensor
        return inputs | ({"images": self.images} if stage.reads_images else {})


def fill_image_cache(feed: Feed, count: int, workers: int, device: torch.device) -> ImageCache:
    """The first ``count`` pictures of the feed. Raises ``UserError`` if memory cannot hold them."""
    with out_of_memory_named(f"prepared_images={count}"):
        images = torch.empty(count, feed.size, feed.size, 3, dtype=torch.uint8, device=device)
    captions: list[str] = []
    skipped: list[tuple[str, str]] = []
    with bar(total=count, desc="composing pictures", unit="img", dynamic_ncols=True) as shown:
        for batch in batches(feed, 0, count, _COMPOSED, workers):
            images[len(captions) : len(captions) + len(batch.images)] = batch.images.to(device)
            captions += batch.captions
            skipped += batch.skipped
            shown.update(len(batch.images))
    return ImageCache(images, captions, skipped, feed.names(range(count)))

"""A stage and a source small enough to train hundreds of updates in a second."""

import numpy as np
import pytest
import torch
from torch import nn

from wuerstchen.data.sources import Example
from wuerstchen.errors import DataError
from wuerstchen.train.config import Optimization
from wuerstchen.train.engine.job import Settings
from wuerstchen.train.feed.images import pixels_of


class ToySource:
    """Noise images; those in ``broken`` cannot be read."""

    def __init__(self, length: int = 10, broken: tuple[int, ...] = ()) -> None:
        self.length = length
        self.broken = broken
        self.content = "toy"

    def __len__(self) -> int:
        return self.length

    def name(self, item: int) -> str:
        return f"{item}.png"

    def image(self, item: int, rng: np.random.Generator, size: int) -> np.ndarray:
        if item in self.broken:
            raise DataError(f"{self.name(item)} is broken")
        picture = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        picture[0, 0, 0] = item
        return picture

    def example(self, item: int, rng: np.random.Generator, size: int) -> Example:
        return Example(image=self.image(item, rng, size), caption=f"picture {item}")

    def fingerprint(self) -> str:
        return self.content


class ToyStage:
    """Two networks trained against each other, with dropout and batch statistics: all that can go wrong."""

    name = "a"
    averaged = ("model",)
    captions = True
    reads_images = True
    rates: dict[str, float] = {}  # noqa: RUF012
    rate_scales: dict[str, float] = {}  # noqa: RUF012
    preview_labels: dict[str, list[str]] = {"rows": ["seen"]}  # noqa: RUF012

    def __init__(self, images: int = 120, batch_size: int = 4, on_batch=None) -> None:
        torch.manual_seed(1)
        self.optimization = Optimization(images=images, batch_size=batch_size, learning_rate=1e-2, warmup=16)
        model = nn.Sequential(nn.Linear(48, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.networks: dict[str, nn.Module] = {"model": model, "critic": nn.Linear(1, 1)}
        self.on_batch = on_batch

    def prepare(self, batch, device):
        return {"first": batch.pixels(device)[:, 0, 0, 0]}

    def losses(self, inputs, random):
        if self.on_batch is not None:
            self.on_batch(random)
        x = pixels_of(inputs["images"]).flatten(1) + 0.1 * random.normal("noise", (48,))
        x = x + inputs["first"][:, None]
        y = self.networks["model"](x)
        yield "model", (self.networks["critic"](y) ** 2).mean(), {"spread": y.detach().std()}
        yield "critic", (self.networks["critic"](y.detach()) - 1).square().mean(), {}

    def check(self, values):
        pass

    def preview(self, averages, pixels, device, *, low_memory=False):
        from wuerstchen.images import to_images

        torch.rand(3)  # disturbs the global generator, as a preview may
        return to_images(pixels.cpu())


@pytest.fixture
def toy_source():
    return ToySource


@pytest.fixture
def toy_stage():
    return ToyStage


@pytest.fixture
def settings():
    return Settings(
        seed=0,
        autocast=None,
        workers=0,
        checkpoint_seconds=1e9,
        log_every=1,
        preview_every=0,
        preview_size=4,
        previews=2,
    )

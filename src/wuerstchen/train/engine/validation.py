"""The loss on held-out images by timestep: whether a diffusion stage still learns, and where.

The training loss of a diffusion model hardly moves, because most of its variance comes from timesteps and
noise. Here both are fixed: the same held-out images, the same noise, the centres of equal timestep bins, and
the averaged weights. Validation uses no random generator of training.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from wuerstchen.data.plan import generator, items_at
from wuerstchen.data.prepared import PreparedSet
from wuerstchen.data.sources import Source
from wuerstchen.diffusion.known_cells import with_known_cells
from wuerstchen.diffusion.objective import Objective
from wuerstchen.errors import DataError
from wuerstchen.train.config import StoredTexts
from wuerstchen.train.feed.images import Batch
from wuerstchen.train.feed.known_cells import central_region, mean_of_unknown
from wuerstchen.train.feed.prepared import HeldOutLatents, StoredBatch
from wuerstchen.train.feed.random import ImageRandom
from wuerstchen.train.stages.base import Inputs, Stage, autocast, inputs_of

IMAGES = 64
BINS = 8
_BATCH = 16  # images at a time, at most
_SEED = 0  # not the recipe's, so that runs with different seeds can be compared
_PAUSE = 20  # times its duration between two validations at checkpoints, so it takes 5 % of the time


@runtime_checkable
class Denoising(Protocol):
    """A stage with a diffusion objective."""

    objective: Objective
    denoises: str
    """Name in ``Inputs`` of what is noised."""

    def predict(self, averages: dict[str, nn.Module], inputs: Inputs, x: Tensor, t: Tensor) -> Tensor:
        """The prediction of the averaged network for ``x`` (b, c, h, w) at the times ``t``, (b,) or
        (b, h, w)."""
        ...


@runtime_checkable
class DenoisingTokens(Protocol):
    """A stage that predicts tokens."""

    def token_errors(
        self, averages: dict[str, nn.Module], inputs: Inputs, t: Tensor, random: ImageRandom
    ) -> tuple[Tensor, Tensor]:
        """For each image at the times ``t`` (b,), with the averaged weights: the mean cross entropy, and the
        loss as in training."""
        ...


@runtime_checkable
class Jumping(Protocol):
    """A stage that predicts the ends of trajectories."""

    times: list[float]
    """The times of a trajectory. The last one is its end."""

    def endpoint_errors(
        self, averages: dict[str, nn.Module], inputs: Inputs, k: int
    ) -> tuple[Tensor, Tensor]:
        """For each image at the time ``times[k]``, with the averaged weights: the mean squared error against
        the end of its trajectory, and the loss."""
        ...


Validated = Denoising | DenoisingTokens | Jumping
"""The stages that have a validation loss."""


@runtime_checkable
class HeldOutSet(Protocol):
    """Held-out images, or what a prepared set stores of them."""

    def __len__(self) -> int: ...

    def batches(self, batch_size: int) -> Iterator[Batch] | Iterator[StoredBatch]:
        """All of them, in the same batches every time, numbered from 0."""
        ...


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Images that training never sees."""

    images: UInt8[Tensor, "n h w 3"]
    captions: list[str]

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        for start in range(0, len(self), batch_size):
            rows = slice(start, start + batch_size)
            yield Batch(
                torch.arange(len(self), device="cpu")[rows], self.images[rows], self.captions[rows], []
            )


def held_out(
    source: Source | PreparedSet, size: int, count: int = IMAGES, texts: StoredTexts = "tokens"
) -> HeldOut | HeldOutLatents | None:
    """At most ``count`` images of a source that was opened for its held-out ones, always the same.

    Unreadable images are left out. Returns None if there are none.
    """
    if isinstance(source, PreparedSet):
        latents = HeldOutLatents(source, _SEED, count, texts)
        return latents if len(latents) else None
    examples = []
    for number in items_at(range(len(source)), len(source), _SEED) if len(source) else []:
        if len(examples) == count:
            break
        try:
            examples.append(source.example(number, generator(_SEED, number, "validation"), size))
        except DataError:
            continue
    if not examples:
        return None
    images = torch.from_numpy(np.stack([example.image for example in examples]))
    return HeldOut(images=images, captions=[example.caption for example in examples])


class Validation:
    """Measures the validation loss of a stage repeatedly."""

    def __init__(
        self,
        stage: Validated,
        images: HeldOutSet,
        dtype: torch.dtype | None,
        device: torch.device,
    ) -> None:
        assert isinstance(stage, Stage)
        self.stage = stage
        self.images = images
        self.dtype = dtype
        self.device = device
        self._bins = len(stage.times) - 1 if isinstance(stage, Jumping) else BINS
        self._batch = min(_BATCH, stage.optimization.batch_size)
        self._prepared: list[tuple[Tensor, Inputs]] = []
        self._ended = -math.inf
        self._took = 0.0

    @property
    def due(self) -> bool:
        """Whether the last validation is long enough ago for another one."""
        return time.monotonic() - self._ended >= _PAUSE * self._took

    @torch.no_grad()
    def __call__(self, averages: dict[str, nn.Module]) -> dict[str, Any]:
        """Measures ``bins``, the unweighted mean error (for tokens the cross entropy) in each timestep bin,
        and ``loss``, the mean over bins with the stage's loss weighting. That is the training loss with
        uniform timesteps, without conditioning noise or dropout.

        For a stage that predicts the ends of trajectories, the bins are the ``times`` of a trajectory.

        Values that are not finite are None. The first call also prepares the images and takes longer.
        """
        self._prepared = self._prepared or list(self._prepare())
        began = time.monotonic()
        bins, losses = self._means(partial(self._errors, averages))
        self._ended = time.monotonic()
        self._took = self._ended - began
        times = {"times": self.stage.times[:-1]} if isinstance(self.stage, Jumping) else {}
        return {
            "loss": _finite(losses.mean().item()),
            "bins": [_finite(value) for value in bins.tolist()],
            **times,
        }

    @torch.no_grad()
    def around_known_cells(self, averages: dict[str, nn.Module]) -> dict[str, list[float | None]]:
        """The unweighted mean error of a diffusion stage around a central rectangle, in each timestep bin:
        ``known`` if the rectangle is known, ``nothing_known`` if all cells are noised.

        The rectangle has half the sides (``known_cells.central_region``). Values that are not finite are
        None.
        """
        self._prepared = self._prepared or list(self._prepare())
        known, nothing_known = self._means(partial(self._errors_around, averages))
        return {
            "known": [_finite(value) for value in known.tolist()],
            "nothing_known": [_finite(value) for value in nothing_known.tolist()],
        }

    def _means(self, sum_errors: Callable[[Tensor, Inputs, int], Tensor]) -> tuple[Tensor, ...]:
        """The means over images of what ``sum_errors`` sums for a batch and a bin: two values per bin."""
        sums = torch.zeros(self._bins, 2, dtype=torch.float64, device="cpu")
        for numbers, inputs in self._prepared:
            found = [sum_errors(numbers, inputs, k) for k in range(self._bins)]
            sums += torch.stack(found).cpu().double()  # Apple's GPUs have no float64
        return (sums / len(self.images)).unbind(1)

    def _prepare(self) -> Iterator[tuple[Tensor, Inputs]]:
        for batch in self.images.batches(self._batch):
            with autocast(self.device, self.dtype):
                inputs = inputs_of(self.stage, batch, self.device)
            yield batch.indices.to(self.device), inputs

    def _errors(self, averages: dict[str, nn.Module], numbers: Tensor, inputs: Inputs, k: int) -> Tensor:
        """The sum over images of their mean errors at the centre of bin ``k``, and that of their losses."""
        stage = self.stage
        if isinstance(stage, Jumping):
            with autocast(self.device, self.dtype):
                errors, losses = stage.endpoint_errors(averages, inputs, k)
            return torch.stack([errors.sum(), losses.sum()])
        t = _times()[k].to(self.device).expand(len(numbers))
        with autocast(self.device, self.dtype):
            if isinstance(stage, DenoisingTokens):
                errors, losses = stage.token_errors(averages, inputs, t, ImageRandom(_SEED + k, numbers))
                return torch.stack([errors.sum(), losses.sum()])
            clean = inputs[stage.denoises]
            objective, noise = stage.objective, _noise(clean, numbers, k)
            output = stage.predict(averages, inputs, objective.noised(clean, noise, t), t)
        errors = objective.errors(output, clean, noise, t)
        return torch.stack([errors.sum(), (errors * objective.weight(t)).sum()])

    def _errors_around(
        self, averages: dict[str, nn.Module], numbers: Tensor, inputs: Inputs, k: int
    ) -> Tensor:
        """The sum over images of the mean errors around a central rectangle at the centre of bin ``k``, with
        the rectangle known and with nothing known."""
        stage = self.stage
        assert isinstance(stage, Denoising)
        objective, clean = stage.objective, inputs[stage.denoises]
        noise = _noise(clean, numbers, k)
        center = central_region(clean.shape[2:], clean.device).expand(len(clean), -1, -1)
        sums = []
        for known in (center, torch.zeros_like(center)):
            t = _times()[k].to(self.device).expand(len(numbers))
            x, t = with_known_cells(objective.noised(clean, noise, t), t, clean, known)
            with autocast(self.device, self.dtype):
                output = stage.predict(averages, inputs, x, t)
            sums.append(mean_of_unknown(objective.errors(output, clean, noise, t), center).sum())
        return torch.stack(sums)


def _noise(clean: Tensor, numbers: Tensor, k: int) -> Tensor:
    return ImageRandom(_SEED, numbers).normal(f"validation {k}", clean.shape[1:])


def _times() -> Tensor:
    return (torch.arange(BINS, dtype=torch.float32, device="cpu") + 0.5) / BINS


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

"""Where the batches of a stage come from: loaded from the feed on the way, or drawn from the image cache."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from wuerstchen.data.plan import items_at
from wuerstchen.train.engine.image_cache import Cache
from wuerstchen.train.engine.job import StageJob
from wuerstchen.train.engine.stopping import StopRequest
from wuerstchen.train.feed.images import Batch, batches
from wuerstchen.train.feed.prepared import StoredBatch
from wuerstchen.train.stages.base import Inputs, autocast, inputs_of


@runtime_checkable
class StepBatch(Protocol):
    """This rank's slice of the images of one update."""

    @property
    def indices(self) -> Int[Tensor, " b"]:
        """Image numbers in the run."""
        ...

    @property
    def skipped(self) -> Sequence[tuple[str, str]]:
        """Names of images that could not be read, and why."""
        ...


@runtime_checkable
class Batches(Protocol):
    """Where updates get their images."""

    waits: bool
    """Whether updates wait for data loading. Then waiting for the device after each update is free."""

    def fetch(self) -> StepBatch:
        """The next batch. Raises ``StoppedWaiting`` if a signal comes while it waits."""
        ...

    def inputs(self, batch: Any) -> Inputs:
        """The model inputs for a batch returned by ``fetch``."""
        ...

    def names(self, first: int) -> list[str]:
        """The names of the images of the batch that begins at image number ``first``; empty if unknown."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class CachedBatch:
    """This rank's slice of a batch from the image cache."""

    indices: Int[Tensor, " b"]
    """Image numbers in the run."""
    rows: Int[Tensor, " b"]
    """Where the images are in the cache."""
    skipped: tuple[tuple[str, str], ...] = ()


class FeedBatches:
    """Batches that worker processes load while training goes on."""

    waits = True

    def __init__(self, job: StageJob, first: int, stop: StopRequest) -> None:
        """Begins at image number ``first``. ``stop`` may end the wait for a batch."""
        self.job = job
        self.stop = stop
        batch_size, workers = job.stage.optimization.batch_size, job.settings.workers
        self._loaded = batches(job.feed, first, job.total, batch_size, workers, job.processes.rank_slice)

    def fetch(self) -> Batch | StoredBatch:
        with self.stop.waiting():
            return next(self._loaded)

    def inputs(self, batch: Batch | StoredBatch) -> Inputs:
        with torch.no_grad(), autocast(self.job.device, self.job.settings.autocast):
            return inputs_of(self.job.stage, batch, self.job.device)

    def names(self, first: int) -> list[str]:
        return self.job.feed.names(_numbers(self.job, first))

    def close(self) -> None:
        self._loaded.close()


class CachedBatches:
    """Batches of the image cache, in an order that is a function of the image number."""

    waits = False

    def __init__(self, job: StageJob, first: int, cache: Cache) -> None:
        """Begins at image number ``first``."""
        self.job = job
        self.cache = cache
        self._numbers: Iterator[int] = iter(range(first, job.total, job.stage.optimization.batch_size))

    @cached_property
    def _inputs(self) -> Inputs:
        """The model inputs for all cached images."""
        return self.cache.prepare(self.job.stage, self.job.settings.autocast)

    def fetch(self) -> CachedBatch:
        _ = self._inputs  # before the first update sets the seed of dropout
        device = self.job.device
        own = self.job.processes.rank_slice(_numbers(self.job, next(self._numbers)))
        rows = torch.tensor(self._rows(own), dtype=torch.int64, device="cpu").to(device)
        return CachedBatch(torch.arange(own.start, own.stop, device="cpu").to(device), rows)

    def inputs(self, batch: CachedBatch) -> Inputs:
        return {name: tensor[batch.rows] for name, tensor in self._inputs.items()}

    def names(self, first: int) -> list[str]:
        names = self.cache.names
        return [names[row] for row in self._rows(_numbers(self.job, first))] if names else []

    def _rows(self, numbers: range) -> list[int]:
        return items_at(numbers, len(self.cache), self.job.seed)

    def close(self) -> None:
        pass


def make_batches(job: StageJob, first: int, stop: StopRequest, cache: Cache | None) -> Batches:
    """Batches from the ``cache`` if there is one, else from the feed, beginning at image number ``first``."""
    return FeedBatches(job, first, stop) if cache is None else CachedBatches(job, first, cache)


def _numbers(job: StageJob, first: int) -> range:
    """The image numbers of the batch that begins at ``first``, on all ranks together."""
    return range(first, min(first + job.stage.optimization.batch_size, job.total))

"""The inputs of the training loop: a phase of a stage, its data and its settings."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from wuerstchen.data.plan import stable_hash
from wuerstchen.errors import out_of_memory_named
from wuerstchen.train.config import Memory
from wuerstchen.train.engine.distributed import Processes
from wuerstchen.train.engine.validation import Validation
from wuerstchen.train.feed.images import Feed
from wuerstchen.train.feed.prepared import PreparedFeed
from wuerstchen.train.report.events import Log
from wuerstchen.train.stages.base import Stage


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the loop runs, as opposed to what it computes.

    ``seed`` and ``autocast`` change results; ``compiles`` and ``records`` change their rounding.
    """

    seed: int
    autocast: torch.dtype | None
    """What autocast computes in, over fp32 weights; None without autocast. With fp16 losses are scaled."""
    decays_all_axes: bool = False
    """Whether weight decay follows the rule of earlier versions (``make_optimizer``)."""
    compiles: bool = False
    records: bool = False
    """Whether updates are recorded as CUDA graphs."""
    shards: bool = False
    """Whether large networks are sharded over the processes."""
    recomputes: bool = False
    """Whether blocks recompute their activations in the backward pass."""
    memory: Memory = "normal"
    """How much memory trained networks take (``train.config_memory``)."""
    workers: int
    checkpoint_seconds: float
    log_every: int
    """Updates between progress events in the log."""
    preview_every: int
    """Images between previews; 0 for a single one at the end."""
    preview_size: int
    previews: int
    """Training images in a preview."""
    keep_every: int = 0
    """Images between checkpoints that are never removed; 0 for none."""
    validate_every: int = 0
    """Images between validations, which are then at these points and at the end only; 0 validates at previews
    and checkpoints."""


@dataclass(frozen=True, kw_only=True)
class StageJob:
    """A stage to train, and everything that its training reads and writes."""

    stage: Stage
    feed: Feed | PreparedFeed
    folder: Path
    """Holds ``checkpoints`` and ``previews``."""
    settings: Settings
    processes: Processes
    log: Log
    header: dict[str, Any] = field(default_factory=dict)
    """Stored in every checkpoint: where it comes from."""
    validation: Validation | None = None
    """Measures the loss on held-out images, on rank 0."""

    @property
    def device(self) -> torch.device:
        return self.processes.device

    @property
    def total(self) -> int:
        """Images that the stage trains on."""
        return self.stage.optimization.images

    @property
    def title(self) -> str:
        return f"Stage {self.stage.name.upper()}"

    @property
    def seed(self) -> int:
        """Seed for timesteps, noise and all other random numbers in losses."""
        return stable_hash(self.settings.seed, self.stage.name) >> 1

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def check_batches(self) -> None:
        """Raises ``UserError`` unless every batch can be split evenly over the processes."""
        optimization = self.stage.optimization
        self.processes.check_batches(
            self.stage.name, optimization.images, optimization.batch_size, optimization.accumulate
        )

    @contextmanager
    def naming_memory(self) -> Iterator[None]:
        """Turns an out-of-memory error into a ``UserError`` that names the batch size and the image size."""
        size, batch_size = self.feed.size, self.stage.optimization.batch_size
        with out_of_memory_named(f"batch_size={batch_size} at {size}x{size} pixels"):
            yield

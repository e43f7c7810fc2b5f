"""One process's part in preparing a data set: its inputs, its rank, and the files it writes."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from wuerstchen.data.items import Reader
from wuerstchen.data.prepare_networks import Networks
from wuerstchen.data.prepare_plan import PrepareConfig
from wuerstchen.data.prepared_check import TABLES
from wuerstchen.errors import UserError


@dataclass(frozen=True)
class Rank:
    """The rank of this process and the number of processes."""

    number: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls) -> "Rank":
        """Reads ``RANK`` and ``WORLD_SIZE``, which torchrun sets. Without them this is the only process."""
        names = ("RANK", "WORLD_SIZE")
        values = [os.environ.get(name, default) for name, default in zip(names, ("0", "1"), strict=True)]
        if not all(value.isdecimal() for value in values) or int(values[0]) >= int(values[1]):
            raise UserError(
                f"RANK={values[0]} does not fit WORLD_SIZE={values[1]}. RANK must be a number from 0 to"
                " WORLD_SIZE - 1. Start the processes with torchrun, or unset both variables."
            )
        return cls(*map(int, values))


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How this process runs. The prepared set does not record any of it."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    workers: int = 0
    """Threads that decode images."""
    rank: Rank = field(default_factory=Rank.from_environment)
    announce: Callable[[str], None] = lambda line: None
    """Called with each line of progress."""


@dataclass(frozen=True, kw_only=True)
class PrepareJob:
    """A set to prepare in the folder ``out``, and the process that works on it."""

    reader: Reader
    out: Path
    networks: Networks
    config: PrepareConfig
    settings: dict[str, Any]
    """As ``settings_of`` returns them."""
    execution: Execution

    @property
    def work(self) -> Path:
        """The folder of the plan, the notes and the locks. It is removed at the end."""
        return self.out / "work"

    @property
    def rank(self) -> Rank:
        return self.execution.rank

    @property
    def buckets(self) -> list[tuple[int, int]]:
        """Width and height in pixels of each bucket."""
        return [(width, height) for width, height in self.settings["buckets"]]

    def note(self, table: str, number: int) -> Path:
        """The file that says that a shard is complete."""
        return self.work / f"{table}-{number:05d}.json"

    def lock(self, rank: int) -> Path:
        """The lock that process ``rank`` holds as long as it lives."""
        return self.work / f"rank-{rank}.lock"

    def own_shards(self, plan: dict[str, Any]) -> list[tuple[str, int]]:
        """Table and number of each shard that this process makes."""
        return [
            (table, number)
            for table in TABLES
            for number in range(plan["shards"][table])
            if number % self.rank.world_size == self.rank.number
        ]

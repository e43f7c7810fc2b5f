"""Which picture comes when, as a pure function: nothing here keeps state, so any point can be resumed.

Training counts progress in images. Image number ``index`` (0, 1, 2, ... over the whole run) shows item
``item_at(index, length, seed)``, and everything random about it (crop, colours, caption, dropout, timestep,
noise) is drawn from generators keyed by ``(seed, index)``. How images are grouped into batches, and over
how many processes, changes none of it.
"""

import functools
import hashlib
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from wuerstchen.errors import UserError

HELD_OUT_EVERY = 50
HELD_OUT_FROM = 100
"""One picture in 50 is held out, of sets with at least 100."""


def stable_hash(*parts: int | str) -> int:
    """A 64-bit hash of the parts that is the same in every process and on every machine."""
    text = "\x1f".join(f"{type(p).__name__}:{p}" for p in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def generator(seed: int, index: int, purpose: str) -> np.random.Generator:
    """The random generator of image ``index`` in a run with ``seed``, one stream a purpose."""
    return np.random.Generator(np.random.Philox(stable_hash(seed, index, purpose)))


@functools.lru_cache(maxsize=4)
def _order(length: int, seed: int, epoch: int) -> np.ndarray:
    return generator(seed, epoch, "order").permutation(length)


def item_at(index: int, length: int, seed: int) -> int:
    """The item (0 .. length-1) that image ``index`` shows: every epoch is a new permutation of all items."""
    if length < 1:
        raise ValueError(f"length {length} must be at least 1")
    epoch, position = divmod(index, length)
    return int(_order(length, seed, epoch)[position])


def items_at(indices: range, length: int, seed: int) -> list[int]:
    """``item_at`` of each index."""
    return [item_at(index, length, seed) for index in indices]


VIEW = "#view="
"""Stands between a picture's name and the number of a view, where one picture is shown in several ways."""


def held_out_names(names: Collection[str]) -> set[str]:
    """Those of a set's pictures that no training sees.

    Which they are follows from each picture's own name, so that adding pictures moves none from one side to
    the other; sets of fewer than ``HELD_OUT_FROM`` hold out none.
    """
    if len(names) < HELD_OUT_FROM:
        return set()
    return {name for name in names if stable_hash("held out", name) % HELD_OUT_EVERY == 0}


def crop_at(index: int, crops: int, seed: int) -> int:
    """Which of the ``crops`` stored crops of its item image ``index`` shows."""
    return int(generator(seed, index, "stored crop").integers(crops))


@dataclass(frozen=True)
class BucketPlan:
    """Which items make up which batch, where only items of one bucket (one size) can be in a batch together.

    An epoch shows every item at most once: each bucket is shuffled and cut into batches, what is left over
    of it is dropped, and the batches of all buckets are shuffled. All of it is a function of ``(buckets,
    seed, epoch)``, so the number of the next batch is all there is to remember. ``batch_size`` counts the
    items of all processes together.
    """

    buckets: Int[np.ndarray, " n"]
    """The bucket of each item, numbers from 0."""
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(
                f"batch_size {self.batch_size} is wrong because a batch holds 1 or more; raise it"
            )
        if self.batches_per_epoch == 0:
            largest = max(self._counts, default=0)
            raise UserError(
                f"batch_size {self.batch_size} is wrong because the fullest bucket holds {largest} images,"
                f" and a batch is of one bucket; use at most {largest}, or more images"
            )

    @functools.cached_property
    def _counts(self) -> list[int]:
        return np.bincount(self.buckets).tolist()

    @functools.cached_property
    def batches_per_epoch(self) -> int:
        """The same in every epoch."""
        return sum(count // self.batch_size for count in self._counts)

    @property
    def images_per_epoch(self) -> int:
        """Items that an epoch shows; the others of the set are dropped, others in each epoch."""
        return self.batches_per_epoch * self.batch_size

    def ids(self, batch: int) -> Int[np.ndarray, " b"]:
        """The items of batch number ``batch`` of the run (0, 1, 2, ... through all epochs)."""
        epoch, position = divmod(batch, self.batches_per_epoch)
        return self._epoch(epoch)[position]

    def _epoch(self, epoch: int) -> Int[np.ndarray, "batches b"]:
        kept = self.__dict__.get("_kept")
        if kept is None or kept[0] != epoch:
            kept = (epoch, self._made(epoch))
            self.__dict__["_kept"] = kept
        return kept[1]

    def _made(self, epoch: int) -> Int[np.ndarray, "batches b"]:
        order = generator(self.seed, epoch, "order").permutation(len(self.buckets))
        # Stable, so within a bucket the shuffled order stays.
        by_bucket = order[np.argsort(self.buckets[order], kind="stable")]
        batches, start = [], 0
        for count in self._counts:
            whole = count // self.batch_size * self.batch_size
            batches.append(by_bucket[start : start + whole].reshape(-1, self.batch_size))
            start += count
        joined = np.concatenate(batches)
        return joined[generator(self.seed, epoch, "order of batches").permutation(len(joined))]

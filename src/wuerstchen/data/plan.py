"""Which picture comes when, as a pure function: nothing here keeps state, so any point can be resumed.

Training counts progress in images. Image number ``index`` (0, 1, 2, ... over the whole run) shows item
``item_at(index, length, seed)``, and everything random about it (crop, colours, caption, dropout, timestep,
noise) is drawn from generators keyed by ``(seed, index)``. How images are grouped into batches, and over
how many processes, changes none of it.
"""

import bisect
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
    return {name for name in names if is_held_out(name)}


def is_held_out(name: str) -> bool:
    """Whether an image of this name is held out, of a set with at least ``HELD_OUT_FROM``."""
    return stable_hash("held out", name) % HELD_OUT_EVERY == 0


def crop_at(index: int, crops: int, seed: int) -> int:
    """Which of the ``crops`` stored crops of its item image ``index`` shows."""
    return int(generator(seed, index, "stored crop").integers(crops))


@dataclass(frozen=True)
class BucketPlan:
    """Which items make up which batch, where only items of one bucket (one size) can be in a batch together.

    A bucket with at least a batch of items is shuffled in every epoch and cut into batches. What is left over
    of it waits for another epoch, so an epoch shows each of its items at most once.

    A smaller bucket cannot fill a batch with different items, so its batches repeat them: one such batch
    holds every item of the bucket, each as often as any other or once more. To show its items as often as
    those of a set without buckets, a bucket of n items has such a batch in the first epoch and then in n of
    every ``batch_size`` epochs.

    The batches of all buckets are shuffled. All of it is a function of ``(buckets, seed, epoch)``, so the
    number of the next batch is all there is to remember. ``batch_size`` counts the items of all processes
    together.
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
        if not len(self.buckets):
            raise UserError("there are no images to make batches of; give a set with images")

    @functools.cached_property
    def counts(self) -> list[int]:
        """Items of each bucket."""
        return np.bincount(self.buckets).tolist()

    @functools.cached_property
    def small(self) -> list[int]:
        """The buckets with fewer items than a batch."""
        return [bucket for bucket, count in enumerate(self.counts) if 0 < count < self.batch_size]

    def before(self, epoch: int) -> int:
        """Batches in all epochs before number ``epoch``: where that epoch begins."""
        whole = sum(count // self.batch_size for count in self.counts)
        return epoch * whole + sum(self._filled(bucket, epoch) for bucket in self.small)

    def _filled(self, bucket: int, epoch: int) -> int:
        """Batches of a small bucket before an epoch."""
        return -(-epoch * self.counts[bucket] // self.batch_size)

    def ids(self, batch: int) -> Int[np.ndarray, " b"]:
        """The items of batch number ``batch`` of the run (0, 1, 2, ... through all epochs)."""
        # Every item has been shown after batch_size epochs, so that many hold at least a batch.
        epoch = bisect.bisect_right(range((batch + 1) * self.batch_size + 1), batch, key=self.before) - 1
        return self._epoch(epoch)[batch - self.before(epoch)]

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
        for bucket, count in enumerate(self.counts):
            whole = count // self.batch_size * self.batch_size
            if whole:
                batches.append(by_bucket[start : start + whole].reshape(-1, self.batch_size))
            elif count and self._filled(bucket, epoch + 1) > self._filled(bucket, epoch):
                batches.append(np.resize(by_bucket[start : start + count], (1, self.batch_size)))
            start += count
        joined = np.concatenate(batches)
        return joined[generator(self.seed, epoch, "order of batches").permutation(len(joined))]

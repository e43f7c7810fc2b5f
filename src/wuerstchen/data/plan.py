"""The order of images in training, as pure functions without state, so a run can resume at any point.

Training counts progress in images. Image number ``index`` (0, 1, 2, ... over the whole run) uses item
``item_at(index, length, seed)``. Everything random about it (crop, colours, caption, dropout, timestep,
noise) comes from generators keyed by ``(seed, index)``. None of it depends on the batch size or the number of
processes.
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
"""One image in 50 is held out, in sets of at least 100."""


def stable_hash(*parts: int | str) -> int:
    """A 64-bit hash of the parts, the same in all processes and on all machines."""
    text = "\x1f".join(f"{type(p).__name__}:{p}" for p in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def generator(seed: int, index: int, purpose: str) -> np.random.Generator:
    """The random generator of image ``index`` in a run with ``seed``, with a separate stream per purpose."""
    return np.random.Generator(np.random.Philox(stable_hash(seed, index, purpose)))


@functools.lru_cache(maxsize=4)
def _order(length: int, seed: int, epoch: int) -> np.ndarray:
    return generator(seed, epoch, "order").permutation(length)


def item_at(index: int, length: int, seed: int) -> int:
    """The item (0 to length - 1) that image ``index`` shows. Each epoch is a new permutation of all items."""
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}.")
    epoch, position = divmod(index, length)
    return int(_order(length, seed, epoch)[position])


def items_at(indices: range, length: int, seed: int) -> list[int]:
    """``item_at`` of each index."""
    return [item_at(index, length, seed) for index in indices]


VIEW = "#view="
"""Separates the name of an image from the number of its view, for images with several views."""


def held_out_names(names: Collection[str], fraction: float = 0.0) -> set[str]:
    """The images of a set that training never sees.

    In sets of at least ``HELD_OUT_FROM`` images, this depends only on each image's own name, so adding images
    moves no other image between the subsets. Smaller sets hold out this ``fraction`` of their images: at
    least one image of 5 to 9 and two of more, and none of fewer.
    """
    if len(names) < HELD_OUT_FROM:
        least = 0 if len(names) < 5 else 1 if len(names) < 10 else 2
        count = max(least, round(fraction * len(names))) if fraction and least else 0
        return set(sorted(names, key=lambda name: stable_hash("held out", name))[:count])
    return {name for name in names if is_held_out(name)}


def is_held_out(name: str) -> bool:
    """Whether the image with this name is held out, in a set of at least ``HELD_OUT_FROM`` images."""
    return stable_hash("held out", name) % HELD_OUT_EVERY == 0


def crop_at(index: int, crops: int, seed: int) -> int:
    """The stored crop (0 to ``crops`` - 1) that image ``index`` uses."""
    return int(generator(seed, index, "stored crop").integers(crops))


@dataclass(frozen=True)
class BucketPlan:
    """The items of each batch, where all items of a batch are from the same bucket and so have the same size.

    A bucket with at least ``batch_size`` items is shuffled and cut into batches in each epoch. Leftover items
    are not shown in that epoch, so an epoch shows each item at most once.

    A smaller bucket fills a batch by repeating its items: each appears equally often, or once more than
    others. So that its items are not shown more often than those of large buckets, a bucket with n items has
    such a batch in the first epoch, and then in only n of every ``batch_size`` epochs.

    The batches of all buckets are shuffled together. Everything is a function of ``(buckets, seed, epoch)``,
    so a run only needs to record the number of the next batch. ``batch_size`` counts the items of all
    processes.
    """

    buckets: Int[np.ndarray, " n"]
    """The bucket of each item, counted from 0."""
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {self.batch_size}.")
        if not len(self.buckets):
            raise UserError("There are no images to batch. Use a set that contains images.")

    @functools.cached_property
    def counts(self) -> list[int]:
        """Number of items in each bucket."""
        return np.bincount(self.buckets).tolist()

    @functools.cached_property
    def small(self) -> list[int]:
        """The buckets with fewer items than a batch."""
        return [bucket for bucket, count in enumerate(self.counts) if 0 < count < self.batch_size]

    def before(self, epoch: int) -> int:
        """Number of batches before ``epoch``, which is the number of its first batch."""
        whole = sum(count // self.batch_size for count in self.counts)
        return epoch * whole + sum(self._filled(bucket, epoch) for bucket in self.small)

    def _filled(self, bucket: int, epoch: int) -> int:
        """Number of batches of a small bucket before ``epoch``."""
        return -(-epoch * self.counts[bucket] // self.batch_size)

    def ids(self, batch: int) -> Int[np.ndarray, " b"]:
        """The items of batch number ``batch`` of the run (0, 1, 2, ... across epochs)."""
        # Each item is shown within batch_size epochs, so these have at least one batch.
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
        # A stable sort keeps the shuffled order within each bucket.
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

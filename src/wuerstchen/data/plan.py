"""Which picture comes when, as a pure function: nothing here keeps state, so any point can be resumed.

Training counts progress in images. Image number ``index`` (0, 1, 2, ... over the whole run) shows item
``item_at(index, length, seed)``, and everything random about it (crop, colours, caption, dropout, timestep,
noise) is drawn from generators keyed by ``(seed, index)``. How images are grouped into batches, and over
how many processes, changes none of it.
"""

import functools
import hashlib

import numpy as np


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

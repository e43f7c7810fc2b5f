"""The order of pictures: every epoch a permutation, the same in every process."""

import subprocess
import sys

import numpy as np
import pytest

from wuerstchen.data.plan import generator, item_at, stable_hash


def test_every_epoch_shows_every_item_once_in_another_order():
    epochs = [[item_at(7 * e + i, 7, seed=1) for i in range(7)] for e in range(20)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 15
    assert epochs != [[item_at(7 * e + i, 7, seed=2) for i in range(7)] for e in range(20)]


def test_streams_are_independent():
    draws = {
        (seed, index, purpose): tuple(generator(seed, index, purpose).integers(0, 1000, 4))
        for seed in range(3)
        for index in range(50)
        for purpose in ("example", "order")
    }
    assert len(set(draws.values())) == len(draws)


def test_hashes_do_not_run_together_and_hold_in_another_process():
    assert len({stable_hash(1, 23), stable_hash(12, 3), stable_hash("1", 23), stable_hash("1\x1f23")}) == 4
    code = "from wuerstchen.data.plan import *; print(stable_hash(5, 'a'), generator(1, 2, 'b').random())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert other.split() == [str(stable_hash(5, "a")), str(np.float64(generator(1, 2, "b").random()))]


def test_an_empty_set_is_no_set():
    with pytest.raises(ValueError, match="length 0 must be at least 1"):
        item_at(0, 0, 0)

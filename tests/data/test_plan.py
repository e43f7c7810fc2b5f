"""The order of images: each epoch is a permutation, the same in all processes."""

import itertools
import subprocess
import sys
import time

import numpy as np
import pytest

from wuerstchen.data.plan import BucketPlan, crop_at, generator, held_out_names, item_at, stable_hash
from wuerstchen.errors import UserError


def test_every_epoch_shows_every_item_once_in_another_order():
    epochs = [[item_at(7 * e + i, 7, seed=1) for i in range(7)] for e in range(20)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 15
    assert epochs != [[item_at(7 * e + i, 7, seed=2) for i in range(7)] for e in range(20)]


def test_one_name_in_fifty_is_held_out_of_sets_of_a_hundred():
    names = [f"{number}.jpg" for number in range(20_000)]
    held_out = held_out_names(names)
    assert len(held_out) == pytest.approx(400, abs=60)
    assert held_out_names(names[:10_000]) == held_out & set(names[:10_000])
    hundred = [*names[:99], sorted(held_out)[0]]
    assert held_out_names(hundred) == held_out & set(hundred) != set()
    assert held_out_names(hundred[1:]) == set()


@pytest.mark.parametrize(
    ("images", "count"), [(4, 0), (5, 1), (9, 1), (10, 2), (12, 2), (20, 3), (50, 8), (99, 15)]
)
def test_small_sets_hold_out_a_fraction_if_asked(images, count):
    names = [f"{number}.jpg" for number in range(images)]
    assert held_out_names(names) == set()
    found = held_out_names(names, 0.15)
    assert len(found) == count
    assert found <= set(names)
    assert held_out_names(names[::-1], 0.15) == found


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
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        item_at(0, 0, 0)


def epoch_of(plan: BucketPlan, epoch: int) -> list[np.ndarray]:
    return [plan.ids(batch) for batch in range(plan.before(epoch), plan.before(epoch + 1))]


def test_an_epoch_shows_every_item_at_most_once_and_drops_only_the_rest_of_a_bucket():
    buckets = np.random.default_rng(0).choice([0, 1, 2, 5], 103, p=[0.5, 0.3, 0.15, 0.05])
    plan = BucketPlan(buckets, 4, seed=3)
    assert not plan.small
    shown_in = []
    for epoch in range(3):
        batches = epoch_of(plan, epoch)
        assert all(len(batch) == 4 and len(set(buckets[batch])) == 1 for batch in batches)
        shown = np.concatenate(batches)
        assert len(set(shown)) == len(shown)
        for bucket in set(buckets):
            members = set(np.flatnonzero(buckets == bucket))
            assert len(members & set(shown)) == len(members) // 4 * 4
        # Batches of different buckets are mixed.
        assert sum(buckets[a[0]] != buckets[b[0]] for a, b in itertools.pairwise(batches)) > 4
        shown_in.append(shown.tolist())
    assert shown_in[0] != shown_in[1]
    assert set(shown_in[0]) != set(shown_in[1])  # others are dropped


def test_items_of_buckets_smaller_than_a_batch_are_shown_as_often_as_the_others():
    """119 photos with four aspect ratios in batches of 64: three buckets with 37 photos were never shown."""
    buckets = np.repeat([0, 1, 2, 5], [4, 8, 82, 25])
    plan = BucketPlan(buckets, 64, seed=3)
    assert plan.small == [0, 1, 5]
    first = epoch_of(plan, 0)
    for bucket in (0, 1, 5):  # the first epoch contains all their items
        (batch,) = [batch for batch in first if buckets[batch[0]] == bucket]
        assert set(batch) == set(np.flatnonzero(buckets == bucket))
    batches = [batch for epoch in range(64) for batch in epoch_of(plan, epoch)]
    assert all(len(batch) == 64 and len(set(buckets[batch])) == 1 for batch in batches)
    times = np.bincount(np.concatenate(batches), minlength=119)
    for bucket, count in enumerate(plan.counts):
        if bucket in plan.small:
            # In 64 epochs each item appears 64 times, except for rounding to whole batches.
            assert times[buckets == bucket].sum() == 64 * count
            assert abs(times[buckets == bucket] - 64).max() <= count
    for batch in batches:  # the items of a small bucket appear equally often, or once more
        seen = np.bincount(batch)[buckets[: batch.max() + 1] == buckets[batch[0]]]
        assert seen.max() - seen.min() <= 1
    assert [plan.ids(i).tolist() for i in (70, 3, 41)] == [batches[i].tolist() for i in (70, 3, 41)]


def test_sets_that_only_have_small_buckets():
    buckets = np.repeat([1, 3], [2, 1])
    plan = BucketPlan(buckets, 8, seed=0)
    batches = [plan.ids(number) for number in range(30)]
    assert all(len(batch) == 8 and len(set(buckets[batch])) == 1 for batch in batches)
    shown = [int(buckets[batch[0]]) for batch in batches]
    assert shown.count(1) == 20
    assert set(shown[:2]) == {1, 3}


def test_the_order_of_sets_without_small_buckets_is_the_recorded_one():
    """Runs from before small buckets were filled keep their order."""
    plan = BucketPlan(np.arange(50) % 3, 8, seed=5)
    assert plan.ids(0).tolist() == [39, 45, 42, 27, 30, 15, 12, 21]
    assert plan.ids(17).tolist() == [45, 15, 6, 3, 30, 42, 0, 33]


def test_a_batch_is_a_function_of_its_number():
    buckets = np.arange(100) % 3
    in_order = [BucketPlan(buckets, 8, 0).ids(i).tolist() for i in range(40)]
    plan = BucketPlan(buckets, 8, 0)
    backwards = [plan.ids(i).tolist() for i in reversed(range(40))]
    assert backwards[::-1] == in_order
    assert [BucketPlan(buckets, 8, 1).ids(i).tolist() for i in range(40)] != in_order


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_of_nothing(batch_size):
    with pytest.raises(UserError, match="batch_size must be at least 1, got"):
        BucketPlan(np.zeros(9, dtype=int), batch_size, 0)


def test_a_set_of_nothing():
    with pytest.raises(UserError, match="no images to batch"):
        BucketPlan(np.zeros(0, dtype=int), 6, 0)


def test_a_million_images_are_planned_quickly():
    buckets = np.random.default_rng(0).integers(0, 9, 1_000_000)
    plan = BucketPlan(buckets, 1536, 0)
    began = time.process_time()
    plan.ids(plan.before(1))  # of the second epoch
    assert time.process_time() - began < 10  # about half a second; a loop over images would take minutes
    began = time.process_time()
    for batch in range(plan.before(1), plan.before(2)):
        plan.ids(batch)
    assert time.process_time() - began < 1  # the epoch is not planned again for every batch


def test_stored_crops_are_chosen_by_image_index():
    chosen = [crop_at(index, 4, 0) for index in range(200)]
    assert chosen == [crop_at(index, 4, 0) for index in range(200)]
    assert {chosen.count(crop) > 30 for crop in range(4)} == {True}
    assert [crop_at(index, 1, 0) for index in range(5)] == [0] * 5

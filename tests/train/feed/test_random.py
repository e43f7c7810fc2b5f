"""The counter-based random numbers: their distribution, and that nothing but the counter matters."""

import math

import numpy as np
import pytest
import torch

from wuerstchen.data.plan import stable_hash
from wuerstchen.train.feed.random import ImageRandom, _mix, _signed

INDICES = torch.arange(64)


def test_an_image_does_not_depend_on_its_batch():
    together = ImageRandom(3, torch.tensor([5, 6, 7])).normal("noise", (4, 8))
    alone = ImageRandom(3, torch.tensor([6])).normal("noise", (4, 8))
    assert torch.equal(together[1:2], alone)


def test_seed_image_purpose_and_position_all_matter():
    base = ImageRandom(0, INDICES).uniform("noise", (50,))
    for other in (
        ImageRandom(1, INDICES).uniform("noise", (50,)),
        ImageRandom(0, INDICES + 64).uniform("noise", (50,)),
        ImageRandom(0, INDICES).uniform("time", (50,)),
    ):
        assert abs(np.corrcoef(base.flatten(), other.flatten())[0, 1]) < 0.06
    assert len(base.unique()) > 0.99 * base.numel()


def test_distributions():
    normal = ImageRandom(0, INDICES).normal("noise", (4, 64, 64))
    assert normal.mean().item() == pytest.approx(0, abs=0.005)
    assert normal.std().item() == pytest.approx(1, abs=0.005)
    assert (normal**4).mean().item() == pytest.approx(3, abs=0.05)
    # neighbours along every axis are uncorrelated
    for shifted, plain in ((normal[1:], normal[:-1]), (normal[..., 1:], normal[..., :-1])):
        assert abs((shifted * plain).mean().item()) < 0.005
    uniform = ImageRandom(0, INDICES).uniform("u", (1000,))
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.005)
    assert ImageRandom(0, INDICES).uniform("u").shape == (64,)


def test_mixing_equals_splitmix64_in_python():
    def reference(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    values = [0, 1, 2**63, 2**64 - 1, 0x9E3779B97F4A7C15]
    ours = _mix(torch.tensor([_signed(v) for v in values]))
    assert [int(v) % 2**64 for v in ours] == [reference(v) for v in values]


def test_normal_numbers_are_box_and_mullers():
    """In Python's whole numbers: every run's noise stays what it was, number by number."""

    def mixed(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    golden, images = 0x9E3779B97F4A7C15, [0, 7, 10**9]
    drawn = ImageRandom(3, torch.tensor(images)).normal("noise", (2, 3)).flatten(1)
    for image, ours in zip(images, drawn.tolist(), strict=True):
        key = mixed((image * golden + stable_hash(3, "noise")) % 2**64)
        for position, found in enumerate(ours):
            bits = mixed((key + position * golden) % 2**64)
            u1, u2 = ((bits >> 40) + 1) / 2**24, (bits >> 16) % 2**24 / 2**24
            expected = math.sqrt(-2 * math.log(u1)) * math.cos(2 * math.pi * u2)
            assert found == pytest.approx(expected, abs=2e-6)


def test_integers_are_even_and_a_function_of_the_image():
    drawn = ImageRandom(0, INDICES).integers("tokens", (40, 50), 10)
    assert drawn.shape == (64, 40, 50)
    assert drawn.dtype == torch.int64
    counts = torch.bincount(drawn.flatten(), minlength=10)
    assert len(counts) == 10
    # 128,000 draws: the counts of 12,800 have a deviation of 107.
    assert (counts - 12_800).abs().max() < 500
    alone = ImageRandom(0, torch.tensor([5])).integers("tokens", (40, 50), 10)
    assert torch.equal(alone[0], drawn[5])
    # As fractions, the numbers of different ranges are the same.
    fine = ImageRandom(0, INDICES).integers("tokens", (40, 50), 10_000)
    assert torch.equal(fine // 1000, drawn)


@pytest.mark.parametrize("high", [1, 2, 8192, 2**31])
def test_integers_reach_their_ends_and_no_further(high):
    drawn = ImageRandom(1, INDICES).integers("tokens", (500,), high)
    assert drawn.min() >= 0
    assert drawn.max() < high
    assert drawn.double().mean().item() == pytest.approx((high - 1) / 2, rel=0.05)

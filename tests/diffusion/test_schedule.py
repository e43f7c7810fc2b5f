"""The schedule against its golden values, diffusers' scheduler and float64."""

import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from diffusers import DDPMWuerstchenScheduler
from diffusers.pipelines.deprecated.wuerstchen import DEFAULT_STAGE_C_TIMESTEPS

from wuerstchen.diffusion.schedule import (
    CosineSchedule,
    columns,
    few_timesteps,
    shifted,
    stage_c_timesteps,
    training_timesteps,
    uniform_timesteps,
)
from wuerstchen.errors import UserError

GOLDEN = {
    0.1: 0.972093,
    0.25: 0.847012,
    0.5: 0.493844,
    2 / 3: 0.246448,
    0.75: 0.144272,
    0.9: 0.024092,
    0.99: 0.000243,
    1.0: 0.0001,
    0.0: 0.9999,
}


def test_golden_values():
    ours = CosineSchedule().alpha_bar(torch.tensor(list(GOLDEN)))
    np.testing.assert_allclose(ours.numpy(), list(GOLDEN.values()), atol=6e-7)


@pytest.mark.parametrize("scaler", [0.5, 1.0, 2.0])
def test_alpha_bar_equals_diffusers_and_float64(scaler):
    t = torch.linspace(0, 1, 501)
    ours = CosineSchedule(scaler=scaler).alpha_bar(t)
    theirs = DDPMWuerstchenScheduler(scaler=scaler)._alpha_cumprod(t.clone(), "cpu")
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    exact = CosineSchedule(scaler=scaler).alpha_bar(t.double())
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-6)


def test_add_noise_equals_diffusers():
    x, noise, t = torch.randn(4, 3, 5, 2), torch.randn(4, 3, 5, 2), torch.tensor([0.0, 0.2, 0.7, 1.0])
    theirs = DDPMWuerstchenScheduler().add_noise(x, noise, t)
    torch.testing.assert_close(CosineSchedule().add_noise(x, noise, t), theirs)


def test_clean_undoes_the_noise():
    """Including the division by √ᾱ: without it the image is too dark."""
    x, noise = torch.randn(2, 4, 3, 5, 2, dtype=torch.float64)
    t = torch.tensor([0.1, 0.4, 0.7, 0.9], dtype=torch.float64)
    noised = CosineSchedule().add_noise(x, noise, t)
    torch.testing.assert_close(CosineSchedule().clean(noised, noise, t), x)


def test_training_timesteps():
    t = training_timesteps(torch.arange(0, 1, 1e-4, dtype=torch.float64))
    assert t.min() >= 0.001
    assert t.max() == 1
    assert (t == 1).double().mean().item() == pytest.approx(0.075, abs=5e-4)
    assert t.mean().item() == pytest.approx(0.538, abs=2e-3)


@pytest.mark.parametrize("shift", [0.5, 1.0, 2.0])
def test_logit_normal_timesteps_keep_the_published_fraction_of_pure_noise(shift):
    """All others have a standard normal logit, cut off at the published limits, before the shift."""
    u = torch.arange(0, 1, 1e-4, dtype=torch.float64)
    t = training_timesteps(u, shift, "logit_normal")
    assert torch.equal(t == 1, training_timesteps(u) == 1)
    assert (t == 1).double().mean().item() == pytest.approx(0.075, abs=5e-4)
    below = training_timesteps(u)[t < 1]
    z = torch.tensor([NormalDist().inv_cdf(p) for p in below.tolist()], dtype=torch.float64)
    torch.testing.assert_close(t[t < 1], shifted(torch.sigmoid(z), shift))
    if shift == 1:  # an uniform density has half of the times below 1 between 0.25 and 0.75
        assert ((t > 0.25) & (t < 0.75)).double().mean() / 0.925 > 0.65
    single = training_timesteps(u.float(), shift, "logit_normal")
    assert single.isfinite().all()
    assert (single.min() > 0) & (single.max() == 1)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_shift_divides_signal_over_noise(shift):
    """Without the schedule's small offset s, ᾱ/(1 − ᾱ) is divided by shift²; the ends stay in place."""
    t = torch.linspace(0.02, 0.9, 45, dtype=torch.float64)
    schedule = CosineSchedule(s=0.0)
    before, after = (schedule.alpha_bar(u).clamp(max=1) for u in (t, shifted(t, shift)))
    torch.testing.assert_close(after / (1 - after), before / (1 - before) / shift**2)
    assert shifted(torch.tensor([0.0, 1.0]), shift).tolist() == pytest.approx([0, 1])
    assert training_timesteps(torch.tensor([0.0]), shift).item() == pytest.approx(1)


def test_stage_c_timesteps_are_diffusers():
    np.testing.assert_allclose(stage_c_timesteps(), np.array(DEFAULT_STAGE_C_TIMESTEPS), atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10, 29, 60])
def test_timesteps_fall_from_one_to_zero(steps):
    for times in (stage_c_timesteps(steps), uniform_timesteps(steps)):
        assert len(times) == steps + 1
        assert times[0] == 1
        assert times[-1] == 0
        assert all(a > b for a, b in itertools.pairwise(times))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: uniform_timesteps(0), "steps must be at least 1, got 0"),
        (lambda: stage_c_timesteps(-1), "steps must be at least 1, got -1"),
        (lambda: CosineSchedule(s=math.nan), "s must be a finite number .* got nan"),
        (lambda: CosineSchedule(scaler=0.0), "scaler must be a finite number above 0, got 0.0"),
    ],
)
def test_impossible_values_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_times_broadcast_over_images_or_over_channels():
    x = torch.zeros(2, 4, 3, 5)
    assert columns(torch.rand(2), x).shape == (2, 1, 1, 1)
    assert columns(torch.rand(2), x[:, :, 0, 0]).shape == (2, 1)
    t = torch.rand(2, 3, 5)
    assert torch.equal(columns(t, x).expand_as(x)[:, 2], t)


@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 3), (3, 3, 5), (2, 1, 3, 5), (2, 1, 1)])
def test_times_of_another_shape_are_refused(shape):
    """(b, 3) for a grid of 3 × 5 and (b, 1, h, w) would broadcast to something."""
    with pytest.raises(ValueError, match=r"\(2,\), or one per cell, \(2, 3, 5\)"):
        columns(torch.rand(shape), torch.zeros(2, 4, 3, 5))


def test_few_timesteps():
    assert few_timesteps(1) == [1, 0]
    assert few_timesteps(2) == [1, 0.66, 0]
    assert few_timesteps(4) == [1, 0.83, 0.64, 0.38, 0]
    assert few_timesteps(8)[::2] == pytest.approx(few_timesteps(4))
    assert few_timesteps(3) == pytest.approx([1, 0.83 - 0.19 / 3, 0.64 - 0.26 * 2 / 3, 0])
    for steps in range(1, 30):
        times = few_timesteps(steps)
        assert len(times) == steps + 1
        assert all(before > after for before, after in itertools.pairwise(times))
    with pytest.raises(UserError, match=r"steps must be at least 1, got 0"):
        few_timesteps(0)

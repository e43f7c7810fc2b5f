"""The times of flow matching against the distributions and ratios that define them."""

import itertools
import math
from statistics import NormalDist

import pytest
import torch

from wuerstchen.diffusion.flow import flow_shifted, flow_times, flow_timesteps
from wuerstchen.errors import UserError


def test_logit_normal_times_have_standard_normal_logits():
    """Against the quantiles of Python's normal distribution. The ends are finite and inside."""
    u = torch.tensor([0.001, 0.1, 0.25, 0.5, 0.8, 0.999], dtype=torch.float64)
    expected = [1 / (1 + math.exp(-NormalDist().inv_cdf(value))) for value in u.tolist()]
    torch.testing.assert_close(flow_times(u), torch.tensor(expected, dtype=torch.float64))
    ends = flow_times(torch.tensor([0.0, 1 - 2**-24]))
    assert 0 < ends[0] < 0.01 < 0.99 < ends[1] < 1


def test_uniform_times_are_u():
    u = torch.linspace(0, 0.99, 50, dtype=torch.float64)
    assert torch.equal(flow_times(u, "uniform"), u)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_shift_divides_signal_over_noise(shift):
    t = torch.linspace(0.02, 0.98, 45, dtype=torch.float64)
    moved = flow_shifted(t, shift)
    torch.testing.assert_close((1 - moved) / moved, (1 - t) / t / shift)
    assert flow_shifted(torch.tensor([0.0, 1.0]), shift).tolist() == [0, 1]
    torch.testing.assert_close(flow_times(t, "uniform", shift), moved)


@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (2, 1.0), (28, 3.0)])
def test_timesteps_fall_from_one_to_zero(steps, shift):
    times = flow_timesteps(steps, shift)
    assert (len(times), times[0], times[-1]) == (steps + 1, 1, 0)
    assert all(a > b for a, b in itertools.pairwise(times))
    assert flow_timesteps(4, 3.0)[2] == pytest.approx(0.75)


def test_zero_steps_are_refused():
    with pytest.raises(UserError, match=r"steps must be at least 1, got 0\."):
        flow_timesteps(0)

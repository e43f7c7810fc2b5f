"""Interpolation of noise and of predictions."""

import math

import torch

from wuerstchen.diffusion.morphs import mixed, slerp


def test_slerp_keeps_the_length_and_turns_evenly():
    a, b = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    a, b = (x / x.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for x in (a, b))
    for weight in (0.0, 0.25, 0.5, 1.0):
        middle = slerp(a, b, torch.full((3,), weight))
        torch.testing.assert_close(middle.flatten(1).norm(dim=1), torch.ones(3))
        for x, y, z in zip(a, b, middle, strict=True):
            whole, part = (torch.acos((x * other).sum().double()) for other in (y, z))
            torch.testing.assert_close(part, weight * whole, rtol=1e-3, atol=1e-3)
    assert torch.allclose(slerp(a, b, torch.zeros(3)), a, atol=1e-6)
    assert torch.allclose(slerp(a, b, torch.ones(3)), b, atol=1e-6)


def test_slerp_of_gaussian_noise_is_gaussian_noise():
    """Bug: a mean has a variance of one half, and Stage C would start from too little noise."""
    a, b = torch.randn(1, 16, 64, 64), torch.randn(1, 16, 64, 64)
    assert abs(float(slerp(a, b, torch.tensor([0.5])).std()) - 1) < 0.02


def test_slerp_of_the_same_is_the_same():
    a = torch.randn(2, 3)
    torch.testing.assert_close(slerp(a, a.clone(), torch.tensor([0.3, 0.9])), a)
    torch.testing.assert_close(slerp(a, 3 * a, torch.tensor([0.5, 0.5])), 2 * a)


def test_predictions_of_both_prompts_are_mixed_and_the_others_are_kept():
    rows = torch.tensor([10.0, 20.0, 30.0, 40.0, 1.0, 2.0]).view(-1, 1, 1, 1)
    seen = []

    def predict(x, t):
        seen.append((x[:, 0, 0, 0].tolist(), t.tolist()))
        return rows[: len(x)].expand_as(x)

    both = mixed(predict, torch.tensor([0.0, 0.25]))
    x = torch.arange(4.0).view(4, 1, 1, 1)
    guided = both(x, torch.tensor([0.5, 0.6, 0.5, 0.6]))
    assert guided[:, 0, 0, 0].tolist() == [10.0, 25.0, 1.0, 2.0]
    assert seen[0][0] == [0, 1, 0, 1, 2, 3]
    assert all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(seen[0][1], [0.5, 0.6] * 3, strict=True))
    assert both(x[:2], torch.tensor([0.5, 0.6]))[:, 0, 0, 0].tolist() == [10.0, 25.0]

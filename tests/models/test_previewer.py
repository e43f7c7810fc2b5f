"""The previewer: 32/3 pixels a position, and the linear fit for models without one."""

import pytest
import torch

from wuerstchen.errors import UserError
from wuerstchen.models.previewer import Previewer, PreviewerConfig, fit_linear_preview


@pytest.mark.parametrize(("grid", "pixels"), [((6, 6), (64, 64)), ((6, 9), (64, 96)), ((24, 24), (256, 256))])
def test_the_picture_follows_the_map(grid, pixels):
    previewer = Previewer(PreviewerConfig())
    assert sum(p.numel() for p in previewer.parameters()) == 221_100  # at most 0.3 million
    assert previewer(torch.randn(2, 16, *grid)).shape == (2, 3, *pixels)
    assert previewer.size(*grid) == pixels


def test_places_are_kept():
    """What a position says shows where the position is, not elsewhere."""
    torch.manual_seed(0)
    previewer = Previewer(PreviewerConfig())
    z = torch.randn(1, 16, 6, 6)
    other = z.clone()
    other[:, :, 1, 4] += 1
    with torch.no_grad():
        changed = (previewer(other) - previewer(z)).abs().mean(1)[0]
    row, column = divmod(int(changed.argmax()), 64)
    assert 5 <= row < 28
    assert 37 <= column < 60


def test_the_linear_fit_finds_a_linear_map():
    torch.manual_seed(0)
    weight, bias = torch.randn(3, 16), torch.randn(3)
    z = torch.randn(20, 16, 6, 6)
    colours = torch.einsum("rc, bchw -> brhw", weight, z) + bias[:, None, None]
    noise = torch.randn(20, 3, 48, 48)
    noise -= torch.nn.functional.interpolate(
        torch.nn.functional.avg_pool2d(noise, 8), scale_factor=8
    )  # texture within a position is none of its business
    pixels = torch.nn.functional.interpolate(colours, scale_factor=8) + noise
    found_weight, found_bias = fit_linear_preview(z, pixels)
    torch.testing.assert_close(found_weight, weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found_bias, bias, rtol=1e-4, atol=1e-4)


def test_too_few_positions_are_refused():
    with pytest.raises(UserError, match="1 maps of 4×4 do not determine 16 weights a colour; give more"):
        fit_linear_preview(torch.randn(1, 16, 4, 4), torch.rand(1, 3, 32, 32))


def test_impossible_shapes_are_refused():
    with pytest.raises(UserError, match=r"c_hidden=\(8, 0, 8\) must be channels and three widths"):
        PreviewerConfig(c_hidden=(8, 0, 8))

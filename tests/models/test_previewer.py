"""The previewer: 32/3 pixels per position and side."""

import pytest
import torch

from wuerstchen.errors import UserError
from wuerstchen.models.previewer import Previewer, PreviewerConfig


@pytest.mark.parametrize(("grid", "pixels"), [((6, 6), (64, 64)), ((6, 9), (64, 96)), ((24, 24), (256, 256))])
def test_the_preview_has_the_shape_of_the_latents(grid, pixels):
    previewer = Previewer(PreviewerConfig())
    assert sum(p.numel() for p in previewer.parameters()) == 221_100  # at most 0.3 million
    assert previewer(torch.randn(2, 16, *grid)).shape == (2, 3, *pixels)
    assert previewer.size(*grid) == pixels


def test_a_position_changes_its_own_pixels():
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


def test_impossible_shapes_are_refused():
    with pytest.raises(UserError, match=r"c_hidden three widths of at least 1, got \(8, 0, 8\)"):
        PreviewerConfig(c_hidden=(8, 0, 8))

"""Decodes semantic latents to a small image quickly, to preview Stage C before Stage B runs."""

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from wuerstchen.errors import UserError
from wuerstchen.models.layers import ResBlock, convolve, pointwise, to_channels_last

FACTOR = 8  # three doublings, after resizing the latents by 4/3: 6 positions become 64 pixels


@dataclass(frozen=True, kw_only=True)
class PreviewerConfig:
    """The shape of the previewer. The defaults have 0.22 million parameters."""

    c_in: int = 16
    """Channels of the semantic latents."""
    c_hidden: tuple[int, int, int] = (128, 64, 32)
    """Width at 1, 2 and 4 times the first grid."""

    def __post_init__(self) -> None:
        if len(self.c_hidden) != 3 or min(self.c_in, *self.c_hidden) < 1:
            raise UserError(
                f"c_in must be at least 1, got {self.c_in}, and c_hidden three widths of at least 1, got "
                f"{self.c_hidden}. The defaults are 16 and (128, 64, 32)."
            )


class Previewer(nn.Module):
    """Semantic latents to RGB, 32/3 pixels per position and side: 6×6 positions become 64×64 pixels.

    It is trained by squared error beside Stage B, so it shows the mean of the images that the latents may
    stand for: colours and shapes without texture.
    """

    def __init__(self, config: PreviewerConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.c_hidden
        self.projection = nn.Conv2d(config.c_in, widths[0], kernel_size=1)
        self.blocks = nn.ModuleList([ResBlock(width) for width in widths])
        following = (*widths[1:], 3)
        self.expand = nn.ModuleList(
            [nn.Conv2d(a, 4 * b, kernel_size=1) for a, b in zip(widths, following, strict=True)]
        )

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the preview of latents with ``height`` and ``width`` positions."""
        return FACTOR * round(height * 4 / 3), FACTOR * round(width * 4 / 3)

    def forward(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 h2 w2"]:
        """Images of the compressor's output, not normalised. About in [0, 1], but not clamped."""
        grid = [side // FACTOR for side in self.size(*z.shape[2:])]
        x = to_channels_last(F.interpolate(z, size=grid, mode="bilinear", align_corners=False))
        x = pointwise(self.projection, x)
        for block, expand in zip(self.blocks, self.expand, strict=True):
            assert isinstance(expand, nn.Conv2d)
            x = convolve(nn.PixelShuffle(2), pointwise(expand, block(x)))
        return x.permute(0, 3, 1, 2) + 0.5

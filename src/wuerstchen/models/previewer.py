"""The semantic map as a small picture, at once: what Stage C is drawing, long before Stage B has begun."""

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from wuerstchen.errors import UserError
from wuerstchen.models.layers import ResBlock, convolve, pointwise, to_channels_last

FACTOR = 8  # three doublings, after the map has been resized by 4/3: 6 positions give 64 pixels


@dataclass(frozen=True, kw_only=True)
class PreviewerConfig:
    """The shape of the previewer. The defaults have 0.22 million parameters."""

    c_in: int = 16
    """Channels of the semantic map."""
    c_hidden: tuple[int, int, int] = (128, 64, 32)
    """Width at 1, 2 and 4 times the first grid."""

    def __post_init__(self) -> None:
        if len(self.c_hidden) != 3 or min(self.c_in, *self.c_hidden) < 1:
            raise UserError(
                f"c_in={self.c_in} and c_hidden={self.c_hidden} must be channels and three widths of at "
                "least 1; use 16 and 128 64 32"
            )


class Previewer(nn.Module):
    """Semantic map to RGB at 32/3 pixels a position and side: 64×64 pixels of a map of 6×6.

    It is trained by squared error beside Stage B, so it shows the mean of what the map may stand for: colours
    and masses without texture.
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
        """Height and width of the picture of a map with ``height`` and ``width`` positions."""
        return FACTOR * round(height * 4 / 3), FACTOR * round(width * 4 / 3)

    def forward(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 h2 w2"]:
        """Pictures of maps as the compressor gives them, about in [0, 1] but not clamped."""
        grid = [side // FACTOR for side in self.size(*z.shape[2:])]
        x = to_channels_last(F.interpolate(z, size=grid, mode="bilinear", align_corners=False))
        x = pointwise(self.projection, x)
        for block, expand in zip(self.blocks, self.expand, strict=True):
            assert isinstance(expand, nn.Conv2d)
            x = convolve(nn.PixelShuffle(2), pointwise(expand, block(x)))
        return x.permute(0, 3, 1, 2) + 0.5

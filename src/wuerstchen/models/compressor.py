"""The semantic compressor: an image network and a 1×1 projection, which make the map that Stage C works in.

Pernias et al., "Würstchen" (arXiv 2306.00637), section 3: with a 768×768 view of a 1024×1024 image the map
has 24×24 positions of 16 channels, 42 times fewer a side than the image.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from wuerstchen.errors import UserError
from wuerstchen.models.efficientnet import (
    EFFICIENTNET_LITE0,
    EFFICIENTNET_V2_L,
    EFFICIENTNET_V2_S,
    EfficientNetLite,
    EfficientNetV2,
    LiteBlock,
)
from wuerstchen.models.traits import BlockTraits

BackboneName = Literal["efficientnet_v2_s", "efficientnet_v2_l", "efficientnet_lite0"]
STRIDE = 32


@dataclass(frozen=True, kw_only=True)
class CompressorConfig:
    """Published: v2 has ``efficientnet_v2_s``, v1 ``efficientnet_v2_l``; both have 16 channels."""

    backbone: BackboneName = "efficientnet_v2_s"
    c_latent: int = 16
    depths: tuple[int, ...] = ()
    """Strides of the backbone, 4, 8 or 16, whose last maps the mapper reads beside the head's features. Empty
    as published. Only for EfficientNet-Lite0."""

    def __post_init__(self) -> None:
        names = get_args(BackboneName)
        if self.backbone not in names:
            raise UserError(
                f"backbone '{self.backbone}' is wrong because it is no known network; use {', '.join(names)}"
            )
        if self.c_latent < 1:
            raise UserError(
                f"c_latent {self.c_latent} is wrong because the map needs a channel; use 16 as published"
            )
        if self.depths and (
            self.backbone != "efficientnet_lite0" or list(self.depths) != sorted({*self.depths} & {4, 8, 16})
        ):
            raise UserError(
                f"depths must be some of 4 8 16 in this order, for efficientnet_lite0, got {self.depths} for "
                f"{self.backbone}. Leave it empty as published."
            )


class Compressor(nn.Module):
    """Images to the semantic map, under the published key names ``backbone.*`` and ``mapper.*``.

    The backbone stays in eval mode, whatever ``train()`` is told, so that the map that is trained on is the
    map that is used later: its BatchNorms keep their pretrained statistics and stochastic depth stays off,
    while its weights do train. The mapper's BatchNorm follows ``train()``. So training needs a pretrained
    backbone (``wuerstchen.checkpoints.backbones.load_backbone``): with random weights and fresh statistics
    hardly any signal reaches the mapper.
    """

    allows = BlockTraits(shard="network")

    def __init__(self, config: CompressorConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = _build_backbone(config.backbone)
        self.mapper = nn.Sequential(
            nn.Conv2d(self.backbone.config.head + self._side_channels(), config.c_latent, 1, bias=False),
            nn.BatchNorm2d(config.c_latent),
        )
        self.backbone.eval()

    def train(self, mode: bool = True) -> "Compressor":
        super().train(mode)
        self.backbone.eval()
        return self

    def freeze_early_layers(self, stride: int) -> None:
        """Stops training of the layers whose maps are at most ``stride`` times smaller than the view.

        They are general edge and texture filters with the largest maps, so most of the backward pass is
        theirs and little of what is learnt. 1 freezes nothing.
        """
        for layer in _layers_to_stride(self.backbone, stride):
            layer.requires_grad_(False)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c h32 w32"]:
        """The map z of images in [0, 1]: ``c_latent`` channels at ``latent_side`` of the images' sides.

        The images are the compressor's own view (``compressor_input``), not yet normalised. z is the
        BatchNorm's output as it is; v2's Stage C works on (z + 1) / 42, which is the caller's affair.
        """
        # The backbone computes in channels-last; what meets the map is in torch's usual layout.
        if not self.config.depths:
            return self.mapper(self.backbone(images)).contiguous()
        assert isinstance(self.backbone, EfficientNetLite)
        maps = self.backbone.feature_maps(images)
        features = [self.backbone.head(maps[-1])]
        for stride in self.config.depths:
            features.append(_folded(maps[_LITE_STRIDES.index(stride)], STRIDE // stride))
        return self.mapper(torch.cat(features, dim=1)).contiguous()

    def _side_channels(self) -> int:
        """Channels that the mapper reads beside the head's."""
        if not self.config.depths:
            return 0
        stages = self.backbone.config.stages
        widths, reached = {}, 2
        for stage in stages:
            reached *= stage.stride
            widths[reached] = stage.channels  # the last stage of each stride
        return sum(widths[stride] * (STRIDE // stride) ** 2 for stride in self.config.depths)


_LITE_STRIDES = (2, 4, 8, 16, 32)  # of EfficientNetLite.feature_maps


def _folded(x: Float[Tensor, "b c h w"], factor: int) -> Float[Tensor, "b c2 h2 w2"]:
    """Space to depth, padded with zeros where a side is no multiple of ``factor``."""
    right, bottom = (-side % factor for side in (x.shape[3], x.shape[2]))
    return F.pixel_unshuffle(F.pad(x, (0, right, 0, bottom)), factor)


def _build_backbone(name: BackboneName) -> EfficientNetV2 | EfficientNetLite:
    if name == "efficientnet_v2_s":
        return EfficientNetV2(EFFICIENTNET_V2_S)
    if name == "efficientnet_v2_l":
        return EfficientNetV2(EFFICIENTNET_V2_L)
    return EfficientNetLite(EFFICIENTNET_LITE0)


def _layers_to_stride(backbone: EfficientNetV2 | EfficientNetLite, stride: int) -> list[nn.Module]:
    """The layers, in order, up to the last whose output is at most ``stride`` times smaller."""
    if isinstance(backbone, EfficientNetLite):
        steps = [([backbone._conv_stem, backbone._bn0], 2)]
        steps += [([block], block.stride) for block in backbone._blocks if isinstance(block, LiteBlock)]
    else:
        strides = [2, *(stage.stride for stage in backbone.config.stages)]
        steps = [([child], s) for child, s in zip(backbone.children(), strides, strict=False)]
    found: list[nn.Module] = []
    reached = 1
    for layers, step in steps:
        reached *= step
        if reached > stride:
            break
        found += layers
    return found


def compressor_input(images: Float[Tensor, "b 3 h w"], scale: float = 0.75) -> Float[Tensor, "b 3 h2 w2"]:
    """The compressor's view of images in [0, 1]: sides times ``scale``, bilinear with antialiasing.

    0.75 is the published ratio (768 for 1024 pixels, 384 for 512). Raises ``UserError`` for a scale that
    leaves no pixel.
    """
    height, width = (round(side * scale) for side in images.shape[2:])
    if min(height, width) < 1:
        raise UserError(
            f"scale {scale} is wrong because {images.shape[3]}×{images.shape[2]} images lose all pixels; "
            "use 0.75 as published"
        )
    return F.interpolate(images, size=(height, width), mode="bilinear", antialias=True)


def latent_side(input_side: int) -> int:
    """Positions of the map along a side of ``input_side`` pixels of the compressor's view: ceil(n / 32)."""
    return -(-input_side // STRIDE)

"""The semantic compressor: an image network and a 1×1 projection to the semantic latents of Stage C.

Pernias et al., "Würstchen" (arXiv 2306.00637), section 3: a 1024×1024 image, resized to 768×768, gives 24×24
latents of 16 channels, 42× smaller per side than the image.
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
    """Additional backbone strides (out of 4, 8 and 16) whose features the mapper reads. Only for
    EfficientNet-Lite0. Empty in the published models."""

    def __post_init__(self) -> None:
        names = get_args(BackboneName)
        if self.backbone not in names:
            raise UserError(f"backbone must be one of {', '.join(names)}, got {self.backbone!r}.")
        if self.c_latent < 1:
            raise UserError(f"c_latent must be at least 1, got {self.c_latent}. 16 is published.")
        if self.depths and (
            self.backbone != "efficientnet_lite0" or list(self.depths) != sorted({*self.depths} & {4, 8, 16})
        ):
            raise UserError(
                f"depths must be a subset of (4, 8, 16) in this order, and only for efficientnet_lite0, got "
                f"{self.depths} for {self.backbone}. Leave it empty, as in the published models."
            )


class Compressor(nn.Module):
    """Images to semantic latents, with the published key names ``backbone.*`` and ``mapper.*``.

    ``train()`` leaves the backbone in eval mode, so that training and inference see the same latents: its
    BatchNorms keep their pretrained statistics and stochastic depth stays off, although its weights do train.
    The mapper's BatchNorm follows ``train()``. So training needs a pretrained backbone
    (``wuerstchen.checkpoints.backbones.load_backbone``): with random weights and fresh statistics hardly any
    signal reaches the mapper.
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
        """Freezes the layers whose output is at most ``stride`` times smaller than the input.

        These are general edge and texture filters, which learn little, but have the largest activations and
        take most of the backward pass. 1 freezes nothing.
        """
        for layer in _layers_to_stride(self.backbone, stride):
            layer.requires_grad_(False)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c h32 w32"]:
        """Semantic latents z of images in [0, 1]: ``c_latent`` channels, with sides as in ``latent_side``.

        The images are resized already (``compressor_input``), but not normalised. z is the BatchNorm's
        output: the caller normalises it for Stage C, in v2 as (z + 1) / 42.
        """
        # The backbone computes in channels-last. The latents are in torch's usual layout.
        if not self.config.depths:
            return self.mapper(self.backbone(images)).contiguous()
        assert isinstance(self.backbone, EfficientNetLite)
        head, maps = self.backbone(images, with_feature_maps=True)
        features = [
            _folded(maps[_LITE_STRIDES.index(stride)], STRIDE // stride) for stride in self.config.depths
        ]
        return self.mapper(torch.cat([head, *features], dim=1)).contiguous()

    def _side_channels(self) -> int:
        """Channels that the mapper reads besides the head's."""
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
    """Space to depth. Pads with zeros if a side is not a multiple of ``factor``."""
    right, bottom = (-side % factor for side in (x.shape[3], x.shape[2]))
    return F.pixel_unshuffle(F.pad(x, (0, right, 0, bottom)), factor)


def _build_backbone(name: BackboneName) -> EfficientNetV2 | EfficientNetLite:
    if name == "efficientnet_v2_s":
        return EfficientNetV2(EFFICIENTNET_V2_S)
    if name == "efficientnet_v2_l":
        return EfficientNetV2(EFFICIENTNET_V2_L)
    return EfficientNetLite(EFFICIENTNET_LITE0)


def _layers_to_stride(backbone: EfficientNetV2 | EfficientNetLite, stride: int) -> list[nn.Module]:
    """The layers, in order, up to the last one with an output at most ``stride`` times smaller."""
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
    """Resizes images in [0, 1] for the compressor: sides times ``scale``, bilinear with antialiasing.

    0.75 is the published ratio (768 for 1024 pixels, 384 for 512). Raises ``UserError`` for a scale that
    leaves no pixel.
    """
    height, width = (round(side * scale) for side in images.shape[2:])
    if min(height, width) < 1:
        raise UserError(
            f"scale is too small for images of {images.shape[3]}×{images.shape[2]}: {scale}. It must leave a "
            "pixel per side. 0.75 is published."
        )
    return F.interpolate(images, size=(height, width), mode="bilinear", antialias=True)


def latent_side(input_side: int) -> int:
    """Number of semantic latents per side for a compressor input of ``input_side`` pixels: ceil(n / 32)."""
    return -(-input_side // STRIDE)

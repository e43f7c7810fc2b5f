"""Image features from networks with frozen ImageNet weights.

There are two networks because a model may have been trained with one of them: Lite0 initialises the small
compressor, and Stage A's perceptual loss compares its features. The judges therefore read Lite1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from wuerstchen.checkpoints.backbones import lite0_path, lite1_path, load_backbone
from wuerstchen.defaults import usual_defaults
from wuerstchen.models.efficientnet import (
    EFFICIENTNET_LITE0,
    EFFICIENTNET_LITE1,
    EfficientNetConfig,
    EfficientNetLite,
)

FeatureName = Literal["efficientnet_lite0", "efficientnet_lite1"]

POOLED, TEXTURE = 1280, 2 * (16 + 24 + 40 + 112)
DETAIL = 4 * 320 + 9 * 112 + TEXTURE
"""Widths of the two vectors of ``Features``, and of the part of ``detail`` that describes texture."""

_NETWORKS: dict[FeatureName, tuple[EfficientNetConfig, Callable[[], Path], int]] = {
    "efficientnet_lite0": (EFFICIENTNET_LITE0, lite0_path, 224),
    "efficientnet_lite1": (EFFICIENTNET_LITE1, lite1_path, 240),
}


@dataclass(frozen=True, kw_only=True)
class Features:
    """The features of n images, in float32 on the CPU."""

    pooled: Float[Tensor, "n p"]
    """The head's 1280 channels averaged over the image, as for ImageNet's classifier. KID compares these."""
    detail: Float[Tensor, "n d"]
    """What the average loses, for the judges. The feature map at stride 32 pooled to 2 × 2 and that at stride
    16 pooled to 3 × 3 describe where things are. Then the mean and standard deviation of each channel at
    strides 2, 4, 8 and 16 describe texture: lines and shading."""

    @classmethod
    def joined(cls, parts: Sequence["Features"]) -> "Features":
        """Concatenates the images of all parts."""
        return cls(
            pooled=torch.cat([part.pooled for part in parts]), detail=torch.cat([p.detail for p in parts])
        )


class FeatureNetwork:
    """EfficientNet-Lite0 or Lite1 with its ImageNet weights, in eval mode, for images of any size."""

    def __init__(self, name: FeatureName, device: torch.device | str = "cpu", *, batch_size: int = 8) -> None:
        """Runs ``batch_size`` images at once. Small batches are the fastest on a CPU.

        Raises ``UserError`` if the package with the weights is not installed.
        """
        config, find, self.side = _NETWORKS[name]
        self.device = torch.device(device)
        self.batch_size = batch_size
        with usual_defaults():
            network = EfficientNetLite(config)
        load_backbone(network, find())
        self._network = network.eval().requires_grad_(False).to(self.device)

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "n h w 3"] | Sequence[UInt8[Tensor, "_ _ 3"]]) -> Features:
        """The features of one or more RGB images. The images of a list may differ in size."""
        starts = range(0, len(images), self.batch_size)
        return Features.joined([self._features(images[start : start + self.batch_size]) for start in starts])

    def _features(self, images: Tensor | Sequence[Tensor]) -> Features:
        maps = self._network.feature_maps(torch.cat([self._resized(image) for image in images]))
        detail = [F.adaptive_avg_pool2d(maps[4], 2).flatten(1), F.adaptive_avg_pool2d(maps[3], 3).flatten(1)]
        for x in maps[:4]:
            detail += [x.mean((2, 3)), x.std((2, 3))]
        pooled = self._network.head(maps[4]).mean((2, 3))
        return Features(pooled=pooled.cpu(), detail=torch.cat(detail, dim=1).cpu())

    def _resized(self, image: UInt8[Tensor, "h w 3"]) -> Float[Tensor, "1 3 side side"]:
        """The image in [0, 1], resized for the network."""
        x = image.to(self.device).permute(2, 0, 1)[None].float() / 255
        # Without antialiasing, large images get jagged lines.
        return F.interpolate(x, (self.side, self.side), mode="bilinear", antialias=True)

"""Features of pictures from image networks with frozen ImageNet weights, which nothing here trains.

There are two networks because a model may have learnt from one of them: Lite0 is where the small compressor
starts and what Stage A's perceptual loss looks with. So it is Lite1 that judges.
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
"""Widths of the two vectors of ``Features``, and of the end of the second that tells lines and shading."""

_NETWORKS: dict[FeatureName, tuple[EfficientNetConfig, Callable[[], Path], int]] = {
    "efficientnet_lite0": (EFFICIENTNET_LITE0, lite0_path, 224),
    "efficientnet_lite1": (EFFICIENTNET_LITE1, lite1_path, 240),
}


@dataclass(frozen=True, kw_only=True)
class Features:
    """What a frozen network sees in n pictures, float32 on the CPU."""

    pooled: Float[Tensor, "n p"]
    """The head's 1280 channels averaged over the picture: what ImageNet's classifier reads, and KID."""
    detail: Float[Tensor, "n d"]
    """For the judges, what the average loses. First the map at stride 32 in 2 × 2 fields and the one at
    stride 16 in 3 × 3, which tell where things are; then mean and deviation of each channel at strides 2, 4,
    8 and 16, which tell lines and shading."""

    @classmethod
    def joined(cls, parts: Sequence["Features"]) -> "Features":
        """The pictures of all parts in one."""
        return cls(
            pooled=torch.cat([part.pooled for part in parts]), detail=torch.cat([p.detail for p in parts])
        )


class FeatureNetwork:
    """EfficientNet-Lite0 or Lite1 with its ImageNet weights, in eval mode, for pictures of any size."""

    def __init__(self, name: FeatureName, device: torch.device | str = "cpu", *, batch_size: int = 8) -> None:
        """``batch_size`` pictures go through the network at once; few are the fastest on a CPU.

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
        """The features of at least one RGB picture; pictures in a list may differ in size."""
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
        """In [0, 1], at the side that the network was published for."""
        x = image.to(self.device).permute(2, 0, 1)[None].float() / 255
        # Without the filter, a large picture would show jagged lines that are not in it.
        return F.interpolate(x, (self.side, self.side), mode="bilinear", antialias=True)

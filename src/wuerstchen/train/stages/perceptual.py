"""Distance of two images in the features of a frozen network, for the losses of Stages A and B."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from wuerstchen.checkpoints.backbones import lite0_path, load_backbone
from wuerstchen.models.efficientnet import EfficientNetLite


class PerceptualLoss(nn.Module):
    """Distance of two images in the features of a network, similar to LPIPS (arXiv 1801.03924).

    At each resolution, the features are normalised to unit length per position and compared by squared
    distance.
    """

    def __init__(self, network: EfficientNetLite) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)

    def forward(self, x: Float[Tensor, "b 3 h w"], y: Float[Tensor, "b 3 h w"]) -> Float[Tensor, ""]:
        return torch.stack([distances.mean() for distances in self._distances(x, y)]).mean()

    def of_each(self, x: Float[Tensor, "b 3 h w"], y: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
        """The distance of each pair of images."""
        return torch.stack([distances.flatten(1).mean(1) for distances in self._distances(x, y)]).mean(0)

    def _distances(
        self, x: Float[Tensor, "b 3 h w"], y: Float[Tensor, "b 3 h w"]
    ) -> Iterator[Float[Tensor, "b _ _"]]:
        """The distance at each position, for each resolution."""
        with torch.no_grad():
            targets = self.network.feature_maps(y)
        for a, b in zip(self.network.feature_maps(x), targets, strict=True):
            yield (F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)).square().sum(1)


def perceptual_network(device: torch.device) -> EfficientNetLite:
    """The network of ``PerceptualLoss``: EfficientNet-Lite0 with its ImageNet weights."""
    network = EfficientNetLite()
    load_backbone(network, lite0_path())
    return network.to(device)

"""Real images with their features, and judges, for several evaluations on one data set."""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from wuerstchen.evaluate.features import FeatureName, FeatureNetwork, Features
from wuerstchen.evaluate.judges import load_judges
from wuerstchen.evaluate.lists import Entry, RealImages
from wuerstchen.evaluate.scoring import Judge

FEATURES: FeatureName = "efficientnet_lite1"
LITE0: FeatureName = "efficientnet_lite0"


class References:
    """The real images of a built emoji set, the feature networks and the judges.

    Pass one to several calls of ``evaluate`` so that real images are composed and encoded only once.
    """

    def __init__(self, data: Path, device: torch.device, *, keep: bool = True, batch_size: int = 8) -> None:
        """With ``keep``, real images and their features stay in memory. Features are computed for
        ``batch_size`` images at once: small batches are the fastest on a CPU, large ones on a GPU.

        Raises ``DataError`` for a folder that is not a built emoji set.
        """
        self.data = data
        self.device = device
        self.batch_size = batch_size
        self.real = _KeptImages(data) if keep else RealImages(data)

    @functools.cached_property
    def features(self) -> Callable[[Tensor], Features]:
        """The features for the judges and for KID."""
        return self._network(FEATURES)

    @functools.cached_property
    def lite0_features(self) -> Callable[[Tensor], Features]:
        """The features for the second KID."""
        return self._network(LITE0)

    @functools.cached_property
    def judges(self) -> Judge:
        return load_judges(self.device)

    def _network(self, name: FeatureName) -> Callable[[Tensor], Features]:
        network = FeatureNetwork(name, self.device, batch_size=self.batch_size)
        return _KeptFeatures(network, self.real) if isinstance(self.real, _KeptImages) else network


class _KeptImages(RealImages):
    """Real images that are composed only once."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._images: dict[tuple[Entry, int], UInt8[np.ndarray, "size size 3"]] = {}
        self.digests: set[bytes] = set()
        """The digests of all images so far."""

    def image(self, entry: Entry, size: int) -> UInt8[np.ndarray, "size size 3"]:
        if (entry, size) not in self._images:
            image = super().image(entry, size)
            self.digests.add(_digest(torch.from_numpy(image)))
            self._images[entry, size] = image
        return self._images[entry, size]


class _KeptFeatures:
    """Computes the features of images, and keeps those of real images."""

    def __init__(self, network: Callable[[Tensor], Features], real: _KeptImages) -> None:
        self.network = network
        self.real = real
        self._features: dict[bytes, Features] = {}

    def __call__(self, images: UInt8[Tensor, "n h w 3"]) -> Features:
        digests = [_digest(image) for image in images]
        if not self.real.digests.issuperset(digests):
            return self.network(images)
        new = [place for place, digest in enumerate(digests) if digest not in self._features]
        if new:
            found = self.network(images[new])
            for row, place in enumerate(new):
                pooled, detail = found.pooled[row : row + 1], found.detail[row : row + 1]
                self._features[digests[place]] = Features(pooled=pooled, detail=detail)
        return Features.joined([self._features[digest] for digest in digests])


def _digest(image: Tensor) -> bytes:
    return hashlib.blake2b(image.contiguous().numpy(), digest_size=16).digest()

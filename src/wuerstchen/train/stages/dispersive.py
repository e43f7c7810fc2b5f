"""The dispersive loss, which spreads the features of different images apart (arXiv 2506.09027)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

TEMPERATURE = 0.5
"""τ, as in the paper."""


def dispersive_loss(features: Float[Tensor, "b ..."]) -> Float[Tensor, ""]:
    """The logarithm of the mean of exp(−‖zᵢ − zⱼ‖²/(n·τ)) over all pairs of different images.

    z are the n ``features`` of an image, in at least fp32. There are no positive pairs, so this needs no
    second view of an image. The loss is 0 for equal features and for a single image, otherwise below 0.
    """
    if len(features) == 1:
        return features.sum() * 0
    with torch.autocast(features.device.type, enabled=False):
        z = features.flatten(1)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        z = z - z.mean(0)  # distances stay the same, and rounding matters less
        products = z @ z.T / z.shape[1]
        squares = products.diagonal()
        distances = (squares[:, None] + squares[None, :] - 2 * products).clamp(min=0)
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        exponents = (-distances / TEMPERATURE).masked_fill(itself, -math.inf)
        return exponents.flatten().logsumexp(0) - math.log(len(z) * (len(z) - 1))

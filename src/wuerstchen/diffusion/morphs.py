"""Interpolation between two images that are sampled: of noise, of latents and of predictions."""

import torch
from jaxtyping import Float
from torch import Tensor

from wuerstchen.diffusion.samplers import Predict


def slerp(
    start: Float[Tensor, "b ..."], end: Float[Tensor, "b ..."], weights: Float[Tensor, " b"]
) -> Float[Tensor, "b ..."]:
    """Spherical interpolation of each row, from ``start`` at weight 0 to ``end`` at weight 1.

    Unlike a mean, it keeps the length of Gaussian noise. Lengths are interpolated linearly.
    """
    a, b = start.flatten(1), end.flatten(1)
    lengths = [row.norm(dim=1, keepdim=True).clamp(min=1e-12) for row in (a, b)]
    unit_a, unit_b = a / lengths[0], b / lengths[1]
    w = weights.to(a)[:, None]
    angle = (unit_a * unit_b).sum(1, keepdim=True).clamp(-1, 1).acos()
    sine = angle.sin()
    near = sine < 1e-4  # nearly the same direction: linear
    safe = torch.where(near, torch.ones_like(sine), sine)
    left = torch.where(near, 1 - w, ((1 - w) * angle).sin() / safe)
    right = torch.where(near, w, (w * angle).sin() / safe)
    mixed = (left * unit_a + right * unit_b) * torch.lerp(lengths[0], lengths[1], w)
    return mixed.view(start.shape)


def mixed(predict: Predict, weights: Float[Tensor, " n"]) -> Predict:
    """The prediction for two prompts, mixed by the ``weights`` of n images.

    ``predict`` gets the rows of the first prompt, then those of the second one, then the remaining rows, such
    as those without a prompt for guidance. At weights 0 and 1 it is the prediction for one of the prompts.
    """
    n = len(weights)

    def both(x: Tensor, t: Tensor) -> Tensor:
        output = predict(torch.cat([x[:n], x]), torch.cat([t[:n], t]))
        w = weights.to(output).view(-1, *[1] * (output.ndim - 1))
        return torch.cat([torch.lerp(output[:n], output[n : 2 * n], w), output[2 * n :]])

    return both

"""Latents with known cells: these are clean, at time 0, while the other cells are noised at their own time.

As in TD-Paint (arXiv 2410.09306). The network needs no other weights for this, because it reads the time of
each cell. It should have been trained with known cells (``StageCConfig.known_fraction``).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from wuerstchen.diffusion.samplers import Predict
from wuerstchen.diffusion.schedule import Times, columns


def with_known_cells(
    x: Float[Tensor, "b c h w"], t: Times, clean: Float[Tensor, "b c h w"], known: Bool[Tensor, "b h w"]
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b h w"]]:
    """The network's input ``x`` at the times ``t``, and these times per cell, if the ``known`` cells are as
    in ``clean``.

    Known cells are exactly ``clean``, also where a schedule has a little noise left at time 0.
    """
    times = columns(t, x)[:, 0].expand(known.shape)
    return torch.where(known[:, None], clean, x), torch.where(known, 0.0, times)


def predict_around(
    predict: Predict, clean: Float[Tensor, "b c h w"], known: Bool[Tensor, "b h w"]
) -> Predict:
    """``predict`` for a sampler that starts from noise, if the ``known`` cells are as in ``clean``.

    Wrap guidance first: ``predict_around(guided(predict, scale), clean, known)``. What the sampler makes of
    known cells has no meaning. Replace them by ``clean`` in its result.
    """

    def around(x: Tensor, t: Tensor) -> Tensor:
        return predict(*with_known_cells(x, t, clean, known))

    return around

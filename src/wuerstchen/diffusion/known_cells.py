"""Latents with known cells, which sampling must not change.

Any network samples around known cells that are replaced at each step by the noised image (``Known``), as in
RePaint (arXiv 2201.09865) without its repeated steps.

A network that was trained with known cells (``StageCConfig.known_fraction``) can see them clean, at time 0,
while the other cells are noised at their own time (``predict_around``), as in TD-Paint (arXiv 2410.09306). It
needs no other weights for this, because it reads the time of each cell.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from wuerstchen.diffusion.objective import Objective
from wuerstchen.diffusion.samplers import OnStep, Predict
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


@dataclass(frozen=True)
class Known:
    """An image that sampling follows cell by cell, until the cell's own time (arXiv 2306.00950)."""

    clean: Float[Tensor, "b c h w"]
    strength: Float[Tensor, "b h w"]
    """How far each cell may change: 0 keeps it, 1 samples it from noise, and between them the cell follows
    ``clean`` until the time is below its strength."""

    @property
    def cells(self) -> Bool[Tensor, "b h w"]:
        """The cells that are kept."""
        return self.strength <= 0

    def begin(
        self, noise: Float[Tensor, "b c h w"], objective: Objective, start: float
    ) -> Float[Tensor, "b c h w"]:
        """What a sampler starts from at the time ``start``: noise alone in cells of strength 1."""
        t = torch.full((len(noise),), start, dtype=torch.float32, device=noise.device)
        free = (self.strength >= 1)[:, None]
        return torch.where(free, noise, objective.noised(self.clean, noise, t))

    def replaced(
        self,
        noise: Float[Tensor, "b c h w"],
        timesteps: Sequence[float],
        objective: Objective,
        on_step: OnStep | None = None,
    ) -> OnStep:
        """The ``on_step`` for a sampler with ``timesteps``: noises the image to the time of the next step and
        writes its cells into the sample.

        All steps use the same ``noise``, so that the cells follow one path, as those of a deterministic
        sampler do.
        """
        times = torch.tensor(list(timesteps), dtype=torch.float64, device="cpu")
        signals, sigmas = (factor.tolist() for factor in objective.scales(times))

        def after_step(step: int, x: Tensor) -> None:
            then = timesteps[step + 1]
            kept = self.clean
            if then > 0:
                kept = signals[step + 1] * self.clean + sigmas[step + 1] * noise
            x.copy_(torch.where((self.strength <= then)[:, None], kept, x))
            if on_step is not None:
                on_step(step, x)

        return after_step


@dataclass(frozen=True)
class KnownTokens:
    """``Known`` for a sampler of tokens, whose samples are clean after each step."""

    clean: Int[Tensor, "b h w"]
    strength: Float[Tensor, "b h w"]

    def replaced(self, timesteps: Sequence[float], on_step: OnStep | None = None) -> OnStep:
        """The ``on_step`` for a sampler with ``timesteps``: writes the known tokens into the sample."""

        def after_step(step: int, tokens: Tensor) -> None:
            tokens.copy_(torch.where(self.strength <= timesteps[step + 1], self.clean, tokens))
            if on_step is not None:
                on_step(step, tokens)

        return after_step

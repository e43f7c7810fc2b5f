"""The cosine noise schedule and what follows from it, as pure functions of the timestep t in [0, 1]."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from wuerstchen.errors import UserError


@dataclass(frozen=True, kw_only=True)
class CosineSchedule:
    """ᾱ(t) = cos²((t + s)/(1 + s)·π/2) / cos²(s/(1 + s)·π/2), kept within [1e-4, 0.9999].

    arXiv 2102.09672, equation 17, with continuous time: t = 0 is the picture, t = 1 noise. ``scaler`` above
    1 spends more of the time on noise, below 1 less; the published models use 1.
    """

    s: float = 0.008
    scaler: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.s) and self.s >= 0):
            raise UserError(f"s={self.s} must be a finite number of at least 0; the published value is 0.008")
        if not (math.isfinite(self.scaler) and self.scaler > 0):
            raise UserError(f"scaler={self.scaler} must be a finite number above 0; use 1 for no change")

    def alpha_bar(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The share of the signal's variance that is left at time t."""
        if self.scaler > 1:
            t = 1 - (1 - t) ** self.scaler
        elif self.scaler < 1:
            t = t**self.scaler
        start = math.cos(self.s / (1 + self.s) * math.pi / 2) ** 2
        return (torch.cos((t + self.s) / (1 + self.s) * math.pi / 2) ** 2 / start).clamp(1e-4, 0.9999)

    def add_noise(
        self, x: Float[Tensor, "b ..."], noise: Float[Tensor, "b ..."], t: Float[Tensor, " b"]
    ) -> Float[Tensor, "b ..."]:
        """x_t = √ᾱ·x + √(1 − ᾱ)·ε."""
        alpha_bar = self.alpha_bar(t).view(-1, *[1] * (x.ndim - 1))
        return alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise

    def clean(
        self, x: Float[Tensor, "b ..."], noise: Float[Tensor, "b ..."], t: Float[Tensor, " b"]
    ) -> Float[Tensor, "b ..."]:
        """x̂₀ = (x_t − √(1 − ᾱ)·ε̂) / √ᾱ, the inverse of ``add_noise``."""
        alpha_bar = self.alpha_bar(t).view(-1, *[1] * (x.ndim - 1))
        return (x - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()


PUBLISHED_SCHEDULE = CosineSchedule()
"""Of all published models."""


def training_timesteps(u: Float[Tensor, " b"], shift: float = 1.0) -> Float[Tensor, " b"]:
    """Timesteps to train at, from u uniform in [0, 1): 7.5 % of them are exactly 1, pure noise."""
    return shifted(((1 - u) * 1.08 + 0.001).clamp(0.001, 1.0), shift)


def shifted(t: Float[Tensor, "..."], shift: float) -> Float[Tensor, "..."]:
    """Time t' with tan(t'·π/2) = shift · tan(t·π/2), which divides signal over noise by shift².

    arXiv 2301.11093, section 2.1: the finer a grid, the more noise it takes to hide the same picture, so more
    of the time belongs there. 0 and 1 stay where they are, and 1 is no shift.
    """
    if shift == 1:
        return t
    angle = t * (math.pi / 2)
    return (torch.atan2(shift * angle.sin(), angle.cos()) * (2 / math.pi)).clamp(0, 1)


def uniform_timesteps(steps: int, shift: float = 1.0) -> list[float]:
    """``steps`` steps from 1 to 0, equal but for the ``shift`` towards noise: ``steps + 1`` points."""
    if steps < 1:
        raise UserError(f"steps={steps} draws nothing; use at least 1")
    return shifted(torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float32, device="cpu"), shift).tolist()


def stage_c_timesteps(steps: int = 29) -> list[float]:
    """The published schedule of Stage C: two thirds of the steps go to the noisiest third of the time.

    29 steps give diffusers' ``DEFAULT_STAGE_C_TIMESTEPS``; other numbers keep the proportion 19 : 10.
    """
    if steps < 1:
        raise UserError(f"steps={steps} draws nothing; use at least 1")
    if steps < 3:
        return uniform_timesteps(steps)
    early = round(steps * 19 / 29)
    first = torch.linspace(1.0, 2 / 3, early + 1, dtype=torch.float64, device="cpu")
    second = torch.linspace(2 / 3, 0.0, steps - early + 1, dtype=torch.float64, device="cpu")
    return [*first.tolist(), *second[1:].tolist()]

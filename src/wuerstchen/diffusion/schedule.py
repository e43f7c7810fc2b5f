"""The cosine noise schedule and its timesteps, as functions of the time t in [0, 1].

Images have one time each, with shape (b,), or one time per cell of their latents, with shape (b, h, w).
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from wuerstchen.diffusion.densities import TimeDensity, logit_normal
from wuerstchen.errors import UserError

Times = Float[Tensor, " b"] | Float[Tensor, "b h w"]
"""One time per image, or one per cell of the latents."""


def columns(t: Float[Tensor, "..."], x: Float[Tensor, "b ..."]) -> Float[Tensor, "..."]:
    """Times of ``x``, or factors that depend on them, in a shape that broadcasts to ``x``.

    (b,) becomes (b, 1, 1, 1), and (b, h, w) becomes (b, 1, h, w). Raises ``ValueError`` for other shapes.
    """
    if t.ndim < 2:
        return t.view(-1, *[1] * (x.ndim - 1))
    if t.shape[1:] != x.shape[2:] or t.shape[0] not in (1, len(x)):
        cells = (len(x), *x.shape[2:])
        raise ValueError(
            f"times have the shape {tuple(t.shape)} for latents of the shape {tuple(x.shape)}. They need one "
            f"time per image, ({len(x)},), or one per cell, {cells}. Pass one of these shapes."
        )
    return t.unsqueeze(1)


@dataclass(frozen=True, kw_only=True)
class CosineSchedule:
    """ᾱ(t) = cos²((t + s)/(1 + s)·π/2) / cos²(s/(1 + s)·π/2), clamped to [1e-4, 0.9999].

    arXiv 2102.09672, equation 17, with continuous time: t = 0 is the image, t = 1 is noise. A ``scaler``
    above 1 spends more time on noise, below 1 less. The published models use 1.
    """

    s: float = 0.008
    scaler: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.s) and self.s >= 0):
            raise UserError(f"s must be a finite number of at least 0, got {self.s}. 0.008 is published.")
        if not (math.isfinite(self.scaler) and self.scaler > 0):
            raise UserError(f"scaler must be a finite number above 0, got {self.scaler}. 1 changes nothing.")

    def alpha_bar(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The fraction of the variance that is signal at time t."""
        if self.scaler > 1:
            t = 1 - (1 - t) ** self.scaler
        elif self.scaler < 1:
            t = t**self.scaler
        start = math.cos(self.s / (1 + self.s) * math.pi / 2) ** 2
        return (torch.cos((t + self.s) / (1 + self.s) * math.pi / 2) ** 2 / start).clamp(1e-4, 0.9999)

    def add_noise(
        self, x: Float[Tensor, "b ..."], noise: Float[Tensor, "b ..."], t: Times
    ) -> Float[Tensor, "b ..."]:
        """x_t = √ᾱ·x + √(1 − ᾱ)·ε."""
        alpha_bar = columns(self.alpha_bar(t), x)
        return alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise

    def clean(
        self, x: Float[Tensor, "b ..."], noise: Float[Tensor, "b ..."], t: Times
    ) -> Float[Tensor, "b ..."]:
        """x̂₀ = (x_t − √(1 − ᾱ)·ε̂) / √ᾱ, the inverse of ``add_noise``."""
        alpha_bar = columns(self.alpha_bar(t), x)
        return (x - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()


PUBLISHED_SCHEDULE = CosineSchedule()
"""The schedule of all published models."""


def training_timesteps(
    u: Float[Tensor, "..."], shift: float = 1.0, density: TimeDensity = "uniform"
) -> Float[Tensor, "..."]:
    """Timesteps to train at, from u uniform in [0, 1). 7.5 % of them are exactly 1, pure noise.

    The ``uniform`` density is published. ``logit_normal`` moves the published times towards the middle
    (``densities.logit_normal``), which keeps the 7.5 % at 1: sampling starts there, and a plain logit-normal
    density would hardly train it. The timestep ``shift`` comes last.
    """
    t = ((1 - u) * 1.08 + 0.001).clamp(0.001, 1.0)
    return shifted(logit_normal(t) if density == "logit_normal" else t, shift)


def shifted(t: Float[Tensor, "..."], shift: float) -> Float[Tensor, "..."]:
    """The timestep shift: t' with tan(t'·π/2) = shift · tan(t·π/2), which divides the SNR by shift².

    arXiv 2301.11093, section 2.1: at a higher resolution it takes more noise to hide the same image, so more
    timesteps should be at high noise. Times 0 and 1 do not change. A shift of 1 changes nothing.
    """
    if shift == 1:
        return t
    angle = t * (math.pi / 2)
    return (torch.atan2(shift * angle.sin(), angle.cos()) * (2 / math.pi)).clamp(0, 1)


def uniform_timesteps(steps: int, shift: float = 1.0) -> list[float]:
    """``steps + 1`` times from 1 to 0, evenly spaced before the timestep ``shift`` towards noise."""
    if steps < 1:
        raise UserError(f"steps must be at least 1, got {steps}.")
    return shifted(torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float32, device="cpu"), shift).tolist()


def stage_c_timesteps(steps: int = 29) -> list[float]:
    """The published timesteps of Stage C: two thirds of the steps are in the noisiest third of the time.

    29 steps give diffusers' ``DEFAULT_STAGE_C_TIMESTEPS``. Other numbers keep the ratio 19:10.
    """
    if steps < 1:
        raise UserError(f"steps must be at least 1, got {steps}.")
    if steps < 3:
        return uniform_timesteps(steps)
    early = round(steps * 19 / 29)
    first = torch.linspace(1.0, 2 / 3, early + 1, dtype=torch.float64, device="cpu")
    second = torch.linspace(2 / 3, 0.0, steps - early + 1, dtype=torch.float64, device="cpu")
    return [*first.tolist(), *second[1:].tolist()]


_FEW = {1: (1.0, 0.0), 2: (1.0, 0.66, 0.0), 4: (1.0, 0.83, 0.64, 0.38, 0.0)}


def few_timesteps(steps: int) -> list[float]:
    """``steps + 1`` times from 1 to 0 for the sampler ``few``.

    Those of 1, 2 and 4 steps are fixed. Other numbers of steps interpolate the times of 4 steps linearly.
    """
    if steps < 1:
        raise UserError(f"steps must be at least 1, got {steps}. 1, 2 and 4 are common.")
    if steps in _FEW:
        return [*_FEW[steps]]
    curve, found = _FEW[4], []
    for step in range(steps):
        before, part = divmod(4 * step / steps, 1)
        first, second = curve[int(before)], curve[int(before) + 1]
        found.append(first + part * (second - first))
    return [*found, 0.0]

"""Flow matching along straight lines from image to noise, as functions of the time t in [0, 1].

x_t = (1 − t)·x₀ + t·ε, whose velocity is dx/dt = ε − x₀ (arXiv 2210.02747; 2209.03003). t = 0 is the image
and t = 1 is noise, as for the cosine schedule.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from wuerstchen.diffusion.densities import TimeDensity, logit_normal
from wuerstchen.errors import UserError

_LEAST = 1e-6  # of u: at 0 and 1 the normal quantile is infinite


def flow_times(
    u: Float[Tensor, "..."], density: TimeDensity = "logit_normal", shift: float = 1.0
) -> Float[Tensor, "..."]:
    """Times to train at, in [0, 1], from ``u`` uniform in [0, 1).

    ``logit_normal`` is ``densities.logit_normal``. Then ``flow_shifted`` applies the timestep ``shift``.
    """
    t = u
    if density == "logit_normal":
        t = logit_normal(u.clamp(_LEAST, 1 - _LEAST))
    return flow_shifted(t, shift)


def flow_shifted(t: Float[Tensor, "..."], shift: float) -> Float[Tensor, "..."]:
    """t' = shift·t / (1 + (shift − 1)·t), which divides the signal-to-noise ratio (1 − t)/t by ``shift``.

    arXiv 2403.03206, equation 23. Times 0 and 1 do not change. A shift of 1 changes nothing.
    """
    return t if shift == 1 else shift * t / (1 + (shift - 1) * t)


def flow_timesteps(steps: int, shift: float = 1.0) -> list[float]:
    """``steps + 1`` times from 1 to 0, evenly spaced before the timestep ``shift``."""
    if steps < 1:
        raise UserError(f"steps must be at least 1, got {steps}. Give a larger number.")
    return flow_shifted(
        torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64, device="cpu"), shift
    ).tolist()

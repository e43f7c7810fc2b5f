"""Distributions of training times."""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

TimeDensity = Literal["logit_normal", "uniform"]
"""Distribution of training times: mostly in the middle (arXiv 2403.03206, section 3.1), or uniform."""


def logit_normal(u: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """t = 1/(1 + e^−z) with z = Φ⁻¹(u), which is standard normal for uniform ``u``. 0 and 1 do not change.

    arXiv 2403.03206, equation 19 with m = 0 and s = 1.
    """
    return (math.sqrt(2) * torch.erfinv(2 * u - 1)).sigmoid()

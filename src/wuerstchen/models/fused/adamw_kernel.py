"""AdamW of ``train.engine.bf16_weights`` in one pass over memory, in Triton, for GPUs.

That module has the plain version, which is the reference, and chooses between the two.
"""

from typing import no_type_check

import triton  # pyrefly: ignore[missing-import] (comes with torch for GPUs)
import triton.language as tl  # pyrefly: ignore[missing-import]
from torch import Tensor

_BLOCK = 2048


@triton.jit
@no_type_check
def _adamw(
    weight, copy, gradient, mean, square, factors, n, beta1, one_minus_beta1, beta2, one_minus_beta2, eps,
    block: tl.constexpr,
):  # fmt: skip
    if tl.load(factors + 4) > 0:
        place = tl.program_id(0) * block + tl.arange(0, block)
        inside = place < n
        remains, rate, root = tl.load(factors), tl.load(factors + 1), tl.load(factors + 2)
        g = tl.load(gradient + place, inside, 0.0).to(tl.float32) * tl.load(factors + 3)
        m = tl.load(mean + place, inside, 0.0)
        v = tl.load(square + place, inside, 0.0)
        w = tl.load(weight + place, inside, 0.0)
        m = beta1 * m + one_minus_beta1 * g
        v = beta2 * v + one_minus_beta2 * g * g
        w = w * remains - rate * m / (tl.sqrt(v) * root + eps)
        tl.store(mean + place, m, inside)
        tl.store(square + place, v, inside)
        tl.store(weight + place, w, inside)
        tl.store(copy + place, w.to(tl.bfloat16), inside)


def adamw(
    weight: Tensor,
    copy: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    factors: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """See ``bf16_weights.adamw``. All tensors except ``factors`` have the same memory layout."""
    tensors = (weight, copy, gradient.contiguous(), mean, square)
    assert all(tensor.is_contiguous() for tensor in tensors)
    n = weight.numel()
    _adamw[(triton.cdiv(n, _BLOCK),)](
        *tensors, factors, n, beta1, 1 - beta1, beta2, 1 - beta2, eps, block=_BLOCK, num_warps=8
    )

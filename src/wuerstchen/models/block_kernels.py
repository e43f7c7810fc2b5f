"""What stands between the matrix products of a block, in one pass over memory each, in Triton, for GPUs.

For sampling: nothing is kept for a way back. ``models.fused`` puts them in place of the layers of
``models.layers``, which are the reference. All sums are in fp32, and a result is rounded once, when it is
stored.
"""

from typing import no_type_check

import torch
import triton  # pyrefly: ignore[missing-import] (comes with torch for GPUs)
import triton.language as tl  # pyrefly: ignore[missing-import]
from jaxtyping import Float
from torch import Tensor

from wuerstchen.models.layers import LAYER_NORM_EPS


@triton.jit
@no_type_check
def _normalised(v, inside, c, eps):
    """Layer norm of each row of v, whose columns outside of c are 0."""
    mean = tl.sum(v, axis=1)[:, None] / c
    centred = tl.where(inside, v - mean, 0.0)
    return centred * tl.rsqrt(tl.sum(centred * centred, axis=1)[:, None] / c + eps)


@triton.jit
@no_type_check
def _depthwise_norm(
    x, weight, bias, out, height, width, c, eps,
    side: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    strips = tl.cdiv(width, rows)
    strip, line = tl.program_id(0) % strips, tl.program_id(0) // strips
    sample, top = (line // height).to(tl.int64), line % height
    left = strip * rows + tl.arange(0, rows)
    column = tl.arange(0, columns)
    total = tl.zeros((rows, columns), tl.float32)
    total += tl.load(bias + column, column < c, 0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(side * side):
        y, z = top + tap // side - side // 2, left + tap % side - side // 2
        there = ((z >= 0) & (z < width) & (y >= 0) & (y < height))[:, None] & (column < c)[None, :]
        place = ((sample * height + y) * width + z)[:, None] * c + column[None, :]
        factor = tl.load(weight + column * side * side + tap, column < c, 0.0).to(tl.float32)
        total += tl.load(x + place, there, 0.0).to(tl.float32) * factor[None, :]
    inside = (left < width)[:, None] & (column < c)[None, :]
    place = ((sample * height + top) * width + left)[:, None] * c + column[None, :]
    tl.store(out + place, _normalised(total, (column < c)[None, :], c, eps), inside)


def depthwise_norm(
    x: Float[Tensor, "b h w c"], weight: Float[Tensor, "c 1 k k"], bias: Float[Tensor, " c"]
) -> Float[Tensor, "b h w c"]:
    """The layer norm of a depthwise convolution with zeros around the map."""
    assert x.is_contiguous()
    b, height, width, c = x.shape
    out, columns = torch.empty_like(x), triton.next_power_of_2(c)
    rows = 4 if columns >= 1024 else 8
    grid = (b * height * triton.cdiv(width, rows),)
    _depthwise_norm[grid](
        x, weight, bias, out, height, width, c, LAYER_NORM_EPS,
        side=weight.shape[-1], rows=rows, columns=columns, num_warps=8 if columns >= 1024 else 4,
    )  # fmt: skip
    return out


@triton.jit
@no_type_check
def _scale_shift(
    x, added, factors, later, tokens, text, n, positions, c, total, eps,
    norms: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0) * rows + tl.arange(0, rows), tl.arange(0, columns)
    sample, place = (row // (n + positions)).to(tl.int64), row % (n + positions)
    real = (row < total)[:, None] & (column < c)[None, :]
    own = real & (place < n)[:, None]
    at = (sample * n + place)[:, None] * c + column[None, :]
    v = tl.load(x + at, own, 0.0).to(tl.float32)
    v += tl.load(added + column, column < c, 0.0).to(tl.float32)[None, :]
    factor = (sample * 2 * c)[:, None] + column[None, :]
    scale = tl.load(factors + factor, own, 0.0).to(tl.float32)
    v = v * (1.0 + scale) + tl.load(factors + factor + c, own, 0.0).to(tl.float32)
    after = v
    if norms:
        after += tl.load(later + column, column < c, 0.0).to(tl.float32)[None, :]
    tl.store(x + at, after, own)
    if norms:
        normed = _normalised(tl.where(column[None, :] < c, v, 0.0), (column < c)[None, :], c, eps)
        beside = real & (place >= n)[:, None]
        word = tl.load(text + (sample * positions + place - n)[:, None] * c + column[None, :], beside, 0.0)
        joined = tl.where((place < n)[:, None], normed, word.to(tl.float32))
        tl.store(tokens + row.to(tl.int64)[:, None] * c + column[None, :], joined, real)


def scale_shift_(
    x: Float[Tensor, "b h w c"], added: Float[Tensor, " c"], factors: Float[Tensor, "b c2"]
) -> None:
    """x ← (x + added)·(1 + scale) + shift, in place; ``factors`` are scale and shift of each sample."""
    _launch_scale_shift(x, added, factors, None, None, None)


def scale_shift_norm_(
    x: Float[Tensor, "b h w c"],
    added: Float[Tensor, " c"],
    factors: Float[Tensor, "b c2"],
    later: Float[Tensor, " c"],
    text: Float[Tensor, "b t c"],
) -> Float[Tensor, "b s c"]:
    """As ``scale_shift_``, and beside it the tokens that attention reads: layer norm of x, then the text.

    ``later`` is added to x after the norm: the bias of a product that is going to be added to x.
    """
    b, h, w, c = x.shape
    tokens = x.new_empty(b, h * w + text.shape[1], c)
    _launch_scale_shift(x, added, factors, later, tokens, text)
    return tokens


def _launch_scale_shift(
    x: Tensor,
    added: Tensor,
    factors: Tensor,
    later: Tensor | None,
    tokens: Tensor | None,
    text: Tensor | None,
) -> None:
    assert x.is_contiguous()
    assert factors.is_contiguous()
    b, h, w, c = x.shape
    positions = 0 if text is None else text.shape[1]
    total, columns = b * (h * w + positions), triton.next_power_of_2(c)
    rows = 1 if columns >= 2048 else 2 if columns >= 1024 else 4
    nothing = x  # never read
    _scale_shift[(triton.cdiv(total, rows),)](
        x, added, factors, *(nothing if t is None else t.contiguous() for t in (later, tokens, text)),
        h * w, positions, c, total, LAYER_NORM_EPS,
        norms=tokens is not None, rows=rows, columns=columns, num_warps=4,
    )  # fmt: skip

"""The operations between a block's matrix products, each in one pass over memory, in Triton, for GPUs.

For sampling only: there is no backward pass. ``models.fused.blocks`` uses them instead of the layers in
``models.layers``, which are the reference. All sums are in fp32, and a result is rounded once, when it is
stored.
"""

import math
from typing import no_type_check

import torch
import triton  # pyrefly: ignore[missing-import] (comes with torch for GPUs)
import triton.language as tl  # pyrefly: ignore[missing-import]
from jaxtyping import Float
from torch import Tensor

from wuerstchen.models.fused.mlp_kernels import EPS, _normal
from wuerstchen.models.layers import LAYER_NORM_EPS


@triton.jit
@no_type_check
def _normalised(v, inside, c, eps):
    """Layer norm of each row of v. Columns outside of c must be 0."""
    mean = tl.sum(v, axis=1)[:, None] / c
    centred = tl.where(inside, v - mean, 0.0)
    return centred * tl.rsqrt(tl.sum(centred * centred, axis=1)[:, None] / c + eps)


@triton.jit
@no_type_check
def _depthwise(
    x, taps, stride, bias, sample, top, left, height, width, c, column,
    side: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """A few channels of the convolution, at adjacent positions."""
    total = tl.zeros((rows, columns), tl.float32)
    total += tl.load(bias + column, column < c, 0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(side * side):
        y, z = top + tap // side - side // 2, left + tap % side - side // 2
        there = ((z >= 0) & (z < width) & (y >= 0) & (y < height))[:, None] & (column < c)[None, :]
        place = ((sample * height + y) * width + z)[:, None] * c + column[None, :]
        factor = tl.load(taps + tap * stride + column, column < c, 0.0).to(tl.float32)
        total += tl.load(x + place, there, 0.0).to(tl.float32) * factor[None, :]
    return total


@triton.jit
@no_type_check
def _depthwise_norm(
    x, taps, stride, bias, out, height, width, c, eps,
    side: tl.constexpr, rows: tl.constexpr, first: tl.constexpr, second: tl.constexpr,
):  # fmt: skip
    strips = tl.cdiv(width, rows)
    strip, line = tl.program_id(0) % strips, tl.program_id(0) // strips
    sample, top = (line // height).to(tl.int64), line % height
    left = strip * rows + tl.arange(0, rows)
    low, high = tl.arange(0, first), first + tl.arange(0, second)
    a = _depthwise(x, taps, stride, bias, sample, top, left, height, width, c, low, side, rows, first)
    b = _depthwise(x, taps, stride, bias, sample, top, left, height, width, c, high, side, rows, second)
    mean = ((tl.sum(a, axis=1) + tl.sum(b, axis=1)) / c)[:, None]
    a = tl.where((low < c)[None, :], a - mean, 0.0)
    b = tl.where((high < c)[None, :], b - mean, 0.0)
    scale = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / c + eps)[:, None]
    place = ((sample * height + top) * width + left)[:, None] * c
    tl.store(out + place + low[None, :], a * scale, (left < width)[:, None] & (low < c)[None, :])
    tl.store(out + place + high[None, :], b * scale, (left < width)[:, None] & (high < c)[None, :])


def depthwise_norm(
    x: Float[Tensor, "b h w c"], taps: Float[Tensor, "k2 c"], bias: Float[Tensor, " c"]
) -> Float[Tensor, "b h w c"]:
    """A depthwise convolution with zero padding, then a layer norm.

    ``taps`` are the convolution's weights, channels last, with the kernel's rows one after another.
    """
    assert taps.stride(1) == 1
    assert x.is_contiguous()
    b, height, width, c = x.shape
    out = torch.empty_like(x)
    # Widths of 320, 640, 1280 and 1536 channels are the sum of two powers of two.
    first = max(1, triton.next_power_of_2(c) // 2)
    second = triton.next_power_of_2(max(1, c - first))
    rows = max(1, 1024 // first)
    programs = b * height * triton.cdiv(width, rows)
    warps = max(1, first // 1024) * (1 if programs > 512 else 2)
    _depthwise_norm[(programs,)](
        x, taps, taps.stride(0), bias, out, height, width, c, LAYER_NORM_EPS,
        side=math.isqrt(len(taps)), rows=rows, first=first, second=second, num_warps=min(warps, 8),
    )  # fmt: skip
    return out


@triton.jit
@no_type_check
def _scale_shift(
    x, added, factors, stride, next_bias, normed, n, c, total, eps,
    norms: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0) * rows + tl.arange(0, rows), tl.arange(0, columns)
    own = (row < total)[:, None] & (column < c)[None, :]
    at = row.to(tl.int64)[:, None] * c + column[None, :]
    v = tl.load(x + at, own, 0.0).to(tl.float32)
    v += tl.load(added + column, column < c, 0.0).to(tl.float32)[None, :]
    factor = ((row // n).to(tl.int64) * stride)[:, None] + column[None, :]
    scale = tl.load(factors + factor, own, 0.0).to(tl.float32)
    v = v * (1.0 + scale) + tl.load(factors + factor + c, own, 0.0).to(tl.float32)
    after = v
    if norms:
        after += tl.load(next_bias + column, column < c, 0.0).to(tl.float32)[None, :]
        inside = (column < c)[None, :]
        tl.store(normed + at, _normalised(tl.where(inside, v, 0.0), inside, c, eps), own)
    tl.store(x + at, after, own)


def scale_shift_(
    x: Float[Tensor, "b h w c"],
    added: Float[Tensor, " c"],
    factors: Float[Tensor, "b c2"] | Float[Tensor, "b h w c2"],
) -> None:
    """x ← (x + added)·(1 + scale) + shift, in place. ``factors`` are scale and shift of each sample, or of
    each position."""
    _launch_scale_shift(x, added, factors, None, None)


def scale_shift_norm_(
    x: Float[Tensor, "b h w c"],
    added: Float[Tensor, " c"],
    factors: Float[Tensor, "b c2"] | Float[Tensor, "b h w c2"],
    next_bias: Float[Tensor, " c"],
) -> Float[Tensor, "b h w c"]:
    """``scale_shift_``, and returns the layer norm of x.

    ``next_bias`` is added to x after the norm: the bias of the next matrix product that is added to x.
    """
    normed = torch.empty_like(x)
    _launch_scale_shift(x, added, factors, next_bias, normed)
    return normed


def _launch_scale_shift(
    x: Tensor, added: Tensor, factors: Tensor, next_bias: Tensor | None, normed: Tensor | None
) -> None:
    assert x.is_contiguous()
    assert factors.stride(-1) == 1
    b, h, w, c = x.shape
    n = h * w if factors.ndim == 2 else 1  # adjacent positions with the same factors
    # One timestep may serve all samples.
    factors = factors.expand(b, -1) if factors.ndim == 2 else factors.expand(b, h, w, -1).flatten(0, 2)
    total, columns = b * h * w, triton.next_power_of_2(c)
    rows = 1 if columns >= 2048 else 2 if columns >= 1024 else 4
    others = [x if tensor is None else tensor for tensor in (next_bias, normed)]  # x: unread
    _scale_shift[(triton.cdiv(total, rows),)](
        x, added, factors, factors.stride(0), *others, n, c, total, LAYER_NORM_EPS,
        norms=normed is not None, rows=rows, columns=columns, num_warps=4,
    )  # fmt: skip


FAR_BELOW = tl.constexpr(-60_000.0)
"""An input with GELU 0, even after adding a bias."""


@triton.jit
@no_type_check
def _gelu_sum_squares(h, added, squares, n, c, part, rows: tl.constexpr, columns: tl.constexpr):
    """h ← GELU(h + added), and squares[s, b, c] = Σ h² over the positions in part s."""
    column = tl.program_id(0) * columns + tl.arange(0, columns)
    sample, split = tl.program_id(1), tl.program_id(2)
    h += sample.to(tl.int64) * n * c
    bias = tl.load(added + column, column < c, 0.0).to(tl.float32)[None, :]
    total = tl.zeros((rows, columns), tl.float32)
    for first in range(0, part, rows):
        row = split * part + first + tl.arange(0, rows)
        inside = ((row < n) & (row < (split + 1) * part))[:, None] & (column < c)[None, :]
        place = h + row.to(tl.int64)[:, None] * c + column[None, :]
        a = tl.load(place, inside, FAR_BELOW).to(tl.float32) + bias
        a *= _normal(a)[0]
        total += a * a
        tl.store(place, a, inside)
    place = (split * tl.num_programs(1) + sample) * c + column
    tl.store(squares + place, tl.sum(total, axis=0), column < c)


@triton.jit
@no_type_check
def _reduce_norms(squares, length, sums, c, parts, most: tl.constexpr, columns: tl.constexpr):
    """length[b, c] = √Σ squares over the parts, and the sum of length over each strip of columns."""
    column, sample = tl.program_id(0) * columns + tl.arange(0, columns), tl.program_id(1)
    split, samples = tl.arange(0, most), tl.num_programs(1)
    inside = (split < parts)[:, None] & (column < c)[None, :]
    place = (split[:, None] * samples + sample) * c + column[None, :]
    found = tl.sqrt(tl.sum(tl.load(squares + place, inside, 0.0), axis=0))
    tl.store(length + sample * c + column, found, column < c)
    tl.store(sums + sample * tl.num_programs(0) + tl.program_id(0), tl.sum(found, axis=0))


@triton.jit
@no_type_check
def _apply_response_norm(
    h, length, sums, gamma, beta, n, c, strips, eps,
    most: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * columns + tl.arange(0, columns)
    row, sample = tl.program_id(1) * rows + tl.arange(0, rows), tl.program_id(2)
    strip = tl.arange(0, most)
    mean = tl.sum(tl.load(sums + sample * strips + strip, strip < strips, 0.0), axis=0) / c
    relative = tl.load(length + sample * c + column, column < c, 0.0) / (mean + eps)
    scale = 1.0 + tl.load(gamma + column, column < c, 0.0).to(tl.float32) * relative
    shift = tl.load(beta + column, column < c, 0.0).to(tl.float32)
    inside = (row < n)[:, None] & (column < c)[None, :]
    place = h + sample.to(tl.int64) * n * c + row.to(tl.int64)[:, None] * c + column[None, :]
    x = tl.load(place, inside, 0.0).to(tl.float32)
    tl.store(place, x * scale[None, :] + shift[None, :], inside)


def response_norm_(
    h: Float[Tensor, "b n c"],
    added: Float[Tensor, " c"],
    gamma: Float[Tensor, " c"],
    beta: Float[Tensor, " c"],
) -> None:
    """GELU of h + added, then global response norm, in place, as in ``models.mlp``."""
    assert h.is_contiguous()
    b, n, c = h.shape
    columns = 64
    strips = triton.cdiv(c, columns)
    parts = min(triton.cdiv(n, 256), max(1, triton.cdiv(1024, max(1, strips * b))), 64)
    squares = torch.empty(parts, b, c, dtype=torch.float32, device=h.device)
    _gelu_sum_squares[(strips, b, parts)](
        h, added, squares, n, c, triton.cdiv(n, parts), rows=64, columns=columns
    )
    length = torch.empty(b, c, dtype=torch.float32, device=h.device)
    sums = torch.empty(b, strips, dtype=torch.float32, device=h.device)
    _reduce_norms[(strips, b)](squares, length, sums, c, parts, most=64, columns=columns)
    _apply_response_norm[(triton.cdiv(c, 128), triton.cdiv(n, 32), b)](
        h, length, sums, gamma, beta, n, c, strips, EPS,
        most=triton.next_power_of_2(strips), rows=32, columns=128,
    )  # fmt: skip


@triton.jit
@no_type_check
def _norm_affine(x, gammas, out, c, total, eps, rows: tl.constexpr, columns: tl.constexpr):
    row, column = tl.program_id(0) * rows + tl.arange(0, rows), tl.arange(0, columns)
    inside = (row < total)[:, None] & (column < c)[None, :]
    place = row.to(tl.int64)[:, None] * c + column[None, :]
    v = _normalised(tl.load(x + place, inside, 0.0).to(tl.float32), (column < c)[None, :], c, eps)
    scale, shift = tl.load(gammas).to(tl.float32), tl.load(gammas + 1).to(tl.float32)
    tl.store(out + place, v * (1.0 + scale) + shift, inside)


def norm_affine(x: Float[Tensor, "b h w c"], gammas: Float[Tensor, "6"]) -> Float[Tensor, "b h w c"]:
    """The layer norm of x, times 1 + γ₀, plus γ₁."""
    assert x.is_contiguous()
    out, c = torch.empty_like(x), x.shape[-1]
    total, columns = x.numel() // c, triton.next_power_of_2(c)
    rows = max(1, 2048 // columns)
    grid = (triton.cdiv(total, rows),)
    _norm_affine[grid](x, gammas, out, c, total, LAYER_NORM_EPS, rows=rows, columns=columns)
    return out


@triton.jit
@no_type_check
def _edge_mix(
    x, normed, taps, bias, gammas, next_bias, out, height, width, c, eps,
    rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    strips = tl.cdiv(width, rows)
    strip, line = tl.program_id(0) % strips, tl.program_id(0) // strips
    sample, top = (line // height).to(tl.int64), line % height
    left = strip * rows + tl.arange(0, rows)
    column = tl.arange(0, columns)
    inside = (left < width)[:, None] & (column < c)[None, :]
    total = tl.zeros((rows, columns), tl.float32)
    total += tl.load(bias + column, column < c, 0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(9):
        y = tl.minimum(tl.maximum(top + tap // 3 - 1, 0), height - 1)
        z = tl.minimum(tl.maximum(left + tap % 3 - 1, 0), width - 1)
        place = ((sample * height + y) * width + z)[:, None] * c + column[None, :]
        factor = tl.load(taps + tap * c + column, column < c, 0.0).to(tl.float32)
        total += tl.load(normed + place, inside, 0.0).to(tl.float32) * factor[None, :]
    place = ((sample * height + top) * width + left)[:, None] * c + column[None, :]
    v = tl.load(x + place, inside, 0.0).to(tl.float32) + total * tl.load(gammas + 2).to(tl.float32)
    bias_after = tl.load(next_bias + column, column < c, 0.0).to(tl.float32) * tl.load(gammas + 5).to(
        tl.float32
    )
    tl.store(x + place, v + bias_after[None, :], inside)
    v = _normalised(tl.where((column < c)[None, :], v, 0.0), (column < c)[None, :], c, eps)
    v = v * (1.0 + tl.load(gammas + 3).to(tl.float32)) + tl.load(gammas + 4).to(tl.float32)
    tl.store(out + place, v, inside)


def edge_mix_(
    x: Float[Tensor, "b h w c"],
    normed: Float[Tensor, "b h w c"],
    taps: Float[Tensor, "9 c"],
    bias: Float[Tensor, " c"],
    gammas: Float[Tensor, "6"],
    next_bias: Float[Tensor, " c"],
) -> Float[Tensor, "b h w c"]:
    """x ← x + γ₂·(depthwise convolution of ``normed`` with replication padding), in place.

    Returns its layer norm, times 1 + γ₃, plus γ₄. Then γ₅·``next_bias`` is added to x: the bias of the next
    matrix product that is added to x.
    """
    assert x.is_contiguous()
    assert normed.is_contiguous()
    assert taps.is_contiguous()
    b, height, width, c = x.shape
    out, columns = torch.empty_like(x), triton.next_power_of_2(c)
    rows = max(1, 4096 // columns)
    _edge_mix[(b * height * triton.cdiv(width, rows),)](
        x, normed, taps, bias, gammas, next_bias, out, height, width, c, LAYER_NORM_EPS,
        rows=rows, columns=columns, num_warps=8,
    )  # fmt: skip
    return out


@triton.jit
@no_type_check
def _gelu(h, gammas, total, columns: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * columns + tl.arange(0, columns)
    x = tl.load(h + place, place < total, 0.0).to(tl.float32)
    tl.store(h + place, x * _normal(x)[0] * tl.load(gammas + 5).to(tl.float32), place < total)


def gelu_(h: Float[Tensor, "n c"], gammas: Float[Tensor, "6"]) -> Float[Tensor, "n c"]:
    """γ₅·GELU(h), in place."""
    assert h.is_contiguous()
    _gelu[(triton.cdiv(h.numel(), 4096),)](h, gammas, h.numel(), columns=4096)
    return h

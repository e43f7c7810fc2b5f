"""GELU, global response norm and dropout in few passes over memory, in Triton, for GPUs.

``models.mlp`` has the plain version, which is the reference, and chooses between the two. With a = GELU(h),
h of shape (b, n, c) in memory (n positions):

    norm = ‖a‖ over n        relative = norm / (mean over c of norm + ε)        scale = 1 + γ·relative
    y = dropout(β + a·scale)

A compiler generates dropout's random numbers in a way that costs more than the pass itself, and saves a, y
and the mask for the backward pass. Here each pass computes a cheap hash of (seed, position) again, and only h
and norm are saved. Sums are in fp32 and always in the same order.
"""

from typing import Any, no_type_check

import torch
import triton  # pyrefly: ignore[missing-import] (comes with torch for GPUs)
import triton.language as tl  # pyrefly: ignore[missing-import]
from jaxtyping import Float, Int
from torch import Tensor

EPS = 1e-6
_ROWS, _COLUMNS = 16, 128  # of a tile
_PROGRAMS = 2048  # enough to fill a GPU


@triton.jit
@no_type_check
def _normal(x):
    """The normal distribution's cumulative probability and density at x.

    By Abramowitz and Stegun, 7.1.26, to 1e-7: one exponential is enough for both, and a library's erf costs
    more than a pass over memory. So does a division: 1/y is the square of 1/√y, which is a single
    instruction.
    """
    bell = tl.exp(-0.5 * x * x)
    root = tl.rsqrt(1.0 + 0.3275911 * 0.7071067811865476 * tl.abs(x))
    t = root * root
    tail = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    tail = 0.5 * tail * bell
    return tl.where(x > 0, 1.0 - tail, tail), 0.3989422804014327 * bell


@triton.jit
@no_type_check
def _mixed(x):
    """A 32-bit hash: lowbias32 of C. Wellons' hash-prospector."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
@no_type_check
def _key(seed, sample):
    """Two keys of a sample's hash: the first for its start, the second for its middle."""
    first, second = tl.load(seed).to(tl.uint32), tl.load(seed + 1).to(tl.uint32)
    return _mixed(first ^ _mixed(sample.to(tl.uint32))), _mixed(second)


@triton.jit
@no_type_check
def _kept(local, first, second, threshold):
    """Which elements dropout keeps: their hash, ``_mixed`` with two keys, must reach the threshold."""
    x = local.to(tl.uint32) ^ first
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= (x >> 15) ^ second
    x *= 0x846CA68B
    x ^= x >> 16
    return (x >> 1).to(tl.int32) >= threshold


@triton.jit
@no_type_check
def _squares(h, out, n, c, part, rows: tl.constexpr, columns: tl.constexpr):
    """out[s, b, c] = Σ a² over the positions of part s."""
    column = tl.program_id(0) * columns + tl.arange(0, columns)
    sample, split = tl.program_id(1), tl.program_id(2)
    h += sample.to(tl.int64) * n * c
    total = tl.zeros((rows, columns), tl.float32)
    for first in range(0, part, rows):
        row = split * part + first + tl.arange(0, rows)
        inside = (row < n)[:, None] & (column < c)[None, :]
        local = row[:, None] * c + column[None, :]
        x = tl.load(h + local, inside, 0.0).to(tl.float32)
        a = x * _normal(x)[0]
        total += a * a
    place = (split * tl.num_programs(1) + sample) * c + column
    tl.store(out + place, tl.sum(total, axis=0), column < c)


@triton.jit
@no_type_check
def _scales(squares, gamma, norm, scale, c, parts, eps, columns: tl.constexpr):
    """norm and scale of one sample, from partial sums of squares."""
    sample, samples = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, columns)
    inside = column < c
    total = tl.zeros((columns,), tl.float32)
    for split in range(parts):
        total += tl.load(squares + (split * samples + sample) * c + column, inside, 0.0)
    length = tl.sqrt(total)
    relative = length / (tl.sum(length, axis=0) / c + eps)
    tl.store(norm + sample * c + column, length, inside)
    weight = tl.load(gamma + column, inside, 0.0).to(tl.float32)
    tl.store(scale + sample * c + column, 1.0 + weight * relative, inside)


@triton.jit
@no_type_check
def _apply(
    h, scale, beta, y, seed, n, c, threshold, kept_scale,
    drops: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * columns + tl.arange(0, columns)
    row, sample = tl.program_id(1) * rows + tl.arange(0, rows), tl.program_id(2)
    start = sample.to(tl.int64) * n * c
    inside = (row < n)[:, None] & (column < c)[None, :]
    local = row[:, None] * c + column[None, :]
    x = tl.load(h + start + local, inside, 0.0).to(tl.float32)
    factor = tl.load(scale + sample * c + column, column < c, 0.0)[None, :]
    u = x * _normal(x)[0] * factor + tl.load(beta + column, column < c, 0.0).to(tl.float32)[None, :]
    if drops:
        first, second = _key(seed, sample)
        u = tl.where(_kept(local, first, second, threshold), u * kept_scale, 0.0)
    tl.store(y + start + local, u, inside)


@triton.jit
@no_type_check
def _sums(
    dy, h, seed, along, total, n, c, part: tl.constexpr, threshold, kept_scale,
    drops: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """along[s, b, c] = Σ du·a and total[s, b, c] = Σ du, where du is the gradient before dropout."""
    column = tl.program_id(0) * columns + tl.arange(0, columns)
    sample, split = tl.program_id(1), tl.program_id(2)
    start = sample.to(tl.int64) * n * c
    if drops:
        key, second = _key(seed, sample)
    products, plain = tl.zeros((rows, columns), tl.float32), tl.zeros((rows, columns), tl.float32)
    for first in range(0, part, rows):
        row = split * part + first + tl.arange(0, rows)
        inside = (row < n)[:, None] & (column < c)[None, :]
        local = row[:, None] * c + column[None, :]
        x = tl.load(h + start + local, inside, 0.0).to(tl.float32)
        du = tl.load(dy + start + local, inside, 0.0).to(tl.float32)
        if drops:
            du = tl.where(_kept(local, key, second, threshold), du * kept_scale, 0.0)
        products += du * x * _normal(x)[0]
        plain += du
    place = (split * tl.num_programs(1) + sample) * c + column
    tl.store(along + place, tl.sum(products, axis=0), column < c)
    tl.store(total + place, tl.sum(plain, axis=0), column < c)


@triton.jit
@no_type_check
def _norm_gradients(
    along, total, norm, gamma, scale, pull, dgamma, dbeta, c, parts: tl.constexpr, eps,
    columns: tl.constexpr,
):  # fmt: skip
    """For one sample: scale again, the factor ``pull`` of a in the gradient through the norm, and its part of
    the gradients of γ and β."""
    sample, samples = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, columns)
    inside = column < c
    products, plain = tl.zeros((columns,), tl.float32), tl.zeros((columns,), tl.float32)
    for split in range(parts):
        place = (split * samples + sample) * c + column
        products += tl.load(along + place, inside, 0.0)
        plain += tl.load(total + place, inside, 0.0)
    place = sample * c + column
    length = tl.load(norm + place, inside, 0.0)
    weight = tl.load(gamma + column, inside, 0.0).to(tl.float32)
    mean = tl.sum(length, axis=0) / c + eps
    relative = length / mean
    drelative = products * weight
    dlength = drelative / mean - tl.sum(drelative * length, axis=0) / (mean * mean * c)
    tl.store(scale + place, 1.0 + weight * relative, inside)
    tl.store(pull + place, tl.where(length > 0, dlength / length, 0.0), inside)
    tl.store(dgamma + place, products * relative, inside)
    tl.store(dbeta + place, plain, inside)


@triton.jit
@no_type_check
def _apply_back(
    dy, h, scale, pull, beta, dh, y, seed, n, c, threshold, kept_scale,
    drops: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """dh = (du·scale + a·pull)·GELU'(h), and y again."""
    column = tl.program_id(0) * columns + tl.arange(0, columns)
    row, sample = tl.program_id(1) * rows + tl.arange(0, rows), tl.program_id(2)
    start = sample.to(tl.int64) * n * c
    inside = (row < n)[:, None] & (column < c)[None, :]
    local = row[:, None] * c + column[None, :]
    x = tl.load(h + start + local, inside, 0.0).to(tl.float32)
    du = tl.load(dy + start + local, inside, 0.0).to(tl.float32)
    factor = tl.load(scale + sample * c + column, column < c, 0.0)[None, :]
    along = tl.load(pull + sample * c + column, column < c, 0.0)[None, :]
    integral, density = _normal(x)
    a = x * integral
    u = a * factor + tl.load(beta + column, column < c, 0.0).to(tl.float32)[None, :]
    if drops:
        first, second = _key(seed, sample)
        kept = _kept(local, first, second, threshold)
        du, u = tl.where(kept, du * kept_scale, 0.0), tl.where(kept, u * kept_scale, 0.0)
    tl.store(dh + start + local, (du * factor + a * along) * (integral + x * density), inside)
    tl.store(y + start + local, u, inside)


class _Grid:
    """How the work on (b, n, c) is split into programs."""

    def __init__(self, h: Float[Tensor, "b n c"], seed: Tensor | None, p: float) -> None:
        assert h.is_contiguous()
        self.b, self.n, self.c = h.shape
        tiles = triton.cdiv(self.c, _COLUMNS)
        wanted = triton.cdiv(_PROGRAMS, tiles * self.b)
        rows = triton.cdiv(triton.cdiv(self.n, wanted), _ROWS) * _ROWS
        self.part = rows
        self.parts = triton.cdiv(self.n, rows)
        self.over_sums = (tiles, self.b, self.parts)
        self.over_tiles = (tiles, triton.cdiv(self.n, _ROWS), self.b)
        self.threshold, self.drops = round(p * 2**31), p > 0
        self.kept_scale = 1 / (1 - p) if p < 1 else 0.0
        self.tile: dict[str, Any] = {"rows": _ROWS, "columns": _COLUMNS}
        self.line = triton.next_power_of_2(self.c)
        self.seed = h if seed is None else seed  # not read then

    def dropout(self) -> tuple[int, float, bool]:
        return self.threshold, self.kept_scale, self.drops

    def empty(self, like: Tensor, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=like.device)


def forward(
    h: Float[Tensor, "b n c"],
    gamma: Float[Tensor, " c"],
    beta: Float[Tensor, " c"],
    seed: Int[Tensor, "2"] | None,
    p: float,
) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b c"]]:
    """Returns y in the dtype of h, and norm."""
    grid = _Grid(h, seed, p)
    squares = grid.empty(h, grid.parts, grid.b, grid.c)
    _squares[grid.over_sums](h, squares, grid.n, grid.c, grid.part, **grid.tile)
    norm, scale = (grid.empty(h, grid.b, grid.c) for _ in range(2))
    _scales[(grid.b,)](squares, gamma, norm, scale, grid.c, grid.parts, EPS, columns=grid.line, num_warps=8)
    y = torch.empty_like(h)
    _apply[grid.over_tiles](h, scale, beta, y, grid.seed, grid.n, grid.c, *grid.dropout(), **grid.tile)
    return y, norm


def backward(
    dy: Float[Tensor, "b n c"],
    h: Float[Tensor, "b n c"],
    norm: Float[Tensor, "b c"],
    gamma: Float[Tensor, " c"],
    beta: Float[Tensor, " c"],
    seed: Int[Tensor, "2"] | None,
    p: float,
) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b n c"], Float[Tensor, " c"], Float[Tensor, " c"]]:
    """Returns y as in ``forward``, and the gradients of h, γ and β."""
    grid = _Grid(h, seed, p)
    along, total = (grid.empty(h, grid.parts, grid.b, grid.c) for _ in range(2))
    _sums[grid.over_sums](
        dy, h, grid.seed, along, total, grid.n, grid.c, grid.part, *grid.dropout(), **grid.tile
    )  # fmt: skip
    scale, pull, dgamma, dbeta = (grid.empty(h, grid.b, grid.c) for _ in range(4))
    _norm_gradients[(grid.b,)](
        along, total, norm, gamma, scale, pull, dgamma, dbeta, grid.c, grid.parts, EPS,
        columns=grid.line, num_warps=8,
    )  # fmt: skip
    dh, y = torch.empty_like(h), torch.empty_like(h)
    _apply_back[grid.over_tiles](
        dy, h, scale, pull, beta, dh, y, grid.seed, grid.n, grid.c, *grid.dropout(), **grid.tile
    )  # fmt: skip
    return y, dh, dgamma.sum(0), dbeta.sum(0)

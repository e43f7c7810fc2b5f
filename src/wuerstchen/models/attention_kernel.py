"""Attention in Triton, for GPUs, as torch's ``scaled_dot_product_attention`` computes it, which is the
reference and serves where this does not suit.

At the published sizes on an H100 it takes 0.66 to 1.01 of the time of cuDNN's kernel, which is torch's choice
there (docs/speed.md). It reads the grid's queries, keys and values where one product left them, and those of
the text, which every step has in common, where they were left once. The softmax is taken in one pass over the
keys (arXiv 2205.14135, algorithm 1), with sums in fp32.
"""

import functools
import math
from typing import no_type_check

import torch
import triton  # pyrefly: ignore[missing-import] (comes with torch for GPUs)
import triton.language as tl  # pyrefly: ignore[missing-import]
from jaxtyping import Float
from torch import Tensor


@triton.jit
@no_type_check
def _taken_in(scores, values, most, total, sums, scale):
    """What a row of softmax knows of the keys so far, with those of one tile more."""
    now = tl.maximum(most, tl.max(scores, axis=1) * scale)
    weights, less = tl.exp2(scores * scale - now[:, None]), tl.exp2(most - now)
    total = total * less + tl.sum(weights, axis=1)
    return now, total, tl.dot(weights.to(values.dtype), values, sums * less[:, None])


@triton.jit
@no_type_check
def _over_keys(
    queries, k, v, row_apart, positions, most, total, sums, scale,
    d: tl.constexpr, tile: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    """The same with all keys and values of one head of a sample."""
    channel, key = tl.arange(0, d), tl.arange(0, tile).to(tl.int64)
    k += key[None, :] * row_apart + channel[:, None]
    v += key[:, None] * row_apart + channel[None, :]
    whole = positions // tile * tile
    for _ in tl.range(0, whole, tile, num_stages=stages):
        scores = tl.dot(queries, tl.load(k))
        most, total, sums = _taken_in(scores, tl.load(v), most, total, sums, scale)
        k += tile * row_apart
        v += tile * row_apart
    if whole < positions:
        there = whole + key < positions
        scores = tl.dot(queries, tl.load(k, there[None, :], 0.0))
        scores = tl.where(there[None, :], scores, float("-inf"))
        values = tl.load(v, there[:, None], 0.0)
        most, total, sums = _taken_in(scores, values, most, total, sums, scale)
    return most, total, sums


@triton.jit
@no_type_check
def _attend(
    q, k, v, text_k, text_v, out, sample_apart, row_apart, text_sample_apart, text_row_apart, n, words, scale,
    heads: tl.constexpr, d: tl.constexpr, rows: tl.constexpr, tile: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    sample, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    row, channel = tl.program_id(0) * rows + tl.arange(0, rows), head * d + tl.arange(0, d)
    own, first = (row < n)[:, None], sample * sample_apart
    queries = tl.load(q + first + row.to(tl.int64)[:, None] * row_apart + channel[None, :], own, 0.0)
    most = tl.full((rows,), float("-inf"), tl.float32)
    total, sums = tl.zeros((rows,), tl.float32), tl.zeros((rows, d), tl.float32)
    first += head * d
    most, total, sums = _over_keys(
        queries, k + first, v + first, row_apart, n, most, total, sums, scale, d, tile, stages
    )
    first = sample * text_sample_apart + head * d
    most, total, sums = _over_keys(
        queries, text_k + first, text_v + first, text_row_apart, words, most, total, sums, scale,
        d, tile, stages,
    )  # fmt: skip
    place = (sample * n + row)[:, None] * (heads * d) + channel[None, :]
    tl.store(out + place, sums / total[:, None], own)


def suits(queries: Float[Tensor, "b s c"], heads: int) -> bool:
    """Whether the kernel is made for them: half precision, heads of 16, 32, 64 or 128 channels."""
    return queries.dtype in (torch.float16, torch.bfloat16) and queries.shape[-1] // heads in (
        16,
        32,
        64,
        128,
    )


def attend(
    queries: Float[Tensor, "b n c"],
    keys: Float[Tensor, "b n c"],
    values: Float[Tensor, "b n c"],
    text_keys: Float[Tensor, "b m t d"],
    text_values: Float[Tensor, "b m t d"],
) -> Float[Tensor, "b n c"]:
    """softmax(q·kᵀ/√d)·v of each of the m heads over the grid's own keys and the text's.

    The grid's heads lie side by side in its channels, and so they must in memory for the text.
    """
    (b, n, c), (_, heads, words, d) = queries.shape, text_keys.shape
    text_keys, text_values = text_keys.transpose(1, 2), text_values.transpose(1, 2)
    assert queries.stride() == keys.stride() == values.stride()
    assert text_keys.stride() == text_values.stride()
    assert queries.stride(2) == 1
    assert text_keys.stride()[2:] == (d, 1)
    out = queries.new_empty(b, n, c)
    # Tiles of 128 rows where a GPU takes all of them at once, but not those of 64.
    processors = _processors(queries.device)
    small, large = (triton.cdiv(n, rows) * b * heads for rows in (64, 128))
    rows, warps = (128, 8) if small > 3 * processors and large <= 2 * processors else (64, 4)
    _attend[(triton.cdiv(n, rows), b * heads)](
        queries, keys, values, text_keys, text_values, out,
        queries.stride(0), queries.stride(1), text_keys.stride(0), text_keys.stride(1),
        n, words, math.log2(math.e) / math.sqrt(d),
        heads=heads, d=d, rows=rows, tile=64, stages=3 if d <= 64 else 2, num_warps=warps,
    )  # fmt: skip
    return out


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1

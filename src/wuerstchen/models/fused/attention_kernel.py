"""Attention in Triton, for GPUs, equal to torch's ``scaled_dot_product_attention``.

torch's function is the reference, and the fallback for inputs that this kernel does not support.

The kernel reads the grid's queries, keys and values from the output of one matrix product, and the text's
keys and values, which all steps share, in place. With v2's published sizes on an H100 it takes 0.7 to 1.02
times as long as cuDNN's kernel, which torch uses there, and a third of torch's time with a mask. The softmax
takes one pass over the keys (arXiv 2205.14135, algorithm 1), with sums in fp32.
"""

import functools
import math
from typing import no_type_check

import torch
import triton  # pyrefly: ignore[missing-import] (comes with torch for GPUs)
import triton.language as tl  # pyrefly: ignore[missing-import]
from jaxtyping import Bool, Float
from torch import Tensor


@triton.jit
@no_type_check
def _update(scores, values, most, total, sums, scale):
    """Updates the running maximum, sum and output of the softmax with the keys of one more tile."""
    now = tl.maximum(most, tl.max(scores, axis=1) * scale)
    weights, less = tl.exp2(scores * scale - now[:, None]), tl.exp2(most - now)
    total = total * less + tl.sum(weights, axis=1)
    return now, total, tl.dot(weights.to(values.dtype), values, sums * less[:, None])


@triton.jit
@no_type_check
def _over_keys(
    queries, k, v, mask, row_stride, positions, most, total, sums, scale, d: tl.constexpr,
    columns: tl.constexpr, masked: tl.constexpr, tile: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    """Updates the softmax with all keys of one head of a sample, except masked ones."""
    channel, key = tl.arange(0, columns), tl.arange(0, tile)
    inside = channel < d
    k += key.to(tl.int64)[None, :] * row_stride + channel[:, None]
    v += key.to(tl.int64)[:, None] * row_stride + channel[None, :]
    mask += key
    whole = positions // tile * tile
    for _ in tl.range(0, whole, tile, num_stages=stages):
        if columns == d:
            keys, values = tl.load(k), tl.load(v)
        else:
            keys, values = tl.load(k, inside[:, None], 0.0), tl.load(v, inside[None, :], 0.0)
        scores = tl.dot(queries, keys)
        if masked:
            scores = tl.where((tl.load(mask) != 0)[None, :], scores, float("-inf"))
        most, total, sums = _update(scores, values, most, total, sums, scale)
        k += tile * row_stride
        v += tile * row_stride
        mask += tile
    if whole < positions:
        there = whole + key < positions
        keys = tl.load(k, inside[:, None] & there[None, :], 0.0)
        values = tl.load(v, there[:, None] & inside[None, :], 0.0)
        if masked:
            there &= tl.load(mask, there, 0) != 0
        scores = tl.where(there[None, :], tl.dot(queries, keys), float("-inf"))
        most, total, sums = _update(scores, values, most, total, sums, scale)
    return most, total, sums


@triton.jit
@no_type_check
def _attend(
    q, k, v, text_k, text_v, mask, out, sample_stride, row_stride, text_sample_stride, text_head_stride,
    text_row_stride, mask_stride, n, words, scale, heads: tl.constexpr, d: tl.constexpr, columns:
    tl.constexpr, masked: tl.constexpr, rows: tl.constexpr, tile: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    sample, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    row, channel = tl.program_id(0) * rows + tl.arange(0, rows), tl.arange(0, columns)
    own, first = (row < n)[:, None] & (channel < d)[None, :], sample * sample_stride + head * d
    queries = tl.load(q + first + row.to(tl.int64)[:, None] * row_stride + channel[None, :], own, 0.0)
    most = tl.full((rows,), float("-inf"), tl.float32)
    total, sums = tl.zeros((rows,), tl.float32), tl.zeros((rows, columns), tl.float32)
    most, total, sums = _over_keys(
        queries, k + first, v + first, mask, row_stride, n, most, total, sums, scale,
        d, columns, False, tile, stages,
    )  # fmt: skip
    first = sample * text_sample_stride + head.to(tl.int64) * text_head_stride
    most, total, sums = _over_keys(
        queries, text_k + first, text_v + first, mask + sample * mask_stride, text_row_stride, words,
        most, total, sums, scale, d, columns, masked, tile, stages,
    )  # fmt: skip
    place = (sample * n + row)[:, None] * (heads * d) + head * d + channel[None, :]
    tl.store(out + place, sums / total[:, None], own)


def supports(queries: Float[Tensor, "b s c"], heads: int) -> bool:
    """Whether the kernel supports them: half precision, and 16, 32, ... 128 channels per head."""
    d = queries.shape[-1] // heads
    return queries.dtype in (torch.float16, torch.bfloat16) and d % 16 == 0 and 16 <= d <= 128


def attend(
    queries: Float[Tensor, "b n c"],
    keys: Float[Tensor, "b n c"],
    values: Float[Tensor, "b n c"],
    text_keys: Float[Tensor, "b m t d"],
    text_values: Float[Tensor, "b m t d"],
    mask: Bool[Tensor, "b t"] | None,
) -> Float[Tensor, "b n c"]:
    """softmax(q·kᵀ/√d)·v for each of the m heads, over the keys of the grid and the unmasked keys of the
    text.

    ``mask`` is False for masked words. The grid's channels are its heads, one after another.
    """
    (b, n, c), (_, heads, words, d) = queries.shape, text_keys.shape
    if text_keys.stride() != text_values.stride() or text_keys.stride(3) != 1:
        text_keys, text_values = text_keys.contiguous(), text_values.contiguous()
    assert queries.stride() == keys.stride() == values.stride()
    assert queries.stride(2) == 1
    if mask is not None:
        mask = mask.expand(b, words).contiguous()
    out, columns = queries.new_empty(b, n, c), triton.next_power_of_2(d)
    # Use tiles of 128 rows if the GPU can run all of them at once, but not all tiles of 64.
    processors = _processors(queries.device)
    small, large = (triton.cdiv(n, rows) * b * heads for rows in (64, 128))
    rows, warps = (128, 8) if small > 3 * processors and large <= 2 * processors else (64, 4)
    # With a few more registers, one tile fewer would fit per processor. Wider heads need more than 128.
    registers = 128 if columns <= 64 else None
    _attend[(triton.cdiv(n, rows), b * heads)](
        queries, keys, values, text_keys, text_values, queries if mask is None else mask, out,
        queries.stride(0), queries.stride(1), *text_keys.stride()[:3],
        0 if mask is None else mask.stride(0), n, words, math.log2(math.e) / math.sqrt(d),
        heads=heads, d=d, columns=columns, masked=mask is not None, rows=rows, tile=64,
        stages=3 if columns <= 64 else 2, num_warps=warps, maxnreg=registers,
    )  # fmt: skip
    return out


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1

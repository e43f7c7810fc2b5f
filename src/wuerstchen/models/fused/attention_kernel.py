"""Attention in Triton, for GPUs, equal to torch's ``scaled_dot_product_attention``.

torch's function is the reference, and runs where this kernel does not apply.

It reads the grid's queries, keys and values where one product left them, and the text's keys and values,
which all steps have in common, where they were left once. At v2's published sizes on an H100 it takes 0.7 to
1.02 of the time of cuDNN's kernel, torch's choice there, and a third of torch's where words are masked. The
softmax is taken in one pass over the keys (arXiv 2205.14135, algorithm 1), with sums in fp32.
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
def _taken_in(scores, values, most, total, sums, scale):
    """What a row of softmax knows of the keys so far, with those of one tile more."""
    now = tl.maximum(most, tl.max(scores, axis=1) * scale)
    weights, less = tl.exp2(scores * scale - now[:, None]), tl.exp2(most - now)
    total = total * less + tl.sum(weights, axis=1)
    return now, total, tl.dot(weights.to(values.dtype), values, sums * less[:, None])


@triton.jit
@no_type_check
def _over_keys(
    queries, k, v, mask, row_apart, positions, most, total, sums, scale, d: tl.constexpr,
    columns: tl.constexpr, masked: tl.constexpr, tile: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    """``_taken_in`` with all keys of one head of a sample that ``mask`` does not leave out."""
    channel, key = tl.arange(0, columns), tl.arange(0, tile)
    inside = channel < d
    k += key.to(tl.int64)[None, :] * row_apart + channel[:, None]
    v += key.to(tl.int64)[:, None] * row_apart + channel[None, :]
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
        most, total, sums = _taken_in(scores, values, most, total, sums, scale)
        k += tile * row_apart
        v += tile * row_apart
        mask += tile
    if whole < positions:
        there = whole + key < positions
        keys = tl.load(k, inside[:, None] & there[None, :], 0.0)
        values = tl.load(v, there[:, None] & inside[None, :], 0.0)
        if masked:
            there &= tl.load(mask, there, 0) != 0
        scores = tl.where(there[None, :], tl.dot(queries, keys), float("-inf"))
        most, total, sums = _taken_in(scores, values, most, total, sums, scale)
    return most, total, sums


@triton.jit
@no_type_check
def _attend(
    q, k, v, text_k, text_v, mask, out, sample_apart, row_apart, text_sample_apart, text_head_apart,
    text_row_apart, mask_apart, n, words, scale, heads: tl.constexpr, d: tl.constexpr, columns: tl.constexpr,
    masked: tl.constexpr, rows: tl.constexpr, tile: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    sample, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    row, channel = tl.program_id(0) * rows + tl.arange(0, rows), tl.arange(0, columns)
    own, first = (row < n)[:, None] & (channel < d)[None, :], sample * sample_apart + head * d
    queries = tl.load(q + first + row.to(tl.int64)[:, None] * row_apart + channel[None, :], own, 0.0)
    most = tl.full((rows,), float("-inf"), tl.float32)
    total, sums = tl.zeros((rows,), tl.float32), tl.zeros((rows, columns), tl.float32)
    most, total, sums = _over_keys(
        queries, k + first, v + first, mask, row_apart, n, most, total, sums, scale,
        d, columns, False, tile, stages,
    )  # fmt: skip
    first = sample * text_sample_apart + head.to(tl.int64) * text_head_apart
    most, total, sums = _over_keys(
        queries, text_k + first, text_v + first, mask + sample * mask_apart, text_row_apart, words,
        most, total, sums, scale, d, columns, masked, tile, stages,
    )  # fmt: skip
    place = (sample * n + row)[:, None] * (heads * d) + head * d + channel[None, :]
    tl.store(out + place, sums / total[:, None], own)


def suits(queries: Float[Tensor, "b s c"], heads: int) -> bool:
    """Whether the kernel is made for them: half precision, heads of 16 to 128 channels, a multiple of 16."""
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
    """softmax(q·kᵀ/√d)·v of each of the m heads over the grid's own keys and those of the text not masked.

    ``mask`` is False where a word is not attended to. The grid's heads lie side by side in its channels.
    """
    (b, n, c), (_, heads, words, d) = queries.shape, text_keys.shape
    if text_keys.stride() != text_values.stride() or text_keys.stride(3) != 1:
        text_keys, text_values = text_keys.contiguous(), text_values.contiguous()
    assert queries.stride() == keys.stride() == values.stride()
    assert queries.stride(2) == 1
    if mask is not None:
        mask = mask.expand(b, words).contiguous()
    out, columns = queries.new_empty(b, n, c), triton.next_power_of_2(d)
    # Tiles of 128 rows where a GPU takes all of them at once, but not those of 64.
    processors = _processors(queries.device)
    small, large = (triton.cdiv(n, rows) * b * heads for rows in (64, 128))
    rows, warps = (128, 8) if small > 3 * processors and large <= 2 * processors else (64, 4)
    # A few registers more, and one tile fewer would fit a processor; with wider heads they would not suffice.
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

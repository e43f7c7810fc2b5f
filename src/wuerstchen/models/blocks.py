"""Sequences of blocks, as Stages B and C run them."""

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from wuerstchen.models.fused.blocks import FactoredMap, keys_values, run_fused, suits
from wuerstchen.models.layers import KeysValues, TextTokens
from wuerstchen.models.traits import traits_of

Text = KeysValues | TextTokens
"""What an attention block may be given of a text."""


def texts_for(
    blocks: Iterable[nn.Module],
    tokens: Float[Tensor, "b t c_cond"],
    mask: Bool[Tensor, "b t"] | None,
    cache_kv: bool,
) -> list[Text]:
    """Text input of each attention block in ``blocks``: keys and values, or tokens without ``cache_kv``."""
    readers = [block for block in blocks if traits_of(block).takes == "text"]
    if not cache_kv:
        return [TextTokens(tokens, mask) for _ in readers]
    if not suits(tokens):
        return [block.keys_values(tokens, mask) for block in readers]
    return [keys_values(block, tokens, mask) for block in readers]


def run_blocks(
    blocks: Iterable[nn.Module],
    x: Float[Tensor, "b h w c"],
    r_embed: Float[Tensor, "b c_r"],
    texts: Iterator[Text],
    skip: Float[Tensor, "b h w c_skip"] | None = None,
    level_map: Float[Tensor, "b _ _ c_cond"] | FactoredMap | None = None,
) -> Float[Tensor, "b _ _ _"]:
    """Runs ``blocks`` in order; each attention block takes the next of ``texts``.

    If the first block is a convolution block it takes ``skip``, which no other does, and all convolution
    blocks take ``level_map`` behind it, as the weights expect.
    ``x`` may be overwritten where nothing is learnt.
    """
    if suits(x):
        with torch.cuda.device_of(x):  # kernels in Triton are started on the current device
            return run_fused(blocks, x, r_embed, texts, skip, level_map)
    if isinstance(level_map, FactoredMap):
        if torch.is_grad_enabled():
            raise ValueError(
                "This context is for sampling only. To train, call context(..., cache_kv=False)."
            )
        level_map = level_map.whole()  # made eagerly, and read by a compiled network
    for block in blocks:
        takes = traits_of(block).takes
        if takes == "maps":
            x = block(x, *(joined for joined in (skip, level_map) if joined is not None))
        elif takes == "timestep":
            x = block(x, r_embed)
        elif takes == "text":
            x = block(x, next(texts))
        else:
            x = block(x)
        skip = None
    return x

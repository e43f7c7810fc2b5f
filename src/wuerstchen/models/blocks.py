"""Runs sequences of blocks, for Stages B and C."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from wuerstchen.models.fused.blocks import FactoredCondition, can_fuse, keys_values, run_fused
from wuerstchen.models.layers import KeysValues, TextTokens
from wuerstchen.models.traits import traits_of

TextInput = KeysValues | TextTokens
"""The text as an attention block takes it."""

Condition = Float[Tensor, "b _ _ c_cond"] | FactoredCondition | None
"""The semantic latents at the grid of a level, mapped to ``c_cond`` channels. None if no block reads them."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """The inputs of a network that are the same at every step, computed once per image."""

    texts: Sequence[TextInput]
    """The text input of each attention block, in order; empty for a network without text."""


def text_inputs(
    blocks: Iterable[nn.Module],
    tokens: Float[Tensor, "b t c_cond"],
    mask: Bool[Tensor, "b t"] | None,
    cache_kv: bool,
) -> list[TextInput]:
    """The text input of each attention block: its keys and values, or without ``cache_kv`` the tokens."""
    readers = [block for block in blocks if traits_of(block).takes == "text"]
    if not cache_kv:
        return [TextTokens(tokens, mask) for _ in readers]
    if not can_fuse(tokens):
        return [block.keys_values(tokens, mask) for block in readers]
    return [keys_values(block, tokens, mask) for block in readers]


def run_blocks(
    blocks: Iterable[nn.Module],
    x: Float[Tensor, "b h w c"],
    r_embed: Float[Tensor, "b ... c_r"],
    texts: Iterator[TextInput],
    skip: Float[Tensor, "b h w c_skip"] | None = None,
    condition: Condition = None,
) -> Float[Tensor, "b _ _ _"]:
    """Runs ``blocks`` in order. Each attention block takes the next of ``texts``.

    Only the first block can take ``skip``, and does if it is a convolution block. All convolution blocks take
    ``condition``, concatenated after the skip as the weights expect. May overwrite ``x`` if no gradients are
    computed.
    """
    if can_fuse(x):
        with torch.cuda.device_of(x):  # Triton launches kernels on the current device
            return run_fused(blocks, x, r_embed, texts, skip, condition)
    if isinstance(condition, FactoredCondition):
        if torch.is_grad_enabled():
            raise ValueError(
                "This context is for sampling only. To train, call context(..., cache_kv=False)."
            )
        condition = condition.full()  # computed eagerly, then read by a compiled network
    for block in blocks:
        takes = traits_of(block).takes
        if takes == "skips":
            x = block(x, *(joined for joined in (skip, condition) if joined is not None))
        elif takes == "timestep":
            x = block(x, r_embed)
        elif takes == "text":
            x = block(x, next(texts))
        else:
            x = block(x)
        skip = None
    return x

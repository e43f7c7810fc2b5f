"""The exponential moving average of the weights, which is the result of training."""

import copy

import torch
from torch import nn

from wuerstchen.train.engine.sharding import local_part


def make_average(network: nn.Module) -> nn.Module:
    """A frozen copy of the network in eval mode, for ``update_average``."""
    return copy.deepcopy(network).eval().requires_grad_(False)


def decay_at(update: int, decay: float) -> float:
    """The decay of update number ``update`` (from 1): it rises from 2/11 to ``decay``.

    Without this warm-up, a decay of 0.999 leaves one third of random weights after a thousand updates.
    """
    return min(decay, (1 + update) / (10 + update))


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, decay: float) -> None:
    """average ← decay·average + (1 − decay)·network, batch statistics included. Integer buffers are copied.

    Of a sharded network, each process updates its own shard.
    """
    pairs = [
        (local_part(ours), local_part(theirs))
        for ours, theirs in (
            *zip(average.parameters(), network.parameters(), strict=True),
            *zip(average.buffers(), network.buffers(), strict=True),
        )
    ]
    floating = [(ours, theirs) for ours, theirs in pairs if ours.is_floating_point()]
    # One pass over memory: at a billion parameters each further pass is noticeable.
    torch._foreach_lerp_([ours for ours, _ in floating], [theirs for _, theirs in floating], 1 - decay)
    for ours, theirs in pairs:
        if not ours.is_floating_point():
            ours.copy_(theirs)

"""The weight average that is used in the end, beside the weights that are trained."""

import copy

import torch
from torch import Tensor, nn

from wuerstchen.train.parallel import local_part


def make_average(network: nn.Module) -> nn.Module:
    """A frozen copy of the network, in eval mode, to be kept up by ``update_average``."""
    return copy.deepcopy(network).eval().requires_grad_(False)


def decay_at(update: int, decay: float) -> float:
    """The decay of update number ``update`` (from 1): it rises from 2/11 to ``decay``.

    Without this warm-up, a decay of 0.999 leaves one third of random weights after a thousand updates.
    """
    return min(decay, (1 + update) / (10 + update))


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, decay: Tensor | float) -> None:
    """average ← decay·average + (1 − decay)·network, statistics included; counts are copied.

    ``decay`` as a tensor of no dimension can change between replays of a recorded update.
    """
    ours, theirs = (
        # Of a sharded network this process keeps up its own part.
        {name: local_part(tensor) for name, tensor in module.state_dict().items()}
        for module in (average, network)
    )
    floating = [name for name, tensor in ours.items() if tensor.is_floating_point()]
    difference = torch._foreach_sub([theirs[n] for n in floating], [ours[n] for n in floating])
    torch._foreach_mul_(difference, 1 - decay)
    torch._foreach_add_([ours[n] for n in floating], difference)
    for name in ours.keys() - set(floating):
        ours[name].copy_(theirs[name])

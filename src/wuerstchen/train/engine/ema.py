"""The exponential moving average of the weights, which is the result of training."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from wuerstchen.runtime.offload import OneAtATime
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

    Of a sharded network, each process updates its own shard. The average may be on another device and in
    another precision than the network.
    """
    pairs = [
        (local_part(ours), local_part(theirs))
        for ours, theirs in (
            *zip(average.parameters(), network.parameters(), strict=True),
            *zip(average.buffers(), network.buffers(), strict=True),
        )
    ]
    floating = [(ours, theirs) for ours, theirs in pairs if ours.is_floating_point()]
    alike = [ours.device == theirs.device and ours.dtype == theirs.dtype for ours, theirs in floating]
    for ours, theirs in (pair for pair, same in zip(floating, alike, strict=True) if not same):
        ours.lerp_(theirs.to(ours.device).to(ours.dtype), 1 - decay)
    floating = [pair for pair, same in zip(floating, alike, strict=True) if same]
    # One pass over memory: at a billion parameters each further pass is noticeable.
    if floating:
        torch._foreach_lerp_([ours for ours, _ in floating], [theirs for _, theirs in floating], 1 - decay)
    for ours, theirs in pairs:
        if not ours.is_floating_point():
            ours.copy_(theirs)


@contextmanager
def on_device(networks: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Inside this context, networks that are kept in host memory are on ``device``. They must not change."""
    residence = OneAtATime(device, pinned=False)
    try:
        with residence.using(*networks):
            yield
    finally:
        residence.release()

"""What each block supports, declared beside its definition. Nothing else lists block classes."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

Takes = Literal["x", "skips", "timestep", "text"]
Sharding = Literal["no", "block", "network", "keep whole"]


@dataclass(frozen=True, kw_only=True)
class BlockTraits:
    """What a block supports: the attribute ``allows`` of its class. By default, nothing.

    A subclass inherits everything except ``fuse``, because its forward pass may differ.
    """

    takes: Takes = "x"
    """The extra input that ``run_blocks`` passes to the block: the level's skip and condition (``skips``),
    the timestep embedding, or the text. Blocks that take text need a ``keys_values`` method."""
    compile: bool = False
    """Training may compile it on its own."""
    recompute: bool = False
    """Training may keep only its input and recompute its activations in the backward pass."""
    shard: Sharding = "no"
    """``block``: its weights are gathered together. ``network``: a network that is large enough to shard.
    ``keep whole``: a network that contains it is not sharded."""
    orthogonalise: bool = False
    """Muon may train the matrices of its linear layers."""
    fuse: tuple[type[nn.Module], ...] = ()
    """Its layers in the order of ``modules()``, if ``models.fused`` has a version of it. The fused version
    replaces blocks with exactly these layers, and reads the weights by the block's attribute names."""


PLAIN = BlockTraits()


def traits_of(module: nn.Module) -> BlockTraits:
    """The traits of a module; the default ones if it declares none."""
    return getattr(type(module), "allows", PLAIN)


def fused_layers(module: nn.Module) -> tuple[type[nn.Module], ...]:
    """The layers that a fusible module needs. Empty if it cannot be fused, or if only a base class can."""
    return vars(type(module)).get("allows", PLAIN).fuse

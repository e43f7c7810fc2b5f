"""What a block allows, declared beside its definition. Nothing else in the package lists block classes."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

Takes = Literal["x", "maps", "timestep", "text"]
Sharding = Literal["no", "block", "network", "keep whole"]


@dataclass(frozen=True, kw_only=True)
class BlockTraits:
    """The attribute ``allows`` of a block's class. Whatever a block does not allow, it does without.

    A subclass inherits everything but ``fuse``, because its forward pass may differ.
    """

    takes: Takes = "x"
    """What ``run_blocks`` calls it with besides the feature map ``x``: the skip and the semantic map of its
    level (``maps``), the timestep's embedding, or the text, for which it needs a method ``keys_values``."""
    compile: bool = False
    """Training compiles it by itself."""
    recompute: bool = False
    """Training may keep its input alone and compute the rest again for the backward pass."""
    shard: Sharding = "no"
    """``block``: its weights are gathered together. ``network``: a network that is worth sharding.
    ``keep whole``: whatever contains it is not sharded."""
    orthogonalise: bool = False
    """Muon may train the matrices of its linear layers."""
    fuse: tuple[type[nn.Module], ...] = ()
    """Its layers, in the order of ``modules()``, if ``models.fused`` has a version of it. The fused version
    replaces a block that has exactly these layers and reads them by the block's attribute names."""


PLAIN = BlockTraits()


def traits_of(module: nn.Module) -> BlockTraits:
    """What a module allows: nothing if it does not say."""
    return getattr(type(module), "allows", PLAIN)


def fused_layers(module: nn.Module) -> tuple[type[nn.Module], ...]:
    """The layers with which a module is fused. Empty if it is not, or if only a base class says so."""
    return vars(type(module)).get("allows", PLAIN).fuse

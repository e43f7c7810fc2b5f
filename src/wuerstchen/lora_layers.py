"""The layers of peft in a network: wraps plain layers for an adapter, and finds them again."""

import contextlib
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from wuerstchen.checkpoints.adapter_layers import LayerUpdate
from wuerstchen.errors import UserError


def adaptable(module: nn.Module) -> dict[str, nn.Module]:
    """Linear layers and convolutions by name, without the wrappers of adapters that are already there."""
    wrapped = dict(adapted_layers(module))
    inside = tuple(f"{name}." for name in wrapped)
    return {
        name: plain
        for name, layer in module.named_modules()
        if isinstance(plain := layer.base_layer if name in wrapped else layer, nn.Linear | nn.Conv2d)
        and not name.startswith(inside)
    }


def inject(module: nn.Module, updates: dict[str, LayerUpdate], adapter_name: str) -> None:
    """Wraps the layers with peft's, with A and B in each layer's dtype and on its device.

    Raises ``UserError`` if ``peft`` is missing.
    """
    peft = _peft()
    rank = Counter(u.rank for u in updates.values()).most_common(1)[0][0]
    alpha = Counter(u.alpha for u in updates.values()).most_common(1)[0][0]
    patterns = {name: f"^{re.escape(name)}" for name in updates}
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules="|".join(re.escape(name) for name in updates),
        rank_pattern={patterns[n]: u.rank for n, u in updates.items() if u.rank != rank},
        alpha_pattern={patterns[n]: u.alpha for n, u in updates.items() if u.alpha != alpha},
        inference_mode=True,
        init_lora_weights=False,
        use_dora=any(update.magnitude is not None for update in updates.values()),
    )
    targets = adaptable(module)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    with warnings.catch_warnings(), _without_groups([targets[name] for name in updates]):
        warnings.simplefilter("ignore")  # about other adapters of the network
        peft.inject_adapter_in_model(config, module, adapter_name, low_cpu_mem_usage=True)
    for parameter in trained:
        parameter.requires_grad_(True)  # peft has frozen them
    layers = dict(adapted_layers(module))
    for name, update in updates.items():
        base = layers[name].base_layer.weight
        for matrices, value in ((layers[name].lora_A, update.a), (layers[name].lora_B, update.b)):
            weight = value.detach().to(device=base.device, dtype=base.dtype, copy=True)
            matrices[adapter_name].weight = nn.Parameter(weight, requires_grad=False)
        if update.magnitude is not None:
            weight = update.magnitude.detach().to(device=base.device, dtype=base.dtype, copy=True)
            layers[name].lora_magnitude_vector[adapter_name].weight = nn.Parameter(
                weight, requires_grad=False
            )
        layers[name].train(module.training)


@contextlib.contextmanager
def _without_groups(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Makes peft treat grouped convolutions as plain ones, so that A and B have no groups.

    peft would give B the groups of the layer, and the rank would have to be a multiple of them: of 1536 in
    Stage C's depthwise convolutions.
    """
    grouped = {layer: layer.groups for layer in layers if isinstance(layer, nn.Conv2d)}
    try:
        for layer in grouped:
            layer.groups = 1
        yield
    finally:
        for layer, groups in grouped.items():
            layer.groups = groups


def adapted_layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers with adapters, by name. They are found by their attributes, so this works without peft."""
    for name, layer in module.named_modules():
        if hasattr(layer, "base_layer") and hasattr(layer, "lora_A"):
            yield name, layer


def replace(module: nn.Module, name: str, layer: nn.Module) -> None:
    """Puts ``layer`` in the place of the module's layer ``name``."""
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, layer)


def freeze(layer: Any) -> None:
    """Freezes an adapter again, because peft makes every adapter that it activates trainable."""
    for matrices in matrices_of(layer):
        matrices.requires_grad_(False)


def matrices_of(layer: Any) -> tuple[nn.ModuleDict, ...]:
    """A, B and DoRA's magnitudes of a layer, by adapter."""
    return layer.lora_A, layer.lora_B, getattr(layer, "lora_magnitude_vector", nn.ModuleDict())


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UserError(
            'adapters need the package peft. Install it with: pip install "wuerstchen[lora]"'
        ) from error
    return peft

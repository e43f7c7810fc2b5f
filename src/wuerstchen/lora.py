"""Low-rank adapters (LoRA, arXiv 2106.09685) for Stage C and the text encoder: load, mix, fuse, remove.

An adapter adds (alpha / rank) · B A to the matrix of a linear layer. A has shape (rank, in), B has shape
(out, rank). For a convolution, A is a convolution with the layer's kernel and ``rank`` output channels, and B
a 1×1 convolution to the layer's channels. DoRA (arXiv 2402.09353) then scales each output row to a learnt
norm. ``checkpoints.adapters`` reads the files, and ``checkpoints.adapter_write`` writes them. The layers
come from ``peft``: ``pip install "wuerstchen[lora]"``. After a change, recompute text keys and values that
``Prior.context`` returned before.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wuerstchen.checkpoints.adapter_layers import LayerUpdate, layer_updates
from wuerstchen.checkpoints.adapter_metadata import weights_hash
from wuerstchen.checkpoints.adapters import METADATA as METADATA
from wuerstchen.checkpoints.adapters import WEIGHT_NAME as WEIGHT_NAME
from wuerstchen.checkpoints.adapters import (
    Adapter,
    AdapterConfig,
    LayerTensors,
    is_finite_number,
    read_adapter,
)
from wuerstchen.checkpoints.adapters import save_lora as save_lora
from wuerstchen.errors import CheckpointError, UserError, UserNotice, shown
from wuerstchen.lora_layers import adaptable, adapted_layers, freeze, inject, matrices_of, replace
from wuerstchen.models.text import TextEncoder


class AssumedScaleWarning(UserNotice):
    """A file does not store the alpha of its adapter. The message says what is assumed."""


def load_lora(
    prior: nn.Module,
    source: Path | str | Mapping[str, Tensor] | Adapter,
    *,
    adapter_name: str = "default",
    weight_name: str | None = None,
    text_encoder: nn.Module | None = None,
) -> None:
    """Adds an adapter and makes it the only active one, at weight 1. Its weights are frozen.

    ``source`` is a file, a folder that diffusers or peft wrote (``pytorch_lora_weights.safetensors``,
    ``adapter_model.safetensors``, or ``weight_name``), the tensors themselves, or the result of
    ``read_adapter``. Keys may be diffusers' (``prior.blocks.2.attention.to_q.lora_A.weight``), those
    of its older versions (``….lora.down.weight``, ``….processor.to_q_lora.down.weight``), peft's, or kohya's
    and OneTrainer's (``lora_prior_unet_blocks_2_attention_to_q.lora_down.weight`` with ``.alpha``). The rank
    follows from the shapes. Alpha comes from ``.alpha`` keys, the file's metadata, or peft's
    ``adapter_config.json`` next to the file. Otherwise it equals the rank, with an ``AssumedScaleWarning``.

    New words in the file are added to ``text_encoder`` if it is a ``TextEncoder``. Otherwise they are
    ignored, with a ``UserNotice``. There is one too if the adapter was trained on other weights.

    Raises ``CheckpointError`` if the file is damaged or does not fit, ``UserError`` if the name is taken, if
    an adapter is fused, and if ``peft`` is missing. On error, the networks are unchanged.
    """
    file = source if isinstance(source, Adapter) else read_adapter(source, weight_name)
    _check_new_name(prior, adapter_name)
    if text_encoder is not None:
        _check_new_name(text_encoder, adapter_name)
    if file.text and text_encoder is None:
        raise CheckpointError(
            f"{file.where} also adapts the text encoder ({next(iter(file.text))!r}). Pass it as text_encoder."
        )
    plans = [(prior, _updates(prior, file.prior, file.prior_config, file.where))]
    if text_encoder is not None:
        plans.append((text_encoder, _updates(text_encoder, file.text, file.text_config, file.where)))
    before = [_states(module) for module, _ in plans]
    done: list[nn.Module] = []
    try:
        for module, updates in plans:
            if updates:
                done.append(module)
                inject(module, updates, adapter_name)
                enable_lora(module, True)
                set_lora(module, [adapter_name], [1.0])
        _add_words(text_encoder, file)
    except BaseException:
        for module in done:
            _remove(module, [adapter_name])
        for states in before:  # adding an adapter has turned off the others
            _restore(states)
        raise
    _warn_of_other_base(prior, file)
    _warn_of_assumed_scale([update for _, updates in plans for update in updates.values()], file.where)


def adapter_tensors(module: nn.Module, adapter_name: str = "default") -> dict[str, LayerTensors]:
    """The tensors of an adapter by layer, for ``Adapter`` and ``write_adapter``. They share memory with it.

    Raises ``UserError`` if no adapter has this name.
    """
    _check_names(module, [adapter_name])
    return {
        name: LayerTensors(
            layer.lora_A[adapter_name].weight,
            layer.lora_B[adapter_name].weight,
            float(layer.lora_alpha[adapter_name]),
            magnitude.weight.flatten()
            if (magnitude := dict(matrices_of(layer)[2]).get(adapter_name)) is not None
            else None,
        )
        for name, layer in adapted_layers(module)
        if adapter_name in layer.lora_A
    }


def lora_names(module: nn.Module) -> list[str]:
    """The names of the loaded adapters, in the order of loading."""
    return list(dict.fromkeys(name for _, layer in adapted_layers(module) for name in layer.lora_A))


def active_loras(module: nn.Module) -> list[str]:
    """The adapters that affect the output, fused or not. None while ``enable_lora`` has turned them off."""
    active = (
        name
        for _, layer in adapted_layers(module)
        if not layer.disable_adapters
        for name in (layer.merged_adapters or layer.active_adapters)
    )
    return [name for name in dict.fromkeys(active) if name in lora_names(module)]


def chosen_loras(module: nn.Module) -> tuple[dict[str, float], bool]:
    """The adapters chosen with ``set_lora`` and their weights, and whether ``enable_lora`` has them on."""
    chosen: dict[str, float] = {}
    on = True
    for _, layer in adapted_layers(module):
        on = on and not layer.disable_adapters
        for name in layer.active_adapters:
            if name in layer.lora_A:
                alpha = layer.lora_alpha[name] / layer.r[name]
                chosen.setdefault(name, layer.scaling[name] / alpha if alpha else 1.0)
    return chosen, on


def move_lora(module: nn.Module, names: Sequence[str], device: torch.device) -> None:
    """Moves the weights of adapters. Active ones must be on their layers' device for a forward pass."""
    for _, layer in adapted_layers(module):
        for name in names:
            if name in layer.lora_A:
                for matrices in matrices_of(layer):
                    if name in matrices:
                        matrices[name].to(device)


def misplaced_loras(module: nn.Module) -> list[str]:
    """The active adapters on another device than their layers."""
    active = active_loras(module)
    found = (
        name
        for _, layer in adapted_layers(module)
        for name in active
        if name in layer.lora_A
        and name not in layer.merged_adapters
        and layer.lora_A[name].weight.device != layer.base_layer.weight.device
    )
    return list(dict.fromkeys(found))


def fused_loras(module: nn.Module) -> list[str]:
    """The adapters that are fused into the weights."""
    return _fused(module)


def set_lora(module: nn.Module, names: Sequence[str], weights: Sequence[float | int]) -> None:
    """Activates exactly these adapters, each scaled by its weight. 1 is as trained.

    Raises ``UserError`` for unknown names, weights that are not finite, and while an adapter is fused.
    """
    names = [names] if isinstance(names, str) else list(names)
    _check_names(module, names)
    if len(names) != len(weights):
        raise UserError(f"{len(weights)} weights do not match {len(names)} adapters. Give one for each.")
    for name, weight in zip(names, weights, strict=True):
        _check_scale(f"the weight of adapter {name!r}", weight)
    _check_not_fused(module)
    for _, layer in adapted_layers(module):
        layer.set_adapter(names)
        for name, weight in zip(names, weights, strict=True):
            layer.set_scale(name, weight)
        freeze(layer)


def enable_lora(module: nn.Module, on: bool) -> None:
    """Turns all adapters off, or the previously active ones on. Raises ``UserError`` while one is fused."""
    _check_not_fused(module)
    for _, layer in adapted_layers(module):
        layer.enable_adapters(on)
        freeze(layer)


def fuse_lora(
    module: nn.Module, *, scale: float | int = 1.0, names: Sequence[str] | None = None, safe: bool = False
) -> None:
    """Adds the active adapters, or ``names``, times ``scale`` to the weights, so that they cost nothing.

    While any adapter is fused, the others have no effect. ``safe`` refuses a result that is not finite.
    Raises ``UserError`` for unknown or fused names, a scale that is not finite, and adapters on convolutions
    with groups, which cannot be merged. On error, the network is unchanged.
    """
    _check_scale("scale", scale)
    names = active_loras(module) if names is None else [names] if isinstance(names, str) else list(names)
    _check_names(module, names)
    if not names:
        raise UserError("no adapter is active, so there is nothing to fuse. Call set_lora, or give names.")
    fused = _fused(module)
    for name in names:
        if name in fused:
            raise UserError(f"adapter {name!r} is already fused. Call unfuse_lora first.")
    layers = [(layer, name) for _, layer in adapted_layers(module) for name in names if name in layer.lora_A]
    _check_fusible(module, names)
    if safe:
        _check_finite_sum(layers, scale)
    for layer, name in layers:
        # peft unmerges with the current scaling, so it must not change while the adapter is fused.
        layer.unfused_scaling = {**getattr(layer, "unfused_scaling", {}), name: layer.scaling[name]}
        layer.scaling[name] *= scale
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about adapters that are already fused
            layer.merge(adapter_names=[name])


def unfuse_lora(module: nn.Module) -> None:
    """Subtracts all fused adapters again. The weights are restored up to rounding."""
    for _, layer in adapted_layers(module):
        if layer.merged:
            layer.unmerge()
        layer.scaling.update(getattr(layer, "unfused_scaling", {}))
        layer.unfused_scaling = {}


def delete_lora(module: nn.Module, names: Sequence[str]) -> None:
    """Removes adapters. Raises ``UserError`` for unknown or fused names."""
    names = [names] if isinstance(names, str) else list(names)
    _check_names(module, names)
    for name in names:
        if name in _fused(module):
            raise UserError(
                f"adapter {name!r} is fused. Call unfuse_lora first, or "
                "unload_lora to keep it in the weights."
            )
    _remove(module, names)


def unload_lora(module: nn.Module) -> None:
    """Restores the plain layers. Fused adapters stay in the weights."""
    for name, layer in list(adapted_layers(module)):
        replace(module, name, layer.base_layer)
    if hasattr(module, "peft_config"):
        del module.peft_config


def _updates(
    module: nn.Module, found: Mapping[str, LayerTensors], config: AdapterConfig | None, where: str
) -> dict[str, LayerUpdate]:
    return layer_updates(adaptable(module), found, config, network=type(module).__name__, where=where)


def _add_words(text_encoder: nn.Module | None, file: Adapter) -> None:
    if isinstance(text_encoder, TextEncoder):
        try:
            text_encoder.add_words(file.tokens)
        except UserError as error:
            raise CheckpointError(f"{file.where}: {error}") from error
    elif file.tokens:
        warnings.warn(
            f"{file.where} has vectors of new words ({', '.join(file.tokens)}), which are ignored here. Load "
            "it with wuerstchen.load(...).load_lora to use them.",
            UserNotice,
            stacklevel=4,
        )


def _warn_of_other_base(prior: nn.Module, file: Adapter) -> None:
    """Adapters work on related models too, such as few-step students, so this is no error."""
    base, wanted = file.metadata.base_model, file.metadata.base_hash
    half = next(prior.parameters()).dtype is torch.bfloat16  # its hash differs
    if wanted and not half and weights_hash(prior) != wanted:
        warnings.warn(
            f"{file.where} was trained on a model with other weights{f' ({base})' if base else ''}. Its "
            "effect may be weaker or different here.",
            UserNotice,
            stacklevel=4,
        )


def _warn_of_assumed_scale(updates: Sequence[LayerUpdate], where: str) -> None:
    assumed = sum(update.is_assumed for update in updates)
    if assumed:
        which = "" if assumed == len(updates) else f" for {assumed} of its {len(updates)} layers"
        warnings.warn(
            f"{where} does not store alpha{which}: not in an .alpha tensor, in its header, or in an "
            "adapter_config.json. Alpha is assumed to equal the rank, which gives scale 1. If the adapter "
            "was trained with another alpha, load it with scale alpha / rank.",
            AssumedScaleWarning,
            stacklevel=3,
        )


def _fused(module: nn.Module) -> list[str]:
    return list(dict.fromkeys(name for _, layer in adapted_layers(module) for name in layer.merged_adapters))


def _states(module: nn.Module) -> list[tuple[Any, list[str], dict[str, float], bool]]:
    """What is active in each adapted layer, with which scaling, and whether adapters are off."""
    return [
        (layer, list(layer.active_adapters), dict(layer.scaling), layer.disable_adapters)
        for _, layer in adapted_layers(module)
    ]


def _restore(states: list[tuple[Any, list[str], dict[str, float], bool]]) -> None:
    for layer, active, scaling, is_off in states:
        layer.set_adapter(active)
        layer.scaling.update(scaling)
        layer.enable_adapters(not is_off)
        freeze(layer)


def _remove(module: nn.Module, names: Sequence[str]) -> None:
    for path, layer in list(adapted_layers(module)):
        if set(names) & set(layer.active_adapters):
            left = [name for name in layer.active_adapters if name not in names]
            # As in peft: if no active adapter is left, the first of the others becomes active.
            layer.set_adapter(left or [name for name in layer.lora_A if name not in names][:1])
        for name in names:
            layer.delete_adapter(name)
        if not layer.lora_A:
            replace(module, path, layer.base_layer)
        else:
            freeze(layer)
    for name in names:
        getattr(module, "peft_config", {}).pop(name, None)
    if not lora_names(module):
        unload_lora(module)


def _check_new_name(module: nn.Module, name: str) -> None:
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict, name):
        raise UserError(
            f"adapter_name must be a non-empty string without dots that is not an attribute of "
            f"torch.nn.ModuleDict, got {name!r}. Use another name."
        )
    if name in lora_names(module):
        raise UserError(f"adapter_name {name!r} is already used. Choose another, or call delete_lora first.")
    _check_not_fused(module)


def _check_names(module: nn.Module, names: Sequence[str]) -> None:
    known = lora_names(module)
    for name in names:
        if name not in known:
            raise UserError(f"adapter {name!r} is not loaded. Loaded adapters: {', '.join(known) or 'none'}.")
    if len(set(names)) < len(names):
        raise UserError(f"adapters {', '.join(names)} contain a name twice. Name each once.")


def _check_not_fused(module: nn.Module) -> None:
    fused = _fused(module)
    if fused:
        raise UserError(
            f"adapter {fused[0]!r} is fused into the weights, so adapters cannot be changed. "
            "Call unfuse_lora first, or unload_lora to keep it in the weights."
        )


def _check_fusible(module: nn.Module, names: Sequence[str]) -> None:
    for path, layer in adapted_layers(module):
        for name in names:
            if name in layer.lora_A and getattr(layer.base_layer, "groups", 1) > 1:
                raise UserError(
                    f"adapter {name!r} changes {path!r}, a convolution with groups, and cannot be merged "
                    "into its weights. Leave it unfused: the images are the same."
                )


def _check_scale(what: str, value: object) -> None:
    if not is_finite_number(value):
        raise UserError(f"{what} must be a finite number, got {shown(value)}. Use 1 for full strength.")


def _check_finite_sum(layers: Sequence[tuple[Any, str]], scale: float | int) -> None:
    sums: dict[int, Tensor] = {}
    for layer, name in layers:
        weight = layer.base_layer.weight
        delta = layer.get_delta_weight(name) * scale
        if name in getattr(layer, "lora_magnitude_vector", {}):
            magnitude = layer.lora_magnitude_vector[name].weight.flatten()
            adapted = weight + delta
            factor = magnitude / adapted.flatten(1).norm(dim=1)
            delta = adapted * factor.view(-1, *[1] * (weight.ndim - 1)) - weight
        sums[id(layer)] = sums.get(id(layer), weight) + delta
        if not sums[id(layer)].isfinite().all():
            raise UserError(f"adapter {name!r} at scale {scale} gives infinite weights. Use a smaller scale.")

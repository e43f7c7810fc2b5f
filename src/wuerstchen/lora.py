"""Low-rank adapters (LoRA, arXiv 2106.09685) for Stage C and the text encoder: load, mix, fuse, take out.

An adapter adds (alpha / rank) · B A to the matrix of a linear layer, with A of shape (rank, in) and B of
shape (out, rank). For a convolution, A is a convolution to ``rank`` channels, with the layer's kernel, and B
one of kernel 1 to the layer's channels. Files are read by ``checkpoints.adapters``; the layers come from
``peft``, which ``pip install "wuerstchen[lora]"`` brings. Text keys and values that ``Prior.context``
computed before a change belong to the old weights: compute them again.
"""

import contextlib
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wuerstchen.checkpoints.adapters import METADATA as METADATA
from wuerstchen.checkpoints.adapters import WEIGHT_NAME as WEIGHT_NAME
from wuerstchen.checkpoints.adapters import AdapterConfig, LayerTensors, is_finite_number, read_adapter
from wuerstchen.checkpoints.adapters import save_lora as save_lora
from wuerstchen.checkpoints.foreign import check_adapter_not_cascade
from wuerstchen.errors import CheckpointError, UserError, UserNotice, shown


class AssumedScaleWarning(UserNotice):
    """A file does not say how strong its adapter is; the message says what was assumed."""


@dataclass(frozen=True)
class _Update:
    """What an adapter adds to one layer."""

    a: Tensor
    b: Tensor
    alpha: float
    assumed: bool
    """Whether alpha is the rank because nothing says it."""

    @property
    def rank(self) -> int:
        return self.a.shape[0]


def load_lora(
    prior: nn.Module,
    source: Path | str | Mapping[str, Tensor],
    *,
    adapter_name: str = "default",
    weight_name: str | None = None,
    text_encoder: nn.Module | None = None,
) -> None:
    """Adds an adapter and makes it the only active one, at weight 1. Its weights are frozen.

    ``source`` is a file, a folder that diffusers or peft wrote (``pytorch_lora_weights.safetensors``,
    ``adapter_model.safetensors``) or with ``weight_name``, or the tensors themselves. Keys may be diffusers'
    (``prior.blocks.2.attention.to_q.lora_A.weight``), those of its older versions (``….lora.down.weight``,
    ``….processor.to_q_lora.down.weight``), peft's, or kohya's and OneTrainer's
    (``lora_prior_unet_blocks_2_attention_to_q.lora_down.weight`` with ``.alpha``). The rank follows from the
    shapes; alpha from ``.alpha`` keys, the file's metadata, or peft's ``adapter_config.json`` beside it.
    Where none tells, it equals the rank, and an ``AssumedScaleWarning`` says so.

    Raises ``CheckpointError`` if the file is damaged or anything in it does not fit; nothing is changed then.
    Raises ``UserError`` for a name that is taken, while an adapter is fused, and if ``peft`` is missing.
    """
    file = read_adapter(source, weight_name)
    _check_new_name(prior, adapter_name)
    if text_encoder is not None:
        _check_new_name(text_encoder, adapter_name)
    if file.text and text_encoder is None:
        raise CheckpointError(
            f"{file.where} is wrong here because it adapts the text encoder too ({next(iter(file.text))!r}); "
            "give text_encoder"
        )
    plans = [(prior, _plan(prior, file.prior, file.prior_config, file.where))]
    if text_encoder is not None:
        plans.append((text_encoder, _plan(text_encoder, file.text, file.text_config, file.where)))
    done: list[nn.Module] = []
    try:
        for module, updates in plans:
            if updates:
                done.append(module)
                _inject(module, updates, adapter_name)
    except BaseException:
        for module in done:
            _remove(module, [adapter_name])
        raise
    _say_what_was_assumed([update for _, updates in plans for update in updates.values()], file.where)


def lora_names(module: nn.Module) -> list[str]:
    """The adapters that were loaded, in order."""
    return list(dict.fromkeys(name for _, layer in _layers(module) for name in layer.lora_A))


def active_loras(module: nn.Module) -> list[str]:
    """The adapters that act on the result, fused or not; none while ``enable_lora`` has them off."""
    active = (
        name
        for _, layer in _layers(module)
        if not layer.disable_adapters
        for name in (layer.merged_adapters or layer.active_adapters)
    )
    return [name for name in dict.fromkeys(active) if name in lora_names(module)]


def chosen_loras(module: nn.Module) -> tuple[dict[str, float], bool]:
    """The adapters that ``set_lora`` chose, with their weights, and whether ``enable_lora`` has them on."""
    chosen: dict[str, float] = {}
    on = True
    for _, layer in _layers(module):
        on = on and not layer.disable_adapters
        for name in layer.active_adapters:
            if name in layer.lora_A:
                alpha = layer.lora_alpha[name] / layer.r[name]
                chosen.setdefault(name, layer.scaling[name] / alpha if alpha else 1.0)
    return chosen, on


def move_lora(module: nn.Module, names: Sequence[str], device: torch.device) -> None:
    """Moves the weights of adapters. Those that act must be where their layers are when these are called."""
    for _, layer in _layers(module):
        for name in names:
            if name in layer.lora_A:
                layer.lora_A[name].to(device)
                layer.lora_B[name].to(device)


def misplaced_loras(module: nn.Module) -> list[str]:
    """The adapters that act and lie on another device than their layers."""
    active = active_loras(module)
    found = (
        name
        for _, layer in _layers(module)
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
    """Lets exactly these adapters act, each times its weight (1 is as trained).

    Raises ``UserError`` for unknown names, weights that are not finite, and while an adapter is fused.
    """
    names = [names] if isinstance(names, str) else list(names)
    _check_names(module, names)
    if len(names) != len(weights):
        raise UserError(f"{len(weights)} weights do not fit {len(names)} adapters; give one for each")
    for name, weight in zip(names, weights, strict=True):
        _check_scale(f"weight {weight!r} of adapter {name!r}", weight)
    _check_not_fused(module)
    for _, layer in _layers(module):
        layer.set_adapter(names)
        for name, weight in zip(names, weights, strict=True):
            layer.set_scale(name, weight)
        _freeze(layer)


def enable_lora(module: nn.Module, on: bool) -> None:
    """Turns all adapters off, or those that were active on again. Raises ``UserError`` while one is fused."""
    _check_not_fused(module)
    for _, layer in _layers(module):
        layer.enable_adapters(on)
        _freeze(layer)


def fuse_lora(
    module: nn.Module, *, scale: float | int = 1.0, names: Sequence[str] | None = None, safe: bool = False
) -> None:
    """Adds the active adapters, or ``names``, times ``scale`` to the weights: no cost while drawing.

    While anything is fused, adapters that are not do not act. ``safe`` refuses a result that is not finite.
    Raises ``UserError`` for unknown or fused names, a scale that is not finite, and adapters on convolutions
    with groups, whose weights cannot hold them; nothing is changed then.
    """
    _check_scale(f"scale {scale!r}", scale)
    names = active_loras(module) if names is None else [names] if isinstance(names, str) else list(names)
    _check_names(module, names)
    if not names:
        raise UserError("no adapter is active, so there is nothing to fuse; call set_lora or give names")
    fused = _fused(module)
    for name in names:
        if name in fused:
            raise UserError(f"adapter {name!r} is fused already; call unfuse_lora first")
    layers = [(layer, name) for _, layer in _layers(module) for name in names if name in layer.lora_A]
    _check_fusible(module, names)
    if safe:
        _check_finite_sum(layers, scale)
    for layer, name in layers:
        # peft subtracts by the scaling of that moment, so it must stay until the adapter is taken out again.
        layer.unfused_scaling = {**getattr(layer, "unfused_scaling", {}), name: layer.scaling[name]}
        layer.scaling[name] *= scale
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about adapters that are fused already
            layer.merge(adapter_names=[name])


def unfuse_lora(module: nn.Module) -> None:
    """Subtracts all that was fused; the weights are the old ones up to rounding. Adapters act as before."""
    for _, layer in _layers(module):
        if layer.merged:
            layer.unmerge()
        layer.scaling.update(getattr(layer, "unfused_scaling", {}))
        layer.unfused_scaling = {}


def delete_lora(module: nn.Module, names: Sequence[str]) -> None:
    """Removes adapters for good. Raises ``UserError`` for unknown or fused names."""
    names = [names] if isinstance(names, str) else list(names)
    _check_names(module, names)
    for name in names:
        if name in _fused(module):
            raise UserError(
                f"adapter {name!r} is fused; call unfuse_lora first, or unload_lora to keep it so"
            )
    _remove(module, names)


def unload_lora(module: nn.Module) -> None:
    """Back to plain layers with their own weights. What is fused stays in the weights."""
    for name, layer in list(_layers(module)):
        _replace(module, name, layer.base_layer)
    if hasattr(module, "peft_config"):
        del module.peft_config


def _plan(
    module: nn.Module, found: Mapping[str, LayerTensors], config: AdapterConfig | None, where: str
) -> dict[str, _Update]:
    """What to add to which layer of ``module``. Raises ``CheckpointError`` unless everything fits."""
    layers = _adaptable(module)
    by_name = _Names(layers)
    updates: dict[str, _Update] = {}
    for layer, tensors in found.items():
        name = by_name.find(layer)
        if name is None:
            check_adapter_not_cascade(where, found)
            raise CheckpointError(
                f"{where} is wrong because {shown(layer)} is no linear layer and no convolution of "
                f"{type(module).__name__}; give an adapter that was trained for this model"
            )
        if name in updates:
            raise CheckpointError(f"{where} is wrong because {name!r} is in it twice; get it again")
        a, b = _fitted(layers[name], tensors, layer, where)
        rank, alpha = a.shape[0], tensors.alpha
        if alpha is None and config is not None:
            alpha = config.alpha([layer, name], rank)
        updates[name] = _Update(a, b, float(rank) if alpha is None else alpha, assumed=alpha is None)
    return updates


def _fitted(target: nn.Module, tensors: LayerTensors, layer: str, where: str) -> tuple[Tensor, Tensor]:
    """A and B for a layer, as peft holds them. Raises ``CheckpointError`` if their shapes are others."""
    a, b = tensors.a, tensors.b
    if a is None or b is None:
        raise CheckpointError(f"{where} is wrong because {shown(layer)} lacks its A or its B; get it again")
    rank = a.shape[0] if a.ndim else 0
    wanted_a: tuple[int, ...]
    wanted_b: tuple[int, ...]
    if isinstance(target, nn.Conv2d):
        groups, ones, out = target.groups, (1, 1), target.out_channels
        wanted_a, wanted_b = (rank, target.in_channels, *target.kernel_size), (out, rank, *ones)
        if rank and groups > 1 and a.shape == wanted_a:
            if groups == out and b.shape == (1, rank, *ones):
                # OneTrainer's for depthwise convolutions: one channel, which is added to all.
                b = b.expand(wanted_b).contiguous()
            elif rank % groups == 0 and b.shape == (out, rank // groups, *ones):
                b = _ungrouped(b, groups)  # peft's
    else:
        assert isinstance(target, nn.Linear)
        wanted_a, wanted_b = (rank, target.in_features), (target.out_features, rank)
    if rank < 1 or a.shape != wanted_a or b.shape != wanted_b:
        shapes = [", ".join(["rank", *map(str, wanted_a[1:])]), ", ".join([str(wanted_b[0]), "rank"])]
        shapes[1] += "".join(f", {size}" for size in wanted_b[2:])
        raise CheckpointError(
            f"{where} is wrong because {shown(layer)} has A and B of {tuple(a.shape)} and {tuple(b.shape)}, "
            f"where ({shapes[0]}) and ({shapes[1]}) fit; give an adapter that was trained for this model"
        )
    return a, b


def _ungrouped(b: Tensor, groups: int) -> Tensor:
    """The weights of a convolution without groups, (out, rank, 1, 1), that does what one with groups does."""
    out, width = b.shape[:2]
    whole = b.new_zeros(out, width * groups, 1, 1)
    for group in range(groups):
        rows = slice(group * out // groups, (group + 1) * out // groups)
        whole[rows, group * width : (group + 1) * width] = b[rows]
    return whole


def _say_what_was_assumed(updates: Sequence[_Update], where: str) -> None:
    assumed = sum(update.assumed for update in updates)
    if assumed:
        which = "" if assumed == len(updates) else f" for {assumed} of its {len(updates)} layers"
        warnings.warn(
            f"{where} does not say its alpha{which}: neither an .alpha tensor, nor its header, nor an "
            "adapter_config.json does. Scale 1 is assumed there, as if alpha were the rank. If it was "
            "trained with another alpha, load it with a scale of alpha / rank",
            AssumedScaleWarning,
            stacklevel=3,
        )


def _adaptable(module: nn.Module) -> dict[str, nn.Module]:
    """Linear layers and convolutions by name, those that carry adapters under the name they had before."""
    wrapped = dict(_layers(module))
    inside = tuple(f"{name}." for name in wrapped)
    return {
        name: plain
        for name, layer in module.named_modules()
        if isinstance(plain := layer.base_layer if name in wrapped else layer, nn.Linear | nn.Conv2d)
        and not name.startswith(inside)
    }


class _Names:
    """The layers of a network by what files call them."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = set(names)
        # kohya's names have an underscore for every dot.
        self.flat = {name.replace(".", "_"): name for name in names}

    def find(self, layer: str) -> str | None:
        """The name in the network of a layer in a file."""
        # `TextEncoder` keeps the text model under `model.`.
        for spelling in (s for plain in _spellings(layer) for s in (plain, f"model.{plain}")):
            if spelling in self.names:
                return spelling
        bare = layer.removeprefix("text_model_")
        joined = (layer, bare, f"model_{layer}", f"model_{bare}")
        return next((self.flat[name] for name in joined if name in self.flat), None)


def _spellings(layer: str) -> tuple[str, ...]:
    """What a layer may be called in the network: transformers 5 dropped ``text_model.``, and diffusers once
    named the output layer ``to_out``."""
    bare = layer.removeprefix("text_model.")
    return layer, bare, f"text_model.{bare}", f"{layer}.0"


def _inject(module: nn.Module, updates: dict[str, _Update], adapter_name: str) -> None:
    """Wraps the layers and gives them their weights, in each layer's dtype and on its device."""
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
    )
    targets = _adaptable(module)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    with warnings.catch_warnings(), _without_groups([targets[name] for name in updates]):
        warnings.simplefilter("ignore")  # about adapters that are there already
        peft.inject_adapter_in_model(config, module, adapter_name, low_cpu_mem_usage=True)
    for parameter in trained:
        parameter.requires_grad_(True)  # peft froze them
    layers = dict(_layers(module))
    for name, update in updates.items():
        base = layers[name].base_layer.weight
        for matrices, value in ((layers[name].lora_A, update.a), (layers[name].lora_B, update.b)):
            weight = value.detach().to(device=base.device, dtype=base.dtype, copy=True)
            matrices[adapter_name].weight = nn.Parameter(weight, requires_grad=False)
        layers[name].train(module.training)
    enable_lora(module, True)
    set_lora(module, [adapter_name], [1.0])


@contextlib.contextmanager
def _without_groups(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Lets peft take grouped convolutions for plain ones: A and B are convolutions without groups.

    peft would give B the groups of the layer, for which the rank would have to be a multiple of them: 1536,
    where Stage C has 1536 depthwise channels.
    """
    grouped = {layer: layer.groups for layer in layers if isinstance(layer, nn.Conv2d)}
    try:
        for layer in grouped:
            layer.groups = 1
        yield
    finally:
        for layer, groups in grouped.items():
            layer.groups = groups


def _remove(module: nn.Module, names: Sequence[str]) -> None:
    for path, layer in list(_layers(module)):
        if set(names) & set(layer.active_adapters):
            left = [name for name in layer.active_adapters if name not in names]
            # As peft: where none that acted is left, the first of the others does.
            layer.set_adapter(left or [name for name in layer.lora_A if name not in names][:1])
        for name in names:
            layer.delete_adapter(name)
        if not layer.lora_A:
            _replace(module, path, layer.base_layer)
        else:
            _freeze(layer)
    for name in names:
        getattr(module, "peft_config", {}).pop(name, None)
    if not lora_names(module):
        unload_lora(module)


def _layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that carry adapters, by name. Told by what they have, so that peft need not be there."""
    for name, layer in module.named_modules():
        if hasattr(layer, "base_layer") and hasattr(layer, "lora_A"):
            yield name, layer


def _replace(module: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, layer)


def _freeze(layer: Any) -> None:
    """peft makes whatever it activates trainable."""
    for matrices in (layer.lora_A, layer.lora_B):
        matrices.requires_grad_(False)


def _fused(module: nn.Module) -> list[str]:
    return list(dict.fromkeys(name for _, layer in _layers(module) for name in layer.merged_adapters))


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UserError(
            'peft is not there, which adapters need; get it with: pip install "wuerstchen[lora]"'
        ) from error
    return peft


def _check_new_name(module: nn.Module, name: str) -> None:
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict, name):
        raise UserError(
            f"adapter_name {name!r} cannot be a name: it is empty, has a dot or is torch's; use another"
        )
    if name in lora_names(module):
        raise UserError(f"adapter_name {name!r} is taken; choose another, or call delete_lora first")
    _check_not_fused(module)


def _check_names(module: nn.Module, names: Sequence[str]) -> None:
    known = lora_names(module)
    for name in names:
        if name not in known:
            raise UserError(f"adapter {name!r} is not loaded; loaded are: {', '.join(known) or 'none'}")
    if len(set(names)) < len(names):
        raise UserError(f"adapters {', '.join(names)} repeat a name; give each once")


def _check_not_fused(module: nn.Module) -> None:
    fused = _fused(module)
    if fused:
        raise UserError(
            f"adapter {fused[0]!r} is fused into the weights, so adapters cannot be changed; "
            "call unfuse_lora first, or unload_lora to keep it so"
        )


def _check_fusible(module: nn.Module, names: Sequence[str]) -> None:
    for path, layer in _layers(module):
        for name in names:
            if name in layer.lora_A and getattr(layer.base_layer, "groups", 1) > 1:
                raise UserError(
                    f"adapter {name!r} acts on {path!r}, a convolution with groups, whose weights "
                    "cannot hold it; leave it unfused: it draws the same images"
                )


def _check_scale(what: str, value: object) -> None:
    if not is_finite_number(value):
        raise UserError(f"{what} must be a finite number; 1 is as trained")


def _check_finite_sum(layers: Sequence[tuple[Any, str]], scale: float | int) -> None:
    sums: dict[int, Tensor] = {}
    for layer, name in layers:
        weight = layer.base_layer.weight
        sums[id(layer)] = sums.get(id(layer), weight) + layer.get_delta_weight(name) * scale
        if not sums[id(layer)].isfinite().all():
            raise UserError(f"adapter {name!r} at scale {scale} makes weights that are not finite; use less")

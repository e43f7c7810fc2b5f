"""Low-rank adapters (LoRA, arXiv 2106.09685) for Stage C and the text encoder: load, mix, fuse, take out.

An adapter adds (alpha / rank) · B A to the matrix of a linear layer, with A of shape (rank, in) and B of
shape (out, rank). Files are of the kind that diffusers writes; the layers come from ``peft``, which
``pip install "wuerstchen[lora]"`` brings. Text keys and values that ``Prior.context`` computed before a
change belong to the old weights: compute them again.
"""

import json
import math
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from wuerstchen.checkpoints.native import write_tensors
from wuerstchen.checkpoints.weights import read_tensors_of
from wuerstchen.errors import CheckpointError, UserError

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
OLD_WEIGHT_NAME = "pytorch_lora_weights.bin"
METADATA = "lora_adapter_metadata"
"""Where diffusers keeps an adapter's configuration in the header of a safetensors file, as JSON."""

_TEXT_PREFIXES = ("text_encoder.", "lora_prior_te_", "lora_te_")
_PRIOR_PREFIXES = ("prior.", "unet.", "lora_prior_unet_", "lora_unet_")
_ENDING = re.compile(
    r"(?:\.lora_(?P<letter>[AB])(?:\.default)?\.weight"
    r"|(?:\.lora\.|_lora\.|\.lora_linear_layer\.|\.lora_)(?P<way>down|up)\.weight"
    r"|(?:_lora|\.lora)?\.(?P<alpha>alpha))$"
)


@dataclass(frozen=True)
class _Update:
    """What an adapter adds to one linear layer."""

    a: Tensor
    b: Tensor
    alpha: float

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

    ``source`` is a file, a folder with ``pytorch_lora_weights.safetensors`` or ``weight_name``, or the
    tensors themselves. Keys may be diffusers' (``prior.blocks.2.attention.to_q.lora_A.weight``), those of its
    older versions (``….lora.down.weight``, ``….processor.to_q_lora.down.weight``) or kohya's
    (``lora_prior_unet_blocks_2_attention_to_q.lora_down.weight`` with ``.alpha``). The rank follows from the
    shapes; alpha from ``.alpha`` keys or the file's metadata, and equals the rank where neither tells.

    Raises ``CheckpointError`` if the file is damaged or anything in it does not fit; nothing is changed then.
    Raises ``UserError`` for a name that is taken, while an adapter is fused, and if ``peft`` is missing.
    """
    tensors, metadata, where = _read(source, weight_name)
    _check_new_name(prior, adapter_name)
    if text_encoder is not None:
        _check_new_name(text_encoder, adapter_name)
    for_prior, for_text = _sorted_by_network(tensors, where)
    if for_text and text_encoder is None:
        raise CheckpointError(
            f"{where} is wrong here because it adapts the text encoder too ({next(iter(for_text))!r}); "
            "give text_encoder"
        )
    plans = [(prior, _plan(prior, for_prior, _part_of(metadata, "prior."), where))]
    if text_encoder is not None:
        plans.append(
            (text_encoder, _plan(text_encoder, for_text, _part_of(metadata, "text_encoder."), where))
        )
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
    Raises ``UserError`` for unknown or fused names and a scale that is not finite; nothing is changed then.
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


def save_lora(
    folder: Path | str,
    layers: Mapping[str, Tensor],
    *,
    text_encoder_layers: Mapping[str, Tensor] | None = None,
    weight_name: str = WEIGHT_NAME,
) -> Path:
    """Writes an adapter as diffusers does, for ``load_lora`` and for diffusers. Returns the file.

    ``layers`` are those of the prior without a prefix, as peft names them
    (``blocks.2.attention.to_q.lora_A.weight``); alpha is taken to equal the rank. Raises ``UserError`` for
    other keys, ``CheckpointError`` if the folder cannot be written.
    """
    named = {f"prior.{key}": tensor for key, tensor in layers.items()}
    named |= {f"text_encoder.{key}": tensor for key, tensor in (text_encoder_layers or {}).items()}
    if not named:
        raise UserError("no layers were given, so there is no adapter to save; give at least one")
    for key in named:
        if not re.search(r"[^.]\.lora_[AB]\.weight$", key):
            raise UserError(f"layer {key!r} cannot be saved: keys end in .lora_A.weight or .lora_B.weight")
    path = Path(folder) / weight_name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written ({error.strerror}); choose another folder"
        ) from error
    write_tensors(named, path, {"format": 1, "kind": "lora"})
    return path


def _read(
    source: Path | str | Mapping[str, Tensor], weight_name: str | None
) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """The tensors, the metadata, and what messages call the source."""
    if isinstance(source, Mapping):
        tensors, metadata, where = dict(source), {}, "the adapter"
    else:
        path = _file_in(Path(source), weight_name)
        tensors, metadata, where = read_tensors_of(path), _read_metadata(path), str(path)
    for key, tensor in tensors.items():
        usable = isinstance(tensor, Tensor) and tensor.layout is torch.strided and not tensor.is_meta
        if not isinstance(key, str) or not usable or not tensor.is_floating_point():
            raise CheckpointError(
                f"{where} is wrong because {key!r} is no tensor of floating numbers; get it again"
            )
        if not tensor.isfinite().all():
            raise CheckpointError(f"{where} is wrong because {key!r} is not finite; get it again")
    if not tensors:
        raise CheckpointError(f"{where} is wrong because it is empty; get it again")
    return tensors, metadata, where


def _file_in(path: Path, weight_name: str | None) -> Path:
    if not path.is_dir():
        if not path.is_file():
            raise CheckpointError(
                f"{path} is wrong because there is no such file or folder; download the adapter first"
            )
        return path
    names = [WEIGHT_NAME, OLD_WEIGHT_NAME] if weight_name is None else [weight_name]
    for name in names:
        if (path / name).is_file():
            return path / name
    raise CheckpointError(f"{path} holds no {names[0]}; name the file with weight_name")


def _read_metadata(path: Path) -> dict[str, Any]:
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:  # which has been read once, so it is whole
        text = (file.metadata() or {}).get(METADATA)
    if text is None:
        return {}
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is wrong because its {METADATA} is no JSON object; get it again")
    return content


def _part_of(metadata: dict[str, Any], prefix: str) -> dict[str, Any]:
    """One network's part; an adapter saved from the network alone has no prefixes, and is the prior's."""
    part = {key.removeprefix(prefix): v for key, v in metadata.items() if key.startswith(prefix)}
    bare = prefix == "prior." and not any("." in key for key in metadata)
    return metadata if bare else part


def _sorted_by_network(
    tensors: dict[str, Tensor], where: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
    """For the prior and the text encoder: by layer, its ``A``, ``B`` and ``alpha``."""
    for_prior: dict[str, dict[str, Tensor]] = {}
    for_text: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = _ENDING.search(key)
        if found is None:
            raise CheckpointError(
                f"{where} is wrong because {key!r} is no weight of a plain LoRA; other adapters are not read"
            )
        kind = found["letter"] or found["alpha"] or {"down": "A", "up": "B"}[found["way"]]
        layer = key[: found.start()].removeprefix("base_model.model.")
        layers, prefixes = for_prior, _PRIOR_PREFIXES
        if layer.startswith(_TEXT_PREFIXES):
            layers, prefixes = for_text, _TEXT_PREFIXES
        prefix = next((p for p in prefixes if layer.startswith(p)), "")
        layer = layer.removeprefix(prefix).replace(".processor.", ".")
        weights = layers.setdefault(layer, {})
        if kind in weights:
            raise CheckpointError(f"{where} is wrong because {layer!r} has {kind} twice; get it again")
        weights[kind] = tensor
    return for_prior, for_text


def _plan(
    module: nn.Module, found: dict[str, dict[str, Tensor]], metadata: dict[str, Any], where: str
) -> dict[str, _Update]:
    """What to add to which layer of ``module``. Raises ``CheckpointError`` unless everything fits."""
    linears = _linears(module)
    updates: dict[str, _Update] = {}
    for layer, weights in found.items():
        name = _find(layer, linears)
        if name is None:
            raise CheckpointError(
                f"{where} is wrong because {layer!r} is no linear layer of {type(module).__name__}; "
                "give an adapter that was trained for this model"
            )
        if name in updates:
            raise CheckpointError(f"{where} is wrong because {name!r} is in it twice; get it again")
        a, b = weights.get("A"), weights.get("B")
        if a is None or b is None:
            raise CheckpointError(f"{where} is wrong because {layer!r} lacks its A or its B; get it again")
        shapes = (tuple(a.shape), tuple(b.shape))
        rank = a.shape[0] if a.ndim else 0
        wanted = ((rank, linears[name].in_features), (linears[name].out_features, rank))
        if rank < 1 or shapes != wanted:
            raise CheckpointError(
                f"{where} is wrong because {layer!r} has A and B of {shapes[0]} and {shapes[1]}, where "
                f"(rank, {wanted[0][1]}) and ({wanted[1][0]}, rank) fit; "
                "give an adapter that was trained for this model"
            )
        alpha = _alpha(layer, rank, weights.get("alpha"), metadata, where)
        updates[name] = _Update(a=a, b=b, alpha=alpha)
    return updates


def _linears(module: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers by name, those that carry adapters already under the name they had before."""
    wrapped = dict(_layers(module))
    inside = tuple(f"{name}." for name in wrapped)
    return {
        name: plain
        for name, layer in module.named_modules()
        if isinstance(plain := layer.base_layer if name in wrapped else layer, nn.Linear)
        and not name.startswith(inside)
    }


def _find(layer: str, linears: Mapping[str, nn.Linear]) -> str | None:
    """The name in the network of a layer in a file."""
    # transformers 5 dropped `text_model.`; `TextEncoder` keeps the text model under `model.`; diffusers once
    # named the output layer `to_out`; and kohya's names have an underscore for every dot.
    bare = layer.removeprefix("text_model.")
    spellings = [layer, bare, f"text_model.{bare}", f"{layer}.0"]
    for name in (*spellings, *(f"model.{spelling}" for spelling in spellings)):
        if name in linears:
            return name
    flat = {name.replace(".", "_"): name for name in linears}
    bare = layer.removeprefix("text_model_")
    return next((flat[n] for n in (layer, bare, f"model_{layer}", f"model_{bare}") if n in flat), None)


def _alpha(layer: str, rank: int, stored: Tensor | None, metadata: dict[str, Any], where: str) -> float:
    """The alpha that goes with plain alpha / rank."""
    if stored is not None:
        value: Any = stored.item() if stored.numel() == 1 else None
    else:
        value = metadata.get("lora_alpha", rank)
        pattern = metadata.get("alpha_pattern") or {}
        if not isinstance(pattern, dict):
            raise CheckpointError(f"{where} is wrong because its alpha_pattern is no object; get it again")
        for key, special in pattern.items():
            # peft reads these as regular expressions; what files hold are names, whole or their ends.
            if f".{layer}".endswith("." + key.removeprefix("^")):
                value = special
    if not _is_finite(value):
        raise CheckpointError(f"{where} is wrong because alpha of {layer!r} is {value!r}; get it again")
    # Rank-stabilised adapters (arXiv 2312.03732) divide by the root of the rank.
    return value * math.sqrt(rank) if stored is None and metadata.get("use_rslora") is True else float(value)


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
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    with warnings.catch_warnings():
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


def _check_scale(what: str, value: object) -> None:
    if not _is_finite(value):
        raise UserError(f"{what} must be a finite number; 1 is as trained")


def _is_finite(value: object) -> bool:
    # Integers in JSON may be larger than any float.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max


def _check_finite_sum(layers: Sequence[tuple[Any, str]], scale: float | int) -> None:
    sums: dict[int, Tensor] = {}
    for layer, name in layers:
        weight = layer.base_layer.weight
        sums[id(layer)] = sums.get(id(layer), weight) + layer.get_delta_weight(name) * scale
        if not sums[id(layer)].isfinite().all():
            raise UserError(f"adapter {name!r} at scale {scale} makes weights that are not finite; use less")

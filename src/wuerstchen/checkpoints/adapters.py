"""Files of low-rank adapters (LoRA): those of diffusers, peft, kohya's scripts and OneTrainer.

An adapter adds (alpha / rank) · B A to the weight of a layer. Where alpha comes from, in this order:

- ``….alpha`` tensors (kohya, OneTrainer);
- ``lora_adapter_metadata`` in the header of a safetensors file (diffusers);
- ``adapter_config.json`` beside the file (peft).

Where none of them tells, alpha is taken to equal the rank, as other readers do.
"""

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wuerstchen.checkpoints.files import open_safetensors, parse_json, read_json
from wuerstchen.checkpoints.native import write_tensors
from wuerstchen.checkpoints.patterns import Patterns
from wuerstchen.checkpoints.torch_files import check_whole
from wuerstchen.checkpoints.weights import plain_names, read_tensors_of
from wuerstchen.errors import CheckpointError, UserError, shown

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
WEIGHT_NAMES = (WEIGHT_NAME, "adapter_model.safetensors", "pytorch_lora_weights.bin", "adapter_model.bin")
"""What diffusers and peft call an adapter's file in its folder; the first that is there is read."""
PEFT_CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"
"""Where diffusers keeps an adapter's configuration in the header of a safetensors file, as JSON."""

# The joined names are kohya's; OneTrainer once wrote dots after the same beginnings.
_PRIOR_PREFIXES = ("prior.", "unet.", "lora_prior_unet_", "lora_prior_unet.", "lora_unet_", "lora_unet.")
_TEXT_PREFIXES = ("text_encoder.", "lora_prior_te_", "lora_prior_te.", "lora_te_", "lora_te.")
_ENDING = re.compile(
    r"(?:\.lora_(?P<letter>[AB])(?:\.default)?\.weight"
    r"|(?:\.lora\.|_lora\.|\.lora_linear_layer\.|\.lora_)(?P<way>down|up)\.weight"
    r"|(?:_lora|\.lora)?\.(?P<alpha>alpha))$"
)
# Settings of peft with which A and B alone are not the whole adapter, and what it is called then.
_NOT_PLAIN = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow",
    "velora_config": "VeLoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "layer_replication": "LoRA with replicated layers",
    "lora_bias": "LoRA with biases",
    "modules_to_save": "LoRA with whole layers",
    "trainable_token_indices": "LoRA with trained tokens",
}
# Ways to start A and B that leave the base model's weights as they are. Others (pissa, olora, loftq) change
# them, so that A and B belong to weights that are not the model's.
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LayerTensors:
    """What a file holds for one layer; either matrix may be missing."""

    a: Tensor | None
    b: Tensor | None
    alpha: float | None
    """From an ``.alpha`` tensor."""


class AdapterConfig:
    """What a file says of the strength of one network's layers, in peft's words.

    Raises ``CheckpointError`` for what is no configuration of a plain LoRA.
    """

    def __init__(self, fields: Mapping[str, Any], where: str) -> None:
        self.fields = fields
        self.where = where
        kind = fields.get("peft_type", "LORA")
        start = fields.get("init_lora_weights", True)
        told = next((name for field, name in _NOT_PLAIN.items() if fields.get(field)), None)
        if kind not in ("LORA", None):
            told = shown(kind)
        elif isinstance(start, str) and start not in _PLAIN_STARTS:
            told = f"LoRA started by {shown(start)}, which changes the model's own weights"
        if told is not None:
            raise CheckpointError(
                f"{where} is wrong because it describes {told}, and only a plain LoRA is read; "
                "merge it into its model, or convert it, with peft"
            )
        self._patterns: dict[str, Patterns] = {}
        for field in ("rank_pattern", "alpha_pattern"):
            patterns = fields.get(field) or {}
            if not isinstance(patterns, dict):
                raise CheckpointError(f"{where} is wrong because its {field} is no object; get it again")
            self._patterns[field] = Patterns(list(patterns), where)

    def alpha(self, names: Sequence[str], rank: int) -> float | None:
        """The alpha that goes with plain alpha / rank for the layer of these names; None if it is not told.

        Raises ``CheckpointError`` where ``rank``, the tensors', is not the configured one.
        """
        told = self._value("rank_pattern", names, "r")
        if told is not None and told != rank:
            raise CheckpointError(
                f"{self.where} is wrong because it says rank {shown(told)} for {names[0]!r}, whose "
                f"tensors are of rank {rank}; get the adapter again, with its own configuration"
            )
        alpha = self._value("alpha_pattern", names, "lora_alpha")
        if alpha is None:
            return None
        if not is_finite_number(alpha):
            raise CheckpointError(
                f"{self.where} is wrong because alpha of {names[0]!r} is {shown(alpha)}; get it again"
            )
        # Rank-stabilised adapters (arXiv 2312.03732) divide by the root of the rank.
        return alpha * math.sqrt(rank) if self.fields.get("use_rslora") is True else float(alpha)

    def _value(self, field: str, names: Sequence[str], default: str) -> Any:
        key = self._patterns[field].first(names)
        return self.fields.get(default) if key is None else self.fields[field][key]


@dataclass(frozen=True, kw_only=True)
class AdapterFile:
    """The tensors of an adapter by network, and by layer as the file calls it without a prefix."""

    prior: dict[str, LayerTensors]
    text: dict[str, LayerTensors]
    prior_config: AdapterConfig | None
    text_config: AdapterConfig | None
    where: str
    """What messages call it."""


def read_adapter(source: Path | str | Mapping[str, Tensor], weight_name: str | None = None) -> AdapterFile:
    """Reads an adapter from a file, a folder, or tensors by name. Everything in it is finite.

    Raises ``CheckpointError`` if it is damaged or no plain LoRA.
    """
    if isinstance(source, Mapping):
        where = "the adapter"
        tensors = plain_names({str(key): tensor for key, tensor in source.items()}, where)
        fields: Mapping[str, Any] = {}
        told_in = where
    else:
        path = _file_in(Path(source), weight_name)
        tensors, where = read_tensors_of(path), str(path)
        fields, told_in = _configuration(path)
    if not tensors:
        raise CheckpointError(f"{where} is wrong because it is empty; get it again")
    for_prior, for_text = _by_layer(tensors, where)
    prior_fields, text_fields = _fields_of(fields)
    return AdapterFile(
        prior={layer: _layer(layer, found, where) for layer, found in for_prior.items()},
        text={layer: _layer(layer, found, where) for layer, found in for_text.items()},
        prior_config=AdapterConfig(prior_fields, told_in) if prior_fields else None,
        text_config=AdapterConfig(text_fields, told_in) if text_fields else None,
        where=where,
    )


def wanted_files(weight_name: str | None = None, subfolder: str | None = None) -> list[str]:
    """What to fetch of a repository on the hub, as patterns of names."""
    names = [*([weight_name] if weight_name else WEIGHT_NAMES), PEFT_CONFIG]
    return [name if subfolder is None else f"{subfolder}/{name}" for name in names]


def save_lora(
    folder: Path | str,
    layers: Mapping[str, Tensor],
    *,
    text_encoder_layers: Mapping[str, Tensor] | None = None,
    weight_name: str = WEIGHT_NAME,
    config: Mapping[str, Any] | None = None,
    text_encoder_config: Mapping[str, Any] | None = None,
) -> Path:
    """Writes an adapter as diffusers does, for ``load_lora`` and for diffusers. Returns the file.

    ``layers`` are those of the prior without a prefix, as peft names them
    (``blocks.2.attention.to_q.lora_A.weight``). ``config`` is peft's ``LoraConfig.to_dict()`` for them.
    Without it the file does not say alpha: readers take it to equal the rank. Raises ``UserError`` for other
    keys and a configuration that is no JSON, ``CheckpointError`` if the folder cannot be written.
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
    told = {f"prior.{key}": value for key, value in (config or {}).items()}
    told |= {f"text_encoder.{key}": value for key, value in (text_encoder_config or {}).items()}
    try:
        # peft keeps names of layers in sets.
        text = json.dumps(
            told, default=lambda value: sorted(value) if isinstance(value, set) else _no_json(value)
        )
    except (TypeError, ValueError) as error:
        raise UserError(
            f"The adapter's configuration cannot be saved: {error}. It must hold JSON's kinds of values. "
            "Give LoraConfig.to_dict()."
        ) from error
    write_tensors(named, path, {"format": 1, "kind": "lora"}, {METADATA: text} if told else None)
    return path


def _no_json(value: object) -> None:
    raise TypeError(f"a {type(value).__name__} is no JSON")


def is_finite_number(value: object) -> bool:
    # Integers may be larger than any float.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max


def _file_in(path: Path, weight_name: str | None) -> Path:
    if not path.is_dir():
        if not path.is_file():
            raise CheckpointError(
                f"{path} is wrong because there is no such file or folder; download the adapter first"
            )
        return path
    names = WEIGHT_NAMES if weight_name is None else (weight_name,)
    for name in names:
        if (path / name).is_file():
            return path / name
    others = _weights_in(path) if weight_name is None else []
    if len(others) == 1:
        return others[0]
    told = f"; it holds {len(others)} files of weights: name one of them" if others else ""
    raise CheckpointError(f"{path} holds no {names[0]}{told or '; name the file with weight_name'}")


def _weights_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.safetensors") if file.is_file())


def _configuration(path: Path) -> tuple[dict[str, Any], str]:
    """What a file, or peft's configuration beside it, says of the adapter, and where it says so."""
    if path.suffix == ".safetensors":
        with open_safetensors(path) as file:
            text = (file.metadata() or {}).get(METADATA)
        if text is not None:
            try:
                content = parse_json(text)
            except ValueError as error:
                raise CheckpointError(
                    f"{path} is wrong because its {METADATA} is no JSON object ({error}); get it again"
                ) from None
            if not isinstance(content, dict):
                raise CheckpointError(
                    f"{path} is wrong because its {METADATA} is no JSON object; get it again"
                )
            return content, str(path)
    beside = path.parent / PEFT_CONFIG
    # In a folder of many adapters it belongs to the one that peft wrote with it.
    belongs = path.stem == "adapter_model" or _weights_in(path.parent) == [path]
    return (read_json(beside), str(beside)) if beside.is_file() and belongs else ({}, str(path))


def _fields_of(fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The part for the prior and that for the text encoder; without prefixes all is the prior's."""
    if not any(key.startswith((*_PRIOR_PREFIXES, *_TEXT_PREFIXES)) for key in fields):
        return dict(fields), {}
    parts: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for key, value in fields.items():
        for part, prefixes in zip(parts, (("prior.", "unet."), ("text_encoder.",)), strict=True):
            prefix = next((p for p in prefixes if key.startswith(p)), None)
            if prefix is not None:
                part[key.removeprefix(prefix)] = value
    return parts


def _by_layer(
    tensors: Mapping[str, Tensor], where: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
    """For the prior and the text encoder: by layer, its ``A``, ``B`` and ``alpha``."""
    for_prior: dict[str, dict[str, Tensor]] = {}
    for_text: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = _ENDING.search(key) if isinstance(key, str) else None
        if found is None:
            raise CheckpointError(
                f"{where} is wrong because {shown(key)} is no weight of a plain LoRA; "
                "other adapters are not read"
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
            raise CheckpointError(f"{where} is wrong because {shown(layer)} has {kind} twice; get it again")
        weights[kind] = tensor if kind == "alpha" else _weight(key, tensor, where)
    return for_prior, for_text


def _weight(key: str, tensor: Tensor, where: str) -> Tensor:
    """The tensor in a dtype that can be computed with."""
    usable = isinstance(tensor, Tensor) and tensor.layout is torch.strided and not tensor.is_meta
    if not usable or not tensor.is_floating_point():
        raise CheckpointError(
            f"{where} is wrong because {shown(key)} is no tensor of floating numbers; get it again"
        )
    if tensor.device.type == "cpu":
        check_whole(tensor, f"{where} is wrong because {shown(key)}")
    if tensor.dtype.itemsize < 2:  # of eight bits and less: torch can convert them, if anything
        try:
            tensor = tensor.float()
        except RuntimeError:
            raise CheckpointError(
                f"{where} is wrong because {shown(key)} is stored as {tensor.dtype}, which cannot be read; "
                "get it in float16"
            ) from None
    if not tensor.isfinite().all():
        raise CheckpointError(f"{where} is wrong because {shown(key)} is not finite; get it again")
    return tensor


def _layer(layer: str, found: Mapping[str, Tensor], where: str) -> LayerTensors:
    a, b, stored = found.get("A"), found.get("B"), found.get("alpha")
    if stored is None:
        return LayerTensors(a, b, None)
    number = isinstance(stored, Tensor) and stored.numel() == 1 and not stored.is_meta
    value = stored.item() if number else None
    if not is_finite_number(value):
        raise CheckpointError(
            f"{where} is wrong because alpha of {shown(layer)} is {shown(value)}; get it again"
        )
    return LayerTensors(a, b, float(value))

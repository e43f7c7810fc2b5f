"""Files of low-rank adapters (LoRA): those of diffusers, peft, kohya's scripts and OneTrainer.

An adapter adds (alpha / rank) · B A to the weight of a layer. Where alpha comes from, in this order:

- ``….alpha`` tensors (kohya, OneTrainer);
- ``lora_adapter_metadata`` in the header of a safetensors file (diffusers);
- ``adapter_config.json`` next to the file (peft).

If none of them exists, alpha is assumed to equal the rank, as other readers do.
"""

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wuerstchen.checkpoints.adapter_metadata import AdapterMetadata
from wuerstchen.checkpoints.files import open_safetensors, parse_json, read_json
from wuerstchen.checkpoints.native import write_tensors
from wuerstchen.checkpoints.patterns import Patterns
from wuerstchen.checkpoints.torch_files import check_whole
from wuerstchen.checkpoints.weights import plain_names, read_tensors_of
from wuerstchen.errors import CheckpointError, UserError, shown

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
WEIGHT_NAMES = (WEIGHT_NAME, "adapter_model.safetensors", "pytorch_lora_weights.bin", "adapter_model.bin")
"""The names that diffusers and peft use for an adapter's file. The first that exists is read."""
PEFT_CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"
"""The header field in which diffusers stores an adapter's configuration as JSON."""

# Names with underscores are kohya's. OneTrainer once used the same prefixes with dots.
_PRIOR_PREFIXES = ("prior.", "unet.", "lora_prior_unet_", "lora_prior_unet.", "lora_unet_", "lora_unet.")
_TEXT_PREFIXES = ("text_encoder.", "lora_prior_te_", "lora_prior_te.", "lora_te_", "lora_te.")
_ENDING = re.compile(
    r"(?:\.lora_(?P<letter>[AB])(?:\.default)?\.weight"
    r"|(?:\.lora\.|_lora\.|\.lora_linear_layer\.|\.lora_)(?P<way>down|up)\.weight"
    r"|(?:_lora|\.lora)?\.(?P<alpha>alpha)"
    r"|\.(?P<magnitude>lora_magnitude_vector(?:\.default)?(?:\.weight)?|dora_scale))$"
)
TOKENS = "lora_tokens."
"""Prefix of the vectors of new words in our files. diffusers ignores keys that contain ``lora``."""
_TOKEN = re.compile(r"^(?:lora_tokens\.(?P<word>.+)|bundle_emb\.(?P<placeholder>.+)\.clip_g)$")
# peft settings of methods that are not supported, with their names for messages.
_NOT_PLAIN = {
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow",
    "velora_config": "VeLoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "layer_replication": "LoRA with replicated layers",
    "lora_bias": "LoRA with biases",
    "modules_to_save": "LoRA with fully trained layers",
    "trainable_token_indices": "LoRA with trained token embeddings",
}
# Initializations of A and B that do not change the weights of the base model. With others (pissa, olora,
# loftq) A and B belong to changed weights.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LayerTensors:
    """The tensors of one layer in a file. Either matrix may be missing."""

    a: Tensor | None
    """(rank, in), or (rank, in, height, width) for a convolution."""
    b: Tensor | None
    """(out, rank), or (out, rank, 1, 1) for a convolution."""
    alpha: float | None
    """From an ``.alpha`` tensor. None if the file has none: then the configuration says it."""
    magnitude: Tensor | None = None
    """DoRA's magnitude (arXiv 2402.09353), the norm of each output row, (out,). None for a plain LoRA."""


class AdapterConfig:
    """The configuration of an adapter for one network, in peft's format.

    Raises ``CheckpointError`` if it describes neither a LoRA nor a DoRA.
    """

    def __init__(self, fields: Mapping[str, Any], where: str) -> None:
        self.fields = fields
        self.where = where
        kind = fields.get("peft_type", "LORA")
        start = fields.get("init_lora_weights", True)
        method = next((name for field, name in _NOT_PLAIN.items() if fields.get(field)), None)
        if kind not in ("LORA", None):
            method = shown(kind)
        elif isinstance(start, str) and start not in _PLAIN_INITS:
            method = f"LoRA initialized with {shown(start)}, which changes the model's own weights"
        if method is not None:
            raise CheckpointError(
                f"{where}: this adapter is a {method}. Only LoRA and DoRA are supported. "
                "Merge it into its model, or convert it, with peft."
            )
        self._patterns: dict[str, Patterns] = {}
        for name in ("rank_pattern", "alpha_pattern"):
            patterns = fields.get(name) or {}
            if not isinstance(patterns, dict):
                raise CheckpointError(
                    f"{where}: {name} must be a JSON object, got {shown(patterns)}. Download it again."
                )
            self._patterns[name] = Patterns(list(patterns), where)

    @property
    def is_dora(self) -> bool:
        """Whether the adapter is a DoRA, whose layers have magnitudes."""
        return bool(self.fields.get("use_dora"))

    def alpha(self, names: Sequence[str], rank: int) -> float | None:
        """The alpha of a layer with these names, for the scale alpha / rank. None if it is not configured.

        Raises ``CheckpointError`` if ``rank``, that of the tensors, differs from the configured rank.
        """
        configured = self._value("rank_pattern", names, "r")
        if configured is not None and configured != rank:
            raise CheckpointError(
                f"{self.where}: the rank of {names[0]!r} is {shown(configured)}, but its tensors have rank "
                f"{rank}. Download the adapter again, with its own configuration."
            )
        alpha = self._value("alpha_pattern", names, "lora_alpha")
        if alpha is None:
            return None
        if not is_finite_number(alpha):
            raise CheckpointError(
                f"{self.where}: alpha of {names[0]!r} must be a finite number, "
                f"got {shown(alpha)}. Download it again."
            )
        # Rank-stabilized adapters (arXiv 2312.03732) divide by the square root of the rank.
        return alpha * math.sqrt(rank) if self.fields.get("use_rslora") is True else float(alpha)

    def _value(self, field: str, names: Sequence[str], default: str) -> Any:
        key = self._patterns[field].first(names)
        return self.fields.get(default) if key is None else self.fields[field][key]


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The tensors of an adapter, by network and by the layer's name without the file's prefix."""

    prior: dict[str, LayerTensors] = field(default_factory=dict)
    text: dict[str, LayerTensors] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)
    """The vectors (count, width) of new words, for the text encoder's input embeddings."""
    metadata: AdapterMetadata = field(default_factory=AdapterMetadata)
    prior_config: AdapterConfig | None = None
    """The configuration in the file, which has the alphas that ``prior`` lacks."""
    text_config: AdapterConfig | None = None
    where: str = "the adapter"
    """The file or other origin, for messages."""


def read_adapter(source: Path | str | Mapping[str, Tensor], weight_name: str | None = None) -> Adapter:
    """Reads an adapter from a file, a folder, or tensors by name, and checks that all values are finite.

    Raises ``CheckpointError`` if it is damaged, or neither a LoRA nor a DoRA.
    """
    if isinstance(source, Mapping):
        where = "the adapter"
        tensors = plain_names({str(key): tensor for key, tensor in source.items()}, where)
        fields: Mapping[str, Any] = {}
        header: Mapping[str, str] = {}
        config_place = where
    else:
        path = _file_in(Path(source), weight_name)
        tensors, where = read_tensors_of(path), str(path)
        header = _header(path)
        fields, config_place = _configuration(path, header)
    if not tensors:
        raise CheckpointError(f"{where} is empty. Download it again.")
    tokens = _tokens(tensors, where)
    for_prior, for_text = _by_layer({k: t for k, t in tensors.items() if not _is_token(k)}, where)
    prior_fields, text_fields = _fields_of(fields)
    return Adapter(
        prior={layer: _layer(layer, found, where) for layer, found in for_prior.items()},
        text={layer: _layer(layer, found, where) for layer, found in for_text.items()},
        tokens=tokens,
        metadata=AdapterMetadata.of_header(header),
        prior_config=AdapterConfig(prior_fields, config_place) if prior_fields else None,
        text_config=AdapterConfig(text_fields, config_place) if text_fields else None,
        where=where,
    )


def files_of(source: Path) -> list[Path]:
    """The files that ``read_adapter`` reads. Raises ``CheckpointError`` if there are none."""
    path = _file_in(source, None)
    return [file for file in (path, path.parent / PEFT_CONFIG) if file.is_file()]


def is_adapter(path: Path) -> bool:
    """Whether a file is an adapter, or a folder has a file with one of the usual names of adapters."""
    if path.is_dir():
        return any((path / name).is_file() for name in WEIGHT_NAMES)
    try:
        with open_safetensors(path) as file:
            return any(_ENDING.search(key) for key in file.keys())  # noqa: SIM118 (no mapping)
    except CheckpointError:
        return False


def wanted_files(weight_name: str | None = None, subfolder: str | None = None) -> list[str]:
    """Patterns of the file names to download from a repository on the hub."""
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
    """Writes an adapter in diffusers' format and returns the file.

    ``layers`` are the tensors for the prior under peft's names without a prefix
    (``blocks.2.attention.to_q.lora_A.weight``). ``config`` is peft's ``LoraConfig.to_dict()`` for them.
    Without it, the file does not store alpha, and readers assume that it equals the rank. Raises
    ``UserError`` for other keys and for a configuration that JSON cannot store, ``CheckpointError`` if the
    folder cannot be written.
    """
    named = {f"prior.{key}": tensor for key, tensor in layers.items()}
    named |= {f"text_encoder.{key}": tensor for key, tensor in (text_encoder_layers or {}).items()}
    if not named:
        raise UserError("there are no layers to save. Pass at least one.")
    for key in named:
        if not re.search(r"[^.]\.(lora_[AB]\.weight|lora_magnitude_vector)$", key):
            raise UserError(
                f"layer {key!r} cannot be saved. Keys must end in .lora_A.weight, .lora_B.weight or, for "
                "DoRA, .lora_magnitude_vector."
            )
    path = Path(folder) / weight_name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written ({error.strerror}). Choose another folder."
        ) from error
    metadata = {f"prior.{key}": value for key, value in (config or {}).items()}
    metadata |= {f"text_encoder.{key}": value for key, value in (text_encoder_config or {}).items()}
    text = json_of_config(metadata)
    write_tensors(named, path, {"format": 1, "kind": "lora"}, {METADATA: text} if metadata else None)
    return path


def json_of_config(config: Mapping[str, Any]) -> str:
    """A configuration of peft as JSON. Raises ``UserError`` if JSON cannot store it."""
    try:
        # peft stores names of layers in sets.
        return json.dumps(
            config, default=lambda value: sorted(value) if isinstance(value, set) else _no_json(value)
        )
    except (TypeError, ValueError) as error:
        raise UserError(
            f"the adapter's configuration cannot be saved: {error}. It must contain "
            "only JSON values. Pass LoraConfig.to_dict()."
        ) from error


def _no_json(value: object) -> None:
    raise TypeError(f"JSON cannot store a {type(value).__name__}")


def is_finite_number(value: object) -> bool:
    # An integer may be larger than any float.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max


def _file_in(path: Path, weight_name: str | None) -> Path:
    if not path.is_dir():
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist. Download the adapter first.")
        return path
    names = WEIGHT_NAMES if weight_name is None else (weight_name,)
    for name in names:
        if (path / name).is_file():
            return path / name
    others = _weights_in(path) if weight_name is None else []
    if len(others) == 1:
        return others[0]
    fix = "Give the path of the file, or weight_name."
    if others:
        fix = f"It contains {len(others)} weight files. Give the path of one, or weight_name."
    raise CheckpointError(f"{path} contains no {names[0]}. {fix}")


def _weights_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.safetensors") if file.is_file())


def _header(path: Path) -> dict[str, str]:
    if path.suffix != ".safetensors":
        return {}
    with open_safetensors(path) as file:
        return dict(file.metadata() or {})


def _configuration(path: Path, header: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """The configuration in a file's header, or in peft's ``adapter_config.json`` next to it, and where it was
    found."""
    text = header.get(METADATA)
    if text is not None:
        try:
            content = parse_json(text)
        except ValueError as error:
            raise CheckpointError(
                f"{path}: {METADATA} is not a JSON object ({error}). Download it again."
            ) from None
        if not isinstance(content, dict):
            raise CheckpointError(f"{path}: {METADATA} is not a JSON object. Download it again.")
        return content, str(path)
    config_file = path.parent / PEFT_CONFIG
    # In a folder with several adapters, it belongs to the one that peft wrote.
    belongs = path.stem == "adapter_model" or _weights_in(path.parent) == [path]
    return (
        (read_json(config_file), str(config_file)) if config_file.is_file() and belongs else ({}, str(path))
    )


def _fields_of(fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields for the prior and those for the text encoder. Without prefixes, all are for the prior."""
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
    """The tensors of each layer of the prior, and of each layer of the text encoder, by kind."""
    for_prior: dict[str, dict[str, Tensor]] = {}
    for_text: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = _ENDING.search(key) if isinstance(key, str) else None
        if found is None:
            raise CheckpointError(
                f"{where}: {shown(key)} is not a weight of a LoRA. Other adapters are not supported."
            )
        kind = "magnitude" if found["magnitude"] else found["letter"] or found["alpha"]
        kind = kind or {"down": "A", "up": "B"}[found["way"]]
        layer = key[: found.start()].removeprefix("base_model.model.")
        layers, prefixes = for_prior, _PRIOR_PREFIXES
        if layer.startswith(_TEXT_PREFIXES):
            layers, prefixes = for_text, _TEXT_PREFIXES
        prefix = next((p for p in prefixes if layer.startswith(p)), "")
        layer = layer.removeprefix(prefix).replace(".processor.", ".")
        weights = layers.setdefault(layer, {})
        if kind in weights:
            raise CheckpointError(f"{where}: {shown(layer)} has {kind} twice. Download it again.")
        weights[kind] = tensor if kind == "alpha" else _weight(key, tensor, where)
        if found["magnitude"] == "dora_scale":
            _check_axis(key, tensor, where)
    return for_prior, for_text


def _check_axis(key: str, scale: Tensor, where: str) -> None:
    """LyCORIS and OneTrainer have a variant of DoRA that scales inputs, with a scale of shape (1, in)."""
    if scale.ndim > 1 and scale.shape[0] == 1 and scale.numel() > 1:
        raise CheckpointError(
            f"{where} is a DoRA that scales the inputs of layers: {shown(key)} has shape "
            f"{tuple(scale.shape)}. Only scales of outputs, as in the paper, are supported. Train with "
            "OneTrainer's option to norm the output axis, or without DoRA."
        )


def _is_token(key: object) -> bool:
    return isinstance(key, str) and _TOKEN.match(key) is not None


def _tokens(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The vectors of new words, each (count, width)."""
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if isinstance(key, str) and key.startswith("bundle_emb.") and key.endswith("_out"):
            raise CheckpointError(
                f"{where} has an output embedding of a new word: {shown(key)}. Only input embeddings are "
                "supported. Train without OneTrainer's option for output embeddings."
            )
        match = _TOKEN.match(key) if isinstance(key, str) else None
        if match is None:
            continue
        word = match["word"] or match["placeholder"]
        vectors = _weight(key, tensor, where)
        if vectors.ndim != 2 or not vectors.numel() or word in found:
            raise CheckpointError(
                f"{where}: {shown(key)} must have one matrix of shape (count, width), got "
                f"{tuple(vectors.shape)}. Download it again."
            )
        found[word] = vectors
    return found


def _weight(key: str, tensor: Tensor, where: str) -> Tensor:
    """The tensor in a dtype that supports arithmetic."""
    usable = isinstance(tensor, Tensor) and tensor.layout is torch.strided and not tensor.is_meta
    if not usable or not tensor.is_floating_point():
        raise CheckpointError(f"{where}: {shown(key)} is not a floating-point tensor. Download it again.")
    if tensor.device.type == "cpu":
        check_whole(tensor, f"{where}: {shown(key)}")
    if tensor.dtype.itemsize < 2:  # dtypes of at most eight bits: torch can only convert them
        try:
            tensor = tensor.float()
        except RuntimeError:
            raise CheckpointError(
                f"{where}: the dtype {tensor.dtype} of {shown(key)} is not supported. Use a float16 file."
            ) from None
    if not tensor.isfinite().all():
        raise CheckpointError(f"{where}: {shown(key)} contains NaN or infinity. Download it again.")
    return tensor


def _layer(layer: str, found: Mapping[str, Tensor], where: str) -> LayerTensors:
    a, b, stored = found.get("A"), found.get("B"), found.get("alpha")
    magnitude = found["magnitude"].flatten() if "magnitude" in found else None
    if stored is None:
        return LayerTensors(a, b, None, magnitude)
    number = isinstance(stored, Tensor) and stored.numel() == 1 and not stored.is_meta
    value = stored.item() if number else None
    if not is_finite_number(value):
        raise CheckpointError(
            f"{where}: alpha of {shown(layer)} must be a finite number, got "
            f"{shown(value)}. Download it again."
        )
    return LayerTensors(a, b, float(value), magnitude)

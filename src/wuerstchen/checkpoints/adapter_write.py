"""Writes adapters in the forms that other programs read: diffusers', kohya's and peft's.

| form | matrices | alpha | DoRA's magnitude |
|---|---|---|---|
| diffusers | ``prior.LAYER.lora_A.weight`` and ``lora_B`` | in the header | ``.lora_magnitude_vector`` |
| kohya | ``lora_prior_unet_LAYER.lora_down.weight`` and ``lora_up`` | ``.alpha`` | ``.dora_scale`` |
| peft | ``base_model.model.LAYER.lora_A.weight`` and ``lora_B`` | ``adapter_config.json`` | as diffusers |
"""

import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wuerstchen.checkpoints.adapter_metadata import AdapterMetadata
from wuerstchen.checkpoints.adapters import (
    METADATA,
    PEFT_CONFIG,
    TOKENS,
    WEIGHT_NAME,
    WEIGHT_NAMES,
    Adapter,
    LayerTensors,
    json_of_config,
)
from wuerstchen.checkpoints.files import write_json, write_safetensors
from wuerstchen.errors import CheckpointError, UserError, UserNotice

FORMS = ("diffusers", "kohya", "peft")
# Parts of layers' names that contain an underscore. kohya's names have no dots.
_WORDS = re.compile(
    r"(text_model|text_blocks|self_attn|kv_mapper|cond_mapper|to_q|to_k|to_v|to_out|q_proj|k_proj|v_proj|"
    r"out_proj|[^_]+)(?:_|$)"
)


def write_adapter(
    path: Path | str,
    adapter: Adapter,
    metadata: AdapterMetadata | None = None,
    *,
    form: str = "diffusers",
    dtype: torch.dtype | None = None,
) -> Path:
    """Writes an adapter to the safetensors file ``path``, atomically, and returns the path.

    ``metadata`` defaults to the adapter's own. ``dtype`` converts the matrices, for example to float16.
    Missing folders are created. The form "peft" also writes ``adapter_config.json`` next to the file. Vectors
    of new words are stored as ``bundle_emb.WORD.clip_g`` (OneTrainer's name) in kohya's form, and as
    ``lora_tokens.WORD`` in the others, which diffusers and peft ignore.

    Raises ``UserError`` for another form, an adapter without layers, or a layer without matrices or with
    values that are not finite, and ``CheckpointError`` if the file cannot be written.
    """
    if form not in FORMS:
        raise UserError(f"form must be one of {', '.join(FORMS)}, got {form!r}. Use diffusers.")
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path} must end in .safetensors. Adapters are stored as safetensors. Rename it.")
    prior = _layers(adapter.prior, adapter.prior_config)
    text = _layers(adapter.text, adapter.text_config)
    if not prior and not text and not adapter.tokens:
        raise UserError("the adapter has no layers, so there is nothing to write. Train or load one first.")
    metadata = adapter.metadata if metadata is None else metadata
    header = metadata.as_header()
    sidecar: dict[str, Any] | None = None
    if form == "kohya":
        tensors = _kohya(prior, "lora_prior_unet_") | _kohya(text, "lora_prior_te_")
        tensors |= {f"bundle_emb.{word}.clip_g": vectors for word, vectors in adapter.tokens.items()}
        header |= _network_of(prior or text)
    else:
        prior, text = _with_dots(_without_depthwise(prior)), _with_dots(text)
        tensors = {f"{TOKENS}{word}": vectors for word, vectors in adapter.tokens.items()}
        if form == "peft":
            if text or not prior:
                raise UserError(
                    "the form peft stores adapters of one network, and this one changes "
                    f"{'two' if prior else 'the text encoder'}. Use the form diffusers or kohya."
                )
            tensors |= _peft(prior, "base_model.model.")
            sidecar = config_of(prior, base_model=metadata.base_model)
        else:
            tensors = _peft(prior, "prior.") | _peft(text, "text_encoder.") | tensors
            config = {f"prior.{k}": v for k, v in config_of(prior).items()} if prior else {}
            config |= {f"text_encoder.{k}": v for k, v in config_of(text).items()} if text else {}
            header |= {METADATA: json_of_config(config)} if config else {}
    _write(path, tensors, header, sidecar, dtype)
    return path


def _write(
    path: Path,
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str],
    sidecar: Mapping[str, Any] | None,
    dtype: torch.dtype | None,
) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if sidecar is not None:
            write_json(path.parent / PEFT_CONFIG, sidecar)
    except OSError as error:
        raise CheckpointError(
            f"{path.parent} cannot be written ({error.strerror}). Choose another folder."
        ) from error
    # Separate copies: safetensors refuses tensors that share memory.
    wanted = {
        key: tensor.detach().to("cpu", tensor.dtype if key.endswith(".alpha") else dtype, copy=True)
        for key, tensor in tensors.items()
    }
    for key, tensor in wanted.items():
        if not tensor.isfinite().all():
            raise UserError(
                f"{key!r} contains NaN or infinity, so the adapter cannot be written. Train again with a "
                "lower learning rate, or store it as float32."
            )
    write_safetensors(wanted, path, header)


def file_name(form: str) -> str:
    """The name under which programs look for an adapter of a form in a folder."""
    return WEIGHT_NAMES[1] if form == "peft" else WEIGHT_NAME


def config_of(layers: Mapping[str, LayerTensors], base_model: str = "") -> dict[str, Any]:
    """peft's configuration of an adapter: rank, alpha and targets, with the layers that differ."""
    ranks = {name: rank_of(layer) for name, layer in layers.items()}
    alphas = {name: float(ranks[name] if v.alpha is None else v.alpha) for name, v in layers.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    dora = {layer.magnitude is not None for layer in layers.values()}
    if len(dora) > 1:
        raise UserError(
            "some layers of the adapter have a DoRA magnitude and others have none, which no program can "
            "load. Train all of them with or without DoRA."
        )
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model or None,
        "r": rank,
        "lora_alpha": _whole(alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": dora == {True},
        "use_rslora": False,
        "inference_mode": True,
        "target_modules": sorted(layers),
        "rank_pattern": {f"^{re.escape(n)}": r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(n)}": _whole(a) for n, a in alphas.items() if a != alpha},
    }


def rank_of(layer: LayerTensors) -> int:
    """The rank of a layer's matrices."""
    assert layer.a is not None
    return layer.a.shape[0]


def dotted_name(name: str) -> str:
    """The name of a layer with dots, from kohya's name with underscores."""
    return name if "." in name else ".".join(_WORDS.findall(name))


def _whole(number: float) -> float | int:
    return int(number) if number.is_integer() else number


def _layers(layers: Mapping[str, LayerTensors], config: Any) -> dict[str, LayerTensors]:
    """The layers, each with its alpha, after a check that both matrices are there."""
    found = {}
    for name, layer in layers.items():
        if layer.a is None or layer.b is None:
            raise UserError(f"{name!r} has no A or no B, so the adapter cannot be written. Load it again.")
        if layer.a.shape[2:] not in ((), (1, 1)) and layer.b.shape[:2] not in (
            (1, rank_of(layer)),  # OneTrainer's
            (layer.b.shape[0], 1),  # peft's, with a rank that is a multiple of the groups
        ):
            raise UserError(
                f"the adapter of {name!r}, a depthwise convolution, cannot be written so that other programs "
                "load it. Train the linear layers and the 1×1 convolutions only."
            )
        alpha = layer.alpha
        if alpha is None and config is not None:
            alpha = config.alpha([name, dotted_name(name)], rank_of(layer))
        found[name] = replace(layer, alpha=float(rank_of(layer)) if alpha is None else alpha)
    return found


def _with_dots(layers: Mapping[str, LayerTensors]) -> dict[str, LayerTensors]:
    return {dotted_name(name): layer for name, layer in layers.items()}


def _without_depthwise(layers: Mapping[str, LayerTensors]) -> dict[str, LayerTensors]:
    """Leaves out OneTrainer's adapters of depthwise convolutions, with a notice.

    Their B has one output channel, which is added to all channels. The layer norm that follows removes it
    again, and peft cannot store it.
    """
    idle = [name for name, layer in layers.items() if is_added_to_all_channels(layer)]
    if idle:
        warnings.warn(
            f"the adapters of {len(idle)} depthwise convolutions are left out. They add the same value to "
            "all channels, which the layer norm after them removes. Images stay the same.",
            UserNotice,
            stacklevel=3,
        )
    return {name: layer for name, layer in layers.items() if name not in idle}


def is_added_to_all_channels(layer: LayerTensors) -> bool:
    """Whether a layer's B has a single output channel, as OneTrainer's have for depthwise convolutions."""
    assert layer.a is not None
    assert layer.b is not None
    return layer.b.ndim == 4 and layer.b.shape[0] == 1 and layer.a.shape[2:] != (1, 1)


def _peft(layers: Mapping[str, LayerTensors], prefix: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, layer in layers.items():
        assert layer.a is not None
        assert layer.b is not None
        found[f"{prefix}{name}.lora_A.weight"] = layer.a
        found[f"{prefix}{name}.lora_B.weight"] = layer.b
        if layer.magnitude is not None:
            shape = (1, -1, 1, 1) if layer.a.ndim == 4 else (-1,)
            found[f"{prefix}{name}.lora_magnitude_vector"] = layer.magnitude.reshape(shape)
    return found


def _kohya(layers: Mapping[str, LayerTensors], prefix: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, layer in layers.items():
        assert layer.a is not None
        assert layer.b is not None
        base = f"{prefix}{name.replace('.', '_')}"
        found[f"{base}.lora_down.weight"] = layer.a
        found[f"{base}.lora_up.weight"] = layer.b
        found[f"{base}.alpha"] = torch.tensor(layer.alpha, dtype=torch.float32, device="cpu")
        if layer.magnitude is not None:
            found[f"{base}.dora_scale"] = layer.magnitude.reshape(-1, *[1] * (layer.a.ndim - 1))
    return found


def _network_of(layers: Mapping[str, LayerTensors]) -> dict[str, str]:
    """kohya's header fields with the most common rank and alpha."""
    if not layers:
        return {}
    config = config_of(layers)
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config["r"]),
        "ss_network_alpha": str(config["lora_alpha"]),
    }

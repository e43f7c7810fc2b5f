"""The options that diffusers' loaders take: what each means here, or why it is refused."""

from collections.abc import Mapping
from typing import Any

import torch

from wuerstchen.checkpoints.diffusers import DECODER_PARTS, PRIOR_PARTS, Dtypes
from wuerstchen.device import checked_device
from wuerstchen.errors import UserError

NETWORKS = ("prior", "decoder", "vqgan", "text_encoder")
_COMPONENTS = {*PRIOR_PARTS, *DECODER_PARTS}
# Whatever they are, the result is the same.
_HARMLESS = {
    "low_cpu_mem_usage",  # weights are never held twice
    "offload_state_dict",
    "offload_folder",  # nothing is ever moved to the disk
    "trust_remote_code",  # no code that comes with a model is ever run
    "disable_mmap",
    "resume_download",
    "output_loading_info",  # which diffusers' pipelines do not give either
    "user_agent",
}
# What is refused unless it is left out, None or False, and why.
_REFUSED = {
    "proxies": "The hub's client takes its proxy from the environment. Set HTTPS_PROXY",
    "mirror": "The hub's client takes the address of a mirror from the environment. Set HF_ENDPOINT",
    "custom_pipeline": "Code of other pipelines is never fetched or run. Leave it out",
    "custom_revision": "Code of other pipelines is never fetched or run. Leave it out",
    "quantization_config": "Networks are not quantized while they are loaded. Use torch_dtype=torch.float16",
    "provider": "ONNX is not read. Leave it out",
    "sess_options": "ONNX is not read. Leave it out",
    "provider_options": "ONNX is not read. Leave it out",
    "use_onnx": "ONNX is not read. Leave it out",
    "from_flax": "Flax weights are not read. Leave it out",
    "use_flashpack": "FlashPack is not read. Leave it out",
    "dduf_file": "DDUF files are not read. Give the pipeline's folder",
    "unet_config": "It belongs to adapters of SDXL. Leave it out",
    "enable_pag": "There is no perturbed-attention guidance for Würstchen. Leave it out",
}


def drop_options(settings: dict[str, Any]) -> None:
    """Takes options out of ``settings`` that change nothing. Raises ``UserError`` for what cannot be done."""
    for name in _HARMLESS & settings.keys():
        del settings[name]
    for name in _REFUSED.keys() & settings.keys():
        value = settings.pop(name)
        if value is not None and value is not False and value != {}:
            raise UserError(f"{name} cannot be used. {_REFUSED[name]}.")


def checked_dtypes(name: str, value: Any, prefix: str = "") -> Dtypes:
    """What ``torch_dtype`` says of the networks of a pipeline, whose names may have a ``prefix`` there.

    A dtype, "auto" for the one that is stored, or a dict of these by component with ``default`` for the
    others, which are float32 without it. Raises ``TypeError`` or ``UserError``.
    """
    if not isinstance(value, Mapping):
        return _checked_dtype(name, value)
    known = {*_COMPONENTS, *(f"prior_{part}" for part in PRIOR_PARTS)}
    if unknown := [str(part)[:80] for part in value if part not in known | {"default"}]:
        raise UserError(
            f"{name} names {unknown[0]!r}. The networks are {', '.join(NETWORKS)}. Use these, or 'default'."
        )
    default = value.get("default")
    return {
        part: _checked_dtype(name, value.get(f"{prefix}{part}", value.get(part, default)))
        for part in NETWORKS
    }


def _checked_dtype(name: str, value: Any) -> torch.dtype | None:
    if isinstance(value, str) and value == "auto":
        return None
    dtype = torch.float32 if value is None else value
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(
            f"'{name}' must be a floating torch.dtype, 'auto', or a dict of them, but got {value!r}; "
            "torch.float16 is one"
        )
    return dtype


def checked_device_map(device_map: Any, max_memory: Any) -> torch.device | None:
    """Where ``device_map`` puts a pipeline, all of it; None for the CPU, where it is loaded.

    "balanced" is the first accelerator. Raises ``UserError`` for what would split the pipeline.
    """
    if device_map is None:
        return None  # without it diffusers does not look at max_memory either
    if isinstance(device_map, Mapping) and list(device_map) == [""]:
        device_map = device_map[""]
    if max_memory:
        raise UserError(
            "max_memory cannot be used with device_map. Components are not split between devices. Leave it "
            "out, and call enable_model_cpu_offload() if the GPU is too small."
        )
    if isinstance(device_map, Mapping) or device_map in ("auto", "balanced_low_0", "sequential"):
        raise UserError(
            f"device_map={str(device_map)[:80]!r} cannot be used. Components are not split between devices. "
            "Use device_map='balanced' for the first GPU, or a device such as 'cuda:1'."
        )
    if not isinstance(device_map, str | int | torch.device):
        raise UserError(
            f"device_map is a {type(device_map).__name__}. It must be 'balanced' or a device. Use 'cuda'."
        )
    if device_map != "balanced":
        return checked_device(device_map)
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    raise UserError(
        "device_map='balanced' cannot be used. There is no GPU. Leave it out, or use device_map='cpu'."
    )

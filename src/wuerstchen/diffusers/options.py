"""Options of diffusers' loaders: their meaning here, or why they are refused."""

from collections.abc import Mapping
from typing import Any

import torch

from wuerstchen.checkpoints.diffusers import DECODER_PARTS, PRIOR_PARTS, Dtypes
from wuerstchen.device import checked_device
from wuerstchen.errors import UserError

NETWORKS = ("prior", "decoder", "vqgan", "text_encoder")
_COMPONENTS = {*PRIOR_PARTS, *DECODER_PARTS}
# These do not change the result.
_HARMLESS = {
    "low_cpu_mem_usage",  # weights are never in memory twice
    "offload_state_dict",
    "offload_folder",  # nothing is offloaded to disk
    "trust_remote_code",  # no code from a model is ever run
    "disable_mmap",
    "resume_download",
    "output_loading_info",  # diffusers' pipelines return none either
    "user_agent",
}
# These are refused unless they are None or False.
_REFUSED = {
    "proxies": "The hub's client reads proxies from the environment. Set HTTPS_PROXY",
    "mirror": "The hub's client reads the mirror from the environment. Set HF_ENDPOINT",
    "custom_pipeline": "Code of other pipelines is never fetched or run. Remove it",
    "custom_revision": "Code of other pipelines is never fetched or run. Remove it",
    "quantization_config": "Networks are not quantized when loaded. Use torch_dtype=torch.float16",
    "provider": "ONNX is not read. Remove it",
    "sess_options": "ONNX is not read. Remove it",
    "provider_options": "ONNX is not read. Remove it",
    "use_onnx": "ONNX is not read. Remove it",
    "from_flax": "Flax weights are not read. Remove it",
    "use_flashpack": "FlashPack is not read. Remove it",
    "dduf_file": "DDUF files are not read. Pass the pipeline's folder",
    "unet_config": "It is for adapters of SDXL. Remove it",
    "enable_pag": "There is no perturbed-attention guidance for Würstchen. Remove it",
}


def drop_options(settings: dict[str, Any]) -> None:
    """Removes options without effect from ``settings``. Raises ``UserError`` for unsupported ones."""
    for name in _HARMLESS & settings.keys():
        del settings[name]
    for name in _REFUSED.keys() & settings.keys():
        value = settings.pop(name)
        if value is not None and value is not False and value != {}:
            raise UserError(f"{name} is not supported. {_REFUSED[name]}.")


def checked_dtypes(name: str, value: Any, prefix: str = "") -> Dtypes:
    """The dtypes of a pipeline's networks from ``torch_dtype``, in which names may have a ``prefix``.

    ``value`` is a dtype, "auto" for the stored dtype, or a dict of these by component, with ``default`` for
    the others (float32 without it). Raises ``TypeError`` or ``UserError``.
    """
    if not isinstance(value, Mapping):
        return _checked_dtype(name, value)
    known = {*_COMPONENTS, *(f"prior_{part}" for part in PRIOR_PARTS)}
    if unknown := [str(part)[:80] for part in value if part not in known | {"default"}]:
        raise UserError(
            f"{name} has an unknown network: {unknown[0]!r}. The networks are "
            f"{', '.join(NETWORKS)}. Use these, "
            "or 'default'."
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
            f"'{name}' must be a floating torch.dtype, 'auto', or a dict of them, got {value!r}. "
            "Use torch.float16, for example."
        )
    return dtype


def checked_device_map(device_map: Any, max_memory: Any) -> torch.device | None:
    """The device of the whole pipeline from ``device_map``; None for the CPU.

    "balanced" is the first accelerator. Raises ``UserError`` for maps that would split the pipeline.
    """
    if device_map is None:
        return None  # without it, diffusers ignores max_memory too
    if isinstance(device_map, Mapping) and list(device_map) == [""]:
        device_map = device_map[""]
    if max_memory:
        raise UserError(
            "max_memory is not supported with device_map. Components are not split between devices. Remove "
            "it, and call enable_model_cpu_offload() if the GPU is too small."
        )
    if isinstance(device_map, Mapping) or device_map in ("auto", "balanced_low_0", "sequential"):
        raise UserError(
            f"device_map={str(device_map)[:80]!r} is not supported. Components are not split between "
            "devices. Use device_map='balanced' for the first GPU, or a device such as 'cuda:1'."
        )
    if not isinstance(device_map, str | int | torch.device):
        raise UserError(
            f"device_map must be 'balanced' or a device, got a {type(device_map).__name__}. Use 'cuda'."
        )
    if device_map != "balanced":
        return checked_device(device_map)
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    raise UserError(
        "device_map='balanced' needs a GPU, and there is none. Remove it, or use device_map='cpu'."
    )

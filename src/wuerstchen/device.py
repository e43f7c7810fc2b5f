"""Devices: choice, default precision, support for Triton, and transfers."""

import functools
import importlib.util
from typing import Literal

import torch
from torch import Tensor

from wuerstchen.errors import UserError

Precision = Literal["float32", "bfloat16", "float16"]

HAS_TRITON = torch.version.cuda is not None and importlib.util.find_spec("triton") is not None


@functools.cache
def runs_triton(device: torch.device) -> bool:
    """Whether Triton is installed and supports the GPU ``device``."""
    return HAS_TRITON and torch.cuda.get_device_capability(device) >= (8, 0)


def default_device(device: str | torch.device | None = None) -> torch.device:
    """The given device, or the first available: CUDA, Apple's MPS, the CPU."""
    if device is not None:
        found = checked_device(device)
        if found.type == "meta":
            raise UserError(f"device 'meta' cannot compute. Use {_available_devices()}.")
        return found
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def checked_device(device: str | int | torch.device) -> torch.device:
    """The device with this name. Raises ``UserError`` if it is not available."""
    try:
        torch.empty(0, dtype=torch.float32, device=device)
    except (RuntimeError, AssertionError) as error:  # a build without CUDA asserts
        raise UserError(f"device {str(device)!r} is not available. Use {_available_devices()}.") from error
    return torch.device(device)


def _available_devices() -> str:
    """The available devices, as in "cpu or cuda"."""
    found = (("cpu", True), ("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()))
    return " or ".join(name for name, is_available in found if is_available)


def default_precision(device: torch.device) -> Precision:
    """The default precision of a model: half precision on CUDA, where it is much faster."""
    return "float16" if device.type == "cuda" else "float32"


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """``tensor.to(device, dtype)`` without waiting. ``tensor`` must not change until the copy is complete.

    A copy from pageable memory to a GPU waits for all queued work of the GPU, and Python could not prepare
    the next stage meanwhile.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        # Convert first: torch would otherwise convert into pageable memory.
        return tensor.to(dtype=dtype).pin_memory().to(device, non_blocking=True)
    return tensor.to(device, dtype)

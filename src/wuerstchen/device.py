"""Devices: which one is meant, what it computes in, and whether our kernels run there; and the way to it."""

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
    """Whether Triton is there, and made for the GPU ``device``."""
    return HAS_TRITON and torch.cuda.get_device_capability(device) >= (8, 0)


def default_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for, or the first that is there: CUDA, Apple's MPS, the CPU."""
    if device is not None:
        found = checked_device(device)
        if found.type == "meta":
            raise UserError(f"device 'meta' computes nothing. Use {_devices_here()}")
        return found
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def checked_device(device: str | int | torch.device) -> torch.device:
    """The device of that name. Raises ``UserError`` if it is not there."""
    try:
        torch.empty(0, dtype=torch.float32, device=device)
    except (RuntimeError, AssertionError) as error:  # a build without CUDA asserts
        raise UserError(f"device {str(device)!r} is not there. Use {_devices_here()}") from error
    return torch.device(device)


def _devices_here() -> str:
    """Names of what can compute here, as in "cpu or cuda"."""
    found = (("cpu", True), ("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()))
    return " or ".join(name for name, is_there in found if is_there)


def default_precision(device: torch.device) -> Precision:
    """What a model computes in on a device if nobody says: where half is many times faster, half."""
    return "float16" if device.type == "cuda" else "float32"


def sent(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """``tensor.to(device, dtype)``, for what stays as it is until it has arrived.

    From ordinary memory a copy to a GPU waits for all that the GPU was told to do before it, and so Python
    cannot prepare the next stage meanwhile.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        # In its precision first: torch would convert it into ordinary memory.
        return tensor.to(dtype=dtype).pin_memory().to(device, non_blocking=True)
    return tensor.to(device, dtype)

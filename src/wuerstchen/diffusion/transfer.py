"""From the CPU to where a network computes, without waiting for what a GPU still has to do."""

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """``tensor.to(device, dtype)``, for what stays as it is until it has arrived.

    From ordinary memory a copy to a GPU waits for all that the GPU was told to do before it, and so Python
    cannot prepare the next stage meanwhile.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        # In its precision first: torch would convert it into ordinary memory.
        return tensor.to(dtype=dtype).pin_memory().to(device, non_blocking=True)
    return tensor.to(device, dtype)

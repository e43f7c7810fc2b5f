"""The precision of training: the autocast dtypes, and frozen networks in these dtypes."""

import copy
from typing import Literal

import torch
from torch import nn

from wuerstchen.models.text import TextEncoder

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The autocast dtype of each ``precision`` in a recipe. fp32 has none."""


def gpu_precision(device: torch.device) -> Literal["bf16", "fp16"]:
    """The 16-bit precision of a GPU: bf16, or fp16 on GPUs without bf16 support (before NVIDIA's Ampere)."""
    if device.type != "cuda":
        return "bf16"
    with torch.cuda.device(device):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def with_autocast_weights(encoder: TextEncoder, dtype: torch.dtype) -> TextEncoder:
    """A copy of a frozen text encoder with its linear layers in ``dtype``, which nearly halves its memory.

    Under autocast to ``dtype`` it gives the same bits, because autocast rounds these weights anyway. It only
    works under autocast.
    """
    copied = copy.deepcopy(encoder)
    for module in copied.modules():
        if isinstance(module, nn.Linear):
            module.to(dtype)
    return copied

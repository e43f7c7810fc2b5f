"""The precision of training: what autocast computes in, and frozen networks kept in it."""

import copy
from typing import Literal

import torch
from torch import nn

from wuerstchen.models.text import TextEncoder

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What autocast computes in, by the recipe's ``precision``; fp32 has none."""


def best_half(device: torch.device) -> Literal["bf16", "fp16"]:
    """What a GPU computes in at full speed: bf16, or fp16 where it has no bf16 (before NVIDIA's Ampere)."""
    if device.type != "cuda":
        return "bf16"
    with torch.cuda.device(device):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def with_half_matrices(encoder: TextEncoder, half: torch.dtype) -> TextEncoder:
    """A copy of a frozen text encoder whose linear layers are in ``half``.

    Under autocast to ``half`` it gives the same bits, because autocast rounds those weights anyway, in nearly
    half of the memory. Without autocast it cannot be used.
    """
    copied = copy.deepcopy(encoder)
    for module in copied.modules():
        if isinstance(module, nn.Linear):
            module.to(half)
    return copied

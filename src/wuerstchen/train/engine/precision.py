"""The precision of training: autocast to half of fp32's bits, and what fp16 needs beyond it."""

import copy
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from wuerstchen.models.text import TextEncoder

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What autocast computes in, by the recipe's ``precision``; fp32 has none."""

FIRST_SCALE = 2.0**16
LEAST_SCALE = 2.0**-10
"""Gradients that overflow even so are not finite for another reason."""
_GROWS_AFTER = 2000  # updates in a row


def best_half(device: torch.device) -> Literal["bf16", "fp16"]:
    """What a GPU computes in at full speed: bf16, or fp16 where it has no bf16 (before NVIDIA's Ampere)."""
    if device.type != "cuda":
        return "bf16"
    with torch.cuda.device(device):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


class LossScale:
    """What the loss of a network is multiplied by in fp16, so that small gradients are not lost.

    As torch's ``GradScaler``: an update whose gradients overflow is left out and halves the scale, and 2000
    updates in a row without one double it. Nothing waits for the device. It belongs to an optimizer, as
    ``optimizer.loss_scale``, and is stored with its state.
    """

    def __init__(self, device: torch.device) -> None:
        self.value = torch.full((), FIRST_SCALE, dtype=torch.float32, device=device)
        self.good = torch.zeros((), dtype=torch.float32, device=device)
        """Updates in a row that did not overflow."""

    def follow(self, finite: Bool[Tensor, ""]) -> None:
        """Notes whether the gradients of an update were finite."""
        good = torch.where(finite, self.good + 1, torch.zeros_like(self.good))
        grows = good >= _GROWS_AFTER
        self.value.copy_(torch.where(finite, torch.where(grows, self.value * 2, self.value), self.value / 2))
        self.good.copy_(torch.where(grows, torch.zeros_like(good), good))


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


def loss_scale_of(optimizer: torch.optim.Optimizer) -> LossScale | None:
    """The scale of an optimizer's losses; None where losses are not scaled."""
    return getattr(optimizer, "loss_scale", None)

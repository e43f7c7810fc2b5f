"""What training in fp16 needs beyond autocast: losses are scaled, so that small gradients are not lost."""

import torch
from jaxtyping import Bool
from torch import Tensor

FIRST_SCALE = 2.0**16
LEAST_SCALE = 2.0**-10
"""Gradients that overflow even so are not finite for another reason."""
_GROWS_AFTER = 2000  # updates in a row


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


def loss_scale_of(optimizer: torch.optim.Optimizer) -> LossScale | None:
    """The scale of an optimizer's losses; None where losses are not scaled."""
    return getattr(optimizer, "loss_scale", None)

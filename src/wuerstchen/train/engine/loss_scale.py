"""Loss scaling for training in fp16, so that small gradients do not underflow."""

import torch
from jaxtyping import Bool
from torch import Tensor

FIRST_SCALE = 2.0**16
LEAST_SCALE = 2.0**-10
"""If gradients overflow even at this scale, they are not finite for another reason."""
_GROWS_AFTER = 2000  # updates in a row


class LossScale:
    """The factor of a network's loss in fp16.

    As in torch's ``GradScaler``, an update whose gradients overflow is skipped and halves the scale, and 2000
    updates in a row without an overflow double it. Everything is decided on the device. The scale belongs to
    an optimizer, as ``optimizer.loss_scale``, and is stored with its state.
    """

    def __init__(self, device: torch.device) -> None:
        self.value = torch.full((), FIRST_SCALE, dtype=torch.float32, device=device)
        self.good = torch.zeros((), dtype=torch.float32, device=device)
        """Updates in a row without an overflow."""

    def update(self, finite: Bool[Tensor, ""]) -> None:
        """Adapts the scale to an update whose gradients were ``finite`` or not."""
        good = torch.where(finite, self.good + 1, torch.zeros_like(self.good))
        grows = good >= _GROWS_AFTER
        self.value.copy_(torch.where(finite, torch.where(grows, self.value * 2, self.value), self.value / 2))
        self.good.copy_(torch.where(grows, torch.zeros_like(good), good))


def loss_scale_of(optimizer: torch.optim.Optimizer) -> LossScale | None:
    """The loss scale of an optimizer; None if its losses are not scaled."""
    return getattr(optimizer, "loss_scale", None)

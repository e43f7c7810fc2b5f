"""What a stage may offer to the training loop beyond ``base.Stage``, as protocols."""

from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import torch
from torch import nn


@runtime_checkable
class UsesAverages(Protocol):
    """A stage whose losses use the weight averages, such as a student that learns from its own average."""

    def use_averages(self, averages: dict[str, nn.Module]) -> None:
        """Called once before the first update, with the averages by the names of their networks.

        They are restored from a checkpoint if there is one, and change after every update. ``losses`` may run
        them without gradients, and must not change them.
        """
        ...


@runtime_checkable
class ReadsOnlyCaptions(Protocol):
    """A stage that reads only captions. Of images it looks at the size."""

    only_captions: bool


@runtime_checkable
class UsesBackbones(Protocol):
    """A stage whose losses have gradients with respect to the activations of frozen networks."""

    backbones: tuple[nn.Module, ...]
    """These networks. Their blocks are compiled and recomputed like those of trained networks."""


@runtime_checkable
class LendsEncoders(Protocol):
    """A stage whose frozen networks are on the device only while they encode images and captions."""

    def lent_encoders(self, device: torch.device) -> AbstractContextManager[None]:
        """Keeps them on ``device`` for several calls of ``prepare``."""
        ...


@runtime_checkable
class KeepsBest(Protocol):
    """A stage that may end with the weights that had the lowest validation loss."""

    keeps_best: bool
    """Whether it does. Without validation, it ends with the last ones."""

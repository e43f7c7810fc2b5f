"""The objectives of the networks in the files of the native layout."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from wuerstchen.diffusion.objective import NoisePrediction, Objective, VelocityPrediction, make_objective
from wuerstchen.diffusion.schedule import PUBLISHED_SCHEDULE
from wuerstchen.errors import CheckpointError
from wuerstchen.models.cascade import CascadeSettings
from wuerstchen.models.decoder import Decoder
from wuerstchen.models.prior import Prior

OF_OBJECTIVES = ("decoder", "prior")
"""The parts with an objective in the settings: ``CascadeSettings.decoder_objective`` and so on."""


def named_objective(settings: CascadeSettings, part: str) -> Objective:
    """The objective of a part in the settings."""
    return getattr(settings, f"{part}_objective")


def diffusing(networks: Mapping[str, Any]) -> dict[str, Prior | Decoder]:
    """The networks with an objective of their own, by name. Students have those of their networks."""
    found = {name: networks.get(name) for name in OF_OBJECTIVES}
    return {name: network for name, network in found.items() if isinstance(network, Prior | Decoder)}


def implied(network: nn.Module) -> Objective | None:
    """The objective that follows from a network's prediction. None if the network has no objective."""
    return make_objective(network.config.prediction) if isinstance(network, Prior | Decoder) else None


def format_of(objective: Objective | None) -> int:
    """The oldest format that can store an objective. Readers of format 1 assume that a network that does not
    predict noise predicts the velocity, with the published schedule."""
    if isinstance(objective, NoisePrediction | VelocityPrediction):
        return 1 if objective.schedule == PUBLISHED_SCHEDULE else 2
    return 1 if objective is None else 2


def with_objectives(
    settings: CascadeSettings, parts: Mapping[str, Any], named: Mapping[str, Objective], folder: Path
) -> CascadeSettings:
    """The settings with the objectives that format 1 does not store. Checks the stored ones."""
    found: dict[str, Any] = {}
    for part, network in diffusing(parts).items():
        usual = implied(network)
        objective = named.get(part, usual)
        assert objective is not None
        if objective.kind != network.config.prediction:
            raise CheckpointError(
                f"{folder}/model.json stores the objective {objective.kind!r} for the {part}, but the "
                f"network predicts {network.config.prediction!r}. Download the model again."
            )
        if part not in named and format_of(usual) > 1:
            raise CheckpointError(
                f"{folder}/model.json does not store the objective of the {part}. Download the model again."
            )
        found[f"{part}_objective"] = objective
    return dataclasses.replace(settings, **found)

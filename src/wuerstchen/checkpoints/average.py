"""Averages the weights of two models, as in the published Stage C (arXiv 2306.00637, appendix E.3)."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from wuerstchen.checkpoints.hub import local_folder
from wuerstchen.checkpoints.layouts import read_model
from wuerstchen.checkpoints.native import NETWORKS, Provenance, text_encoder_folder, write_cascade
from wuerstchen.errors import CheckpointError, UserError
from wuerstchen.models.cascade import Cascade


def weighted_average(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], weight: float
) -> dict[str, Tensor]:
    """weight · second + (1 − weight) · first, for two state dicts with the same keys and shapes.

    Integer tensors (counts) are taken from the second.
    """
    assert first.keys() == second.keys()
    return {
        name: first[name].lerp(tensor, weight) if tensor.is_floating_point() else tensor
        for name, tensor in second.items()
    }


def average(first: str | Path, second: str | Path, target: Path, weight: float = 0.5) -> list[str]:
    """Writes the average of two models' weights to the new native folder ``target``.

    ``weight`` is that of the second model. Both may be in any layout. Networks with equal weights are
    copied. Returns the names of the averaged networks.

    Raises ``UserError`` with the first part, shape or setting that differs.
    """
    if not 0 <= weight <= 1:
        raise UserError(
            f"the weight of the second model must be from 0 to 1, got {weight}. 0.5 weights both equally."
        )
    if os.path.lexists(target):  # before anything is downloaded or read
        raise CheckpointError(f"{target} already exists. Choose another folder or remove it.")
    ours, theirs = read_model(first), read_model(second)
    _check_pair(ours, theirs, str(first), str(second))
    changed = []
    for name, network in ours.networks().items():
        state, other = network.state_dict(), theirs.networks()[name].state_dict()
        if all(torch.equal(state[key], other[key]) for key in state):
            continue
        if name not in NETWORKS:
            raise UserError(f"the {name} of {first} and {second} differ. Use models with the same {name}.")
        network.load_state_dict(weighted_average(state, other, weight))
        changed.append(name)
    for name in ("prior", "decoder"):
        student = f"{name}_student"
        if name in changed and getattr(ours, student) is not None:
            raise UserError(
                f"the {name} of {first} and {second} differs, and has a {student}. It would not be the "
                f"student of their average. Convert both with --leave-out {student} first, and train a "
                "student again."
            )
    if not changed:
        raise UserError(f"{first} and {second} have the same weights, so there is nothing to average.")
    names = f"{Path(first).name} and {weight:g} of {Path(second).name}"
    provenance = Provenance(recipe=f"average of {1 - weight:g} of {names}", seed=0, images=0, data="")
    folder = local_folder(first)
    copied = None if ours.text_encoder is None else text_encoder_folder(folder)
    parts = {name: provenance for name in ours.networks() if name in NETWORKS}
    write_cascade(ours, target, parts, text_encoder=copied)
    return changed


def _check_pair(ours: Cascade, theirs: Cascade, first: str, second: str) -> None:
    unpaired = sorted(ours.networks().keys() ^ theirs.networks().keys())
    if unpaired:
        raise UserError(
            f"only one of {first} and {second} has a {unpaired[0]}. Use models with the same parts."
        )
    for field in dataclasses.fields(ours.settings):
        a, b = getattr(ours.settings, field.name), getattr(theirs.settings, field.name)
        if a != b:
            raise UserError(
                f"{field.name} is {a} in {first} and {b} in {second}. Use models with the same settings."
            )
    for name, network in ours.networks().items():
        _check_shapes(name, network, theirs.networks()[name], first, second)


def _check_shapes(name: str, ours: nn.Module, theirs: nn.Module, first: str, second: str) -> None:
    a, b = ours.state_dict(), theirs.state_dict()
    for key in (*a, *b):
        here, there = (tuple(s[key].shape) if key in s else "missing" for s in (a, b))
        if here != there:
            raise UserError(
                f"{name}: {key} is {here} in {first} and {there} in {second}. "
                "Use models with the same architecture."
            )

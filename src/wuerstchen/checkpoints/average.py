"""Weight averages of two models, as the published Stage C is one (arXiv 2306.00637, appendix E.3)."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from wuerstchen.checkpoints.hub import local_folder
from wuerstchen.checkpoints.layouts import layout_of, read_model
from wuerstchen.checkpoints.native import NETWORKS, Provenance, write_cascade
from wuerstchen.errors import CheckpointError, UserError
from wuerstchen.models.cascade import Cascade


def weighted_average(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], share: float
) -> dict[str, Tensor]:
    """share · second + (1 − share) · first, of two state dicts with the same keys and shapes.

    What is not floating (counts) is the second's.
    """
    assert first.keys() == second.keys()
    return {
        name: first[name].lerp(tensor, share) if tensor.is_floating_point() else tensor
        for name, tensor in second.items()
    }


def average(first: str | Path, second: str | Path, target: Path, share: float = 0.5) -> list[str]:
    """Writes the weight average of two models into the new native folder ``target``.

    ``share`` is the second's. Both may be in any layout. Networks that are the same in both stay as they are;
    returns the names of those that were averaged.

    Raises ``UserError`` naming the first part, shape or setting in which the models do not pair.
    """
    if not 0 <= share <= 1:
        raise UserError(
            f"share {share} must be from 0 (the first model alone) to 1 (the second); 0.5 is half"
        )
    if os.path.lexists(target):  # before anything is fetched or read
        raise CheckpointError(f"{target} already exists. Choose another folder or remove it.")
    ours, theirs = read_model(first), read_model(second)
    _check_pair(ours, theirs, str(first), str(second))
    changed = []
    for name, network in ours.networks().items():
        state, other = network.state_dict(), theirs.networks()[name].state_dict()
        if all(torch.equal(state[key], other[key]) for key in state):
            continue
        if name not in NETWORKS:
            raise UserError(f"the {name} of {first} and {second} differ; average models with the same one")
        network.load_state_dict(weighted_average(state, other, share))
        changed.append(name)
    if not changed:
        raise UserError(f"{first} and {second} have the same weights, so there is nothing to average")
    names = f"{Path(first).name} and {share:g} of {Path(second).name}"
    whence = Provenance(recipe=f"average of {1 - share:g} of {names}", seed=0, images=0, data="")
    folder = local_folder(first)
    # A text encoder of ours is a folder with a vocabulary of its own, and is copied.
    copied = ours.text_encoder is not None and layout_of(folder) == "native"
    parts = {name: whence for name in ours.networks() if name in NETWORKS}
    write_cascade(ours, target, parts, text_encoder=folder / "text_encoder" if copied else None)
    return changed


def _check_pair(ours: Cascade, theirs: Cascade, first: str, second: str) -> None:
    unpaired = sorted(ours.networks().keys() ^ theirs.networks().keys())
    if unpaired:
        raise UserError(
            f"only one of {first} and {second} has a {unpaired[0]}; average models of the same parts"
        )
    for field in dataclasses.fields(ours.settings):
        a, b = getattr(ours.settings, field.name), getattr(theirs.settings, field.name)
        if a != b:
            raise UserError(
                f"{field.name} is {a} in {first} and {b} in {second}; average models with the same settings"
            )
    for name, network in ours.networks().items():
        _check_shapes(name, network, theirs.networks()[name], first, second)


def _check_shapes(name: str, ours: nn.Module, theirs: nn.Module, first: str, second: str) -> None:
    a, b = ours.state_dict(), theirs.state_dict()
    for key in (*a, *b):
        one, other = (tuple(s[key].shape) if key in s else "missing" for s in (a, b))
        if one != other:
            raise UserError(
                f"{name}: {key} is {one} in {first} and {other} in {second}; average models of one shape"
            )

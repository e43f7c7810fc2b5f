"""The table of everything that can be trained, in the order of training: a row for each file in ``stages/``.

Rows are names, so that a recipe can ask which stages there are before their networks are imported. What a
stage is called in recipes, run folders and logs, what it makes, and what it builds on is in its own file, in
the ``StageKind`` that the row names.
"""

import pkgutil
from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wuerstchen.train.config import Recipe
    from wuerstchen.train.stages.base import NamedPhase, StageKind

STAGES = (
    "wuerstchen.train.stages.vqgan:VQGAN_STAGE",
    "wuerstchen.train.stages.decoder:DECODER_STAGE",
    "wuerstchen.train.stages.vqgan:VQGAN_REFINEMENT",
    "wuerstchen.train.stages.prior:PRIOR_STAGE",
)
"""Places of ``StageKind`` objects. Each comes after those that it builds on."""


def kinds() -> "list[StageKind]":
    """Everything that can be trained, in the order of training."""
    return [pkgutil.resolve_name(place) for place in STAGES]


def selectable() -> "list[StageKind]":
    """What a recipe's ``stages`` may name. The refinement of a stage is trained with its stage."""
    return [kind for kind in kinds() if not kind.refines]


def short_name(stage: str) -> str:
    """What recipes and run folders call a stage, by this or by its full name: ``a`` for ``vqgan``.

    Other texts are returned as they are.
    """
    return next((kind.short for kind in selectable() if stage in (kind.name, kind.short)), stage)


def kind_of(stage: str) -> "StageKind":
    """The stage with this full or short name. Raises ``KeyError`` if there is none."""
    for kind in selectable():
        if stage in (kind.name, kind.short):
            return kind
    raise KeyError(stage)


def before(stages: Collection[str]) -> "list[StageKind]":
    """What the stages with these full or short names build on, directly or not, in the order of training."""
    wanted = {name for stage in stages for name in kind_of(stage).builds_on}
    found = []
    for kind in reversed(selectable()):
        if kind.name in wanted:
            wanted |= {*kind.builds_on}
            found.append(kind)
    return found[::-1]


def after(stages: Collection[str]) -> "list[StageKind]":
    """What builds on one of these stages, directly or not, in the order of training."""
    names = {kind_of(stage).name for stage in stages}
    return [kind for kind in selectable() if names & {other.name for other in before([kind.name])}]


def maker_of(part: str) -> "StageKind | None":
    """The stage that trains a part of the model; None for a part that no stage trains."""
    return next((kind for kind in kinds() if part in kind.makes), None)


def trained_kinds(recipe: "Recipe") -> "list[StageKind]":
    """What a recipe trains, refinements included, in the order of training."""
    return [kind for kind in kinds() if kind.short in recipe.stages and kind.phases(recipe)]


def trained_phases(recipe: "Recipe") -> "list[NamedPhase]":
    """Every phase of a run in the order of training, refinements included."""
    return [phase for kind in trained_kinds(recipe) for phase in kind.phases(recipe)]

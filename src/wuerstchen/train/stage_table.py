"""The table of everything that can be trained, in the order of training: a row for each file in ``stages/``.

Rows are names, so that a recipe can look up stages before their networks are imported. The ``StageKind`` in
each file says what the stage is called in recipes, run folders and logs, what it makes, and what it builds
on.
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
"""Where the ``StageKind`` objects are. Each comes after those that it builds on."""


def kinds() -> "list[StageKind]":
    """Everything that can be trained, in the order of training."""
    return [pkgutil.resolve_name(place) for place in STAGES]


def selectable() -> "list[StageKind]":
    """The stages that a recipe can name in ``stages``. Refinements are trained with their stage."""
    return [kind for kind in kinds() if not kind.refines]


def short_name(stage: str) -> str:
    """The short name of a stage: ``a`` for ``vqgan`` or ``a``. Other texts are returned unchanged."""
    return next((kind.short for kind in selectable() if stage in (kind.name, kind.short)), stage)


def kind_of(stage: str) -> "StageKind":
    """The stage with this full or short name. Raises ``KeyError`` if there is none."""
    for kind in selectable():
        if stage in (kind.name, kind.short):
            return kind
    raise KeyError(stage)


def before(stages: Collection[str]) -> "list[StageKind]":
    """All stages that the named stages build on, directly or indirectly, in the order of training."""
    wanted = {name for stage in stages for name in kind_of(stage).builds_on}
    found = []
    for kind in reversed(selectable()):
        if kind.name in wanted:
            wanted |= {*kind.builds_on}
            found.append(kind)
    return found[::-1]


def after(stages: Collection[str]) -> "list[StageKind]":
    """All stages that build on one of the named stages, directly or indirectly, in the order of training."""
    names = {kind_of(stage).name for stage in stages}
    return [kind for kind in selectable() if names & {other.name for other in before([kind.name])}]


def maker_of(part: str) -> "StageKind | None":
    """The stage that trains a part of the model, or None."""
    return next((kind for kind in kinds() if part in kind.makes), None)


def trained_kinds(recipe: "Recipe") -> "list[StageKind]":
    """The stages that a recipe trains, including refinements, in the order of training."""
    return [kind for kind in kinds() if kind.short in recipe.stages and kind.phases(recipe)]


def trained_phases(recipe: "Recipe") -> "list[NamedPhase]":
    """All phases of a run in the order of training, including refinements."""
    return [phase for kind in trained_kinds(recipe) for phase in kind.phases(recipe)]

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
    "wuerstchen.train.stages.few:FEW_STAGE",
    "wuerstchen.train.stages.few_decoder:FEW_DECODER_STAGE",
    "wuerstchen.train.stages.lora:LORA_STAGE",
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


def phases_in(kind: "StageKind", recipe: "Recipe") -> "list[NamedPhase]":
    """The phases of a stage that a recipe trains."""
    if kind.short not in recipe.stages:
        return []
    return [phase for phase in kind.phases(recipe) if recipe.selects(phase.name)]


def result_of(recipe: "Recipe") -> str:
    """The folder in the run for the result of a recipe that adapts a model. Empty if it makes a model."""
    return next((kind.result for kind in trained_kinds(recipe) if kind.result), "")


def trained_kinds(recipe: "Recipe") -> "list[StageKind]":
    """The stages that a recipe trains, including refinements, in the order of training."""
    return [kind for kind in kinds() if phases_in(kind, recipe)]


def trained_phases(recipe: "Recipe") -> "list[NamedPhase]":
    """All phases of a run in the order of training, including refinements."""
    return [phase for kind in kinds() for phase in phases_in(kind, recipe)]


def continued(recipe: "Recipe") -> set[str]:
    """The stages whose first phase ``Recipe.only`` leaves out, by their short names. Training continues their
    networks."""
    if not recipe.only:
        return set()
    trained = [kind for kind in selectable() if kind.short in recipe.stages]
    firsts = {kind.short: phases[0].name for kind in trained if (phases := kind.phases(recipe))}
    return {short for short, name in firsts.items() if not recipe.selects(name)}


def needed_before(recipe: "Recipe") -> "list[StageKind]":
    """The stages that must have been trained before a run, in the order of training."""
    going_on = continued(recipe)
    wanted = {kind.name for kind in before(recipe.stages)} | {kind_of(stage).name for stage in going_on}
    for kind in trained_kinds(recipe) if recipe.only else ():  # refinements build on later stages
        wanted |= {*kind.builds_on} | {other.name for other in before(kind.builds_on)}
    trained = {*recipe.stages} - going_on
    return [kind for kind in selectable() if kind.name in wanted and kind.short not in trained]


def invalidated(recipe: "Recipe") -> "list[StageKind]":
    """The stages whose networks no longer fit after a run, because they were trained on other inputs."""
    changed = [k.short for k in kinds() if any(not phase.keeps_inputs for phase in phases_in(k, recipe))]
    return [kind for kind in after(changed) if kind.short not in recipe.stages]

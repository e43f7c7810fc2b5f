"""Changes to a recipe in the middle of a run: what may change, from which image on, and how it is recorded.

``run.json`` keeps the recipe that the run was started with and, in order, every change with the stage and the
image from which it applies. The current recipe is the first one with all changes applied. So a changed run
that is killed resumes as the changed run, by the same command with or without ``--change``.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wuerstchen.checkpoints.files import write_json
from wuerstchen.errors import RunFolderError, UserError
from wuerstchen.train.config import FREE_FIELDS, Recipe, as_dict, differing_fields, with_time_densities
from wuerstchen.train.engine.checkpoint import newest
from wuerstchen.train.recorded_recipe import get, parsed, recipe_of, replaced
from wuerstchen.train.report.events import Log
from wuerstchen.train.stage_table import kinds, trained_kinds, trained_phases


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_OPTIMIZATION = _words(
    "images batch_size learning_rate warmup decay betas weight_decay clip_norm ema_decay ema_every accumulate"
)
_PHASE = frozenset({"max_ratio"})
"""Fields of a phase that can be named without their path."""
_OWN = frozenset({"max_ratio", "time_shift", "feature_weight"})
"""Fields of a phase that may change."""
_RUN = _words(
    "seed precision skip prepared_images stored_texts prior_steps prior_sampler prior_guidance "
    "prior_guidance_interval decoder_steps decoder_guidance decoder_shift"
)
_REFINEMENT = "refine_"
"""Prefix of the settings that only the refinement of a stage reads."""


def _changeable() -> dict[str, frozenset[str]]:
    """The settings of the stages that may change, by the recipe's field (``stage_b``)."""
    found: dict[str, frozenset[str]] = {}
    for kind in kinds():
        found[kind.config] = found.get(kind.config, frozenset()) | kind.changeable
    return found


@dataclass(frozen=True, kw_only=True)
class Change:
    """One change of one field."""

    field: str
    """Path of the field in the recipe."""
    before: Any
    after: Any
    stage: str
    """The first phase that it applies to, by its name in the run: c, c2 ..."""
    images: int
    """Images of that phase after which it applies."""
    time: float
    """When it was requested, in seconds since 1970."""

    def __str__(self) -> str:
        return (
            f"{self.field}: {self.before} -> {self.after}, from image {self.images:,} of stage "
            f"{self.stage.upper()} on"
        )


@dataclass(frozen=True)
class RunPhase:
    """One phase of a run, with its own checkpoints."""

    name: str
    """The name in ``RUN/stage_{name}``."""
    config: str
    """The recipe's field with the settings of its stage, as ``stage_b``."""
    path: str
    """Path of the phase in the recipe. Empty for the refinement of a stage."""
    images: int
    """Its length in images."""
    own: Mapping[str, str]
    """Settings of the stage that the phase replaces, with the paths of its own values."""
    unused: frozenset[str]
    """Settings of the stage that the phase does not use."""

    @property
    def length(self) -> str:
        """Path of its length in the recipe."""
        return f"{self.path}.optimization.images" if self.path else f"{self.config}.refine_images"

    def reads(self, path: str) -> bool:
        """Whether the phase uses the field at ``path``."""
        first, _, rest = path.partition(".")
        if first in _RUN:
            return True
        if first != self.config:
            return False
        if rest == "max_ratio":
            return self.path == self.config
        if rest in self.own or rest in self.unused:
            return False
        if rest in _changeable().get(first, ()):
            return not rest.startswith(_REFINEMENT) or not self.path
        if self.path:
            own = {f"{self.path}.{name}" for name in _OWN}
            return path.startswith(f"{self.path}.optimization.") or path in own
        own = (
            "optimization.images",
            "optimization.learning_rate",
        )  # a refinement has its own: refine_images, refine_rate
        return rest.startswith("optimization.") and rest not in own

    def path_of(self, name: str) -> str | None:
        """The path of a field given by its last name only. None if the phase has no such field."""
        if name in self.own:
            return self.own[name]
        if name in _PHASE and self.path:
            return f"{self.path}.{name}"
        if name in _changeable().get(self.config, ()):
            return f"{self.config}.{name}"
        if not self.path:
            own = {"images": "refine_images", "learning_rate": "refine_rate"}
            if name in own:
                return f"{self.config}.{own[name]}"
        if name in _OPTIMIZATION:
            return f"{self.path or self.config}.optimization.{name}"
        return None


def run_phases(recipe: Recipe) -> list[RunPhase]:
    """All phases of a run in the order of training."""
    return [
        RunPhase(p.name, p.config, p.path, p.phase.optimization.images, p.own, p.unused)
        for p in trained_phases(recipe)
    ]


def images_seen(run_dir: Path, phase: RunPhase) -> int:
    """Images at the newest checkpoint of a phase, by the checkpoint's name. 0 without a checkpoint."""
    folder = run_dir / f"stage_{phase.name}" / "checkpoints"
    names = [int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit()]
    return max(names, default=0)


def ending_at(recipe: Recipe, name: str, images: int) -> Recipe:
    """The recipe of a run that ends after ``images`` of the phase ``name``, without the phases after it."""
    phases = run_phases(recipe)
    count = 1 + [phase.name for phase in phases].index(name)
    kept, left_out = phases[:count], phases[count:]
    fields = replaced(as_dict(recipe), kept[-1].length, images)
    configs = {phase.config for phase in kept}
    for phase in left_out:
        if phase.config in configs and not phase.path:
            fields = replaced(fields, phase.length, 0)
        elif phase.config in configs:
            fields = replaced(fields, f"{phase.config}.phases", fields[phase.config]["phases"][:-1])
    for config in configs:
        if not fields[config].get("phases", ()) and "blend" in fields[config]:
            fields = replaced(fields, f"{config}.blend", 1.0)
    names = {phase.name for phase in kept}
    stages = {kind.short for kind in trained_kinds(recipe) for p in kind.phases(recipe) if p.name in names}
    for field in ("stages", "fresh"):
        fields = replaced(fields, field, [stage for stage in fields[field] if stage in stages])
    fields = replaced(fields, "only", [name for name in fields["only"] if name in names])
    return recipe_of(fields, "the recipe")


def current_phase(recipe: Recipe, run_dir: Path) -> RunPhase:
    """The phase that is being trained, or the last one if all are finished."""
    phases = run_phases(recipe)
    return next((phase for phase in phases if images_seen(run_dir, phase) < phase.images), phases[-1])


def current_recipe(stored: dict[str, Any], given: Recipe, source: str) -> Recipe:
    """The recipe of a run with its changes applied. ``FREE_FIELDS`` are taken from ``given``."""
    recipe = as_dict(recipe_of(stored["recipe"], source))
    for change in stored.get("changes", ()):
        recipe = replaced(recipe, change["field"], change["after"])
    free = {name: value for name, value in as_dict(given).items() if name in FREE_FIELDS}
    return recipe_of({**recipe, **free}, source)


def check_same(stored: dict[str, Any], given: Recipe, run_dir: Path, current: Recipe) -> None:
    """Raises ``RunFolderError`` if a field has neither its first value in the run nor the current one."""
    source = str(run_dir / "run.json")
    begun = as_dict(recipe_of(stored["recipe"], source))
    of_begun, of_current = (differing_fields(fields, as_dict(given)) for fields in (begun, as_dict(current)))
    names = {text.partition(" ")[0] for text in of_begun} & {text.partition(" ")[0] for text in of_current}
    differing = [text for text in of_current if text.partition(" ")[0] in names]
    if not differing:
        return
    fields = as_dict(given)
    changes = [f"--change {n}={_text(get(fields, n))}" for n in sorted(names) if _may_change(n, fields)]
    advice = ""
    if len(changes) == len(names):
        advice = f", or add {' '.join(changes)} to change the run from here on"
    raise RunFolderError(
        f"{run_dir} belongs to another recipe: {', '.join(differing)} differ. Use the same settings{advice}, "
        "or another --run-dir."
    )


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _may_change(path: str, fields: dict[str, Any]) -> bool:
    names = path.split(".")
    try:
        get(fields, path)
    except KeyError:
        return False
    if names[0] in _RUN:
        return len(names) == 1
    stages = _changeable()
    if names[0] not in stages:
        return False
    if len(names) == 2:
        return names[1] in stages[names[0]]
    if names[1] == "phases" and len(names) >= 4:
        return names[3] in _OWN if len(names) == 4 else _is_optimization(names[3:])
    return _is_optimization(names[1:])


def _is_optimization(names: list[str]) -> bool:
    return len(names) == 2 and names[0] == "optimization" and names[1] in _OPTIMIZATION


def with_changes(
    recipe: Recipe, run_dir: Path, requests: Sequence[str], *, end_now: bool = False
) -> tuple[Recipe, list[Change]]:
    """The recipe with the requested changes, and these changes as records.

    A request looks like ``learning_rate=1e-5``, for the phase being trained, like
    ``stage_c.optimization.learning_rate=1e-5``, or like ``skip+=NAME``. Requests for the current value change
    nothing. Raises ``UserError`` for fields that cannot change, or cannot change at this point of the run.
    """
    phase = current_phase(recipe, run_dir)
    if end_now:
        if requests:
            raise UserError("--end-now and --change cannot be used together. Use one of them.")
        return _ended_now(recipe, run_dir, phase)
    changed = recipe
    for request in requests:
        changed = _with(changed, phase, request)
    paths = _differing(recipe, changed)
    if not paths:
        return recipe, []
    phases = run_phases(changed)
    _check_lengths(recipe, changed, run_dir)
    changes = []
    for path in paths:
        # A refinement with 0 images is not a phase: it was not added yet, or it was removed.
        readers = [p for p in phases if p.reads(path)] or [p for p in run_phases(recipe) if p.reads(path)]
        open_parts = [p for p in readers if images_seen(run_dir, p) < p.images or p.length == path]
        if not open_parts:
            raise UserError(
                f"--change {path} would have no effect: the stages that use it are finished. To continue "
                "training, raise the number of images too, as in --change images=N."
            )
        first = open_parts[0]
        changes.append(_change(recipe, changed, path, first.name, images_seen(run_dir, first)))
    for p in phases:
        path, seen = f"{p.path or p.config}.optimization.batch_size", images_seen(run_dir, p)
        if path in paths and 0 < seen < p.images:
            size = get(as_dict(changed), path)
            if seen % size:
                raise UserError(
                    f"batch_size must divide the {seen:,} images that stage {p.name.upper()} has seen, got "
                    f"{size}. Try half or twice the old batch size."
                )
    return changed, changes


def _with(recipe: Recipe, phase: RunPhase, request: str) -> Recipe:
    """The recipe with one requested change."""
    name, equals, text = request.partition("=")
    adds, name = name.endswith("+"), name.removesuffix("+").strip().replace("-", "_")
    if not equals or not name:
        raise UserError(f"--change must look like learning_rate=1e-5, got {request}.")
    fields = as_dict(recipe)
    path = name
    if name in FREE_FIELDS:
        option = name.replace("_", "-")
        raise UserError(f"{name} can change at any time without --change. Use --{option} {text}.")
    if "." not in name and name not in _RUN:
        path = phase.path_of(name) or name
    if not _may_change(path, fields):
        raise UserError(
            f"{path} cannot change within a run. Only settings that do not change networks or data "
            "can: images, learning_rate, batch_size, clip_norm, precision, seed, skip and the like. For "
            "other changes, start a new run. --start-from can load this run's model if it matches."
        )
    if adds and path != "skip":
        raise UserError(
            f"--change {path}+= needs a list, and only skip is a list. Use --change {path}={text}."
        )
    value = [*fields["skip"], text] if adds else parsed(recipe, path, text)
    if adds and text in fields["skip"]:
        return recipe
    if (path, value) == ("precision", "auto"):
        raise UserError("--change precision=auto depends on the machine. Use fp32, bf16 or fp16.")
    changed = recipe_of(replaced(fields, path, value), "--change")
    return with_time_densities(changed) if path.endswith(".time_density") else changed


def _check_lengths(before: Recipe, after: Recipe, run_dir: Path) -> None:
    """Raises ``UserError`` if a phase would become shorter than what it has already trained on, or if a phase
    that a later one builds on would become longer."""
    phases = run_phases(after)
    for number, phase in enumerate(phases):
        seen = images_seen(run_dir, phase)
        old = next((p.images for p in run_phases(before) if p.name == phase.name), 0)
        if phase.images < seen and phase.images < old:
            raise UserError(
                f"images must be at least {seen:,}, which stage {phase.name.upper()} has seen, got "
                f"{phase.images}. Use --end-now to end it there, or export an earlier checkpoint with "
                "wuerstchen export."
            )
        begun = [p.name.upper() for p in phases[number + 1 :] if images_seen(run_dir, p)]
        if phase.images > old and old and seen >= old and begun:
            raise UserError(
                f"stage {phase.name.upper()} cannot have more images: it is finished, and stage {begun[0]} "
                f"was trained on it. Train stage {begun[-1]} longer, or start a new run with --start-from."
            )
    gone = [p for p in run_phases(before) if p.name not in {q.name for q in phases}]
    for phase in gone:
        if images_seen(run_dir, phase):
            raise UserError(
                f"stage {phase.name.upper()} cannot be removed: its training has started. Use --end-now to "
                "end it at its newest checkpoint."
            )


def _ended_now(recipe: Recipe, run_dir: Path, phase: RunPhase) -> tuple[Recipe, list[Change]]:
    """The recipe that ends at the newest checkpoint, and its changes."""
    seen = images_seen(run_dir, phase)
    phases = run_phases(recipe)
    if not seen:  # it has not started, so the run ends with the phase before it
        before = [p for p in phases[: phases.index(phase)] if images_seen(run_dir, p)]
        if not before:
            raise UserError(
                f"{run_dir} has no checkpoint yet, so the run cannot end here. Train until there is one."
            )
        phase = before[-1]
        seen = images_seen(run_dir, phase)
    changed = ending_at(recipe, phase.name, min(seen, phase.images))
    paths = _differing(recipe, changed)
    return changed, [_change(recipe, changed, path, phase.name, seen) for path in paths]


def _change(before: Recipe, after: Recipe, path: str, stage: str, images: int) -> Change:
    old, new = get(as_dict(before), path), _at(after, path)
    now = round(time.time(), 3)
    return Change(field=path, before=old, after=new, stage=stage, images=images, time=now)


def _at(recipe: Recipe, path: str) -> Any:
    """The value at a path. None if the list of phases is too short."""
    try:
        return get(as_dict(recipe), path)
    except KeyError:
        return None


def _differing(before: Recipe, after: Recipe) -> list[str]:
    """The paths of the fields in which two recipes differ, without ``FREE_FIELDS``."""
    return [text.partition(" ")[0] for text in differing_fields(as_dict(before), as_dict(after))]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The recipe for this start of the run, and the changes that led to it."""

    recipe: Recipe
    begun: Recipe
    """The recipe in ``run.json``, with ``FREE_FIELDS`` as they are given now."""
    recorded: list[dict[str, Any]]
    """The changes in ``run.json``, oldest first."""
    new: list[Change]
    """The changes that this start requests."""

    @property
    def changes(self) -> list[dict[str, Any]]:
        """All changes, for JSON."""
        return [*self.recorded, *map(dataclasses.asdict, self.new)]


def plan(
    given: Recipe,
    stored: dict[str, Any] | None,
    run_dir: Path,
    requests: Sequence[str] = (),
    *,
    end_now: bool = False,
) -> Plan:
    """The plan of a start with the recipe ``given``. ``stored`` is the content of ``run.json``, or None.

    Raises ``UserError`` for changes that are not possible.
    """
    if stored is None:
        if requests or end_now:
            what = "--end-now" if end_now else f"--change {requests[0]}"
            raise UserError(
                f"{what} only works on a started run, and {run_dir} has not started. Set the fields as "
                "options instead, as in --stage-c.optimization.learning-rate 1e-5."
            )
        return Plan(recipe=given, begun=given, recorded=[], new=[])
    source = str(run_dir / "run.json")
    begun = current_recipe({**stored, "changes": []}, given, source)
    recipe, new = with_changes(current_recipe(stored, given, source), run_dir, requests, end_now=end_now)
    return Plan(recipe=recipe, begun=begun, recorded=list(stored.get("changes", [])), new=new)


def record(planned: Plan, run_dir: Path, stored: dict[str, Any], log: Log) -> None:
    """Writes new changes to ``run.json``, and changes that the log does not have yet to the log.

    Raises ``RunFolderError`` if the checkpoint at which a new change begins is damaged.
    """
    for phase in run_phases(planned.recipe):
        seen = images_seen(run_dir, phase)
        if not seen or not any((c.stage, c.images) == (phase.name, seen) for c in planned.new):
            continue
        found = newest(run_dir / f"stage_{phase.name}" / "checkpoints")
        if found is None or found[1]["images"] != seen:
            raise RunFolderError(
                f"the newest checkpoint of stage {phase.name.upper()} is damaged, and the change would begin "
                "there. Start once without --change, which resumes from the checkpoint before it."
            )
    if planned.changes != stored.get("changes", []):
        write_json(run_dir / "run.json", {**stored, "changes": planned.changes})
    logged = sum(event["event"] == "change" for event in log.events())
    for change in planned.changes[logged:]:
        values = {name: value for name, value in change.items() if name != "time"}
        log.event("change", asked=change["time"], **values)
    for change in planned.new:
        print(f"Changed {change}")

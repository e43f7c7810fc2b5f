"""Changes of a recipe in the middle of a run: what may change, from which image on, and how it is recorded.

``run.json`` keeps the recipe that the run was begun with and, in order, every change with the stage and the
image that it holds from. The recipe in force is the first with all the changes made, so a run that was
changed and then killed goes on as the changed run does, by the same command with or without ``--change``.
"""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wuerstchen.checkpoints.files import write_json
from wuerstchen.errors import RunFolderError, UserError
from wuerstchen.train.config import FREE_FIELDS, Recipe, as_dict, differing_fields
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
_RUN = _words(
    "seed precision skip prepared_images stored_texts prior_steps prior_guidance decoder_steps "
    "decoder_guidance decoder_shift"
)
_REFINEMENT = "refine_"
"""What the names of settings that only the refinement of a stage reads begin with."""


def _changeable() -> dict[str, frozenset[str]]:
    """The settings that may change, by the recipe's field that has them (``stage_b``)."""
    found: dict[str, frozenset[str]] = {}
    for kind in kinds():
        found[kind.config] = found.get(kind.config, frozenset()) | kind.changeable
    return found


@dataclass(frozen=True, kw_only=True)
class Change:
    """One change of one field."""

    field: str
    """Its path in the recipe."""
    before: Any
    after: Any
    stage: str
    """The first stage that it holds in, by its name in the run: c, c2 ..."""
    images: int
    """Images of that stage after which it holds."""
    time: float
    """When it was asked for, in seconds since 1970."""

    def __str__(self) -> str:
        return (
            f"{self.field}: {self.before} -> {self.after}, from image {self.images:,} of stage "
            f"{self.stage.upper()} on"
        )


@dataclass(frozen=True)
class Part:
    """One stretch of training, with checkpoints of its own."""

    name: str
    """As in ``RUN/stage_{name}``."""
    config: str
    """The recipe's field with the settings of its stage."""
    phase: str
    """Path of its phase in the recipe; empty for the refinement of a stage."""
    images: int
    """Its whole length."""

    @property
    def length(self) -> str:
        """Path of its length in the recipe."""
        return f"{self.phase}.optimization.images" if self.phase else f"{self.config}.refine_images"

    def reads(self, path: str) -> bool:
        """Whether the field at ``path`` matters to it."""
        first, _, rest = path.partition(".")
        if first in _RUN:
            return True
        if first != self.config:
            return False
        if rest == "max_ratio":
            return self.phase == self.config
        if rest in _changeable().get(first, ()):
            return not rest.startswith(_REFINEMENT) or not self.phase
        if self.phase:
            return path.startswith(f"{self.phase}.optimization.") or path == f"{self.phase}.max_ratio"
        own = ("optimization.images", "optimization.learning_rate")  # these it has as refine_ fields
        return rest.startswith("optimization.") and rest not in own

    def path_of(self, name: str) -> str | None:
        """The path of a field that a user calls by its last name alone; None if it has none."""
        if name in _PHASE and self.phase:
            return f"{self.phase}.{name}"
        if name in _changeable().get(self.config, ()):
            return f"{self.config}.{name}"
        if not self.phase:
            own = {"images": "refine_images", "learning_rate": "refine_rate"}
            if name in own:
                return f"{self.config}.{own[name]}"
        if name in _OPTIMIZATION:
            return f"{self.phase or self.config}.optimization.{name}"
        return None


def parts_of(recipe: Recipe) -> list[Part]:
    """All parts of a run, in the order that they are trained in."""
    return [
        Part(named.name, named.config, named.path, named.phase.optimization.images)
        for named in trained_phases(recipe)
    ]


def reached(run_dir: Path, part: Part) -> int:
    """Images of the newest checkpoint of a part, by its name; 0 without one."""
    folder = run_dir / f"stage_{part.name}" / "checkpoints"
    names = [int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit()]
    return max(names, default=0)


def ended_at(recipe: Recipe, name: str, images: int) -> Recipe:
    """The recipe of a run that ends after ``images`` of the part ``name``: nothing follows it.

    Parts of it that come later in the run are left out, stages as a whole or refinements.
    """
    parts = parts_of(recipe)
    count = 1 + [part.name for part in parts].index(name)
    kept, left_out = parts[:count], parts[count:]
    fields = replaced(as_dict(recipe), kept[-1].length, images)
    configs = {part.config for part in kept}
    for part in left_out:
        if part.config in configs and not part.phase:
            fields = replaced(fields, part.length, 0)
        elif part.config in configs:
            fields = replaced(fields, f"{part.config}.phases", fields[part.config]["phases"][:-1])
    for config in configs:
        if not fields[config].get("phases", ()) and "blend" in fields[config]:
            fields = replaced(fields, f"{config}.blend", 1.0)
    names = {part.name for part in kept}
    stages = {kind.short for kind in trained_kinds(recipe) for p in kind.phases(recipe) if p.name in names}
    for field in ("stages", "fresh"):
        fields = replaced(fields, field, [stage for stage in fields[field] if stage in stages])
    return recipe_of(fields, "the recipe")


def current_of(recipe: Recipe, run_dir: Path) -> Part:
    """The part that is being trained, or the last where all are finished."""
    parts = parts_of(recipe)
    return next((part for part in parts if reached(run_dir, part) < part.images), parts[-1])


def in_force(stored: dict[str, Any], given: Recipe, source: str) -> Recipe:
    """The recipe of a run with its changes made. What is free to change is as ``given``."""
    recipe = as_dict(recipe_of(stored["recipe"], source))
    for change in stored.get("changes", ()):
        recipe = replaced(recipe, change["field"], change["after"])
    free = {name: value for name, value in as_dict(given).items() if name in FREE_FIELDS}
    return recipe_of({**recipe, **free}, source)


def check_same(stored: dict[str, Any], given: Recipe, run_dir: Path, current: Recipe) -> None:
    """Raises ``RunFolderError`` unless each field is as the run began with it, or was changed to."""
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
        advice = f", give {' '.join(changes)} to change the run from here on"
    raise RunFolderError(
        f"{run_dir} belongs to another recipe: {', '.join(differing)} differ; use the same settings{advice}, "
        "or use another --run-dir"
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
        return names[3] in _PHASE if len(names) == 4 else _is_optimization(names[3:])
    return _is_optimization(names[1:])


def _is_optimization(names: list[str]) -> bool:
    return len(names) == 2 and names[0] == "optimization" and names[1] in _OPTIMIZATION


def asked_for(
    recipe: Recipe, run_dir: Path, requests: Sequence[str], *, end_now: bool = False
) -> tuple[Recipe, list[Change]]:
    """The recipe with what is asked for, and the changes that this makes of the one in force.

    ``requests`` are as ``learning_rate=1e-5``, which is of the part being trained, or
    ``stage_c.optimization.learning_rate=1e-5``, or ``skip+=NAME``. What is so already is no change. Raises
    ``UserError`` for what cannot change, or not at this point of the run.
    """
    part = current_of(recipe, run_dir)
    if end_now:
        if requests:
            raise UserError("--end-now and --change cannot be given together; give one of them")
        return _ended_now(recipe, run_dir, part)
    changed = recipe
    for request in requests:
        changed = _with(changed, part, request)
    paths = _differing(recipe, changed)
    if not paths:
        return recipe, []
    parts = parts_of(changed)
    _check_lengths(recipe, changed, run_dir)
    changes = []
    for path in paths:
        # A refinement of no images is no part yet, or none any more.
        readers = [p for p in parts if p.reads(path)] or [p for p in parts_of(recipe) if p.reads(path)]
        open_parts = [p for p in readers if reached(run_dir, p) < p.images or p.length == path]
        if not open_parts:
            raise UserError(
                f"--change {path} changes nothing: what it is for is finished. To train on, raise the images "
                "too, as in --change images=N"
            )
        first = open_parts[0]
        changes.append(_change(recipe, changed, path, first.name, reached(run_dir, first)))
    for p in parts:
        path, seen = f"{p.phase or p.config}.optimization.batch_size", reached(run_dir, p)
        if path in paths and 0 < seen < p.images:
            size = get(as_dict(changed), path)
            if seen % size:
                raise UserError(
                    f"batch_size={size} does not divide the {seen:,} images that stage {p.name.upper()} has "
                    "seen. Use one that does, half or twice the old one as a rule"
                )
    return changed, changes


def _with(recipe: Recipe, part: Part, request: str) -> Recipe:
    """The recipe with one request met."""
    name, equals, text = request.partition("=")
    adds, name = name.endswith("+"), name.removesuffix("+").strip().replace("-", "_")
    if not equals or not name:
        raise UserError(f"--change {request} is no change; write it as --change learning_rate=1e-5")
    fields = as_dict(recipe)
    path = name
    if name in FREE_FIELDS:
        option = name.replace("_", "-")
        raise UserError(f"--change {name} is not needed: it may always change. Give --{option} {text}")
    if "." not in name and name not in _RUN:
        path = part.path_of(name) or name
    if not _may_change(path, fields):
        raise UserError(
            f"--change {path} cannot be: within a run only what is not built into its networks and data can "
            "change, as images, learning_rate, batch_size, clip_norm, precision, seed or skip. For the rest "
            f"begin a new run, from this one's model with --start-from if it fits"
        )
    if adds and path != "skip":
        raise UserError(f"--change {path}+= adds to no list: only skip is one. Use --change {path}={text}")
    value = [*fields["skip"], text] if adds else parsed(recipe, path, text)
    if adds and text in fields["skip"]:
        return recipe
    if (path, value) == ("precision", "auto"):
        raise UserError("--change precision=auto depends on the machine; give fp32 or bf16")
    return recipe_of(replaced(fields, path, value), "--change")


def _check_lengths(before: Recipe, after: Recipe, run_dir: Path) -> None:
    """Refuses lengths below what a part has seen, and above where another part was built on its end."""
    parts = parts_of(after)
    for number, part in enumerate(parts):
        seen = reached(run_dir, part)
        old = next((p.images for p in parts_of(before) if p.name == part.name), 0)
        if part.images < seen and part.images < old:
            raise UserError(
                f"images={part.images} is fewer than the {seen:,} that stage {part.name.upper()} has seen; "
                "end it where it is with --end-now, or export an earlier checkpoint with wuerstchen export"
            )
        begun = [p.name.upper() for p in parts[number + 1 :] if reached(run_dir, p)]
        if part.images > old and old and seen >= old and begun:
            raise UserError(
                f"stage {part.name.upper()} is finished and stage {begun[0]} was trained on it, so it cannot "
                f"have more images. Give stage {begun[-1]} more, or begin a new run with --start-from"
            )
    gone = [p for p in parts_of(before) if p.name not in {q.name for q in parts}]
    for part in gone:
        if reached(run_dir, part):
            raise UserError(
                f"stage {part.name.upper()} has begun, so it cannot be left out; end it where it is with "
                "--end-now"
            )


def _ended_now(recipe: Recipe, run_dir: Path, part: Part) -> tuple[Recipe, list[Change]]:
    """The recipe that ends at the newest checkpoint."""
    seen = reached(run_dir, part)
    parts = parts_of(recipe)
    if not seen:  # it has not begun, so what came before it is the end
        before = [p for p in parts[: parts.index(part)] if reached(run_dir, p)]
        if not before:
            raise UserError(
                f"{run_dir} has no checkpoint yet, so there is nothing to end with; let it train a little"
            )
        part = before[-1]
        seen = reached(run_dir, part)
    changed = ended_at(recipe, part.name, min(seen, part.images))
    paths = _differing(recipe, changed)
    return changed, [_change(recipe, changed, path, part.name, seen) for path in paths]


def _change(before: Recipe, after: Recipe, path: str, stage: str, images: int) -> Change:
    old, new = get(as_dict(before), path), _at(after, path)
    now = round(time.time(), 3)
    return Change(field=path, before=old, after=new, stage=stage, images=images, time=now)


def _at(recipe: Recipe, path: str) -> Any:
    """The value at a path; None where a shorter list of phases has none."""
    try:
        return get(as_dict(recipe), path)
    except KeyError:
        return None


def _differing(before: Recipe, after: Recipe) -> list[str]:
    """The paths of the fields in which two recipes differ, but for those that are free to."""
    return [text.partition(" ")[0] for text in differing_fields(as_dict(before), as_dict(after))]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a start of a run does: the recipe in force, and how it came about."""

    recipe: Recipe
    begun: Recipe
    """What ``run.json`` holds, with all that is free to change as it is given now."""
    recorded: list[dict[str, Any]]
    """The changes that ``run.json`` holds, oldest first."""
    new: list[Change]
    """Those that this start asks for."""

    @property
    def changes(self) -> list[dict[str, Any]]:
        """All of them, as JSON."""
        return [*self.recorded, *map(dataclasses.asdict, self.new)]


def plan(
    given: Recipe,
    stored: dict[str, Any] | None,
    run_dir: Path,
    requests: Sequence[str] = (),
    *,
    end_now: bool = False,
) -> Plan:
    """The plan of a start with the recipe ``given``; ``stored`` is what ``run.json`` holds, None without one.

    Raises ``UserError`` for changes that cannot be.
    """
    if stored is None:
        if requests or end_now:
            what = "--end-now" if end_now else f"--change {requests[0]}"
            raise UserError(
                f"{what}: {run_dir} has not begun, so nothing can change in it. Give the fields as options, "
                "as in --stage-c.optimization.learning-rate 1e-5"
            )
        return Plan(recipe=given, begun=given, recorded=[], new=[])
    source = str(run_dir / "run.json")
    begun = in_force({**stored, "changes": []}, given, source)
    recipe, new = asked_for(in_force(stored, given, source), run_dir, requests, end_now=end_now)
    return Plan(recipe=recipe, begun=begun, recorded=list(stored.get("changes", [])), new=new)


def record(planned: Plan, run_dir: Path, stored: dict[str, Any], log: Log) -> None:
    """Writes new changes into ``run.json``, and those that the log lacks into the log.

    Raises ``RunFolderError`` where the checkpoint that a new change begins at is damaged.
    """
    for part in parts_of(planned.recipe):
        seen = reached(run_dir, part)
        if not seen or not any((c.stage, c.images) == (part.name, seen) for c in planned.new):
            continue
        found = newest(run_dir / f"stage_{part.name}" / "checkpoints")
        if found is None or found[1]["images"] != seen:
            raise RunFolderError(
                f"the newest checkpoint of stage {part.name.upper()} is damaged, and a change would begin "
                "there; start once without --change, which goes on from the one before it"
            )
    if planned.changes != stored.get("changes", []):
        write_json(run_dir / "run.json", {**stored, "changes": planned.changes})
    logged = sum(event["event"] == "change" for event in log.events())
    for change in planned.changes[logged:]:
        values = {name: value for name, value in change.items() if name != "time"}
        log.event("change", asked=change["time"], **values)
    for change in planned.new:
        print(f"Changed {change}")

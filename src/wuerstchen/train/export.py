"""A model from the checkpoints of a run, at any moment of it.

A run ends with a model of its own. Before that, and of checkpoints that were kept, this makes one: the stages
until a checkpoint are put together as the run itself would if it ended there.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from wuerstchen.checkpoints.native import Provenance
from wuerstchen.errors import RunFolderError, UserError, UserNotice
from wuerstchen.train.changes import Part, ended_at, in_force, parts_of, reached
from wuerstchen.train.config import Phase, Recipe
from wuerstchen.train.engine.checkpoint import best_of, newest, read_averages, read_whole
from wuerstchen.train.engine.distributed import Processes
from wuerstchen.train.initial_weights import Start, read_start
from wuerstchen.train.recorded_recipe import recipe_of
from wuerstchen.train.report.events import Log
from wuerstchen.train.run import _Run
from wuerstchen.train.run_folder import read_json, read_run
from wuerstchen.train.stages.base import N, Stage

Weights = Literal["average", "raw"]


class NotMeasuredWarning(UserNotice):
    """Something that a run measures at the end of a stage is not known yet."""


def export(
    run_dir: Path,
    target: Path,
    *,
    checkpoint: str = "newest",
    stage: str | None = None,
    weights: Weights = "average",
) -> str:
    """Writes the model of a checkpoint into the new folder ``target``, and says in a line what it is.

    ``checkpoint`` is ``newest``, ``best`` (the lowest validation loss) or a number of images; it is of
    ``stage``, as ``c`` or ``c2``, or else of the last one that has begun. ``weights`` are the averaged ones,
    as at the end of a run, or the ``raw`` ones that are trained; earlier stages are always averaged.

    Raises ``RunFolderError`` for a folder without such a checkpoint, ``CheckpointError`` for a damaged one.
    """
    stored = read_run(run_dir)
    if stored is None:
        raise RunFolderError(f"{run_dir} is no run folder: it has no run.json; give the --run-dir of a run")
    source = str(run_dir / "run.json")
    recipe = in_force(stored, recipe_of(stored["recipe"], source), source)
    part = _part_of(recipe, run_dir, stage)
    path = _checkpoint_of(run_dir / f"stage_{part.name}" / "checkpoints", part, checkpoint)
    images = int(path.name)
    recipe = ended_at(recipe, part.name, images)
    chosen = {part.name: path}
    for earlier in parts_of(recipe)[:-1]:
        found = newest(run_dir / f"stage_{earlier.name}" / "checkpoints")
        if found is None:
            raise RunFolderError(f"{run_dir} has no checkpoint of stage {earlier.name.upper()}")
        chosen[earlier.name] = found[0]
    run = _Export(recipe, run_dir, read_start(recipe), chosen, path if weights == "raw" else None)
    run.fingerprint = stored["data"]
    run.changes = stored.get("changes", [])
    run.train_stages()
    run.write_model(target)
    of = "average" if weights == "average" else "raw weights"
    return f"{target}: stage {part.name.upper()} at image {images:,}, {of}"


def _part_of(recipe: Recipe, run_dir: Path, stage: str | None) -> Part:
    """The part of the run that is exported."""
    begun = [part for part in parts_of(recipe) if reached(run_dir, part)]
    if not begun:
        raise RunFolderError(f"{run_dir} has no checkpoint yet; let it train until it has one")
    if stage is None:
        return begun[-1]
    for part in begun:
        if part.name == stage.lower():
            return part
    raise UserError(
        f"--stage {stage} has no checkpoint in {run_dir}; give {' or '.join(p.name for p in begun)}"
    )


def _checkpoint_of(folder: Path, part: Part, checkpoint: str) -> Path:
    """The folder of a checkpoint, which is whole."""
    if checkpoint == "newest":
        found = newest(folder)
        assert found is not None
        return found[0]
    if checkpoint == "best":
        best = best_of(folder)
        if best is None:
            raise UserError(
                f"--checkpoint best: stage {part.name.upper()} has no validation loss, which needs images "
                "that are held out; give newest, or a number of images"
            )
        checkpoint = str(best["images"])
    there = sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit())
    if not checkpoint.isdecimal() or int(checkpoint) not in there:
        raise UserError(
            f"--checkpoint {checkpoint} is none of stage {part.name.upper()}, which has "
            f"{', '.join(map(str, there))}; give one of these, newest or best"
        )
    path = folder / f"{int(checkpoint):012d}"
    read_whole(path)
    return path


class _Export(_Run):
    """A run whose stages are all as their checkpoints have them. Nothing is trained."""

    makes_updates = False

    def __init__(
        self, recipe: Recipe, run_dir: Path, start: Start, chosen: dict[str, Path], raw: Path | None
    ) -> None:
        """``chosen`` has a checkpoint for each part; of the checkpoint ``raw`` weights are not averaged."""
        log = Log(run_dir / "log.jsonl", writes=False)
        super().__init__(recipe, run_dir, {}, start, Processes(torch.device("cpu")), log)
        self.chosen, self.raw = chosen, raw

    def run_stage(self, stage: Stage, phase: Phase, multiple: int) -> Path:
        return self.chosen[stage.name]

    def averaged(self, checkpoint: Path, network: N, name: str) -> N:
        network.load_state_dict(read_averages(checkpoint, name, raw=checkpoint == self.raw))
        return network.eval().requires_grad_(False)

    def measured_once(
        self, folder: str, measure: Callable[[], dict[str, Any]], known: dict[str, Any]
    ) -> dict[str, Any]:
        path = self.run_dir / folder / "measured.json"
        if path.exists():
            return read_json(path, "let the run go on, which measures it")
        if not known:
            raise RunFolderError(f"{path} is missing; let the run go on, which measures it")
        stage = folder.removeprefix("stage_").upper()
        values = ", ".join(f"{name}={value}" for name, value in known.items())
        warnings.warn(
            f"what is measured when Stage {stage} ends is not known yet, and the model has the recipe's "
            f"{values}",
            NotMeasuredWarning,
            stacklevel=2,
        )
        return known

    def provenance(self, images: int) -> Provenance:
        found = super().provenance(images)
        if self.raw is None:
            return found
        return Provenance(**{**vars(found), "recipe": f"{found.recipe}, not averaged"})

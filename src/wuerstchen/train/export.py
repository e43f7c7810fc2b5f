"""Exports a model from the checkpoints of a run, at any time.

A finished run has a model. For a run that is not finished, or for an earlier checkpoint, this combines the
stages up to that checkpoint into a model, as the run would if it ended there.
"""

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from wuerstchen.checkpoints.native import Provenance, Storage
from wuerstchen.errors import RunFolderError, UserError, UserNotice
from wuerstchen.train.changes import RunPhase, current_recipe, ending_at, images_seen, run_phases
from wuerstchen.train.config import Phase, Recipe
from wuerstchen.train.config_lora import check_result
from wuerstchen.train.engine.checkpoint import best_of, newest, read_averages, read_verified
from wuerstchen.train.engine.distributed import Processes
from wuerstchen.train.initial_weights import InitialWeights, read_start
from wuerstchen.train.recorded_recipe import recipe_of
from wuerstchen.train.report.events import Log
from wuerstchen.train.run import TrainingRun
from wuerstchen.train.run_folder import read_json, read_run
from wuerstchen.train.stage_table import result_of
from wuerstchen.train.stages.base import N, Stage

Weights = Literal["average", "raw"]


class NotMeasuredWarning(UserNotice):
    """A value that a run measures at the end of a stage is not known yet."""


def export(
    run_dir: Path,
    target: Path,
    *,
    checkpoint: str = "newest",
    stage: str | None = None,
    weights: Weights = "average",
    storage: Storage | None = None,
    max_shard_size: str = "",
) -> str:
    """Writes the model of a checkpoint into the new folder ``target``. Returns one line that describes it.

    ``checkpoint`` is ``newest``, ``best`` (the lowest validation loss) or a number of images. It belongs to
    ``stage``, as ``c`` or ``c2``, or by default to the last one that has started. ``weights`` are the
    averaged weights, as at the end of a run, or the ``raw`` trained ones. Earlier stages always use averaged
    weights. ``storage`` and ``max_shard_size`` replace those of the recipe.

    Raises ``RunFolderError`` if there is no such checkpoint, and ``CheckpointError`` if it is damaged.
    """
    stored = read_run(run_dir)
    if stored is None:
        raise RunFolderError(
            f"{run_dir} is not a run folder: it has no run.json. Use the --run-dir of a run."
        )
    source = str(run_dir / "run.json")
    recipe = current_recipe(stored, recipe_of(stored["recipe"], source), source)
    phase = _phase_of(recipe, run_dir, stage)
    path = _checkpoint_of(run_dir / f"stage_{phase.name}" / "checkpoints", phase, checkpoint)
    images = int(path.name)
    recipe = ending_at(recipe, phase.name, images)
    recipe = dataclasses.replace(
        recipe,
        storage=storage or recipe.storage,
        max_shard_size=max_shard_size or recipe.max_shard_size,
    )
    if result_of(recipe):
        check_result(recipe.storage, recipe.max_shard_size)
    chosen = {phase.name: path}
    for earlier in run_phases(recipe)[:-1]:
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
    return f"{target}: stage {phase.name.upper()} at image {images:,}, {of}"


def _phase_of(recipe: Recipe, run_dir: Path, stage: str | None) -> RunPhase:
    """The phase of the run that is exported."""
    started = [phase for phase in run_phases(recipe) if images_seen(run_dir, phase)]
    if not started:
        raise RunFolderError(f"{run_dir} has no checkpoint yet. Train until there is one.")
    if stage is None:
        return started[-1]
    for phase in started:
        if phase.name == stage.lower():
            return phase
    raise UserError(
        f"--stage {stage} has no checkpoint in {run_dir}. Use {' or '.join(p.name for p in started)}."
    )


def _checkpoint_of(folder: Path, phase: RunPhase, checkpoint: str) -> Path:
    """The folder of a checkpoint, after checking that it is complete."""
    if checkpoint == "newest":
        found = newest(folder)
        assert found is not None
        return found[0]
    if checkpoint == "best":
        best = best_of(folder)
        if best is None:
            raise UserError(
                f"--checkpoint best needs a validation loss, and stage {phase.name.upper()} has none, "
                "because no images were held out. Use newest, or a number of images."
            )
        checkpoint = str(best["images"])
    there = sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit())
    if not checkpoint.isdecimal() or int(checkpoint) not in there:
        raise UserError(
            f"stage {phase.name.upper()} has no checkpoint {checkpoint}. Use newest, best or one of "
            f"{', '.join(map(str, there))}."
        )
    path = folder / f"{int(checkpoint):012d}"
    read_verified(path)
    return path


class _Export(TrainingRun):
    """A run that takes the weights of all stages from checkpoints and trains nothing."""

    makes_updates = False

    def __init__(
        self, recipe: Recipe, run_dir: Path, start: InitialWeights, chosen: dict[str, Path], raw: Path | None
    ) -> None:
        """``chosen`` has the checkpoint of each phase. The one that equals ``raw`` gives its raw weights."""
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
            return read_json(path, "Resume the run, which measures it again.")
        if not known:
            raise RunFolderError(f"{path} is missing. Resume the run, which measures it again.")
        stage = folder.removeprefix("stage_").upper()
        values = ", ".join(f"{name}={value}" for name, value in known.items())
        warnings.warn(
            f"values that are measured at the end of Stage {stage} are not known yet. The model has those of "
            f"the recipe: {values}",
            NotMeasuredWarning,
            stacklevel=2,
        )
        return known

    def tensors_once(
        self, name: str, make: Callable[[], dict[str, Tensor]], known: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        return known

    def provenance(self, images: int) -> Provenance:
        found = super().provenance(images)
        if self.raw is None:
            return found
        return Provenance(**{**vars(found), "recipe": f"{found.recipe}, not averaged"})

"""A whole run: the run folder, its stages one after the other, and the model at the end.

DIR/run.json  log.jsonl  lock
DIR/stage_{a,b,b2,a2,c,c2,...}/{checkpoints,previews}/    a folder for each phase that the recipe has
DIR/model/            the averaged weights as a model folder; appears when all stages are done
DIR/lora/             the adapter in place of a model, for a run that trains one
"""

import dataclasses
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wuerstchen.checkpoints.files import new_folder, write_json
from wuerstchen.checkpoints.native import read_tensors, write_parts, write_tensors
from wuerstchen.data.plan import stable_hash
from wuerstchen.data.prepared import PreparedSet
from wuerstchen.data.sources import Source
from wuerstchen.defaults import usual_defaults
from wuerstchen.errors import DataError, RunFolderError
from wuerstchen.models.cascade import CascadeSettings
from wuerstchen.models.text import PromptTooLongWarning
from wuerstchen.pipeline import default_device
from wuerstchen.train.automatic import resolved
from wuerstchen.train.changes import Plan, plan
from wuerstchen.train.config import Phase, Recipe
from wuerstchen.train.engine.distributed import Processes, distributed
from wuerstchen.train.engine.loop import rehearse
from wuerstchen.train.feed.images import Batch, Feed, batches
from wuerstchen.train.initial_weights import read_start, reads_captions, reads_text
from wuerstchen.train.overview import (
    cached_captions,
    cached_images,
    overview,
    print_overview,
    readings,
    with_prompts,
)
from wuerstchen.train.report.announce import RunMonitor, log_tariff, print_cost, print_remaining_cost
from wuerstchen.train.report.events import Log, check_tensorboard
from wuerstchen.train.run_data import (
    fingerprint_of,
    first_converted,
    left_out,
    open_sources,
    repeats_images,
    sets_of,
    verify_sets,
)
from wuerstchen.train.run_folder import (
    ORDER,
    Fingerprints,
    as_user_error,
    check_colours,
    check_order,
    check_run,
    locked,
    read_json,
    read_run,
)
from wuerstchen.train.run_phase import PhaseRunner
from wuerstchen.train.stage_table import continued, maker_of, result_of, trained_kinds, trained_phases
from wuerstchen.train.stages.base import N, Stage, cascade_settings


def train(
    recipe: Recipe,
    run_dir: Path,
    *,
    device: str | None = None,
    accept_changed_data: bool = False,
    monitor: RunMonitor | None = None,
    changes: Sequence[str] = (),
    end_now: bool = False,
) -> Path:
    """Trains a recipe to its end, resuming what the run folder contains. Returns the folder of the model.

    ``monitor`` does not affect the result. ``changes``, such as ``learning_rate=1e-5``, apply from the newest
    checkpoint of a started run on, and ``end_now`` ends it there. Both are recorded (``train/changes.py``).

    Raises ``RunFolderError`` for a folder that is in use or belongs to another recipe, ``DataError`` for data
    that cannot be used, and ``Interrupted`` after a signal.
    """
    monitor = monitor or RunMonitor()
    if monitor.tensorboard:
        check_tensorboard()
    with usual_defaults(), distributed(default_device(device)) as processes:
        stored = read_run(run_dir)
        given = resolved(recipe, processes, stored)
        planned = plan(given, stored, run_dir, changes, end_now=end_now)
        return _train(given, planned, run_dir, processes, accept_changed_data, monitor)


def _train(
    given: Recipe,
    planned: Plan,
    run_dir: Path,
    processes: Processes,
    accept_changed_data: bool,
    monitor: RunMonitor,
) -> Path:
    """Trains the recipe of ``planned``. ``given`` is compared with what the run was started with."""
    recipe, begun = planned.recipe, planned.begun
    for phase in readings(recipe):
        processes.check_batches(phase.stage, phase.images, phase.batch_size, phase.accumulate)
    sources = open_sources(recipe, begun)
    verify_sets([source for source in sources.values() if isinstance(source, PreparedSet)], processes)
    start = read_start(recipe)
    # ``begun`` may have phases whose data are not open: those that --end-now or --change has removed.
    recipe = with_prompts(start.resolved(recipe), sources)
    given = dataclasses.replace(start.resolved(given), preview_prompts=recipe.preview_prompts)
    planned = dataclasses.replace(planned, recipe=recipe)
    with locked(run_dir, processes), warnings.catch_warnings():
        # Captions that are too long for the encoder are cut. A warning for each would hide everything else.
        warnings.simplefilter("ignore", PromptTooLongWarning)
        try:
            log = Log(run_dir / "log.jsonl", processes.is_main, tensorboard=monitor.tensorboard)
            run = TrainingRun(recipe, run_dir, sources, start, processes, log)
            for kind in trained_kinds(recipe):
                if kind.check is not None:
                    kind.check(run)
            run.repeats_images = repeats_images(recipe, sources)
            run.fingerprint = fingerprint_of(begun, sources)
            run.changes = planned.changes
            run.begun = begun
            if not processes.all_equal(run.fingerprint):
                raise DataError(
                    f"rank {processes.rank} has different data in {recipe.data!r} than the other ranks. Make "
                    "the same images and captions available to all of them."
                )
            if processes.is_main:
                now = Fingerprints(
                    data=run.fingerprint, start=start.fingerprint(), sets=sets_of(begun, sources)
                )
                check_run(given, run_dir, now, log, accept_changed_data, planned)
                if run.repeats_images:
                    check_order(run_dir)
            has_profile = partial(first_converted, sources.values())
            check_colours(run_dir, has_profile, log, accept_changed_data, processes)
            wanted = False
            if processes.is_main:
                log_tariff(log, monitor.tariff)
                run.print_data()
                rehearsed = any(event["event"] == "rehearsed" for event in log.events())
                wanted = monitor.rehearse and not rehearsed
            processes.barrier_without_timeout()  # for rank 0, which has looked at the data
            if processes.any_rank(wanted):
                run.rehearse()
            if processes.is_main:
                print_remaining_cost(log)
            return run.train()
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise RunFolderError(
                "a process that loads images was killed, usually because memory ran out. Use fewer --workers "
                "and start the same command again."
            ) from error
        except OSError as error:
            raise as_user_error(error, run_dir) from error


class TrainingRun(PhaseRunner):
    """One start of a run. Stages get it as their ``stages.base.Run``."""

    makes_updates = True

    def train(self) -> Path:
        began = time.monotonic()
        result = result_of(self.recipe)
        target = self.run_dir / (result or "model")
        if self.processes.is_main and self.model_is_current(target):
            print(
                f"{self.run_dir} is already finished: there is nothing left to train. Its "
                f"{'result' if result else 'model'} is in {target}"
            )
        self.train_stages()
        if self.processes.is_main:
            self.write_model_once(target)
        self.processes.barrier_without_timeout()
        if not self.processes.is_main:
            return target
        self.print_skipped()
        for kind in trained_kinds(self.recipe):
            found = sorted(self.run_dir.glob(f"stage_{kind.short}*/previews/*.png"))
            if kind.reads_captions and found:
                print(f"{found[-1]}: images of the preview prompts at the end of Stage {kind.short.upper()}")
        print_cost(self.log)
        self.log.event("end", seconds=round(time.monotonic() - began, 1))
        return target

    def train_stages(self) -> None:
        for kind in trained_kinds(self.recipe):
            kind.train(self)

    def model_is_current(self, target: Path) -> bool:
        """Whether the model exists and was made with the current recipe."""
        stored = read_json(self.run_dir / "run.json")
        made_with = stored.get("model", {"changes": 0})["changes"]
        return self._is_written(target) and made_with == len(self.changes)

    def _is_written(self, target: Path) -> bool:
        return target.is_dir() if result_of(self.recipe) else (target / "model.json").exists()

    def write_model_once(self, target: Path) -> None:
        """Writes the model unless it exists. Replaces the model of an older recipe."""
        if self.model_is_current(target):
            return
        if not self._is_written(target):
            self.write_model(target)
        else:
            new, old = self.run_dir / f"{target.name}.new", self.run_dir / f".{target.name}.old"
            self.write_model(new)
            os.replace(target, old)
            os.replace(new, target)
            shutil.rmtree(old, ignore_errors=True)
        if self.changes:
            path = self.run_dir / "run.json"
            write_json(path, {**read_json(path), "model": {"changes": len(self.changes)}})

    def write_model(self, target: Path) -> None:
        """Writes the model, or the result of a run that adapts one."""
        recipe = self.recipe
        if result_of(recipe):
            with new_folder(target) as partial:
                self.write_results(partial)
            return
        trained = dict.fromkeys(p for phase in trained_phases(recipe) for p in phase.trains)
        images = {part: self._images_of(part) for part in trained}
        provenance = {
            name: self.provenance(images[name]) if name in images else self.start.provenance[name]
            for name in self.parts.networks()
            if maker_of(name) is not None
        }
        if self.processes.is_main and self.start.left_out:
            lost = " and ".join(self.start.left_out)
            print(
                "not included in the model, because incompatible with the trained stages: "
                f"{lost} of {recipe.start_from}"
            )
        networks, settings = self.parts.networks(), self.settings_of_model()
        write_parts(
            settings,
            networks,
            target,
            provenance,
            dict.fromkeys(networks, recipe.storage),
            text_encoder=self.start.text_folder,
            write_extra=self.write_results,
            max_shard_size=recipe.max_shard_size,
        )

    def _images_of(self, part: str) -> int:
        """The images that a part was trained on, including those before a run that trains only later
        phases."""
        found = (p.phase.optimization.images for p in trained_phases(self.recipe) if part in p.trains)
        maker = maker_of(part)
        if maker is None or maker.short not in continued(self.recipe) or part not in self.start.provenance:
            return sum(found)
        return sum(found) + self.start.provenance[part].images

    def write_results(self, folder: Path) -> None:
        """Writes the results of stages that are not networks of the model."""
        for kind in trained_kinds(self.recipe):
            if kind.write is not None:
                kind.write(self, folder)

    def settings_of_model(self, image_size: int | None = None) -> CascadeSettings:
        """The settings of the model so far, optionally with another image size."""
        settings = cascade_settings(self.recipe, self.statistics, self.start.settings)
        return dataclasses.replace(settings, image_size=image_size or settings.image_size)

    def rehearse(self) -> None:
        """Measures the cost of an image in each phase, on networks that are thrown away."""
        with tempfile.TemporaryDirectory() as folder:
            rehearsal = RehearsalRun(
                self.recipe, Path(folder), self.sources, self.start, self.processes, self.log
            )
            rehearsal.train_stages()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def is_new(self, name: str) -> bool:
        """Whether a phase has no checkpoint yet."""
        return not any((self.run_dir / f"stage_{name}" / "checkpoints").glob("[0-9]*"))

    def measured_source(self) -> Source | PreparedSet:
        """The recipe's data, or those of the first phase if no phase reads them."""
        return self.sources.get(self.recipe.data) or next(iter(self.sources.values()))

    def some_images(self, purpose: str, size: int) -> Iterator[Batch]:
        """Training images for a measurement, in an order that depends on its ``purpose``."""
        source = self.measured_source()
        assert not isinstance(source, PreparedSet)
        seed = stable_hash(self.recipe.seed, purpose) >> 1
        feed = Feed(source, seed, size, False, skip=self.recipe.skip)
        return batches(feed, 0, self.recipe.statistics_images, 16, self.recipe.workers)

    @torch.no_grad()
    def measured_once(
        self, folder: str, measure: Callable[[], dict[str, Any]], known: dict[str, Any]
    ) -> dict[str, Any]:
        """The result of ``measure``, stored beside a stage's checkpoints for later starts."""
        path = self.run_dir / folder / "measured.json"
        if self.processes.is_main and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, measure())
        self.processes.barrier_without_timeout()
        again = "Remove it, and it will be measured again."
        found = read_json(path, again)
        if not found:
            raise RunFolderError(f"{path} is empty. {again}")
        return found

    @torch.no_grad()
    def tensors_once(
        self, name: str, make: Callable[[], dict[str, Tensor]], known: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The result of ``make`` on the CPU, stored in the run folder's file ``name`` for later starts."""
        path = self.run_dir / name
        if self.processes.is_main and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors({key: tensor.cpu() for key, tensor in make().items()}, path, {"format": 1})
        self.processes.barrier_without_timeout()
        return read_tensors(path)[0]

    def seed_weights(self, name: str) -> None:
        """Seeds torch's generator for initial weights, by the recipe's seed and this name."""
        torch.manual_seed(stable_hash(self.recipe.seed, name, "weights") >> 1)

    def print_data(self) -> None:
        """Prints an overview of the data and how often each image will be seen, once for a run and its
        data."""
        told = (event for event in self.log.events() if event["event"] == "data")
        if any(event.get("fingerprint") == self.fingerprint for event in told):
            return
        reads = reads_captions(self.recipe) or reads_text(self.recipe, self.start)
        encoder = self.parts.text_encoder or self.parts.decoder_text_encoder
        said, warned = overview(self.recipe, self.sources, encoder if reads else None)
        print_overview(said, warned)
        self.log.event("data", fingerprint=self.fingerprint, said=said, warned=warned)
        for source in self.sources.values():
            for name, reason in left_out(source):
                self.log.event("skipped", stage="data", name=name, reason=reason)

    def print_skipped(self) -> None:
        """Prints the images that could not be used, over all starts of the run."""
        skipped = {e["name"]: e["reason"] for e in self.log.events() if e["event"] == "skipped"}
        for name, reason in sorted(skipped.items()):
            print(f"skipped {name}: {reason}")
        if skipped:
            print(f"{len(skipped)} images could not be used and were skipped")


class RehearsalRun(TrainingRun):
    """A run with a few updates per phase. Its weights are neither kept nor passed on to other stages."""

    def run_stage(self, stage: Stage, phase: Phase, multiple: int) -> Path:
        feed = self.feed(stage, phase, multiple, 0)
        cache = self.image_cache(feed, phase) if self.recipe.prepared_images else None
        cost = rehearse(self.job(stage, feed, self.run_dir / "none"), cache)
        values = {"total": stage.optimization.images, "seconds": cost.seconds, "kwh": cost.kwh}
        self.log.event("rehearsed", stage=stage.name, **values)
        return self.run_dir

    def averaged(self, checkpoint: Path, network: N, name: str) -> N:
        return network.to(self.device).eval().requires_grad_(False)

    def order(self) -> int:
        return ORDER

    def cache_size(self, data: str, size: int, *, captions_only: bool = False) -> int:
        """The size of the largest batch: an update costs the same with more images in the cache."""
        if captions_only:
            return min(cached_captions(self.recipe), self.recipe.stage_few.optimization.batch_size)
        sizes = [r.batch_size for r in readings(self.recipe) if (r.data, r.size) == (data, size)]
        return min(cached_images(self.recipe, data, size), max(sizes))

    def measured_once(
        self, folder: str, measure: Callable[[], dict[str, Any]], known: dict[str, Any]
    ) -> dict[str, Any]:
        return known

    def tensors_once(
        self, name: str, make: Callable[[], dict[str, Tensor]], known: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        return known

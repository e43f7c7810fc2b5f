"""The one training loop. Progress is counted in images, and everything random is a function of it.

So a run that was killed and started again continues exactly as if it had not been interrupted, bit for bit on
the same machine: batches, crops, timesteps and noise follow from the number of images seen, and the networks,
their averages and the optimizers come from the last complete checkpoint.
"""

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import NoReturn

import torch

from wuerstchen.data.plan import stable_hash
from wuerstchen.errors import UserError
from wuerstchen.train.engine.batches import Batches, StepBatch, make_batches
from wuerstchen.train.engine.checkpoint import TrainingState
from wuerstchen.train.engine.checkpoint_writer import Writer
from wuerstchen.train.engine.ema import decay_at
from wuerstchen.train.engine.faults import Faults, NotFinite
from wuerstchen.train.engine.image_cache import Cache
from wuerstchen.train.engine.job import StageJob
from wuerstchen.train.engine.observe import Observer
from wuerstchen.train.engine.optim import learning_rate, set_rate
from wuerstchen.train.engine.saving import CheckpointSaver
from wuerstchen.train.engine.state import make_state, make_step
from wuerstchen.train.engine.stopping import GRACE, Interrupted, StoppedWaiting, StopRequest
from wuerstchen.train.engine.throughput import Gauge
from wuerstchen.train.engine.update import StepRunner, TrainStep, Values
from wuerstchen.train.report.cost import Cost, CostMeter
from wuerstchen.train.report.events import Meter


class Trainer:
    """Trains a stage to its end: ``Trainer(job).train()``."""

    def __init__(self, job: StageJob) -> None:
        """Restores the newest checkpoint of the stage, if there is one. All ranks call it."""
        job.check_batches()
        self.job = job
        self.cost = CostMeter(job.device)
        self.state = make_state(job)
        self.observer = Observer(job)
        self.stop = StopRequest(job.processes.count)

    @property
    def finished(self) -> bool:
        """Whether no update is left."""
        return self.state.images >= self.job.total

    def train(self, cache: Cache | None = None) -> Path:
        """Makes the updates that are left. Returns the last checkpoint.

        Images come from the ``cache`` if there is one, else from the feed. With a ``job.validation`` the loss
        on held-out images is logged at previews and checkpoints. If a stop prevented a preview or
        validation, it is done first. Raises ``Interrupted`` after SIGINT or SIGTERM, after writing a
        checkpoint.
        """
        job, state = self.job, self.state
        seen = {"images": state.images, "total": job.total, "resumed": state.images > 0}
        job.log.event("start", stage=job.stage.name, **seen, device=str(job.device))
        preview, validate = self.observer.resume(state.images)
        with self.stop.caught(), job.naming_memory():
            if preview or validate:
                self.observer.observe(state, saved=True, preview=preview, validate=validate)
            if not self.finished:
                loop = _Loop(self, cache)
                with (
                    contextlib.closing(loop.meter),
                    contextlib.closing(loop.writer),
                    contextlib.closing(loop.runner),
                    contextlib.closing(loop.batches),
                ):
                    loop.run()
        # A signal after the last update: the next stage would not know of it.
        if job.processes.any_rank(self.stop.requested):
            _interrupt(job, state)
        return job.checkpoints / f"{state.images:012d}"


def _interrupt(job: StageJob, state: TrainingState) -> NoReturn:
    """Logs that a signal has stopped the run, and ends it."""
    job.log.event("stopped", stage=job.stage.name, images=state.images)
    raise Interrupted(
        f"stopped at image {state.images:,} of {job.total:,} of stage {job.stage.name.upper()}", state.images
    )


class _Loop:
    """The updates of a stage and what happens between them. All ranks run it in step."""

    def __init__(self, trainer: Trainer, cache: Cache | None) -> None:
        job, state = trainer.job, trainer.state
        self.trainer, self.job, self.state, self.cost = trainer, job, state, trainer.cost
        self.observer, self.stop = trainer.observer, trainer.stop
        self.step = make_step(job, state)
        self.gauge = self.step.gauge = Gauge(job.stage, job.seed, job.settings.autocast, job.device)
        self.batches = make_batches(job, state.images, self.stop, cache)
        self.runner = StepRunner(self.step, job.settings.records)
        self.faults = Faults(self.step, self.batches)
        self.writer = Writer(job.checkpoints, job.processes, state.images)
        self.saving = CheckpointSaver(self.writer, job, state, self.faults, self.cost)
        self.meter = Meter(job.title, state.images, job.total, job.processes.is_main)
        self.values: dict[str, float] = {}
        """Values of the last update for which they were read."""
        self.skipped: list[tuple[str, str]] = []
        self.saved_at = time.monotonic()

    def run(self) -> None:
        """Makes all updates. Raises ``Interrupted`` after a signal."""
        try:
            while not self.trainer.finished:
                self.train_step()
        except NotFinite as fault:
            stage = self.job.stage.name
            self.job.log.event("not finite", stage=stage, images=fault.image, batch=fault.names)
            raise
        except StoppedWaiting:
            if self.job.processes.count == 1:
                self.save_and_interrupt()
            raise UserError(
                f"a signal came while process {self.job.processes.rank} waited for data at image "
                f"{self.state.images:,} of stage {self.job.stage.name.upper()}, and no data came for "
                f"{GRACE:.0f} seconds. Everything after the last checkpoint is lost. Start the same command "
                "again to resume from it."
            ) from None

    def train_step(self) -> None:
        """One update, and everything that is due after it."""
        batch = self.batches.fetch()
        values = update(self.job, self.step, self.runner, self.batches, batch)
        synchronised = self.account(batch, values)
        if self.trainer.finished:
            self.save_final()
        preview, validate = self.observer.due(self.state.images)
        if preview or validate:
            self.observe(preview=preview, validate=validate)
        stop, save = self.stop_or_save(synchronised)
        if stop:
            self.save_and_interrupt()
        if save:
            self.save()

    def account(self, batch: StepBatch, values: Values) -> bool:
        """Counts and logs an update. Returns whether its values were read, for which the host waits."""
        job, state = self.job, self.state
        images, log_every = len(batch.indices) * job.processes.count, job.settings.log_every
        state.updates += 1
        # A recorded update runs in the background unless its values are to be read.
        synchronised = self.batches.waits or not self.values or state.updates % log_every == 0
        if synchronised or state.images + images >= job.total:
            self.values = self.faults.read(values)
            self.values["learning_rate"] = learning_rate(job.stage.optimization, state.images + images)
        state.images += images
        self.meter.update(images, self.values["loss"])
        self.skipped += batch.skipped
        logs = state.updates % log_every == 0 or self.trainer.finished
        if logs or job.processes.count == 1:
            for name, reason in job.processes.all_gather(self.skipped):
                job.log.event("skipped", stage=job.stage.name, name=name, reason=reason)
            self.skipped = []
        if logs:
            self.log_progress()
        return synchronised

    def log_progress(self) -> None:
        rate = round(self.meter.rate(), 2)
        spent = self.cost.spent()
        seen = {"images_per_second": rate, **self.gauge.read(rate / self.job.processes.count), **self.values}
        seen |= {"seconds": round(spent.seconds, 3), "kwh": spent.kwh}
        self.job.log.event("progress", stage=self.job.stage.name, images=self.state.images, **seen)

    def stop_or_save(self, synchronised: bool) -> tuple[bool, bool]:
        """Whether to stop and whether to save a checkpoint, the same on all ranks."""
        save = time.monotonic() - self.saved_at >= self.job.settings.checkpoint_seconds
        save = save or self.saving.milestone_due(self.state.images)
        if self.job.processes.count > 1 and not synchronised:
            self.saving.poll()
            return False, False  # a collective would wait for the device: at an update whose values are read
        flags = self.stop.requested, save, self.saving.failed
        stop, save, failed = self.job.processes.any_rank_each(*flags)
        self.saving.poll()
        if failed:
            self.saving.wait()
        return stop, save and not self.trainer.finished

    def save(self) -> None:
        """Starts a checkpoint, and validates if the last validation is long ago."""
        self.saving.start()
        self.saved_at = time.monotonic()
        validation = self.job.validation
        if self.job.settings.validate_every:
            return
        if self.job.processes.any_rank(validation is not None and validation.due):
            self.observe(preview=False, validate=True)

    def save_final(self) -> None:
        """Writes the last checkpoint, before the last preview, so that a failing preview loses no work."""
        self.saving.start(required=True)
        self.saving.wait(required=True)

    def save_and_interrupt(self) -> NoReturn:
        """Writes a checkpoint of this moment and ends the run."""
        if self.state.images:
            self.save_final()
        _interrupt(self.job, self.state)

    def observe(self, *, preview: bool, validate: bool) -> None:
        """Draws a preview and validates, whichever is asked, after the current checkpoint is on disk."""
        self.saving.start()
        self.saving.wait()
        saved = self.saving.is_complete(self.state.images)
        self.observer.observe(self.state, saved, preview=preview, validate=validate)
        self.saved_at = time.monotonic()


def update(job: StageJob, step: TrainStep, runner: StepRunner, batches: Batches, batch: StepBatch) -> Values:
    """One update of all networks of a stage and of their averages."""
    _set_schedule(job, step, len(batch.indices) * job.processes.count)
    return runner(batches.inputs(batch), batch.indices.to(job.device))


def _set_schedule(job: StageJob, step: TrainStep, images: int) -> None:
    """Sets what changes from update to update: learning rates, the averages' decay, and the seed of dropout.
    The update is on ``images`` images."""
    stage, state = job.stage, step.state
    optimization = stage.optimization
    for name, optimizer in state.optimizers.items():
        peak = dataclasses.replace(
            optimization, learning_rate=stage.rates.get(name, optimization.learning_rate)
        )
        set_rate(optimizer, learning_rate(peak, state.images + images))
    number, every = state.updates + 1, optimization.ema_every
    passed = number % every or every  # updates since the last EMA update
    # The EMA is also updated at the end. Otherwise a stage shorter than ``every`` would end with its initial
    # weights.
    follows = passed == every or state.images + images >= optimization.images
    step.decay = decay_at(number, optimization.ema_decay) ** passed if follows else None
    # With one process, the seed is the same as in versions without multi-process support.
    who = () if job.processes.count == 1 else (job.processes.rank,)
    torch.manual_seed(stable_hash(job.settings.seed, stage.name, "dropout", state.images, *who) >> 1)


def rehearse(job: StageJob, cache: Cache | None) -> Cost:
    """The cost of an image, measured on a few updates of a stage that is then thrown away.

    There must be no checkpoint. The number of updates is fixed, so that all ranks make the same; the energy
    is that of all ranks.
    """
    warm_ups, timed = (5, 20) if job.device.type == "cuda" else (1, 3)
    job.check_batches()
    state = make_state(job)
    step = make_step(job, state)
    meter, images = CostMeter(job.device), 0
    with (
        job.naming_memory(),
        contextlib.closing(StepRunner(step, job.settings.records)) as runner,
        contextlib.closing(make_batches(job, 0, StopRequest(job.processes.count), cache)) as batches,
    ):
        while state.updates < warm_ups + timed and state.images < job.total:
            batch = batches.fetch()
            update(job, step, runner, batches, batch)
            state.updates += 1
            state.images += len(batch.indices) * job.processes.count
            images += len(batch.indices) * job.processes.count
            if state.updates == warm_ups and state.images < job.total:
                _wait_for_device(job.device)
                meter, images = CostMeter(job.device), 0
        _wait_for_device(job.device)
    spent = meter.spent()
    if spent.kwh is not None:
        spent = dataclasses.replace(spent, kwh=job.processes.all_reduce_sum(spent.kwh))
    return spent * (1 / images)


def _wait_for_device(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

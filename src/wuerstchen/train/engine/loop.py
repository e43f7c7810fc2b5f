"""The one training loop. Progress is counted in images, and everything random is a function of it.

So a run that was killed and started again does what the unbroken run would have done, bit for bit on the
same machine: batches, crops, timesteps and noise follow from the number of images seen, and the networks,
their averages and the optimizers come from the last whole checkpoint.
"""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from wuerstchen.data.plan import items_at, stable_hash
from wuerstchen.errors import UserError, out_of_memory_named
from wuerstchen.train.engine import checkpoint
from wuerstchen.train.engine.batch_norm import convert_batch_norm
from wuerstchen.train.engine.checkpoint_writer import Writer
from wuerstchen.train.engine.distributed import Processes
from wuerstchen.train.engine.ema import decay_at, make_average
from wuerstchen.train.engine.faults import NotFinite, names_of_batch, read_values, refuse_fault
from wuerstchen.train.engine.image_cache import ImageCache
from wuerstchen.train.engine.loss_scale import LossScale
from wuerstchen.train.engine.observe import Observer
from wuerstchen.train.engine.optim import learning_rate, make_optimizer, set_rate
from wuerstchen.train.engine.saving import Saving
from wuerstchen.train.engine.sharding import empty_copy, is_sharded, shard
from wuerstchen.train.engine.stopping import GRACE, Interrupted, StoppedWaiting, StopRequest
from wuerstchen.train.engine.throughput import Gauge
from wuerstchen.train.engine.update import (
    StepRunner,
    TrainStep,
    Values,
    compile_regions,
    make_bf16_weights,
    recompute_blocks,
)
from wuerstchen.train.engine.validation import Validation
from wuerstchen.train.feed.images import Feed, batches
from wuerstchen.train.feed.prepared import PreparedFeed
from wuerstchen.train.report.cost import Cost, CostMeter
from wuerstchen.train.report.events import Log, Meter
from wuerstchen.train.stages.base import Stage, UsesAverages, autocast, inputs_of


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the loop runs, as opposed to what it computes.

    ``seed`` and ``autocast`` change results; ``compiles`` and ``records`` change their rounding.
    """

    seed: int
    autocast: torch.dtype | None
    """What autocast computes in, over fp32 weights; None without autocast. With fp16 losses are scaled."""
    decays_all_axes: bool = False
    """Whether weight decay is that of earlier versions (``make_optimizer``)."""
    compiles: bool = False
    records: bool = False
    """Whether updates are recorded as CUDA graphs."""
    shards: bool = False
    """Whether large networks are sharded over the processes."""
    recomputes: bool = False
    """Whether blocks compute again what they would have kept for their gradients."""
    workers: int
    checkpoint_seconds: float
    log_every: int
    preview_every: int
    preview_size: int
    previews: int
    keep_every: int = 0
    """Images between checkpoints that are never removed; 0 for none."""


@dataclass
class _Fed:
    """What one update has done."""

    images: int
    skipped: list[tuple[str, str]]
    values: Values


def run_stage(
    stage: Stage,
    feed: Feed | PreparedFeed,
    folder: Path,
    settings: Settings,
    device: torch.device,
    log: Log,
    header: dict[str, Any],
    cache: Callable[[], ImageCache] | None = None,
    processes: Processes | None = None,
    validation: Validation | None = None,
    goes_on: Callable[[int], None] | None = None,
) -> Path:
    """Trains a stage to its end, from the last checkpoint in ``folder`` if there is one.

    Pictures come from the ``cache`` where there is one, else from the feed; it is made only if there is an
    update left. ``goes_on`` is told the number of images that training goes on from. With a ``validation``
    the loss on held-out pictures is logged at previews and at checkpoints. A preview or validation that a
    stop has prevented is made first. Returns the last checkpoint.
    Raises ``Interrupted`` after SIGINT or SIGTERM, with a checkpoint written.
    """
    processes = processes or Processes(device)
    _check_batches(stage, processes)
    cost = CostMeter(device)
    state, resumed = _prepare(stage, folder / "checkpoints", settings, processes)
    total = stage.optimization.images
    if goes_on is not None:
        goes_on(state.images)
    composed = cache() if cache is not None and state.images < total else None
    log.event(
        "start", stage=stage.name, images=state.images, total=total, resumed=resumed, device=str(device)
    )
    observer = Observer(
        stage,
        feed,
        folder,
        log,
        processes,
        validation,
        every=settings.preview_every,
        columns=settings.previews,
        size=settings.preview_size,
    )
    preview, validate = observer.begin(state.images)
    stop = StopRequest(processes.count)
    with stop.caught(), _memory_named(stage, feed):
        if preview or validate:
            observer.look(state, True, preview=preview, validate=validate)
        if state.images < total:
            step = _step(stage, state, settings, processes)
            step.gauge = Gauge(stage, step.seed, settings.autocast, device)
            step.names = lambda first: names_of_batch(step, feed, composed, first)
            writer = Writer(folder / "checkpoints", processes, state.images)
            saving = Saving(
                writer,
                state,
                {**header, "stage": stage.name},
                log,
                cost,
                lambda: refuse_fault(step),
                resumed=resumed,
                milestones=settings.keep_every,
            )
            meter = Meter(f"Stage {stage.name.upper()}", state.images, total, processes.is_main)
            updates = (
                _fed_updates(step, feed, settings, stop)
                if composed is None
                else _cached_updates(step, composed, settings)
            )
            loop = _Loop(step, settings, log, cost, saving, observer, meter, stop, waits=cache is None)
            with contextlib.closing(meter), contextlib.closing(writer), contextlib.closing(updates):
                loop.run(updates)
    # Of a signal that came after the last update, the next stage would know nothing.
    if processes.any_rank(stop.requested):
        _stopped(log, state, stage)
    return folder / "checkpoints" / f"{state.images:012d}"


def _stopped(log: Log, state: checkpoint.TrainingState, stage: Stage) -> NoReturn:
    """Notes that a signal has stopped the run, and ends it."""
    log.event("stopped", stage=stage.name, images=state.images)
    raise Interrupted(
        f"stopped at image {state.images:,} of {stage.optimization.images:,} of stage {stage.name.upper()}",
        state.images,
    )


@dataclass
class _Loop:
    """What happens at the updates of a stage and between them."""

    step: TrainStep
    settings: Settings
    log: Log
    cost: CostMeter
    saving: Saving
    observer: Observer
    meter: Meter
    stop: StopRequest
    waits: bool
    """Whether updates wait for pictures, and so for the device."""
    values: dict[str, float] = dataclasses.field(default_factory=dict)
    """Of the last update whose values were read."""
    skipped: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def run(self, updates: Iterator[_Fed]) -> None:
        """Makes all updates. Raises ``Interrupted`` after a signal."""
        state, saved = self.step.state, time.monotonic()
        total, processes = self.step.stage.optimization.images, self.step.processes
        try:
            for fed in updates:
                reads = self._account(fed)
                if state.images >= total:  # before the last preview: whatever befalls it costs no work
                    self.saving.begin(must=True)
                    self.saving.wait(must=True)
                if self.observer.due(state.images):
                    self._look(preview=True)
                    saved = time.monotonic()
                due = time.monotonic() - saved >= self.settings.checkpoint_seconds
                due = due or self.saving.milestone_due(state.images)
                # Where nobody waits for the device, only one process can decide by itself.
                asked = (self.stop.requested, due, self.saving.failed)
                stops, due, failed = processes.any_rank_each(*asked) if reads else asked
                self.saving.note()
                if processes.count > 1 and not reads:
                    continue
                if failed:
                    self.saving.wait()
                if stops:
                    self._stop()
                if due and state.images < total:
                    self.saving.begin()
                    saved = time.monotonic()
                    validation = self.observer.validation
                    if processes.any_rank(validation is not None and validation.due):
                        self._look(preview=False)
        except NotFinite as fault:
            name = self.step.stage.name
            self.log.event("not finite", stage=name, images=fault.image, batch=fault.names)
            raise
        except StoppedWaiting:
            if processes.count == 1:
                self._stop()
            raise UserError(
                f"a signal came while process {processes.rank} waited for data at image {state.images:,} of "
                f"stage {self.step.stage.name.upper()}, and no data came for {GRACE:.0f} seconds. What "
                "follows the last checkpoint is lost; start the same command again to go on from it"
            ) from None

    def _account(self, fed: _Fed) -> bool:
        """Counts and logs an update. Returns whether the device was waited for."""
        step, state, processes = self.step, self.step.state, self.step.processes
        optimization, total = step.stage.optimization, step.stage.optimization.images
        state.updates += 1
        # A recorded update is not waited for, unless its values are to be read.
        reads = self.waits or not self.values or state.updates % self.settings.log_every == 0
        if reads or state.images + fed.images >= total:
            self.values = read_values(fed.values, step)
            self.values["learning_rate"] = learning_rate(optimization, state.images + fed.images)
        state.images += fed.images
        self.meter.update(fed.images, self.values["loss"])
        self.skipped += fed.skipped
        logs = state.updates % self.settings.log_every == 0 or state.images >= total
        if logs or processes.count == 1:
            for name, reason in processes.all_gather(self.skipped):
                self.log.event("skipped", stage=step.stage.name, name=name, reason=reason)
            self.skipped = []
        if logs:
            rate = round(self.meter.rate(), 2)
            spent = self.cost.spent()
            assert step.gauge is not None
            seen = {"images_per_second": rate, **step.gauge.read(rate / processes.count), **self.values}
            seen |= {"seconds": round(spent.seconds, 3), "kwh": spent.kwh}
            self.log.event("progress", stage=step.stage.name, images=state.images, **seen)
        return reads

    def _look(self, *, preview: bool) -> None:
        """A validation, and a preview if wanted, with a checkpoint of this moment on disk before them."""
        images = self.step.state.images
        self.saving.begin()
        self.saving.wait()
        self.observer.look(self.step.state, self.saving.is_whole(images), preview=preview)

    def _stop(self) -> NoReturn:
        if self.step.state.images:
            self.saving.begin(must=True)
            self.saving.wait(must=True)
        _stopped(self.log, self.step.state, self.step.stage)


def rehearse(
    stage: Stage,
    feed: Feed | PreparedFeed,
    folder: Path,
    settings: Settings,
    device: torch.device,
    cache: ImageCache | None,
    processes: Processes | None = None,
) -> Cost:
    """What an image costs, by a few updates of a stage that is then thrown away. ``folder`` is empty.

    The number of updates is fixed, so that all processes of a run make the same; energy is that of all.
    """
    warming, timed = (5, 20) if device.type == "cuda" else (1, 3)
    processes = processes or Processes(device)
    _check_batches(stage, processes)
    state, _ = _prepare(stage, folder, settings, processes)
    step = _step(stage, state, settings, processes)
    updates = (
        _fed_updates(step, feed, settings, StopRequest(processes.count))
        if cache is None
        else _cached_updates(step, cache, settings)
    )
    meter, images = CostMeter(device), 0
    with contextlib.closing(updates), _memory_named(stage, feed):
        for fed in itertools.islice(updates, warming + timed):
            state.updates += 1
            state.images += fed.images
            images += fed.images
            if state.updates == warming and state.images < stage.optimization.images:
                _finished(device)
                meter, images = CostMeter(device), 0
        _finished(device)
    spent = meter.spent()
    if spent.kwh is not None:
        spent = dataclasses.replace(spent, kwh=processes.all_reduce_sum(spent.kwh))
    return spent * (1 / images)


def _check_batches(stage: Stage, processes: Processes) -> None:
    optimization = stage.optimization
    processes.check_batches(stage.name, optimization.images, optimization.batch_size, optimization.accumulate)


def _finished(device: torch.device) -> None:
    """Waits for what the device has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _prepare(
    stage: Stage, folder: Path, settings: Settings, processes: Processes
) -> tuple[checkpoint.TrainingState, bool]:
    """The stage's state at its beginning, or as the newest whole checkpoint holds it."""
    for network in stage.networks.values():
        network.to(processes.device).train()
        if processes.count > 1:
            convert_batch_norm(network)
    averages = {name: make_average(stage.networks[name]) for name in stage.averaged}
    whole: dict[str, nn.Module] = {}
    if settings.shards:
        whole = {name: empty_copy(average) for name, average in averages.items()}
        for network in (*stage.networks.values(), *averages.values()):
            shard(network, processes)
        whole = {name: empty for name, empty in whole.items() if is_sharded(averages[name])}
    state = checkpoint.TrainingState(
        networks=stage.networks,
        averages=averages,
        whole=whole,
        optimizers={
            name: make_optimizer(
                network, stage.optimization, stage.rate_scales, decays_all_axes=settings.decays_all_axes
            )
            for name, network in stage.networks.items()
        },
    )
    if settings.autocast is torch.float16:
        for optimizer in state.optimizers.values():
            optimizer.loss_scale = LossScale(processes.device)
    found = checkpoint.newest_of_all(folder, processes)
    if found is not None:
        checkpoint.restore(state, *found, processes)
    if isinstance(stage, UsesAverages):
        stage.use_averages(state.averages)
    for network in stage.networks.values() if state.images < stage.optimization.images else ():
        if settings.recomputes:
            recompute_blocks(network)
        if settings.compiles:
            compile_regions(network)
    return state, found is not None


def _step(
    stage: Stage, state: checkpoint.TrainingState, settings: Settings, processes: Processes
) -> TrainStep:
    """What makes the updates of a stage."""
    with_copies = settings.records and settings.autocast is torch.bfloat16
    copies = make_bf16_weights(stage, state) if with_copies else {}
    seed = stable_hash(settings.seed, stage.name) >> 1
    return TrainStep(stage, state, seed, settings.autocast, processes, copies)


def _begin(step: TrainStep, settings: Settings, images: int) -> None:
    """Sets what changes from update to update: rates, the averages' decay, and the seed of dropout."""
    stage, state = step.stage, step.state
    optimization = stage.optimization
    for name, optimizer in state.optimizers.items():
        peak = dataclasses.replace(
            optimization, learning_rate=stage.rates.get(name, optimization.learning_rate)
        )
        set_rate(optimizer, learning_rate(peak, state.images + images))
    number, every = state.updates + 1, optimization.ema_every
    passed = number % every or every  # updates since the average last followed
    # It follows the last one: a stage shorter than ``every`` would end with the weights that it began with.
    follows = passed == every or state.images + images >= optimization.images
    step.decay = decay_at(number, optimization.ema_decay) ** passed if follows else None
    # Alone a process has the seed that it had before there could be several.
    who = () if step.processes.count == 1 else (step.processes.rank,)
    torch.manual_seed(stable_hash(settings.seed, stage.name, "dropout", state.images, *who) >> 1)


def _fed_updates(
    step: TrainStep, feed: Feed | PreparedFeed, settings: Settings, stop: StopRequest
) -> Generator[_Fed, None, None]:
    """Updates on pictures composed on the way. ``stop`` may end the wait for them."""
    optimization, device = step.stage.optimization, step.device
    start, total = step.state.images, optimization.images
    part = step.processes.rank_slice
    loaded = batches(feed, start, total, optimization.batch_size, settings.workers, part)
    with contextlib.closing(StepRunner(step, settings.records)) as update, contextlib.closing(loaded):
        while True:
            with stop.waiting():
                batch = next(loaded, None)
            if batch is None:
                return
            images = len(batch.indices) * step.processes.count
            _begin(step, settings, images)
            with (
                torch.no_grad(),
                autocast(device, settings.autocast),
            ):
                inputs = inputs_of(step.stage, batch, device)
            yield _Fed(images, batch.skipped, update(inputs, batch.indices.to(device)))


def _cached_updates(step: TrainStep, cache: ImageCache, settings: Settings) -> Generator[_Fed, None, None]:
    """Updates on pictures of the cache, in an order that is a function of the image number."""
    optimization = step.stage.optimization
    inputs = cache.prepare(step.stage, settings.autocast)
    with contextlib.closing(StepRunner(step, settings.records)) as update:
        for first in range(step.state.images, optimization.images, optimization.batch_size):
            numbers = range(first, min(first + optimization.batch_size, optimization.images))
            _begin(step, settings, len(numbers))
            own = step.processes.rank_slice(numbers)
            rows = torch.tensor(items_at(own, len(cache), step.seed), dtype=torch.int64, device="cpu")
            rows = rows.to(step.device)
            indices = torch.arange(own.start, own.stop, device="cpu").to(step.device)
            chosen = {name: tensor[rows] for name, tensor in inputs.items()}
            yield _Fed(len(numbers), [], update(chosen, indices))


@contextlib.contextmanager
def _memory_named(stage: Stage, feed: Feed | PreparedFeed) -> Iterator[None]:
    with out_of_memory_named(f"batch_size={stage.optimization.batch_size} at {feed.size}x{feed.size} pixels"):
        yield

"""The one training loop. Progress is counted in images, and everything random is a function of it.

So a run that was killed and started again does what the unbroken run would have done, bit for bit on the
same machine: batches, crops, timesteps and noise follow from the number of images seen, and the networks,
their averages and the optimizers come from the last whole checkpoint.
"""

import contextlib
import dataclasses
import itertools
import math
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from PIL import Image
from torch import nn

from wuerstchen.data.plan import items_at, stable_hash
from wuerstchen.errors import UserError, out_of_memory_named
from wuerstchen.images import grid, save_png
from wuerstchen.train import snapshot
from wuerstchen.train.bank import Bank
from wuerstchen.train.cost import Cost, CostMeter
from wuerstchen.train.ema import decay_at, make_average
from wuerstchen.train.feed import Feed, batches
from wuerstchen.train.optim import learning_rate, make_optimizer, set_rate
from wuerstchen.train.parallel import (
    Processes,
    empty_copy,
    gather,
    is_sharded,
    shard,
    share_batch_statistics,
)
from wuerstchen.train.prepared_feed import PreparedFeed
from wuerstchen.train.stages import Stage, inputs_of
from wuerstchen.train.step import Step, Updates, Values, compile_regions, half_copies, recompute_blocks
from wuerstchen.train.throughput import Gauge
from wuerstchen.train.track import Log, Meter
from wuerstchen.train.validate import Validation


class Interrupted(Exception):
    """Training was asked to stop; a checkpoint of that moment is on disk."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the loop runs, as opposed to what it computes.

    ``seed`` and ``autocast`` change results; ``compiles`` and ``records`` change their rounding.
    """

    seed: int
    autocast: bool
    """bf16 where it is safe, over fp32 weights."""
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
    bank: Bank | None = None,
    processes: Processes | None = None,
    validation: Validation | None = None,
) -> Path:
    """Trains a stage to its end, from the last checkpoint in ``folder`` if there is one.

    Pictures come from the ``bank`` where there is one, else from the feed. With a ``validation`` the loss on
    held-out pictures is logged at previews and at checkpoints. Returns the last checkpoint.
    Raises ``Interrupted`` after SIGINT or SIGTERM, with a checkpoint written.
    """
    processes = processes or Processes(device)
    _check_batches(stage, processes)
    cost = CostMeter(device)
    state, resumed = _prepare(stage, folder / "checkpoints", settings, processes)
    total = stage.optimization.images
    log.event(
        "start", stage=stage.name, images=state.images, total=total, resumed=resumed, device=str(device)
    )
    if state.images >= total:
        return folder / "checkpoints" / f"{state.images:012d}"

    writer = snapshot.Writer(folder / "checkpoints", processes, state.images)
    begun: dict[str, Any] = {}

    def checkpoint() -> None:
        """Begins a checkpoint of this moment, when the one before is whole."""
        whole()
        _refuse_fault(step)
        writer.begin(state, {**header, "stage": stage.name})
        spent = cost.spent()
        kwh = None if spent.kwh is None else processes.total(spent.kwh)
        begun.update(stage=stage.name, images=state.images, seconds=spent.seconds, kwh=kwh)

    def whole() -> Path:
        """The last checkpoint that was begun, when it is whole."""
        path = writer.wait()
        said()
        return path

    def said() -> None:
        """Notes a checkpoint when it is whole."""
        if begun and not writer.busy and not writer.failed:
            log.event("checkpoint", **begun)
            begun.clear()

    step = _step(stage, state, settings, processes)
    step.gauge = gauge = Gauge(stage, step.seed, settings.autocast, device)
    updates = _fed_updates(step, feed, settings) if bank is None else _bank_updates(step, bank, settings)
    meter = Meter(f"Stage {stage.name.upper()}", state.images, total, processes.leads)
    saved = time.monotonic()
    next_preview = _next_multiple(state.images, settings.preview_every, total)
    final: Path | None = None
    values: dict[str, float] = {}
    with (
        _stop_request() as stop_requested,
        contextlib.closing(meter),
        contextlib.closing(writer),
        contextlib.closing(updates),
        _memory_named(stage, feed),
    ):
        skipped: list[tuple[str, str]] = []
        for fed in updates:
            state.updates += 1
            # A recorded update is not waited for, unless its values are to be read.
            reads = bank is None or not values or state.updates % settings.log_every == 0
            if reads or state.images + fed.images >= total:
                values = _read(fed.values, step)
                values["learning_rate"] = learning_rate(stage.optimization, state.images + fed.images)
            state.images += fed.images
            meter.update(fed.images, values["loss"])
            skipped += fed.skipped
            logs = state.updates % settings.log_every == 0 or state.images >= total
            if logs or processes.count == 1:
                for name, reason in processes.gathered(skipped):
                    log.event("skipped", stage=stage.name, name=name, reason=reason)
                skipped = []
            if logs:
                rate = round(meter.rate(), 2)
                spent = cost.spent()
                seen = {"images_per_second": rate, **gauge.read(rate / processes.count), **values}
                seen |= {"seconds": round(spent.seconds, 3), "kwh": spent.kwh}
                log.event("progress", stage=stage.name, images=state.images, **seen)
            if state.images >= total:  # before the last preview: whatever befalls it costs no work
                checkpoint()
                final = whole()
            if state.images >= next_preview:
                averages = _gathered(state, processes)
                if processes.leads:
                    _preview(stage, state.images, averages, feed, folder, settings, device)
                log.event("preview", stage=stage.name, images=state.images)
                if validation is not None and processes.leads:
                    found = validation(averages)
                    log.event("validation", stage=stage.name, images=state.images, **found)
                del averages
                next_preview = _next_multiple(state.images, settings.preview_every, total)
            due = time.monotonic() - saved >= settings.checkpoint_seconds
            # Where nobody waits for the device, only one process can decide by itself.
            asked = (stop_requested(), due, writer.failed)
            stops, due, failed = processes.agreed(*asked) if reads else asked
            said()
            if processes.count > 1 and not reads:
                continue
            if failed:
                whole()  # raises what went wrong
            if stops:
                if final is None:
                    checkpoint()
                    whole()
                log.event("stopped", stage=stage.name, images=state.images)
                raise Interrupted(
                    f"stopped at image {state.images:,} of {total:,} of stage {stage.name.upper()}"
                )
            if due and state.images < total:
                checkpoint()
                saved = time.monotonic()
                (wanted,) = processes.agreed(validation is not None and validation.due)
                averages = _gathered(state, processes) if wanted else {}
                if validation is not None and wanted and processes.leads:
                    found = validation(averages)
                    log.event("validation", stage=stage.name, images=state.images, **found)
    assert final is not None
    return final


def rehearse(
    stage: Stage,
    feed: Feed | PreparedFeed,
    folder: Path,
    settings: Settings,
    device: torch.device,
    bank: Bank | None,
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
    updates = _fed_updates(step, feed, settings) if bank is None else _bank_updates(step, bank, settings)
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
        spent = dataclasses.replace(spent, kwh=processes.total(spent.kwh))
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
) -> tuple[snapshot.TrainingState, bool]:
    """The stage's state at its beginning, or as the newest whole checkpoint holds it."""
    for network in stage.networks.values():
        network.to(processes.device).train()
        if processes.count > 1:
            share_batch_statistics(network)
    averages = {name: make_average(stage.networks[name]) for name in stage.averaged}
    whole: dict[str, nn.Module] = {}
    if settings.shards:
        whole = {name: empty_copy(average) for name, average in averages.items()}
        for network in (*stage.networks.values(), *averages.values()):
            shard(network, processes)
        whole = {name: empty for name, empty in whole.items() if is_sharded(averages[name])}
    state = snapshot.TrainingState(
        networks=stage.networks,
        averages=averages,
        whole=whole,
        optimizers={
            name: make_optimizer(network, stage.optimization, stage.rate_scales)
            for name, network in stage.networks.items()
        },
    )
    found = snapshot.newest_of_all(folder, processes)
    if found is not None:
        snapshot.restore(state, *found)
    for network in stage.networks.values():
        if settings.recomputes:
            recompute_blocks(network)
        if settings.compiles:
            compile_regions(network)
    return state, found is not None


def _step(stage: Stage, state: snapshot.TrainingState, settings: Settings, processes: Processes) -> Step:
    """What makes the updates of a stage."""
    copies = half_copies(stage, state) if settings.records and settings.autocast else {}
    seed = stable_hash(settings.seed, stage.name) >> 1
    return Step(stage, state, seed, settings.autocast, processes, copies)


def _begin(step: Step, settings: Settings, images: int) -> None:
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


def _fed_updates(step: Step, feed: Feed | PreparedFeed, settings: Settings) -> Generator[_Fed, None, None]:
    """Updates on pictures composed on the way."""
    optimization, device = step.stage.optimization, step.device
    start, total = step.state.images, optimization.images
    part = step.processes.share
    with contextlib.closing(Updates(step, settings.records)) as update:
        for batch in batches(feed, start, total, optimization.batch_size, settings.workers, part):
            images = len(batch.indices) * step.processes.count
            _begin(step, settings, images)
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=settings.autocast):
                inputs = inputs_of(step.stage, batch, device)
            yield _Fed(images, batch.skipped, update(inputs, batch.indices.to(device)))


def _bank_updates(step: Step, bank: Bank, settings: Settings) -> Generator[_Fed, None, None]:
    """Updates on pictures of the bank, in an order that is a function of the image number."""
    optimization = step.stage.optimization
    inputs = bank.prepare(step.stage, settings.autocast)
    with contextlib.closing(Updates(step, settings.records)) as update:
        for first in range(step.state.images, optimization.images, optimization.batch_size):
            numbers = range(first, min(first + optimization.batch_size, optimization.images))
            _begin(step, settings, len(numbers))
            own = step.processes.share(numbers)
            rows = torch.tensor(items_at(own, len(bank), step.seed)).to(step.device)
            indices = torch.arange(own.start, own.stop).to(step.device)
            chosen = {name: tensor[rows] for name, tensor in inputs.items()}
            yield _Fed(len(numbers), [], update(chosen, indices))


def _read(values: Values, step: Step) -> dict[str, float]:
    """The values of an update on the host. Raises ``UserError`` where one was not finite, or says to stop."""
    stacked = torch.stack([v.float() for v in values.values()])
    step.processes.average_([stacked])
    read = dict(zip(values, stacked.tolist(), strict=True))
    _refuse_fault(step, read)
    step.stage.check(read)
    return read


def _refuse_fault(step: Step, values: dict[str, float] | None = None) -> None:
    """Raises ``UserError`` if a loss or gradient was not finite in an update until now; ``values`` are those
    of the last. What passed through networks then may be in their statistics, so it must not be stored."""
    image = int(step.fault)
    if image < 0:
        return
    what = "a loss or gradient was not finite"
    for name, value in (values or {}).items():
        if name.startswith(("loss", "gradient")) and not math.isfinite(value):
            named = f"loss_{step.stage.averaged[0]}" if name == "loss" else name
            what = f"the {named.replace('_', ' of ', 1)} is {value}"
            break
    raise UserError(
        f"{what} at image {image:,} of stage {step.stage.name.upper()}, so the weights were left as they "
        "were; use a lower learning rate in another --run-dir"
    )


@contextlib.contextmanager
def _memory_named(stage: Stage, feed: Feed | PreparedFeed) -> Iterator[None]:
    with out_of_memory_named(f"batch_size={stage.optimization.batch_size} at {feed.size}x{feed.size} pixels"):
        yield


def _gathered(state: snapshot.TrainingState, processes: Processes) -> dict[str, nn.Module]:
    """The averages to be used by the first process, those that are sharded as whole copies.

    All processes take part; the first has the memory for them until they are dropped.
    """
    return {
        name: gather(average, state.whole[name], processes) if name in state.whole else average
        for name, average in state.averages.items()
    }


@torch.no_grad()
def _preview(
    stage: Stage,
    seen: int,
    averages: dict[str, nn.Module],
    feed: Feed | PreparedFeed,
    folder: Path,
    settings: Settings,
    device: torch.device,
) -> None:
    """Draws the preview grid with the averaged weights. Leaves no trace in the random state of training."""
    pixels = feed.shown(settings.previews, settings.preview_size).to(device)
    images: list[Image.Image] = stage.preview(averages, pixels, device)
    if not images:
        return
    path = folder / "previews" / f"{seen:012d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = settings.previews if len(images) % settings.previews == 0 else math.isqrt(len(images) - 1) + 1
    save_png(grid(images, columns=columns), path, {"stage": stage.name, "images": seen})


def _next_multiple(images: int, every: int, total: int) -> int:
    return total if every == 0 else min((images // every + 1) * every, total)


@contextlib.contextmanager
def _stop_request() -> Iterator[Callable[[], bool]]:
    """Turns the first SIGINT or SIGTERM into a request that the loop answers at the end of the update.

    A second Ctrl-C has its ordinary effect. Signals can only be caught in the main thread.
    """
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested.is_set
        return

    def request(number: int, frame: FrameType | None) -> None:
        requested.set()
        if number == signal.SIGINT:  # torchrun repeats the SIGTERM that a scheduler has sent to all
            signal.signal(number, previous[number])

    previous: dict[int, Any] = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, request)
    try:
        yield requested.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

"""The one training loop. Progress is counted in images, and everything random is a function of it.

So a run that was killed and started again does what the unbroken run would have done, bit for bit on the
same machine: batches, crops, timesteps and noise follow from the number of images seen, and the networks,
their averages and the optimizers come from the last whole checkpoint.
"""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from PIL import Image

from wuerstchen.data.plan import stable_hash
from wuerstchen.errors import UserError, out_of_memory_named
from wuerstchen.images import grid, save_png
from wuerstchen.train import snapshot
from wuerstchen.train.ema import decay_at, make_average, update_average
from wuerstchen.train.feed import Batch, Feed, batches
from wuerstchen.train.optim import learning_rate, make_optimizer, update
from wuerstchen.train.random import ImageRandom
from wuerstchen.train.stages import Stage
from wuerstchen.train.track import Log, Meter


class Interrupted(Exception):
    """Training was asked to stop; a checkpoint of that moment is on disk."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the loop runs, as opposed to what it computes. Only ``seed`` and ``autocast`` change results."""

    seed: int
    autocast: bool
    """bf16 where it is safe, over fp32 weights."""
    workers: int
    checkpoint_seconds: float
    log_every: int
    preview_every: int
    preview_size: int
    previews: int


def run_stage(
    stage: Stage,
    feed: Feed,
    folder: Path,
    settings: Settings,
    device: torch.device,
    log: Log,
    header: dict[str, Any],
) -> Path:
    """Trains a stage to its end, from the last checkpoint in ``folder`` if there is one.

    Returns the last checkpoint. Raises ``Interrupted`` after SIGINT or SIGTERM, with a checkpoint written.
    """
    state, resumed = _prepare(stage, folder / "checkpoints", device)
    total, batch_size = stage.optimization.images, stage.optimization.batch_size
    log.event(
        "start", stage=stage.name, images=state.images, total=total, resumed=resumed, device=str(device)
    )
    if state.images >= total:
        return folder / "checkpoints" / f"{state.images:012d}"

    def checkpoint() -> Path:
        path = snapshot.save(state, folder / "checkpoints", {**header, "stage": stage.name})
        log.event("checkpoint", stage=stage.name, images=state.images)
        return path

    meter = Meter(f"Stage {stage.name.upper()}", state.images, total)
    saved = time.monotonic()
    next_preview = _next_multiple(state.images, settings.preview_every, total)
    final: Path | None = None
    with _stop_request() as stop_requested, contextlib.closing(meter):
        for batch in batches(feed, state.images, total, batch_size, settings.workers):
            values = _train_batch(stage, state, batch, settings, device)
            meter.update(len(batch.indices), values["loss"])
            for name, reason in batch.skipped:
                log.event("skipped", stage=stage.name, name=name, reason=reason)
            if state.updates % settings.log_every == 0 or state.images >= total:
                rate = round(meter.rate(), 2)
                log.event("progress", stage=stage.name, images=state.images, images_per_second=rate, **values)
            if state.images >= total:  # before the last preview: whatever befalls it costs no work
                final = checkpoint()
            if state.images >= next_preview:
                _preview(stage, state, feed, folder, settings, device)
                log.event("preview", stage=stage.name, images=state.images)
                next_preview = _next_multiple(state.images, settings.preview_every, total)
            if stop_requested():
                if final is None:
                    checkpoint()
                raise Interrupted(
                    f"stopped at image {state.images:,} of {total:,} of stage {stage.name.upper()}"
                )
            if time.monotonic() - saved >= settings.checkpoint_seconds and state.images < total:
                checkpoint()
                saved = time.monotonic()
    assert final is not None
    return final


def _prepare(stage: Stage, folder: Path, device: torch.device) -> tuple[snapshot.TrainingState, bool]:
    """The stage's state at its beginning, or as the newest whole checkpoint holds it."""
    for network in stage.networks.values():
        network.to(device).train()
    state = snapshot.TrainingState(
        networks=stage.networks,
        averages={name: make_average(stage.networks[name]) for name in stage.averaged},
        optimizers={
            name: make_optimizer(network, stage.optimization, stage.rate_scales)
            for name, network in stage.networks.items()
        },
    )
    found = snapshot.newest(folder)
    if found is not None:
        snapshot.restore(state, *found)
    return state, found is not None


def _train_batch(
    stage: Stage,
    state: snapshot.TrainingState,
    batch: Batch,
    settings: Settings,
    device: torch.device,
) -> dict[str, float]:
    """The updates of one batch; returns losses, gradient norms and learning rate."""
    optimization = stage.optimization
    torch.manual_seed(stable_hash(settings.seed, stage.name, "dropout", state.images) >> 1)
    random = ImageRandom(stable_hash(settings.seed, stage.name) >> 1, batch.indices.to(device))
    rate = learning_rate(optimization, state.images + len(batch.indices))
    values: dict[str, float] = {"learning_rate": rate}
    height, width = batch.images.shape[1:3]
    with out_of_memory_named(f"batch_size={optimization.batch_size} at {width}x{height} pixels"):
        losses = stage.losses(batch, device, random)
        while True:
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.autocast):
                following = next(losses, None)
            if following is None:
                break
            name, loss, terms = following
            network = stage.networks[name]
            value = float(loss.detach())
            _check_finite("loss", name, value, stage, state)
            # Gradients for this network alone: what else the loss passes through learns from its own loss.
            loss.backward(inputs=[p for p in network.parameters() if p.requires_grad])
            norm = update(network, state.optimizers[name], optimization.clip_norm, rate)
            _check_finite("gradient", name, norm, stage, state)
            key = "loss" if "loss" not in values else f"loss_{name}"
            values |= {key: value, f"gradient_{name}": norm}
            values |= {term: float(value.detach()) for term, value in terms.items()}
    state.images += len(batch.indices)
    state.updates += 1
    for name, average in state.averages.items():
        update_average(average, state.networks[name], decay_at(state.updates, optimization.ema_decay))
    return values


def _check_finite(what: str, name: str, value: float, stage: Stage, state: snapshot.TrainingState) -> None:
    """Stops before anything is updated, so that the last checkpoint stays good."""
    if not math.isfinite(value):
        where = f"image {state.images:,} of stage {stage.name.upper()}"
        raise UserError(
            f"the {what} of {name} is {value} at {where}, so the weights were left as they were; use a lower "
            "learning rate in another --run-dir"
        )


@torch.no_grad()
def _preview(
    stage: Stage,
    state: snapshot.TrainingState,
    feed: Feed,
    folder: Path,
    settings: Settings,
    device: torch.device,
) -> None:
    """Draws the preview grid with the averaged weights. Leaves no trace in the random state of training."""
    shown = Feed(feed.source, 0, settings.preview_size, captions=False)
    examples = [shown[i][1].image for i in range(settings.previews)]
    pixels = torch.stack([torch.from_numpy(e) for e in examples]).permute(0, 3, 1, 2).float().to(device) / 255
    images: list[Image.Image] = stage.preview(state.averages, pixels, device)
    if not images:
        return
    path = folder / "previews" / f"{state.images:012d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = settings.previews if len(images) % settings.previews == 0 else math.isqrt(len(images) - 1) + 1
    save_png(grid(images, columns=columns), path, {"stage": stage.name, "images": state.images})


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
        signal.signal(number, previous[number])

    previous: dict[int, Any] = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, request)
    try:
        yield requested.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

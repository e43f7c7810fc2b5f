"""Hands batches of the queue to the workers, and watches and restarts their processes.

All state is changed on the event loop. A thread for each worker reads its pipe, and another writes it.
"""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wuerstchen.serve.heartbeat import ALIVE
from wuerstchen.serve.jobs import FairQueue, Job, Picture, Shape
from wuerstchen.serve.limits import ServeConfig
from wuerstchen.serve.metrics import Metrics
from wuerstchen.serve.process import Message, WorkerProcess
from wuerstchen.serve.worker import Batch, WorkerSettings

log = logging.getLogger("wuerstchen.serve")

STOPPING_SECONDS = 30.0
"""A worker that was told to stop and makes no step for so long is ended."""
SILENT_SECONDS = 10.0
"""A worker that has given no sign of life for so long is not ready."""
DEAD_SECONDS = 60.0
"""A worker that has given no sign of life for so long is ended, and started again."""
DEAD_LOADING_SECONDS = 300.0
"""The same while it loads: libraries on a slow disk can hold a process up."""
RELAUNCH_SECONDS = 5.0
"""Until a worker that could not be started is tried again."""

Fail = Callable[..., None]
"""(job, message) or (job, message, kind of error) → the job has failed."""
Finish = Callable[[Picture, tuple[int, int], bytes], None]
"""(picture, its width and height, RGB bytes): a worker has drawn it."""


@dataclass(eq=False)
class _Under:
    """A batch that a worker has been given."""

    number: int
    pictures: list[Picture]
    began: float
    stopping: float | None = None
    """Since when the worker has known that it is too late or unwanted."""


@dataclass(eq=False)
class _Worker(WorkerProcess):
    """One device, through all restarts of its process."""

    ready: bool = False
    batch: _Under | None = None
    failures: int = 0
    """Ends in a row before it was ready."""
    again_at: float | None = None
    """When it is to be started again."""
    launched: float = 0.0
    heard: float = 0.0
    """When it last gave a sign of life."""
    killed: str | None = None
    """Why it was ended, if the service did it."""
    about: dict[str, Any] = field(default_factory=dict)


class Dispatcher:
    """All workers of a service, and what they draw."""

    def __init__(
        self,
        config: ServeConfig,
        queue: FairQueue,
        metrics: Metrics,
        worker_main: Callable[..., None],
        *,
        fail: Fail,
        finish: Finish,
    ) -> None:
        """``fail`` and ``finish`` are called on the event loop. They do not wait."""
        self.config = config
        self.queue = queue
        self.metrics = metrics
        self.worker_main = worker_main
        self.fail = fail
        self.finish = finish
        self.about: dict[str, Any] | None = None
        """What the model can; None until the first worker is ready."""
        self.failed: str | None = None
        """Why there will never be a model."""
        self.started = asyncio.Event()
        """Set when the first worker is ready, or none will be."""
        self.draining = False
        """Whether workers that end are not started again."""
        self.workers = [_Worker(name=name or "default", device=name) for name in (config.devices or (None,))]
        self._numbers = itertools.count(1)
        self._seconds_a_picture: float | None = None
        """Measured, with all workers drawing."""
        self._looked = 0.0
        """When ``look`` was last called."""

    def start(self) -> None:
        """Starts the workers; does not wait until they are ready."""
        self._loop = asyncio.get_running_loop()
        for worker in self.workers:
            self._launch(worker)
        self._looked = time.monotonic()

    async def stop(self) -> None:
        """Ends the workers at once. Returns when nothing of them is left."""
        for worker in self.workers:
            worker.life += 1
            await asyncio.to_thread(worker.end)

    def kill(self) -> None:
        """Kills the workers' processes, from any thread."""
        for worker in self.workers:
            worker.kill()

    def ready_workers(self) -> int:
        """Workers that have a model and have given a sign of life."""
        now = time.monotonic()
        return sum(worker.ready and now - worker.heard < SILENT_SECONDS for worker in self.workers)

    # Batches

    def pump(self) -> None:
        """Gives every idle worker a batch."""
        for worker in self.workers:
            if worker.ready and worker.batch is None and (pictures := self.queue.take(self._room)):
                self._give(worker, pictures)

    def drop(self, job: Job, now: float) -> None:
        """Tells the workers that nobody wants a job's pictures any more."""
        for worker in self.workers:
            batch = worker.batch
            if batch is not None:
                places = [place for place, picture in enumerate(batch.pictures) if picture.job is job]
                if places:
                    worker.send(("unwanted", batch.number, places))
                    if batch.stopping is None and all(p.job.has_ended for p in batch.pictures):
                        batch.stopping = now

    def wait_estimate(self, pictures: int) -> int:
        """Seconds until about so many pictures are drawn."""
        seconds = (self._seconds_a_picture or 1.0) * max(1, pictures)
        return int(min(max(1.0, seconds), 600.0) + 0.5)

    def _room(self, shape: Shape) -> int:
        """How many pictures of a shape are drawn together: of large ones fewer, for memory."""
        assert self.about is not None
        own = self.about["side"] ** 2
        return max(1, min(self.config.max_batch, self.config.max_batch * own // (shape.width * shape.height)))

    def _give(self, worker: _Worker, pictures: list[Picture]) -> None:
        now = time.monotonic()
        shape = pictures[0].job.shape
        with_images = pictures[0].job.image is not None
        batch = Batch(
            number=next(self._numbers),
            shape=shape,
            fill=self._room(shape) if self.config.deterministic else None,
            prompts=[picture.prompt for picture in pictures],
            negatives=[picture.job.negative for picture in pictures],
            seeds=[picture.seed for picture in pictures],
            images=[picture.job.image or b"" for picture in pictures] if with_images else None,
            previews=[place for place, picture in enumerate(pictures) if picture.job.previews],
        )
        worker.batch = _Under(batch.number, pictures, now)
        self.metrics.batch_size.observe(len(pictures))
        for job in {picture.job: None for picture in pictures}:
            if job.state == "queued":
                self.metrics.wait_seconds.observe(now - job.created)
            job.begin()
        worker.send(("draw", batch))

    def _heard(self, worker: _Worker, life: int, message: tuple[Any, ...] | None) -> None:
        """A worker said something; None is its end."""
        if life != worker.life:
            return
        worker.heard = time.monotonic()
        if message is None:
            self._died(worker)
        elif message == ALIVE:
            pass
        elif message[0] == "ready":
            self._became_ready(worker, message[1])
        elif message[0] == "unfit":
            self._unfit(worker, message[1])
        elif worker.batch is not None and message[1] == worker.batch.number:
            self._of_batch(worker, worker.batch, message)

    def _of_batch(self, worker: _Worker, batch: _Under, message: tuple[Any, ...]) -> None:
        word, _, *values = message
        if word == "step":
            self._stepped(batch, *values)
        elif word == "notice":
            job = batch.pictures[values[0]].job
            if values[1] not in job.notices:
                job.notices.append(values[1])
        elif word == "preview":
            place, width, height, url = values
            picture = batch.pictures[place]
            if not picture.job.has_ended:
                shown = {"index": picture.index, "width": width, "height": height, "image": url}
                picture.job.emit("preview", shown)
        elif word == "image":
            place, width, height, data = values
            picture = batch.pictures[place]
            if not picture.job.has_ended:
                self.finish(picture, (width, height), data)
        else:
            worker.batch = None
            if word == "done":
                self._measured(worker, batch, values[0])
            elif word == "failed":
                for job in {picture.job: None for picture in batch.pictures}:
                    self.fail(job, values[0], values[1])
            self.pump()

    def _stepped(self, batch: _Under, stage: str, step: int, steps: int, fraction: float) -> None:
        for job, share in _shares(batch).items():
            if not job.has_ended:
                job.fraction = share * fraction
                shown = {"stage": stage, "step": step, "steps": steps, "fraction": round(job.progress, 4)}
                job.emit("progress", shown)

    def _measured(self, worker: _Worker, batch: _Under, measured: dict[str, Any]) -> None:
        took = (time.monotonic() - batch.began) / len(batch.pictures) / len(self.workers)
        before = self._seconds_a_picture
        self._seconds_a_picture = took if before is None else 0.8 * before + 0.2 * took
        for stage, seconds in measured.get("seconds", {}).items():
            self.metrics.stage_seconds.labels(stage).observe(seconds)
        for name, gauge in (
            ("memory", self.metrics.worker_memory),
            ("device_memory", self.metrics.device_memory),
        ):
            if measured.get(name) is not None:
                gauge.labels(worker.name).set(measured[name])
        if measured.get("joules") is not None:
            self.metrics.joules.labels(worker.name).inc(max(0.0, measured["joules"]))

    # Workers

    def _launch(self, worker: _Worker) -> None:
        worker.ready, worker.batch, worker.again_at, worker.killed = False, None, None, None
        worker.launched = worker.heard = time.monotonic()
        settings = WorkerSettings(
            model=self.config.model, device=worker.device, precision=self.config.precision
        )

        def tell(life: int, message: Message | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._heard, worker, life, message)

        try:
            worker.start(self.worker_main, settings, tell)
        except OSError as error:  # no memory, or no descriptors
            log.error("worker %s: cannot be started (%s)", worker.name, error.strerror or error)
            worker.again_at = time.monotonic() + RELAUNCH_SECONDS

    def _became_ready(self, worker: _Worker, about: dict[str, Any]) -> None:
        worker.ready, worker.failures, worker.about = True, 0, about
        self.about = self.about or {**about, "name": model_name(self.config.model)}
        log.info("worker %s: ready on %s", worker.name, about["device"])
        self.started.set()
        self.pump()

    def _unfit(self, worker: _Worker, reason: str) -> None:
        """It says that it cannot be: no use in trying again, if it never could."""
        if self.about is None:
            self.failed = reason
            self.started.set()
        log.error("worker %s: %s", worker.name, reason)

    def _died(self, worker: _Worker) -> None:
        batch, worker.batch = worker.batch, None
        worker.ready = False
        worker.failures += 1
        if self.about is None and self.failed is None and worker.failures == 3:
            self.failed = "the worker ended three times before it had a model; its last words are above"
            self.started.set()
        if self.failed is not None:
            return
        self.metrics.restarts.labels(worker.name).inc()
        if batch is not None:
            happened = worker.killed or "ended before its time"
            why = f"the worker that drew this job {happened} and is started again; send it again"
            if batch.stopping is not None:
                why = "this job took too long and was stopped; ask for fewer steps or a smaller picture"
            for job in {picture.job: None for picture in batch.pictures}:
                self.fail(job, why)
        worker.end()
        if not self.draining:
            # At once the first time; one that never gets ready must not keep the machine busy.
            delay = 0.0 if worker.failures <= 1 else min(30.0, 2.0 ** (worker.failures - 2))
            log.error("worker %s: ended unexpectedly; started again in %.0f s", worker.name, delay)
            worker.again_at = time.monotonic() + delay
            if not delay:
                self._launch(worker)

    def look(self, now: float) -> None:
        """To be called once in a while: restarts workers that died, ends those that hang, and fails the jobs
        of batches that take too long."""
        looked, self._looked = self._looked, now
        if now - looked > SILENT_SECONDS / 2:
            # The service itself stood still: what the workers said meanwhile has not been heard yet.
            for worker in self.workers:
                worker.heard += now - looked
        for worker in self.workers:
            self._look_at(worker, now)

    def _look_at(self, worker: _Worker, now: float) -> None:
        config, batch = self.config, worker.batch
        if worker.again_at is not None and now >= worker.again_at and not self.draining:
            self._launch(worker)
        elif worker.process is not None and worker.killed is None and (why := self._hangs(worker, now)):
            log.error("worker %s: it %s, and is ended", worker.name, why)
            worker.killed = why
            worker.kill()  # its end is noticed as any other
        elif batch is not None and batch.stopping is None and now - batch.began > config.run_timeout:
            message = f"it was drawn for {config.run_timeout:g} s; ask for fewer steps or a smaller picture"
            for picture in batch.pictures:
                self.fail(picture.job, f"this job timed out because {message}")
            batch.stopping = now
        elif batch is not None and batch.stopping is not None and now - batch.stopping > STOPPING_SECONDS:
            worker.kill()  # its end is noticed as any other

    def _hangs(self, worker: _Worker, now: float) -> str | None:
        """Why a worker is to be ended, if it is."""
        if now - worker.heard > (DEAD_SECONDS if worker.ready else DEAD_LOADING_SECONDS):
            return "gave no sign of life"
        seconds = self.config.load_timeout
        if worker.ready or now - worker.launched <= seconds:
            return None
        if self.about is None and self.failed is None:
            self.failed = (
                f"The model takes too long to load: over {seconds:g} s. Look whether its disk or the network "
                "hangs, or raise --load-timeout."
            )
            self.started.set()
        return f"did not load its model within {seconds:g} s"


def _shares(batch: _Under) -> dict[Job, int]:
    """Pictures of each job in a batch."""
    shares: dict[Job, int] = {}
    for picture in batch.pictures:
        shares[picture.job] = shares.get(picture.job, 0) + 1
    return shares


def model_name(model: str | None) -> str:
    """What clients call the model: the last part of its name, without the folders that lead to it."""
    return "wuerstchen" if model is None else Path(model).name or "wuerstchen"

"""Sends batches from the queue to the workers, and monitors and restarts their processes.

All state changes on the event loop. Each worker has one thread that reads its pipe and one that writes to it.
"""

import asyncio
import contextlib
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wuerstchen.checkpoints.layout_table import Sources
from wuerstchen.serve.heartbeat import HEARTBEAT
from wuerstchen.serve.jobs import FairQueue, ImageTask, Job, Shape
from wuerstchen.serve.limits import ServeConfig
from wuerstchen.serve.metrics import Metrics
from wuerstchen.serve.process import Message, WorkerProcess
from wuerstchen.serve.worker import ImageBatch, WorkerSettings

log = logging.getLogger("wuerstchen.serve")

STOPPING_SECONDS = 30.0
"""A worker that still works on a stopped batch after this time is killed."""
SILENT_SECONDS = 10.0
"""A worker without a heartbeat for this long does not count as ready."""
DEAD_SECONDS = 60.0
"""A worker without a heartbeat for this long is killed and restarted."""
DEAD_LOADING_SECONDS = 300.0
"""The same while it loads its model: libraries on a slow disk can block a process."""
RELAUNCH_SECONDS = 5.0
"""Delay before another attempt to start a worker."""

Fail = Callable[..., None]
"""Called with (job, message) or (job, message, error type) when a job has failed."""
Finish = Callable[[ImageTask, tuple[int, int], bytes], None]
"""Called with (task, (width, height), RGB bytes) when a worker has generated an image."""


@dataclass(eq=False)
class _RunningBatch:
    """A batch that a worker is generating."""

    number: int
    tasks: list[ImageTask]
    started: float
    stopping: float | None = None
    """When the worker was told to stop, because the batch is late or no longer wanted."""


@dataclass(eq=False)
class _DeviceWorker(WorkerProcess):
    """The worker of one device. Survives restarts of its process."""

    ready: bool = False
    batch: _RunningBatch | None = None
    failures: int = 0
    """Exits in a row before it was ready."""
    restart_at: float | None = None
    """When to start its process again."""
    launched: float = 0.0
    last_message: float = 0.0
    """When it last sent a message, heartbeats included."""
    killed: str | None = None
    """Why the service killed it, or None."""
    about: dict[str, Any] = field(default_factory=dict)


class Dispatcher:
    """All workers of a service, and the batches they generate."""

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
        """``fail`` and ``finish`` are called on the event loop and must not block."""
        self.config = config
        self.queue = queue
        self.metrics = metrics
        self.worker_main = worker_main
        self.fail = fail
        self.finish = finish
        self.about: dict[str, Any] | None = None
        """The model's capabilities, or None until the first worker is ready."""
        self.failed: str | None = None
        """Why no worker could load the model, or None."""
        self.started = asyncio.Event()
        """Set when the first worker is ready, or when none will be."""
        self.draining = False
        """If true, workers that exit are not restarted."""
        self.workers = [
            _DeviceWorker(name=name or "default", device=name) for name in (config.devices or (None,))
        ]
        self._numbers = itertools.count(1)
        self._seconds_per_image: float | None = None
        """Moving average over all workers together."""
        self._checked = 0.0
        """When ``check`` was last called."""

    def start(self) -> None:
        """Starts the workers. Does not wait until they are ready."""
        self._loop = asyncio.get_running_loop()
        for worker in self.workers:
            self._launch(worker)
        self._checked = time.monotonic()

    async def stop(self) -> None:
        """Kills the workers. Returns when their processes and threads have ended."""
        for worker in self.workers:
            worker.process_number += 1
            await asyncio.to_thread(worker.end)

    def kill(self) -> None:
        """Kills the workers' processes. Can be called from any thread."""
        for worker in self.workers:
            worker.kill()

    def ready_workers(self) -> int:
        """Number of workers that have loaded the model and sent a heartbeat recently."""
        now = time.monotonic()
        return sum(worker.ready and now - worker.last_message < SILENT_SECONDS for worker in self.workers)

    # Batches

    def pump(self) -> None:
        """Gives a batch to every idle worker."""
        for worker in self.workers:
            if worker.ready and worker.batch is None and (tasks := self.queue.take(self._room)):
                self._give(worker, tasks)

    def drop(self, job: Job, now: float) -> None:
        """Tells the workers that a job's images are no longer wanted."""
        for worker in self.workers:
            batch = worker.batch
            if batch is not None:
                places = [place for place, task in enumerate(batch.tasks) if task.job is job]
                if places:
                    worker.send(("unwanted", batch.number, places))
                    if batch.stopping is None and all(task.job.has_ended for task in batch.tasks):
                        batch.stopping = now

    def wait_estimate(self, images: int) -> int:
        """Estimated seconds until this many images are generated, from 1 to 600."""
        seconds = (self._seconds_per_image or 1.0) * max(1, images)
        return int(min(max(1.0, seconds), 600.0) + 0.5)

    def _room(self, shape: Shape) -> int:
        """Largest batch of a shape. Larger images get smaller batches, to bound memory."""
        assert self.about is not None
        base = self.about["side"] ** 2
        return max(
            1, min(self.config.max_batch, self.config.max_batch * base // (shape.width * shape.height))
        )

    def _give(self, worker: _DeviceWorker, tasks: list[ImageTask]) -> None:
        now = time.monotonic()
        shape = tasks[0].job.shape
        with_images = tasks[0].job.image is not None
        batch = ImageBatch(
            number=next(self._numbers),
            shape=shape,
            fill=self._room(shape) if self.config.deterministic else None,
            prompts=[task.prompt for task in tasks],
            negatives=[task.job.negative for task in tasks],
            seeds=[task.seed for task in tasks],
            images=[task.job.image or b"" for task in tasks] if with_images else None,
            masks=[task.job.mask or b"" for task in tasks] if shape.masked else None,
            previews=[place for place, task in enumerate(tasks) if task.job.previews],
        )
        worker.batch = _RunningBatch(batch.number, tasks, now)
        self.metrics.batch_size.observe(len(tasks))
        for job in {task.job: None for task in tasks}:
            if job.state == "queued":
                self.metrics.wait_seconds.observe(now - job.created)
            job.start()
        worker.send(("generate", batch))

    def _on_message(
        self, worker: _DeviceWorker, process_number: int, message: tuple[Any, ...] | None
    ) -> None:
        """Handles a message of a worker. None means that its process has ended."""
        if process_number != worker.process_number:
            return
        worker.last_message = time.monotonic()
        if message is None:
            self._on_exit(worker)
        elif message == HEARTBEAT:
            pass
        elif message[0] == "ready":
            self._on_ready(worker, message[1])
        elif message[0] == "load_error":
            self._on_load_error(worker, message[1])
        elif worker.batch is not None and message[1] == worker.batch.number:
            self._on_batch_message(worker, worker.batch, message)

    def _on_batch_message(
        self, worker: _DeviceWorker, batch: _RunningBatch, message: tuple[Any, ...]
    ) -> None:
        word, _, *values = message
        if word == "step":
            self._on_step(batch, *values)
        elif word == "notice":
            job = batch.tasks[values[0]].job
            if values[1] not in job.notices:
                job.notices.append(values[1])
        elif word == "preview":
            place, width, height, url = values
            task = batch.tasks[place]
            if not task.job.has_ended:
                data = {"index": task.index, "width": width, "height": height, "image": url}
                task.job.emit("preview", data)
        elif word == "image":
            place, width, height, pixels = values
            task = batch.tasks[place]
            if not task.job.has_ended:
                self.finish(task, (width, height), pixels)
        else:
            worker.batch = None
            if word == "done":
                self._record(worker, batch, values[0])
            elif word == "failed":
                for job in {task.job: None for task in batch.tasks}:
                    self.fail(job, values[0], values[1])
            self.pump()

    def _on_step(self, batch: _RunningBatch, stage: str, step: int, steps: int, fraction: float) -> None:
        for job, images in Counter(task.job for task in batch.tasks).items():
            if not job.has_ended:
                job.fraction = images * fraction
                data = {"stage": stage, "step": step, "steps": steps, "fraction": round(job.progress, 4)}
                job.emit("progress", data)

    def _record(self, worker: _DeviceWorker, batch: _RunningBatch, measured: dict[str, Any]) -> None:
        took = (time.monotonic() - batch.started) / len(batch.tasks) / len(self.workers)
        before = self._seconds_per_image
        self._seconds_per_image = took if before is None else 0.8 * before + 0.2 * took
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

    def _launch(self, worker: _DeviceWorker) -> None:
        worker.ready, worker.batch, worker.restart_at, worker.killed = False, None, None, None
        worker.launched = worker.last_message = time.monotonic()
        settings = WorkerSettings(
            model=self.config.model,
            device=worker.device,
            precision=self.config.precision,
            sources=Sources(
                prior=self.config.prior,
                text_encoder=self.config.text_encoder,
                decoder_text_encoder=self.config.decoder_text_encoder,
                compressor=self.config.compressor,
            ),
            low_memory=self.config.low_memory,
            loras=self.config.loras,
            lora_dir=self.config.lora_dir,
        )

        def tell(process_number: int, message: Message | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._on_message, worker, process_number, message)

        try:
            worker.start(self.worker_main, settings, tell)
        except OSError as error:  # no memory, or no descriptors
            log.error("worker %s: could not be started (%s)", worker.name, error.strerror or error)
            worker.restart_at = time.monotonic() + RELAUNCH_SECONDS

    def _on_ready(self, worker: _DeviceWorker, about: dict[str, Any]) -> None:
        worker.ready, worker.failures, worker.about = True, 0, about
        self.about = self.about or {**about, "name": model_name(self.config.model)}
        log.info("worker %s: ready on %s", worker.name, about["device"])
        self.started.set()
        self.pump()

    def _on_load_error(self, worker: _DeviceWorker, reason: str) -> None:
        """The model cannot be loaded. If it never could, there is no point in trying again."""
        if self.about is None:
            self.failed = reason
            self.started.set()
        log.error("worker %s: %s", worker.name, reason)

    def _on_exit(self, worker: _DeviceWorker) -> None:
        batch, worker.batch = worker.batch, None
        worker.ready = False
        worker.failures += 1
        if self.about is None and self.failed is None and worker.failures == 3:
            self.failed = (
                "The worker process exited three times while loading the model. See its log messages above."
            )
            self.started.set()
        if self.failed is not None:
            return
        self.metrics.restarts.labels(worker.name).inc()
        if batch is not None:
            happened = worker.killed or "ended unexpectedly"
            message = f"The worker that ran this job {happened} and is being restarted. Send the job again."
            if batch.stopping is not None:
                message = "The job took too long and was stopped. Use fewer steps or a smaller image."
            for job in {task.job: None for task in batch.tasks}:
                self.fail(job, message)
        worker.end()
        if not self.draining:
            # Restart at once the first time. A worker that never gets ready must not keep the machine busy.
            delay = 0.0 if worker.failures <= 1 else min(30.0, 2.0 ** (worker.failures - 2))
            log.error("worker %s: ended unexpectedly, restarting in %.0f s", worker.name, delay)
            worker.restart_at = time.monotonic() + delay
            if not delay:
                self._launch(worker)

    def check(self, now: float) -> None:
        """Restarts dead workers, kills those that hang, and fails the jobs of late batches. Call it
        regularly."""
        checked, self._checked = self._checked, now
        if now - checked > SILENT_SECONDS / 2:
            # The service itself was suspended, so the workers' messages have not been read yet.
            for worker in self.workers:
                worker.last_message += now - checked
        for worker in self.workers:
            self._check_worker(worker, now)

    def _check_worker(self, worker: _DeviceWorker, now: float) -> None:
        config, batch = self.config, worker.batch
        if worker.restart_at is not None and now >= worker.restart_at and not self.draining:
            self._launch(worker)
        elif worker.process is not None and worker.killed is None and (why := self._hangs(worker, now)):
            log.error("worker %s: %s, killing it", worker.name, why)
            worker.killed = why
            worker.kill()  # its end is handled like any other
        elif batch is not None and batch.stopping is None and now - batch.started > config.run_timeout:
            ran = f"it ran for {config.run_timeout:g} s"
            for task in batch.tasks:
                self.fail(task.job, f"The job timed out: {ran}. Use fewer steps or a smaller image.")
            batch.stopping = now
        elif batch is not None and batch.stopping is not None and now - batch.stopping > STOPPING_SECONDS:
            worker.kill()  # its end is handled like any other

    def _hangs(self, worker: _DeviceWorker, now: float) -> str | None:
        """Why a worker must be killed, or None."""
        if now - worker.last_message > (DEAD_SECONDS if worker.ready else DEAD_LOADING_SECONDS):
            return "sent no heartbeat"
        seconds = self.config.load_timeout
        if worker.ready or now - worker.launched <= seconds:
            return None
        if self.about is None and self.failed is None:
            self.failed = (
                f"The model takes too long to load: over {seconds:g} s. Check the disk and the network, or "
                "raise --load-timeout."
            )
            self.started.set()
        return f"did not load its model within {seconds:g} s"


def model_name(model: str | None) -> str:
    """The public name of the model: the last part of its path."""
    return "wuerstchen" if model is None else Path(model).name or "wuerstchen"

"""The service: takes jobs, queues them, cancels them, and ends them with a result or an error.

All state changes on the event loop. Workers are in ``serve.dispatch``, finished images in
``serve.finishing``.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable
from typing import Any

from wuerstchen.serve import worker as worker_module
from wuerstchen.serve.adapters import AdapterFolder
from wuerstchen.serve.dispatch import Dispatcher
from wuerstchen.serve.errors import Refused
from wuerstchen.serve.finishing import Finisher
from wuerstchen.serve.jobs import FairQueue, ImageTask, Job, QueueFull
from wuerstchen.serve.limits import ServeConfig
from wuerstchen.serve.metrics import Metrics
from wuerstchen.serve.results import Results
from wuerstchen.serve.stopping import closing_seconds
from wuerstchen.serve.streams import OpenStreams
from wuerstchen.serve.uploads import Uploads

log = logging.getLogger("wuerstchen.serve")

KEPT_JOBS = 2_000
"""How many ended jobs are kept. They expire together with their images."""
SCAN_SECONDS = 2.0
"""How often the folder of adapters is read."""
IMAGE_BYTES = 2**30
"""Memory for the init images of all open jobs."""


class Service:
    """One instance: its queue, workers and jobs."""

    def __init__(self, config: ServeConfig, worker_main: Callable[..., None] = worker_module.main) -> None:
        """Raises ``UserError`` if the filter, the results folder or the certificate cannot be used."""
        self.config = config
        self.instance = secrets.token_hex(3)
        self._adapters = (
            None if config.lora_dir is None else AdapterFolder(config.lora_dir, config.always_used)
        )
        self.queue = FairQueue(config.max_waiting, config.max_jobs_per_client)
        self.metrics = Metrics()
        self.dispatcher = Dispatcher(
            config, self.queue, self.metrics, worker_main, fail=self._fail, finish=self._finish
        )
        self.metrics.watch(lambda: len(self.queue), self.queue.open_jobs, self.dispatcher.ready_workers)
        self.jobs: dict[str, Job] = {}
        self.streams = OpenStreams()
        self.draining = False
        self.finisher = Finisher(config, self.instance, self.metrics, self._end)
        self.uploads = Uploads(config.max_jobs_per_client)
        self._loras = [] if self._adapters is None else self._adapters.scan()
        self._tasks: list[asyncio.Task[None]] = []

    # Starting and stopping

    async def start(self) -> None:
        """Starts the workers and what watches them. Does not wait until they are ready."""
        self._loop = asyncio.get_running_loop()
        self.dispatcher.start()
        self._tasks = [asyncio.create_task(work) for work in (self._monitor(), self._watch_adapters())]

    async def drain(self) -> None:
        """Refuses new jobs, fails queued ones, and lets running ones finish within the grace time.

        A small part of the grace time is reserved for closing.
        """
        if self.draining:
            return
        self.draining = self.dispatcher.draining = True
        self.uploads.close()
        message = "The service is shutting down and cannot finish this job. Send it again later."
        for job in [job for job in self.jobs.values() if job.state == "queued"]:
            self._end(job, "failed", message)
        deadline = time.monotonic() + self.config.grace - closing_seconds(self.config.grace)
        while time.monotonic() < deadline and any(not job.has_ended for job in self.jobs.values()):
            await asyncio.sleep(0.05)
        for job in [job for job in self.jobs.values() if not job.has_ended]:
            self._end(job, "failed", message)

    async def stop(self) -> None:
        """Ends the workers at once, also after a failed start. Call ``drain`` first: running jobs are
        lost."""
        self.draining = self.dispatcher.draining = True
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        for job in [job for job in self.jobs.values() if not job.has_ended]:
            self._end(job, "failed", "The service was stopped. Send the job again later.")
        await self.uploads.stop()
        await self.dispatcher.stop()
        await self.finisher.stop(closing_seconds(self.config.grace) / 2)

    def kill(self) -> None:
        """Kills the processes of workers and decoders. Can be called from any thread."""
        self.uploads.kill()
        self.dispatcher.kill()

    # Requests

    @property
    def is_ready(self) -> bool:
        return not self.draining and self.dispatcher.ready_workers() > 0

    @property
    def about(self) -> dict[str, Any] | None:
        """The model's capabilities, with the adapters that are there now. None until the first worker is
        ready."""
        about = self.dispatcher.about
        return None if about is None else {**about, "loras": self._loras}

    @property
    def failed(self) -> str | None:
        """Why no worker could load the model, or None."""
        return self.dispatcher.failed

    @property
    def started(self) -> asyncio.Event:
        """Set when the first worker is ready, or when none will be."""
        return self.dispatcher.started

    @property
    def results(self) -> Results:
        return self.finisher.results

    def check_open(self) -> dict[str, Any]:
        """Returns the model's capabilities. Raises ``Refused`` if no job can be taken now."""
        if self.draining:
            raise Refused(
                503,
                "The service is shutting down and does not accept new jobs. Try again later.",
                retry_after=10,
            )
        if self.about is None:
            raise Refused(503, "The model is still loading. Try again in a few seconds.", retry_after=2)
        return self.about

    async def submit(self, job: Job) -> None:
        """Queues a job. Raises ``Refused``."""
        self.check_open()
        self.check_room(job.client, job.total)
        await self.finisher.check_prompts(list(dict.fromkeys(job.prompts)))
        self.check_open()
        self.check_room(job.client, job.total)
        self._check_images(job)
        job.created, job.unix_time = time.monotonic(), int(time.time())
        self.queue.add(job)
        self.jobs[job.id] = job
        prompts = f" {list(dict.fromkeys(job.prompts))!r}" if self.config.log_prompts else ""
        log.info("job %s: %s, images: %d%s", job.log_name, job.shape.kind, job.total, prompts)
        job.emit("queued", {"position": self.queue.positions()[job]})
        self._loop.call_soon(self.dispatcher.pump)

    def check_room(self, client: str, images: int) -> None:
        """Raises ``Refused`` if the queue has no room for this many more images of a client."""
        try:
            self.queue.check(client, images)
        except QueueFull as full:
            ahead = len(self.queue)
            if full.of_client:
                mine = (other for other in self.queue.jobs() if other.client == client)
                ahead = min((other.total for other in mine), default=1)
            raise Refused(
                429,
                str(full),
                code="rate_limit_exceeded",
                retry_after=self.dispatcher.wait_estimate(ahead),
            ) from full

    def _check_images(self, job: Job) -> None:
        held = sum(len(other.image or b"") + len(other.mask or b"") for other in self.jobs.values())
        if job.image is not None and held and held + len(job.image) + len(job.mask or b"") > IMAGE_BYTES:
            raise Refused(
                429,
                f"The init images of open jobs already take {held:,} bytes. Try again later.",
                code="rate_limit_exceeded",
                retry_after=self.dispatcher.wait_estimate(1),
            )

    def cancel(self, job: Job) -> None:
        """Cancels a job. Its running batch stops too, unless it is shared with other jobs."""
        self._end(job, "cancelled")

    def job_of(self, job_id: str, client: str) -> Job:
        """Finds a job by its id. If clients have tokens, it must be the client's own.

        Raises ``Refused`` for an unknown job, with a hint if it belongs to another instance. Another client's
        job counts as unknown.
        """
        job = self.jobs.get(job_id)
        # Only tokens identify a client: its address may change during a job, or be shared by many.
        if job is not None and (job.client == client or not self.config.tokens):
            return job
        instance = job_id.partition("-")[0]
        if instance == self.instance or "-" not in job_id or len(job_id) > 64 or not instance.isalnum():
            raise Refused(404, "There is no such job. It may have ended long ago.", code="job_not_found")
        raise Refused(
            404,
            f"This job belongs to instance {instance!a}, but the request reached {self.instance!r}. Route "
            "all requests of a client to the same instance.",
            code="wrong_instance",
        )

    def position(self, job: Job) -> int:
        """The job's position in the queue, from 1. 0 if it is not queued."""
        return self.queue.positions().get(job, 0) if job.state == "queued" else 0

    # Progress and end of jobs

    def _finish(self, task: ImageTask, size: tuple[int, int], data: bytes) -> None:
        self.finisher.finish(task, size, data, self.about or {})

    def _end(self, job: Job, state: Any, message: str | None = None, kind: str = "server_error") -> None:
        if job.has_ended:
            return
        job.images.sort(key=lambda image: image["index"])
        now = time.monotonic()
        job.end(state, now, message, kind)
        self.queue.close(job)
        self.metrics.jobs.labels(state).inc()
        self.metrics.job_seconds.observe(now - job.created)
        log.info("job %s: %s after %.1f s", job.log_name, state, now - job.created)
        if state != "done":
            self.dispatcher.drop(job, now)

    def _fail(self, job: Job, message: str, kind: str = "server_error") -> None:
        self._end(job, "failed", message, kind)

    async def _watch_adapters(self) -> None:
        """Notices new and removed adapters. Not in ``_monitor``: a network drive may hang."""
        while self._adapters is not None:
            await asyncio.sleep(SCAN_SECONDS)
            try:
                self._loras = await asyncio.to_thread(self._adapters.scan)
            except Exception:
                log.exception("the folder of adapters cannot be read")

    async def _monitor(self) -> None:
        """Four times a second: ends late jobs, restarts workers, forgets old jobs and deletes old results."""
        cleared = time.monotonic()
        while True:
            await asyncio.sleep(0.25)
            now = time.monotonic()
            try:
                self._check(now)
                if now - cleared > 10:
                    cleared = now
                    await self.finisher.clear()
            except Exception:
                log.exception("the monitor failed once")

    def _check(self, now: float) -> None:
        config = self.config
        for job in list(self.queue.jobs()):
            if job.state == "queued" and now - job.created > config.queue_timeout:
                waited = f"it waited {config.queue_timeout:g} s in the queue"
                self._end(
                    job, "failed", f"The job timed out: {waited}. Try again when the service is less busy."
                )
        # Not after every batch, which could send events to all waiting jobs a hundred times a second.
        for job, place in self.queue.positions().items():
            before = next((event.data["position"] for event in job.events if event.name == "queued"), None)
            if job.state == "queued" and place != before:
                job.emit("queued", {"position": place})
        self.dispatcher.check(now)
        ended = [job for job in self.jobs.values() if job.ended is not None]
        for number, job in enumerate(ended):
            assert job.ended is not None
            if now - job.ended > config.result_seconds or number < len(ended) - KEPT_JOBS:
                del self.jobs[job.id]

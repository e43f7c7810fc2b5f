"""From requests to jobs to results: queues jobs, tells of their events, cancels them, keeps what was drawn.

All state is changed on the event loop. Pictures are filtered, saved and signed in threads. The workers are in
``serve.dispatch``.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable
from typing import Any

from wuerstchen.serve import worker as worker_module
from wuerstchen.serve.dispatch import Dispatcher
from wuerstchen.serve.errors import Refused
from wuerstchen.serve.finishing import Finisher
from wuerstchen.serve.jobs import FairQueue, Job, Picture, QueueFull
from wuerstchen.serve.limits import ServeConfig
from wuerstchen.serve.metrics import Metrics
from wuerstchen.serve.results import Results
from wuerstchen.serve.stopping import closing_seconds
from wuerstchen.serve.streams import OpenStreams
from wuerstchen.serve.uploads import Uploads

log = logging.getLogger("wuerstchen.serve")

KEPT_JOBS = 2_000
"""Jobs that are remembered after their end, for as long as their pictures are."""
IMAGE_BYTES = 2**30
"""Of the pictures that jobs begin with, together, until they have ended."""


class Service:
    """One instance: its queue, its workers and what it remembers."""

    def __init__(self, config: ServeConfig, worker_main: Callable[..., None] = worker_module.main) -> None:
        """Raises ``UserError`` for a filter, a folder or a certificate that cannot be used."""
        self.config = config
        self.instance = secrets.token_hex(3)
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
        self._watcher: asyncio.Task[None] | None = None

    # Starting and stopping

    async def start(self) -> None:
        """Starts the workers and the watch over them; does not wait until they are ready."""
        self._loop = asyncio.get_running_loop()
        self.dispatcher.start()
        self._watcher = asyncio.create_task(self._watch())

    async def drain(self) -> None:
        """Takes no new jobs, lets those that have begun finish in the grace time, and fails the others.

        A small part of the grace time is left for closing.
        """
        if self.draining:
            return
        self.draining = self.dispatcher.draining = True
        self.uploads.close()
        message = "this job is cut off because the service is being stopped; send it again later"
        for job in [job for job in self.jobs.values() if job.state == "queued"]:
            self._end(job, "failed", message)
        late = time.monotonic() + self.config.grace - closing_seconds(self.config.grace)
        while time.monotonic() < late and any(not job.has_ended for job in self.jobs.values()):
            await asyncio.sleep(0.05)
        for job in [job for job in self.jobs.values() if not job.has_ended]:
            self._end(job, "failed", message)

    async def stop(self) -> None:
        """Ends the workers at once, also after a start that failed. What they draw is lost: ``drain`` comes
        first."""
        self.draining = self.dispatcher.draining = True
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        for job in [job for job in self.jobs.values() if not job.has_ended]:
            self._end(job, "failed", "the service was stopped; send the job again later")
        await self.uploads.stop()
        await self.dispatcher.stop()
        await self.finisher.stop(closing_seconds(self.config.grace) / 2)

    def kill(self) -> None:
        """Kills the processes of workers and decoders, from any thread."""
        self.uploads.kill()
        self.dispatcher.kill()

    # What the outside asks for

    @property
    def is_ready(self) -> bool:
        return not self.draining and self.dispatcher.ready_workers() > 0

    @property
    def about(self) -> dict[str, Any] | None:
        """What the model can; None until the first worker is ready."""
        return self.dispatcher.about

    @property
    def failed(self) -> str | None:
        """Why there will never be a model."""
        return self.dispatcher.failed

    @property
    def started(self) -> asyncio.Event:
        """Set when the first worker is ready, or none will be."""
        return self.dispatcher.started

    @property
    def results(self) -> Results:
        return self.finisher.results

    def check_open(self) -> dict[str, Any]:
        """The model, or ``Refused`` where no job can be taken now."""
        if self.draining:
            raise Refused(
                503, "the service is being stopped and takes no new jobs; try again later", retry_after=10
            )
        if self.about is None:
            raise Refused(503, "the model is still being loaded; try again in a few seconds", retry_after=2)
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
        words = f" {list(dict.fromkeys(job.prompts))!r}" if self.config.log_prompts else ""
        log.info("job %s: %d pictures of %s%s", job.log_name, job.total, job.shape.kind, words)
        job.emit("queued", {"position": self.queue.positions()[job]})
        self._loop.call_soon(self.dispatcher.pump)

    def check_room(self, client: str, pictures: int) -> None:
        """Raises ``Refused`` where so many more pictures of a client cannot be queued now."""
        try:
            self.queue.check(client, pictures)
        except QueueFull as full:
            pictures = len(self.queue)
            if full.of_client:
                mine = (other for other in self.queue.jobs() if other.client == client)
                pictures = min((other.total for other in mine), default=1)
            raise Refused(
                429,
                str(full),
                code="rate_limit_exceeded",
                retry_after=self.dispatcher.wait_estimate(pictures),
            ) from full

    def _check_images(self, job: Job) -> None:
        held = sum(len(other.image) for other in self.jobs.values() if other.image is not None)
        if job.image is not None and held and held + len(job.image) > IMAGE_BYTES:
            raise Refused(
                429,
                f"the pictures that jobs begin with take {held:,} bytes already; try again later",
                code="rate_limit_exceeded",
                retry_after=self.dispatcher.wait_estimate(1),
            )

    def cancel(self, job: Job) -> None:
        """Ends a job that has not ended: what waits is forgotten, what is drawn alone is stopped."""
        self._end(job, "cancelled")

    def job_of(self, job_id: str, client: str) -> Job:
        """The job of that id, which must be the client's own where clients have tokens.

        Raises ``Refused`` for one that is not known here, and says if another instance may know it. Another
        client's job is answered as one that is not known.
        """
        job = self.jobs.get(job_id)
        # An address may change while a job is drawn, and many may share one: a token does not and is not.
        if job is not None and (job.client == client or not self.config.tokens):
            return job
        instance = job_id.partition("-")[0]
        if instance == self.instance or "-" not in job_id or len(job_id) > 64 or not instance.isalnum():
            raise Refused(404, "no such job is known here; it may have ended long ago", code="job_not_found")
        raise Refused(
            404,
            f"this job belongs to instance {instance!a} and not to {self.instance!r}, which was asked; "
            "route a client's requests to one instance",
            code="wrong_instance",
        )

    def position(self, job: Job) -> int:
        """The job's place in the queue from 1; 0 when it no longer waits."""
        return self.queue.positions().get(job, 0) if job.state == "queued" else 0

    # What happens to jobs

    def _finish(self, picture: Picture, size: tuple[int, int], data: bytes) -> None:
        self.finisher.finish(picture, size, data, self.about or {})

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

    async def _watch(self) -> None:
        """Once in a while: what is late, what is to be started again, what is to be forgotten."""
        cleared = time.monotonic()
        while True:
            await asyncio.sleep(0.25)
            now = time.monotonic()
            try:
                self._look(now)
                if now - cleared > 10:
                    cleared = now
                    await self.finisher.clear()
            except Exception:
                log.exception("the watch failed once")

    def _look(self, now: float) -> None:
        config = self.config
        for job in list(self.queue.jobs()):
            if job.state == "queued" and now - job.created > config.queue_timeout:
                waited = f"it waited {config.queue_timeout:g} s and was not begun"
                self._end(
                    job, "failed", f"this job timed out because {waited}; try again when less is asked for"
                )
        # Not after every batch: that would be news for all who wait, a hundred times a second.
        for job, place in self.queue.positions().items():
            before = next((event.data["position"] for event in job.events if event.name == "queued"), None)
            if job.state == "queued" and place != before:
                job.emit("queued", {"position": place})
        self.dispatcher.look(now)
        ended = [job for job in self.jobs.values() if job.ended is not None]
        for number, job in enumerate(ended):
            assert job.ended is not None
            if now - job.ended > config.result_seconds or number < len(ended) - KEPT_JOBS:
                del self.jobs[job.id]

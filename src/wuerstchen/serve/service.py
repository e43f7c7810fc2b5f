"""From requests to jobs to results: queues jobs, tells of their events, cancels them, keeps what was drawn.

All state is changed on the event loop. Pictures are filtered, saved and signed in threads. The workers are in
``serve.dispatch``.
"""

import asyncio
import contextlib
import importlib
import inspect
import logging
import os
import secrets
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from wuerstchen.errors import UserError
from wuerstchen.serve import worker as worker_module
from wuerstchen.serve.dispatch import Dispatcher
from wuerstchen.serve.jobs import ENDED, Event, FairQueue, Job, Picture, QueueFull
from wuerstchen.serve.limits import ServeConfig
from wuerstchen.serve.metrics import Metrics
from wuerstchen.serve.results import Results
from wuerstchen.serve.stopping import closing_seconds
from wuerstchen.serve.uploads import Uploads

log = logging.getLogger("wuerstchen.serve")

Filter = Callable[[str, Image.Image | None], str | None]
"""(prompt, None) before drawing and (prompt, picture) after it → why it is refused, or None."""

KEPT_JOBS = 2_000
"""Jobs that are remembered after their end, for as long as their pictures are."""
HEARTBEAT = 10.0
IMAGE_BYTES = 2**30
"""Of the pictures that jobs begin with, together, until they have ended."""
STREAMS_OF_CLIENT = 100
"""Streams of events that a client may have open."""


class Refused(Exception):
    """A request that cannot be served: an HTTP status, the message and the form's other fields."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after


class Service:
    """One instance: its queue, its workers and what it remembers."""

    def __init__(self, config: ServeConfig, worker_main: Callable[..., None] = worker_module.main) -> None:
        """Raises ``UserError`` for a filter, a folder or a certificate that cannot be used."""
        self.config = config
        self.instance = secrets.token_hex(3)
        self.queue = FairQueue(config.max_waiting, config.max_jobs_per_client)
        self.metrics = Metrics()
        self.dispatcher = Dispatcher(
            config, self.queue, self.metrics, worker_main, fail=self._fail, finish=self._finish_soon
        )
        self.metrics.watch(lambda: len(self.queue), self.queue.open_jobs, self.dispatcher.ready_workers)
        self.filter = None if config.filter is None else load_filter(config.filter)
        self.jobs: dict[str, Job] = {}
        self.streams: Counter[str] = Counter()
        """Of events, open, by client."""
        self.draining = False
        signer = _signer(config)
        self._temporary = (
            tempfile.TemporaryDirectory(prefix="wuerstchen-") if config.results_dir is None else None
        )
        self.results = Results(
            Path(self._temporary.name) if self._temporary else config.results_dir or Path(),
            self.instance,
            seconds=config.result_seconds,
            max_bytes=config.result_bytes,
            signer=signer,
        )
        self.uploads = Uploads(config.max_jobs_per_client)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._savers = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1), thread_name_prefix="save")
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
        if self._tasks:
            _, hung = await asyncio.wait(self._tasks, timeout=closing_seconds(self.config.grace) / 2)
            for task in hung:
                task.cancel()
        self._savers.shutdown(wait=False, cancel_futures=True)  # a filter may hang
        if self._temporary is not None:
            self._temporary.cleanup()

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
        if self.filter is not None:
            for text in dict.fromkeys(job.prompts):
                reason = await self._filtered(text, None)
                if reason is not None:
                    self.metrics.refusals.labels("filter").inc()
                    raise Refused(400, reason, param="prompt", code="content_policy_violation")
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

    def check_streams(self, client: str) -> None:
        """Raises ``Refused`` where a client has as many streams as it may."""
        if self.streams[client] >= STREAMS_OF_CLIENT:
            message = f"{STREAMS_OF_CLIENT} streams of yours are open, which is the most; close some"
            raise Refused(429, message, code="rate_limit_exceeded", retry_after=2)

    @contextlib.contextmanager
    def stream_of(self, client: str) -> Iterator[bool]:
        """While a client has one stream more. Gives whether it may: many can pass the check at once."""
        self.streams[client] += 1
        try:
            yield self.streams[client] <= STREAMS_OF_CLIENT
        finally:
            self.streams[client] -= 1
            if not self.streams[client]:
                del self.streams[client]

    async def events(self, job: Job, after: int) -> AsyncIterator[Event | None]:
        """A job's events, as they come, until it ends. None is a sign of life in a silence."""
        news = asyncio.Event()
        job.listeners.add(news.set)
        try:
            while True:
                news.clear()
                for event in job.events_after(after):
                    after = event.number
                    yield event
                    if event.name in ENDED:
                        return
                if job.has_ended and not job.events_after(after):
                    return
                try:
                    await asyncio.wait_for(news.wait(), HEARTBEAT)
                except TimeoutError:
                    yield None
        finally:
            job.listeners.discard(news.set)

    async def ended(self, job: Job) -> None:
        """Waits until the job has ended."""
        async for _ in self.events(job, 0):
            pass

    # What the workers have drawn

    def _finish_soon(self, picture: Picture, size: tuple[int, int], data: bytes) -> None:
        task = asyncio.create_task(self._finish(picture, size, data))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _finish(self, picture: Picture, size: tuple[int, int], data: bytes) -> None:
        """Filters and saves a picture, and tells its job."""
        job = picture.job
        image = Image.frombytes("RGB", size, data)
        try:
            if self.filter is not None:
                reason = await self._filtered(picture.prompt, image)
                if reason is not None:
                    self.metrics.refusals.labels("filter").inc()
                    self._end(job, "failed", reason, "invalid_request_error")
                    return
            settings = picture_settings(picture, self.about or {})
            name = await self._loop.run_in_executor(self._savers, self.results.save, image, settings)
        except Refused as error:
            self._end(job, "failed", str(error))
            return
        except Exception:  # what it says holds the folder's path, which is not the client's business
            log.exception("job %s: its picture could not be kept", job.log_name)
            self._end(job, "failed", "a finished picture could not be kept; the service's log says why")
            return
        if job.has_ended:
            return
        job.fraction = max(0.0, job.fraction - 1)
        job.add_image(picture.index, f"/v1/images/{name}")
        self.metrics.pictures.labels(job.shape.kind).inc()
        if len(job.images) == job.total:
            self._end(job, "done")

    async def _filtered(self, prompt: str, image: Image.Image | None) -> str | None:
        assert self.filter is not None
        try:
            return await self._loop.run_in_executor(self._savers, self.filter, prompt, image)
        except Exception as error:
            log.exception("the filter failed")
            raise Refused(500, "the safety filter failed, so nothing is drawn; the log says why") from error

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
                    await self._loop.run_in_executor(self._savers, self.results.clear)
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


def picture_settings(picture: Picture, about: dict[str, Any]) -> dict[str, Any]:
    """What draws the picture again, under the names of ``POST /v1/jobs``."""
    job, shape = picture.job, picture.job.shape
    settings: dict[str, Any] = {"kind": shape.kind}
    if shape.kind == "generate":
        settings |= {"prompts": [picture.prompt], "negative": job.negative}
    settings |= {"count": 1, "width": shape.width, "height": shape.height, "seed": picture.seed}
    if shape.kind == "generate":
        settings |= {
            "guidance": shape.guidance,
            "prior_steps": shape.prior_steps,
            "prior_sampler": shape.prior_sampler,
        }
    settings["decoder_steps"] = shape.decoder_steps
    if shape.strength is not None:
        settings["strength"] = shape.strength
    return settings | {"model": about.get("name", "wuerstchen")}


def load_filter(name: str) -> Filter:
    """The function that ``module:function`` names. Raises ``UserError``."""
    module, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())  # where one's own module lies
    try:
        found = getattr(importlib.import_module(module), function)
        inspect.signature(found).bind("", None)
    except Exception as error:
        raise UserError(
            f"filter {name!r} is wrong because it cannot be used ({error}); give module:function, a function "
            "of a prompt and a picture"
        ) from error
    finally:
        sys.path.remove(os.getcwd())
    return found


def _signer(config: ServeConfig) -> Any:
    if config.c2pa_certificate is None or config.c2pa_key is None:
        return None
    from wuerstchen.serve.signing import Signer

    return Signer(config.c2pa_certificate, config.c2pa_key)

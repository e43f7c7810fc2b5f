"""Filters, saves and signs generated images, in threads."""

import asyncio
import logging
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from wuerstchen.serve.errors import Refused
from wuerstchen.serve.filters import load_filter
from wuerstchen.serve.jobs import Picture
from wuerstchen.serve.limits import ServeConfig
from wuerstchen.serve.metrics import Metrics
from wuerstchen.serve.requests import picture_settings
from wuerstchen.serve.results import Results

log = logging.getLogger("wuerstchen.serve")

EndJob = Callable[..., None]
"""(job, state) or (job, state, message) or (job, state, message, kind of error) → the job has ended."""


class Finisher:
    """Takes generated images to their finished files, and tells their jobs. Called on the event loop."""

    def __init__(self, config: ServeConfig, instance: str, metrics: Metrics, end: EndJob) -> None:
        """Raises ``UserError`` if the filter, the results folder or the certificate cannot be used."""
        self.metrics = metrics
        self.end = end
        self.filter = None if config.filter is None else load_filter(config.filter)
        signer = _signer(config)
        self._temporary = (
            tempfile.TemporaryDirectory(prefix="wuerstchen-") if config.results_dir is None else None
        )
        self.results = Results(
            Path(self._temporary.name) if self._temporary else config.results_dir or Path(),
            instance,
            seconds=config.result_seconds,
            max_bytes=config.result_bytes,
            signer=signer,
        )
        self._tasks: set[asyncio.Task[Any]] = set()
        self._threads = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1), thread_name_prefix="save")

    def finish(self, picture: Picture, size: tuple[int, int], data: bytes, about: dict[str, Any]) -> None:
        """Starts a task that filters and saves the image, then tells its job. Does not wait for it.

        ``data``: RGB bytes of an image of ``size`` (width, height). ``about``: the model.
        """
        task = asyncio.create_task(self._finish(picture, size, data, about))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def check_prompts(self, prompts: list[str]) -> None:
        """Raises ``Refused`` for the first prompt that the safety filter rejects."""
        if self.filter is None:
            return
        for text in prompts:
            reason = await self._filtered(text, None)
            if reason is not None:
                raise Refused(400, reason, param="prompt", code="content_policy_violation")

    async def clear(self) -> None:
        """Deletes expired results."""
        await asyncio.get_running_loop().run_in_executor(self._threads, self.results.clear)

    async def stop(self, timeout: float) -> None:
        """Waits up to ``timeout`` seconds for images that are being saved, then gives them up."""
        if self._tasks:
            _, hung = await asyncio.wait(self._tasks, timeout=timeout)
            for task in hung:
                task.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)  # a filter may hang
        if self._temporary is not None:
            self._temporary.cleanup()

    async def _finish(
        self, picture: Picture, size: tuple[int, int], data: bytes, about: dict[str, Any]
    ) -> None:
        job = picture.job
        image = Image.frombytes("RGB", size, data)
        try:
            reason = await self._filtered(picture.prompt, image)
            if reason is not None:
                self.end(job, "failed", reason, "invalid_request_error")
                return
            settings = picture_settings(picture, about)
            loop = asyncio.get_running_loop()
            name = await loop.run_in_executor(self._threads, self.results.save, image, settings)
        except Refused as error:
            self.end(job, "failed", str(error))
            return
        except Exception:  # what it says holds the folder's path, which is not the client's business
            log.exception("job %s: its picture could not be kept", job.log_name)
            self.end(job, "failed", "a finished picture could not be kept; the service's log says why")
            return
        if job.has_ended:
            return
        job.fraction = max(0.0, job.fraction - 1)
        job.add_image(picture.index, f"/v1/images/{name}")
        self.metrics.pictures.labels(job.shape.kind).inc()
        if len(job.images) == job.total:
            self.end(job, "done")

    async def _filtered(self, prompt: str, image: Image.Image | None) -> str | None:
        """Why the safety filter rejects a prompt or an image, or None."""
        if self.filter is None:
            return None
        loop = asyncio.get_running_loop()
        try:
            reason = await loop.run_in_executor(self._threads, self.filter, prompt, image)
        except Exception as error:
            log.exception("the filter failed")
            raise Refused(500, "the safety filter failed, so nothing is drawn; the log says why") from error
        if reason is not None:
            self.metrics.refusals.labels("filter").inc()
        return reason


def _signer(config: ServeConfig) -> Any:
    if config.c2pa_certificate is None or config.c2pa_key is None:
        return None
    from wuerstchen.serve.signing import Signer

    return Signer(config.c2pa_certificate, config.c2pa_key)

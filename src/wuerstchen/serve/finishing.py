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
from wuerstchen.serve.jobs import ImageTask
from wuerstchen.serve.limits import ServeConfig
from wuerstchen.serve.metrics import Metrics
from wuerstchen.serve.requests import image_settings
from wuerstchen.serve.results import Results

log = logging.getLogger("wuerstchen.serve")

EndJob = Callable[..., None]
"""Called with (job, state), (job, state, message) or (job, state, message, error type) to end a job."""


class Finisher:
    """Filters and saves generated images, then updates their jobs. Call its methods on the event loop."""

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

    def finish(self, task: ImageTask, size: tuple[int, int], data: bytes, about: dict[str, Any]) -> None:
        """Starts to filter and save an image. Does not wait for it.

        ``data``: RGB bytes of an image of ``size`` (width, height). ``about``: the model.
        """
        finishing = asyncio.create_task(self._finish(task, size, data, about))
        self._tasks.add(finishing)
        finishing.add_done_callback(self._tasks.discard)

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
        self, task: ImageTask, size: tuple[int, int], data: bytes, about: dict[str, Any]
    ) -> None:
        job = task.job
        image = Image.frombytes("RGB", size, data)
        try:
            reason = await self._filtered(task.prompt, image)
            if reason is not None:
                self.end(job, "failed", reason, "invalid_request_error")
                return
            settings = image_settings(task, about)
            loop = asyncio.get_running_loop()
            name = await loop.run_in_executor(self._threads, self.results.save, image, settings)
        except Refused as error:
            self.end(job, "failed", str(error))
            return
        except Exception:  # its text contains the folder's path, which clients must not see
            log.exception("job %s: its image could not be saved", job.log_name)
            self.end(job, "failed", "A finished image could not be saved. The service's log has the reason.")
            return
        if job.has_ended:
            return
        job.fraction = max(0.0, job.fraction - 1)
        job.add_image(task.index, f"/v1/images/{name}")
        self.metrics.images.labels(job.shape.kind).inc()
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
            log.exception("the safety filter failed")
            raise Refused(
                500, "The safety filter failed, so no image is generated. The service's log has the reason."
            ) from error
        if reason is not None:
            self.metrics.refusals.labels("filter").inc()
        return reason


def _signer(config: ServeConfig) -> Any:
    if config.c2pa_certificate is None or config.c2pa_key is None:
        return None
    from wuerstchen.serve.signing import Signer

    return Signer(config.c2pa_certificate, config.c2pa_key)

"""The event streams of jobs: what a stream yields, and how many each client may have open."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator

from wuerstchen.serve.errors import Refused
from wuerstchen.serve.jobs import ENDED, Event, Job

KEEP_ALIVE_SECONDS = 10.0
"""A stream without events yields None this often, so that proxies do not close it."""
STREAMS_PER_CLIENT = 100


class OpenStreams:
    """Counts the open event streams of each client."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._open.total()

    def check(self, client: str) -> None:
        """Raises ``Refused`` if the client already has as many streams as it may."""
        if self._open[client] >= STREAMS_PER_CLIENT:
            message = (
                f"You already have {STREAMS_PER_CLIENT} open event streams, the limit per client. Close some."
            )
            raise Refused(429, message, code="rate_limit_exceeded", retry_after=2)

    @contextlib.contextmanager
    def opened(self, client: str) -> Iterator[bool]:
        """Counts one more stream of a client. Yields whether it is within the limit.

        Many requests can pass ``check`` at the same time, so the limit is checked here again.
        """
        self._open[client] += 1
        try:
            yield self._open[client] <= STREAMS_PER_CLIENT
        finally:
            self._open[client] -= 1
            if not self._open[client]:
                del self._open[client]


async def events_of(job: Job, after: int) -> AsyncIterator[Event | None]:
    """Yields a job's events after number ``after``, until the job has ended.

    Yields None when there was no event for ``KEEP_ALIVE_SECONDS``.
    """
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
                await asyncio.wait_for(news.wait(), KEEP_ALIVE_SECONDS)
            except TimeoutError:
                yield None
    finally:
        job.listeners.discard(news.set)


async def end_of(job: Job) -> None:
    """Waits until the job has ended."""
    async for _ in events_of(job, 0):
        pass

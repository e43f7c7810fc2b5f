"""Keeps strangers from filling the log: anybody can send a million malformed requests."""

import asyncio
import logging
import time
from collections.abc import Callable

LINES = 5
"""Of one kind, in ``SECONDS``."""
SECONDS = 60.0


class Sparing(logging.Filter):
    """Lets few lines of a kind through, and says how many it left out.

    Lines are of a kind if they have the same text before values are put in. Requests that were cut off
    because the service stops are no errors, and are left out.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._kinds: dict[str, tuple[float, int]] = {}
        """When the first line of each kind came, and how many have come since."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError):
            return False
        kind, now = str(record.msg)[:200], self._clock()
        began, count = self._kinds.get(kind, (now, 0))
        if now - began > SECONDS:
            if count > LINES:
                record.msg = f"{record.msg} ({count - LINES} more such lines were left out)"
            began, count = now, 0
        if len(self._kinds) > 1000:
            self._kinds.clear()
        self._kinds[kind] = (began, count + 1)
        return count < LINES


def set_up_logs() -> None:
    """What the service's process logs, and where to: to stderr, jobs and what went wrong."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("wuerstchen.serve").setLevel(logging.INFO)
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of every client that has gone
    sparing = Sparing()
    for name in ("uvicorn.error", "asyncio"):
        logger = logging.getLogger(name)
        if not any(isinstance(known, Sparing) for known in logger.filters):
            logger.addFilter(sparing)

"""Limits log lines, so that clients cannot fill the log with malformed requests."""

import asyncio
import logging
import time
from collections.abc import Callable

LINES = 5
"""Log lines of one kind per ``SECONDS``."""
SECONDS = 60.0
KINDS = 1000
"""How many kinds are counted separately."""
Kind = tuple[str, str, str]
"""Message, exception type, and the line of code that raised it."""
OTHERS: Kind = ("", "", "others")


class LogLimit(logging.Filter):
    """A logging filter that passes a few records of each kind and counts the ones it drops.

    Records are of the same kind if they have the same message template and the same exception type, raised at
    the same line of code. So nobody can hide an error by causing others. All kinds beyond ``KINDS`` count as
    one. Requests that were cancelled because the service stops are not errors, and are dropped.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._kinds: dict[Kind, tuple[float, int]] = {}
        """For each kind, the time of its first record and the number of records since then."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError):
            return False
        kind, now = self._known(_kind_of(record)), self._clock()
        start, count = self._kinds.get(kind, (now, 0))
        if now - start > SECONDS:
            if count > LINES:
                record.msg = f"{record.msg} ({count - LINES} similar lines were dropped)"
            start, count = now, 0
        self._kinds[kind] = (start, count + 1)
        return count < LINES

    def _known(self, kind: Kind) -> Kind:
        """``kind``, or ``OTHERS`` if there are too many kinds."""
        if kind in self._kinds or len(self._kinds) < KINDS:
            return kind
        now = self._clock()
        for old in [old for old, (start, _) in self._kinds.items() if now - start > SECONDS]:
            del self._kinds[old]
        return kind if len(self._kinds) < KINDS else OTHERS


def _kind_of(record: logging.LogRecord) -> Kind:
    text = str(record.msg).partition("\n")[0][:200]
    error = record.exc_info[1] if record.exc_info else None
    while isinstance(error, BaseExceptionGroup):  # from anyio's task groups, usually of one exception
        error = error.exceptions[0]
    if error is None:
        return (text, "", "")
    place, trace = "", error.__traceback__
    while trace is not None:
        place = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    return (text, type(error).__qualname__, place)


def set_up_logs() -> None:
    """Logs jobs, warnings and errors of the service to stderr."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("wuerstchen.serve").setLevel(logging.INFO)
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns about every client that disconnects
    limit = LogLimit()
    for name in ("uvicorn.error", "asyncio"):
        logger = logging.getLogger(name)
        if not any(isinstance(known, LogLimit) for known in logger.filters):
            logger.addFilter(limit)

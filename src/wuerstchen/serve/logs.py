"""Keeps strangers from filling the log: anybody can send a million malformed requests."""

import asyncio
import logging
import time
from collections.abc import Callable

LINES = 5
"""Of one kind, in ``SECONDS``."""
SECONDS = 60.0
KINDS = 1000
"""That are told apart."""
Kind = tuple[str, str, str]
"""Text, type of the exception, and the place where it was raised."""
OTHERS: Kind = ("", "", "others")


class Sparing(logging.Filter):
    """Lets few lines of a kind through, and says how many it left out.

    Lines are of a kind if their first lines have the same text before values are put in, and what they tell
    of is an exception of the same type, raised at the same place. So nobody can hide an error by provoking
    others. Kinds beyond ``KINDS`` count as one. Requests that were cut off because the service stops are no
    errors, and are left out.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._kinds: dict[Kind, tuple[float, int]] = {}
        """When the first line of each kind came, and how many have come since."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError):
            return False
        kind, now = self._known(_kind_of(record)), self._clock()
        began, count = self._kinds.get(kind, (now, 0))
        if now - began > SECONDS:
            if count > LINES:
                record.msg = f"{record.msg} ({count - LINES} more such lines were left out)"
            began, count = now, 0
        self._kinds[kind] = (began, count + 1)
        return count < LINES

    def _known(self, kind: Kind) -> Kind:
        """``kind``, or the one that stands for all others where there are too many."""
        if kind in self._kinds or len(self._kinds) < KINDS:
            return kind
        now = self._clock()
        for old in [old for old, (began, _) in self._kinds.items() if now - began > SECONDS]:
            del self._kinds[old]
        return kind if len(self._kinds) < KINDS else OTHERS


def _kind_of(record: logging.LogRecord) -> Kind:
    text = str(record.msg).partition("\n")[0][:200]
    error = record.exc_info[1] if record.exc_info else None
    while isinstance(error, BaseExceptionGroup):  # of anyio's task groups, which hold one nearly always
        error = error.exceptions[0]
    if error is None:
        return (text, "", "")
    place, trace = "", error.__traceback__
    while trace is not None:
        place = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    return (text, type(error).__qualname__, place)


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

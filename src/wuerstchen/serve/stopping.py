"""Ends the process in time, whatever hangs: a filter, a disk, a library, the event loop itself."""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable

log = logging.getLogger("wuerstchen.serve")

CLOSING_SECONDS = 3.0
"""Of the grace time, for closing: the last answers are sent and the workers end."""


def closing_seconds(grace: float) -> float:
    """How much of the grace time is kept for closing, in seconds."""
    return min(CLOSING_SECONDS, grace / 4)


class Deadline:
    """When its time is over, a thread of its own ends this process with exit code 1."""

    def __init__(self, kill_children: Callable[[], object]) -> None:
        """``kill_children`` is called first, in that thread."""
        self._kill_children = kill_children
        self._timer: threading.Timer | None = None

    def set(self, seconds: float) -> None:
        """From now on. An earlier time is forgotten."""
        self.cancel()
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True
        self._timer.start()

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _end(self) -> None:
        with contextlib.suppress(Exception):  # nothing may keep the process
            self._kill_children()
        # Whoever hangs may hold the log's lock, so this is not waited for.
        message = "the service did not stop within its grace time: it is ended by force"
        threading.Thread(target=log.error, args=(message,), daemon=True).start()
        threading.Event().wait(0.3)
        os._exit(1)


def threads_hang(prefixes: tuple[str, ...], seconds: float = 1.0) -> bool:
    """Whether threads whose names begin so go on for ``seconds``. Python would wait for them at its exit."""
    end = time.monotonic() + seconds
    for thread in threading.enumerate():
        if thread.name.startswith(prefixes):
            thread.join(max(0.0, end - time.monotonic()))
            if thread.is_alive():
                return True
    return False

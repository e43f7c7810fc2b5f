"""Ends the process in time even if something hangs: a filter, a disk, a library or the event loop."""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable

log = logging.getLogger("wuerstchen.serve")

CLOSING_SECONDS = 3.0
"""Part of the grace time in which the last answers are sent and the workers end."""


def closing_seconds(grace: float) -> float:
    """The part of the grace time that is reserved for closing, in seconds."""
    return min(CLOSING_SECONDS, grace / 4)


class Deadline:
    """Ends this process with exit code 1 when its time is over, from a thread of its own."""

    def __init__(self, kill_children: Callable[[], object]) -> None:
        """``kill_children`` is called first, in the same thread."""
        self._kill_children = kill_children
        self._timer: threading.Timer | None = None

    def set(self, seconds: float) -> None:
        """Sets the time from now in seconds. Replaces an earlier one."""
        self.cancel()
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True
        self._timer.start()

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _end(self) -> None:
        with contextlib.suppress(Exception):  # nothing may keep the process alive
            self._kill_children()
        # The thread that hangs may hold the log's lock, so do not wait for it.
        message = "the service did not stop within its grace time and is killed"
        threading.Thread(target=log.error, args=(message,), daemon=True).start()
        threading.Event().wait(0.3)
        os._exit(1)


def threads_hang(prefixes: tuple[str, ...], seconds: float = 1.0) -> bool:
    """Whether threads with these name prefixes still run after ``seconds``. Python would wait for them at
    exit."""
    end = time.monotonic() + seconds
    for thread in threading.enumerate():
        if thread.name.startswith(prefixes):
            thread.join(max(0.0, end - time.monotonic()))
            if thread.is_alive():
                return True
    return False

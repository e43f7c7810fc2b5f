"""Stopping a run on SIGINT or SIGTERM, at the end of an update or while it waits for data."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

GRACE = 10.0
"""Seconds that data may still take after a signal if other processes wait for this one."""


class Interrupted(Exception):
    """A signal has stopped training. A checkpoint of that moment is on disk, unless no image was trained
    on."""

    def __init__(self, message: str, images: int) -> None:
        """``images`` of the stage have been trained on. With 0 it has no checkpoint yet."""
        super().__init__(message)
        self.images = images


class StoppedWaiting(BaseException):
    """A signal came while this process waited for data. Not an ``Exception``, so that no handler catches
    it."""


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a request that the loop answers at the end of the update.

    Inside ``waiting`` it raises ``StoppedWaiting`` instead, because data may never come. With several
    processes it does so only after ``GRACE`` seconds, because the others need this one to finish the update.
    """

    def __init__(self, count: int) -> None:
        """``count`` is the number of processes of the run."""
        self._grace = 0.0 if count == 1 else GRACE
        self._since: float | None = None
        self._waits = False
        self._timer: threading.Timer | None = None

    @property
    def requested(self) -> bool:
        return self._since is not None

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Inside this context, SIGINT and SIGTERM become stop requests. A second Ctrl-C has its usual effect.

        Only the main thread can handle signals. In other threads this does nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous: dict[int, Any] = {}

        def request(number: int, frame: FrameType | None) -> None:
            self._request()
            if number == signal.SIGINT:  # SIGTERM stays caught: torchrun repeats it
                signal.signal(number, previous[number])
            if self._waits and self._overdue():
                raise StoppedWaiting

        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, request)
        try:
            yield
        finally:
            if self._timer is not None:
                self._timer.cancel()
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside this context, a request raises ``StoppedWaiting``. For waits in which no state changes."""
        self._waits = True
        try:
            if self.requested and self._overdue():
                raise StoppedWaiting
            yield
        finally:
            self._waits = False

    def _request(self) -> None:
        if self._since is not None:
            return
        self._since = time.monotonic()
        if self._grace:
            # Python runs handlers in the main thread, which is blocked: another signal wakes it.
            self._timer = threading.Timer(self._grace + 0.1, os.kill, (os.getpid(), signal.SIGTERM))
            self._timer.daemon = True
            self._timer.start()

    def _overdue(self) -> bool:
        return self._since is not None and time.monotonic() - self._since >= self._grace

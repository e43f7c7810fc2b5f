"""A worker's end of the pipe to the service, which also says that the process still runs.

A process that is stopped (SIGSTOP, a debugger, a machine that hangs) keeps its pipe open and says nothing,
like one that draws for long. Only a sign of life tells the two apart.
"""

import contextlib
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

ALIVE = ("alive",)
BEAT_SECONDS = 1.0


class Beating:
    """``connection``, whose messages any thread may send; one of its own sends ``ALIVE`` regularly."""

    def __init__(self, connection: Connection, seconds: float = BEAT_SECONDS) -> None:
        self._connection = connection
        self._seconds = seconds
        self._lock = threading.Lock()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def send(self, message: tuple[Any, ...]) -> None:
        with self._lock:
            self._connection.send(message)

    def recv(self) -> tuple[Any, ...]:
        return self._connection.recv()

    def poll(self) -> bool:
        return self._connection.poll()

    def _beat(self) -> None:
        with contextlib.suppress(OSError):  # the service is gone, which the other threads notice
            while True:
                self.send(ALIVE)
                time.sleep(self._seconds)

"""A worker's end of the pipe to the service, which also sends heartbeats.

A process that is stopped (SIGSTOP, a debugger, a machine that hangs) keeps its pipe open and sends nothing,
just like one that is busy. Only a heartbeat tells the two apart.
"""

import contextlib
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

HEARTBEAT = ("heartbeat",)
HEARTBEAT_SECONDS = 1.0


class HeartbeatConnection:
    """A connection that any thread may send on. A thread of its own sends ``HEARTBEAT`` regularly."""

    def __init__(self, connection: Connection, seconds: float = HEARTBEAT_SECONDS) -> None:
        self._connection = connection
        self._seconds = seconds
        self._lock = threading.Lock()
        threading.Thread(target=self._send_heartbeats, name="heartbeat", daemon=True).start()

    def send(self, message: tuple[Any, ...]) -> None:
        with self._lock:
            self._connection.send(message)

    def recv(self) -> tuple[Any, ...]:
        return self._connection.recv()

    def poll(self) -> bool:
        return self._connection.poll()

    def _send_heartbeats(self) -> None:
        with contextlib.suppress(OSError):  # the service is gone; the other threads notice too
            while True:
                self.send(HEARTBEAT)
                time.sleep(self._seconds)

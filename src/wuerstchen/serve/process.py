"""A worker's process as seen by the service: start it, send and receive messages, end it."""

import contextlib
import errno
import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

Message = tuple[Any, ...]
"""Starts with a word (see ``serve.worker``)."""
Tell = Callable[[int, Message | None], None]
"""Called in a thread with the number of a process and its message. None means that it has ended."""


@dataclass(eq=False)
class WorkerProcess:
    """A sequence of processes: each one ends before the next is started."""

    name: str
    device: str | None
    process: SpawnProcess | None = None
    process_number: int = 0
    """Number of the current process. Late messages of earlier ones are ignored."""
    _connection: Connection | None = None
    _sender: ThreadPoolExecutor | None = None
    _listener: threading.Thread | None = None

    def start(self, main: Callable[..., None], settings: Any, tell: Tell) -> None:
        """Starts ``main(settings, connection)`` in a process. Raises ``OSError``, after cleaning up, if it
        cannot."""
        self.process_number += 1
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(
            target=main, args=(settings, theirs), name=f"worker {self.name}", daemon=True
        )
        try:
            process.start()
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()  # so that the pipe closes when the worker exits
        self.process, self._connection = process, ours
        self._sender = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"to {self.name}")
        listener = threading.Thread(
            target=_listen,
            args=(self._connection, self.process_number, tell),
            name=f"from {self.name}",
            daemon=True,
        )
        try:
            listener.start()
        except RuntimeError as error:  # the system's limit; a thread that was not started cannot be joined
            self.end()
            raise OSError(errno.EAGAIN, "no thread can be started") from error
        self._listener = listener

    def send(self, message: Message) -> None:
        """Sends a message without waiting for it to be read."""
        connection, sender = self._connection, self._sender
        assert connection is not None
        assert sender is not None

        def send() -> None:
            with contextlib.suppress(OSError):  # it has died; the listener notices
                connection.send(message)

        sender.submit(send)

    def kill(self) -> None:
        """Kills the process, if there is one. Can be called from any thread."""
        process = self.process
        if process is not None:
            with contextlib.suppress(ValueError):  # another thread has just closed it
                process.kill()

    def end(self) -> None:
        """Kills the process, if there is one. Returns when it and its threads have ended."""
        if self._sender is not None:
            self._sender.shutdown(wait=False, cancel_futures=True)
            self._sender = None
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process.close()
            self.process = None
        if self._listener is not None:
            self._listener.join()  # it ends when the pipe closes
            self._listener = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _listen(connection: Connection, process_number: int, tell: Tell) -> None:
    """Passes on a worker's messages until it ends."""
    message: Message | None = ()
    while message is not None:
        try:
            message = connection.recv()
        except Exception:  # it has ended, maybe in the middle of a message
            message = None
        tell(process_number, message)

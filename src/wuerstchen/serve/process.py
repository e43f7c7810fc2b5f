"""A worker's process, as the service sees it: started, talked to through a pipe, ended."""

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
"""It begins with a word (``serve.worker``)."""
Tell = Callable[[int, Message | None], None]
"""Called in a thread with a process's number and what it says; None is its end."""


@dataclass(eq=False)
class WorkerProcess:
    """One after another: each ends before the next is started."""

    name: str
    device: str | None
    process: SpawnProcess | None = None
    life: int = 0
    """Counts the processes: what an earlier one still says need not be listened to."""
    _connection: Connection | None = None
    _sender: ThreadPoolExecutor | None = None
    _listener: threading.Thread | None = None

    def start(self, main: Callable[..., None], settings: Any, tell: Tell) -> None:
        """Starts ``main(settings, connection)`` in a process. Raises ``OSError`` where it cannot.

        Nothing of it is left then.
        """
        self.life += 1
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
            theirs.close()  # so that the pipe ends when the worker does
        self.process, self._connection = process, ours
        self._sender = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"to {self.name}")
        listener = threading.Thread(
            target=_listen, args=(self._connection, self.life, tell), name=f"from {self.name}", daemon=True
        )
        try:
            listener.start()
        except RuntimeError as error:  # the system's limit; a thread that has not begun cannot be joined
            self.end()
            raise OSError(errno.EAGAIN, "no thread can be started") from error
        self._listener = listener

    def send(self, message: Message) -> None:
        """Does not wait until it is read."""
        connection, sender = self._connection, self._sender
        assert connection is not None
        assert sender is not None

        def send() -> None:
            with contextlib.suppress(OSError):  # it has died, which is noticed elsewhere
                connection.send(message)

        sender.submit(send)

    def kill(self) -> None:
        """Kills the process, if there is one. From any thread."""
        process = self.process
        if process is not None:
            with contextlib.suppress(ValueError):  # closed by another thread a moment ago
                process.kill()

    def end(self) -> None:
        """Kills the process, if there is one, and waits until nothing of it is left."""
        if self._sender is not None:
            self._sender.shutdown(wait=False, cancel_futures=True)
            self._sender = None
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process.close()
            self.process = None
        if self._listener is not None:
            self._listener.join()  # it has met the pipe's end
            self._listener = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _listen(connection: Connection, life: int, tell: Tell) -> None:
    """Hands on what a worker says, until it ends."""
    message: Message | None = ()
    while message is not None:
        try:
            message = connection.recv()
        except Exception:  # its end, also in the middle of a word
            message = None
        tell(life, message)

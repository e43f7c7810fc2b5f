"""Sends uploads to processes that decode them.

Clients take turns. Decoding has a time limit, and uploads of clients that have gone are dropped.
"""

import asyncio
import contextlib
import itertools
import logging
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from wuerstchen.serve import decoding
from wuerstchen.serve.decoding import Upload, UploadError
from wuerstchen.serve.process import Message, WorkerProcess

log = logging.getLogger("wuerstchen.serve")

DECODERS = 2
START_SECONDS = 60.0
"""A decoder that is not ready after this time is killed."""

STOPPING = "The service is shutting down and does not accept new jobs. Try again later."


class Decoded(NamedTuple):
    """The RGB bytes of an upload, or the grey ones of a mask, and notices for its sender."""

    pixels: bytes
    notices: tuple[str, ...] = ()
    size: tuple[int, int] | None = None
    """Width and height of the upload."""


@dataclass(eq=False)
class _Task:
    number: int
    client: str
    upload: Upload
    decoded: asyncio.Future[Decoded]


@dataclass(eq=False)
class _Decoder(WorkerProcess):
    """A decoder. Its process decodes one upload at a time and is replaced when it exits."""

    task: _Task | None = None
    ready: bool = False
    ending: bool = False
    """Its process was killed or is about to exit, so it gets no upload until then."""
    timer: asyncio.TimerHandle | None = field(default=None, repr=False)


class Uploads:
    """The decoders of one service. Everything except the processes runs on the event loop.

    Clients take turns, and no client may use all decoders at once, so slow images do not block other clients.
    """

    def __init__(
        self,
        max_per_client: int,
        *,
        decoders: int = DECODERS,
        memory: int = decoding.MEMORY,
        main: Callable[..., None] = decoding.main,
    ) -> None:
        """``max_per_client``: waiting uploads of one client. ``memory``: bytes for each decoder."""
        self.max_per_client = max_per_client
        self.memory = memory
        self.main = main
        self.closed = False
        self._decoders = [_Decoder(name=f"decoder {number}", device=None) for number in range(decoders)]
        self._waiting: dict[str, deque[_Task]] = {}
        """Clients in the order of their turns, each with its uploads, oldest first."""
        self._numbers = itertools.count(1)

    def __len__(self) -> int:
        """Number of uploads that wait or are being decoded."""
        under_way = sum(decoder.task is not None for decoder in self._decoders)
        return under_way + sum(map(len, self._waiting.values()))

    async def decode(self, client: str, upload: Upload) -> Decoded:
        """Decodes and resizes an upload. Raises ``UploadError``.

        Cancelling this, when the client has gone, stops the decoding.
        """
        if self.closed:
            raise UploadError(503, STOPPING, retry_after=10)
        if len(self._waiting.get(client, ())) >= self.max_per_client:
            raise UploadError(
                429,
                f"You already have {self.max_per_client} uploads waiting to be decoded, the limit per "
                "client. Wait for one to finish.",
                retry_after=2,
            )
        self._loop = asyncio.get_running_loop()
        task = _Task(next(self._numbers), client, upload, self._loop.create_future())
        self._waiting.setdefault(client, deque()).append(task)
        self._assign()
        try:
            return await task.decoded
        finally:
            self._drop(task)

    def close(self) -> None:
        """Refuses waiting and new uploads, and kills the decoders."""
        self.closed = True
        tasks = [task for tasks in self._waiting.values() for task in tasks]
        for task in tasks + [decoder.task for decoder in self._decoders if decoder.task is not None]:
            _fail(task, UploadError(503, STOPPING, retry_after=10))
        self._waiting.clear()
        for decoder in self._decoders:
            self._kill(decoder)

    async def stop(self) -> None:
        """Ends the decoders. Returns when their processes and threads have ended."""
        self.close()
        for decoder in self._decoders:
            decoder.process_number += 1
            await asyncio.to_thread(decoder.end)

    def kill(self) -> None:
        """Kills the decoders' processes. Can be called from any thread."""
        for decoder in self._decoders:
            decoder.kill()

    def _assign(self) -> None:
        """Gives waiting uploads to idle decoders."""
        for decoder in self._decoders:
            if decoder.task is None and not decoder.ending and not self.closed:
                task = self._next()
                if task is None:
                    return
                decoder.task = task
                if decoder.process is None:
                    self._start(decoder)
                elif decoder.ready:
                    self._send(decoder)

    def _next(self) -> _Task | None:
        """The oldest upload of the next client that does not use its maximum number of decoders yet."""
        limit = max(1, len(self._decoders) - 1)
        busy = Counter(decoder.task.client for decoder in self._decoders if decoder.task is not None)
        for client in self._waiting:
            if busy[client] < limit:
                tasks = self._waiting.pop(client)
                task = tasks.popleft()
                if tasks:
                    self._waiting[client] = tasks
                return task
        return None

    def _start(self, decoder: _Decoder) -> None:
        def tell(process_number: int, message: Message | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._on_message, decoder, process_number, message)

        decoder.ready = False
        try:
            decoder.start(self.main, self.memory, tell)
        except OSError as error:  # no descriptors or no memory
            log.error("%s: could not be started (%s)", decoder.name, error.strerror or error)
            task, decoder.task = decoder.task, None
            _fail(task, UploadError(503, "Uploads cannot be decoded at the moment. Try again later.", 5))
            return
        self._limit(
            decoder, START_SECONDS, UploadError(503, "The image decoder did not start. Try again later.", 5)
        )

    def _send(self, decoder: _Decoder) -> None:
        task = decoder.task
        assert task is not None
        decoder.send((task.number, task.upload))
        seconds = task.upload.seconds
        late = UploadError(
            400,
            f"image takes too long to decode: more than {seconds:g} s. Save it as a PNG or as a JPEG that is "
            "not progressive, or shrink it.",
        )
        self._limit(decoder, seconds, late)

    def _limit(self, decoder: _Decoder, seconds: float, error: UploadError) -> None:
        """Kills the decoder after ``seconds``, and fails its task with ``error``."""

        def late() -> None:
            _fail(decoder.task, error)
            self._kill(decoder)

        self._cancel_timer(decoder)
        decoder.timer = self._loop.call_later(seconds, late)

    def _cancel_timer(self, decoder: _Decoder) -> None:
        if decoder.timer is not None:
            decoder.timer.cancel()
            decoder.timer = None

    def _kill(self, decoder: _Decoder) -> None:
        """Kills the decoder's process. The next upload starts a new one."""
        self._cancel_timer(decoder)
        if decoder.process is not None:
            decoder.ending = True
            decoder.kill()

    def _on_message(self, decoder: _Decoder, process_number: int, message: Message | None) -> None:
        """Handles a message of a decoder. None means that its process has ended."""
        if process_number != decoder.process_number:
            return
        task = decoder.task
        if message is None:
            self._cancel_timer(decoder)
            decoder.end()
            if decoder.ready:
                error = UploadError(
                    400, "image cannot be decoded: the decoder crashed. Save it again, as PNG or JPEG."
                )
            else:
                error = UploadError(503, "Uploads cannot be decoded at the moment. Try again later.", 5)
            decoder.task, decoder.ending, decoder.ready = None, False, False
            _fail(task, error)
        elif message[0] == "ready":
            decoder.ready = True
            if task is not None and not decoder.ending:
                self._send(decoder)
        else:
            self._on_answer(decoder, message)
        self._assign()

    def _on_answer(self, decoder: _Decoder, message: Message) -> None:
        word, number, *values, last = message
        task = decoder.task
        if task is None or task.number != number:
            return
        self._cancel_timer(decoder)
        decoder.task = None
        decoder.ending = decoder.ending or last
        if word == "pixels" and not task.decoded.done():
            task.decoded.set_result(Decoded(*values))
        else:
            _fail(task, UploadError(*values))

    def _drop(self, task: _Task) -> None:
        """Forgets a task that nobody waits for any more. Kills its decoder if it is still running."""
        waiting = self._waiting.get(task.client, deque())
        if task in waiting:
            waiting.remove(task)
            if not waiting:
                del self._waiting[task.client]
        for decoder in self._decoders:
            if decoder.task is task:
                self._kill(decoder)


def _fail(task: _Task | None, error: UploadError) -> None:
    if task is not None and not task.decoded.done():
        task.decoded.set_exception(error)

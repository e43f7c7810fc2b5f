"""Hands uploads to processes that decode them.

Clients take turns. The time for an upload is limited, and uploads of clients that no longer wait are dropped.
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
"""A decoder that is not there after so long is given up."""

STOPPING = "the service is being stopped and takes no new jobs; try again later"


class Decoded(NamedTuple):
    """An upload's RGB bytes, and what its sender should know about them."""

    pixels: bytes
    notices: tuple[str, ...] = ()


@dataclass(eq=False)
class _Task:
    number: int
    client: str
    upload: Upload
    decoded: asyncio.Future[Decoded]


@dataclass(eq=False)
class _Decoder(WorkerProcess):
    """One process after another, each of which decodes one upload at a time."""

    task: _Task | None = None
    ready: bool = False
    ending: bool = False
    """It was killed, or ends by itself: it is given nothing until it is gone."""
    timer: asyncio.TimerHandle | None = field(default=None, repr=False)


class Uploads:
    """The decoders of one service. Everything but the processes themselves runs on the event loop.

    Clients take turns, and no client has all decoders at a time, so one whose images are slow keeps nobody
    else waiting.
    """

    def __init__(
        self,
        most_of_client: int,
        *,
        decoders: int = DECODERS,
        memory: int = decoding.MEMORY,
        main: Callable[..., None] = decoding.main,
    ) -> None:
        """``most_of_client``: uploads of one client that may wait. ``memory``: bytes for each decoder."""
        self.most_of_client = most_of_client
        self.memory = memory
        self.main = main
        self.closed = False
        self._decoders = [_Decoder(name=f"decoder {number}", device=None) for number in range(decoders)]
        self._waiting: dict[str, deque[_Task]] = {}
        """In the order of the clients' turns; a client's uploads, oldest first."""
        self._numbers = itertools.count(1)

    def __len__(self) -> int:
        """Uploads that wait or are being decoded."""
        under_way = sum(decoder.task is not None for decoder in self._decoders)
        return under_way + sum(map(len, self._waiting.values()))

    async def decode(self, client: str, upload: Upload) -> Decoded:
        """The upload's RGB bytes in its size, with notices for the client. Raises ``UploadError``.

        If this is cancelled, because the client has gone, the decoding ends with it.
        """
        if self.closed:
            raise UploadError(503, STOPPING, retry_after=10)
        if len(self._waiting.get(client, ())) >= self.most_of_client:
            raise UploadError(
                429,
                f"Too many uploads of yours wait to be decoded: {self.most_of_client}, which is the most. "
                "Send the next one when one of them is answered.",
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
        """Refuses what waits and what comes from now on, and kills the decoders."""
        self.closed = True
        tasks = [task for tasks in self._waiting.values() for task in tasks]
        for task in tasks + [decoder.task for decoder in self._decoders if decoder.task is not None]:
            _fail(task, UploadError(503, STOPPING, retry_after=10))
        self._waiting.clear()
        for decoder in self._decoders:
            self._kill(decoder)

    async def stop(self) -> None:
        """Ends the decoders. Returns when nothing of them is left."""
        self.close()
        for decoder in self._decoders:
            decoder.life += 1
            await asyncio.to_thread(decoder.end)

    def kill(self) -> None:
        """Kills the decoders' processes, from any thread."""
        for decoder in self._decoders:
            decoder.kill()

    def _assign(self) -> None:
        """Gives idle decoders what waits."""
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
        """The first upload of the client whose turn it is, of those that do not have their share already."""
        share = max(1, len(self._decoders) - 1)
        busy = Counter(decoder.task.client for decoder in self._decoders if decoder.task is not None)
        for client in self._waiting:
            if busy[client] < share:
                tasks = self._waiting.pop(client)
                task = tasks.popleft()
                if tasks:
                    self._waiting[client] = tasks
                return task
        return None

    def _start(self, decoder: _Decoder) -> None:
        def tell(life: int, message: Message | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._heard, decoder, life, message)

        decoder.ready = False
        try:
            decoder.start(self.main, self.memory, tell)
        except OSError as error:  # no descriptors or no memory
            log.error("%s: cannot be started (%s)", decoder.name, error.strerror or error)
            task, decoder.task = decoder.task, None
            _fail(task, UploadError(503, "uploads cannot be decoded now; try again later", 5))
            return
        self._limit(decoder, START_SECONDS, UploadError(503, "the decoder did not start; try again later", 5))

    def _send(self, decoder: _Decoder) -> None:
        task = decoder.task
        assert task is not None
        decoder.send((task.number, task.upload))
        seconds = task.upload.seconds
        late = UploadError(
            400,
            f"The image takes too long to decode: over {seconds:g} s. Save it anew, as a JPEG that is not "
            "progressive or as a PNG, or shrink it.",
        )
        self._limit(decoder, seconds, late)

    def _limit(self, decoder: _Decoder, seconds: float, error: UploadError) -> None:
        """Kills the decoder after that time; its task then fails with ``error``."""

        def late() -> None:
            _fail(decoder.task, error)
            self._kill(decoder)

        self._relax(decoder)
        decoder.timer = self._loop.call_later(seconds, late)

    def _relax(self, decoder: _Decoder) -> None:
        if decoder.timer is not None:
            decoder.timer.cancel()
            decoder.timer = None

    def _kill(self, decoder: _Decoder) -> None:
        """Its end is heard as any other; the next process is started when something waits for it."""
        self._relax(decoder)
        if decoder.process is not None:
            decoder.ending = True
            decoder.kill()

    def _heard(self, decoder: _Decoder, life: int, message: Message | None) -> None:
        """A decoder said something; None is its end."""
        if life != decoder.life:
            return
        task = decoder.task
        if message is None:
            self._relax(decoder)
            decoder.end()
            if decoder.ready:
                error = UploadError(400, "image is wrong because its decoder failed; save it anew")
            else:
                error = UploadError(503, "uploads cannot be decoded now; try again later", 5)
            decoder.task, decoder.ending, decoder.ready = None, False, False
            _fail(task, error)
        elif message[0] == "ready":
            decoder.ready = True
            if task is not None and not decoder.ending:
                self._send(decoder)
        else:
            self._answered(decoder, message)
        self._assign()

    def _answered(self, decoder: _Decoder, message: Message) -> None:
        word, number, *values, last = message
        task = decoder.task
        if task is None or task.number != number:
            return
        self._relax(decoder)
        decoder.task = None
        decoder.ending = decoder.ending or last
        if word == "pixels" and not task.decoded.done():
            task.decoded.set_result(Decoded(*values))
        else:
            _fail(task, UploadError(*values))

    def _drop(self, task: _Task) -> None:
        """Nobody waits for the task any more, if it has not ended."""
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

"""Jobs, what happens to them, and the queue: bounded, fair between clients, in batches of one shape.

Pure: no clock but the one that is handed in, no threads, no network.
"""

import itertools
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["generate", "reconstruct"]
State = Literal["queued", "running", "done", "failed", "cancelled"]
ENDED = ("done", "failed", "cancelled")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What pictures must share to be drawn together."""

    kind: Kind
    width: int
    height: int
    guidance: float
    prior_steps: int
    prior_sampler: str
    decoder_steps: int
    strength: float | None
    """None where nothing but noise is begun with."""


@dataclass(frozen=True)
class Event:
    """``number`` counts up within a job, with gaps where an event has been superseded."""

    number: int
    name: str
    data: dict[str, Any]


@dataclass(eq=False)
class Picture:
    """One picture of a job."""

    job: "Job"
    index: int

    @property
    def prompt(self) -> str:
        return self.job.prompts[self.index]

    @property
    def seed(self) -> int:
        return self.job.seeds[self.index]


@dataclass(eq=False)
class Job:
    """What one client asked for at once."""

    client: str
    shape: Shape
    prompts: Sequence[str]
    """One for each picture."""
    seeds: Sequence[int]
    count: int = 1
    """Pictures of each prompt."""
    negative: str = ""
    image: bytes | None = field(default=None, repr=False)
    """RGB of the shape's size."""
    previews: bool = True
    instance: str = "here"
    created: float = 0.0
    """Of the clock that timeouts are measured by."""
    unix_time: int = 0
    id: str = ""
    state: State = "queued"
    events: list[Event] = field(default_factory=list)
    """What is still worth telling, oldest first."""
    images: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None
    error_type: str = "server_error"
    notices: list[str] = field(default_factory=list)
    fraction: float = 0.0
    """How far the pictures are that are being drawn."""
    ended: float | None = None
    listeners: set[Callable[[], None]] = field(default_factory=set)
    waiting: deque[int] = field(default_factory=deque)
    """Numbers of pictures that no worker has been given."""

    def __post_init__(self) -> None:
        self.id = self.id or f"{self.instance}-{secrets.token_hex(16)}"
        self.waiting = deque(range(len(self.prompts)))
        self._numbers = itertools.count(1)

    @property
    def log_name(self) -> str:
        """The beginning of the id, for logs: the whole id lets its reader read and cancel the job."""
        return self.id[: len(self.instance) + 9]

    @property
    def total(self) -> int:
        return len(self.prompts)

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED

    @property
    def progress(self) -> float:
        """From 0 to 1."""
        if self.state == "done":
            return 1.0
        return min(0.99, (len(self.images) + self.fraction) / self.total)

    def begin(self) -> None:
        if self.state == "queued":
            self.state = "running"
            self.emit("running", {})

    def add_image(self, index: int, url: str) -> None:
        """A picture is finished; the last one ends the job."""
        width, height = self.shape.width, self.shape.height
        known = {"index": index, "url": url, "seed": self.seeds[index], "prompt": self.prompts[index]}
        image = {**known, "width": width, "height": height}
        self.images.append(image)
        self.emit("image", image)

    def end(self, state: State, now: float, message: str | None = None, kind: str = "server_error") -> None:
        """Ends the job, unless it has ended before."""
        if self.has_ended:
            return
        self.state, self.ended, self.error = state, now, message
        self.error_type = kind
        self.waiting.clear()
        self.image = None
        self.emit(state, {} if message is None else {"message": message})

    def emit(self, name: str, data: dict[str, Any]) -> None:
        """Adds an event; what it supersedes is forgotten, so a job stays small however long it takes."""
        over = {
            "queued": ("queued",),
            "running": ("queued",),
            "progress": ("progress",),
        }.get(name, ("queued", "progress", "preview") if name in ENDED else ())
        self.events = [
            event
            for event in self.events
            if event.name not in over
            and not (
                name in ("preview", "image")
                and event.name == "preview"
                and event.data["index"] == data["index"]
            )
        ]
        self.events.append(Event(next(self._numbers), name, data))
        for listener in list(self.listeners):
            listener()

    def events_after(self, number: int) -> list[Event]:
        return [event for event in self.events if event.number > number]


class QueueFull(Exception):
    """No room: ``of_client`` says whether for this client alone."""

    def __init__(self, message: str, *, of_client: bool) -> None:
        super().__init__(message)
        self.of_client = of_client


class FairQueue:
    """Waiting pictures, by client and job.

    ``take`` serves clients in turn: whoever has waited longest decides the shape of the batch, and what room
    is left goes round the others, a picture each, to those that wait for the same shape. So a client that
    waits is served within as many batches as there are clients, however much another one asks for.
    """

    def __init__(self, max_pictures: int, max_jobs_per_client: int) -> None:
        self.max_pictures = max_pictures
        self.max_jobs_per_client = max_jobs_per_client
        self._clients: dict[str, list[Job]] = {}
        """In the order of their turns; jobs that wait, oldest first."""
        self._open: dict[str, int] = {}
        """Jobs of each client that have not ended."""

    def __len__(self) -> int:
        """Pictures that wait."""
        return sum(len(job.waiting) for job in self.jobs())

    def jobs(self) -> Iterator[Job]:
        """Those with pictures that wait."""
        return itertools.chain.from_iterable(self._clients.values())

    def open_jobs(self) -> int:
        """Jobs that wait or are being drawn."""
        return sum(self._open.values())

    def check(self, client: str, pictures: int) -> None:
        """Raises ``QueueFull`` if so many more do not fit."""
        mine = self._open.get(client, 0)
        if mine >= self.max_jobs_per_client:
            raise QueueFull(
                f"{mine} jobs of yours are wrong because a client may have {self.max_jobs_per_client} at a "
                "time; wait until one has ended",
                of_client=True,
            )
        waiting = len(self)
        if waiting + pictures > self.max_pictures:
            raise QueueFull(
                f"{pictures} more pictures are wrong because {waiting} of at most {self.max_pictures} wait "
                "already; try again later",
                of_client=False,
            )

    def add(self, job: Job) -> None:
        """Raises ``QueueFull`` where ``check`` does."""
        self.check(job.client, len(job.waiting))
        self._clients.setdefault(job.client, []).append(job)
        self._open[job.client] = self._open.get(job.client, 0) + 1

    def close(self, job: Job) -> None:
        """The job has ended, and no longer counts. To be called once a job."""
        self._forget(job)
        self._open[job.client] -= 1
        if not self._open[job.client]:
            del self._open[job.client]

    def take(self, room: Callable[[Shape], int]) -> list[Picture]:
        """The next batch, of at most ``room(shape)`` pictures; empty if nothing waits."""
        if not self._clients:
            return []
        shape = next(iter(self._clients.values()))[0].shape
        most = max(1, room(shape))
        taken: list[Picture] = []
        served: dict[str, None] = {}
        while len(taken) < most:
            before = len(taken)
            for client, jobs in self._clients.items():
                job = next((job for job in jobs if job.shape == shape and job.waiting), None)
                if job is not None and len(taken) < most:
                    taken.append(Picture(job, job.waiting.popleft()))
                    served[client] = None
            if len(taken) == before:
                break
        for client in served:
            jobs = [job for job in self._clients.pop(client) if job.waiting]
            if jobs:
                self._clients[client] = jobs
        return taken

    def positions(self) -> dict[Job, int]:
        """The place of each job that waits, from 1, if clients took turns by jobs."""
        rounds = itertools.zip_longest(*self._clients.values())
        order = [job for jobs in rounds for job in jobs if job is not None]
        return {job: place for place, job in enumerate(order, start=1)}

    def _forget(self, job: Job) -> None:
        jobs = self._clients.get(job.client, [])
        if job in jobs:
            jobs.remove(job)
            if not jobs:
                del self._clients[job.client]

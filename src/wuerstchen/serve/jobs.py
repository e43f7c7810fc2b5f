"""Jobs, their events, and the queue: bounded, fair between clients, in batches of one shape.

No threads, no network, and no clock of its own: callers pass the time.
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
    """The settings that all images of a batch share."""

    kind: Kind
    width: int
    height: int
    guidance: float
    guidance_interval: tuple[float, float]
    prior_steps: int
    prior_sampler: str
    decoder_steps: int
    strength: float | None
    """None if there is no init image."""
    masked: bool = False
    """Whether only a part of the init image is repainted."""
    lora: str | None = None
    """The name of an adapter."""
    lora_strength: float = 1.0
    decoder_sampler: str = ""
    """Empty for models without a student of Stage B."""


@dataclass(frozen=True)
class Event:
    """``number`` increases within a job. Superseded events leave gaps."""

    number: int
    name: str
    data: dict[str, Any]


@dataclass(eq=False)
class ImageTask:
    """One image of a job, to be generated."""

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
    """One request of a client, for one or more images."""

    client: str
    shape: Shape
    prompts: Sequence[str]
    """One per image."""
    seeds: Sequence[int]
    count: int = 1
    """Images per prompt."""
    negative: str = ""
    image: bytes | None = field(default=None, repr=False)
    """RGB bytes of the init image, in the size of the shape."""
    mask: bytes | None = field(default=None, repr=False)
    """Grey bytes of its mask, in the size of the shape."""
    previews: bool = True
    instance: str = "here"
    created: float = 0.0
    """Monotonic time in seconds, for timeouts."""
    unix_time: int = 0
    id: str = ""
    state: State = "queued"
    events: list[Event] = field(default_factory=list)
    """Events that have not been superseded, oldest first."""
    images: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None
    error_type: str = "server_error"
    notices: list[str] = field(default_factory=list)
    fraction: float = 0.0
    """Progress of the images that are being generated, in images."""
    ended: float | None = None
    listeners: set[Callable[[], None]] = field(default_factory=set)
    waiting: deque[int] = field(default_factory=deque)
    """Indices of images that no worker has yet."""

    def __post_init__(self) -> None:
        self.id = self.id or f"{self.instance}-{secrets.token_hex(16)}"
        self.waiting = deque(range(len(self.prompts)))
        self._numbers = itertools.count(1)

    @property
    def log_name(self) -> str:
        """The beginning of the id. Logs must not contain the whole id: whoever knows it can cancel the
        job."""
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

    def start(self) -> None:
        if self.state == "queued":
            self.state = "running"
            self.emit("running", {})

    def add_image(self, index: int, url: str) -> None:
        """Adds a finished image and sends its event."""
        width, height = self.shape.width, self.shape.height
        image = {
            "index": index,
            "url": url,
            "seed": self.seeds[index],
            "prompt": self.prompts[index],
            "width": width,
            "height": height,
        }
        self.images.append(image)
        self.emit("image", image)

    def end(self, state: State, now: float, message: str | None = None, kind: str = "server_error") -> None:
        """Ends the job. Does nothing if it has already ended."""
        if self.has_ended:
            return
        self.state, self.ended, self.error = state, now, message
        self.error_type = kind
        self.waiting.clear()
        self.image = None
        self.emit(state, {} if message is None else {"message": message})

    def emit(self, name: str, data: dict[str, Any]) -> None:
        """Adds an event and drops those that it supersedes, so that a job's memory stays bounded."""
        superseded = {
            "queued": ("queued",),
            "running": ("queued",),
            "progress": ("progress",),
        }.get(name, ("queued", "progress", "preview") if name in ENDED else ())
        self.events = [
            event
            for event in self.events
            if event.name not in superseded
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
    """The queue is full. ``of_client``: whether this client's own limit is reached."""

    def __init__(self, message: str, *, of_client: bool) -> None:
        super().__init__(message)
        self.of_client = of_client


class FairQueue:
    """Images that wait, by client and job.

    ``take`` serves clients in turn. The client that has waited longest decides the shape of the batch. The
    remaining room goes to the other clients that wait for the same shape, one image each in turn. So a client
    is served within as many batches as there are clients, however many images the others request.
    """

    def __init__(self, max_images: int, max_jobs_per_client: int) -> None:
        self.max_images = max_images
        self.max_jobs_per_client = max_jobs_per_client
        self._clients: dict[str, list[Job]] = {}
        """Clients in the order of their turns, each with its waiting jobs, oldest first."""
        self._open: dict[str, int] = {}
        """Number of open jobs of each client."""

    def __len__(self) -> int:
        """Number of images that wait."""
        return sum(len(job.waiting) for job in self.jobs())

    def jobs(self) -> Iterator[Job]:
        """Jobs with images that wait."""
        return itertools.chain.from_iterable(self._clients.values())

    def open_jobs(self) -> int:
        """Number of jobs that have not ended."""
        return sum(self._open.values())

    def check(self, client: str, images: int) -> None:
        """Raises ``QueueFull`` if this many more images do not fit."""
        mine = self._open.get(client, 0)
        if mine >= self.max_jobs_per_client:
            raise QueueFull(
                f"You already have {mine} open jobs, the limit per client. Wait for one to finish.",
                of_client=True,
            )
        waiting = len(self)
        if waiting + images > self.max_images:
            raise QueueFull(
                f"The queue is too full for {images} more images: {waiting} are waiting, and the limit is "
                f"{self.max_images}. Try again later.",
                of_client=False,
            )

    def add(self, job: Job) -> None:
        """Queues a job. Raises ``QueueFull`` as ``check`` does."""
        self.check(job.client, len(job.waiting))
        self._clients.setdefault(job.client, []).append(job)
        self._open[job.client] = self._open.get(job.client, 0) + 1

    def close(self, job: Job) -> None:
        """Removes a job that has ended. Call it once per job."""
        self._forget(job)
        self._open[job.client] -= 1
        if not self._open[job.client]:
            del self._open[job.client]

    def take(self, room: Callable[[Shape], int]) -> list[ImageTask]:
        """Takes the next batch, of at most ``room(shape)`` images. Empty if nothing waits."""
        if not self._clients:
            return []
        shape = next(iter(self._clients.values()))[0].shape
        size = max(1, room(shape))
        taken: list[ImageTask] = []
        served: dict[str, None] = {}
        while len(taken) < size:
            before = len(taken)
            for client, jobs in self._clients.items():
                job = next((job for job in jobs if job.shape == shape and job.waiting), None)
                if job is not None and len(taken) < size:
                    taken.append(ImageTask(job, job.waiting.popleft()))
                    served[client] = None
            if len(taken) == before:
                break
        for client in served:
            jobs = [job for job in self._clients.pop(client) if job.waiting]
            if jobs:
                self._clients[client] = jobs
        return taken

    def positions(self) -> dict[Job, int]:
        """The position of each waiting job, from 1. An approximation: as if clients took turns by job, not by
        image."""
        rounds = itertools.zip_longest(*self._clients.values())
        order = [job for jobs in rounds for job in jobs if job is not None]
        return {job: place for place, job in enumerate(order, start=1)}

    def _forget(self, job: Job) -> None:
        jobs = self._clients.get(job.client, [])
        if job in jobs:
            jobs.remove(job)
            if not jobs:
                del self._clients[job.client]

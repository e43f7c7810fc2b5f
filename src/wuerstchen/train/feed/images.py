"""Batches for training: picture number ``index`` of the run, for index after index.

Nothing is shuffled or remembered here. What comes next follows from the number of images seen, so a resumed
run is fed as the unbroken one would have been.
"""

import multiprocessing
import os
import re
import shutil
import signal
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from wuerstchen.data.plan import generator, item_at, stable_hash
from wuerstchen.data.sources import Example, Size, Source
from wuerstchen.errors import DataError, UserError

_PREFETCHED = 4  # batches that each worker makes ahead
_SHARED_MEMORY = "/dev/shm"


@dataclass(frozen=True)
class Batch:
    """Pictures of one update."""

    indices: Int[Tensor, " b"]
    """Their numbers in the run: the key to everything random about them."""
    images: UInt8[Tensor, "b h w 3"]
    captions: list[str]
    """Empty where captions were not asked for."""
    skipped: list[tuple[str, str]]
    """Names of pictures that could not be read, with the reason; their successors took their places."""

    def pixels(self, device: torch.device) -> Tensor:
        """The pictures in [0, 1], as (b, 3, h, w) in fp32."""
        return pixels_of(self.images.to(device))


def pixels_of(images: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b 3 h w"]:
    """Pictures in [0, 1], in fp32."""
    return images.permute(0, 3, 1, 2).float().div(255).contiguous()


B = TypeVar("B", covariant=True)


@runtime_checkable
class Feeding(Protocol[B]):
    """Where batches come from: samples by their numbers in the run, and how they are put together."""

    def __getitem__(self, index: int) -> Any: ...

    def collate(self, samples: list[Any]) -> B: ...


def batch_sizes(size: int, max_ratio: float, multiple: int = 1) -> tuple[Size, ...]:
    """Widths and heights of the batches of a phase: a square, and its sides made longer by ``max_ratio``.

    Longer sides are rounded to a ``multiple``. 1024 and 5/3 are the published sizes: the compressor then sees
    768×768, 1280×768 and 768×1280 pixels.
    """
    long = round(size * max_ratio / multiple) * multiple
    return ((size, size),) if long == size else ((size, size), (long, size), (size, long))


class Feed(Dataset[tuple[int, Example, list[tuple[str, str]]]]):
    """Picture number ``index`` of a run.

    With several ``sizes`` all pictures of a batch have one of them, as likely as any other. It is a function
    of the seed and of the number of the batch, so processes that share a batch agree.
    """

    def __init__(
        self,
        source: Source,
        seed: int,
        size: int,
        captions: bool,
        *,
        sizes: tuple[Size, ...] = (),
        batch_size: int = 1,
        skip: Collection[str] = (),
    ) -> None:
        """Images whose names are in ``skip`` are left out: their successors take their places."""
        self.source = source
        self.seed = seed
        self.size = size
        self.captions = captions
        self.sizes = sizes or ((size, size),)
        self.batch_size = batch_size
        self.skip = frozenset(skip)

    def size_of(self, index: int) -> Size:
        """Width and height of picture number ``index``."""
        if len(self.sizes) == 1:
            return self.sizes[0]
        batch = index // self.batch_size
        return self.sizes[stable_hash(self.seed, "size", batch) % len(self.sizes)]

    def __getitem__(self, index: int) -> tuple[int, Example, list[tuple[str, str]]]:
        length = len(self.source)
        width, height = self.size_of(index)
        size = width if width == height else (width, height)
        item = item_at(index, length, self.seed)
        skipped: list[tuple[str, str]] = []
        for _ in range(length):
            if self.skip and self.source.name(item) in self.skip:
                item = (item + 1) % length
                continue
            try:
                rng = generator(self.seed, index, "example")
                if self.captions:
                    example = self.source.example(item, rng, size)
                else:
                    example = Example(image=self.source.image(item, rng, size), caption="")
                return index, example, skipped
            except DataError as error:
                skipped.append((self.source.name(item), str(error)))
                item = (item + 1) % length
        if not skipped:
            raise DataError(f"all {length} images are named in skip; leave some of them out of it")
        raise DataError(f"none of the {length} images can be read, the last because: {skipped[-1][1]}")

    def names(self, indices: Sequence[int]) -> list[str]:
        """The names of pictures by their numbers in the run, without opening them."""
        length = len(self.source)
        return [self.source.name(item_at(index, length, self.seed)) for index in indices]

    def collate(self, samples: list[tuple[int, Example, list[tuple[str, str]]]]) -> Batch:
        return Batch(
            indices=torch.tensor([index for index, _, _ in samples], dtype=torch.int64, device="cpu"),
            images=torch.from_numpy(np.stack([example.image for _, example, _ in samples])),
            captions=[example.caption for _, example, _ in samples],
            skipped=[entry for _, _, skipped in samples for entry in skipped],
        )

    def shown(self, count: int, size: int) -> Float[Tensor, "n 3 h w"]:
        """The pictures of the preview grid, always the same."""
        feed = Feed(self.source, 0, size, captions=False, skip=self.skip)
        return feed.collate([feed[index] for index in range(count)]).pixels(torch.device("cpu"))


def _start_worker(_: int) -> None:
    """Leaves the process group, whose signals only the training process is to answer (Ctrl-C, a scheduler's
    SIGTERM): it ends its workers itself when it has written a checkpoint."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


@dataclass(frozen=True)
class _Collating:
    """Makes batches of samples, in a worker in shared memory at once.

    torch would move tensors there in a thread of the worker, where a lack of room is printed and the batch
    lost: the training process then waits for it for ever. Here it is an error of the worker's.
    """

    feed: Feeding[Any]

    def __call__(self, samples: list[Any]) -> Any:
        batch = self.feed.collate(samples)
        if get_worker_info() is not None:
            for value in vars(batch).values():
                if isinstance(value, Tensor):
                    value.share_memory_()
        return batch


def _lacks_shared_memory(error: RuntimeError) -> bool:
    """Whether an error of the processes that load images says that there is no room to hand batches over."""
    # torch names its file there; a worker that writes beyond the room dies of a bus error.
    return bool(re.search(r"</torch_\w+>|shared memory|[Bb]us error", str(error)))


def _no_shared_memory(workers: int) -> UserError:
    room = ""
    if os.path.isdir(_SHARED_MEMORY):
        usage = shutil.disk_usage(_SHARED_MEMORY)
        room = f": {usage.free / 2**20:,.0f} MiB free of {usage.total / 2**20:,.0f}"
    return UserError(
        f"{_SHARED_MEMORY} has no room for the batches of --workers {workers}{room}. Each of these processes "
        f"keeps up to {_PREFETCHED} batches there. Use fewer or --workers 0, or make it larger, in a "
        "container with docker run --shm-size 16g"
    )


@dataclass(frozen=True)
class _Batches:
    """The image numbers from ``start`` to ``end`` - 1 in groups; none is made before it is asked for."""

    start: int
    end: int
    batch_size: int
    part: Callable[[range], range]

    def __iter__(self) -> Iterator[range]:
        for first in range(self.start, self.end, self.batch_size):
            yield self.part(range(first, min(first + self.batch_size, self.end)))

    def __len__(self) -> int:
        return -(-(self.end - self.start) // self.batch_size)


def _whole(numbers: range) -> range:
    return numbers


def batches(
    feed: Feeding[B],
    start: int,
    end: int,
    batch_size: int,
    workers: int,
    part: Callable[[range], range] = _whole,
) -> Generator[B, None, None]:
    """The pictures ``start`` to ``end`` - 1 in batches; the last may be smaller.

    ``part`` is what this process wants of each batch.
    """
    loader: DataLoader[Any] = DataLoader(
        feed,  # type: ignore[arg-type]
        batch_sampler=_Batches(start, end, batch_size, part),
        num_workers=workers,
        collate_fn=_Collating(feed),
        worker_init_fn=_start_worker,
        prefetch_factor=_PREFETCHED if workers else None,
    )
    if workers:
        try:
            # As many as the loader will make for its queues; where it cannot, it leaves a traceback.
            _ = [multiprocessing.Lock() for _ in range(8 + 4 * workers)]
        except OSError as error:
            raise _no_shared_memory(workers) from error
    others = set(multiprocessing.active_children())
    started: set[multiprocessing.Process] = set()
    try:
        iterator = iter(loader)
        started = {*multiprocessing.active_children()} - others
        yield from iterator
    except DataError as error:
        # From a worker the message comes wrapped in that process's traceback; its last line is ours.
        raise DataError(
            # Not str(error), which spells the line breaks out.
            error.args[0].strip().splitlines()[-1].removeprefix("wuerstchen.errors.DataError: ")
        ) from None
    except RuntimeError as error:
        if not workers or not _lacks_shared_memory(error):
            raise
        raise _no_shared_memory(workers) from error
    finally:
        # Those that hang in a read would each be waited for; all they do is read.
        for worker in started:
            if worker.is_alive():
                worker.terminate()

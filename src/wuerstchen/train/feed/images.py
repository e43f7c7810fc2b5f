"""Batches of images for training.

The image with index i of a run is a function of the seed and i. There is no shuffling state: the next batch
follows from the number of images seen, so a resumed run gets the same batches as an unbroken one.
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

from wuerstchen.data.mixture import item_of, span_of
from wuerstchen.data.plan import generator, stable_hash
from wuerstchen.data.sources import Example, Size, Source
from wuerstchen.errors import DataError, UserError

_PREFETCHED = 4  # batches that each worker prepares in advance
_SHARED_MEMORY = "/dev/shm"


@dataclass(frozen=True)
class Batch:
    """The images of one update."""

    indices: Int[Tensor, " b"]
    """Their indices in the run. All random numbers of an image are a function of the seed and its index."""
    images: UInt8[Tensor, "b h w 3"]
    captions: list[str]
    """Empty strings if captions were not requested."""
    skipped: list[tuple[str, str]]
    """Names of images that could not be read, with the reason. The next images took their places."""

    def pixels(self, device: torch.device) -> Tensor:
        """The images in [0, 1], of shape (b, 3, h, w), in fp32."""
        return pixels_of(self.images.to(device))


def pixels_of(images: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b 3 h w"]:
    """Converts images to [0, 1] in fp32."""
    return images.permute(0, 3, 1, 2).float().div(255).contiguous()


B = TypeVar("B", covariant=True)


@runtime_checkable
class Feeding(Protocol[B]):
    """A data set of samples by their indices in the run, with a function that collates them into batches."""

    def __getitem__(self, index: int) -> Any: ...

    def collate(self, samples: list[Any]) -> B: ...


def mirrored(example: Example) -> Example:
    """The image mirrored from left to right. Its caption, if there is one, says so."""
    caption = f"{example.caption}, mirrored" if example.caption else ""
    return Example(image=np.ascontiguousarray(example.image[:, ::-1]), caption=caption)


def batch_sizes(size: int, max_ratio: float, multiple: int = 1) -> tuple[Size, ...]:
    """The (width, height) of the batches of a phase: square, and wide and tall by ``max_ratio``.

    The longer side is rounded to a multiple of ``multiple``. 1024 and 5/3 give the published sizes, for which
    the compressor sees 768×768, 1280×768 and 768×1280 pixels.
    """
    longer = round(size * max_ratio / multiple) * multiple
    return ((size, size),) if longer == size else ((size, size), (longer, size), (size, longer))


class Feed(Dataset[tuple[int, Example, list[tuple[str, str]]]]):
    """The images of a run by index.

    With several ``sizes``, all images of a batch have the same size, drawn uniformly. The size is a function
    of the seed and the number of the batch, so all processes use the same one.
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
        mirrored: float = 0.0,
    ) -> None:
        """Images named in ``skip`` are left out. The next images take their places. A fraction ``mirrored``
        of the images is mirrored, see the function."""
        self.source = source
        self.seed = seed
        self.size = size
        self.captions = captions
        self.sizes = sizes or ((size, size),)
        self.batch_size = batch_size
        self.skip = frozenset(skip)
        self.mirrored = mirrored

    def size_of(self, index: int) -> Size:
        """Width and height of the image with this index."""
        if len(self.sizes) == 1:
            return self.sizes[0]
        batch = index // self.batch_size
        return self.sizes[stable_hash(self.seed, "size", batch) % len(self.sizes)]

    def __getitem__(self, index: int) -> tuple[int, Example, list[tuple[str, str]]]:
        width, height = self.size_of(index)
        size = width if width == height else (width, height)
        item = item_of(self.source, index, self.seed)
        others = span_of(self.source, item)
        length = len(others)
        skipped: list[tuple[str, str]] = []
        for _ in range(length):
            if self.skip and self.source.name(item) in self.skip:
                item = others[(item + 1 - others.start) % length]
                continue
            try:
                rng = generator(self.seed, index, "example")
                if self.captions:
                    example = self.source.example(item, rng, size)
                else:
                    example = Example(image=self.source.image(item, rng, size), caption="")
                if self.mirrored and generator(self.seed, index, "mirrored").random() < self.mirrored:
                    example = mirrored(example)
                return index, example, skipped
            except DataError as error:
                skipped.append((self.source.name(item), str(error)))
                item = others[(item + 1 - others.start) % length]
        if not skipped:
            raise DataError(f"skip must leave some images, got the names of all {length}.")
        raise DataError(f"none of the {length} images can be read, the last because: {skipped[-1][1]}")

    def names(self, indices: Sequence[int]) -> list[str]:
        """The names of the images with these indices, without opening them."""
        return [self.source.name(item_of(self.source, index, self.seed)) for index in indices]

    def collate(self, samples: list[tuple[int, Example, list[tuple[str, str]]]]) -> Batch:
        return Batch(
            indices=torch.tensor([index for index, _, _ in samples], dtype=torch.int64, device="cpu"),
            images=torch.from_numpy(np.stack([example.image for _, example, _ in samples])),
            captions=[example.caption for _, example, _ in samples],
            skipped=[entry for _, _, skipped in samples for entry in skipped],
        )

    def shown(self, count: int, size: int) -> Float[Tensor, "n 3 h w"]:
        """The images of the preview grid, always the same."""
        feed = Feed(self.source, 0, size, captions=False, skip=self.skip)
        return feed.collate([feed[index] for index in range(count)]).pixels(torch.device("cpu"))


def _start_worker(_: int) -> None:
    """Leaves the process group, so that only the training process receives signals (Ctrl-C, a scheduler's
    SIGTERM). It stops its workers after it has written a checkpoint."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


@dataclass(frozen=True)
class _Collating:
    """Collates samples into batches. In a worker, moves the tensors into shared memory right away.

    torch would move them in a thread of the worker. If there is no room, that thread only prints an error,
    and the training process waits for the batch forever. Here the worker raises the error.
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
    """Whether an error of a worker means that shared memory is full."""
    # torch names its shared-memory file. A worker that writes beyond the end dies of a bus error.
    return bool(re.search(r"</torch_\w+>|shared memory|[Bb]us error", str(error)))


def _no_shared_memory(workers: int) -> UserError:
    room = ""
    if os.path.isdir(_SHARED_MEMORY):
        usage = shutil.disk_usage(_SHARED_MEMORY)
        room = f": {usage.free / 2**20:,.0f} MiB free of {usage.total / 2**20:,.0f}"
    return UserError(
        f"{_SHARED_MEMORY} is too small for the batches of --workers {workers}{room}. Each worker keeps up "
        f"to {_PREFETCHED} batches in it. Use fewer workers, --workers 0, or more shared memory, in a "
        "container with docker run --shm-size 16g."
    )


@dataclass(frozen=True)
class _Batches:
    """The indices from ``start`` to ``end`` - 1 in batches, generated lazily."""

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
    """The images ``start`` to ``end`` - 1 in batches. The last batch may be smaller.

    ``part`` selects this process's images of each batch.
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
            # As many locks as the loader creates for its queues. If it fails there, it prints a traceback.
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
        # A worker wraps the message in its traceback. The last line is the message.
        raise DataError(
            # str(error) would escape the line breaks.
            error.args[0].strip().splitlines()[-1].removeprefix("wuerstchen.errors.DataError: ")
        ) from None
    except RuntimeError as error:
        if not workers or not _lacks_shared_memory(error):
            raise
        raise _no_shared_memory(workers) from error
    finally:
        # The loader would wait for workers that hang in a read. They only read: terminating them is safe.
        for worker in started:
            if worker.is_alive():
                worker.terminate()

"""One run on many processes started by ``torchrun``. Each computes its slice of every batch.

Networks, averages and optimizers are replicated and gradients averaged before every update, or the large
networks are sharded (sharding.py). Everything random is a function of the image number, so the images of a
batch, their crops, timesteps and noise do not depend on the number of processes. Only rank 0 writes files and
prints.
"""

import datetime
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wuerstchen.data.plan import stable_hash
from wuerstchen.errors import UserError
from wuerstchen.train.engine.heartbeat import monitor_peers, wait_for_all

_LARGE = 2**20  # elements of a gradient that gets an all-reduce of its own
_BUCKET = 32 * 2**20  # elements of a bucket of smaller ones: 128 MiB in fp32
T = TypeVar("T")
_TIMEOUT = datetime.timedelta(
    minutes=30
)  # of collectives: rank 0 may draw a preview or write a checkpoint meanwhile
_barriers = itertools.count()  # names of barriers: all ranks reach the same ones in the same order


@dataclass(frozen=True)
class Processes:
    """This process and how many there are. Its methods are collective: all ranks call them together."""

    device: torch.device
    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only rank that writes files and prints."""
        return self.rank == 0

    def rank_slice(self, numbers: range) -> range:
        """The consecutive images of a batch that this rank computes. All ranks get the same number."""
        size = len(numbers) // self.count
        return numbers[self.rank * size : (self.rank + 1) * size]

    def check_batches(self, stage: str, images: int, batch_size: int, accumulate: int = 1) -> None:
        """Raises ``UserError`` unless every batch of a stage can be split evenly over the processes."""
        least = self.count * accumulate
        if batch_size % least or (self.count > 1 and images % batch_size):
            parts = "" if accumulate == 1 else f" in accumulate={accumulate} parts each"
            raise UserError(
                f"stage_{stage}: batches of {batch_size} and {images} images in total cannot be split "
                f"evenly across {self.count} processes{parts}. Make batch_size a multiple of {least} and "
                "images a multiple of batch_size."
            )

    @contextmanager
    def averaging_gradients(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Averages the gradients of ``parameters`` over all ranks. Run the backward pass inside.

        The all-reduce of a large gradient starts as soon as it is computed and overlaps with the rest of the
        backward pass. Small gradients are reduced in buckets at the end.
        """
        if self.count == 1:
            yield
            return
        pending: dict[nn.Parameter, dist.Work] = {}
        averages = self.device.type == "cuda"  # gloo can only sum
        kind = dist.ReduceOp.AVG if averages else dist.ReduceOp.SUM

        def send(parameter: nn.Parameter) -> None:
            work = dist.all_reduce(parameter.grad, kind, async_op=True)
            assert work is not None
            pending[parameter] = work

        large = [p for p in parameters if p.numel() >= _LARGE]
        hooks = [parameter.register_post_accumulate_grad_hook(send) for parameter in large]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        for work in pending.values():
            work.wait()
        if not averages and pending:
            torch._foreach_div_([parameter.grad for parameter in pending], self.count)
        self.all_reduce_mean_([p.grad for p in parameters if p.grad is not None and p not in pending])

    def all_reduce_mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces tensors with their mean over all ranks, in place, a bucket at a time."""
        if self.count == 1:
            return
        bucket: list[Tensor] = []
        for number, tensor in enumerate(tensors):
            bucket.append(tensor)
            full = sum(t.numel() for t in bucket) >= _BUCKET
            follows = number + 1 < len(tensors) and tensors[number + 1].dtype == tensor.dtype
            if not full and follows:
                continue
            flat = torch.cat([t.flatten() for t in bucket])
            dist.all_reduce(flat)  # gloo can only sum
            flat /= self.count
            parts = flat.split([t.numel() for t in bucket])
            torch._foreach_copy_(bucket, [p.view_as(t) for p, t in zip(parts, bucket, strict=True)])
            bucket = []

    def all_reduce_sum(self, value: float) -> float:
        """The sum of ``value`` over all ranks."""
        if self.count == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return float(tensor)

    def any_rank(self, flag: bool) -> bool:
        """Whether ``flag`` is true on any rank."""
        return self.any_rank_each(flag)[0]

    def any_rank_each(self, *flags: bool) -> tuple[bool, ...]:
        """``any_rank`` of several flags in one all-reduce."""
        if self.count == 1:
            return flags
        tensor = torch.tensor(flags, dtype=torch.int32, device=self.device)
        dist.all_reduce(tensor)
        return tuple(bool(value) for value in tensor.tolist())

    def all_equal(self, text: str) -> bool:
        """Whether ``text`` is the same on all ranks."""
        if self.count == 1:
            return True
        lowest = torch.tensor(stable_hash(text) >> 1, dtype=torch.int64, device=self.device)
        highest = lowest.clone()
        dist.all_reduce(lowest, dist.ReduceOp.MIN)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        return bool(lowest == highest)

    def all_gather(self, items: Sequence[T]) -> list[T]:
        """The items of all ranks in rank order. They may be any picklable objects."""
        if not self.all_reduce_sum(float(len(items))):
            return []
        parts: list[Sequence[T]] = [items] * self.count
        if self.count > 1:
            dist.all_gather_object(parts, items)
        return [value for part in parts for value in part]

    def barrier(self) -> None:
        """Waits until all ranks have reached this call."""
        if self.count > 1:
            self.all_reduce_sum(0.0)  # unlike dist.barrier, this opens no further NCCL communicator

    def barrier_without_timeout(self) -> None:
        """A barrier without a time limit, for after work of unknown duration on a few ranks.

        Collectives fail if a rank is more than 30 minutes late (``_TIMEOUT``).
        """
        if self.count > 1:
            wait_for_all(str(next(_barriers)), self.count)


@contextmanager
def distributed(device: torch.device) -> Iterator[Processes]:
    """The processes of this run: those started by ``torchrun``, or this one alone.

    On GPUs, each process uses the GPU of its local rank. Raises ``UserError`` if there is none, and in place
    of gloo's or NCCL's error if the connection to another process is lost.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes(device)
        return
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local} has no GPU: this machine has {torch.cuda.device_count()}. Start "
                "torchrun with at most that many processes (--nproc-per-node)."
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    processes = Processes(device, rank, count)
    try:
        with monitor_peers(rank, count):
            yield processes
            processes.barrier()  # gloo aborts if a process leaves while another one still communicates
    except RuntimeError as error:
        # gloo's errors have no class of their own, but they name its source files.
        if not (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
            raise
        # The reason without the position in gloo's source and without its advice.
        reason = re.sub(r"^\[\S*\] *|\. .*", "", str(error).strip().split("\n")[0])[:200]
        raise UserError(
            f"process {rank} lost its connection to the others: {reason}. See the output of the process that "
            "ended first for the cause. Start the same command again to resume."
        ) from error
    finally:
        dist.destroy_process_group()

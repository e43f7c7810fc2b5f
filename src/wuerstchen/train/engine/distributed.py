"""One run in many processes, as ``torchrun`` starts them: each computes its share of every batch.

Networks, averages and optimizers are the same in all processes, and gradients are averaged before every
update; or the large networks are sharded, so that each process holds a part of them.
All that is random is a function of the image's number, so the images of a batch, their crops, times and
noise do not depend on how many processes there are. The first process alone writes and speaks.
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
from wuerstchen.train.engine.heartbeat import meet, watching_others

_LARGE = 2**20  # numbers of a tensor that travels alone
_BUCKET = 32 * 2**20  # numbers that travel together: 128 MiB of gradients
T = TypeVar("T")
_TIMEOUT = datetime.timedelta(
    minutes=30
)  # of collectives: rank 0 may draw a preview or write a checkpoint meanwhile
_meetings = itertools.count()  # all processes hold the same ones in the same order


@dataclass(frozen=True)
class Processes:
    """This process among those of a run."""

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
        """Raises ``UserError`` unless every batch of a stage can be shared evenly."""
        least = self.count * accumulate
        if batch_size % least or (self.count > 1 and images % batch_size):
            parts = "" if accumulate == 1 else f" in accumulate={accumulate} parts each"
            raise UserError(
                f"stage_{stage}: batches of {batch_size} and {images} images in all cannot be shared by "
                f"{self.count} processes{parts}; make batch_size a multiple of {least}, images of batch_size"
            )

    @contextmanager
    def averaging_gradients(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Replaces gradients by their average over all processes. The backward pass belongs inside: a large
        gradient travels as soon as it is there, while those before it are computed; the small ones travel
        together at the end.
        """
        if self.count == 1:
            yield
            return
        on_the_way: dict[nn.Parameter, dist.Work] = {}
        averages = self.device.type == "cuda"  # gloo has sums alone
        kind = dist.ReduceOp.AVG if averages else dist.ReduceOp.SUM

        def send(parameter: nn.Parameter) -> None:
            work = dist.all_reduce(parameter.grad, kind, async_op=True)
            assert work is not None
            on_the_way[parameter] = work

        large = [p for p in parameters if p.numel() >= _LARGE]
        hooks = [parameter.register_post_accumulate_grad_hook(send) for parameter in large]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        for work in on_the_way.values():
            work.wait()
        if not averages and on_the_way:
            torch._foreach_div_([parameter.grad for parameter in on_the_way], self.count)
        self.all_reduce_mean_([p.grad for p in parameters if p.grad is not None and p not in on_the_way])

    def all_reduce_mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces tensors by their average over all processes, a large bucket at a time."""
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
            dist.all_reduce(flat)  # gloo has sums alone
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
        least = torch.tensor(stable_hash(text) >> 1, dtype=torch.int64, device=self.device)
        most = least.clone()
        dist.all_reduce(least, dist.ReduceOp.MIN)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return bool(least == most)

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
            meet(str(next(_meetings)), self.count)


@contextmanager
def distributed(device: torch.device) -> Iterator[Processes]:
    """The processes of this run: those that ``torchrun`` started, or this one alone.

    On GPUs each takes the one of its number on its machine. Raises ``UserError`` if it has none, and in
    place of whatever is raised where another process has ended.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes(device)
        return
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(
                f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}; give "
                "torchrun --nproc-per-node at most that number"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    processes = Processes(device, rank, count)
    try:
        with watching_others(rank, count):
            yield processes
            processes.barrier()  # gloo aborts where one process leaves while another still talks
    except RuntimeError as error:
        # gloo's errors have no class of their own, but name its files.
        if not (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
            raise
        # Without the place in gloo's source, and its advice.
        reason = re.sub(r"^\[\S*\] *|\. .*", "", str(error).strip().split("\n")[0])[:200]
        raise UserError(
            f"process {rank} has lost the others ({reason}); one of them has ended and says why: start the "
            "same command again"
        ) from error
    finally:
        dist.destroy_process_group()

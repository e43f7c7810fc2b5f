"""What several benchmarks measure with."""

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import torch


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def matrix_rate(device: torch.device, dtype: torch.dtype, side: int = 8192) -> float:
    """FLOP a second of a product of square matrices, on random data."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    for _ in range(10):
        a @ b
    synchronise(device)
    began = time.perf_counter()
    for _ in range(50):
        a @ b
    synchronise(device)
    return 50 * 2 * side**3 / (time.perf_counter() - began)


def call_seconds(calls: Sequence[Callable[[], object]], device: torch.device, replays: int = 5) -> float:
    """Seconds of one of ``calls``, which are made one after the other; the median of several rounds.

    On a GPU a round is a CUDA graph, so that starting the kernels does not count. Calls on buffers of their
    own, more of them than the cache holds, show the time with inputs in memory.
    """
    for call in calls[:3]:
        call()
    synchronise(device)
    if device.type != "cuda":
        rounds = [_wall(calls) for _ in range(replays)]
        return statistics.median(rounds) / len(calls)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    rounds = [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(marks)]
    return statistics.median(rounds) / len(calls)


def _wall(calls: Sequence[Callable[[], object]]) -> float:
    began = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - began

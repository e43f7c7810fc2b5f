"""Helpers for measuring, shared by several benchmarks."""

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
    """FLOP/s of a product of random square matrices."""
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
    """Seconds per call, as the median over several rounds of all ``calls`` in order.

    On a GPU each round is a CUDA graph, which excludes the time for launching kernels. Give each call its own
    buffers, more than fit into the cache, to measure the time with inputs in memory.
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

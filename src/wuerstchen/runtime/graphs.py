"""CUDA graphs: functions that are recorded once and replayed, for sampling and for training.

Python launches kernels one by one, and the GPU waits for it. A recorded function is launched as a whole. So
the host cannot decide anything in it: everything that changes between calls is read from tensors at fixed
addresses.
"""

import functools
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ONE_AT_A_TIME = threading.RLock()
"""Held while the side stream is in use, because work of other threads on it would be recorded too."""


@functools.cache
def recording_stream(device: torch.device) -> torch.cuda.Stream:
    """The side stream that all networks on ``device`` sample on: libraries keep tens of MiB of workspace per
    stream."""
    return torch.cuda.Stream(device)


@dataclass(eq=False)
class _Graph:
    """A recorded function and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Any, ...]
    output: Any


class Graphs:
    """Recorded functions by key. They share their memory, so only one may run at a time.

    First call ``warm_up`` until ``is_warm`` returns true, after ``warm_ups`` calls per key and thread. In
    these calls, functions compile, buffers are allocated, and libraries initialise for the stream and the
    thread, which is not allowed during recording. Then call ``record`` once, and ``replay`` from then on.
    """

    def __init__(self, stream: torch.cuda.Stream, warm_ups: int, *, non_blocking: bool = False) -> None:
        """``stream`` is the side stream to warm up and record on. With ``non_blocking`` inputs are copied
        without waiting for the device, so the caller must not change them before the copies are done."""
        self.stream = stream
        self.warm_ups = warm_ups
        self.non_blocking = non_blocking
        self.warmed: dict[Hashable, dict[int, int]] = {}
        """How often each key has run, by thread."""
        self._graphs: dict[Hashable, _Graph] = {}

    def __contains__(self, key: Hashable) -> bool:
        """Whether ``key`` is recorded."""
        return key in self._graphs

    def output(self, key: Hashable) -> Any:
        """The tensors that the recorded function ``key`` writes its result to."""
        return self._graphs[key].output

    def is_warm(self, key: Hashable) -> bool:
        """Whether ``key`` is recorded, or has run often enough in this thread to be recorded now."""
        return key in self or self.warmed.get(key, {}).get(threading.get_ident(), 0) >= self.warm_ups

    def warm_up(self, key: Hashable, function: Callable[[], Any]) -> Any:
        """Runs ``function()`` on the side stream without recording it, in order with the current stream."""
        counts, thread = self.warmed.setdefault(key, {}), threading.get_ident()
        counts[thread] = counts.get(thread, 0) + 1
        current = torch.cuda.current_stream()
        with _ONE_AT_A_TIME:
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                output = function()
            current.wait_stream(self.stream)
        return output

    def record(
        self, key: Hashable, function: Callable[..., Any], inputs: tuple[Any, ...], more: tuple[Any, ...] = ()
    ) -> None:
        """Records ``function(*inputs, *more)`` without running it.

        The recording reads ``more`` at its present address, and ``inputs`` from copies that ``replay`` fills.
        Raises ``RuntimeError`` if the function cannot be recorded.
        """
        own = tuple(value.clone() if isinstance(value, Tensor) else value for value in inputs)
        graph = torch.cuda.CUDAGraph()
        other = next(iter(self._graphs.values()), None)
        pool = None if other is None else other.graph.pool()
        # "thread_local" lets other threads, such as NCCL's watchdog, use the device meanwhile.
        recording = torch.cuda.graph(graph, pool, self.stream, capture_error_mode="thread_local")
        # If recording fails, torch.cuda.graph leaves its stream the current one, and later work of this
        # thread would become part of other threads' recordings. So the outer context restores the stream.
        with _ONE_AT_A_TIME, torch.cuda.stream(self.stream), recording:
            output = function(*own, *more)
        self._graphs[key] = _Graph(graph, own, output)

    def replay(self, key: Hashable, inputs: tuple[Any, ...]) -> Any:
        """Runs the recording of ``key`` on ``inputs``. The next replay overwrites the result."""
        recorded = self._graphs[key]
        for own, given in zip(recorded.inputs, inputs, strict=True):
            if isinstance(own, Tensor):
                own.copy_(given, non_blocking=self.non_blocking)
        recorded.graph.replay()
        return recorded.output

    def forget(self) -> None:
        """Drops all recordings and frees their memory. Every key needs warming up again."""
        self._graphs.clear()
        self.warmed.clear()

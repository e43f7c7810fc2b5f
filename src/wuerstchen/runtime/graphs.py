"""CUDA graphs: functions that are recorded once and replayed, for sampling and for training.

Python starts kernels one by one, and a GPU waits for it. A recorded function is started as a whole. So
nothing in it may be decided on the host: it reads what changes from call to call from tensors that stay in
place.
"""

import functools
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ONE_AT_A_TIME = threading.RLock()
"""Held while the side stream is in use: what another thread ran on it would be recorded as well."""


@functools.cache
def recording_stream(device: torch.device) -> torch.cuda.Stream:
    """The side stream of all networks that sample on ``device``: libraries keep tens of MiB of workspace for
    every stream."""
    return torch.cuda.Stream(device)


@dataclass(eq=False)
class _Graph:
    """A recorded function with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Any, ...]
    output: Any


class Graphs:
    """Functions that are recorded by key. They share their memory, so only one may run at a time.

    Each key is run ``warm_ups`` times in every thread by ``warm_up``: functions compile, allocate what stays,
    and libraries prepare themselves for the stream and the thread, which is not allowed while recording. From
    then on ``is_warm`` is true, and ``replay`` records the function and replays it.
    """

    def __init__(self, stream: torch.cuda.Stream, warm_ups: int, *, non_blocking: bool = False) -> None:
        """``stream`` is the side stream to warm up and record on. With ``non_blocking`` inputs are copied
        without waiting for the device: the caller does not change them until the copies are made."""
        self.stream = stream
        self.warm_ups = warm_ups
        self.non_blocking = non_blocking
        self.warmed: dict[Hashable, dict[int, int]] = {}
        """How often each key has been run, by thread."""
        self._graphs: dict[Hashable, _Graph] = {}

    def __contains__(self, key: Hashable) -> bool:
        """Whether ``key`` is recorded."""
        return key in self._graphs

    def output(self, key: Hashable) -> Any:
        """What the recorded function ``key`` writes its result to."""
        return self._graphs[key].output

    def is_warm(self, key: Hashable) -> bool:
        """Whether ``key`` is recorded, or has been run often enough in this thread to be recorded next."""
        return key in self or self.warmed.get(key, {}).get(threading.get_ident(), 0) >= self.warm_ups

    def warm_up(self, key: Hashable, function: Callable[[], Any]) -> Any:
        """``function()``, run unrecorded on the side stream between what comes before and after."""
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
        """Records ``function(*inputs, *more)``, which runs nothing yet.

        The recording reads copies of ``inputs``, which ``replay`` fills, and reads ``more`` where it is.
        Raises ``RuntimeError`` for a function that cannot be recorded.
        """
        own = tuple(value.clone() if isinstance(value, Tensor) else value for value in inputs)
        graph = torch.cuda.CUDAGraph()
        other = next(iter(self._graphs.values()), None)
        pool = None if other is None else other.graph.pool()
        # Other threads may use the device meanwhile, as NCCL's watchdog does.
        recording = torch.cuda.graph(graph, pool, self.stream, capture_error_mode="thread_local")
        # If recording fails, torch.cuda.graph leaves its stream the current one. What this thread did later
        # would then be part of other threads' recordings. So the outer context restores the stream.
        with _ONE_AT_A_TIME, torch.cuda.stream(self.stream), recording:
            output = function(*own, *more)
        self._graphs[key] = _Graph(graph, own, output)

    def replay(self, key: Hashable, inputs: tuple[Any, ...]) -> Any:
        """Runs what is recorded for ``key`` on ``inputs``. The result is overwritten by the next replay."""
        recorded = self._graphs[key]
        for own, given in zip(recorded.inputs, inputs, strict=True):
            if isinstance(own, Tensor):
                own.copy_(given, non_blocking=self.non_blocking)
        recorded.graph.replay()
        return recorded.output

    def forget(self) -> None:
        """Drops all recordings and their memory. Every key is warmed up again."""
        self._graphs.clear()
        self.warmed.clear()

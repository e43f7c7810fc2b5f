"""Forward passes recorded as CUDA graphs: a GPU then waits for no Python, which starts kernels one by one.

A ``Recorder`` stands for one network. The first pass with inputs of some shapes runs as it is, the second is
recorded, and later ones are replayed, so even the first picture is drawn from a recording. What makes a
recording worthless is noticed, and it is made anew: other weights, adapters, scales of adapters. On other
devices, where hooks wait to be called, and where something learns, passes run as they are.
"""

import dataclasses
import itertools
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wuerstchen.errors import UserNotice
from wuerstchen.models.fused import join_projections


class NotRecordedWarning(UserNotice):
    """A network's passes are not recorded; drawing is right, but slower."""


@dataclass
class _Recording:
    """A recorded pass, with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    constant: Any
    """The recording's own copy of what does not change from pass to pass."""
    output: Tensor
    filled_from: Any
    """What that copy was made of."""


class Recorder:
    """``function`` of tensors that computes with ``network``'s weights, recorded where that can be."""

    def __init__(
        self, network: nn.Module, function: Callable[..., Tensor] | None = None, *, records: bool = True
    ) -> None:
        """``function`` is the network itself if none is given. With ``records`` false nothing is recorded."""
        self.network = network
        self.function = network if function is None else function
        self._recordings: dict[Any, _Recording] = {}
        self._seen: set[Any] = set()
        self._print: Any = None
        self._constant: Any = self  # none yet
        self._records = False
        self._allowed = records
        self._stream: torch.cuda.Stream | None = None
        self._lock = threading.Lock()

    def __call__(self, *inputs: Tensor, constant: Any = None) -> Tensor:
        """``function(*inputs)``, or ``function(*inputs, constant)`` if there is a constant.

        ``constant`` holds tensors in dataclasses, lists and tuples. It is read once for each object that is
        given: who changes a tensor in it gives another object.
        """
        if (
            not self._allowed
            or not inputs[0].is_cuda
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cuda")
        ):
            return self._run(inputs, constant)
        # Outside of inference mode, whose tensors nobody else could write to.
        with self._lock, torch.cuda.device(inputs[0].device), torch.inference_mode(False), torch.no_grad():
            if constant is None or constant is not self._constant:
                self._look_at_the_network(inputs[0].device)
                self._constant = constant
            return self._recorded(inputs, constant) if self._records else self._run(inputs, constant)

    def forget(self) -> None:
        """Gives the recordings' memory back."""
        self._recordings.clear()
        self._seen.clear()
        self._constant = self

    def _run(self, inputs: tuple[Tensor, ...], constant: Any) -> Tensor:
        return self.function(*inputs) if constant is None else self.function(*inputs, constant)

    def _look_at_the_network(self, device: torch.device) -> None:
        """Forgets what was recorded of other weights, and decides whether to record."""
        modules = list(self.network.modules())
        tensors = list(itertools.chain(self.network.parameters(), self.network.buffers()))
        self._records = (
            self._allowed
            and all(tensor.device == device for tensor in tensors)
            and not any(m.training or m._forward_hooks or m._forward_pre_hooks for m in modules)
        )
        if self._records:
            join_projections(self.network)
        adapters = [
            (str(m.scaling), str(getattr(m, "active_adapters", ""))) for m in modules if hasattr(m, "scaling")
        ]
        found = (tuple(tensor.data_ptr() for tensor in tensors), tuple(adapters))
        if found != self._print or not self._records:
            self.forget()
        self._print = found

    def _recorded(self, inputs: tuple[Tensor, ...], constant: Any) -> Tensor:
        shapes = tuple((t.shape, t.stride(), t.dtype) for t in (*inputs, *_tensors(constant)))
        recording = self._recordings.get(shapes)
        if recording is None:
            if shapes not in self._seen:
                self._seen.add(shapes)
                return self._on_own_stream(inputs, constant)
            recording = self._record(inputs, constant)
            if recording is None:
                return self._run(inputs, constant)
            self._recordings[shapes] = recording
        for own, given in zip(recording.inputs, inputs, strict=True):
            own.copy_(given)
        if recording.filled_from is not constant:
            for own, given in zip(_tensors(recording.constant), _tensors(constant), strict=True):
                own.copy_(given)
            recording.filled_from = constant
        recording.graph.replay()
        return recording.output.clone()

    def _on_own_stream(self, inputs: tuple[Tensor, ...], constant: Any) -> Tensor:
        """A pass on the stream that records: what libraries prepare for a stream is there then."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            output = self._run(inputs, constant)
        current.wait_stream(self._stream)
        output.record_stream(current)
        return output

    def _record(self, inputs: tuple[Tensor, ...], constant: Any) -> _Recording | None:
        """Records a pass; None, with a word why, where it cannot be."""
        mine = tuple(tensor.clone() for tensor in inputs)
        own = _copied(constant)
        graph, others = torch.cuda.CUDAGraph(), next(iter(self._recordings.values()), None)
        try:
            # All recordings share their memory, for one runs at a time and what it returns is copied at once.
            pool = None if others is None else others.graph.pool()
            with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                output = self._run(mine, own)
        except RuntimeError as error:
            self._allowed = self._records = False
            self.forget()
            reason = str(error).strip().partition("\n")[0]
            name = type(self.network).__name__
            warnings.warn(f"{name} runs unrecorded, and slower: {reason}", NotRecordedWarning, stacklevel=4)
            return None
        return _Recording(graph, mine, own, output, constant)


def _tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _mapped(found.append, tree)
    return found


def _copied(tree: Any) -> Any:
    return _mapped(torch.clone, tree)


def _mapped(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """``tree`` with ``function`` of every tensor in it."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, list | tuple):
        return type(tree)(_mapped(function, part) for part in tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        parts = {f.name: _mapped(function, getattr(tree, f.name)) for f in dataclasses.fields(tree)}
        return dataclasses.replace(tree, **parts)
    return tree

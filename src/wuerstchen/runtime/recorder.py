"""Forward passes recorded as CUDA graphs, so that the GPU does not wait for Python to launch each kernel.

A ``Recorder`` wraps one network. For each set of input shapes the first pass runs eagerly, the second is
recorded, and later ones are replayed, so even the first image benefits. A recording is dropped and made again
when the weights, the adapters or their scales change. Passes run eagerly on other devices, if the network has
hooks, and during training.
"""

import functools
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wuerstchen.errors import UserNotice
from wuerstchen.models.fused.blocks import join_layers
from wuerstchen.runtime.graphs import Graphs, recording_stream

MAX_KINDS = 16
"""Maximum number of input shapes with a recording per network. One more drops all recordings. Besides the
shared memory pool, a recording takes a few MiB, plus 15 MiB per text for keys and values at the published
sizes."""


class NotRecordedWarning(UserNotice):
    """A network's passes cannot be recorded. Sampling is correct, but slower."""


@dataclass(eq=False)
class _BoundArguments:
    """Arguments that do not change from pass to pass."""

    values: tuple[Any, ...]
    prepared: Any = None
    """``prepare(*values)``, for passes that run eagerly."""
    version: int = 0
    """The recorder's version when ``prepared`` was computed; ``invalidate`` increments it."""


class Recorder:
    """A ``function`` of tensors that uses ``network``'s weights, recorded where possible."""

    def __init__(
        self,
        network: nn.Module,
        function: Callable[..., Tensor] | None = None,
        prepare: Callable[..., Any] | None = None,
        *,
        records: bool = True,
    ) -> None:
        """``function`` defaults to the network itself. ``prepare`` computes its last argument from inputs
        that many passes share. ``records=False`` runs everything eagerly."""
        self.network = network
        self.function = network if function is None else function
        self.prepare = prepare
        self._graphs: Graphs | None = None
        """Passes, keyed by the kinds of their inputs and bound arguments, and preparations, keyed by the
        kinds of the bound arguments. No pass overwrites the preparation that it reads."""
        self._current: _BoundArguments | None = None
        """The arguments of the last preparation."""
        self._fingerprint: Any = None
        self.records = records
        self._failed, self._recordable = False, False
        self._bound: _BoundArguments | None = None
        self._version = 0
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes its own recordings."""
        new = Recorder(self.network, self.function, self.prepare, records=self.records)
        return {name: value for name, value in new.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __call__(self, *inputs: Tensor) -> Tensor:
        """``function(*inputs)``."""
        return self._run(inputs, None)

    def bind(self, *bound: Any) -> Callable[..., Tensor]:
        """``function(*inputs, prepare(*bound))`` as a function of the inputs.

        ``bound`` may hold tensors and other values. If you change such a tensor, call ``bind`` again.
        """
        kept = _BoundArguments(bound)
        return lambda *inputs: self._run(inputs, kept)

    def invalidate(self) -> None:
        """Makes the next pass check the network and prepare again.

        Call this after changing weights or adapters between two steps of an image.
        """
        self._version += 1
        self._bound = self._current = None

    def forget(self) -> None:
        """Drops all recordings and frees their memory."""
        self._graphs = self._current = self._bound = None

    def _run(self, inputs: tuple[Tensor, ...], bound: _BoundArguments | None) -> Tensor:
        here = inputs[0].device
        learns = torch.is_grad_enabled() or torch.is_autocast_enabled("cuda")
        if here.type != "cuda" or not self.records or self._failed or learns:
            return self._run_eagerly(inputs, bound)
        # Tensors created in inference mode could not be written to outside of it.
        with self._lock, torch.cuda.device(here), torch.inference_mode(False), torch.no_grad():
            if bound is None or bound is not self._bound:
                self._check_network(here, bound)
                self._bound = bound
            return self._recorded(inputs, bound) if self._recordable else self._run_eagerly(inputs, bound)

    def _run_eagerly(self, inputs: tuple[Tensor, ...], bound: _BoundArguments | None) -> Tensor:
        if bound is None:
            return self.function(*inputs)
        if bound.prepared is None or bound.version != self._version:
            assert self.prepare is not None
            bound.prepared, bound.version = self.prepare(*bound.values), self._version
        return self.function(*inputs, bound.prepared)

    def _check_network(self, device: torch.device, bound: _BoundArguments | None) -> None:
        """Drops recordings of a network that has changed, and decides whether to record."""
        found, self._recordable = self._state(device)
        if found != self._fingerprint and bound is not None:
            bound.prepared = None
        if found != self._fingerprint or not self._recordable:
            self.forget()
            if self._recordable:
                join_layers(self.network)
                found, _ = self._state(device)
        self._fingerprint = found

    def _state(self, device: torch.device) -> tuple[list[Any], bool]:
        """What a recording depends on, and whether the network can be recorded."""
        found: list[Any] = [device]
        compiled = hasattr(self.network, "_orig_mod") or self.network._compiled_call_impl is not None
        records = not compiled
        # modules() takes several times as long, and this runs for every image.
        waiting = [self.network]
        while waiting:
            module = waiting.pop()
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    found.append(tensor.data_ptr())
                    records &= tensor.device == device
            if module.training or module._forward_hooks or module._forward_pre_hooks:
                records = False
            found.append(type(module))
            if "forward" in module.__dict__:
                found.append(module.forward)
            if _is_adapter(type(module)):  # its scale, and whether it is active
                names = ("scaling", "active_adapters", "disable_adapters", "merged_adapters")
                found.append([str(getattr(module, name, "")) for name in names])
            waiting.extend(part for part in module._modules.values() if part is not None)
        return [*found, records], records

    def _recorded(self, inputs: tuple[Tensor, ...], bound: _BoundArguments | None) -> Tensor:
        bound_kind = None if bound is None else _kind(bound.values)
        kind = (_kind(inputs), bound_kind)
        graphs = self._graphs
        if graphs is None or (kind not in graphs.warmed and len(graphs.warmed) == MAX_KINDS):
            graphs = self._graphs = Graphs(recording_stream(inputs[0].device), warm_ups=1)
            self._current = None
        if not graphs.is_warm(kind):
            output = graphs.warm_up(kind, lambda: self._run_eagerly(inputs, bound))
            output.record_stream(torch.cuda.current_stream())
            return output
        try:
            prepared: tuple[Any, ...] = ()
            if bound is not None:
                assert self.prepare is not None
                bound.prepared = None  # the recording has its own copy
                preparation = ("prepare", bound_kind)
                if preparation not in graphs:
                    graphs.record(preparation, self.prepare, bound.values)
                    self._current = None
                if self._current is not bound:
                    graphs.replay(preparation, bound.values)
                    self._current = bound
                prepared = (graphs.output(preparation),)
            if kind not in graphs:
                graphs.record(kind, self.function, inputs, prepared)
            return graphs.replay(kind, inputs).clone()
        except RuntimeError as error:
            # An out-of-memory error may be temporary, so recording is tried again later.
            self._failed, self._recordable = not isinstance(error, torch.OutOfMemoryError), False
            self.forget()
            reason = str(error).strip().partition("\n")[0]
            name = type(self.network).__name__
            warnings.warn(
                f"{name} cannot be recorded as a CUDA graph: {reason}. It runs without, which is slower.",
                NotRecordedWarning,
                stacklevel=4,
            )
            return self._run_eagerly(inputs, bound)


class Recorders(dict[nn.Module, Recorder]):
    """A pipeline's recorders, by network."""

    def __init__(self, *, records: bool = True) -> None:
        """Set ``records`` to false while networks do not stay on the GPU."""
        super().__init__()
        self.records = records

    def invalidate(self) -> None:
        """Calls ``Recorder.invalidate`` on each."""
        for recorder in self.values():
            recorder.invalidate()

    def of(
        self,
        network: nn.Module,
        function: Callable[..., Tensor] | None = None,
        prepare: Callable[..., Any] | None = None,
    ) -> Recorder:
        """The recorder of a network. Replacing ``function`` or ``prepare`` invalidates the recorded graph."""
        function, recorder = network if function is None else function, self.get(network)
        if recorder is None or (recorder.function, recorder.prepare) != (function, prepare):
            recorder = self[network] = Recorder(network, function, prepare)
        recorder.records = self.records
        return recorder


@functools.cache
def _is_adapter(layer: type) -> bool:
    """Whether ``layer`` is one of peft's. Models of transformers have a method of the same name."""
    return isinstance(getattr(layer, "active_adapters", None), property)


def _kind(values: tuple[Any, ...]) -> Any:
    """The key of a recording: shapes, strides and dtypes of tensors, and the values of everything else."""
    return tuple((v.shape, v.stride(), v.dtype) if isinstance(v, Tensor) else v for v in values)

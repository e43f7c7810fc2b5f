"""Forward passes recorded as CUDA graphs: a GPU then waits for no Python, which starts kernels one by one.

A ``Recorder`` stands for one network. The first pass with inputs of some shapes runs as it is, the second is
recorded, and later ones are replayed, so even the first picture is drawn from a recording. What makes a
recording worthless is noticed, and it is made anew: other weights, adapters, scales of adapters. On other
devices, where hooks wait to be called, and where something learns, passes run as they are.
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

MOST_KINDS = 16
"""Shapes of which a network's passes are kept; all are forgotten for one more. What a recording needs beside
shared memory is a few MiB, and at the published sizes 15 MiB a text for its keys and values."""


class NotRecordedWarning(UserNotice):
    """A network's passes are not recorded; drawing is right, but slower."""


@dataclass(eq=False)
class _Fixed:
    """What does not change from pass to pass, as it was given."""

    given: tuple[Any, ...]
    prepared: Any = None
    """What was made of it, where passes run as they are."""
    looked: int = 0
    """How often the recorder had been told to look again when that was made."""


class Recorder:
    """A ``function`` of tensors that computes with ``network``'s weights, recorded where that can be."""

    def __init__(
        self,
        network: nn.Module,
        function: Callable[..., Tensor] | None = None,
        prepare: Callable[..., Any] | None = None,
        *,
        records: bool = True,
    ) -> None:
        """``function`` is the network itself if none is given. ``prepare`` makes what ``function`` takes last
        out of what is the same for many passes. With ``records`` false nothing is recorded."""
        self.network = network
        self.function = network if function is None else function
        self.prepare = prepare
        self._graphs: Graphs | None = None
        """Passes, by the kinds of their inputs and of what is fixed, and preparations, by the latter alone.
        No pass overwrites what was prepared for it."""
        self._current: _Fixed | None = None
        """What the preparations' outputs were last made of."""
        self._print: Any = None
        self.records = records
        self._failed, self._records = False, False
        self._fixed: _Fixed | None = None
        self._looked = 0
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """A copy records anew."""
        new = Recorder(self.network, self.function, self.prepare, records=self.records)
        return {name: value for name, value in new.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __call__(self, *inputs: Tensor) -> Tensor:
        """``function(*inputs)``."""
        return self._run(inputs, None)

    def given(self, *fixed: Any) -> Callable[..., Tensor]:
        """``function(*inputs, prepare(*fixed))`` as a function of the inputs.

        ``fixed`` may be tensors and other values. Who changes such a tensor asks for a new function.
        """
        kept = _Fixed(fixed)
        return lambda *inputs: self._run(inputs, kept)

    def look_again(self) -> None:
        """Before the next pass, which prepares anew: for who may have changed weights or adapters in the
        middle of a picture."""
        self._looked += 1
        self._fixed = self._current = None

    def forget(self) -> None:
        """Gives the recordings' memory back."""
        self._graphs = self._current = self._fixed = None

    def _run(self, inputs: tuple[Tensor, ...], fixed: _Fixed | None) -> Tensor:
        here = inputs[0].device
        learns = torch.is_grad_enabled() or torch.is_autocast_enabled("cuda")
        if here.type != "cuda" or not self.records or self._failed or learns:
            return self._as_it_is(inputs, fixed)
        # Outside of inference mode, whose tensors nobody else could write to.
        with self._lock, torch.cuda.device(here), torch.inference_mode(False), torch.no_grad():
            if fixed is None or fixed is not self._fixed:
                self._look_at_the_network(here, fixed)
                self._fixed = fixed
            return self._recorded(inputs, fixed) if self._records else self._as_it_is(inputs, fixed)

    def _as_it_is(self, inputs: tuple[Tensor, ...], fixed: _Fixed | None) -> Tensor:
        if fixed is None:
            return self.function(*inputs)
        if fixed.prepared is None or fixed.looked != self._looked:
            assert self.prepare is not None
            fixed.prepared, fixed.looked = self.prepare(*fixed.given), self._looked
        return self.function(*inputs, fixed.prepared)

    def _look_at_the_network(self, device: torch.device, fixed: _Fixed | None) -> None:
        """Forgets what was made of other weights, and decides whether to record."""
        found, self._records = self._state(device)
        if found != self._print and fixed is not None:
            fixed.prepared = None
        if found != self._print or not self._records:
            self.forget()
            if self._records:
                join_layers(self.network)
                found, _ = self._state(device)
        self._print = found

    def _state(self, device: torch.device) -> tuple[list[Any], bool]:
        """What a recording depends on, and whether one can be made."""
        found: list[Any] = [device]
        compiled = hasattr(self.network, "_orig_mod") or self.network._compiled_call_impl is not None
        records = not compiled
        # Not by modules(), which takes several times as long, for each picture.
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
            if _is_adapter(type(module)):  # its factor, and how it acts, if at all
                names = ("scaling", "active_adapters", "disable_adapters", "merged_adapters")
                found.append([str(getattr(module, name, "")) for name in names])
            waiting.extend(part for part in module._modules.values() if part is not None)
        return [*found, records], records

    def _recorded(self, inputs: tuple[Tensor, ...], fixed: _Fixed | None) -> Tensor:
        of_fixed = None if fixed is None else _kind(fixed.given)
        kind = (_kind(inputs), of_fixed)
        graphs = self._graphs
        if graphs is None or (kind not in graphs.warmed and len(graphs.warmed) == MOST_KINDS):
            graphs = self._graphs = Graphs(recording_stream(inputs[0].device), warm_ups=1)
            self._current = None
        if not graphs.is_warm(kind):
            output = graphs.warm_up(kind, lambda: self._as_it_is(inputs, fixed))
            output.record_stream(torch.cuda.current_stream())
            return output
        try:
            prepared: tuple[Any, ...] = ()
            if fixed is not None:
                assert self.prepare is not None
                fixed.prepared = None  # a recording makes it anew, in memory of its own
                preparation = ("prepare", of_fixed)
                if preparation not in graphs:
                    graphs.record(preparation, self.prepare, fixed.given)
                    self._current = None
                if self._current is not fixed:
                    graphs.replay(preparation, fixed.given)
                    self._current = fixed
                prepared = (graphs.output(preparation),)
            if kind not in graphs:
                graphs.record(kind, self.function, inputs, prepared)
            return graphs.replay(kind, inputs).clone()
        except RuntimeError as error:
            # What did not fit may fit another time.
            self._failed, self._records = not isinstance(error, torch.OutOfMemoryError), False
            self.forget()
            reason = str(error).strip().partition("\n")[0]
            name = type(self.network).__name__
            warnings.warn(f"{name} runs unrecorded, and slower: {reason}", NotRecordedWarning, stacklevel=4)
            return self._as_it_is(inputs, fixed)


class Recorders(dict[nn.Module, Recorder]):
    """A pipeline's recorders, by their networks."""

    def look_again(self) -> None:
        """``Recorder.look_again`` of each."""
        for recorder in self.values():
            recorder.look_again()

    def of(
        self,
        network: nn.Module,
        function: Callable[..., Tensor] | None = None,
        prepare: Callable[..., Any] | None = None,
        *,
        records: bool,
    ) -> Recorder:
        """That of a network: the same as before, unless it is for others than these. Who replaces a method
        wants it called."""
        function, recorder = network if function is None else function, self.get(network)
        if recorder is None or (recorder.function, recorder.prepare) != (function, prepare):
            recorder = self[network] = Recorder(network, function, prepare)
        recorder.records = records
        return recorder


@functools.cache
def _is_adapter(layer: type) -> bool:
    """Whether it is one of peft's layers; whole models of transformers have a method of that name."""
    return isinstance(getattr(layer, "active_adapters", None), property)


def _kind(values: tuple[Any, ...]) -> Any:
    """What decides which recording serves: shapes, layouts and precisions of tensors; all other values."""
    return tuple((v.shape, v.stride(), v.dtype) if isinstance(v, Tensor) else v for v in values)

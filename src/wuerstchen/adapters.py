"""The adapters of a loaded model: adds them, replaces them by others, and removes them."""

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path

from wuerstchen.checkpoints.adapter_metadata import AdapterMetadata
from wuerstchen.checkpoints.adapters import Adapter, LayerTensors, files_of, read_adapter, wanted_files
from wuerstchen.checkpoints.hub import HUB_NAME, local_folder
from wuerstchen.errors import CheckpointError, UserError
from wuerstchen.lora import load_lora, lora_names, set_lora, unload_lora
from wuerstchen.models.cascade import Cascade

MAX_CACHED = 16
"""Adapters that are kept in memory after they were used."""
MAX_CACHED_BYTES = 1 << 30
"""Their largest total size. The last one is kept in any case."""


class ModelAdapters:
    """The adapters of Stage C and its text encoder, by name, each with its strength."""

    def __init__(self, cascade: Cascade) -> None:
        self.cascade = cascade
        self.scales: dict[str, float] = {}
        self._used: dict[Path, float] | None = {}
        """What ``use`` has set, or None after another change."""
        self._states: dict[Path, object] = {}
        """The states of these files when they were read."""
        self._cache: dict[Path, tuple[object, Adapter]] = {}
        """Files that were read, with the state of the file, the last used one last."""

    def load(self, source: str | Path | Adapter, scale: float = 1.0) -> AdapterMetadata:
        """Adds an adapter to those that are there, and returns its description. On error, nothing changes."""
        prior, encoder = self.cascade.prior, self.cascade.text_encoder
        if prior is None or encoder is None:
            raise UserError("LoRA adapters apply to Stage C, and this model has none. Load one with Stage C.")
        if not math.isfinite(scale):
            raise UserError(f"scale must be a finite number, got {scale}. Use 1 for full strength.")
        adapter = source if isinstance(source, Adapter) else read_adapter(found_adapter(source))
        name = f"adapter_{len(self.scales)}"
        load_lora(prior, adapter, adapter_name=name, text_encoder=encoder)
        self.scales[name], self._used = scale, None
        self._apply_scales()
        return adapter.metadata

    def _apply_scales(self) -> None:
        for network in (self.cascade.prior, self.cascade.text_encoder):
            assert network is not None
            names = lora_names(network)
            set_lora(network, names, [self.scales[name] for name in names])

    def unload(self) -> None:
        """Removes all adapters and their words. The weights are then bit for bit what they were before."""
        if self.scales:
            prior, encoder = self.cascade.prior, self.cascade.text_encoder
            assert prior is not None
            assert encoder is not None
            unload_lora(prior)
            unload_lora(encoder)
            encoder.remove_words()
            self.scales.clear()
        self._used, self._states = {}, {}

    def use(self, wanted: Mapping[Path, float]) -> bool:
        """Makes these files the only adapters, with their strengths. Returns whether anything changed.

        Files that were used before are kept in memory, within ``MAX_CACHED`` and ``MAX_CACHED_BYTES``, and
        read again after a change. If an adapter cannot be loaded, there are none afterwards.
        """
        states = {path: self._state(path) for path in wanted}
        is_same = self._used is not None and self._states == states
        if is_same and self._used == dict(wanted):
            return False
        if is_same and self._used and all(map(math.isfinite, wanted.values())):
            self.scales = {n: wanted[path] for n, path in zip(self.scales, self._used, strict=True)}
            self._used = {path: wanted[path] for path in self._used}
            self._apply_scales()
            return True
        adapters = [(self._read(path, states[path]), scale) for path, scale in wanted.items()]
        self.unload()
        try:
            for adapter, scale in adapters:
                self.load(adapter, scale)
        except BaseException:
            self.unload()
            raise
        self._used, self._states = dict(wanted), states
        return True

    def _state(self, path: Path) -> object:
        """What differs after a change of the files of an adapter, not only of their folder."""
        try:
            found = [file.stat() for file in files_of(path)] if path.exists() else None
        except OSError:
            found = None
        if found is None:
            self._cache.pop(path, None)
            raise CheckpointError(f"{path} does not exist any more. Choose another adapter.")
        return [(one.st_mtime_ns, one.st_size, one.st_ino) for one in found]

    def _read(self, path: Path, state: object) -> Adapter:
        kept = self._cache.pop(path, None)
        adapter = kept[1] if kept is not None and kept[0] == state else _in_memory(read_adapter(path))
        self._cache[path] = state, adapter
        while len(self._cache) > MAX_CACHED or (
            len(self._cache) > 1 and sum(_bytes(a) for _, a in self._cache.values()) > MAX_CACHED_BYTES
        ):
            del self._cache[next(iter(self._cache))]
        return adapter


def found_adapter(source: str | Path) -> Path:
    """The path of an adapter, downloaded if ``source`` is a name on the hub."""
    path = Path(source)
    if os.path.exists(path) or path.suffix in (".safetensors", ".bin") or not HUB_NAME.fullmatch(str(source)):
        return path
    return local_folder(source, only=wanted_files())


def _in_memory(adapter: Adapter) -> Adapter:
    """The adapter with copies of its tensors, which are parts of the file until then. They would change with
    it, or end the process if it becomes shorter."""

    def copied(layers: Mapping[str, LayerTensors]) -> dict[str, LayerTensors]:
        return {
            name: dataclasses.replace(
                layer,
                a=None if layer.a is None else layer.a.clone(),
                b=None if layer.b is None else layer.b.clone(),
                magnitude=None if layer.magnitude is None else layer.magnitude.clone(),
            )
            for name, layer in layers.items()
        }

    tokens = {word: vectors.clone() for word, vectors in adapter.tokens.items()}
    return dataclasses.replace(adapter, prior=copied(adapter.prior), text=copied(adapter.text), tokens=tokens)


def _bytes(adapter: Adapter) -> int:
    layers = (*adapter.prior.values(), *adapter.text.values())
    tensors = [t for v in layers for t in (v.a, v.b, v.magnitude) if t is not None]
    return sum(tensor.nbytes for tensor in (*tensors, *adapter.tokens.values()))

"""Reads the tensors of a network from safetensors or torch files, whole or in shards, by any program."""

import functools
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from wuerstchen.checkpoints.files import check_is_file, open_safetensors
from wuerstchen.checkpoints.torch_files import check_apart, check_whole, read_torch_file
from wuerstchen.checkpoints.variants import files_of, only_variant
from wuerstchen.errors import CheckpointError, UserNotice, shown

N = TypeVar("N")
_COMPILED = re.compile(r"(^|\.)_orig_mod\.")


def read_tensors_of(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, or of a torch file that contains only a state dict.

    Raises ``CheckpointError`` if the file is missing, damaged, or contains anything but tensors.
    """
    if path.suffix == ".safetensors":
        return StoredTensors.of([path]).read()
    state = read_torch_file(path)
    if not isinstance(state, Mapping):
        raise CheckpointError(
            f"{path} contains a {type(state).__name__}, not a state dict. Use a file with only a state dict."
        )
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: the entry {shown(name)} is not a tensor. Use a file with only a state dict."
            )
        check_whole(value, f"{path}: the entry {shown(name)}")
    check_apart(state.values(), str(path))
    return plain_names(state, path)


def plain_names(tensors: Mapping[str, N], where: Path | str) -> dict[str, N]:
    """The same tensors without ``_orig_mod.`` in their names, which saved compiled modules have.

    Raises ``CheckpointError`` if two names are then equal.
    """
    plain = {_COMPILED.sub(r"\1", name): tensor for name, tensor in tensors.items()}
    if len(plain) < len(tensors):
        raise CheckpointError(
            f"{where} contains the same tensors with and without the prefix _orig_mod. of torch.compile. "
            "Save only one of the two."
        )
    return plain


@dataclass(frozen=True)
class StoredTensors:
    """The tensors of one network in one or several files: shapes first, values on demand."""

    shapes: dict[str, tuple[int, ...]]
    files: tuple[Path, ...]
    metadata: dict[str, str]
    """The metadata of safetensors files, such as ``format``."""

    @classmethod
    def of(cls, files: Sequence[Path]) -> "StoredTensors":
        shapes: dict[str, tuple[int, ...]] = {}
        metadata: dict[str, str] = {}
        for path in files:
            check_is_file(path)
            if path.suffix != ".safetensors":
                found = {name: tuple(tensor.shape) for name, tensor in read_tensors_of(path).items()}
            else:
                with open_safetensors(path) as file:
                    metadata |= file.metadata() or {}
                    found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
                found = plain_names(found, path)
            twice = sorted(shapes.keys() & found.keys())
            if twice:
                raise CheckpointError(
                    f"{path}: {twice[0]!r} is also in another shard. Download the model again."
                )
            shapes |= found
        return cls(shapes=shapes, files=tuple(files), metadata=metadata)

    @classmethod
    def in_folder(cls, folder: Path, stems: Sequence[str], variant: str | None = None) -> "StoredTensors":
        """The tensors in ``folder`` under the first of the names ``stems`` that exists.

        safetensors is preferred to ``.bin``, a single file to shards (``STEM.safetensors.index.json``), and
        ``variant`` (``STEM.fp16.safetensors``) to the default weights. If neither exists, another variant is
        read, with a ``UserNotice``.
        """
        for tried in dict.fromkeys((variant, None)):
            if files := files_of(folder, stems, tried):
                return cls.of(files)
        if found := only_variant(folder, stems):
            warnings.warn(
                f"{folder.parent} has only the variant {found!r} of some weights. "
                "It is read instead of the default weights.",
                UserNotice,
                stacklevel=2,
            )
            return cls.of(files_of(folder, stems, found))
        if any(folder.glob("*.pdparams")):
            raise CheckpointError(
                f"{folder} contains Paddle's pickles (.pdparams), which are never opened. Load the model in "
                "ppdiffusers and save it with save_pretrained(FOLDER, safe_serialization=True)."
            )
        raise CheckpointError(
            f"{folder} has no weights: there is no {stems[0]}.safetensors or .bin. Download the model again."
        )

    def dtype(self) -> torch.dtype:
        """The widest dtype of the floating-point tensors. float32 if there are none."""
        kinds: set[torch.dtype] = set()
        for path in self.files:
            if path.suffix != ".safetensors":
                kinds |= {tensor.dtype for tensor in read_tensors_of(path).values()}
                continue
            with open_safetensors(path) as file:
                stored = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (no mapping)
                kinds |= {_DTYPES[name] for name in stored if name in _DTYPES}
        kinds &= set(_DTYPES.values())
        return functools.reduce(torch.promote_types, kinds) if kinds else torch.float32

    def read(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """All tensors. Floating-point ones are converted to ``dtype`` if it is given."""
        tensors: dict[str, Tensor] = {}
        for path in self.files:
            if path.suffix != ".safetensors":
                tensors |= read_tensors_of(path)
                continue
            with open_safetensors(path) as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            tensors |= plain_names(found, path)
        if dtype is None:
            return tensors
        return {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}


def fill(
    network: nn.Module,
    stored: StoredTensors,
    names: Mapping[str, str],
    dtype: torch.dtype = torch.float32,
    *,
    ignored: Collection[str] = (),
) -> None:
    """Loads stored tensors into ``network``, which is on ``meta``. ``names`` maps its keys to the stored
    names.

    Names and shapes are compared before anything is read. Stored names in ``ignored`` are optional. Raises
    ``CheckpointError`` for the first mismatch, and leaves the network unchanged.
    """
    where = stored.files[0]
    expected = {names.get(key, key): (key, tuple(t.shape)) for key, t in network.state_dict().items()}
    for name in sorted(expected.keys() | stored.shapes.keys() - set(ignored)):
        wanted = expected[name][1] if name in expected else "no such tensor"
        found = stored.shapes.get(name, "missing")
        if wanted != found:
            raise CheckpointError(
                f"{where}: {name!r} is {found} in the file, but the configuration expects {wanted}. "
                "Download both again."
            )
    tensors = stored.read(dtype)
    state = network.state_dict()
    for name, (key, _) in expected.items():
        if tensors[name].is_floating_point() != state[key].is_floating_point():
            raise CheckpointError(
                f"{where}: the dtype of {name!r} must be {state[key].dtype}, got "
                f"{tensors[name].dtype}. Download it again."
            )
    network.load_state_dict({key: tensors[name] for name, (key, _) in expected.items()}, assign=True)
    network.eval().requires_grad_(False)


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""dtypes by their names in safetensors."""

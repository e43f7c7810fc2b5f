"""Splits large weight files into shards with an index, as transformers and diffusers do.

``decoder.safetensors`` becomes ``decoder-00001-of-00002.safetensors``, ``decoder-00002-of-00002.safetensors``
and ``decoder.safetensors.index.json``. Every shard has the header of the whole file.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from wuerstchen.checkpoints.files import open_safetensors, write_json, write_safetensors
from wuerstchen.checkpoints.variants import files_of
from wuerstchen.errors import CheckpointError, UserError

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
LEAST = 2**20
"""The smallest size limit in bytes. In smaller shards, the header would take much of the space."""


def size_in_bytes(text: str) -> int:
    """The bytes of a size such as ``16MB`` (10⁶ bytes each) or ``16MiB`` (2²⁰ bytes each).

    Raises ``UserError`` for anything else, and for sizes below 1 MiB.
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?([KMG]I?B)", text.upper(), re.ASCII)
    if match is None:
        raise UserError(f"max_shard_size must be a size such as 16MB or 16MiB, got {text[:40]!r}.")
    size = int(float(match[1]) * _UNITS[match[2]])
    if size < LEAST:
        raise UserError(f"max_shard_size must be at least 1MiB, got {text}.")
    return size


def split_files(folder: Path, max_shard_size: str) -> None:
    """Splits every safetensors file in ``folder``, and in its subfolders, that is larger than the limit.

    No shard is larger than the limit. Raises ``UserError`` if a tensor is.
    """
    limit = size_in_bytes(max_shard_size)
    for path in sorted(folder.rglob("*.safetensors")):
        if path.stat().st_size > limit:
            _split(path, limit)


def _split(path: Path, limit: int) -> None:
    from huggingface_hub import split_state_dict_into_shards_factory  # imported late: it is slow

    with open_safetensors(path) as file:
        metadata = dict(file.metadata() or {})
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    largest = max(tensors, key=lambda name: tensors[name].nbytes)
    data = sum(tensor.nbytes for tensor in tensors.values())
    room = limit - (path.stat().st_size - data)  # a shard's header is no longer than that of the whole file
    if tensors[largest].nbytes > room:
        raise UserError(
            f"max_shard_size must be large enough for the header and the largest tensor of {path.name}, "
            f"{largest!r} with {tensors[largest].nbytes:,} bytes, got {limit:,} bytes. Use a larger size."
        )
    plan = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern=f"{path.stem}{{suffix}}.safetensors",
        max_shard_size=room,
    )
    for name, keys in plan.filename_to_tensors.items():
        write_safetensors({key: tensors[key] for key in keys}, path.with_name(name), metadata)
    os.unlink(path)
    index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
    write_json(path.with_name(f"{path.name}.index.json"), index)


def read_joined(
    path: Path, read: Callable[[Path], tuple[dict[str, Tensor], dict[str, Any]]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads the tensors and the header of a file, or of its shards if only their index exists.

    ``read`` reads one file. Raises ``CheckpointError`` for shards that do not belong together.
    """
    found = [] if os.path.lexists(path) else files_of(path.parent, [path.stem], None)
    first, *others = found or [path]
    tensors, header = read(first)
    for file in others:
        more, other = read(file)
        if other != header or tensors.keys() & more.keys():
            raise CheckpointError(
                f"{file} does not belong to {first.name}: their headers differ, or both have the same "
                "tensors. Download the model again."
            )
        tensors |= more
    return tensors, header

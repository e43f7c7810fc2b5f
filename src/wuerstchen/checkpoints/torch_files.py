"""Reads files of torch.save without running any code in them."""

import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from wuerstchen.checkpoints.files import check_is_file, wrap_read_errors
from wuerstchen.checkpoints.pickles import check_pickle
from wuerstchen.errors import CheckpointError

MAX_PICKLE = 64 << 20
"""Size limit in bytes of everything but the values of tensors: names, shapes, and other saved objects."""


def check_whole(tensor: Tensor, subject: str) -> None:
    """Raises ``CheckpointError`` for a tensor that is not plain weights: sparse, quantized or expanded.

    A tensor with stride 0 could be tiny in the file and huge in memory. The message starts with ``subject``.
    """
    whole = (
        tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_nested
        and not tensor.is_quantized
        and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()
    )
    if not whole:
        raise CheckpointError(
            f"{subject} is not a plain tensor with all its values. Save a clone (.clone()) of it."
        )


def check_apart(tensors: Iterable[Tensor], where: str) -> None:
    """Raises ``CheckpointError`` for many views of the same few values, which could become huge when they are
    converted.

    Some sharing is normal, for example tied weights. The message starts with ``where``.
    """
    sizes: dict[int, int] = {}
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        total += tensor.nbytes
    if total > 4 * sum(sizes.values()) + (1 << 20):
        raise CheckpointError(
            f"{where}: the tensors have {total:,} bytes, but share {sum(sizes.values()):,} stored bytes. "
            "Save a clone (.clone()) of each."
        )


def read_torch_file(path: Path) -> object:
    """The content of a file of ``torch.save``: tensors, numbers, strings, and containers of these.

    Raises ``CheckpointError`` if the file is missing, damaged, or contains other pickled objects.
    """
    check_is_file(path)
    with wrap_read_errors(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about unusual files, which raise an error if they cannot be read
        # Memory-mapped, to save memory. The legacy format is not an archive and cannot be mapped.
        mapped = zipfile.is_zipfile(path)
        if mapped:
            _check_archive(path)
        else:
            _check_legacy(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def _check_archive(path: Path) -> None:
    """Raises ``CheckpointError`` for archives that torch would misread, or would take forever to read."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            # torch would map compressed bytes as if they were values.
            if entry.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(
                    f"{path} was compressed after torch.save wrote it. Use the original file."
                )
            if entry.filename.lower().endswith("data.pkl"):  # torch ignores the case of the name
                if entry.file_size > MAX_PICKLE:
                    raise ValueError(f"it has {entry.file_size:,} bytes besides its tensors")
                with archive.open(entry) as stream:
                    check_pickle(stream)


def _check_legacy(path: Path) -> None:
    """``_check_archive`` for the format before torch 1.6: pickles, then the values."""
    with open(path, "rb") as file:
        if file.read(2) == b"PK":
            raise ValueError("it is a truncated archive")
        file.seek(0)
        # A magic number, a version, the machine, the object, and the keys of its storages.
        for flat in (True, True, False, False, True):
            check_pickle(file, flat=flat)
            if file.tell() > MAX_PICKLE:
                raise ValueError(f"it has more than {MAX_PICKLE:,} bytes besides its tensors")

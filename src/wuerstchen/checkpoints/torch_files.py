"""Files of torch.save: what they hold, without running anything that is in them."""

import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from wuerstchen.checkpoints.files import check_is_file, damage_named
from wuerstchen.checkpoints.pickles import check_pickle
from wuerstchen.errors import CheckpointError

MAX_PICKLE = 64 << 20
"""Bytes of a torch file that are not values of tensors: names, shapes, and what else was saved."""


def check_whole(tensor: Tensor, subject: str) -> None:
    """Refuses what ``torch.save`` can store but no weight is: sparse, quantised, or without all its values.

    A tensor of stride 0 would be small in the file and of any size in memory. Raises ``CheckpointError``,
    which begins with ``subject``.
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
            f"{subject} is not stored as a plain tensor with all its values; save it as one (.clone()) again"
        )


def check_apart(tensors: Iterable[Tensor], where: str) -> None:
    """Refuses many tensors that are views of the same few values, which would be of any size when converted.

    A few may share: tied weights do. Raises ``CheckpointError``, which begins with ``where``.
    """
    sizes: dict[int, int] = {}
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        total += tensor.nbytes
    if total > 4 * sum(sizes.values()) + (1 << 20):
        raise CheckpointError(
            f"{where} is wrong because its tensors have {total:,} bytes and share "
            f"{sum(sizes.values()):,} stored ones; save each as a tensor of its own (.clone()) again"
        )


def read_torch_file(path: Path) -> object:
    """What a file of ``torch.save`` holds: tensors, numbers, text, and containers of them.

    Raises ``CheckpointError`` if the file is missing, damaged, or holds pickled objects of other kinds.
    """
    check_is_file(path)
    with damage_named(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about unusual files; what cannot be read is refused
        # Mapped, so that a file is not held twice; the legacy format, which is no archive, cannot be.
        mapped = zipfile.is_zipfile(path)
        if mapped:
            _check_archive(path)
        else:
            _check_legacy(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def _check_archive(path: Path) -> None:
    """Raises ``CheckpointError`` for what torch would read wrongly, or for ever."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            # torch would map compressed bytes as if they were numbers.
            if entry.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(
                    f"{path} is wrong because it was compressed after torch.save wrote it; "
                    "get the file as it was"
                )
            if entry.filename.lower().endswith("data.pkl"):  # torch finds it in any case
                if entry.file_size > MAX_PICKLE:
                    raise ValueError(f"it has {entry.file_size:,} bytes beside its tensors")
                with archive.open(entry) as stream:
                    check_pickle(stream)


def _check_legacy(path: Path) -> None:
    """The same for the format before torch 1.6: pickles, then the values."""
    with open(path, "rb") as file:
        if file.read(2) == b"PK":
            raise ValueError("it is an archive without its end")
        file.seek(0)
        # A magic number, a version, the machine, the object, and the names of its values.
        for flat in (True, True, False, False, True):
            check_pickle(file, flat=flat)
            if file.tell() > MAX_PICKLE:
                raise ValueError(f"it has more than {MAX_PICKLE:,} bytes beside its tensors")

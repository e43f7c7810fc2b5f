"""Reads untrusted JSON and safetensors files within limits, and writes such files atomically."""

import json
import os
import pickle
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wuerstchen.checkpoints.untrusted_json import MAX_HEADER
from wuerstchen.checkpoints.untrusted_json import parse_json as parse_json
from wuerstchen.errors import CheckpointError

MAX_DESCRIPTION = 8 << 20
"""Size limit in bytes of the description or the index of a model."""


def read_json(path: Path, limit: int = MAX_DESCRIPTION) -> dict[str, Any]:
    """The object in a JSON file of at most ``limit`` bytes.

    Raises ``CheckpointError`` if the file is missing, larger, not an object, or refused by ``parse_json``.
    """
    check_is_file(path)
    with wrap_read_errors(path):
        if path.stat().st_size > limit:
            raise CheckpointError(f"{path} has more than {limit >> 20} MB. Download the model again.")
        content = parse_json(path.read_bytes())
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object. Download the model again.")
    return content


def check_header(path: Path) -> None:
    """Raises ``ValueError`` if parsing the header of a safetensors file would take minutes."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if MAX_HEADER < length < path.stat().st_size:  # safetensors refuses longer headers itself
        raise ValueError(f"its header has {length} bytes, more than {MAX_HEADER >> 20} MB")


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """``safetensors.safe_open`` for untrusted files.

    Raises ``CheckpointError`` if the file is missing or damaged, or if its header is too large. Errors that
    are raised while the file is open become ``CheckpointError`` too.
    """
    check_is_file(path)
    with wrap_read_errors(path):
        check_header(path)
        with safe_open(path, framework="pt") as opened:
            yield opened


def write_safetensors(
    tensors: Mapping[str, Tensor],
    path: Path,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a safetensors file atomically: under a temporary name, flushed to disk, then renamed.

    Floating-point tensors are stored in ``dtype`` if it is given.
    """
    partial = path.with_name(f".{path.name}.partial")
    if dtype is not None:
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    try:
        save_file(contiguous, partial, metadata=dict(metadata))
        partial.chmod(0o644)  # safetensors creates files that only the user can read
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path} cannot be written ({error}). Free some space or choose another folder."
        ) from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON atomically: under a temporary name, flushed to disk, then renamed. Raises ``OSError``."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to write to. It is renamed to ``folder`` at the end, and removed after an error.

    Raises ``CheckpointError`` if ``folder`` exists or cannot be created.
    """
    if os.path.lexists(folder):
        raise CheckpointError(f"{folder} already exists. Choose another folder or remove it.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as name:
            partial = Path(name) / folder.name
            partial.mkdir()
            yield partial
            os.rename(partial, folder)
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written ({error.strerror or error}). Free "
            "some space, or choose another folder."
        ) from error


def check_is_file(path: Path) -> None:
    if not os.path.isfile(path):  # Path.is_file raises for names that are too long, and in locked folders
        raise CheckpointError(f"{path} does not exist. Check the name.")


@contextmanager
def wrap_read_errors(path: Path) -> Iterator[None]:
    """Turns all errors into ``CheckpointError``, because readers raise almost anything for damaged files."""
    try:
        yield
    except CheckpointError:
        raise
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} is not a torch file, or contains pickled objects, which are "
            "never loaded. Use a file with tensors only."
        ) from None
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path} cannot be read ({reason}). Download it again.") from None

"""JSON and safetensors files that anybody may have written: bounded when read, whole when written."""

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

from wuerstchen.errors import CheckpointError

MAX_JSON = 64 << 20
"""Bytes of the largest JSON that is read, of a prepared data set."""
MAX_DESCRIPTION = 8 << 20
"""Bytes of a model's description or index: far more than any has."""
MAX_DEPTH = 100
"""How deep JSON may be nested."""
MAX_DIGITS = 40
"""Of a whole number in JSON. transformers writes 10³⁰ where there is no limit."""
MAX_HEADER = 16 << 20
"""Bytes of the header of a safetensors file: that of 100,000 tensors."""


def read_json(path: Path, most: int = MAX_DESCRIPTION) -> dict[str, Any]:
    """The object in a JSON file of at most so many bytes.

    Raises ``CheckpointError`` if it is missing, no object, or larger, and as ``parse_json`` does.
    """
    check_is_file(path)
    with damage_named(path):
        if path.stat().st_size > most:
            raise CheckpointError(
                f"{path} is wrong because it has more than {most >> 20} MB; get the model again"
            )
        content = parse_json(path.read_bytes())
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is wrong because it holds no JSON object; get the model again")
    return content


def parse_json(text: str | bytes) -> Any:
    """What JSON holds. Raises ``ValueError`` if it is none, too deep, or has a whole number that is too long.

    Numbers that pass can be made a float, and containers can be gone through by functions that call
    themselves.
    """
    try:
        content = json.loads(text, parse_int=_whole_number)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    level: list[Any] = [content]
    for _ in range(MAX_DEPTH + 1):
        containers = [one for one in level if isinstance(one, dict | list)]
        if not containers:
            return content
        level = [v for one in containers for v in (one.values() if isinstance(one, dict) else one)]
    raise ValueError(f"it is nested more than {MAX_DEPTH} deep")


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"it has a whole number of {len(digits)} digits")
    return int(digits)


def check_header(path: Path) -> None:
    """Raises ``ValueError`` for a safetensors file whose header alone would take minutes."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if MAX_HEADER < length < path.stat().st_size:  # a length beyond the file is refused by safetensors
        raise ValueError(f"its header has {length} bytes, more than {MAX_HEADER >> 20} MB")


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """``safetensors.safe_open`` for a file that anybody may have written.

    Raises ``CheckpointError`` if it is missing or damaged or has an absurd header, and turns whatever is
    raised while it is open into one.
    """
    check_is_file(path)
    with damage_named(path):
        check_header(path)
        with safe_open(path, framework="pt") as opened:
            yield opened


def write_safetensors(
    tensors: Mapping[str, Tensor],
    path: Path,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a safetensors file whole: to a temporary name first, flushed to disk, then renamed.

    Floating tensors are stored in ``dtype`` if it is given.
    """
    partial = path.with_name(f".{path.name}.partial")
    if dtype is not None:
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    try:
        save_file(contiguous, partial, metadata=dict(metadata))
        partial.chmod(0o644)  # safetensors leaves files that nobody else can read
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path} cannot be written ({error}); free some space or choose another folder"
        ) from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON whole: to a temporary name first, flushed to disk, then renamed. Raises ``OSError``."""
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
    """A folder to write into, which becomes ``folder`` when all in it is written, and vanishes otherwise.

    Raises ``CheckpointError`` if ``folder`` exists or cannot be made.
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
            f"{folder} cannot be written ({error.strerror or error}); free some space, or choose another"
        ) from error


def check_is_file(path: Path) -> None:
    if not os.path.isfile(path):  # Path.is_file raises for names that are too long, and for locked folders
        raise CheckpointError(f"{path} is wrong because there is no such file; check the name")


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turns whatever a reader raises into a ``CheckpointError``: damage can surface as almost anything."""
    try:
        yield
    except CheckpointError:
        raise
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} is wrong because it is not a torch file, or holds pickled objects, which are never run; "
            "give a file with nothing but tensors"
        ) from None
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{path} is wrong because it cannot be read ({reason}); download it again"
        ) from None

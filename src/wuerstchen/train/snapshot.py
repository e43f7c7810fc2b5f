"""Checkpoints of a stage in training: a folder each, which is whole or not there.

    stage_b/checkpoints/000012800/
        networks.safetensors  averages.safetensors  optimizers.safetensors
        state.json            what it is, where it came from, and a SHA-256 of every file

A checkpoint is written under a temporary name and renamed at the end. The two newest are kept; one that
turns out damaged is named, and the one before it is used.
"""

import hashlib
import json
import os
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from wuerstchen.checkpoints.native import FORMAT, migrate, read_tensors, write_tensors
from wuerstchen.checkpoints.weights import write_json
from wuerstchen.errors import CheckpointError, UserNotice
from wuerstchen.train.optim import load_optimizer_tensors, optimizer_tensors

KEPT = 2


@dataclass
class TrainingState:
    """Everything that the rest of a stage's training depends on."""

    networks: dict[str, nn.Module]
    averages: dict[str, nn.Module]
    optimizers: dict[str, Any]
    whole: dict[str, nn.Module] = field(default_factory=dict)
    """Of the averages that are sharded, networks without memory to gather them in."""
    images: int = 0
    updates: int = 0


class DamagedCheckpointWarning(UserNotice):
    """A checkpoint could not be read, and an older one was used."""


def save(state: TrainingState, folder: Path, header: dict[str, Any]) -> Path:
    """Writes a checkpoint under ``folder`` and removes those older than the one before it.

    Raises ``CheckpointError`` if it cannot be written; what was there before stays whole.
    """
    target = folder / f"{state.images:012d}"
    partial = folder / f".{target.name}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name, tensors in _groups(state).items():
            write_tensors(tensors, partial / f"{name}.safetensors", {"format": FORMAT})
        files = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
        description = {**header, "format": FORMAT, "images": state.images, "updates": state.updates}
        write_json(partial / "state.json", {**description, "files": files})
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    except (OSError, CheckpointError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) else error.__cause__ or error
        raise CheckpointError(
            f"checkpoint {target} cannot be written ({reason}); those before it are whole: free some space "
            "and start the same command again"
        ) from error
    # Newer ones are those that were found damaged: training went on from one before them.
    others = [path for path in _all(folder) if path != target]
    older = [path for path in others if path < target]
    for path in (*older[KEPT - 1 :], *(path for path in others if path > target)):
        shutil.rmtree(path, ignore_errors=True)
    return target


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint under ``folder`` with its state, None where there is none at all.

    Warns of each damaged one that is passed over. Raises ``CheckpointError`` where all are damaged, and
    where one was written by a newer version.
    """
    found = _all(folder)
    for path in found:
        try:
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            migrate(state, path / "state.json")
            wrong = [name for name, digest in state["files"].items() if _sha256(path / name) != digest]
            if not wrong and isinstance(state["images"], int) and isinstance(state["updates"], int):
                return path, state
            reason = f"{wrong[0]} has changed since it was written" if wrong else "it counts no images"
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            if isinstance(error, CheckpointError):
                raise
            reason = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"checkpoint {path} is damaged ({reason}); looking for one before it",
            DamagedCheckpointWarning,
            stacklevel=2,
        )
    if found:
        raise CheckpointError(
            f"every checkpoint in {folder} is damaged; remove that folder to start its stage again"
        )
    return None


def restore(state: TrainingState, path: Path, description: dict[str, Any]) -> None:
    """Loads a checkpoint into ``state``. Raises ``CheckpointError`` if it does not fit."""
    try:
        for name, modules in (("networks", state.networks), ("averages", state.averages)):
            tensors, _ = read_tensors(path / f"{name}.safetensors")
            for key, module in modules.items():
                module.load_state_dict(_under(tensors, key))
        tensors, _ = read_tensors(path / "optimizers.safetensors")
        for key, optimizer in state.optimizers.items():
            load_optimizer_tensors(optimizer, _under(tensors, key))
    except (RuntimeError, KeyError, IndexError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        detail = str(error).splitlines()[0]
        raise CheckpointError(f"checkpoint {path} does not fit this recipe ({detail}); remove it") from error
    state.images, state.updates = description["images"], description["updates"]


def read_averages(path: Path, name: str) -> dict[str, Tensor]:
    """The averaged weights of one network in a checkpoint, for the stages after it."""
    tensors, _ = read_tensors(path / "averages.safetensors")
    return _under(tensors, name)


def _groups(state: TrainingState) -> dict[str, dict[str, Tensor]]:
    def joined(parts: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        return {f"{part}/{key}": tensor for part, tensors in parts.items() for key, tensor in tensors.items()}

    return {
        "networks": joined({name: dict(n.state_dict()) for name, n in state.networks.items()}),
        "averages": joined({name: dict(n.state_dict()) for name, n in state.averages.items()}),
        "optimizers": joined({name: optimizer_tensors(o) for name, o in state.optimizers.items()}),
    }


def _under(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    start = f"{part}/"
    return {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}


def _all(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if p.is_dir() and p.name.isdigit()), reverse=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

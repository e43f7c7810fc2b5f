"""Checkpoints of a stage in training. Each is a folder that is complete or absent.

    stage_b/checkpoints/000012800/
        networks.safetensors  averages.safetensors  optimizers.safetensors
        state.json            images and updates so far, where it comes from, and a SHA-256 of every file

If networks are sharded, each process writes its shards, ``networks.0-of-2.safetensors`` and so on, and
state.json lists their tensors and rows. Any number of processes can read such a checkpoint: each reads the
rows that it needs. Tensors are in safetensors, everything else is in state.json. Nothing is pickled.

If a checkpoint is damaged, a warning names it and the one before it is used. checkpoint_writer.py writes
them.
"""

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from wuerstchen.checkpoints.files import check_header
from wuerstchen.checkpoints.native import migrate
from wuerstchen.errors import CheckpointError, UserNotice
from wuerstchen.train.engine.distributed import Processes
from wuerstchen.train.engine.optim import load_optimizer_tensors, optimizer_tensors
from wuerstchen.train.engine.sharding import first_row, local_part

BEST = "best.json"


@dataclass
class TrainingState:
    """The training state of a stage. Together with the recipe and the data it determines the rest of the
    training."""

    networks: dict[str, nn.Module]
    averages: dict[str, nn.Module]
    optimizers: dict[str, Any]
    whole: dict[str, nn.Module] = field(default_factory=dict)
    """For each average that is sharded, a copy on the meta device for ``gather`` to fill."""
    images: int = 0
    updates: int = 0


class DamagedCheckpointWarning(UserNotice):
    """A checkpoint could not be read, and an older one was used."""


def best_of(folder: Path) -> dict[str, Any] | None:
    """The ``images`` and the ``loss`` of the checkpoint under ``folder`` with the lowest validation loss.

    None without validation, or if that checkpoint is gone.
    """
    try:
        best = json.loads((folder / BEST).read_text(encoding="utf-8"))
        images, loss = int(best["images"]), float(best["loss"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return {"images": images, "loss": loss} if (folder / f"{images:012d}").is_dir() else None


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest complete checkpoint under ``folder`` and its state.json, or None if there is none at all.

    Warns about each damaged one that it skips. Raises ``CheckpointError`` if all are damaged, or if one was
    written by a newer version. The run may still be training and remove a checkpoint while it is read. It has
    then written a newer one.
    """
    damaged: set[Path] = set()
    while True:
        left = [path for path in checkpoints_in(folder) if path not in damaged]
        if not left:
            break
        path = left[0]
        try:
            state = read_state(path)
            reason = _damage(path, state)
            if not reason:
                return path, state
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            if isinstance(error, FileNotFoundError) and not path.exists():
                continue
            reason = f"{type(error).__name__}: {error}"
        damaged.add(path)
        _warn_of_damage(path, reason)
    if damaged:
        raise _all_damaged(folder)
    return None


def read_verified(path: Path) -> dict[str, Any]:
    """``state.json`` of one checkpoint, after checking all files. Raises ``CheckpointError`` if one is
    damaged."""
    try:
        state = read_state(path)
        reason = _damage(path, state)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        if not path.exists():
            raise _removed(path) from error
        reason = f"{type(error).__name__}: {error}"
    if reason:
        raise CheckpointError(f"checkpoint {path} is damaged: {reason}. Use another checkpoint.")
    return state


def _removed(path: Path) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {path} was removed while it was read: its run is still training and keeps only the "
        "newest ones. Start the same command again, or name a checkpoint that is kept."
    )


def _damage(path: Path, state: dict[str, Any], rank: int = 0, count: int = 1) -> str:
    """Says which file of a checkpoint has changed; empty if none. Each of ``count`` ranks checks some
    files."""
    mine = list(state["files"].items())[rank::count]
    wrong = [name for name, digest in mine if sha256_of(path / name) != digest]
    return f"{wrong[0]} has changed since it was written" if wrong else ""


def newest_of_all(folder: Path, processes: Processes) -> tuple[Path, dict[str, Any]] | None:
    """``newest`` for all ranks together: all get the same checkpoint, and each file is checked by one
    rank."""
    if processes.count == 1:
        return newest(folder)
    names = processes.all_gather([path.name for path in checkpoints_in(folder)] if processes.is_main else [])
    for name in names:
        path, state = folder / name, None
        reason, fatal = "", ""
        try:
            state = read_state(path)
            reason = _damage(path, state, processes.rank, processes.count)
        except CheckpointError as error:  # written by a newer version
            fatal = str(error)
        except FileNotFoundError as error:
            if processes.is_main:
                reason = f"{type(error).__name__}: {error}"
            else:
                fatal = f"{path} is not visible to all processes: {error}. Use a --run-dir on a shared disk."
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"
        reasons = processes.all_gather([(reason, fatal)] if reason or fatal else [])
        if not reasons:
            assert state is not None
            return path, state
        damaged = [reason for reason, _ in reasons if reason]
        if not damaged:
            raise CheckpointError(next(fatal for _, fatal in reasons))
        if processes.is_main:
            _warn_of_damage(path, damaged[0])
    if names:
        raise _all_damaged(folder)
    return None


def _warn_of_damage(path: Path, reason: str) -> None:
    warnings.warn(
        f"checkpoint {path} is damaged: {reason}. Looking for an older one.",
        DamagedCheckpointWarning,
        stacklevel=3,
    )


def _all_damaged(folder: Path) -> CheckpointError:
    return CheckpointError(
        f"every checkpoint in {folder} is damaged. To start the stage again, remove that folder and those of "
        "all later stages."
    )


def read_state(path: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint. Raises ``ValueError`` if it was changed."""
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    migrate(state, path / "state.json")
    if state.get("sha256") != _digest(state):
        raise ValueError("state.json has changed since it was written")
    for name in state["files"]:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{name!r} is not the name of a safetensors file")
    return state


def with_checksum(state: dict[str, Any]) -> dict[str, Any]:
    """The content of ``state.json`` with its checksum added."""
    return {**state, "sha256": _digest(state)}


def _digest(state: dict[str, Any]) -> str:
    content = {name: value for name, value in state.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class _Stored:
    """Tensors of one group in a checkpoint, whatever files their rows are in. Reads only the requested
    rows."""

    def __init__(
        self, path: Path, description: dict[str, Any], group: str, files: contextlib.ExitStack
    ) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._parts: dict[str, list[tuple[int, int, Any]]] = {}
        shapes, rows = description.get("shapes", {}), description.get("rows", {})
        for name in description["files"]:
            if name.partition(".")[0] != group:
                continue
            try:
                check_header(path / name)
                file = files.enter_context(safe_open(path / name, framework="pt"))
                for key in file.keys():  # noqa: SIM118 (not a mapping)
                    found = tuple(file.get_slice(key).get_shape())
                    whole = shapes.get(f"{group}/{key}")
                    self.shapes[key] = found if whole is None else tuple(whole)
                    first = rows.get(name, {}).get(key, 0)
                    self._parts.setdefault(key, []).append((first, found[0] if found else 1, file))
            except (OSError, SafetensorError, ValueError) as error:
                raise CheckpointError(
                    f"{path / name} is not a complete safetensors file: {error}. Remove {path}."
                ) from error

    def fill(self, key: str, target: Tensor, first: int = 0) -> None:
        """Copies rows into ``target``, from row ``first`` on."""
        if target.ndim == 0:
            target.copy_(self._parts[key][0][2].get_tensor(key))
            return
        missing = len(target)
        for begin, count, file in self._parts[key]:
            low, high = max(first, begin), min(first + len(target), begin + count)
            if low < high:
                target[low - first : high - first] = file.get_slice(key)[low - begin : high - begin]
                missing -= high - low
        if missing:
            raise ValueError(f"{key} lacks {missing} rows")

    def read(self, key: str) -> Tensor:
        """The whole tensor."""
        parts = self._parts[key]
        if len(parts) == 1 and tuple(parts[0][2].get_slice(key).get_shape()) == self.shapes[key]:
            return parts[0][2].get_tensor(key)
        tensor = torch.empty(self.shapes[key], dtype=parts[0][2].get_slice(key)[:0].dtype, device="cpu")
        self.fill(key, tensor)
        return tensor


class _Reading:
    """Fills tensors from a checkpoint. A tensor that all ranks need is read by one rank and broadcast.

    So each byte is read once, for any number of processes. Broadcasts start after all ranks have read.
    """

    def __init__(self, processes: Processes | None) -> None:
        self._rank, self._count = (0, 1) if processes is None else (processes.rank, processes.count)
        self._processes = processes
        self._loads = [0] * self._count
        self._broadcasts: list[tuple[int, Tensor]] = []

    def fill(self, stored: _Stored, key: str, target: Tensor) -> None:
        if stored.shapes[key] != tuple(target.shape):
            raise ValueError(f"{key} has shape {stored.shapes[key]}, not {tuple(target.shape)}")
        processes = self._processes
        on_host = processes is not None and target.device.type != processes.device.type  # NCCL cannot send it
        if self._count == 1 or isinstance(target, DTensor) or on_host:
            stored.fill(key, local_part(target), first_row(target) if isinstance(target, DTensor) else 0)
            return
        reader = min(range(self._count), key=self._loads.__getitem__)
        self._loads[reader] += max(target.numel(), 1) * target.element_size()
        if reader == self._rank:
            stored.fill(key, target)
        self._broadcasts.append((reader, target))

    @contextlib.contextmanager
    def named(self, path: Path) -> Iterator[None]:
        """Tensors are read inside and broadcast at the end. All ranks raise ``CheckpointError`` if one
        fails."""
        error: CheckpointError | None = None
        try:
            yield
        except CheckpointError as raised:
            error = raised
        except (RuntimeError, KeyError, IndexError, ValueError, TypeError) as raised:
            detail = (str(raised).splitlines() or [type(raised).__name__])[0]
            error = CheckpointError(
                f"checkpoint {path} is incompatible with this recipe: {detail}. Use the settings that the "
                "run was started with, or remove the checkpoint."
            )
            error.__cause__ = raised
        if self._processes is None or self._count == 1:
            if error is not None:
                raise error
            return
        if self._processes.any_rank(error is not None):
            raise error or CheckpointError(
                f"another process cannot read checkpoint {path}. See that process's error for the cause."
            )
        for reader, target in self._broadcasts:
            whole = target.contiguous()
            dist.broadcast(whole, src=reader)
            if whole is not target:
                target.copy_(whole)


@torch.no_grad()
def restore(
    state: TrainingState, path: Path, description: dict[str, Any], processes: Processes | None = None
) -> None:
    """Loads a checkpoint into ``state``, sharded or not. Raises ``CheckpointError`` if it is incompatible.

    With ``processes``, all ranks call it together.
    """
    reading = _Reading(processes)
    with reading.named(path), contextlib.ExitStack() as files:
        groups = tensors_of(state)
        for group in ("networks", "averages"):
            stored = _Stored(path, description, group, files)
            for key in sorted(stored.shapes.keys() ^ groups[group].keys()):
                where = "checkpoint" if key in stored.shapes else "recipe"
                raise ValueError(f"{key} is only in the {where}")
            for key, target in groups[group].items():
                reading.fill(stored, key, target)
        stored = _Stored(path, description, "optimizers", files)
        for part, optimizer in state.optimizers.items():
            keys = [key.removeprefix(f"{part}/") for key in stored.shapes if key.startswith(f"{part}/")]
            load_optimizer_tensors(
                optimizer,
                sorted(keys),
                lambda key, target, part=part: reading.fill(stored, f"{part}/{key}", target),
            )
    state.images, state.updates = description["images"], description["updates"]


@torch.no_grad()
def load_averages(network: nn.Module, path: Path, name: str, processes: Processes) -> None:
    """Loads the averaged weights of a checkpoint into a network. All ranks call it together."""
    if processes.count == 1:
        network.load_state_dict(read_averages(path, name))
        return
    reading = _Reading(processes)
    with reading.named(path), contextlib.ExitStack() as files:
        stored = _Stored(path, read_state(path), "averages", files)
        for key, target in network.state_dict().items():
            reading.fill(stored, f"{name}/{key}", target)


def read_averages(path: Path, name: str, *, raw: bool = False) -> dict[str, Tensor]:
    """The averaged weights of one network in a checkpoint; with ``raw`` the trained ones."""
    try:
        description = read_state(path)
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, CheckpointError):
            raise
        if not path.exists():
            raise _removed(path) from error
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}. Remove it.") from error
    with contextlib.ExitStack() as files:
        stored = _Stored(path, description, "networks" if raw else "averages", files)
        start = f"{name}/"
        return {k.removeprefix(start): stored.read(k) for k in stored.shapes if k.startswith(start)}


def tensors_of(state: TrainingState) -> dict[str, dict[str, Tensor]]:
    """All tensors of a state by group and name, without copies."""

    def joined(parts: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        return {f"{part}/{key}": tensor for part, tensors in parts.items() for key, tensor in tensors.items()}

    return {
        "networks": joined({name: dict(n.state_dict()) for name, n in state.networks.items()}),
        "averages": joined({name: dict(n.state_dict()) for name, n in state.averages.items()}),
        "optimizers": joined({name: optimizer_tensors(o) for name, o in state.optimizers.items()}),
    }


def checkpoints_in(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if p.is_dir() and p.name.isdigit()), reverse=True)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

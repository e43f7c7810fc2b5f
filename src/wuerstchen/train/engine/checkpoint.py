"""Checkpoints of a stage in training: a folder each, which is whole or not there.

    stage_b/checkpoints/000012800/
        networks.safetensors  averages.safetensors  optimizers.safetensors
        state.json            what it is, where it came from, and a SHA-256 of every file

Where networks are sharded, each process writes what it holds, ``networks.0-of-2.safetensors`` and so on, and
state.json says of which tensors and rows. So a checkpoint can be read by any number of processes: each reads
the rows that it needs. Nothing is pickled, and no pickle is read: tensors are in safetensors, all else is in
state.json.

A checkpoint is copied from the device at once and written by a thread while training goes on, under a
temporary name, and renamed at the end. The two newest are kept, those that were marked as milestones, and
the one with the lowest validation loss, which ``best.json`` beside them names. One that turns out damaged is
named, and the one before it is used.
"""

import contextlib
import hashlib
import json
import os
import shutil
import threading
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

from wuerstchen.checkpoints.files import check_header, write_json
from wuerstchen.checkpoints.native import FORMAT, migrate, write_tensors
from wuerstchen.errors import CheckpointError, UserNotice
from wuerstchen.train.engine.distributed import Processes, first_row, local_part
from wuerstchen.train.engine.optim import load_optimizer_tensors, optimizer_tensors

KEPT = 2
BEST = "best.json"
_LOOKS = 0.05  # seconds between two looks for what the other processes have written


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


class CheckpointNotWritten(CheckpointError):
    """A checkpoint could not be written, by this process or by another."""

    reason = "another process could not write its part"


@dataclass
class _Part:
    """What one process writes of a checkpoint: by file its tensors, and of those that are parts their first
    rows; and the whole shapes of these."""

    files: dict[str, dict[str, Tensor]]
    rows: dict[str, dict[str, int]]
    shapes: dict[str, list[int]]


class Writer:
    """Writes the checkpoints of a stage, one at a time, beside the training.

    All processes call its methods, at the same updates. It talks to the others in the caller's thread alone:
    the threads that write meet through files, a ``.json`` of each process in the unfinished folder.
    """

    def __init__(self, folder: Path, processes: Processes, begun_at: int | None = None) -> None:
        """``begun_at`` is the image that training goes on from: later checkpoints were found damaged."""
        self.folder = folder
        self.begun_at = begun_at
        self._own: set[Path] = set()
        self.processes = processes
        self._pinned: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._target = folder
        self._written = threading.Event()
        self._given_up = threading.Event()
        self._error: CheckpointNotWritten | None = None

    @property
    def failed(self) -> bool:
        """Whether this process could not write its part: for all to be told of by ``wait``."""
        return self._error is not None

    @property
    def busy(self) -> bool:
        """Whether this process still writes."""
        return self._thread is not None and self._thread.is_alive()

    def begin(self, state: TrainingState, header: dict[str, Any]) -> None:
        """Copies the state and begins to write it, when the checkpoint before is whole.

        Raises ``CheckpointError`` in all processes if one of them could not write; what was there before
        stays whole.
        """
        self.wait()
        self._target = self.folder / f"{state.images:012d}"
        if self.processes.leads:
            with self._named():
                self.folder.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(self._partial, ignore_errors=True)
                self._partial.mkdir()
        self._agree()
        part = self._copied(state)
        description = {**header, "format": FORMAT, "images": state.images, "updates": state.updates}
        copied = None
        if self.processes.device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record()
        self._written, self._given_up = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._write, args=(part, description, copied), daemon=True)
        self._thread.start()

    def wait(self) -> Path:
        """The newest checkpoint, when it is whole. Raises ``CheckpointError`` in all processes if not."""
        if self._thread is not None:
            self._written.wait()
            self._agree()
            self._thread.join()
            self._thread = None
            self._agree()
        return self._target

    def close(self) -> None:
        """Waits for what is being written without a word to the others, which may be gone."""
        if self._thread is not None:
            self._written.wait()
            self._thread.join(10 if self.processes.count > 1 else None)
            self._given_up.set()

    @property
    def _partial(self) -> Path:
        return self.folder / f".{self._target.name}.partial"

    def _agree(self) -> None:
        """Raises in all processes if one has failed."""
        (failed,) = self.processes.agreed(self.failed)
        if failed:
            self._given_up.set()
            error = self._error or CheckpointNotWritten(
                f"another process could not write its part of checkpoint {self._target}; it says why"
            )
            self._error = None
            if self._thread is not None:
                self._thread.join()
                self._thread = None
            self.processes.wait()
            if self.processes.leads:
                shutil.rmtree(self._partial, ignore_errors=True)
            raise error

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Keeps what went wrong, in words, for ``_agree``."""
        try:
            yield
        except Exception as error:  # whatever it is, the others must not wait for this process
            reason = error.strerror if isinstance(error, OSError) else error.__cause__ or error
            self._error = CheckpointNotWritten(
                f"checkpoint {self._target} cannot be written ({reason}); those before it are whole: free "
                "some space and start the same command again"
            )
            self._error.reason = str(reason)

    def _copied(self, state: TrainingState) -> _Part:
        """This process's part of the state in the host's memory, as it is at this moment."""
        count, rank = self.processes.count, self.processes.rank
        part = _Part({}, {}, {})
        groups = _groups(state)
        sharded = any(isinstance(t, DTensor) for tensors in groups.values() for t in tensors.values())
        for group, tensors in groups.items():
            name = f"{group}.{rank}-of-{count}.safetensors" if sharded else f"{group}.safetensors"
            mine: dict[str, Tensor] = {}
            rows: dict[str, int] = {}
            for key, tensor in tensors.items():
                local = local_part(tensor)
                if isinstance(tensor, DTensor):
                    part.shapes[f"{group}/{key}"] = list(tensor.shape)
                    if local.numel():
                        mine[key] = self._on_host(f"{group}/{key}", local)
                        rows[key] = first_row(tensor)
                elif self.processes.leads:
                    mine[key] = self._on_host(f"{group}/{key}", local)
            if self.processes.leads or mine:
                part.files[name] = mine
                if rows:
                    part.rows[name] = rows
        return part

    def _on_host(self, key: str, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if tensor.device.type != "cuda":
            return tensor.cpu().clone(memory_format=torch.contiguous_format)
        # Memory that the device writes to by itself is slow to get, so it is kept for the next checkpoint.
        kept = self._pinned.get(key)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._pinned[key] = kept
        return kept.copy_(tensor, non_blocking=True)

    def _write(self, part: _Part, description: dict[str, Any], copied: Any) -> None:
        with self._named():
            try:
                if copied is not None:
                    copied.synchronize()
                own: dict[str, Any] = {"files": {}, "rows": part.rows}
                for name, tensors in part.files.items():
                    write_tensors(tensors, self._partial / name, {"format": FORMAT})
                    own["files"][name] = _sha256(self._partial / name)
                part.files.clear()
                if not self.processes.leads:
                    if not part.shapes:
                        return  # nothing is sharded, and the first process writes all
                    write_json(self._partial / f"{self.processes.rank}.json", own)
                    return
            finally:
                self._written.set()
            self._finish(own, {**description, "shapes": part.shapes}, bool(part.shapes))

    def _finish(self, own: dict[str, Any], description: dict[str, Any], sharded: bool) -> None:
        """What the first process does when it has written its own part."""
        files, rows = dict(own["files"]), dict(own["rows"])
        for rank in range(1, self.processes.count if sharded else 1):
            path = self._partial / f"{rank}.json"
            while not path.exists():
                if self._given_up.wait(_LOOKS):
                    return
            others = json.loads(path.read_text(encoding="utf-8"))
            files |= others["files"]
            rows |= others["rows"]
        for path in self._partial.glob("*.json"):
            path.unlink()
        state = {**description, "files": dict(sorted(files.items()))}
        if sharded:
            state["rows"] = rows
        else:
            del state["shapes"]
        write_json(self._partial / "state.json", sealed(state))
        if self._target.exists():
            _remove(self._target)  # it was found damaged
        os.replace(self._partial, self._target)
        self._own.add(self._target)
        others = [path for path in _all(self.folder) if path != self._target]
        whole = [path for path in others if path < self._target and not self._was_damaged(path)]
        best = best_of(self.folder)
        kept = [path for path in whole if _is_milestone(path) or (best and int(path.name) == best["images"])]
        for path in {*others} - {*whole[: KEPT - 1], *kept}:
            _remove(path)

    def _was_damaged(self, path: Path) -> bool:
        """Whether training went on from before a checkpoint that was there already."""
        return self.begun_at is not None and path not in self._own and int(path.name) > self.begun_at


def best_of(folder: Path) -> dict[str, Any] | None:
    """The ``images`` and the ``loss`` of the checkpoint under ``folder`` with the lowest validation loss.

    None where there is no validation, or where its checkpoint has gone.
    """
    try:
        best = json.loads((folder / BEST).read_text(encoding="utf-8"))
        images, loss = int(best["images"]), float(best["loss"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return {"images": images, "loss": loss} if (folder / f"{images:012d}").is_dir() else None


def _is_milestone(path: Path) -> bool:
    try:
        return _read_state(path).get("milestone") is True
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return False


def save(state: TrainingState, folder: Path, header: dict[str, Any]) -> Path:
    """Writes a checkpoint under ``folder`` and removes those older than the one before it, by one process.

    Raises ``CheckpointError`` if it cannot be written; what was there before stays whole.
    """
    writer = Writer(folder, Processes(torch.device("cpu")))
    writer.begin(state, header)
    return writer.wait()


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint under ``folder`` with its state, None where there is none at all.

    Warns of each damaged one that is passed over. Raises ``CheckpointError`` where all are damaged, and
    where one was written by a newer version. A run that is being trained may remove one meanwhile: then it
    has written a newer one.
    """
    damaged: set[Path] = set()
    while True:
        left = [path for path in _all(folder) if path not in damaged]
        if not left:
            break
        path = left[0]
        try:
            state = _read_state(path)
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


def read_whole(path: Path) -> dict[str, Any]:
    """What describes one checkpoint. Raises ``CheckpointError`` where it is damaged."""
    try:
        state = _read_state(path)
        reason = _damage(path, state)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        if not path.exists():
            raise _removed(path) from error
        reason = f"{type(error).__name__}: {error}"
    if reason:
        raise CheckpointError(f"checkpoint {path} is damaged ({reason}); give another")
    return state


def _removed(path: Path) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {path} was removed while it was read: the run goes on, and keeps its newest ones. Start "
        "the same command again, or name a checkpoint that the run has kept"
    )


def _damage(path: Path, state: dict[str, Any], rank: int = 0, count: int = 1) -> str:
    """Which file of a checkpoint has changed; empty if none. Of ``count`` processes each reads its part."""
    mine = list(state["files"].items())[rank::count]
    wrong = [name for name, digest in mine if _sha256(path / name) != digest]
    return f"{wrong[0]} has changed since it was written" if wrong else ""


def newest_of_all(folder: Path, processes: Processes) -> tuple[Path, dict[str, Any]] | None:
    """As ``newest``, for all processes together: all go on from the same, and each file is read by one."""
    if processes.count == 1:
        return newest(folder)
    names = processes.gathered([path.name for path in _all(folder)] if processes.leads else [])
    for name in names:
        path, state = folder / name, None
        reason, fatal = "", ""
        try:
            state = _read_state(path)
            reason = _damage(path, state, processes.rank, processes.count)
        except CheckpointError as error:  # of a newer version
            fatal = str(error)
        except FileNotFoundError as error:
            if processes.leads:
                reason = f"{type(error).__name__}: {error}"
            else:
                fatal = f"{path} is not seen by all processes ({error}); use a --run-dir on a shared disk"
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"
        reasons = processes.gathered([(reason, fatal)] if reason or fatal else [])
        if not reasons:
            assert state is not None
            return path, state
        damaged = [reason for reason, _ in reasons if reason]
        if not damaged:
            raise CheckpointError(next(fatal for _, fatal in reasons))
        if processes.leads:
            _warn_of_damage(path, damaged[0])
    if names:
        raise _all_damaged(folder)
    return None


def _warn_of_damage(path: Path, reason: str) -> None:
    warnings.warn(
        f"checkpoint {path} is damaged ({reason}); looking for one before it",
        DamagedCheckpointWarning,
        stacklevel=3,
    )


def _all_damaged(folder: Path) -> CheckpointError:
    return CheckpointError(
        f"every checkpoint in {folder} is damaged; remove that folder, and those of all stages after it, to "
        "start its stage again"
    )


def _read_state(path: Path) -> dict[str, Any]:
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    migrate(state, path / "state.json")
    if state.get("sha256") != _digest(state):
        raise ValueError("state.json has changed since it was written")
    for name in state["files"]:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{name!r} is no file of tensors in it")
    return state


def sealed(state: dict[str, Any]) -> dict[str, Any]:
    """What ``state.json`` holds, with a checksum of itself."""
    return {**state, "sha256": _digest(state)}


def _digest(state: dict[str, Any]) -> str:
    content = {name: value for name, value in state.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class _Stored:
    """The tensors of one group in a checkpoint, wherever their rows are. Reads no more than is asked for."""

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
                for key in file.keys():  # noqa: SIM118 (no mapping)
                    found = tuple(file.get_slice(key).get_shape())
                    whole = shapes.get(f"{group}/{key}")
                    self.shapes[key] = found if whole is None else tuple(whole)
                    first = rows.get(name, {}).get(key, 0)
                    self._parts.setdefault(key, []).append((first, found[0] if found else 1, file))
            except (OSError, SafetensorError, ValueError) as error:
                raise CheckpointError(
                    f"{path / name} is not a whole safetensors file ({error}); remove {path}"
                ) from error

    def fill(self, key: str, target: Tensor, first: int = 0) -> None:
        """Copies the rows from ``first`` on into ``target``, as many as it has."""
        if target.ndim == 0:
            target.copy_(self._parts[key][0][2].get_tensor(key))
            return
        left = len(target)
        for begins, count, file in self._parts[key]:
            low, high = max(first, begins), min(first + len(target), begins + count)
            if low < high:
                target[low - first : high - first] = file.get_slice(key)[low - begins : high - begins]
                left -= high - low
        if left:
            raise ValueError(f"{key} lacks {left} rows")

    def read(self, key: str) -> Tensor:
        """The whole tensor."""
        parts = self._parts[key]
        if len(parts) == 1 and tuple(parts[0][2].get_slice(key).get_shape()) == self.shapes[key]:
            return parts[0][2].get_tensor(key)
        tensor = torch.empty(self.shapes[key], dtype=parts[0][2].get_slice(key)[:0].dtype, device="cpu")
        self.fill(key, tensor)
        return tensor


class _Reading:
    """Fills tensors from a checkpoint. What all processes need, one of them reads and sends to the others.

    So however many processes there are, each byte is read once. Nothing is sent before all have read theirs.
    """

    def __init__(self, processes: Processes | None) -> None:
        self._rank, self._count = (0, 1) if processes is None else (processes.rank, processes.count)
        self._processes = processes
        self._loads = [0] * self._count
        self._sent: list[tuple[int, Tensor]] = []

    def fill(self, stored: _Stored, key: str, target: Tensor) -> None:
        if stored.shapes[key] != tuple(target.shape):
            raise ValueError(f"{key} has shape {stored.shapes[key]}, not {tuple(target.shape)}")
        if self._count == 1 or isinstance(target, DTensor):
            stored.fill(key, local_part(target), first_row(target) if isinstance(target, DTensor) else 0)
            return
        reader = min(range(self._count), key=self._loads.__getitem__)
        self._loads[reader] += max(target.numel(), 1) * target.element_size()
        if reader == self._rank:
            stored.fill(key, target)
        self._sent.append((reader, target))

    @contextlib.contextmanager
    def named(self, path: Path) -> Iterator[None]:
        """Within, tensors are read, and at its end sent. All processes raise if one cannot read."""
        error: CheckpointError | None = None
        try:
            yield
        except CheckpointError as raised:
            error = raised
        except (RuntimeError, KeyError, IndexError, ValueError, TypeError) as raised:
            detail = (str(raised).splitlines() or [type(raised).__name__])[0]
            error = CheckpointError(f"checkpoint {path} does not fit this recipe ({detail}); remove it")
            error.__cause__ = raised
        if self._processes is None or self._count == 1:
            if error is not None:
                raise error
            return
        if self._processes.agreed(error is not None)[0]:
            raise error or CheckpointError(f"another process cannot read checkpoint {path}; it says why")
        for reader, target in self._sent:
            whole = target.contiguous()
            dist.broadcast(whole, src=reader)
            if whole is not target:
                target.copy_(whole)


@torch.no_grad()
def restore(
    state: TrainingState, path: Path, description: dict[str, Any], processes: Processes | None = None
) -> None:
    """Loads a checkpoint into ``state``, sharded or not. Raises ``CheckpointError`` if it does not fit.

    All of several ``processes`` call it together.
    """
    reading = _Reading(processes)
    with reading.named(path), contextlib.ExitStack() as files:
        groups = _groups(state)
        for group in ("networks", "averages"):
            stored = _Stored(path, description, group, files)
            for key in sorted(stored.shapes.keys() ^ groups[group].keys()):
                raise ValueError(f"{key} is in one of them alone")
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
    """Gives a network the averaged weights of a checkpoint. All processes call it together."""
    if processes.count == 1:
        network.load_state_dict(read_averages(path, name))
        return
    reading = _Reading(processes)
    with reading.named(path), contextlib.ExitStack() as files:
        stored = _Stored(path, _read_state(path), "averages", files)
        for key, target in network.state_dict().items():
            reading.fill(stored, f"{name}/{key}", target)


def read_averages(path: Path, name: str, *, raw: bool = False) -> dict[str, Tensor]:
    """The averaged weights of one network in a checkpoint, for the stages after it; or those that are trained
    (``raw``)."""
    try:
        description = _read_state(path)
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, CheckpointError):
            raise
        if not path.exists():
            raise _removed(path) from error
        raise CheckpointError(f"checkpoint {path} cannot be read ({error}); remove it") from error
    with contextlib.ExitStack() as files:
        stored = _Stored(path, description, "networks" if raw else "averages", files)
        start = f"{name}/"
        return {k.removeprefix(start): stored.read(k) for k in stored.shapes if k.startswith(start)}


def _groups(state: TrainingState) -> dict[str, dict[str, Tensor]]:
    def joined(parts: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        return {f"{part}/{key}": tensor for part, tensors in parts.items() for key, tensor in tensors.items()}

    return {
        "networks": joined({name: dict(n.state_dict()) for name, n in state.networks.items()}),
        "averages": joined({name: dict(n.state_dict()) for name, n in state.averages.items()}),
        "optimizers": joined({name: optimizer_tensors(o) for name, o in state.optimizers.items()}),
    }


def _all(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if p.is_dir() and p.name.isdigit()), reverse=True)


def _remove(path: Path) -> None:
    """Removes a checkpoint, which is whole or not there meanwhile too."""
    gone = path.with_name(f".{path.name}.old.partial")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

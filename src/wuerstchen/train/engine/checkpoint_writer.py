"""Writes the checkpoints of a stage in the background.

The state is copied from the device at once. A thread writes it under a temporary name while training goes on,
and renames it at the end. Kept are the two newest checkpoints, milestones, and the one with the lowest
validation loss, which ``best.json`` names.
"""

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from wuerstchen.checkpoints.files import write_json
from wuerstchen.checkpoints.native import FORMAT, write_tensors
from wuerstchen.errors import CheckpointError
from wuerstchen.train.engine.checkpoint import (
    TrainingState,
    best_of,
    checkpoints_in,
    read_state,
    sha256_of,
    tensors_of,
    with_checksum,
)
from wuerstchen.train.engine.distributed import Processes
from wuerstchen.train.engine.sharding import first_row, local_part

KEPT = 2
_POLL = 0.05  # seconds between two looks for what the other ranks have written


class CheckpointNotWritten(CheckpointError):
    """A checkpoint could not be written, by this process or by another."""

    reason = "another process could not write its part"


@dataclass
class _Part:
    """What one rank writes of a checkpoint."""

    files: dict[str, dict[str, Tensor]]
    """Tensors by file and name."""
    rows: dict[str, dict[str, int]]
    """First rows of shards by file and name."""
    shapes: dict[str, list[int]]
    """Whole shapes of sharded tensors by group and name."""


class Writer:
    """Writes the checkpoints of a stage in the background, one at a time.

    All ranks call its methods, at the same updates. Collectives run only in the caller's thread. The writing
    threads synchronise through files: each rank leaves a ``.json`` in the unfinished folder.
    """

    def __init__(self, folder: Path, processes: Processes, resumed_at: int | None = None) -> None:
        """Training resumes at image ``resumed_at``. Later checkpoints were found to be damaged."""
        self.folder = folder
        self.resumed_at = resumed_at
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
        """Whether this rank could not write its part. ``wait`` then raises on all ranks."""
        return self._error is not None

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, state: TrainingState, header: dict[str, Any]) -> None:
        """Waits for the previous checkpoint, copies the state and starts to write it.

        Raises ``CheckpointError`` on all ranks if one of them could not write. Existing checkpoints stay.
        """
        self.wait()
        self._target = self.folder / f"{state.images:012d}"
        if self.processes.is_main:
            with self._named():
                self.folder.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(self._partial, ignore_errors=True)
                self._partial.mkdir()
        self._raise_if_any_failed()
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
        """Waits for the newest checkpoint. Raises ``CheckpointError`` on all ranks if it could not be
        written."""
        if self._thread is not None:
            self._written.wait()
            self._raise_if_any_failed()
            self._thread.join()
            self._thread = None
            self._raise_if_any_failed()
        return self._target

    def close(self) -> None:
        """Waits for what is being written, without any collective: the other ranks may have died."""
        if self._thread is not None:
            self._written.wait()
            self._thread.join(10 if self.processes.count > 1 else None)
            self._given_up.set()

    @property
    def _partial(self) -> Path:
        return self.folder / f".{self._target.name}.partial"

    def _raise_if_any_failed(self) -> None:
        """Raises on all ranks if one has failed."""
        if self.processes.any_rank(self.failed):
            self._given_up.set()
            error = self._error or CheckpointNotWritten(
                f"another process could not write its part of checkpoint {self._target}. See that process's "
                "error for the cause."
            )
            self._error = None
            if self._thread is not None:
                self._thread.join()
                self._thread = None
            self.processes.barrier()
            if self.processes.is_main:
                shutil.rmtree(self._partial, ignore_errors=True)
            raise error

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Keeps an error as a message for ``_raise_if_any_failed``."""
        try:
            yield
        except Exception as error:  # of any kind: the others must not wait for this rank
            reason = error.strerror if isinstance(error, OSError) else error.__cause__ or error
            self._error = CheckpointNotWritten(
                f"checkpoint {self._target} cannot be written: {reason}. Older checkpoints are not affected. "
                "Free some disk space and start the same command again."
            )
            self._error.reason = str(reason)

    def _copied(self, state: TrainingState) -> _Part:
        """A copy of this rank's part of the state in host memory."""
        count, rank = self.processes.count, self.processes.rank
        part = _Part({}, {}, {})
        groups = tensors_of(state)
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
                elif self.processes.is_main:
                    mine[key] = self._on_host(f"{group}/{key}", local)
            if self.processes.is_main or mine:
                part.files[name] = mine
                if rows:
                    part.rows[name] = rows
        return part

    def _on_host(self, key: str, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if tensor.device.type != "cuda":
            return tensor.cpu().clone(memory_format=torch.contiguous_format)
        # Pinned memory is slow to allocate, so it is kept for the next checkpoint.
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
                    own["files"][name] = sha256_of(self._partial / name)
                part.files.clear()
                if not self.processes.is_main:
                    if not part.shapes:
                        return  # nothing is sharded: rank 0 writes everything
                    write_json(self._partial / f"{self.processes.rank}.json", own)
                    return
            finally:
                self._written.set()
            self._finish(own, {**description, "shapes": part.shapes}, bool(part.shapes))

    def _finish(self, own: dict[str, Any], description: dict[str, Any], sharded: bool) -> None:
        """Completes the checkpoint on rank 0, after rank 0 has written its own part."""
        files, rows = dict(own["files"]), dict(own["rows"])
        for rank in range(1, self.processes.count if sharded else 1):
            path = self._partial / f"{rank}.json"
            while not path.exists():
                if self._given_up.wait(_POLL):
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
        write_json(self._partial / "state.json", with_checksum(state))
        if self._target.exists():
            _remove(self._target)  # it is damaged
        os.replace(self._partial, self._target)
        self._own.add(self._target)
        others = [path for path in checkpoints_in(self.folder) if path != self._target]
        whole = [path for path in others if path < self._target and not self._was_damaged(path)]
        best = best_of(self.folder)
        kept = [path for path in whole if _is_milestone(path) or (best and int(path.name) == best["images"])]
        for path in {*others} - {*whole[: KEPT - 1], *kept}:
            _remove(path)

    def _was_damaged(self, path: Path) -> bool:
        """Whether a checkpoint was there before this start and was skipped as damaged."""
        return self.resumed_at is not None and path not in self._own and int(path.name) > self.resumed_at


def _is_milestone(path: Path) -> bool:
    try:
        return read_state(path).get("milestone") is True
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return False


def save(state: TrainingState, folder: Path, header: dict[str, Any]) -> Path:
    """Writes a checkpoint under ``folder`` in a single process, and removes old ones.

    Raises ``CheckpointError`` if it cannot be written. Existing checkpoints stay.
    """
    writer = Writer(folder, Processes(torch.device("cpu")))
    writer.start(state, header)
    return writer.wait()


def _remove(path: Path) -> None:
    """Removes a checkpoint. If it is interrupted, the folder is complete or gone."""
    gone = path.with_name(f".{path.name}.old.partial")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(path, gone)
    shutil.rmtree(gone, ignore_errors=True)

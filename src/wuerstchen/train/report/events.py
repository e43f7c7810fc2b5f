"""The log of a run, ``log.jsonl`` with one event per line, its TensorBoard copy, and the progress bar."""

import contextlib
import errno
import json
import os
import time
import warnings
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from wuerstchen.errors import UserError, UserNotice
from wuerstchen.progress_bar import bar

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}
"""Error numbers of a disk that is full, or cannot be written for other reasons."""
_KEPT = 100_000  # lines in memory that cannot be written yet


class LogNotWrittenWarning(UserNotice):
    """Lines of the log are kept in memory because the disk cannot be written."""


class Log:
    """Appends events to ``log.jsonl``. A line that was cut off by a kill is removed at the next start."""

    def __init__(self, path: Path, writes: bool = True, *, tensorboard: bool = False) -> None:
        """Only one process of a run ``writes``. The events of the others are dropped."""
        self.path = path
        self.writes = writes
        self._pending: deque[str] = deque(maxlen=_KEPT)
        self._board = Board(path.parent / "tensorboard") if tensorboard and writes else None
        if writes and path.exists():
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if whole != content:
                os.truncate(path, len(whole))

    def event(self, kind: str, **values: Any) -> None:
        """Appends an event. If the disk is full, it is kept in memory and written later with the next one."""
        if not self.writes:
            return
        line = json.dumps({"event": kind, "time": round(time.time(), 3), **values}, allow_nan=False)
        self._pending.append(line)
        try:
            self._write()
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            if len(self._pending) == 1:
                warnings.warn(
                    f"{self.path} cannot be written: {error.strerror}. Training continues, and the lines are "
                    "written as soon as there is room. Free some space",
                    LogNotWrittenWarning,
                    stacklevel=2,
                )
        if self._board is not None:
            self._board.event(kind, values)

    def _write(self) -> None:
        """Writes all pending lines, or none."""
        data = "".join(f"{line}\n" for line in self._pending).encode()
        with open(self.path, "ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if file.write(data) != len(data):
                os.truncate(self.path, end)  # a full disk accepts a part without an error
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._pending.clear()

    def events(self) -> list[dict[str, Any]]:
        """All events so far, oldest first."""
        written = read_events(self.path) if self.path.exists() else []
        return [*written, *map(json.loads, self._pending)]


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events in a log, oldest first. Skips lines that are cut off or are not events."""
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError, RecursionError):  # a log that was edited by hand must not fail
            entry = json.loads(line)
            if isinstance(entry, dict) and isinstance(entry.get("event"), str):
                events.append(entry)
    return events


class Board:
    """Writes the same events for TensorBoard, in one folder per stage, so that their curves overlay.

    When a stage is resumed, the points after its checkpoint are removed from the curves.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None

    def event(self, kind: str, values: dict[str, Any]) -> None:
        stage, images = values.get("stage"), values.get("images")
        if kind == "end" and self._writer is not None:
            self._writer.close()
        if stage is None or images is None:
            return
        if kind == "start":
            if self._writer is not None:
                self._writer.close()
            # Keeps the points at the step of the checkpoint.
            self._writer = _summary_writer()(str(self.folder / stage), purge_step=images + 1)
        elif self._writer is not None and kind in ("progress", "validation"):
            for name, value in values.items():
                if name == "bins":
                    for k, of_bin in enumerate(value):
                        self._add(f"{kind}/bin {k + 1} of {len(value)}", of_bin, images)
                elif name not in ("stage", "images", "times"):
                    self._add(f"{kind}/{name}", value, images)
        elif self._writer is not None and kind == "preview":
            path = self.folder.parent / f"stage_{stage}" / "previews" / f"{images:012d}.png"
            if path.is_file():
                with Image.open(path) as image:
                    self._writer.add_image(
                        "preview", np.array(image.convert("RGB")), images, dataformats="HWC"
                    )
        if self._writer is not None:
            self._writer.flush()

    def _add(self, name: str, value: float | None, images: int) -> None:
        if value is not None:
            self._writer.add_scalar(name, value, images)


def check_tensorboard() -> None:
    """Raises ``UserError`` if TensorBoard is not installed."""
    _summary_writer()


def _summary_writer() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            "--tensorboard needs the package tensorboard, which is not installed. Run "
            'pip install "wuerstchen[tensorboard]", or leave the option out: log.jsonl has the same events.'
        ) from error
    return SummaryWriter


class Meter:
    """Images per second and the smoothed loss, for the progress bar and the log."""

    def __init__(self, title: str, start: int, total: int, shown: bool = True) -> None:
        self.bar = bar(
            total=total,
            initial=start,
            desc=title,
            unit="img",
            dynamic_ncols=True,
            mininterval=0.5,
            disable=not shown,
        )
        self.loss: float | None = None
        self._since = time.monotonic()
        self._images = 0

    def update(self, images: int, loss: float) -> None:
        self.loss = loss if self.loss is None else 0.95 * self.loss + 0.05 * loss
        self._images += images
        self.bar.set_postfix_str(f"loss {self.loss:.4f}", refresh=False)
        self.bar.update(images)

    def rate(self) -> float:
        """Images per second since the last call."""
        now = time.monotonic()
        rate = self._images / max(now - self._since, 1e-9)
        self._since, self._images = now, 0
        return rate

    def close(self) -> None:
        self.bar.close()

"""What a run leaves to be read: ``log.jsonl``, a line an event, and the progress bar."""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm


class Log:
    """Appends events to ``log.jsonl``. A line that a kill cut short is removed at the next start."""

    def __init__(self, path: Path, writes: bool = True) -> None:
        """Of the processes of one run, one ``writes``; the others' events go nowhere."""
        self.path = path
        self.writes = writes
        if writes and path.exists():
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if whole != content:
                os.truncate(path, len(whole))

    def event(self, kind: str, **values: Any) -> None:
        if not self.writes:
            return
        line = json.dumps({"event": kind, "time": round(time.time(), 3), **values}, allow_nan=False)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def events(self) -> list[dict[str, Any]]:
        """All events so far, oldest first."""
        if not self.path.exists():
            return []
        events = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").split("\n"):
            with contextlib.suppress(ValueError):  # a log that was edited by hand is no reason to fail
                entry = json.loads(line)
                if isinstance(entry, dict) and "event" in entry:
                    events.append(entry)
        return events


class Meter:
    """Images a second and smoothed loss, for the bar and the log."""

    def __init__(self, title: str, start: int, total: int, shown: bool = True) -> None:
        self.bar = tqdm(
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
        """Images a second since the last call."""
        now = time.monotonic()
        rate = self._images / max(now - self._since, 1e-9)
        self._since, self._images = now, 0
        return rate

    def close(self) -> None:
        self.bar.close()

"""Finished pictures in a folder, under names that cannot be guessed, for a while and within a bound in bytes.

Several instances may share the folder: each can hand out all pictures, and each clears away what is old.
"""

import contextlib
import os
import re
import secrets
import stat
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from wuerstchen.image_files import check_writable, save_png
from wuerstchen.serve.signing import Signer

NAME = re.compile(r"[a-z0-9]{4,16}-[0-9a-f]{32}\.png")
_UNFINISHED = re.compile(r"\.[a-z0-9]{4,16}-[0-9a-f]{32}-[0-9a-f]{8}\.tmp")

NO_LINKS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
"""Links are not followed, and a pipe in the place of a file is not waited for."""


class Results:
    """Pictures are kept for ``seconds``, and at most ``max_bytes`` of them: the oldest go first."""

    def __init__(
        self,
        folder: Path,
        instance: str,
        *,
        seconds: float,
        max_bytes: int,
        signer: Signer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``clock`` counts seconds and never jumps. Raises ``UserError`` if ``folder`` cannot be written."""
        check_writable(folder)
        self.folder = folder
        self.instance = instance
        self.seconds = seconds
        self.max_bytes = max_bytes
        self.signer = signer
        self.clock = clock
        self._written: dict[str, float] = {}
        """By ``clock``, when each file appeared. The times of the files are of clocks that jump and differ
        from one machine to the next: they count only for what lies there at the start."""
        now = clock()
        here = self._now_of_files()
        for entry in self._entries():
            with contextlib.suppress(OSError):  # another instance removed it a moment ago
                age = here - entry.stat(follow_symlinks=False).st_mtime
                self._written[entry.name] = now - max(0.0, age)

    def save(self, image: Image.Image, settings: Mapping[str, Any]) -> str:
        """Writes a picture; returns its name. It appears when it is whole."""
        name = f"{self.instance}-{secrets.token_hex(16)}.png"
        path = self.folder / name
        with contextlib.suppress(OSError):  # a tidy system removes what lies in /tmp for long
            self.folder.mkdir(mode=0o700, exist_ok=True)
        save_png(image, path, settings, drawn_by_a_model=True)
        if self.signer is not None:
            try:
                self.signer.sign(path)
            except BaseException:  # its name is in the error and so in the log
                path.unlink(missing_ok=True)
                raise
        self._written[name] = self.clock()
        return name

    def read(self, name: str) -> bytes | None:
        """The file of that name; None for what is no name of ours, no regular file, or no longer there."""
        now = self.clock()
        if NAME.fullmatch(name) is None or now - self._written.get(name, now) > self.seconds:
            return None
        try:
            # The folder may be shared: a link in it could lead to any file that the service can read.
            handle = os.open(self.folder / name, os.O_RDONLY | NO_LINKS)
        except OSError:
            return None
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                return None
            with open(handle, "rb", closefd=False) as file:
                return file.read()
        except OSError:
            return None
        finally:
            os.close(handle)

    def clear(self) -> None:
        """Removes what is too old, and the oldest of what is too much."""
        kept, present, now = [], set(), self.clock()
        for entry in self._entries():
            present.add(entry.name)
            with contextlib.suppress(OSError):  # another instance was faster
                age = now - self._written.setdefault(entry.name, now)  # another instance's: seen just now
                size = entry.stat(follow_symlinks=False).st_size
                if age > self.seconds:
                    os.unlink(entry.path)
                else:
                    kept.append((age, size, entry.path))
        for name in [name for name in list(self._written) if name not in present]:
            self._written.pop(name, None)  # another instance has removed it
        total = sum(size for _, size, _ in kept)
        for _, size, path in sorted(kept, reverse=True):
            if total <= self.max_bytes:
                break
            with contextlib.suppress(OSError):
                os.unlink(path)
            total -= size

    def _entries(self) -> list[os.DirEntry[str]]:
        """Our files in the folder, unfinished ones included."""
        try:
            with os.scandir(self.folder) as entries:
                return [e for e in entries if NAME.fullmatch(e.name) or _UNFINISHED.fullmatch(e.name)]
        except FileNotFoundError:
            return []  # ``save`` makes it anew

    def _now_of_files(self) -> float:
        """The time that the file system gives a file now, which may be another machine's."""
        with tempfile.TemporaryFile(dir=self.folder) as file:
            return os.fstat(file.fileno()).st_mtime

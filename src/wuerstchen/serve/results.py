"""Stores finished images in a folder, under names that cannot be guessed, with limits on age and total size.

Several instances may share the folder. Each serves all of its images, and each deletes old ones.
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
"""Do not follow links, and do not block on a pipe."""


class Results:
    """Keeps images for ``seconds``, and at most ``max_bytes`` in total. Deletes the oldest first."""

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
        """``clock``: a monotonic clock in seconds. Raises ``UserError`` if ``folder`` is not writable."""
        check_writable(folder)
        self.folder = folder
        self.instance = instance
        self.seconds = seconds
        self.max_bytes = max_bytes
        self.signer = signer
        self.clock = clock
        self._written: dict[str, float] = {}
        """When each file appeared, by ``clock``. File times come from clocks that jump and that differ
        between machines, so they are used only for files that exist at the start."""
        now = clock()
        file_now = self._now_of_files()
        for entry in self._entries():
            with contextlib.suppress(OSError):  # another instance has just deleted it
                age = file_now - entry.stat(follow_symlinks=False).st_mtime
                self._written[entry.name] = now - max(0.0, age)

    def save(self, image: Image.Image, settings: Mapping[str, Any]) -> str:
        """Writes an image and returns its name. The file appears only when it is complete."""
        name = f"{self.instance}-{secrets.token_hex(16)}.png"
        path = self.folder / name
        with contextlib.suppress(OSError):  # the system may have deleted an old folder in /tmp
            self.folder.mkdir(mode=0o700, exist_ok=True)
        save_png(image, path, settings, is_generated=True)
        if self.signer is not None:
            try:
                self.signer.sign(path)
            except BaseException:  # the error contains its name, so it may be in the log
                path.unlink(missing_ok=True)
                raise
        self._written[name] = self.clock()
        return name

    def read(self, name: str) -> bytes | None:
        """The contents of an image file. None if the name is not one of ours, or the file is gone or not
        regular."""
        now = self.clock()
        if NAME.fullmatch(name) is None or now - self._written.get(name, now) > self.seconds:
            return None
        try:
            # The folder may be shared. A link in it could point to any file that the service can read.
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
        """Deletes images that are too old, and the oldest ones while there are too many bytes."""
        kept, present, now = [], set(), self.clock()
        for entry in self._entries():
            present.add(entry.name)
            with contextlib.suppress(OSError):  # another instance has deleted it
                age = now - self._written.setdefault(
                    entry.name, now
                )  # another instance's file: count from now
                size = entry.stat(follow_symlinks=False).st_size
                if age > self.seconds:
                    os.unlink(entry.path)
                else:
                    kept.append((age, size, entry.path))
        for name in [name for name in list(self._written) if name not in present]:
            self._written.pop(name, None)  # another instance has deleted it
        total = sum(size for _, size, _ in kept)
        for _, size, path in sorted(kept, reverse=True):
            if total <= self.max_bytes:
                break
            with contextlib.suppress(OSError):
                os.unlink(path)
            total -= size

    def _entries(self) -> list[os.DirEntry[str]]:
        """Our files in the folder, including unfinished ones."""
        try:
            with os.scandir(self.folder) as entries:
                return [e for e in entries if NAME.fullmatch(e.name) or _UNFINISHED.fullmatch(e.name)]
        except FileNotFoundError:
            return []  # ``save`` creates it again

    def _now_of_files(self) -> float:
        """The current time of the file system, which may be on another machine."""
        with tempfile.TemporaryFile(dir=self.folder) as file:
            return os.fstat(file.fileno()).st_mtime

"""Finished pictures in a folder, under names that cannot be guessed, for a while and within a bound in bytes.

Several instances may share the folder: each can hand out all pictures, and each clears away what is old.
"""

import contextlib
import os
import re
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from wuerstchen.images import check_writable, save_png
from wuerstchen.serve.signing import Signer

NAME = re.compile(r"[a-z0-9]{4,16}-[0-9a-f]{32}\.png")
_UNFINISHED = re.compile(r"\.[a-z0-9]{4,16}-[0-9a-f]{32}-[0-9a-f]{8}\.tmp")


class Results:
    """Pictures are kept for ``seconds``, and at most ``max_bytes`` of them: the oldest go first."""

    def __init__(
        self, folder: Path, instance: str, *, seconds: float, max_bytes: int, signer: Signer | None = None
    ) -> None:
        """Raises ``UserError`` if nothing can be written into ``folder``."""
        check_writable(folder)
        self.folder = folder
        self.instance = instance
        self.seconds = seconds
        self.max_bytes = max_bytes
        self.signer = signer

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
        return name

    def read(self, name: str) -> bytes | None:
        """The file of that name; None for what is no name of ours, or is no longer there."""
        if NAME.fullmatch(name) is None:
            return None
        path = self.folder / name
        try:
            if path.stat().st_mtime < time.time() - self.seconds:
                return None
            return path.read_bytes()
        except OSError:
            return None

    def clear(self) -> None:
        """Removes what is too old, and the oldest of what is too much."""
        kept = []
        if not self.folder.is_dir():
            return  # gone; ``save`` makes it anew
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if not (NAME.fullmatch(entry.name) or _UNFINISHED.fullmatch(entry.name)):
                    continue  # not ours
                with contextlib.suppress(OSError):  # another instance was faster
                    status = entry.stat(follow_symlinks=False)
                    if status.st_mtime < time.time() - self.seconds:
                        os.unlink(entry.path)
                    else:
                        kept.append((status.st_mtime, status.st_size, entry.path))
        total = sum(size for _, size, _ in kept)
        for _, size, path in sorted(kept):
            if total <= self.max_bytes:
                break
            with contextlib.suppress(OSError):
                os.unlink(path)
            total -= size

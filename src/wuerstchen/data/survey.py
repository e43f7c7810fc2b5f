"""What a folder of images holds, to be told before training: what is not read, and how large images are."""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from wuerstchen.data.folder import SUFFIXES
from wuerstchen.data.plan import items_at
from wuerstchen.data.sources import Size, StoredImages

MOST = 2000
"""Images whose files are opened, at most; of larger folders so many are drawn."""
SECONDS = 20.0
"""Time to open files, at most, and to look for those that are not read: some file systems take long."""
_CAPTIONS_AND_FIELDS = {".txt", ".caption", ".json", ".jsonl", ".csv", ".parquet"}
_IMAGES = {
    ".arw", ".cr2", ".cr3", ".dng", ".exr", ".heic", ".heif", ".ico", ".jp2", ".jxl", ".nef", ".pdf", ".psd",
    ".raw", ".svg", ".tga",
}  # fmt: skip


@dataclass
class Ignored:
    """Entries of one kind under a folder that are not read."""

    count: int = 0
    first: str = ""
    """The first by name, relative to the folder."""
    images: bool = False
    """Whether they are images, or may hold some: then leaving them out is probably not meant."""

    def add(self, name: str, *, images: bool) -> None:
        self.count += 1
        self.first = min(self.first, name) if self.first else name
        self.images |= images


def ignored(root: Path, seconds: float = SECONDS) -> tuple[dict[str, Ignored], bool]:
    """What ``FolderSource`` passes over under ``root``, by the reason in words ("with the ending .heic"); and
    whether all of the folder was looked at in the ``seconds`` for it."""
    found: dict[str, Ignored] = {}
    whole, began = True, time.monotonic()

    def add(reason: str, name: str, images: bool) -> None:
        found.setdefault(reason, Ignored()).add(name, images=images)

    for folder, folders, files in os.walk(root):
        if time.monotonic() - began > seconds:
            whole = False
            break
        place = Path(folder).relative_to(root)
        for name in folders:
            shown = (place / name).as_posix()
            if name.startswith("."):
                add("with a name that begins with a dot", shown, False)
            elif (Path(folder) / name).is_symlink():
                add("that is a link to a folder", shown, True)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            suffix, shown = PurePosixPath(name).suffix.lower(), (place / name).as_posix()
            if name.startswith("."):
                add("with a name that begins with a dot", shown, False)
            elif suffix not in SUFFIXES | _CAPTIONS_AND_FIELDS:
                add(f"with the ending {suffix}" if suffix else "without an ending", shown, suffix in _IMAGES)
    return dict(sorted(found.items())), whole


@dataclass
class Sizes:
    """Widths and heights in pixels of images of a folder, by name."""

    found: dict[str, Size] = field(default_factory=dict)

    def enlarged(self, target: Size) -> dict[str, float]:
        """The images that are enlarged to cover ``target``, and how many times."""
        factors = {name: max(target[0] / w, target[1] / h) for name, (w, h) in self.found.items()}
        return {name: factor for name, factor in factors.items() if factor > 1}


def sizes(source: StoredImages, most: int = MOST, seconds: float = SECONDS) -> Sizes:
    """The sizes of at most ``most`` images, drawn evenly; those that cannot be opened are left out."""
    found, began = Sizes(), time.monotonic()
    for item in items_at(range(min(most, len(source))), len(source), 0):
        if time.monotonic() - began > seconds:
            break
        size = source.size(item)
        if size is not None:
            found.found[source.name(item)] = size
    return found

"""A survey of a folder of images before training: ignored files, and the sizes of images."""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from wuerstchen.data.folder import SUFFIXES
from wuerstchen.data.plan import items_at
from wuerstchen.data.sources import Size, StoredImages

MOST = 2000
"""Maximum number of images to open. Larger folders are sampled."""
SECONDS = 20.0
"""Time limit for opening files and for finding ignored files, because some file systems are slow."""
_CAPTIONS_AND_FIELDS = {".txt", ".caption", ".json", ".jsonl", ".csv", ".parquet"}
_IMAGES = {
    ".arw", ".cr2", ".cr3", ".dng", ".exr", ".heic", ".heif", ".ico", ".jp2", ".jxl", ".nef", ".pdf", ".psd",
    ".raw", ".svg", ".tga",
}  # fmt: skip


@dataclass
class Ignored:
    """Files or folders that are ignored for the same reason."""

    count: int = 0
    first: str = ""
    """The first by name, relative to the folder."""
    images: bool = False
    """Whether they are images or may contain images, so that ignoring them is probably unintended."""

    def add(self, name: str, *, images: bool) -> None:
        self.count += 1
        self.first = min(self.first, name) if self.first else name
        self.images |= images


def ignored(root: Path, seconds: float = SECONDS) -> tuple[dict[str, Ignored], bool]:
    """The entries under ``root`` that ``FolderSource`` ignores, by reason ("with the ending .heic").

    Also returns whether the whole folder was searched within ``seconds``.
    """
    found: dict[str, Ignored] = {}
    complete, began = True, time.monotonic()

    def add(reason: str, name: str, images: bool) -> None:
        found.setdefault(reason, Ignored()).add(name, images=images)

    for folder, folders, files in os.walk(root):
        if time.monotonic() - began > seconds:
            complete = False
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
    return dict(sorted(found.items())), complete


@dataclass
class Sizes:
    """Widths and heights in pixels of the images of a folder, by name."""

    found: dict[str, Size] = field(default_factory=dict)

    def enlarged(self, target: Size) -> dict[str, float]:
        """The images that must be enlarged to cover ``target``, and by which factor."""
        factors = {name: max(target[0] / w, target[1] / h) for name, (w, h) in self.found.items()}
        return {name: factor for name, factor in factors.items() if factor > 1}


def sizes(source: StoredImages, most: int = MOST, seconds: float = SECONDS) -> Sizes:
    """The sizes of up to ``most`` images in random order. Images that cannot be opened are left out."""
    found, began = Sizes(), time.monotonic()
    for item in items_at(range(min(most, len(source))), len(source), 0):
        if time.monotonic() - began > seconds:
            break
        size = source.size(item)
        if size is not None:
            found.found[source.name(item)] = size
    return found

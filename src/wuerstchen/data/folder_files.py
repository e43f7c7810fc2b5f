"""The files of a folder of images, classified by their names as images, captions or metadata."""

import os
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from wuerstchen.data.metadata import JSONL, METADATA
from wuerstchen.errors import DataError

SUFFIXES = frozenset(
    {
        ".avif",
        ".bmp",
        ".gif",
        ".jfif",
        ".jpe",
        ".jpeg",
        ".jpg",
        ".png",
        ".ppm",
        ".tif",
        ".tiff",
        ".webp",
    },
)
PACKED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar")
"""Suffixes of compressed files, which have no random access."""
TEXTS = (".txt", ".caption")  # in order of preference
SIDECAR = ".json"


@dataclass(frozen=True)
class Found:
    """The files under a folder, relative to it."""

    images: list[str]  # sorted
    texts: set[str]
    sidecars: set[str]
    nested: list[str]  # metadata files in subfolders


def is_unicode(text: str) -> bool:
    """Whether a text has no lone surrogates, which stand for invalid bytes in file names.

    Neither logs nor tables can store them.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Names:
    """File names that are found in any Unicode normal form: macOS decomposes "é" into "e" and an accent."""

    def __init__(self, names: Iterable[str]) -> None:
        self.exact = set(names)
        self.normal: dict[str, list[str]] = {}
        for name in self.exact:
            self.normal.setdefault(unicodedata.normalize("NFC", name), []).append(name)

    def find(self, name: str) -> str | None:
        """The file with this name, or None if there is no such file or several."""
        if name in self.exact:
            return name
        found = self.normal.get(unicodedata.normalize("NFC", name), [])
        return found[0] if len(found) == 1 else None


def find_files(root: Path, endings: tuple[str, ...]) -> Found:
    """Finds the images, text files with these suffixes, and JSON files under ``root``."""
    found = Found([], set(), set(), [])

    def fail(error: OSError) -> None:
        raise DataError(
            f"Data folder {str(error.filename)!r} cannot be read ({error.strerror}). Change its permissions."
        ) from error

    for folder, folders, files in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in files:
            name = (Path(folder) / file).relative_to(root).as_posix()
            if not is_unicode(name):
                raise DataError(f"The name of file {name!a} is not UTF-8. Rename it.")
            if file.startswith("."):
                continue
            suffix = PurePosixPath(file).suffix.lower()
            if suffix in SUFFIXES:
                found.images.append(name)
            elif file in METADATA:
                if name != file:
                    found.nested.append(name)
            elif suffix in endings:
                found.texts.add(name)
            elif suffix == SIDECAR:
                found.sidecars.add(name)
    found.images.sort()
    if JSONL in (PurePosixPath(name).name for name in found.nested):
        raise nested_metadata(root, next(name for name in found.nested if name.endswith(JSONL)))
    return found


def nested_metadata(root: Path, name: str) -> DataError:
    kind = PurePosixPath(name).name
    return DataError(
        f"File {name!r} is in a subfolder. {kind} is only read at the top of the data folder. Merge it into a"
        f" file there, or use {str((root / name).parent)!r} as the data folder."
    )


def beside_of(image: str, ending: str) -> str:
    return PurePosixPath(image).with_suffix(ending).as_posix()


def holds_captioned_images(root: Path) -> bool:
    """Whether ``root`` contains images, and a metadata file at its top or a text file next to the first one.

    It is then read as a folder of images, whatever else it contains.
    """
    for _, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        images = [name for name in files if is_image(name)]
        if images:
            names = Names(files)
            beside = any(names.find(beside_of(min(images), ending)) for ending in TEXTS)
            return beside or any((root / name).is_file() for name in METADATA)
    return False


def is_image(file: str) -> bool:
    """Whether a file counts as an image, by its name without a folder."""
    return not file.startswith(".") and PurePosixPath(file).suffix.lower() in SUFFIXES

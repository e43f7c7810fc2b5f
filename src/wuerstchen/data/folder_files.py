"""The files of a folder of images: which are images, captions and metadata, by their names alone."""

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
"""Endings of files whose content cannot be read at random."""
TEXTS = (".txt", ".caption")  # the first that an image has counts
SIDECAR = ".json"


@dataclass(frozen=True)
class Found:
    """The files under a root, relative to it."""

    images: list[str]  # sorted
    texts: set[str]
    sidecars: set[str]
    nested: list[str]  # metadata files that are not at the top


def is_unicode(text: str) -> bool:
    """Whether there are no lone surrogates in it, which stand for other bytes in the name of a file and which
    neither logs nor tables can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Names:
    """Names of files, to be found in any Unicode normal form: macOS writes "e" and an accent, others "é"."""

    def __init__(self, names: Iterable[str]) -> None:
        self.exact = set(names)
        self.normal: dict[str, list[str]] = {}
        for name in self.exact:
            self.normal.setdefault(unicodedata.normalize("NFC", name), []).append(name)

    def find(self, name: str) -> str | None:
        """The file of that name, None if there is none or several."""
        if name in self.exact:
            return name
        alike = self.normal.get(unicodedata.normalize("NFC", name), [])
        return alike[0] if len(alike) == 1 else None


def find_files(root: Path, endings: tuple[str, ...]) -> Found:
    """The images, text files with these endings, and JSON files under ``root``."""
    found = Found([], set(), set(), [])

    def fail(error: OSError) -> None:
        raise DataError(
            f"data folder {str(error.filename)!r} is wrong because it cannot be read ({error.strerror});"
            " change its permissions"
        ) from error

    for folder, folders, files in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in files:
            name = (Path(folder) / file).relative_to(root).as_posix()
            if not is_unicode(name):
                raise DataError(f"the name of file {name!a} is wrong because it is not UTF-8; rename it")
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
        f"file {name!r} is wrong because {kind} is read at the top of the data folder alone;"
        f" merge it into that one, or give {str((root / name).parent)!r} as the data folder"
    )


def beside_of(image: str, ending: str) -> str:
    return PurePosixPath(image).with_suffix(ending).as_posix()


def holds_captioned_images(root: Path) -> bool:
    """Whether there are images under ``root``, with a metadata file at its top or a text file beside the
    first one: then it is a folder of images, whatever else lies in it."""
    for _, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        images = [name for name in files if is_image(name)]
        if images:
            names = Names(files)
            beside = any(names.find(beside_of(min(images), ending)) for ending in TEXTS)
            return beside or any((root / name).is_file() for name in METADATA)
    return False


def is_image(file: str) -> bool:
    """Whether a file is taken for an image, by its name without a folder."""
    return not file.startswith(".") and PurePosixPath(file).suffix.lower() in SUFFIXES

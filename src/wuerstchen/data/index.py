"""An index of a reader's images, for random access to tars, parquet files and data sets on the hub.

Listing a hundred tars takes minutes, so it is done once. The index is in the cache folder, and is rebuilt
when sizes or times of the data's files change. It is memory-mapped: the processes of a host share it, and
each keeps only the positions of the held-out images in its own memory.

    ROOT/{data}-{state}/rows.bin     a line of JSON per image: its name, its captions and their columns
    ROOT/{data}-{state}/ends.bin     int64: the end of each line
    ROOT/{data}-{state}/places.bin   int64 (n, 3): the place of each image, for its reader
    ROOT/{data}-{state}/held.bin     int64: rows of the held-out images, if the set is large enough
    ROOT/{data}-{state}/index.json   sizes of these files, a hash, and what was left out; written last
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from PIL import Image

from wuerstchen.checkpoints.files import write_json
from wuerstchen.data.files import read_file
from wuerstchen.data.filters import Tally
from wuerstchen.data.items import Reader
from wuerstchen.data.locks import acquired
from wuerstchen.data.plan import HELD_OUT_FROM, is_held_out
from wuerstchen.data.sources import Size, StoredImages, Subset, size_in_header
from wuerstchen.errors import DataError, RunFolderError, UserError
from wuerstchen.images import decode_image
from wuerstchen.progress_bar import bar

CACHE = "WUERSTCHEN_CACHE"
"""The environment variable with the folder for files that can be rebuilt."""
_FORMAT = 1
_BUFFER = 1 << 20  # bytes
_MAX_DESCRIPTION = 1 << 26  # bytes of index.json, which names damaged images
_FILES = ("rows.bin", "ends.bin", "places.bin", "held.bin")


def cache_folder() -> Path:
    """The folder of indexes, in ``$WUERSTCHEN_CACHE`` or in ``wuerstchen`` in the user's cache folder.

    Raises ``UserError`` if the user has no home folder.
    """
    if os.environ.get(CACHE):
        return Path(os.environ[CACHE]) / "indexes"
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "wuerstchen" / "indexes"
    try:
        return Path.home() / ".cache" / "wuerstchen" / "indexes"
    except RuntimeError as error:
        raise UserError(
            f"There is no home folder to store the index of the images. Set {CACHE} to a folder."
        ) from error


class Index:
    """The index of a reader's images, in a folder that ``index_of`` made. Unpickling opens it again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        described = _description(folder)
        if described is None:
            raise DataError(f"Index {str(folder)!r} is incomplete. Remove the folder. It will be rebuilt.")
        self.count: int = described["count"]
        self.digest: str = described["digest"]
        self.tally = Tally.from_json(described)
        # Opened now, because the folder is removed when the data change. Open files remain readable.
        self._rows = self._memory_mapped("rows.bin", np.uint8)
        self._ends: Int64[np.ndarray, " n"] = self._memory_mapped("ends.bin", np.int64)
        self._places: Int64[np.ndarray, "n 3"] = self._memory_mapped("places.bin", np.int64).reshape(-1, 3)

    def _memory_mapped(self, name: str, kind: type) -> np.ndarray:
        return np.memmap(self.folder / name, kind, "r") if self.count else np.empty(0, kind)

    def __reduce__(self) -> tuple[Any, ...]:
        return Index, (self.folder,)

    def __len__(self) -> int:
        return self.count

    def held_out(self) -> Int64[np.ndarray, " h"]:
        """The rows of the held-out images, in ascending order."""
        if len(self) < HELD_OUT_FROM:
            return np.empty(0, np.int64)
        return np.fromfile(self.folder / "held.bin", np.int64)

    def row(self, number: int) -> tuple[str, tuple[str, ...]]:
        """Name and captions of an image."""
        name, captions, *_ = self._content(number)
        return name, tuple(captions)

    def groups(self, number: int) -> tuple[int, ...]:
        """How many captions of an image are from each column, if there are several columns."""
        _, _, *groups = self._content(number)
        return tuple(groups[0]) if groups else ()

    def _content(self, number: int) -> list[Any]:
        start = int(self._ends[number - 1]) if number else 0
        return json.loads(self._rows[start : int(self._ends[number])].tobytes())

    def place(self, number: int) -> tuple[int, int, int]:
        """The place of an image, for ``Reader.read``."""
        first, second, third = self._places[number].tolist()
        return first, second, third


def index_of(reader: Reader, data: str, *columns: str | None) -> Index:
    """The index of a reader's images, from the cache folder if the data have not changed.

    ``data`` and ``columns`` are what the reader was opened with. One process per host builds the index while
    others wait. Raises ``DataError`` if no image is usable, and ``UserError`` if the index cannot be written.
    """
    root = cache_folder()
    key = hashlib.sha256(json.dumps([_FORMAT, str(Path(data).absolute()), *columns]).encode()).hexdigest()[
        :20
    ]
    folder = root / f"{key}-{_state(reader)}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        if _description(folder) is None:
            lock = acquired(root / f"{key}.lock", timeout=-1.0)
            try:
                if _description(folder) is None:  # no other process has built it in the meantime
                    _make(reader, data, folder)
                    for other in root.glob(f"{key}-*"):
                        if other != folder:
                            shutil.rmtree(other, ignore_errors=True)
            finally:
                lock.release()
    except RunFolderError as error:  # of locks
        raise UserError(f"{error} Set {CACHE} to choose the folder.") from error
    except OSError as error:
        raise UserError(
            f"The index of the images in {data} cannot be written to {root} ({error.strerror or error}). It"
            f" is needed to read them in random order. Free some space, or set {CACHE} to another folder."
        ) from error
    index = Index(folder)
    if not len(index):
        reasons = ", ".join(f"{count} {reason}" for reason, count in index.tally.dropped.most_common(5))
        raise DataError(
            f"Data {data!r} contains no image with a caption ({reasons or 'it is empty'}). Use other data, or"
            " choose the columns with --image-column and --text-column."
        )
    return index


def _state(reader: Reader) -> str:
    """A hash of the reader's fingerprint, and of the sizes and times of its files."""
    files = [os.stat(path) for path in getattr(reader, "files", ())]
    parts = [reader.fingerprint(), [[file.st_size, file.st_mtime_ns] for file in files]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def _description(folder: Path) -> dict[str, Any] | None:
    """``index.json`` of a complete index, or None if it is missing or a file has another size."""
    try:
        described = json.loads(read_file(folder / "index.json", _MAX_DESCRIPTION))
        complete = all((folder / name).stat().st_size == size for name, size in described["bytes"].items())
    except (DataError, OSError, ValueError, KeyError, AttributeError):
        return None
    return described if complete else None


def _make(reader: Reader, data: str, folder: Path) -> None:
    """Writes the index to a temporary folder, and then renames it to ``folder``."""
    check = getattr(reader, "check_random_access", None)
    if check is not None:
        check()
    key = folder.name.partition("-")[0]
    for stale in (folder, *folder.parent.glob(f".{key}-*")):  # left by killed processes
        shutil.rmtree(stale, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        tally = Tally()
        count, digest = _write(reader, data, partial, tally)
        sizes = {name: (partial / name).stat().st_size for name in _FILES}
        content = {"count": count, "digest": digest, "data": data, "bytes": sizes, **tally.to_json()}
        write_json(partial / "index.json", content)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(reader: Reader, data: str, folder: Path, tally: Tally) -> tuple[int, str]:
    """Writes the files of the index. Returns the number of images and a hash of the contents."""
    digest = hashlib.sha256()
    count = end = 0
    with contextlib.ExitStack() as stack:
        rows, ends, places, held = (
            stack.enter_context(open(folder / name, "wb", _BUFFER)) for name in _FILES
        )
        for item in bar(reader.items(tally), desc=f"listing {data}", unit="img"):
            content = [item.name, item.captions, *([item.groups] if item.groups else ())]
            row = json.dumps(content, ensure_ascii=False).encode() + b"\n"
            place = np.array(item.place, np.int64).tobytes()
            end += len(row)
            rows.write(row)
            ends.write(np.int64(end).tobytes())
            places.write(place)
            if is_held_out(item.name):
                held.write(np.int64(count).tobytes())
            digest.update(row)
            digest.update(place)
            count += 1
    return count, digest.hexdigest()


class IndexedSource(StoredImages):
    """The training images or the held-out images of a reader, as a ``Source``.

    In sets of at least 100 images, one in 50 is held out by its name (``plan.held_out_names``). Items are
    numbered within the subset, in the order of the reader.
    """

    def __init__(self, reader: Reader, subset: Subset, data: str, *columns: str | None) -> None:
        """``data`` and ``columns`` are what the reader was opened with. Raises the errors of ``index_of``."""
        self.reader = reader
        self.subset = subset
        self.columns = columns
        self.index = index_of(reader, data, *columns)
        self._held_out = self.index.held_out()
        # The number of training images before each held-out image.
        self._before = self._held_out - np.arange(len(self._held_out))

    def __len__(self) -> int:
        held_out = len(self._held_out)
        return held_out if self.subset == "heldout" else len(self.index) - held_out

    def _row(self, item: int) -> int:
        """The row of the item in the index."""
        if not 0 <= item < len(self):
            raise IndexError(f"image {item} of {len(self)}")
        if self.subset == "heldout":
            return int(self._held_out[item])
        return item + int(np.searchsorted(self._before, item, side="right"))

    def name(self, item: int) -> str:
        return self.index.row(self._row(item))[0]

    def captions(self, item: int) -> tuple[str, ...]:
        return self.index.row(self._row(item))[1]

    def groups(self, item: int) -> tuple[int, ...]:
        return self.index.groups(self._row(item))

    def bytes_of(self, item: int) -> bytes:
        """The file of the image. Raises ``DataError`` if it cannot be read."""
        row = self._row(item)
        return self.reader.read(self.index.row(row)[0], self.index.place(row))

    def load(self, item: int) -> Image.Image:
        return decode_image(self.bytes_of(item), self.name(item))

    def size(self, item: int) -> Size | None:
        try:
            return size_in_header(io.BytesIO(self.bytes_of(item)))
        except DataError:
            return None

    def fingerprint(self) -> str:
        """A hash of the reader's fingerprint, and of all names, captions and places.

        It does not depend on where the data are stored. It can miss an image replaced by one of the same
        size.
        """
        parts = [self.reader.fingerprint(), self.index.digest, *self.columns]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def left_out(self) -> Iterator[tuple[str, str]]:
        """Yields the names of unusable images and files, up to 1000, with the reasons."""
        yield from self.index.tally.damaged

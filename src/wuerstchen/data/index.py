"""What a reader lists, kept in a file: the n-th image of tars, of parquet files or of a hub's data set.

Listing a hundred tars takes minutes, so it is done once. The index lies in the cache folder and is made again
when files of the data have other sizes or times. It is mapped into memory: processes of a host share it, and
none holds anything for each image but the positions of the held-out ones.

    ROOT/{data}-{state}/rows.bin     a line of JSON an image: its name and its captions
    ROOT/{data}-{state}/ends.bin     int64: where each line ends
    ROOT/{data}-{state}/places.bin   int64 (n, 3): where the image is, as its reader understands it
    ROOT/{data}-{state}/held.bin     int64: rows of the images that are held out, if the set is large enough
    ROOT/{data}-{state}/index.json   their sizes, a hash of all of it, and what was left out; written last
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
from wuerstchen.data.sources import Part, Size, StoredImages, size_in_header
from wuerstchen.errors import DataError, RunFolderError, UserError
from wuerstchen.images import decode_image
from wuerstchen.progress_bar import bar

CACHE = "WUERSTCHEN_CACHE"
"""The environment variable that names the folder for files that can be made again."""
_FORMAT = 1
_BUFFER = 1 << 20  # bytes
_MAX_DESCRIPTION = 1 << 26  # bytes of index.json, which names the first of the damaged images
_FILES = ("rows.bin", "ends.bin", "places.bin", "held.bin")


def cache_folder() -> Path:
    """Where indexes lie: ``$WUERSTCHEN_CACHE``, or ``wuerstchen`` in the user's cache folder.

    Raises ``UserError`` for a user without a home.
    """
    if os.environ.get(CACHE):
        return Path(os.environ[CACHE]) / "indexes"
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "wuerstchen" / "indexes"
    try:
        return Path.home() / ".cache" / "wuerstchen" / "indexes"
    except RuntimeError as error:
        raise UserError(
            f"there is no home folder to keep the list of the images in. Set {CACHE} to a folder."
        ) from error


class Index:
    """The list of a reader's images, in a folder that ``index_of`` made. Sent to another process, it is
    opened there anew."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        described = _description(folder)
        if described is None:
            raise DataError(f"index {str(folder)!r} is not whole. Remove the folder: it will be made again.")
        self.count: int = described["count"]
        self.digest: str = described["digest"]
        self.tally = Tally.from_json(described)
        # Opened now: the folder is removed when the data change, and what is open stays.
        self._rows = self._mapped("rows.bin", np.uint8)
        self._ends: Int64[np.ndarray, " n"] = self._mapped("ends.bin", np.int64)
        self._places: Int64[np.ndarray, "n 3"] = self._mapped("places.bin", np.int64).reshape(-1, 3)

    def _mapped(self, name: str, kind: type) -> np.ndarray:
        return np.memmap(self.folder / name, kind, "r") if self.count else np.empty(0, kind)

    def __reduce__(self) -> tuple[Any, ...]:
        return Index, (self.folder,)

    def __len__(self) -> int:
        return self.count

    def held_out(self) -> Int64[np.ndarray, " h"]:
        """The rows of the images that training never sees, ascending."""
        if len(self) < HELD_OUT_FROM:
            return np.empty(0, np.int64)
        return np.fromfile(self.folder / "held.bin", np.int64)

    def row(self, number: int) -> tuple[str, tuple[str, ...]]:
        """Name and captions of an image."""
        start = int(self._ends[number - 1]) if number else 0
        name, captions = json.loads(self._rows[start : int(self._ends[number])].tobytes())
        return name, tuple(captions)

    def place(self, number: int) -> tuple[int, int, int]:
        """Where the image is, for ``Reader.read``."""
        first, second, third = self._places[number].tolist()
        return first, second, third


def index_of(reader: Reader, data: str, *columns: str | None) -> Index:
    """The index of a reader's images, from the cache folder if the data are as they were.

    ``data`` and ``columns`` are what the reader was opened with. It is made by one process of a host, and
    others wait for it. Raises ``DataError`` if no image can be used, ``UserError`` if it cannot be written.
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
                if _description(folder) is None:  # no other process has made it meanwhile
                    _make(reader, data, folder)
                    for other in root.glob(f"{key}-*"):
                        if other != folder:
                            shutil.rmtree(other, ignore_errors=True)
            finally:
                lock.release()
    except RunFolderError as error:  # of locks
        raise UserError(f"{error}. {CACHE} names the folder for the lists of images.") from error
    except OSError as error:
        raise UserError(
            f"the list of the images in {data} cannot be kept in {root} ({error.strerror or error}). It is "
            f"needed to read them in any order. Free some space, or set {CACHE} to another folder."
        ) from error
    index = Index(folder)
    if not len(index):
        reasons = ", ".join(f"{count} {reason}" for reason, count in index.tally.dropped.most_common(5))
        raise DataError(
            f"data {data!r} hold no image with a caption ({reasons or 'they are empty'}). Give others, or "
            "name the columns with --image-column and --text-column."
        )
    return index


def _state(reader: Reader) -> str:
    """A hash of what a reader says of its data, and of sizes and times of its files."""
    files = [os.stat(path) for path in getattr(reader, "files", ())]
    parts = [reader.fingerprint(), [[file.st_size, file.st_mtime_ns] for file in files]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def _description(folder: Path) -> dict[str, Any] | None:
    """``index.json`` of a whole index, None if it is not there or its files are of other sizes."""
    try:
        described = json.loads(read_file(folder / "index.json", _MAX_DESCRIPTION))
        whole = all((folder / name).stat().st_size == size for name, size in described["bytes"].items())
    except (DataError, OSError, ValueError, KeyError, AttributeError):
        return None
    return described if whole else None


def _make(reader: Reader, data: str, folder: Path) -> None:
    """Writes the index beside ``folder`` and then gives it its name."""
    check = getattr(reader, "check_random_access", None)
    if check is not None:
        check()
    key = folder.name.partition("-")[0]
    for stale in (folder, *folder.parent.glob(f".{key}-*")):  # the latter of processes that were killed
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
    """Number of images, and a hash of all that is written of them."""
    digest = hashlib.sha256()
    count = end = 0
    with contextlib.ExitStack() as stack:
        rows, ends, places, held = (
            stack.enter_context(open(folder / name, "wb", _BUFFER)) for name in _FILES
        )
        for item in bar(reader.items(tally), desc=f"listing {data}", unit="img"):
            row = json.dumps([item.name, item.captions], ensure_ascii=False).encode() + b"\n"
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
    """The images of a reader as a ``Source``: the training part, or what is held out of it.

    One image in 50 is held out, by its name, of 100 and more (``plan.held_out_names``). Numbers count the
    images of the part in the order in which the reader lists them.
    """

    def __init__(self, reader: Reader, part: Part, data: str, *columns: str | None) -> None:
        """``data`` and ``columns`` are what the reader was opened with. Raises as ``index_of``."""
        self.reader = reader
        self.part = part
        self.columns = columns
        self.index = index_of(reader, data, *columns)
        self._held_out = self.index.held_out()
        # How many images of the training part come before each held-out one.
        self._before = self._held_out - np.arange(len(self._held_out))

    def __len__(self) -> int:
        held_out = len(self._held_out)
        return held_out if self.part == "heldout" else len(self.index) - held_out

    def _row(self, item: int) -> int:
        """The row of the index."""
        if not 0 <= item < len(self):
            raise IndexError(f"image {item} of {len(self)}")
        if self.part == "heldout":
            return int(self._held_out[item])
        return item + int(np.searchsorted(self._before, item, side="right"))

    def name(self, item: int) -> str:
        return self.index.row(self._row(item))[0]

    def captions(self, item: int) -> tuple[str, ...]:
        return self.index.row(self._row(item))[1]

    def bytes_of(self, item: int) -> bytes:
        """The image's file. Raises ``DataError`` if it cannot be read."""
        row = self._row(item)
        return self.reader.read(self.index.row(row)[0], self.index.place(row))

    def opened(self, item: int) -> Image.Image:
        return decode_image(self.bytes_of(item), self.name(item))

    def size(self, item: int) -> Size | None:
        try:
            return size_in_header(io.BytesIO(self.bytes_of(item)))
        except DataError:
            return None

    def fingerprint(self) -> str:
        """A hash of the files as the reader sees them, and of all names, captions and places.

        It is the same wherever the data lie. An image that is replaced by one of its size can go unnoticed.
        """
        parts = [self.reader.fingerprint(), self.index.digest, *self.columns]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def left_out(self) -> Iterator[tuple[str, str]]:
        """Name and reason of images, or files, that cannot be used: the first thousand."""
        yield from self.index.tally.damaged

"""A folder of pictures with captions beside them, as people and Hugging Face's imagefolder keep them."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from wuerstchen.data.folder_captions import read_captions, read_sidecar
from wuerstchen.data.folder_files import PACKED, SIDECAR, SUFFIXES, TEXTS, Names, beside_of, find_files
from wuerstchen.data.plan import held_out_names
from wuerstchen.data.sources import Size, StoredImages, size_in_header
from wuerstchen.errors import DataError
from wuerstchen.images import is_converted, open_image


@dataclass(frozen=True)
class _Item:
    name: str  # relative to the root, with forward slashes
    captions: tuple[str, ...]
    fields: dict[str, object]  # of its row in the metadata file
    sidecar: str | None = None  # the JSON file beside it


class FolderSource(StoredImages):
    """The pictures under ``root``, in order of their names, with captions kept in one of these ways:

    - ``metadata.jsonl`` at the root: a line ``{"file_name": "cats/1.jpg", "text": "a cat"}`` a picture;
      ``caption`` may stand for ``text``, and a list holds several captions, of which ``rng`` picks one.
    - A text file beside each picture, ``cats/1.txt`` or ``cats/1.caption`` for ``cats/1.jpg``, in UTF-8: all
      of it is the caption. This is also how img2dataset writes ``files``; the ``cats/1.json`` beside them is
      the metadata.
    - ``metadata.csv`` or ``metadata.parquet`` at the root, with the same columns as ``metadata.jsonl``.

    Where there are several, the first of the list counts. ``text_column`` names the caption instead: a column
    of the metadata file, or the ending of the text files, or a field of the ``.json`` files beside the
    pictures. ``image_column`` names the column of the metadata file that holds the picture's name.

    ``split`` is ``all`` of them, ``heldout`` (``plan.held_out_names``) or the others, ``train``. Pictures
    that belong to a set in a folder ``around`` this one too are on the side that they have there.

    An image whose captions are all empty is left out and named in ``without_caption``.

    Names match in any Unicode normal form, and with backslashes for slashes. Names that begin with a dot are
    skipped, and folders that are links are not followed. Every name and caption is checked on construction,
    and no picture is opened. Raises ``DataError`` for whatever does not match up.
    """

    def __init__(
        self,
        root: Path | str,
        split: Literal["all", "train", "heldout"] = "all",
        around: Path | None = None,
        *,
        image_column: str | None = None,
        text_column: str | None = None,
    ) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataError(
                f"data folder {str(self.root)!r} is wrong because it is no folder; give one with images in it"
            )
        endings = TEXTS
        if text_column is not None:  # an ending only if it can be one
            endings = (f".{text_column.lower()}",) if re.fullmatch(r"[\w-]+", text_column) else ()
        found = find_files(self.root, endings)
        images = found.images
        if not images:
            raise DataError(
                f"data folder {str(self.root)!r} is wrong because it holds no images"
                f" ({', '.join(sorted(SUFFIXES))}){_other_data(self.root)}"
            )
        captions, fields = read_captions(self.root, found, endings, image_column, text_column)
        held_out = held_out_names(images)
        if around is not None:
            inside = self.root.resolve().relative_to(around.resolve())
            theirs = find_files(around, ()).images
            shared, out_there = set(theirs), held_out_names(theirs)
            named = {image: (inside / image).as_posix() for image in images}
            own = {image for image in held_out if named[image] not in shared}
            held_out = own | {image for image in images if named[image] in out_there}
        chosen = {"all": set(images), "train": set(images) - held_out, "heldout": held_out}[split]
        self.without_caption = [name for name in images if name in chosen and not captions[name]]
        """Images that are left out because their captions are empty."""
        if not any(captions.values()):
            raise DataError(
                f"data folder {str(self.root)!r} is wrong because all captions in it are empty; write some"
            )
        chosen -= set(self.without_caption)
        sidecars = Names(found.sidecars)
        self._items = [
            _Item(name, captions[name], fields.get(name, {}), sidecars.find(beside_of(name, SIDECAR)))
            for name in images
            if name in chosen
        ]

    def __len__(self) -> int:
        return len(self._items)

    def name(self, item: int) -> str:
        """The file of the picture, relative to the root."""
        return self._items[item].name

    def captions(self, item: int) -> tuple[str, ...]:
        """All captions of the picture."""
        return self._items[item].captions

    def fields(self, item: int) -> dict[str, object]:
        """Everything that the metadata file, or else the ``.json`` beside the picture, says of it.

        Raises ``DataError`` for a ``.json`` that cannot be read.
        """
        entry = self._items[item]
        if entry.fields or entry.sidecar is None:
            return entry.fields
        return read_sidecar(self.root, entry.sidecar)

    def opened(self, item: int) -> Image.Image:
        return open_image(self.root / self._items[item].name)

    def size(self, item: int) -> Size | None:
        return size_in_header(self.root / self._items[item].name)

    def converted(self, rank: int = 0, count: int = 1) -> str | None:
        """The first picture whose colours change because its colour profile is applied, if there is one.

        It opens all files, and decodes none. If ``count`` processes share the work, each opens its part.
        """
        part = self._items[rank::count]
        return next((item.name for item in part if is_converted(self.root / item.name)), None)

    def fingerprint(self) -> str:
        """A hash of names, captions and file sizes.

        It is fast because no picture is read, so one replaced by another of exactly its size goes unnoticed.
        """
        digest = hashlib.sha256()
        for item in self._items:
            size = _size(self.root, item.name)
            digest.update(json.dumps([item.name, size, item.captions]).encode() + b"\n")
        return digest.hexdigest()


def _other_data(root: Path) -> str:
    """What to do with a folder without images, by what it holds instead."""
    if any(file.suffix in PACKED for file in root.iterdir()):
        return " but packed files; unpack them, tars to .tar"
    for kind, pattern in (("tars", "*.tar"), ("parquet files", "*.parquet")):
        if any(root.glob(pattern)):
            return f" but {kind}; give '{root}/{pattern}'"
    if any(root.glob("*.arrow")):
        return " but Arrow files without what save_to_disk writes beside them; save the data set again"
    return "; give one with images in it"


def _size(root: Path, name: str) -> int:
    try:
        return (root / name).stat().st_size
    except OSError as error:
        raise DataError(
            f"image {name!r} is wrong because it cannot be read ({error.strerror}); put it back"
        ) from error

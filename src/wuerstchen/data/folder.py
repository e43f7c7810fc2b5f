"""A folder of images with captions, in the layouts of Hugging Face's imagefolder and of img2dataset."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from wuerstchen.data.folder_captions import read_caption_columns, read_captions, read_sidecar
from wuerstchen.data.folder_files import PACKED, SIDECAR, SUFFIXES, TEXTS, Names, beside_of, find_files
from wuerstchen.data.plan import held_out_names
from wuerstchen.data.sources import Size, StoredImages, size_in_header
from wuerstchen.errors import DataError
from wuerstchen.images import is_converted, open_image


@dataclass(frozen=True)
class _Item:
    name: str  # relative to the root, with forward slashes
    captions: tuple[str, ...]
    fields: dict[str, object]  # its row in the metadata file
    sidecar: str | None = None  # the JSON file next to it
    groups: tuple[int, ...] = ()  # how many captions are from each column


class FolderSource(StoredImages):
    """The images under ``root``, sorted by name, with captions in one of these places:

    - ``metadata.jsonl`` at the root, with a line ``{"file_name": "cats/1.jpg", "text": "a cat"}`` per image.
      The field can also be named ``caption``. It can be a list of captions, of which ``rng`` picks one.
    - A text file next to each image, ``cats/1.txt`` or ``cats/1.caption`` for ``cats/1.jpg``, in UTF-8. The
      whole file is the caption. img2dataset writes this layout too, with metadata in ``cats/1.json``.
    - ``metadata.csv`` or ``metadata.parquet`` at the root, with the same columns as ``metadata.jsonl``.

    The first of these that exists is used. ``text_column`` chooses other captions: a column of the metadata
    file, the suffix of the text files, or a field of the ``.json`` files next to the images. ``image_column``
    is the column of the metadata file with the names of the images.

    ``text_columns`` are several such columns in place of ``text_column``, for ``CaptionOptions``. The
    captions of an image are then those of all its columns.

    ``caption`` is one caption for all images. Captions in files are then not read.

    ``split`` is ``all``, ``heldout`` (``plan.held_out_names``), or ``train`` for the others. ``held_out`` is
    the fraction that a folder of few images holds out. If this folder is inside the data folder ``around``,
    images that both contain are in the same split in both.

    Images without a caption that is not empty are left out and listed in ``without_caption``.

    Names match in any Unicode normal form, and with backslashes for slashes. Names that begin with a dot are
    skipped, and links to folders are not followed. All names and captions are checked on construction,
    without opening any image. Raises ``DataError`` for anything inconsistent.
    """

    def __init__(
        self,
        root: Path | str,
        split: Literal["all", "train", "heldout"] = "all",
        around: Path | None = None,
        *,
        image_column: str | None = None,
        text_column: str | None = None,
        text_columns: tuple[str, ...] = (),
        caption: str = "",
        held_out: float = 0.0,
    ) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataError(
                f"Data folder {str(self.root)!r} does not exist or is not a folder. Use a folder of images."
            )
        endings = TEXTS
        if text_column is not None or text_columns:  # only those that can be a suffix
            names = text_columns or (text_column or "",)
            endings = tuple(f".{name.lower()}" for name in names if re.fullmatch(r"[\w-]+", name))
        found = find_files(self.root, endings)
        images = found.images
        if not images:
            raise DataError(
                f"Data folder {str(self.root)!r} contains no images ({', '.join(sorted(SUFFIXES))})."
                f" {_other_data(self.root)}"
            )
        captions: dict[str, tuple[str, ...]] = dict.fromkeys(images, (caption,))
        fields: dict[str, dict[str, object]] = {}
        groups: dict[str, tuple[int, ...]] = {}
        if text_columns:
            captions, groups, fields = read_caption_columns(self.root, found, image_column, text_columns)
        elif not caption:
            captions, fields = read_captions(self.root, found, endings, image_column, text_column)
        held = held_out_names(images, held_out)
        if around is not None:
            inside = self.root.resolve().relative_to(around.resolve())
            theirs = find_files(around, ()).images
            shared, held_out_there = set(theirs), held_out_names(theirs, held_out)
            named = {image: (inside / image).as_posix() for image in images}
            own = {image for image in held if named[image] not in shared}
            held = own | {image for image in images if named[image] in held_out_there}
        chosen = {"all": set(images), "train": set(images) - held, "heldout": held}[split]
        self.without_caption = [name for name in images if name in chosen and not captions[name]]
        """Images that are left out because all their captions are empty."""
        if not any(captions.values()):
            raise DataError(
                f"All captions in data folder {str(self.root)!r} are empty. Add at least one caption."
            )
        chosen -= set(self.without_caption)
        sidecars = Names(found.sidecars)
        self._items = [
            _Item(
                name,
                captions[name],
                fields.get(name, {}),
                sidecars.find(beside_of(name, SIDECAR)),
                groups.get(name, ()),
            )
            for name in images
            if name in chosen
        ]

    def __len__(self) -> int:
        return len(self._items)

    def name(self, item: int) -> str:
        """The file of the image, relative to the root."""
        return self._items[item].name

    def captions(self, item: int) -> tuple[str, ...]:
        """All captions of the image."""
        return self._items[item].captions

    def groups(self, item: int) -> tuple[int, ...]:
        return self._items[item].groups

    def fields(self, item: int) -> dict[str, object]:
        """All fields of the image in the metadata file, or else in the ``.json`` next to it.

        Raises ``DataError`` if the ``.json`` cannot be read.
        """
        entry = self._items[item]
        if entry.fields or entry.sidecar is None:
            return entry.fields
        return read_sidecar(self.root, entry.sidecar)

    def load(self, item: int) -> Image.Image:
        return open_image(self.root / self._items[item].name)

    def size(self, item: int) -> Size | None:
        return size_in_header(self.root / self._items[item].name)

    def converted(self, rank: int = 0, count: int = 1) -> str | None:
        """The first image whose colours change because its colour profile is applied, or None.

        Opens files without decoding them. With ``count`` processes, process ``rank`` opens its part.
        """
        part = self._items[rank::count]
        return next((item.name for item in part if is_converted(self.root / item.name)), None)

    def fingerprint(self) -> str:
        """A hash of names, captions and file sizes.

        It reads no image. This is fast, but misses an image that is replaced by another of the same size.
        """
        digest = hashlib.sha256()
        for item in self._items:
            size = _size(self.root, item.name)
            digest.update(json.dumps([item.name, size, item.captions]).encode() + b"\n")
        return digest.hexdigest()


def _other_data(root: Path) -> str:
    """What to do with a folder without images, depending on its other contents."""
    if any(file.suffix in PACKED for file in root.iterdir()):
        return "Decompress the compressed files in it (tars to .tar)."
    for kind, pattern in (("tars", "*.tar"), ("parquet files", "*.parquet")):
        if any(root.glob(pattern)):
            return f"For the {kind} in it, use '{root}/{pattern}'."
    if any(root.glob("*.arrow")):
        return "The Arrow files in it lack the other files of save_to_disk. Save the data set again."
    return "Use a folder of images."


def _size(root: Path, name: str) -> int:
    try:
        return (root / name).stat().st_size
    except OSError as error:
        raise DataError(f"Image {name!r} cannot be read ({error.strerror}). Restore it.") from error

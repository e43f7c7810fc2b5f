"""A folder of pictures with captions beside them, as people and Hugging Face's imagefolder keep them."""

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Literal

import numpy as np

from wuerstchen.data.files import parse_object, read_text
from wuerstchen.data.items import no_column
from wuerstchen.data.metadata import CAPTIONS, FILE_NAME, JSONL, METADATA, metadata_rows
from wuerstchen.data.plan import held_out_names
from wuerstchen.data.sources import Example, Size
from wuerstchen.errors import DataError
from wuerstchen.images import is_converted, open_image, resize_crop

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
_TEXTS = (".txt", ".caption")  # the first that an image has counts
_SIDECAR = ".json"


@dataclass(frozen=True)
class _Item:
    name: str  # relative to the root, with forward slashes
    captions: tuple[str, ...]
    fields: dict[str, object]  # of its row in the metadata file
    sidecar: str | None = None  # the JSON file beside it


@dataclass(frozen=True)
class _Found:
    """The files under a root, relative to it."""

    images: list[str]  # sorted
    texts: set[str]
    sidecars: set[str]
    nested: list[str]  # metadata files that are not at the top


class FolderSource:
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
        endings = _TEXTS
        if text_column is not None:  # an ending only if it can be one
            endings = (f".{text_column.lower()}",) if re.fullmatch(r"[\w-]+", text_column) else ()
        found = _find_files(self.root, endings)
        images = found.images
        if not images:
            raise DataError(
                f"data folder {str(self.root)!r} is wrong because it holds no images"
                f" ({', '.join(sorted(SUFFIXES))}){_other_data(self.root)}"
            )
        captions, fields = _read_captions(self.root, found, endings, image_column, text_column)
        held_out = held_out_names(images)
        if around is not None:
            inside = self.root.resolve().relative_to(around.resolve())
            theirs = _find_files(around, ()).images
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
        sidecars = _Names(found.sidecars)
        self._items = [
            _Item(name, captions[name], fields.get(name, {}), sidecars.find(_beside(name, _SIDECAR)))
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
        return _read_sidecar(self.root, entry.sidecar)

    def example(self, item: int, rng: np.random.Generator, size: int | Size) -> Example:
        """The picture as ``image`` gives it, and one of its captions. Raises ``DataError`` if unreadable."""
        image = self.image(item, rng, size)
        captions = self._items[item].captions
        return Example(image, captions[int(rng.integers(len(captions)))])

    def image(self, item: int, rng: np.random.Generator, size: int | Size) -> np.ndarray:
        """The picture, scaled until it just covers ``size`` or a square of that side, cropped at random."""
        picture = open_image(self.root / self._items[item].name)
        width, height = (size, size) if isinstance(size, int) else size
        return np.array(resize_crop(picture, width, height, rng))

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
    for kind, pattern in (
        ("tars", "*.tar"),
        ("parquet files", "*.parquet"),
        ("a saved data set", "*.arrow"),
        ("several saved data sets", "dataset_dict.json"),
    ):
        if any(root.glob(pattern)):
            return f" but {kind}; make a prepared set of it with wuerstchen data prepare, and train on that"
    return "; give one with images in it"


def _shown(value: object) -> str:
    """The beginning of a value from a file, where it may have a mebibyte."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:196]} ..."


def _is_unicode(text: str) -> bool:
    """Whether there are no lone surrogates in it, which stand for other bytes in the name of a file and which
    neither logs nor tables can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Names:
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


def _find_files(root: Path, endings: tuple[str, ...]) -> _Found:
    """The images, text files with these endings, and JSON files under ``root``."""
    found = _Found([], set(), set(), [])

    def fail(error: OSError) -> None:
        raise DataError(
            f"data folder {str(error.filename)!r} is wrong because it cannot be read ({error.strerror});"
            " change its permissions"
        ) from error

    for folder, folders, files in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in files:
            name = (Path(folder) / file).relative_to(root).as_posix()
            if not _is_unicode(name):
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
            elif suffix == _SIDECAR:
                found.sidecars.add(name)
    found.images.sort()
    if JSONL in (PurePosixPath(name).name for name in found.nested):
        raise _nested(root, next(name for name in found.nested if name.endswith(JSONL)))
    return found


def _nested(root: Path, name: str) -> DataError:
    kind = PurePosixPath(name).name
    return DataError(
        f"file {name!r} is wrong because {kind} is read at the top of the data folder alone;"
        f" merge it into that one, or give {str((root / name).parent)!r} as the data folder"
    )


_Read = tuple[dict[str, tuple[str, ...]], dict[str, dict[str, object]]]
"""Captions and all fields, by image."""


def _read_captions(
    root: Path, found: _Found, endings: tuple[str, ...], image_column: str | None, text_column: str | None
) -> _Read:
    """Captions from the first source that the folder has, in the order of ``FolderSource``."""
    texts = _Names(found.texts)
    beside = any(_text_of(image, texts, endings) for image in found.images)
    metadata = next((name for name in METADATA if os.path.lexists(root / name)), None)
    if metadata == JSONL or (metadata is not None and not beside):
        return _read_metadata(root, metadata, found, endings, image_column, text_column)
    if image_column is not None:
        raise DataError(
            f"data folder {str(root)!r} is wrong because it has no column {image_column!r}: columns are of"
            f" {', '.join(METADATA)}; add one of them, or leave --image-column out"
        )
    if not beside and text_column is not None:
        ending = "".join(f" or {ending}" for ending in endings)
        sidecars = _Names(found.sidecars)
        if any(sidecars.find(_beside(image, _SIDECAR)) for image in found.images):
            return _read_sidecars(root, found.images, sidecars, text_column)
        raise DataError(
            f"data folder {str(root)!r} is wrong because it has no column {text_column!r}: there is no"
            f" {', no '.join(METADATA)}, and no image has a .json{ending} beside it;"
            " add one of them, or leave --text-column out"
        )
    if not beside and found.nested:
        raise _nested(root, found.nested[0])
    return _read_text_files(root, found, endings), {}


def _read_metadata(
    root: Path,
    metadata: str,
    found: _Found,
    endings: tuple[str, ...],
    image_column: str | None,
    text_column: str | None,
) -> _Read:
    texts = _Names(found.texts)
    for image in found.images if text_column is None else ():
        text = _text_of(image, texts, endings)
        if text is not None and text.endswith(_TEXTS[0]):
            raise DataError(
                f"file {text!r} is wrong because captions are in {metadata} already; remove one of the two"
            )
    known = _Names(found.images)
    captions: dict[str, tuple[str, ...]] = {}
    all_fields: dict[str, dict[str, object]] = {}
    places: dict[str, str] = {}
    for where, fields in metadata_rows(root, metadata, image_column, text_column):
        name = _image_name(where, fields, image_column or FILE_NAME, known)
        if name in places:
            raise DataError(
                f"{where} is wrong because {name!r} is in {places[name]} already;"
                " remove one, or give one line a list of captions"
            )
        places[name] = where.removeprefix(f"{metadata} ")
        captions[name] = _captions(where, fields, text_column)
        all_fields[name] = fields
    _check_all_have_captions(found.images, captions, f"add a line for it to {metadata}")
    return captions, all_fields


def _image_name(where: str, fields: dict[str, object], column: str, known: _Names) -> str:
    """The image that a row is about."""
    name = fields.get(column)
    if not isinstance(name, str) or not name:
        raise DataError(
            f"{where} is wrong because {column} is {_shown(name)} and must be the name of an image; add it"
        )
    slashed = name.replace("\\", "/")  # as Windows writes it
    if (
        PurePosixPath(slashed).is_absolute()
        or PureWindowsPath(name).anchor
        or ".." in PurePosixPath(slashed).parts
    ):
        raise DataError(
            f"{where} is wrong because {column} {_shown(name)} leads out of the data folder;"
            " name the image relative to that folder, without '..'"
        )
    for path in (PurePosixPath(name), PurePosixPath(slashed)):
        image = known.find(path.as_posix())
        if image is not None:
            return image
    raise DataError(
        f"{where} is wrong because {_shown(PurePosixPath(name).as_posix())} is no image in the data folder;"
        " add the image or remove the line"
    )


def _captions(where: str, fields: dict[str, object], column: str | None) -> tuple[str, ...]:
    """The captions of a row that are not empty; none if all are."""
    if column is not None:
        if column not in fields:
            raise no_column(where, column, list(fields))
    else:
        given = [key for key in CAPTIONS if key in fields]
        if len(given) != 1:
            found = "both text and caption" if given else "neither text nor caption"
            raise DataError(f"{where} is wrong because it has {found}; give the caption in the field text")
        column = given[0]
    value = fields[column]
    captions = [caption for caption in (value if isinstance(value, list) else [value]) if caption is not None]
    if not all(isinstance(caption, str) for caption in captions):
        shown = _shown(value)
        raise DataError(
            f"{where} is wrong because {column} is {shown} and must be a caption or a list of captions;"
            " write a caption or remove image and line"
        )
    if not _is_unicode("".join(captions)):  # JSON can spell half of a character, "\\ud83d"
        raise DataError(f"{where} is wrong because {column} is not Unicode; write the caption anew")
    return tuple(" ".join(caption.split()) for caption in captions if caption.strip())


def _read_text_files(root: Path, found: _Found, endings: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    captions: dict[str, tuple[str, ...]] = {}
    image_of: dict[str, str] = {}
    texts = _Names(found.texts)
    for image in found.images:
        text = _text_of(image, texts, endings)
        if text is None:
            continue
        if text in image_of:
            raise DataError(
                f"file {text!r} is wrong because it is beside both {image_of[text]!r} and {image!r};"
                " rename one of the images"
            )
        image_of[text] = image
        caption = " ".join(read_text(root / text, text).split())
        captions[image] = (caption,) if caption else ()
    _check_all_have_captions(
        found.images, captions, f"write it into a {endings[0]} file beside it, or add {JSONL}"
    )
    # Of an image that has two, the second is not read.
    beside = {_beside(image, ending) for image in found.images for ending in endings}
    for text in sorted(found.texts - image_of.keys() - beside):
        raise DataError(
            f"file {text!r} is wrong because there is no image beside it; add the image or remove the file"
        )
    return captions


def _read_sidecars(root: Path, images: list[str], sidecars: _Names, column: str) -> _Read:
    """Captions from a field of the ``.json`` beside each image, as img2dataset writes them."""
    captions: dict[str, tuple[str, ...]] = {}
    for image in images:
        name = sidecars.find(_beside(image, _SIDECAR))
        if name is not None:
            captions[image] = _captions(f"file {name!r}", _read_sidecar(root, name), column)
    _check_all_have_captions(images, captions, f"write it into a {_SIDECAR} file beside it")
    return captions, {}


def _read_sidecar(root: Path, name: str) -> dict[str, object]:
    return parse_object(read_text(root / name, name), f"file {name!r}")


def _check_all_have_captions(images: list[str], captions: dict[str, tuple[str, ...]], fix: str) -> None:
    without = [image for image in images if image not in captions]
    if without:
        others = f" (nor do {len(without) - 1} others)" if len(without) > 1 else ""
        raise DataError(f"image {without[0]!r} is wrong because it has no caption{others}; {fix}")


def _text_of(image: str, texts: _Names, endings: tuple[str, ...]) -> str | None:
    """The text file beside an image."""
    found = (texts.find(_beside(image, ending)) for ending in endings)
    return next((text for text in found if text is not None), None)


def _beside(image: str, ending: str) -> str:
    return PurePosixPath(image).with_suffix(ending).as_posix()


def _size(root: Path, name: str) -> int:
    try:
        return (root / name).stat().st_size
    except OSError as error:
        raise DataError(
            f"image {name!r} is wrong because it cannot be read ({error.strerror}); put it back"
        ) from error

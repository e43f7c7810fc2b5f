"""A folder of pictures with captions beside them, as people and Hugging Face's imagefolder keep them."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Literal

import numpy as np

from wuerstchen.data.plan import held_out_names
from wuerstchen.data.sources import Example, Size
from wuerstchen.errors import DataError
from wuerstchen.images import is_converted, open_image, resize_crop

METADATA = "metadata.jsonl"
SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"},
)


@dataclass(frozen=True)
class _Item:
    name: str  # relative to the root, with forward slashes
    captions: tuple[str, ...]
    fields: dict[str, object]  # of its line in metadata.jsonl


class FolderSource:
    """The pictures under ``root``, in order of their names, with captions kept in one of two ways.

    - ``metadata.jsonl`` at the root: a line ``{"file_name": "cats/1.jpg", "text": "a cat"}`` a picture;
      ``caption`` may stand for ``text``, and a list holds several captions, of which ``rng`` picks one.
    - A text file beside each picture, ``cats/1.txt`` for ``cats/1.jpg``, in UTF-8: all of it is the caption.

    ``split`` is ``all`` of them, ``heldout`` (``plan.held_out_names``) or the others, ``train``. Pictures
    that belong to a set in a folder ``around`` this one too are on the side that they have there.

    Names that begin with a dot are skipped, and folders that are links are not followed. Every name and
    caption is checked on construction, and no picture is opened. Raises ``DataError`` for whatever does not
    match up.
    """

    def __init__(
        self,
        root: Path | str,
        split: Literal["all", "train", "heldout"] = "all",
        around: Path | None = None,
    ) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataError(
                f"data folder {str(self.root)!r} is wrong because it is no folder; give one with images in it"
            )
        images, texts = _find_files(self.root)
        if not images:
            raise DataError(
                f"data folder {str(self.root)!r} is wrong because it holds no images"
                f" ({', '.join(sorted(SUFFIXES))}); give one with images in it"
            )
        if (self.root / METADATA).exists():
            captions, fields = _read_metadata(self.root, images, texts)
        else:
            captions, fields = _read_text_files(self.root, images, texts), {}
        held_out = held_out_names(images)
        if around is not None:
            inside = self.root.resolve().relative_to(around.resolve())
            theirs, _ = _find_files(around)
            shared, out_there = set(theirs), held_out_names(theirs)
            named = {image: (inside / image).as_posix() for image in images}
            own = {image for image in held_out if named[image] not in shared}
            held_out = own | {image for image in images if named[image] in out_there}
        chosen = {"all": set(images), "train": set(images) - held_out, "heldout": held_out}[split]
        self._items = [_Item(name, captions[name], fields.get(name, {})) for name in images if name in chosen]

    def __len__(self) -> int:
        return len(self._items)

    def name(self, item: int) -> str:
        """The file of the picture, relative to the root."""
        return self._items[item].name

    def captions(self, item: int) -> tuple[str, ...]:
        """All captions of the picture."""
        return self._items[item].captions

    def fields(self, item: int) -> dict[str, object]:
        """Everything that ``metadata.jsonl`` says of the picture."""
        return self._items[item].fields

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

    def converted(self) -> str | None:
        """The first picture whose colours change because its colour profile is applied, if there is one.

        It opens all files, and decodes none.
        """
        return next((item.name for item in self._items if is_converted(self.root / item.name)), None)

    def fingerprint(self) -> str:
        """A hash of names, captions and file sizes.

        It is fast because no picture is read, so one replaced by another of exactly its size goes unnoticed.
        """
        digest = hashlib.sha256()
        for item in self._items:
            size = _size(self.root, item.name)
            digest.update(json.dumps([item.name, size, item.captions]).encode() + b"\n")
        return digest.hexdigest()


def _is_unicode(text: str) -> bool:
    """Whether there are no lone surrogates in it, which stand for other bytes in the name of a file and which
    neither logs nor tables can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _find_files(root: Path) -> tuple[list[str], set[str]]:
    """The sorted names of all images, and the names of all ``.txt`` files, relative to ``root``."""
    images: list[str] = []
    texts: set[str] = set()

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
            suffix = PurePosixPath(file).suffix.lower()
            if file.startswith("."):
                continue
            if suffix in SUFFIXES:
                images.append(name)
            elif suffix == ".txt":
                texts.add(name)
            elif file == METADATA and name != METADATA:
                raise DataError(
                    f"file {name!r} is wrong because {METADATA} is read at the top of the data folder alone;"
                    f" merge it into that one, or give {str(Path(folder))!r} as the data folder"
                )
    return sorted(images), texts


def _read_metadata(
    root: Path, images: list[str], texts: set[str]
) -> tuple[dict[str, tuple[str, ...]], dict[str, dict[str, object]]]:
    """Captions and all fields, by image."""
    for image in images:
        if _text_of(image) in texts:
            raise DataError(
                f"file {_text_of(image)!r} is wrong because captions are in {METADATA} already;"
                " remove one of the two"
            )
    known = set(images)
    captions: dict[str, tuple[str, ...]] = {}
    all_fields: dict[str, dict[str, object]] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(_read_text(root, METADATA).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{METADATA} line {number}"
        fields = _parse_line(where, line)
        name = _image_name(where, fields)
        if name not in known:
            raise DataError(
                f"{where} is wrong because {name!r} is no image in the data folder;"
                " add the image or remove the line"
            )
        if name in lines:
            raise DataError(
                f"{where} is wrong because {name!r} is in line {lines[name]} already;"
                " remove one, or give one line a list of captions"
            )
        lines[name] = number
        captions[name] = _captions(where, fields)
        all_fields[name] = fields
    _check_all_have_captions(images, captions, f"add a line for it to {METADATA}")
    return captions, all_fields


def _parse_line(where: str, line: str) -> dict[str, object]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where} is wrong because it is not JSON ({error}); write one object a line"
        ) from error
    if not isinstance(fields, dict):
        raise DataError(f"{where} is wrong because it is not a JSON object; write one object a line")
    return fields


def _image_name(where: str, fields: dict[str, object]) -> str:
    name = fields.get("file_name")
    if not isinstance(name, str) or not name:
        raise DataError(
            f"{where} is wrong because file_name is {name!r} and must be the name of an image; add it"
        )
    path = PurePosixPath(name)
    if path.is_absolute() or PureWindowsPath(name).anchor or ".." in path.parts:
        raise DataError(
            f"{where} is wrong because file_name {name!r} leads out of the data folder;"
            " name the image relative to that folder, without '..'"
        )
    return path.as_posix()


def _captions(where: str, fields: dict[str, object]) -> tuple[str, ...]:
    given = [key for key in ("text", "caption") if key in fields]
    if len(given) != 1:
        found = "both text and caption" if given else "neither text nor caption"
        raise DataError(f"{where} is wrong because it has {found}; give the caption in the field text")
    value = fields[given[0]]
    captions = value if isinstance(value, list) else [value]
    if not captions or not all(isinstance(caption, str) and caption.strip() for caption in captions):
        raise DataError(
            f"{where} is wrong because {given[0]} is {value!r} and must be a caption or a list of captions,"
            " none of them empty; write a caption or remove image and line"
        )
    if not _is_unicode("".join(captions)):  # JSON can spell half of a character, "\\ud83d"
        raise DataError(f"{where} is wrong because {given[0]} is not Unicode; write the caption anew")
    return tuple(" ".join(caption.split()) for caption in captions)


def _read_text_files(root: Path, images: list[str], texts: set[str]) -> dict[str, tuple[str, ...]]:
    captions: dict[str, tuple[str, ...]] = {}
    image_of: dict[str, str] = {}
    for image in images:
        text = _text_of(image)
        if text not in texts:
            continue
        if text in image_of:
            raise DataError(
                f"file {text!r} is wrong because it is beside both {image_of[text]!r} and {image!r};"
                " rename one of the images"
            )
        image_of[text] = image
        caption = " ".join(_read_text(root, text).split())
        if not caption:
            raise DataError(f"file {text!r} is wrong because it holds no caption; write one")
        captions[image] = (caption,)
    _check_all_have_captions(images, captions, f"write it into a .txt file beside it, or add {METADATA}")
    for text in sorted(texts - image_of.keys()):
        raise DataError(
            f"file {text!r} is wrong because there is no image beside it; add the image or remove the file"
        )
    return captions


def _check_all_have_captions(images: list[str], captions: dict[str, tuple[str, ...]], fix: str) -> None:
    without = [image for image in images if image not in captions]
    if without:
        others = f" (nor do {len(without) - 1} others)" if len(without) > 1 else ""
        raise DataError(f"image {without[0]!r} is wrong because it has no caption{others}; {fix}")


def _text_of(image: str) -> str:
    return PurePosixPath(image).with_suffix(".txt").as_posix()


def _read_text(root: Path, name: str) -> str:
    try:
        return (root / name).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(
            f"file {name!r} is wrong because line {line} is not UTF-8; save it in UTF-8"
        ) from error
    except OSError as error:
        raise DataError(
            f"file {name!r} is wrong because it cannot be read ({error.strerror}); change its permissions"
        ) from error


def _size(root: Path, name: str) -> int:
    try:
        return (root / name).stat().st_size
    except OSError as error:
        raise DataError(
            f"image {name!r} is wrong because it cannot be read ({error.strerror}); put it back"
        ) from error

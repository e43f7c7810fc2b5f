"""The captions of a folder of images: in a metadata file, or in text or JSON files next to the images."""

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

from wuerstchen.data.files import parse_object, read_text
from wuerstchen.data.folder_files import SIDECAR, TEXTS, Found, Names, beside_of, is_unicode, nested_metadata
from wuerstchen.data.items import no_column
from wuerstchen.data.metadata import CAPTIONS, FILE_NAME, JSONL, METADATA, metadata_rows
from wuerstchen.errors import DataError


def _shortened(value: object) -> str:
    """The beginning of a value from a file, which can be as long as 1 MiB."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:196]} ..."


_Texts = dict[str, tuple[str, ...]]
_Read = tuple[_Texts, dict[str, dict[str, object]]]
"""The captions and all metadata fields of each image."""


def read_caption_columns(
    root: Path, found: Found, image_column: str | None, columns: tuple[str, ...]
) -> tuple[_Texts, dict[str, tuple[int, ...]], dict[str, dict[str, object]]]:
    """Reads captions from several columns: the captions of each image, how many are from each column, and all
    metadata fields. An image may lack some of the columns. Raises ``DataError`` for a column that no image
    has, and for an image without any of them."""
    metadata = next((name for name in METADATA if os.path.lexists(root / name)), None)
    rows: dict[str, tuple[str, dict[str, object]]] = {}
    if metadata is not None:
        rows = dict(_rows(root, metadata, found, image_column, columns))
    elif image_column is not None:
        raise _no_columns(root, image_column)
    else:
        texts, sidecars = Names(found.texts), Names(found.sidecars)
        rows = {
            image: (f"Image {image!r}", _beside(root, image, texts, sidecars, columns))
            for image in found.images
        }
    present = {column for _, fields in rows.values() for column in columns if column in fields}
    if missing := [column for column in columns if column not in present]:
        names = dict.fromkeys(key for _, fields in rows.values() for key in fields)
        raise no_column(f"Data folder {str(root)!r}", missing[0], list(names))
    captions: _Texts = {}
    groups: dict[str, tuple[int, ...]] = {}
    for image, (where, fields) in rows.items():
        each = [_captions(where, fields, column) if column in fields else () for column in columns]
        groups[image] = tuple(map(len, each))
        captions[image] = tuple(caption for texts in each for caption in texts)
    _check_all_have_captions(found.images, captions, f"Add one of {', '.join(columns)}.")
    return (
        captions,
        groups,
        {} if metadata is None else {image: fields for image, (_, fields) in rows.items()},
    )


def _beside(
    root: Path, image: str, texts: Names, sidecars: Names, columns: tuple[str, ...]
) -> dict[str, object]:
    """What the files next to an image say: the text files with a column as their suffix, and the fields of
    the ``.json``."""
    sidecar = sidecars.find(beside_of(image, SIDECAR))
    fields = read_sidecar(root, sidecar) if sidecar is not None else {}
    for column in columns:
        place = _text_of(image, texts, (f".{column.lower()}",)) if re.fullmatch(r"[\w-]+", column) else None
        if place is not None:
            fields[column] = read_text(root / place, place)
    return fields


def _no_columns(root: Path, column: str) -> DataError:
    return DataError(
        f"Data folder {str(root)!r} has no column {column!r}. Only {', '.join(METADATA)} have"
        " columns. Add one of these files, or leave --image-column out."
    )


def read_captions(
    root: Path, found: Found, endings: tuple[str, ...], image_column: str | None, text_column: str | None
) -> _Read:
    """Reads captions from the first place that exists, in the order of ``FolderSource``."""
    texts = Names(found.texts)
    beside = any(_text_of(image, texts, endings) for image in found.images)
    metadata = next((name for name in METADATA if os.path.lexists(root / name)), None)
    if metadata == JSONL or (metadata is not None and not beside):
        return _read_metadata(root, metadata, found, endings, image_column, text_column)
    if image_column is not None:
        raise _no_columns(root, image_column)
    if not beside and text_column is not None:
        ending = "".join(f" or {ending}" for ending in endings)
        sidecars = Names(found.sidecars)
        if any(sidecars.find(beside_of(image, SIDECAR)) for image in found.images):
            return _read_sidecars(root, found.images, sidecars, text_column)
        raise DataError(
            f"Data folder {str(root)!r} has no column {text_column!r}: there is no {', no '.join(METADATA)},"
            f" and no image has a .json{ending} file next to it. Add one of them, or leave --text-column out."
        )
    if not beside and found.nested:
        raise nested_metadata(root, found.nested[0])
    return _read_text_files(root, found, endings), {}


def _read_metadata(
    root: Path,
    metadata: str,
    found: Found,
    endings: tuple[str, ...],
    image_column: str | None,
    text_column: str | None,
) -> _Read:
    texts = Names(found.texts)
    for image in found.images if text_column is None else ():
        text = _text_of(image, texts, endings)
        if text is not None and text.endswith(TEXTS[0]):
            raise DataError(
                f"File {text!r} conflicts with {metadata}, which already has the captions. Remove one of the"
                " two."
            )
    captions: _Texts = {}
    all_fields: dict[str, dict[str, object]] = {}
    columns = () if text_column is None else (text_column,)
    for name, (where, fields) in _rows(root, metadata, found, image_column, columns):
        captions[name] = _captions(where, fields, text_column)
        all_fields[name] = fields
    _check_all_have_captions(found.images, captions, f"Add a line for it to {metadata}.")
    return captions, all_fields


def _rows(
    root: Path, metadata: str, found: Found, image_column: str | None, columns: tuple[str, ...]
) -> Iterator[tuple[str, tuple[str, dict[str, object]]]]:
    """Yields the image of each row of the metadata file, with the name of the row in messages and its
    fields."""
    known = Names(found.images)
    places: dict[str, str] = {}
    for where, fields in metadata_rows(root, metadata, image_column, columns):
        name = _image_name(where, fields, image_column or FILE_NAME, known)
        if name in places:
            raise DataError(
                f"{where} repeats {name!r} from {places[name]}. Remove one of them, or put a list of captions"
                " in one line."
            )
        places[name] = where.removeprefix(f"{metadata} ")
        yield name, (where, fields)


def _image_name(where: str, fields: dict[str, object], column: str, known: Names) -> str:
    """The image that a row describes."""
    name = fields.get(column)
    if not isinstance(name, str) or not name:
        raise DataError(
            f"{where} must have the name of an image in {column}, got {_shortened(name)}. Add it."
        )
    slashed = name.replace("\\", "/")  # as Windows writes it
    if (
        PurePosixPath(slashed).is_absolute()
        or PureWindowsPath(name).anchor
        or ".." in PurePosixPath(slashed).parts
    ):
        raise DataError(
            f"{where} has a {column} outside the data folder: {_shortened(name)}. Name the image relative to"
            " that folder, without '..'."
        )
    for path in (PurePosixPath(name), PurePosixPath(slashed)):
        image = known.find(path.as_posix())
        if image is not None:
            return image
    raise DataError(
        f"{where} names {_shortened(PurePosixPath(name).as_posix())}, which is not an image in the data"
        " folder. Add the image or remove the line."
    )


def _captions(where: str, fields: dict[str, object], column: str | None) -> tuple[str, ...]:
    """The captions of a row, without empty ones."""
    if column is not None:
        if column not in fields:
            raise no_column(where, column, list(fields))
    else:
        given = [key for key in CAPTIONS if key in fields]
        if len(given) != 1:
            found = "both text and caption" if given else "neither text nor caption"
            raise DataError(f"{where} has {found}. Put the caption into the field text.")
        column = given[0]
    value = fields[column]
    captions = [caption for caption in (value if isinstance(value, list) else [value]) if caption is not None]
    if not all(isinstance(caption, str) for caption in captions):
        raise DataError(
            f"{where} must have a caption or a list of captions in {column}, got {_shortened(value)}. Write a"
            " caption, or remove the image and the line."
        )
    if not is_unicode("".join(captions)):  # JSON can contain half of a surrogate pair, "\\ud83d"
        raise DataError(f"{where} has invalid Unicode in {column}. Write the caption again.")
    return tuple(" ".join(caption.split()) for caption in captions if caption.strip())


def _read_text_files(root: Path, found: Found, endings: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    captions: dict[str, tuple[str, ...]] = {}
    image_of: dict[str, str] = {}
    texts = Names(found.texts)
    for image in found.images:
        text = _text_of(image, texts, endings)
        if text is None:
            continue
        if text in image_of:
            raise DataError(
                f"File {text!r} belongs to both {image_of[text]!r} and {image!r}. Rename one of the images."
            )
        image_of[text] = image
        caption = " ".join(read_text(root / text, text).split())
        captions[image] = (caption,) if caption else ()
    _check_all_have_captions(
        found.images,
        captions,
        f"Write one in a {endings[0]} file next to it, or add {JSONL}. To train with one caption for all"
        " images, use --caption.",
    )
    # If an image has two text files, the second is ignored.
    beside = {beside_of(image, ending) for image in found.images for ending in endings}
    for text in sorted(found.texts - image_of.keys() - beside):
        raise DataError(f"File {text!r} has no image next to it. Add the image or remove the file.")
    return captions


def _read_sidecars(root: Path, images: list[str], sidecars: Names, column: str) -> _Read:
    """Captions from a field of the ``.json`` next to each image, as img2dataset writes them."""
    captions: dict[str, tuple[str, ...]] = {}
    for image in images:
        name = sidecars.find(beside_of(image, SIDECAR))
        if name is not None:
            captions[image] = _captions(f"File {name!r}", read_sidecar(root, name), column)
    _check_all_have_captions(images, captions, f"Write one in a {SIDECAR} file next to it.")
    return captions, {}


def read_sidecar(root: Path, name: str) -> dict[str, object]:
    return parse_object(read_text(root / name, name), f"File {name!r}")


def _check_all_have_captions(images: list[str], captions: dict[str, tuple[str, ...]], fix: str) -> None:
    without = [image for image in images if image not in captions]
    if without:
        others = f", and neither have {len(without) - 1} others" if len(without) > 1 else ""
        raise DataError(f"Image {without[0]!r} has no caption{others}. {fix}")


def _text_of(image: str, texts: Names, endings: tuple[str, ...]) -> str | None:
    """The text file next to an image."""
    found = (texts.find(beside_of(image, ending)) for ending in endings)
    return next((text for text in found if text is not None), None)

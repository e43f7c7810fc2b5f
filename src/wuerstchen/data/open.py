"""Opens data by name, for training, validation and preparing.

``KINDS`` is the table of all kinds of data. Each kind has a reader, which lists the images in order and reads
any of them again. Training needs random access. A kind can define its own source for that. Otherwise
``IndexedSource`` builds an index of the reader's images once.
"""

import glob
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from wuerstchen.checkpoints.hub import HUB_NAME
from wuerstchen.data.caption_files import CaptionFile
from wuerstchen.data.caption_options import PLAIN, CaptionOptions
from wuerstchen.data.emoji import CENTRED, EmojiSource, sample_root
from wuerstchen.data.folder import FolderSource
from wuerstchen.data.folder_files import PACKED, holds_captioned_images
from wuerstchen.data.index import IndexedSource
from wuerstchen.data.items import Reader
from wuerstchen.data.metadata import METADATA
from wuerstchen.data.mixture import is_mixture, open_mixture
from wuerstchen.data.prepared import PreparedSet
from wuerstchen.data.prepared_check import is_prepared
from wuerstchen.data.readers import EmojiReader, FolderReader
from wuerstchen.data.sources import Source, StoredImages, Subset
from wuerstchen.data.tables import DatasetReader, ParquetReader
from wuerstchen.data.tars import TarReader
from wuerstchen.errors import DataError, UserError

Around = Path | Callable[[str], Path | None] | None
_SAVED = ("dataset_info.json", "state.json")  # written by save_to_disk next to its .arrow files


class Name:
    """The name of a data set whose kind is to be determined."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.path = Path(text)

    @cached_property
    def content(self) -> str | None:
        """The kind of a folder's contents, or None if there is no such folder."""
        return _content(self.path) if self.path.is_dir() else None


@dataclass(frozen=True, kw_only=True)
class Data:
    """A data set and how to read it."""

    text: str
    """The name as given by the user."""
    kind: "Kind"
    split: str = "train"
    """The split of a data set on the hub or saved to disk, not the split between training and validation."""
    image_column: str | None = None
    text_column: str | None = None
    around: Around = None
    """A parent data folder whose held-out images stay held out here, as in ``FolderSource``, or a function
    that finds it for each data set of a mixture."""
    caption: str = ""
    """One caption for all images of a folder, as in ``FolderSource``."""
    held_out: float = 0.0
    """The fraction that a folder of few images holds out, as in ``FolderSource``."""
    verify: bool | None = None
    """As in ``PreparedSet``."""
    captions: CaptionOptions = PLAIN
    """Which captions training uses, and how they are changed."""

    @property
    def path(self) -> Path:
        return Path(self.text)

    def reader(self) -> Reader:
        """Its images in order, for preparing."""
        return self.kind.reader(self)

    def source(self, subset: Subset) -> Source | PreparedSet:
        """Its training images or its held-out images, by number. There may be no held-out images."""
        return self.kind.source(self, subset)


def _indexed(data: Data, subset: Subset) -> Source:
    columns = [data.image_column, data.text_column, data.split]
    if data.captions.columns:
        columns.append(json.dumps(data.captions.names))
    return IndexedSource(data.reader(), subset, data.text, *columns)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of data."""

    name: str
    """The value of ``--format`` for this kind."""
    matches: Callable[[Name], bool]
    """Whether a name is of this kind. Raises ``DataError`` for data that cannot be read."""
    reader: Callable[[Data], Reader]
    source: Callable[[Data, Subset], Source | PreparedSet] = _indexed
    columns: str = ""
    """Why columns cannot be selected. Empty if they can."""
    splits: bool = False
    """Whether a split can be chosen."""


def open_data(
    name: str | Path,
    *,
    format: str | None = None,
    split: str | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
) -> Data:
    """Finds the data set ``name``, which can be:

    - a folder of images, of ``.tar`` shards, or of ``.parquet`` files
    - a single ``.tar`` or ``.parquet`` file, or a pattern of them (``shards/*.tar``)
    - the output of img2dataset or of ``save_to_disk``
    - a built emoji set, or ``sample`` for the emoji set in the package
    - a prepared set
    - a ``.txt`` file with one caption a line, for stages that read no images
    - the name of a data set on the hub
    - several of these, mixed by weights: ``photos=3 + shards/*.tar=1``

    ``format`` names the kind if it is ambiguous. ``split`` is for data sets on the hub and saved ones
    (default: "train"). ``image_column`` and ``text_column`` are columns of parquet files, of saved sets and
    of sets on the hub. For tars they are extensions, or fields of the ``.json`` (``TarReader``). For folders
    they are columns of the metadata file, or suffixes (``FolderSource``).

    Raises ``DataError`` if there is no such data, or if its kind has no selectable columns or splits.
    """
    text = str(name)
    kind = kind_of(text) if format is None else _kind_called(format)
    if split is not None and not kind.splits:
        raise DataError(
            f"Data {text!r} has no split {split!r}. Only data sets on the hub and saved ones have splits."
            " Remove --split."
        )
    if kind.columns and (image_column is not None or text_column is not None):
        raise DataError(
            f"Data {text!r} has no selectable columns. {kind.columns} Remove --image-column and"
            " --text-column."
        )
    split = "train" if split is None else split
    return Data(text=text, kind=kind, split=split, image_column=image_column, text_column=text_column)


def open_reader(
    name: str | Path,
    *,
    format: str | None = None,
    split: str | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
) -> Reader:
    """The reader of the data that ``open_data`` finds.

    Raises ``DataError`` as ``open_data`` does, and for missing columns and splits.
    """
    return open_data(
        name, format=format, split=split, image_column=image_column, text_column=text_column
    ).reader()


def open_source(
    name: str,
    subset: Subset = "train",
    *,
    around: Around = None,
    image_column: str | None = None,
    text_column: str | None = None,
    caption: str = "",
    held_out: float = 0.0,
    verify: bool | None = None,
    captions: CaptionOptions = PLAIN,
) -> Source | PreparedSet:
    """The training images, or the held-out images, of the data that ``open_data`` finds.

    ``around``, a parent folder of this one or a function that finds it, ``caption`` and ``held_out`` are as
    in ``FolderSource``. ``verify`` is as in ``PreparedSet``. ``captions`` says which captions are used.

    Raises ``DataError`` for a ``caption`` of data that are no folder of images, and for ``captions`` of data
    without written captions.
    """
    data = open_data(name, image_column=image_column, text_column=text_column)
    if data.kind.name == "mixture":
        options = {"image_column": image_column, "text_column": text_column, "caption": caption}
        options |= {"around": around, "held_out": held_out, "verify": verify, "captions": captions}
        return open_mixture(name, lambda part: open_source(part, subset, **options))
    if caption and data.kind.name != "folder":
        raise DataError(
            f"Data {name!r} have captions of their own, got caption={caption!r}. Only a folder of images can"
            " have one caption for all images. Remove --caption."
        )
    if caption and (image_column is not None or text_column is not None):
        raise DataError(
            f"caption={caption!r} replaces all captions of {name!r}, so no column can be chosen. Remove"
            " --caption, or --image-column and --text-column."
        )
    if captions.columns and (caption or text_column is not None):
        other = f"caption={caption!r}" if caption else f"text_column={text_column!r}"
        raise DataError(
            f"captions.columns={' '.join(captions.columns)} and {other} both say where the captions of"
            f" {name!r} are. Remove one of them."
        )
    data = replace(data, around=around, caption=caption, held_out=held_out, verify=verify, captions=captions)
    source = data.source(subset)
    if isinstance(source, StoredImages):
        source.options = captions
    elif captions != PLAIN:
        raise DataError(
            f"Data {name!r} ({data.kind.name}) have no written captions to choose from or to change. Remove"
            " the options --captions, or use a folder, tars, parquet files or a data set on the hub."
        )
    return source


def kind_of(text: str) -> Kind:
    """The kind of the data with this name. Raises ``DataError`` if it is of no known kind."""
    name = Name(text)
    found = next((kind for kind in KINDS if kind.matches(name)), None)
    if found is not None:
        return found
    if any(text.lower().endswith(ending) for ending in PACKED):
        raise DataError(
            f"Data {text!r} is compressed. Images in compressed files cannot be read in random order."
            " Decompress it (tars to .tar) and use the result."
        )
    if Path(text).exists():
        raise DataError(f"Data {text!r} is not a .tar or .parquet file. Use such a file, or a folder.")
    raise DataError(
        f"Data {text!r} does not exist. Use a folder, tars, parquet files, or the name of a data set on the"
        " hub."
    )


def _kind_called(name: str) -> Kind:
    for kind in KINDS:
        if kind.name == name:
            return kind
    raise UserError(f"format must be one of {', '.join(kind.name for kind in KINDS)}, got {name}.")


# --- Recognising kinds ---


def is_folder_of_images(text: str) -> bool:
    """Whether a name is a folder of image files."""
    return Path(text).is_dir() and kind_of(text).name == "folder"


def _is_emoji(name: Name) -> bool:
    return (name.path / "index.jsonl").is_file()


def _content(path: Path) -> str:
    """The kind of the contents of a folder that is neither an emoji set nor a prepared set."""
    saved = (path / "dataset_dict.json").is_file() or all((path / name).is_file() for name in _SAVED)
    tars = {file.stem for file in path.glob("*.tar")}
    tables = {file.stem for file in path.glob("*.parquet") if file.name not in METADATA}
    # img2dataset writes the list of downloads of each shard, 00000.parquet, next to 00000.tar or 00000/.
    lists = tables and all(stem.isdecimal() and (stem in tars or (path / stem).is_dir()) for stem in tables)
    if not (saved or tars or (tables and not lists)) or holds_captioned_images(path):
        return "folder"
    if saved:
        return "saved"
    if tars and tables and not lists:
        raise DataError(
            f"Data folder {str(path)!r} contains both tars and parquet files. Use '{path}/*.tar' or"
            f" '{path}/*.parquet'."
        )
    return "webdataset" if tars else "parquet"


def _is_tars(name: Name) -> bool:
    return name.content == "webdataset" or (name.content is None and name.text.endswith(".tar"))


def _is_parquet(name: Name) -> bool:
    return name.content == "parquet" or (name.content is None and name.text.endswith(".parquet"))


def _is_on_the_hub(name: Name) -> bool:
    packed = any(name.text.lower().endswith(ending) for ending in PACKED)
    is_name = HUB_NAME.fullmatch(name.text) is not None and ".." not in name.text
    return is_name and not packed and not name.path.exists()


# --- Reading each kind ---


def _columns(data: Data) -> tuple[str | None, str | None, tuple[str, ...]]:
    """The columns of images and of captions, for readers."""
    return data.image_column, data.text_column, data.captions.names


def _emoji_source(root: Path, subset: Subset) -> EmojiSource:
    if subset == "heldout":
        return EmojiSource(root, split="validation")
    return EmojiSource(root, split="train", centred=CENTRED)


def _folder_source(data: Data, subset: Subset) -> FolderSource:
    return FolderSource(
        data.path,
        subset,
        data.around(data.text) if callable(data.around) else data.around,
        image_column=data.image_column,
        text_column=data.text_column,
        text_columns=data.captions.names,
        caption=data.caption,
        held_out=data.held_out,
    )


def _prepared_reader(data: Data) -> Reader:
    raise DataError(
        f"Data {data.text!r} is already a prepared set. Train Stage C on it, or prepare its original images."
    )


def _mixture_reader(data: Data) -> Reader:
    raise DataError(f"Data {data.text!r} are several data sets. Prepare each of them by itself.")


def _captions_reader(data: Data) -> Reader:
    raise DataError(
        f"Data {data.text!r} has captions without images, which cannot be prepared. Train a student on it "
        "(--stages few)."
    )


def _hub_reader(data: Data) -> Reader:
    if importlib.util.find_spec("datasets") is None:
        raise UserError(
            f"Data {data.text!r} is not a local file or folder, and reading it from the hub needs the package"
            ' datasets. Check the name, or run: pip install "wuerstchen[data]"'
        )
    return DatasetReader.load(data.text, data.split, *_columns(data))


def _files(pattern: str, suffix: str) -> list[Path]:
    path = Path(pattern)
    if path.is_file():
        return [path]
    names = path.glob(f"*{suffix}") if path.is_dir() else map(Path, glob.glob(pattern, recursive=True))
    files = sorted(name for name in names if name.is_file())
    if not files:
        raise DataError(f"Data {pattern!r} matches no {suffix} file. Check the name.")
    return files


KINDS: list[Kind] = [
    Kind(name="mixture", matches=lambda name: is_mixture(name.text), reader=_mixture_reader),
    Kind(
        name="sample",
        matches=lambda name: name.text == "sample",
        reader=lambda data: EmojiReader(sample_root()),
        source=lambda data, subset: _emoji_source(sample_root(), subset),
        columns="Captions of emoji sets are generated.",
    ),
    Kind(
        name="emoji",
        matches=_is_emoji,
        reader=lambda data: EmojiReader(data.path),
        source=lambda data, subset: _emoji_source(data.path, subset),
        columns="Captions of emoji sets are generated.",
    ),
    Kind(
        name="prepared",
        matches=lambda name: is_prepared(name.path),
        reader=_prepared_reader,
        source=lambda data, subset: PreparedSet(data.path, verify=data.verify),
        columns="The columns of a prepared set were chosen when it was prepared.",
    ),
    Kind(
        name="saved",
        matches=lambda name: name.content == "saved",
        reader=lambda data: DatasetReader.from_disk(data.path, data.split, *_columns(data)),
        splits=True,
    ),
    Kind(
        name="webdataset",
        matches=_is_tars,
        reader=lambda data: TarReader(_files(data.text, ".tar"), *_columns(data)),
    ),
    Kind(
        name="parquet",
        matches=_is_parquet,
        reader=lambda data: ParquetReader(_files(data.text, ".parquet"), *_columns(data)),
    ),
    Kind(
        name="folder",
        matches=lambda name: name.content == "folder",
        reader=lambda data: FolderReader(data.path, data.image_column, data.text_column),
        source=_folder_source,
    ),
    Kind(
        name="captions",
        matches=lambda name: name.path.suffix.lower() == ".txt" and name.path.is_file(),
        reader=_captions_reader,
        source=lambda data, subset: CaptionFile(data.path, subset),
        columns="A text file has one caption a line.",
    ),
    Kind(name="hub", matches=_is_on_the_hub, reader=_hub_reader, splits=True),
]
"""All kinds of data. A name is of the first kind that matches it."""

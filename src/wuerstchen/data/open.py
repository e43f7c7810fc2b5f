"""Any name of data to one thing that training, validation and preparing read.

``KINDS`` is the table of all kinds of data. A kind is a row in it, and a reader: how its images are listed
one after the other and read again by their places. Training needs the n-th image, for which a row may have a
source of its own; without one ``IndexedSource`` lists the reader's images once.
"""

import glob
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from wuerstchen.checkpoints.hub import HUB_NAME
from wuerstchen.data.emoji import CENTRED, EmojiSource, sample_root
from wuerstchen.data.folder import FolderSource
from wuerstchen.data.folder_files import PACKED, holds_captioned_images
from wuerstchen.data.index import IndexedSource
from wuerstchen.data.items import Reader
from wuerstchen.data.metadata import METADATA
from wuerstchen.data.prepared import PreparedSet
from wuerstchen.data.prepared_check import is_prepared
from wuerstchen.data.readers import EmojiReader, FolderReader
from wuerstchen.data.sources import Part, Source
from wuerstchen.data.tables import DatasetReader, ParquetReader
from wuerstchen.data.tars import TarReader
from wuerstchen.errors import DataError, UserError

_SAVED = ("dataset_info.json", "state.json")  # what save_to_disk writes beside its .arrow files


class Name:
    """A name of data, of which it is to be told what it names."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.path = Path(text)

    @cached_property
    def content(self) -> str | None:
        """The kind of what lies in a folder that is neither an emoji set nor prepared; None for no folder."""
        return _content(self.path) if self.path.is_dir() else None


@dataclass(frozen=True, kw_only=True)
class Data:
    """A data set that was named, and how it is to be read."""

    text: str
    """Its name, as it was given."""
    kind: "Kind"
    split: str = "train"
    """Of a data set on the hub or saved; nothing to do with what training holds out."""
    image_column: str | None = None
    text_column: str | None = None
    around: Path | None = None
    """A folder that this one lies in, for ``FolderSource``."""
    verify: bool | None = None
    """As in ``PreparedSet``."""

    @property
    def path(self) -> Path:
        return Path(self.text)

    def reader(self) -> Reader:
        """Its images, one after the other: for preparing."""
        return self.kind.reader(self)

    def source(self, part: Part) -> Source | PreparedSet:
        """Its images by number: those to train on, or the held-out ones, of which there may be none."""
        return self.kind.source(self, part)


def _indexed(data: Data, part: Part) -> Source:
    return IndexedSource(data.reader(), part, data.text, data.image_column, data.text_column, data.split)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of data."""

    name: str
    """What ``format`` calls it."""
    found: Callable[[Name], bool]
    """Whether data of this name are of this kind. Raises ``DataError`` for what cannot be read."""
    reader: Callable[[Data], Reader]
    source: Callable[[Data, Part], Source | PreparedSet] = _indexed
    columns: str = ""
    """Why it has no columns to choose from, where it has none."""
    splits: bool = False
    """Whether it has splits to choose from."""


def open_data(
    name: str | Path,
    *,
    format: str | None = None,
    split: str | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
) -> Data:
    """The data set that ``name`` means: a folder of images, of ``.tar`` shards or of ``.parquet`` files, one
    such file, a pattern of them (``shards/*.tar``), a folder that ``save_to_disk`` wrote, what img2dataset
    wrote, a built emoji set, a prepared set, ``sample`` for the emoji set in the package, or the name of a
    data set on the hub.

    ``format`` is the name of a kind, where it cannot be told. ``split`` is of a set on the hub or saved
    ("train"). The columns are of parquet files, the hub, and saved sets; of tars they are extensions or
    fields of the ``.json`` (``TarReader``), of folders columns of the metadata file or endings
    (``FolderSource``). Raises ``DataError`` for what is no data, and for columns and splits of a kind that
    has none.
    """
    text = str(name)
    kind = kind_of(text) if format is None else _kind_called(format)
    if split is not None and not kind.splits:
        raise DataError(
            f"data {text!r} is wrong because it has no split {split!r}: only data sets on the hub and saved"
            " ones have splits; leave --split out"
        )
    if kind.columns and (image_column is not None or text_column is not None):
        raise DataError(
            f"data {text!r} is wrong because {kind.columns}; leave --image-column and --text-column out"
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
    """The reader of the data that ``open_data`` finds. Raises ``DataError`` as it does, and as readers do for
    columns and splits that are not there."""
    return open_data(
        name, format=format, split=split, image_column=image_column, text_column=text_column
    ).reader()


def open_source(
    name: str,
    part: Part = "train",
    *,
    around: Path | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
    verify: bool | None = None,
) -> Source | PreparedSet:
    """The source of the data that ``open_data`` finds: its training part, or what is held out.

    ``around`` is a folder that this one lies in (``FolderSource``), ``verify`` as in ``PreparedSet``.
    """
    data = open_data(name, image_column=image_column, text_column=text_column)
    return replace(data, around=around, verify=verify).source(part)


def kind_of(text: str) -> Kind:
    """The kind of the data of this name. Raises ``DataError`` if it is nothing known."""
    name = Name(text)
    found = next((kind for kind in KINDS if kind.found(name)), None)
    if found is not None:
        return found
    if any(text.lower().endswith(ending) for ending in PACKED):
        raise DataError(
            f"data {text!r} is wrong because it is packed, and what is in it cannot be read at random;"
            " unpack it, tars to .tar, and give that"
        )
    if Path(text).exists():
        raise DataError(
            f"data {text!r} is wrong because a file must be a .tar or a .parquet; give one, or a folder"
        )
    raise DataError(
        f"data {text!r} is wrong because it is neither a folder, tars, parquet files nor a name on"
        " the hub; give one of them"
    )


def _kind_called(name: str) -> Kind:
    for kind in KINDS:
        if kind.name == name:
            return kind
    raise UserError(f"format must be one of {', '.join(kind.name for kind in KINDS)}, got {name}.")


# --- What is of which kind ---


def is_folder_of_images(text: str) -> bool:
    """Whether a name is a folder whose files are the images."""
    return Path(text).is_dir() and kind_of(text).name == "folder"


def _is_emoji(name: Name) -> bool:
    return (name.path / "index.jsonl").is_file()


def _content(path: Path) -> str:
    """The kind of what lies in a folder that is neither an emoji set nor prepared."""
    saved = (path / "dataset_dict.json").is_file() or all((path / name).is_file() for name in _SAVED)
    tars = {file.stem for file in path.glob("*.tar")}
    tables = {file.stem for file in path.glob("*.parquet") if file.name not in METADATA}
    # img2dataset writes a list of the downloads beside each shard, 00000.parquet beside 00000.tar or 00000/.
    lists = tables and all(stem.isdecimal() and (stem in tars or (path / stem).is_dir()) for stem in tables)
    if not (saved or tars or (tables and not lists)) or holds_captioned_images(path):
        return "folder"
    if saved:
        return "saved"
    if tars and tables and not lists:
        raise DataError(
            f"data folder {str(path)!r} is wrong because it holds both tars and parquet files;"
            f" give '{path}/*.tar' or '{path}/*.parquet'"
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


# --- How each is read ---


def _emoji_source(root: Path, part: Part) -> EmojiSource:
    if part == "heldout":
        return EmojiSource(root, split="validation")
    return EmojiSource(root, split="train", centred=CENTRED)


def _prepared_reader(data: Data) -> Reader:
    raise DataError(
        f"data {data.text!r} is wrong because it is a prepared set already; train Stage C on it, or give the"
        " images that it was made from"
    )


def _hub_reader(data: Data) -> Reader:
    if importlib.util.find_spec("datasets") is None:
        raise UserError(
            f"data {data.text!r} is no file and no folder here, and to read it from the hub the package "
            'datasets is missing. Check the name, or install it with: pip install "wuerstchen[data]"'
        )
    return DatasetReader.load(data.text, data.split, data.image_column, data.text_column)


def _files(pattern: str, suffix: str) -> list[Path]:
    path = Path(pattern)
    if path.is_file():
        return [path]
    names = path.glob(f"*{suffix}") if path.is_dir() else map(Path, glob.glob(pattern, recursive=True))
    files = sorted(name for name in names if name.is_file())
    if not files:
        raise DataError(f"data {pattern!r} is wrong because no {suffix} file is there; check the name")
    return files


KINDS: list[Kind] = [
    Kind(
        name="sample",
        found=lambda name: name.text == "sample",
        reader=lambda data: EmojiReader(sample_root()),
        source=lambda data, part: _emoji_source(sample_root(), part),
        columns="an emoji set has no columns: its captions are composed",
    ),
    Kind(
        name="emoji",
        found=_is_emoji,
        reader=lambda data: EmojiReader(data.path),
        source=lambda data, part: _emoji_source(data.path, part),
        columns="an emoji set has no columns: its captions are composed",
    ),
    Kind(
        name="prepared",
        found=lambda name: is_prepared(name.path),
        reader=_prepared_reader,
        source=lambda data, part: PreparedSet(data.path, verify=data.verify),
        columns="a prepared set has no columns: they were chosen when it was prepared",
    ),
    Kind(
        name="saved",
        found=lambda name: name.content == "saved",
        reader=lambda data: DatasetReader.from_disk(
            data.path, data.split, data.image_column, data.text_column
        ),
        splits=True,
    ),
    Kind(
        name="webdataset",
        found=_is_tars,
        reader=lambda data: TarReader(_files(data.text, ".tar"), data.image_column, data.text_column),
    ),
    Kind(
        name="parquet",
        found=_is_parquet,
        reader=lambda data: ParquetReader(_files(data.text, ".parquet"), data.image_column, data.text_column),
    ),
    Kind(
        name="folder",
        found=lambda name: name.content == "folder",
        reader=lambda data: FolderReader(data.path, data.image_column, data.text_column),
        source=lambda data, part: FolderSource(
            data.path, part, data.around, image_column=data.image_column, text_column=data.text_column
        ),
    ),
    Kind(name="hub", found=_is_on_the_hub, reader=_hub_reader, splits=True),
]
"""All kinds, in the order in which a name is tried. The first whose ``found`` says yes is the one."""

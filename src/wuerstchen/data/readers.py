"""Captioned pictures as people keep them, one after the other and then by their places.

A reader first lists what there is (``items``: names, captions, metadata; no picture is decoded), and later
reads the bytes of any picture again (``read``), from any process and thread. What cannot be used is counted
and, where it is damage, named.
"""

import functools
import glob
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from wuerstchen.checkpoints.hub import HUB_NAME
from wuerstchen.data.emoji import CENTRED, EmojiSource, sample_root
from wuerstchen.data.filters import Tally
from wuerstchen.data.folder import FolderSource
from wuerstchen.data.items import MAX_IMAGE, Item, Reader, bytes_of, known_fields
from wuerstchen.data.metadata import METADATA
from wuerstchen.data.plan import VIEW, generator
from wuerstchen.data.tables import DatasetReader, ParquetReader
from wuerstchen.data.tars import TarReader
from wuerstchen.errors import DataError

Format = Literal["folder", "emoji", "webdataset", "parquet", "saved", "hub"]

_PACKED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar")
_SAVED = ("dataset_info.json", "state.json")  # what save_to_disk writes beside its .arrow files
_SIDE = 256  # of composed emoji, as large as the drawings themselves


def open_reader(
    source: str | Path,
    *,
    format: Format | None = None,
    split: str | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
) -> Reader:
    """The reader for ``source``: a folder of images, of ``.tar`` shards or of ``.parquet`` files, one such
    file, a pattern of them (``shards/*.tar``), a folder that ``save_to_disk`` wrote, what img2dataset wrote,
    a built emoji set, ``sample`` for the one in the package, or the name of a data set on the hub.

    ``format`` says which one where it cannot be told. ``split`` is of a set on the hub or saved ("train").
    The columns are of parquet files, the hub, and saved sets; of tars they are extensions or fields of the
    ``.json`` (``TarReader``), of folders columns of the metadata file or endings (``FolderSource``). Raises
    ``DataError`` for what is none of these, and for columns and splits that the source does not have.
    """
    text = str(source)
    if text == "sample" and format is None:
        format, path = "emoji", sample_root()
    else:
        path = Path(source)
        format = format or _format_of(text, path)
    if split is not None and format not in ("saved", "hub"):
        raise DataError(
            f"data {text!r} is wrong because it has no split {split!r}: only data sets on the hub and saved"
            " ones have splits; leave --split out"
        )
    split = "train" if split is None else split
    if format == "folder":
        return FolderReader(path, image_column, text_column)
    if format == "emoji":
        if image_column is not None or text_column is not None:
            raise DataError(
                f"data {text!r} is wrong because an emoji set has no columns: its captions are composed;"
                " leave --image-column and --text-column out"
            )
        return EmojiReader(path)
    if format == "webdataset":
        return TarReader(_files(text, ".tar"), image_column, text_column)
    if format == "parquet":
        return ParquetReader(_files(text, ".parquet"), image_column, text_column)
    if format == "saved":
        return DatasetReader.from_disk(path, split, image_column, text_column)
    return DatasetReader.load(text, split, image_column, text_column)


def _format_of(text: str, path: Path) -> Format:
    """What a source is, from its name and what is there. Raises ``DataError`` if it is nothing known."""
    if (path / "index.jsonl").is_file():
        return "emoji"
    if path.is_dir():
        return _format_of_folder(text, path)
    if text.endswith(".tar"):
        return "webdataset"
    if text.endswith(".parquet"):
        return "parquet"
    lowered = text.lower()
    if any(lowered.endswith(ending) for ending in _PACKED):
        raise DataError(
            f"data {text!r} is wrong because it is packed, and what is in it cannot be read at random;"
            " unpack it, tars to .tar, and give that"
        )
    if path.exists():
        raise DataError(
            f"data {text!r} is wrong because a file must be a .tar or a .parquet; give one, or a folder"
        )
    if HUB_NAME.fullmatch(text) and ".." not in text:
        return "hub"
    raise DataError(
        f"data {text!r} is wrong because it is neither a folder, tars, parquet files nor a name on"
        " the hub; give one of them"
    )


def _format_of_folder(text: str, path: Path) -> Format:
    if (path / "dataset_dict.json").is_file() or all((path / name).is_file() for name in _SAVED):
        return "saved"
    tars = {file.stem for file in path.glob("*.tar")}
    tables = {file.stem for file in path.glob("*.parquet") if file.name not in METADATA}
    # img2dataset writes a list of the downloads beside each shard, 00000.parquet beside 00000.tar or 00000/.
    lists = tables and all(stem.isdecimal() and (stem in tars or (path / stem).is_dir()) for stem in tables)
    if tars and tables and not lists:
        raise DataError(
            f"data folder {text!r} is wrong because it holds both tars and parquet files;"
            f" give '{text}/*.tar' or '{text}/*.parquet'"
        )
    if tars:
        return "webdataset"
    return "parquet" if tables and not lists else "folder"


class FolderReader:
    """A folder by the rules of ``FolderSource``; metadata is what else its metadata file says."""

    def __init__(self, root: Path, image_column: str | None = None, text_column: str | None = None) -> None:
        self.root = root
        self.image_column = image_column
        self.text_column = text_column

    @functools.cached_property
    def _source(self) -> FolderSource:
        return FolderSource(self.root, image_column=self.image_column, text_column=self.text_column)

    def items(self, tally: Tally) -> Iterator[Item]:
        for _ in self._source.without_caption:
            tally.drop("no caption")
        for item in range(len(self._source)):
            name = self._source.name(item)
            try:
                fields = known_fields(self._source.fields(item))
            except DataError as error:
                tally.damage("bad text", name, str(error))
                continue
            yield Item(name, self._source.captions(item), fields, (0, 0, 0))

    def read(self, name: str, place: tuple[int, int, int]) -> bytes:
        path = self.root / name
        if not path.is_file():
            raise DataError(f"image {name!r} is wrong because it is no regular file; put it back")
        return bytes_of(path, 0, MAX_IMAGE + 1, name)

    def fingerprint(self) -> str:
        return self._source.fingerprint()


class EmojiReader:
    """The training part of a built emoji set, each picture composed ``views`` times, with as many captions.

    What is shown is a function of the set and of the number of the view alone.
    """

    def __init__(self, root: Path, views: int = 8) -> None:
        self.source = EmojiSource(root, split="train", centred=CENTRED)
        self.views = views

    def items(self, tally: Tally) -> Iterator[Item]:
        for item in range(len(self.source)):
            name = self.source.name(item)
            try:
                captions = self.source.captions(item, [self._rng(item, view) for view in range(self.views)])
            except DataError as error:
                tally.damage("damaged image", name, str(error))
                continue
            for view, caption in enumerate(captions):
                yield Item(f"{name}{VIEW}{view}", (caption,), {}, (item, view, 0))

    def read(self, name: str, place: tuple[int, int, int]) -> bytes:
        item, view, _ = place
        file = io.BytesIO()
        image = self.source.image(item, self._rng(item, view), _SIDE)
        Image.fromarray(image).save(file, "BMP")  # read again at once: nothing is gained by packing it
        return file.getvalue()

    def fingerprint(self) -> str:
        return f"{self.source.fingerprint()} {self.views}"

    def _rng(self, item: int, view: int) -> np.random.Generator:
        return generator(0, item * self.views + view, "view")


def _files(pattern: str, suffix: str) -> list[Path]:
    path = Path(pattern)
    if path.is_file():
        return [path]
    names = path.glob(f"*{suffix}") if path.is_dir() else map(Path, glob.glob(pattern, recursive=True))
    files = sorted(name for name in names if name.is_file())
    if not files:
        raise DataError(f"data {pattern!r} is wrong because no {suffix} file is there; check the name")
    return files

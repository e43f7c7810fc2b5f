"""Readers of folders and of emoji sets. ``data/open.py`` says which reader belongs to which kind of data.

A reader first lists what there is (``items``: names, captions, metadata; no picture is decoded), and later
reads the bytes of any picture again (``read``), from any process and thread. What cannot be used is counted
and, where it is damage, named.
"""

import functools
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from wuerstchen.data.emoji import CENTRED, EmojiSource
from wuerstchen.data.filters import Tally
from wuerstchen.data.folder import FolderSource
from wuerstchen.data.items import MAX_IMAGE, Item, bytes_of, known_fields
from wuerstchen.data.plan import VIEW, generator
from wuerstchen.errors import DataError

_SIDE = 256  # of composed emoji, as large as the drawings themselves


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

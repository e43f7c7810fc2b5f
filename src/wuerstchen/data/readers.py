"""Readers of folders and of emoji sets. ``data/open.py`` chooses the reader for each kind of data.

``items`` lists names, captions and metadata without decoding images. ``read`` then returns the bytes of any
image, from any process and thread. Unusable items are counted, and damaged ones are also named.
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

_SIDE = 256  # of composed emoji, the same as of the original drawings


class FolderReader:
    """A folder by the rules of ``FolderSource``, with the other columns of its metadata file as metadata."""

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
            raise DataError(f"Image {name!r} is not a regular file. Restore it.")
        return bytes_of(path, 0, MAX_IMAGE + 1, name)

    def fingerprint(self) -> str:
        return self._source.fingerprint()


class EmojiReader:
    """The training images of a built emoji set. Each is composed ``views`` times, with a caption per view.

    A view depends only on the set and the number of the view.
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
        Image.fromarray(image).save(file, "BMP")  # decoded again immediately, so compression would be wasted
        return file.getvalue()

    def fingerprint(self) -> str:
        return f"{self.source.fingerprint()} {self.views}"

    def _rng(self, item: int, view: int) -> np.random.Generator:
        return generator(0, item * self.views + view, "view")

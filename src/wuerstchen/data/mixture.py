"""Several data sets that are mixed by weights: ``photos=3 + shards/*.tar=1``."""

import functools
import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from wuerstchen.data.caption_files import CaptionsOnly, WithoutImages
from wuerstchen.data.emoji import EmojiSource
from wuerstchen.data.plan import generator, item_at, stable_hash
from wuerstchen.data.prepared import PreparedSet
from wuerstchen.data.sources import Example, Size, Source, StoredImages
from wuerstchen.errors import DataError

PLUS = " + "
"""Separates the data sets of a mixture."""
BLOCK = 4096
"""Each block of this many images of a run has the same number of images from each data set."""
_MOST = 256  # data sets in a mixture


@dataclass(frozen=True)
class Part:
    """A data set of a mixture."""

    name: str
    weight: float | None
    """None without a weight."""


def is_mixture(text: str) -> bool:
    """Whether a name of data stands for several data sets."""
    return PLUS in text and not Path(text).exists()


def names_of(text: str) -> list[str]:
    """The names of the data sets of a mixture, or the name itself of other data."""
    return [part.name for part in parts_of(text)] if is_mixture(text) else [text]


def parts_of(text: str) -> list[Part]:
    """The data sets of a mixture. Those with a weight of 0 are left out.

    Raises ``DataError`` for a missing name, a data set that is named twice, and weights that cannot be used.
    """
    parts = [_part(piece.strip()) for piece in text.split(PLUS)]
    if not all(part.name for part in parts):
        raise DataError(f"Data {text!r} lack a name beside a plus sign. Write them as A=3 + B=1.")
    if len(parts) > _MOST:
        raise DataError(f"Data {text!r} are too many. A mixture has at most {_MOST} data sets.")
    places = [_place(part.name) for part in parts]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise DataError(
                f"Data {text!r} name {parts[number].name!r} twice. Name it once, with a larger weight."
            )
    weights = [part.weight for part in parts if part.weight is not None]
    if weights and len(weights) < len(parts):
        without = next(part.name for part in parts if part.weight is None)
        raise DataError(
            f"Data {text!r} have no weight for {without!r}. Give all data sets a weight, or none. Without"
            " weights each image is shown equally often."
        )
    if wrong := [weight for weight in weights if not 0 <= weight < math.inf]:
        raise DataError(f"Data {text!r} have the weight {wrong[0]:g}. Weights must be 0 or more.")
    if weights and not 0 < sum(weights) < math.inf:
        raise DataError(f"Data {text!r} have weights that sum to {sum(weights):g}. Give one above 0.")
    return [part for part in parts if part.weight != 0]


def _part(text: str) -> Part:
    name, equals, weight = text.rpartition("=")
    if not equals or Path(text).exists():
        return Part(text, None)
    try:
        return Part(name, float(weight))
    except ValueError:
        return Part(text, None)


def _place(name: str) -> str:
    path = Path(name)
    return str(path.resolve()) if path.exists() else name


class MixedSource:
    """Several data sets as one. An item's number counts through all of them.

    With weights, each block of ``BLOCK`` images of a run has the same number of images from each data set,
    in random order, and each data set has epochs of its own. Without weights, an epoch has each image of all
    data sets once.
    """

    def __init__(
        self, parts: Sequence[Source], names: Sequence[str], weights: Sequence[float | int] = ()
    ) -> None:
        """``weights`` are rounded to multiples of 1 / ``BLOCK``. Each data set gets at least one image of a
        block."""
        self.parts = list(parts)
        self.names = list(names)
        self.quotas = _quotas(weights) if weights else []
        """Images of a block from each data set. Empty without weights."""
        self._starts = [0, *accumulate(len(part) for part in self.parts)]
        self._slots = [0, *accumulate(self.quotas)]
        self._orders = [_Orders(len(part)) for part in self.parts]

    def __len__(self) -> int:
        return self._starts[-1]

    def name(self, item: int) -> str:
        """The name of the data set, and that of the item in it: two data sets may use the same names."""
        number, place = self._place(item)
        return f"{self.names[number]}: {self.parts[number].name(place)}"

    def example(self, item: int, rng: np.random.Generator, size: int | Size) -> Example:
        number, place = self._place(item)
        return self.parts[number].example(place, rng, size)

    def image(self, item: int, rng: np.random.Generator, size: int | Size) -> np.ndarray:
        number, place = self._place(item)
        return self.parts[number].image(place, rng, size)

    @functools.cached_property
    def fingerprints(self) -> list[str]:
        """The fingerprint of each data set."""
        return [part.fingerprint() for part in self.parts]

    def fingerprint(self) -> str:
        """A hash of the fingerprints of the data sets and of their weights. It does not depend on their
        places."""
        return hashlib.sha256(json.dumps([self.fingerprints, self.quotas]).encode()).hexdigest()

    def fraction(self, number: int) -> float:
        """The fraction of a run's images that are from data set ``number``."""
        if self.quotas:
            return self.quotas[number] / BLOCK
        return len(self.parts[number]) / len(self)

    def item_at(self, index: int, seed: int) -> int:
        """The item that image ``index`` of a run shows."""
        if not self.quotas:
            return item_at(index, len(self), seed)
        block, position = divmod(index, BLOCK)
        slot = int(_slots(seed, block)[position])
        number = int(np.searchsorted(self._slots, slot, side="right")) - 1
        count = block * self.quotas[number] + slot - self._slots[number]
        return self._starts[number] + self._orders[number].item(count, stable_hash(seed, "part", number))

    def span(self, item: int) -> range:
        """The items of the data set that has this item."""
        number, _ = self._place(item)
        return range(self._starts[number], self._starts[number + 1])

    def _place(self, item: int) -> tuple[int, int]:
        """The number of the data set of an item, and the item's number in it."""
        if not 0 <= item < len(self):
            raise IndexError(f"image {item} of {len(self)}")
        number = int(np.searchsorted(self._starts, item, side="right")) - 1
        return number, item - self._starts[number]


class MixedCaptions(MixedSource, CaptionsOnly):
    """A mixture of captions without images."""


class _Orders:
    """The order of a data set in each of its epochs. Those that a block needs are kept."""

    def __init__(self, length: int) -> None:
        self.length = length
        self._kept: OrderedDict[tuple[int, int], Int64[np.ndarray, " n"]] = OrderedDict()

    def item(self, count: int, seed: int) -> int:
        """The item of image number ``count`` from this data set."""
        epoch, position = divmod(count, self.length)
        order = self._kept.get((seed, epoch))
        if order is None:
            order = self._kept[seed, epoch] = generator(seed, epoch, "order").permutation(self.length)
            if len(self._kept) > 2 + BLOCK // self.length:
                self._kept.popitem(last=False)
        return int(order[position])


def _quotas(weights: Sequence[float | int]) -> list[int]:
    """Whole numbers that sum to ``BLOCK`` and are proportional to the weights, each at least 1."""
    exact = [weight / max(weights) for weight in weights]
    exact = [BLOCK * weight / sum(exact) for weight in exact]
    found = [max(1, math.floor(quota)) for quota in exact]
    by_rest = sorted(range(len(exact)), key=lambda number: found[number] - exact[number])
    for number in range(BLOCK - sum(found)):
        found[by_rest[number % len(found)]] += 1
    while sum(found) > BLOCK:  # small weights were rounded up
        found[found.index(max(found))] -= 1
    return found


@functools.lru_cache(maxsize=4)
def _slots(seed: int, block: int) -> Int64[np.ndarray, " n"]:
    return generator(seed, block, "mixture").permutation(BLOCK)


def item_of(source: Source, index: int, seed: int) -> int:
    """The item of a data set, or of a mixture, that image ``index`` of a run shows."""
    if isinstance(source, MixedSource):
        return source.item_at(index, seed)
    return item_at(index, len(source), seed)


def span_of(source: Source, item: int) -> range:
    """The items that can take the place of one that cannot be read: those of the same data set."""
    return source.span(item) if isinstance(source, MixedSource) else range(len(source))


def open_mixture(text: str, open_part: Callable[[str], Source | PreparedSet]) -> MixedSource:
    """Opens the data sets of a mixture. Those of which ``open_part`` finds no image are left out.

    Raises ``DataError`` for prepared sets and for a mixture without images.
    """
    found: list[tuple[Part, Source]] = []
    for part in parts_of(text):
        source = open_part(part.name)
        if isinstance(source, PreparedSet):
            raise DataError(
                f"Data {part.name!r} is a prepared set, which cannot be mixed with other data. Mix the images"
                " that it was prepared from."
            )
        if len(source):
            found.append((part, source))
    weights = [part.weight for part, _ in found if part.weight is not None]
    return MixedSource([source for _, source in found], [part.name for part, _ in found], weights)


def named_parts(name: str, source: Source | PreparedSet) -> list[tuple[str, Source | PreparedSet]]:
    """The data sets of a mixture with their names, or the data set itself."""
    if isinstance(source, MixedSource):
        return list(zip(source.names, source.parts, strict=True))
    return [(name, source)]


def without_images(source: Source | PreparedSet) -> Source | PreparedSet:
    """The captions of a source, if its images need not be opened. Other sources stay as they are."""
    if isinstance(source, StoredImages | EmojiSource):
        return WithoutImages(source)
    if not isinstance(source, MixedSource):
        return source
    parts = [part if isinstance(part, CaptionsOnly) else without_images(part) for part in source.parts]
    if not all(isinstance(part, CaptionsOnly) for part in parts):
        return source
    mixed = MixedCaptions([part for part in parts if isinstance(part, Source)], source.names, source.quotas)
    assert mixed.quotas == source.quotas
    return mixed

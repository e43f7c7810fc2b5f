"""Mixtures: the fractions, the epochs of each data set, and the same images for the same seed and index."""

import pickle
from collections import Counter

import numpy as np
import pytest

from wuerstchen.data.caption_files import CaptionsOnly
from wuerstchen.data.mixture import (
    BLOCK,
    MixedSource,
    item_of,
    names_of,
    open_mixture,
    parts_of,
    without_images,
)
from wuerstchen.data.open import kind_of, open_reader, open_source
from wuerstchen.data.plan import item_at
from wuerstchen.data.sources import Example
from wuerstchen.errors import DataError


class Numbers:
    """Images whose only pixel says from which set and item they are."""

    def __init__(self, kind: int, length: int, broken: frozenset[int] = frozenset()) -> None:
        self.kind, self.length, self.broken = kind, length, broken

    def __len__(self) -> int:
        return self.length

    def name(self, item: int) -> str:
        return f"{item}.png"

    def example(self, item, rng, size) -> Example:
        return Example(self.image(item, rng, size), f"{self.kind}/{item}")

    def image(self, item, rng, size):
        if item in self.broken:
            raise DataError("it is damaged")
        return np.full((1, 1, 3), self.kind, np.uint8)

    def fingerprint(self) -> str:
        return f"{self.kind} {self.length}"


def mixed(*lengths: int, weights: tuple[float, ...] = ()) -> MixedSource:
    parts = [Numbers(kind, length) for kind, length in enumerate(lengths)]
    return MixedSource(parts, [f"set {kind}" for kind in range(len(lengths))], weights)


def drawn(source: MixedSource, indices: range, seed: int = 0) -> list[tuple[int, int]]:
    """Number of the data set, and item in it."""
    items = [item_of(source, index, seed) for index in indices]
    return [source._place(item) for item in items]


def test_each_block_has_the_fractions_of_the_weights():
    source = mixed(10_000, 50, 3000, weights=(2, 1, 1))
    for block in range(3):
        found = Counter(number for number, _ in drawn(source, range(block * BLOCK, (block + 1) * BLOCK)))
        assert found == {0: 2048, 1: 1024, 2: 1024}
    assert [source.fraction(number) for number in range(3)] == [0.5, 0.25, 0.25]
    first = [number for number, _ in drawn(source, range(40))]
    assert 8 < first.count(0) < 32  # mixed, not one after the other


def test_each_data_set_has_epochs_of_its_own():
    source = mixed(700, 5000, weights=(1, 3))
    places = drawn(source, range(2 * BLOCK))
    small = Counter(place for number, place in places if number == 0)
    assert len(small) == 700
    assert set(small.values()) == {2, 3}  # 2048 images of 700
    large = Counter(place for number, place in places if number == 1)
    assert set(large.values()) <= {1, 2}
    assert len(large) == 5000


def test_without_weights_an_epoch_shows_every_image_once():
    source = mixed(7, 30, 5)
    items = [item_of(source, index, 3) for index in range(84)]
    assert sorted(items[:42]) == sorted(items[42:]) == list(range(42))
    assert items == [item_at(index, 42, 3) for index in range(84)]  # as one data set
    assert source.fraction(1) == 30 / 42


def test_an_image_depends_on_seed_and_index_alone():
    whole = drawn(mixed(700, 50, weights=(1, 3)), range(3 * BLOCK), seed=5)
    again = mixed(700, 50, weights=(1, 3))
    backwards = [drawn(again, range(index, index + 1), seed=5)[0] for index in range(3 * BLOCK - 1, -1, -499)]
    assert backwards == whole[::-499]
    resumed = pickle.loads(pickle.dumps(again))
    assert drawn(resumed, range(BLOCK + 7, BLOCK + 90), seed=5) == whole[BLOCK + 7 : BLOCK + 90]
    assert drawn(again, range(100), seed=6) != whole[:100]


def test_tiny_weights_get_an_image_of_each_block():
    assert mixed(9, 9, 9, weights=(1e9, 1e-9, 1)).quotas == [BLOCK - 2, 1, 1]
    assert sum(mixed(9, 9, 9, weights=(1, 1, 1)).quotas) == BLOCK
    assert mixed(9, 9, weights=(1e308, 1e308)).quotas == [BLOCK // 2] * 2


def test_names_say_the_data_set():
    """Two data sets may use the same names."""
    source = mixed(3, 4)
    assert source.name(0) == "set 0: 0.png"
    assert source.name(3) == "set 1: 0.png"
    with pytest.raises(IndexError):
        source.name(7)


def test_the_fingerprint_has_the_weights_but_not_the_places():
    one, other = mixed(3, 4, weights=(1, 1)), mixed(3, 4, weights=(2, 2))
    other.names = ["elsewhere", "too"]
    assert one.fingerprint() == other.fingerprint()
    assert one.fingerprint() != mixed(3, 4, weights=(1, 2)).fingerprint()
    assert one.fingerprint() != mixed(3, 5, weights=(1, 1)).fingerprint()


def test_weights_of_zero_leave_a_data_set_out():
    assert [part.name for part in parts_of("a=0 + b=2 + c=1")] == ["b", "c"]
    assert names_of("a + b") == ["a", "b"]
    assert names_of("a=3") == ["a=3"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a=0 + b=0", "sum to 0"),
        ("a=-1 + b=2", "weight -1"),
        ("a=nan + b=2", "weight nan"),
        ("a=inf + b=2", "weight inf"),
        ("a=1e308 + b=1e308", "sum to inf"),
        ("a=2 + b", "no weight for 'b'"),
        ("a + a", "'a' twice"),
        ("a=1 + a=2", "'a' twice"),
        ("a +  + b", "lack a name"),
        (" + ".join(map(str, range(300))), "at most 256"),
    ],
)
def test_wrong_mixtures_are_named(text, said):
    with pytest.raises(DataError, match=said):
        parts_of(text)


def test_the_same_place_by_two_names_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match=r"'\./photos' twice"):
        parts_of("photos=1 + ./photos=2")
    (tmp_path / "a + b=2").mkdir()
    assert kind_of(str(tmp_path / "a + b=2")).name == "folder"  # a folder with such a name is no mixture


def test_missing_and_prepared_parts_are_named(tmp_path):
    with pytest.raises(DataError, match="'gone' does not exist"):
        open_source("sample=1 + gone=2")
    with pytest.raises(DataError, match="Prepare each of them"):
        open_reader("sample + gone")


def test_parts_without_held_out_images_are_left_out():
    found = open_mixture("a=1 + b=2", lambda name: Numbers(0, 0 if name == "a" else 4))
    assert found.names == ["b"]
    assert len(found) == 4
    assert not len(open_mixture("a=1 + b=2", lambda name: Numbers(0, 0)))


def test_captions_of_a_mixture_open_no_image():
    source = open_mixture("sample=1 + other=1", lambda name: open_source("sample"))
    captions = without_images(source)
    assert isinstance(captions, CaptionsOnly)
    assert isinstance(captions, MixedSource)
    assert captions.quotas == source.quotas
    rng = np.random.default_rng(0)
    assert not captions.example(150, rng, 8).image.any()
    assert without_images(mixed(3, 4)).__class__ is MixedSource  # whose images cannot be left out

"""Sizes of batches: a function of seed and batch number alone."""

import numpy as np
import pytest
from PIL import Image

from wuerstchen.data.emoji import EmojiSource, sample_root
from wuerstchen.data.folder import FolderSource
from wuerstchen.errors import UserError
from wuerstchen.train.feed import Feed, batch_sizes, batches


def test_the_sizes_of_a_phase():
    assert batch_sizes(1024, 1.0) == ((1024, 1024),)
    assert batch_sizes(1024, 5 / 3) == ((1024, 1024), (1707, 1024), (1024, 1707))
    assert batch_sizes(1024, 5 / 3, 64) == ((1024, 1024), (1728, 1024), (1024, 1728))
    assert batch_sizes(128, 1.1, 64) == ((128, 128),)  # rounded away


@pytest.fixture
def photos(tmp_path):
    for n in range(9):
        Image.effect_noise((90 + n, 80), 90).convert("RGB").save(tmp_path / f"{n}.png")
        (tmp_path / f"{n}.txt").write_text(f"picture {n}")
    return FolderSource(tmp_path)


def feed_of(source, seed=3):
    return Feed(source, seed, 32, True, sizes=batch_sizes(32, 2.0), batch_size=4)


def test_a_batch_has_one_size_and_all_sizes_come_alike(photos):
    feed = feed_of(photos)
    sizes = [feed.size_of(index) for index in range(4 * 3000)]
    assert all(len(set(sizes[i : i + 4])) == 1 for i in range(0, len(sizes), 4))
    counts = [sizes[::4].count(size) for size in feed.sizes]
    assert all(abs(count - 1000) < 100 for count in counts)
    assert sizes != [feed_of(photos, seed=4).size_of(index) for index in range(len(sizes))]


def test_where_a_run_goes_on_and_which_part_a_process_takes_changes_no_picture(photos):
    whole = list(batches(feed_of(photos), 0, 24, 4, 0))
    assert len({batch.images.shape[1:3] for batch in whole}) > 1
    resumed = list(batches(feed_of(photos), 8, 24, 4, 0))
    for one, other in zip(whole[2:], resumed, strict=True):
        assert (one.images == other.images).all()
        assert one.captions == other.captions
    second = list(batches(feed_of(photos), 0, 24, 4, 0, lambda numbers: numbers[2:]))
    for one, other in zip(whole, second, strict=True):
        assert (one.images[2:] == other.images).all()


def test_pictures_fill_the_size(photos):
    image = photos.image(0, np.random.default_rng(0), (48, 24))
    assert image.shape == (24, 48, 3)
    assert photos.image(0, np.random.default_rng(0), 24).shape == (24, 24, 3)


def test_emoji_are_composed_as_squares_alone():
    with pytest.raises(UserError, match="48x24 of emoji: they are composed as squares alone"):
        EmojiSource(sample_root()).image(0, np.random.default_rng(0), (48, 24))

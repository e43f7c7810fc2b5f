"""Sizes of batches: a function of seed and batch number alone."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wuerstchen.data.emoji import EmojiSource, sample_root
from wuerstchen.data.folder import FolderSource
from wuerstchen.errors import DataError, UserError
from wuerstchen.train.feed.images import Feed, batch_sizes, batches, pixels_of


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


def test_a_batch_has_one_size_and_all_sizes_are_equally_likely(photos):
    feed = feed_of(photos)
    sizes = [feed.size_of(index) for index in range(4 * 3000)]
    assert all(len(set(sizes[i : i + 4])) == 1 for i in range(0, len(sizes), 4))
    counts = [sizes[::4].count(size) for size in feed.sizes]
    assert all(abs(count - 1000) < 100 for count in counts)
    assert sizes != [feed_of(photos, seed=4).size_of(index) for index in range(len(sizes))]


def test_images_depend_neither_on_the_start_nor_on_the_process(photos):
    whole = list(batches(feed_of(photos), 0, 24, 4, 0))
    assert len({batch.images.shape[1:3] for batch in whole}) > 1
    resumed = list(batches(feed_of(photos), 8, 24, 4, 0))
    for one, other in zip(whole[2:], resumed, strict=True):
        assert (one.images == other.images).all()
        assert one.captions == other.captions
    second = list(batches(feed_of(photos), 0, 24, 4, 0, lambda numbers: numbers[2:]))
    for one, other in zip(whole, second, strict=True):
        assert (one.images[2:] == other.images).all()


def test_mirrored_images_say_so_in_their_captions(photos):
    """A function of seed and index. The other images, captions and names stay as they are."""
    plain, half = feed_of(photos), feed_of(photos)
    half.mirrored = 0.5
    pairs = [(plain[index][1], half[index][1]) for index in range(200)]
    turned = [one.caption != other.caption for one, other in pairs]
    assert 70 < sum(turned) < 130
    for (one, other), is_turned in zip(pairs, turned, strict=True):
        expected = one.image[:, ::-1] if is_turned else one.image
        assert (other.image == expected).all()
        assert other.caption == one.caption + (", mirrored" if is_turned else "")
    without = Feed(photos, 3, 32, False, sizes=batch_sizes(32, 2.0), batch_size=4, mirrored=0.5)
    assert all((without[index][1].image == half[index][1].image).all() for index in range(20))
    assert (plain.shown(4, 32) == half.shown(4, 32)).all()


def test_an_image_is_cropped_anew_in_every_epoch(toy_source):
    shown = {}
    for seed in (1, 2):
        feed = Feed(toy_source(3), seed, 8, False)
        for index in range(9):
            image = feed[index][1].image[1:].tobytes()
            shown.setdefault(int(feed[index][1].image[0, 0, 0]), set()).add(image)
    assert {item: len(images) for item, images in shown.items()} == {0: 6, 1: 6, 2: 6}
    assert len(set.union(*shown.values())) == 18


def test_pixels_reach_from_zero_to_one():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(1, 2, 4, 3)
    assert pixels_of(images)[0, :, 1, 3].tolist() == pytest.approx([0, 0.2, 1])
    assert pixels_of(images).shape == (1, 3, 2, 4)


def test_previews_show_the_same_images_in_every_run(toy_source):
    one, two = (Feed(toy_source(), seed, 8, True).shown(3, 8) for seed in (1, 2))
    assert one.shape == (3, 3, 8, 8)
    assert torch.equal(one, two)
    # Without those that are left out by name.
    feed = Feed(toy_source(), 1, 8, True)
    items = [round(float(255 * value)) for value in one[:, 0, 0, 0]]
    without = Feed(toy_source(), 1, 8, True, skip=[feed.source.name(items[0])]).shown(3, 8)
    assert round(float(255 * without[0, 0, 0, 0])) not in items[:1]
    assert torch.equal(without[1:], one[1:])


def test_images_fill_the_size(photos):
    image = photos.image(0, np.random.default_rng(0), (48, 24))
    assert image.shape == (24, 48, 3)
    assert photos.image(0, np.random.default_rng(0), 24).shape == (24, 24, 3)


def test_emoji_are_only_composed_as_squares():
    with pytest.raises(UserError, match="must be square, got 48x24"):
        EmojiSource(sample_root()).image(0, np.random.default_rng(0), (48, 24))


SMALL = """
import sys
from pathlib import Path
sys.path.insert(0, {folder!r})
from conftest import ToySource
from wuerstchen.errors import DataError, UserError
from wuerstchen.train.feed.images import Feed, batches
try:
    for batch in batches(Feed(ToySource(), 5, 128, True), 0, 400, 16, 2):
        pass
except UserError as error:
    print(error)
"""


def said_with_shared_memory(mount: str) -> str:
    """What a run in a container with little shared memory says."""
    code = SMALL.format(folder=str(Path(__file__).parents[1]))
    command = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$0" -c "$1"', sys.executable, code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert not done.stderr, done.stderr
    return done.stdout


@pytest.mark.skipif(
    subprocess.run(
        ["sh", "-c", "unshare -m mount -t tmpfs tmpfs /dev/shm"], capture_output=True, check=False
    ).returncode
    != 0,
    reason="mounting needs rights",
)
@pytest.mark.parametrize("size", ["1m", pytest.param("4k", marks=pytest.mark.slow)])
def test_too_little_shared_memory_is_reported(size):
    """The workers printed that there is no room, and the run waited for them for ever. With even less, not
    even the workers' queues can be made."""
    said = said_with_shared_memory(f"mount -t tmpfs -o size={size} tmpfs /dev/shm")
    assert said.startswith("/dev/shm is too small for the batches of --workers 2: 0 MiB free of")
    assert "--workers 0" in said
    assert "--shm-size" in said


def test_workers_put_batches_into_shared_memory(monkeypatch, toy_source):
    """What goes wrong there is an error of the worker's, wherever this runs."""

    def full(self):
        raise RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    feed = Feed(toy_source(), 5, 4, True)
    with pytest.raises(UserError, match=r"^/dev/shm is too small for the batches of --workers 1"):
        list(batches(feed, 0, 8, 4, workers=1))
    assert len(list(batches(feed, 0, 8, 4, workers=0))) == 2


def test_skipped_images_leave_all_others_in_place(toy_source):
    plain, other = (Feed(toy_source(), 5, 4, True, skip=skip) for skip in ((), ("3.png", "4.png")))
    first, second = ([feed[index][1].caption for index in range(40)] for feed in (plain, other))
    expected = ["picture 5" if caption in ("picture 3", "picture 4") else caption for caption in first]
    assert second == expected != first
    assert plain.names(range(40)) == [caption.removeprefix("picture ") + ".png" for caption in first]
    assert not other[first.index("picture 3")][2]  # none of them could not be read
    everything = Feed(toy_source(2), 5, 4, True, skip=("0.png", "1.png"))
    with pytest.raises(DataError, match="got the names of all 2"):
        everything[0]

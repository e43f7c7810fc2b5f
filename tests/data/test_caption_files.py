"""Captions without images."""

import numpy as np
import pytest

from wuerstchen.data.caption_files import CaptionFile, WithoutImages
from wuerstchen.data.emoji import EmojiSource, sample_root
from wuerstchen.data.folder import FolderSource
from wuerstchen.data.open import open_reader, open_source
from wuerstchen.data.plan import held_out_names
from wuerstchen.data.sources import Source
from wuerstchen.errors import DataError


def test_a_text_file_has_one_caption_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n  a dög \na cat\n", encoding="utf-8")
    source = open_source(str(path))
    assert isinstance(source, CaptionFile)
    assert isinstance(source, Source)
    assert [source.name(item) for item in range(len(source))] == ["a cat", "a dög"]
    example = source.example(1, np.random.default_rng(0), (32, 16))
    assert example.caption == "a dög"
    assert example.image.shape == (16, 32, 3)
    before = source.fingerprint()
    path.write_text("a cat\na dog\n", encoding="utf-8")
    assert open_source(str(path)).fingerprint() != before


def test_some_captions_are_held_out(tmp_path):
    captions = [f"thing {number}" for number in range(300)]
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(captions))
    sources = [open_source(str(path), subset) for subset in ("train", "heldout")]
    parts = [{source.name(item) for item in range(len(source))} for source in sources]
    assert parts[1] == held_out_names(captions)
    assert parts[1]
    assert parts[0] == {*captions} - parts[1]


@pytest.mark.parametrize(
    ("content", "message"), [(b" \n", "has no captions"), (b"\xff\xfe\xfa", "cannot be read")]
)
def test_files_that_are_no_captions_are_refused(tmp_path, content, message):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_source(str(path))


def test_captions_cannot_be_prepared(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat")
    with pytest.raises(DataError, match="has captions without images, which cannot be prepared"):
        open_reader(path)


def test_images_are_not_opened(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"no image")
        (tmp_path / f"{number}.txt").write_text(f"thing {number}")
    stored = FolderSource(tmp_path)
    source = WithoutImages(stored)
    found = [source.example(item, np.random.default_rng(0), 8) for item in range(3)]
    assert [example.caption for example in found] == ["thing 0", "thing 1", "thing 2"]
    assert source.fingerprint() == stored.fingerprint()


def test_captions_of_emoji_are_those_of_their_images():
    emoji = EmojiSource(sample_root(), split="train")
    for item in range(5):
        found, whole = (
            source.example(item, np.random.default_rng(item), 32) for source in (WithoutImages(emoji), emoji)
        )
        assert found.caption == whole.caption
        assert not found.image.any()

"""The description of the data before the first update, and its warnings."""

import dataclasses

import pytest
from PIL import Image

from wuerstchen.checkpoints.text_encoder import read_text_encoder
from wuerstchen.data.emoji import CENTRED, EmojiSource, sample_root
from wuerstchen.data.folder import FolderSource
from wuerstchen.errors import UserError
from wuerstchen.pipeline import BUNDLED
from wuerstchen.recipes.mini import mini
from wuerstchen.recipes.tiny import tiny
from wuerstchen.recipes.v2 import v2
from wuerstchen.train.config import Recipe
from wuerstchen.train.overview import cached_images, overview, readings, refuse_small

from ..configurations import with_optimization


@pytest.fixture(scope="module")
def encoder():
    return read_text_encoder(BUNDLED / "text_encoder")


def write(folder, sizes, captions=()):
    folder.mkdir()
    for number, size in enumerate(sizes):
        Image.new("RGB", size).save(folder / f"{number}.png")
        text = captions[number] if number < len(captions) else f"thing {number}"
        (folder / f"{number}.txt").write_text(text)
    return FolderSource(folder)


def recipe(images: int = 160, stages: tuple = ("c",), **changes) -> Recipe:
    full = tiny()
    stage_c = with_optimization(full.stage_c, images=images)
    common = {"data": "mine", "stages": stages, "start_from": "model", "stage_c": stage_c}
    return dataclasses.replace(full, **{**common, **changes})


def test_an_incomplete_survey_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("wuerstchen.train.overview.ignored", lambda root: ({}, False))
    write(tmp_path / "photos", [(256, 256)])
    recipe = dataclasses.replace(tiny(), data=str(tmp_path / "photos"))
    said, _ = overview(recipe, {recipe.data: FolderSource(tmp_path / "photos")}, None)
    assert f"  stopped looking for unused files after 20 seconds, before the end of {recipe.data}" in said


def test_a_good_folder_has_no_warnings(tmp_path, encoder):
    source = write(tmp_path / "photos", [(200, 128)] * 4)
    said, warned = overview(recipe(), {"mine": source}, encoder)
    assert said == [
        "mine: 4 images to train on",
        "  4 captions with 4 to 4 tokens, median 4",
        "  all have at least 128x128 pixels",
        "  Stage C: 160 images, 40 epochs",
    ]
    assert warned == []
    said, _ = overview(recipe(images=16), {"mine": source}, None)  # no stage reads captions
    assert said[1] == "  all have at least 128x128 pixels"
    assert said[-1] == "  Stage C: 16 images, 4 epochs"


def test_suspicious_data_are_warned_about(tmp_path, encoder):
    source = write(tmp_path / "photos", [(128, 128)] * 8 + [(1, 5000), (1, 1)], ["word " * 2000] * 2)
    (tmp_path / "photos" / "a.heic").write_text("x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "photos" / "more").symlink_to(tmp_path / "elsewhere")
    said, warned = overview(recipe(images=50_000), {"mine": source}, encoder)
    text = "\n".join(said)
    assert "2 are longer than the text encoder's 32 tokens and are truncated" in text
    assert "2 images smaller than 128x128 pixels and enlarged, up to 128 times ('" in text
    assert "not used: 1 entry that is a link to a folder ('more')" in text
    assert "not used: 1 entry with the ending .heic ('a.heic')" in text
    assert "Stage C: 50,000 images, 5,000 epochs" in text
    for part in (
        "2 of 10 captions of mine are truncated",
        "2 images of mine would be enlarged more than 4 times, '8.png' the first",
        "that is a link to a folder ('more') of mine will not be used. Copy its images into the folder",
        "with the ending .heic ('a.heic') of mine will not be used. Save them as PNG or JPEG",
        "see each of the 10 images of mine 5,000 times. The model would memorise them. Give more images, or "
        "fewer with --stage-c.optimization.images",
    ):
        assert sum(part in line for line in warned) == 1, part
    assert len(warned) == 5


def test_mostly_small_images_are_warned_about(tmp_path):
    source = write(tmp_path / "photos", [(100, 100)] * 3 + [(256, 256)])
    _, warned = overview(recipe(), {"mine": source}, None)
    (line,) = warned
    assert line.startswith("most images of mine are smaller than 128x128 pixels")
    _, warned = overview(
        recipe(), {"mine": write(tmp_path / "fine", [(100, 100)] * 2 + [(256, 256)] * 3)}, None
    )
    assert warned == []


def test_emoji_may_have_many_epochs():
    source = EmojiSource(sample_root(), split="train", centred=CENTRED)
    said, warned = overview(recipe(images=10**7, data="sample"), {"sample": source}, None)
    assert "composed anew each time" in said[0]
    assert warned == []


def test_every_phase_names_its_options():
    found = {r.stage: r for r in readings(v2())}
    assert list(found) == ["a", "b", "b2", "c", "c2", "c3", "c4"]
    assert found["c3"].images_option == "--stage-c.phases.1.optimization.images"
    assert found["c3"].batch_option == "--stage-c.phases.1.optimization.batch-size"
    assert (found["b"].size, found["b2"].size) == (512, 1024)
    refined = {r.stage: r for r in readings(mini())}
    assert list(refined) == ["a", "b", "b2", "a2", "c"]
    assert refined["b2"].images == 256 * 20_000
    assert refined["b2"].images_option == "--stage-b.refine-images"
    assert refined["a2"].images_option == "--stage-a.refine-images"


def test_a_set_smaller_than_a_batch_is_refused_with_options_that_fit():
    full = dataclasses.replace(mini(), data="mine")
    with pytest.raises(UserError) as caught:
        refuse_small(full, "mine", 119, whole=False)
    assert str(caught.value) == (
        "mine has 119 images, fewer than a batch of 512. The images of a batch must differ. Use "
        "--stage-b.optimization.batch-size 64 --stage-c.optimization.batch-size 64, or more images, or fit "
        "everything with --fit-images 119."
    )
    refuse_small(full, "mine", 512, whole=False)
    refuse_small(full, "another", 1, whole=False)
    odd = with_optimization(full.stage_c, images=1000, batch_size=500)
    with pytest.raises(UserError, match=r"--stage-c\.optimization\.images 960, or more"):
        refuse_small(
            dataclasses.replace(full, stages=("c",), start_from="x", stage_c=odd), "mine", 100, whole=True
        )


def test_the_image_cache_is_no_larger_than_needed():
    small = dataclasses.replace(tiny(), prepared_images=2000)
    assert cached_images(small, "sample", 128) == 2000  # Stages A and C use 2400
    assert cached_images(dataclasses.replace(small, prepared_images=9000), "sample", 128) == 2400
    said, _ = overview(small, {"sample": EmojiSource(sample_root(), split="train", centred=CENTRED)}, None)
    assert said[-1].endswith(", from a cache of 2,000 images composed at the start")

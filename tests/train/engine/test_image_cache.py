"""Pictures held on the device: the same pictures, and a run on them that a kill does not change."""

import dataclasses

import numpy as np
import pytest
import torch

from wuerstchen.data.caption_files import CaptionFile
from wuerstchen.data.plan import item_at, items_at
from wuerstchen.errors import UserError
from wuerstchen.train.engine.checkpoint import newest, read_averages
from wuerstchen.train.engine.distributed import Processes
from wuerstchen.train.engine.image_cache import ImageCache, InputCache, fill_image_cache
from wuerstchen.train.engine.loop import Trainer
from wuerstchen.train.feed.images import Feed
from wuerstchen.train.report.events import Log

from .test_loop import make_job

CPU = torch.device("cpu")


def run(folder, stage, settings, source, device=CPU, **changes):
    settings = dataclasses.replace(settings, **changes)
    folder.mkdir(exist_ok=True)
    feed = Feed(source, 5, settings.preview_size, captions=True)
    job = make_job(stage, feed, folder, settings, processes=Processes(device))
    return Trainer(job).train(fill_image_cache(feed, 30, 0, device))


def test_the_image_cache_holds_the_first_images_of_the_feed(toy_source):
    feed = Feed(toy_source(broken=(3,)), 5, 4, captions=True)
    cache = fill_image_cache(feed, 300, 0, CPU)
    assert len(cache) == len(cache.captions) == 300
    for index in (0, 7, 255, 256, 299):
        example = feed[index][1]
        assert np.array_equal(cache.images[index].numpy(), example.image)
        assert cache.captions[index] == example.caption
    assert len(cache.skipped) == 30


def test_it_keeps_what_the_stage_prepares_and_images_only_if_they_are_read(toy_stage, toy_source):
    stage = toy_stage()
    cache = fill_image_cache(Feed(toy_source(), 5, 4, captions=True), 300, 0, CPU)
    inputs = cache.prepare(stage, dtype=None)
    assert inputs.keys() == {"first", "images"}
    torch.testing.assert_close(inputs["first"], cache.images[:, 0, 0, 0].float() / 255)
    assert inputs["images"].data_ptr() == cache.images.data_ptr()  # 20 GB are not copied
    stage.reads_images = False
    assert cache.prepare(stage, dtype=None).keys() == {"first"}
    captions = []
    stage.prepare = lambda batch, device: captions.extend(batch.captions) or {}
    cache.prepare(stage, dtype=None)
    assert captions == cache.captions != captions[::-1]


def test_the_black_images_of_captions_are_not_stored(toy_stage, tmp_path):
    file = tmp_path / "captions.txt"
    file.write_text("\n".join(f"thing {number}" for number in range(90)))
    feed, stage, seen = Feed(CaptionFile(file), 5, 64, captions=True), toy_stage(), []
    cache = fill_image_cache(feed, 2000, 0, CPU)
    assert cache.images.untyped_storage().nbytes() == 3
    assert cache.images.shape == (2000, 64, 64, 3)
    assert cache.captions == [feed[index][1].caption for index in range(2000)]
    assert cache.names[:9] == cache.captions[:9]
    stage.reads_images = False
    stage.prepare = lambda batch, device: (seen.append(batch), {"first": batch.indices.float()})[1]
    assert cache.prepare(stage, dtype=None)["first"].tolist() == list(range(2000))
    assert [batch.images.shape for batch in seen] == [(1024, 64, 64, 3), (976, 64, 64, 3)]


def test_every_epoch_shows_every_image_of_the_image_cache_once():
    assert sorted(items_at(range(30, 60), 30, 1)) == list(range(30))
    assert items_at(range(25, 35), 30, 1) == [item_at(i, 30, 1) for i in range(25, 35)]


def test_images_of_the_image_cache_come_shuffled(tmp_path, toy_stage, toy_source, settings, monkeypatch):
    """In another order in every epoch and with every seed; each image once per epoch."""
    prepare = ImageCache.prepare

    def numbered(cache, *given):
        inputs = prepare(cache, *given)
        return {**inputs, "images": torch.zeros_like(inputs["images"]), "first": torch.arange(30.0)}

    monkeypatch.setattr(ImageCache, "prepare", numbered)
    orders = []
    for seed in (0, 1):
        stage, rows = toy_stage(images=60, batch_size=6), []
        losses = stage.losses
        stage.losses = lambda inputs, random, r=rows, f=losses: (
            r.extend(inputs["first"].tolist()),
            f(inputs, random),
        )[1]
        run(tmp_path / str(seed), stage, settings, toy_source(), seed=seed)
        orders += [rows[:30], rows[30:]]
    assert all(sorted(order) == list(range(30)) for order in orders)
    assert len({tuple(order) for order in (*orders, sorted(orders[0]))}) == 5


def test_a_broken_run_on_an_image_cache_ends_as_the_unbroken_one(tmp_path, toy_stage, toy_source, settings):
    """Values are read every third update only: what is not read must happen all the same."""
    whole = run(tmp_path / "whole", toy_stage(images=122), settings, toy_source(), log_every=3)

    def stop(random):
        if 50 in random.indices.tolist():
            raise SystemExit

    stage = toy_stage(images=122, on_batch=stop)
    with pytest.raises(SystemExit):
        run(tmp_path / "broken", stage, settings, toy_source(), checkpoint_seconds=0.0)
    broken = run(tmp_path / "broken", toy_stage(images=122), settings, toy_source())
    files = [newest(path.parent)[1]["files"] for path in (whole, broken)]
    assert files[0] == files[1]
    fed = Feed(toy_source(), 5, 4, captions=True)
    log = Log(tmp_path / "log.jsonl")
    other = Trainer(make_job(toy_stage(images=122), fed, tmp_path / "fed", settings, log=log)).train()
    assert newest(other.parent)[1]["files"] != files[0]  # an order of its own


def test_for_a_preview_that_is_owed_no_image_is_composed_and_nothing_compiled(
    tmp_path, toy_stage, toy_source, settings, monkeypatch
):
    """All were, and blocks compiled, though no update was left."""
    stage = toy_stage(images=24)

    def stopped(*_, **__):
        raise SystemExit

    stage.preview = stopped
    with pytest.raises(SystemExit):
        run(tmp_path, stage, settings, toy_source())
    monkeypatch.setattr(
        "wuerstchen.train.engine.state.compile_regions", lambda network: pytest.fail("compiled")
    )
    feed = Feed(toy_source(), 5, settings.preview_size, captions=True)
    again = dataclasses.replace(settings, compiles=True)
    trainer = Trainer(make_job(toy_stage(images=24), feed, tmp_path, again))
    assert trainer.finished  # a run then fills no cache
    trainer.train()
    assert (tmp_path / "previews" / f"{24:012d}.png").is_file()


def test_a_loss_that_is_not_finite_is_noticed_at_the_next_reading(tmp_path, toy_stage, toy_source, settings):
    stage = toy_stage()

    def poison(random):
        if 20 in random.indices.tolist():
            torch.nn.init.constant_(stage.networks["critic"].bias, torch.nan)

    stage.on_batch = poison
    with pytest.raises(UserError, match=r"the loss of model is nan at image 20 of stage A\. The weights"):
        run(tmp_path, stage, settings, toy_source(), log_every=10)
    weights = stage.networks["model"].parameters()
    assert all(bool(p.isfinite().all()) for p in weights)


def test_a_fault_between_two_readings_is_never_stored(tmp_path, toy_stage, toy_source, settings):
    """Only the update is left out: batch norms have seen it, and a checkpoint would keep what they saw."""
    stage = toy_stage()
    bias = stage.networks["critic"].bias

    def poison(random):
        if 20 in random.indices.tolist():
            bias.data.fill_(torch.nan)
        elif bool(bias.isnan().any()):
            bias.data.zero_()

    stage.on_batch = poison
    with pytest.raises(UserError, match=r"a loss or gradient was not finite at image 20 of stage A"):
        run(tmp_path, stage, settings, toy_source(), log_every=10, checkpoint_seconds=0.0)
    found = newest(tmp_path / "checkpoints")
    assert found is None or found[1]["images"] <= 20


@pytest.mark.gpu
def test_recorded_updates_are_those_that_are_run_as_written(tmp_path, toy_stage, toy_source, settings):
    """Dropout, rates that change, averages, and a last batch that is smaller; on a cache."""
    device = torch.device("cuda")
    averages = {}
    for name, records in (("written", False), ("recorded", True)):
        stage = toy_stage(images=122)
        path = run(tmp_path / name, stage, settings, toy_source(), device, records=records, log_every=10)
        averages[name] = read_averages(path, "model")
    for key, tensor in averages["written"].items():
        torch.testing.assert_close(averages["recorded"][key], tensor, rtol=1e-4, atol=1e-6)


def test_inputs_of_images_that_are_not_kept(toy_stage, toy_source):
    """The same as from a cache that keeps the images, with the images that could not be read."""
    stage = toy_stage()
    stage.reads_images = False
    source, skipped = toy_source(broken=(3,)), []
    feed = Feed(source, 5, 4, captions=True)
    cache = InputCache(feed, 40, 0, CPU, lambda name, reason: skipped.append((name, reason)))
    kept = fill_image_cache(feed, 40, 0, CPU)
    inputs = cache.prepare(stage, dtype=None)
    assert torch.equal(inputs["first"], kept.prepare(stage, dtype=None)["first"])
    assert skipped == kept.skipped != []
    assert (len(cache), cache.names) == (40, kept.names)

"""Stage C on prepared sets: what a batch holds, the same after any stop and on any number of processes."""

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wuerstchen.data.folder import FolderSource
from wuerstchen.data.open import open_source
from wuerstchen.data.plan import held_out_names, item_at
from wuerstchen.data.prepare import prepare
from wuerstchen.data.prepare_networks import Networks
from wuerstchen.data.prepare_plan import PrepareConfig
from wuerstchen.data.prepared import PreparedSet
from wuerstchen.data.prepared_check import is_prepared
from wuerstchen.data.readers import FolderReader
from wuerstchen.errors import DataError, UserError
from wuerstchen.images import open_image, resize_crop
from wuerstchen.recipes.tiny import tiny
from wuerstchen.train.engine.checkpoint import newest
from wuerstchen.train.engine.distributed import Processes
from wuerstchen.train.engine.ema import make_average
from wuerstchen.train.engine.job import StageJob
from wuerstchen.train.engine.loop import Trainer
from wuerstchen.train.engine.validation import IMAGES, Validation, held_out
from wuerstchen.train.feed.images import Batch, batches
from wuerstchen.train.feed.prepared import (
    HeldOutLatents,
    PreparedFeed,
    StoredBatch,
    check_prepared,
    refuse_prepared,
    some_latents,
)
from wuerstchen.train.feed.random import ImageRandom
from wuerstchen.train.report.events import Log
from wuerstchen.train.stage_table import kind_of
from wuerstchen.train.stages.prior import StageC, measure_statistics, measure_stored_statistics

from ...configurations import with_lite0, with_optimization

CPU = torch.device("cpu")
RECIPE = tiny()
WIDE, TALL = (250, 100), (100, 250)


@pytest.fixture(scope="module")
def cascade(small_cascade):
    found = with_lite0(copy.deepcopy(small_cascade))
    found.compressor.eval()
    return found


def write_photos(folder: Path, count: int) -> Path:
    """Noise of three shapes, every other with two captions."""
    folder.mkdir()
    lines = []
    for number in range(count):
        size = ((128, 128), WIDE, TALL)[number % 3]
        noise = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(size).save(folder / f"x{number}.png")
        texts = [f"thing {number}", "another"] if number % 2 == 0 else f"thing {number}"
        lines.append(json.dumps({"file_name": f"x{number}.png", "text": texts}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos") / "photos", 110)


def make(photos: Path, out: Path, cascade, **changes) -> PreparedSet:
    networks = Networks(
        compressor=cascade.compressor, text_encoder=cascade.text_encoder, settings=cascade.settings
    )
    config = PrepareConfig(**{"size": 256, "max_ratio": 4.0, "crop": "random", "crops": 3, **changes})
    prepare(FolderReader(photos), out, networks, config)
    return PreparedSet(out)


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    return write_photos(tmp_path_factory.mktemp("few") / "photos", 24)


@pytest.fixture(scope="module")
def prepared(photos, cascade, tmp_path_factory) -> PreparedSet:
    return make(photos, tmp_path_factory.mktemp("set") / "out", cascade, text_states="fp16")


def make_stage(cascade, images: int = 48, batch_size: int = 4) -> StageC:
    torch.manual_seed(1)
    config = with_optimization(RECIPE.stage_c, images=images, batch_size=batch_size)
    return StageC(config, RECIPE, dataclasses.replace(cascade, prior=copy.deepcopy(cascade.prior)))


def loss(stage: StageC, inputs, random: ImageRandom) -> float:
    stage.prior.eval()  # no dropout
    return next(stage.losses(inputs, random))[1].item()


def same(one: StoredBatch, other: StoredBatch) -> bool:
    return (
        torch.equal(one.indices, other.indices)
        and torch.equal(one.semantic_latents, other.semantic_latents)
        and [t.tolist() for t in one.tokens] == [t.tolist() for t in other.tokens]
    )


def test_batches_are_of_one_size_and_show_no_image_twice_or_held_out(prepared):
    feed = PreparedFeed(prepared, 3, 400, 4)
    names = {prepared.name(row) for row in range(len(prepared))}
    hidden = held_out_names(names)
    assert 0 < len(hidden) < 20
    assert {prepared.name(int(row)) for row in feed.rows} == names - hidden
    shapes, crops = set(), set()
    epoch = feed.plan.before(1) * 4
    for number, batch in enumerate(batches(feed, 0, epoch, 4, 0)):
        shapes.add(tuple(batch.semantic_latents.shape[1:]))
        for index, found, tokens in zip(
            batch.indices.tolist(), batch.semantic_latents, batch.tokens, strict=True
        ):
            row = int(feed.rows[feed.plan.ids(number)[index % 4]])
            # One of its own crops with one of its own captions.
            own = [np.array_equal(prepared.semantic_latents(row, crop), found.numpy()) for crop in range(3)]
            assert any(own)
            crops.add(own.index(True))
            texts = [prepared.tokens(row, i).tolist() for i in range(len(prepared.captions(row)))]
            assert tokens.tolist() in texts
    assert shapes == {(2, 6, 6), (2, 12, 3), (2, 3, 12)}
    assert crops == {0, 1, 2}


def test_sizes_with_fewer_images_than_a_batch_are_used_and_reported(prepared):
    feed = PreparedFeed(prepared, 3, 960, 60)  # each of the three sizes has 36 of the 108 images, or fewer
    batches_of_epoch = list(batches(feed, 0, feed.plan.before(1) * 60, 60, 0))
    assert {tuple(batch.semantic_latents.shape[1:]) for batch in batches_of_epoch} == {
        (2, 6, 6),
        (2, 12, 3),
        (2, 3, 12),
    }
    rows = {int(feed.rows[item]) for number in range(3) for item in feed.plan.ids(number)}
    assert rows == set(feed.rows.tolist())  # every image in the first epoch
    counts = np.bincount(prepared.bucket_ids[feed.rows]).tolist()
    assert feed.epoch() == [
        f"{size}: {count} images, fewer than the batch size of 60, so about every {60 / count:.3g} epochs "
        f"one batch repeats each image about {60 / count:.3g} times"
        for size, count in zip(("128x512", "256x256", "512x128"), [c for c in counts if c], strict=True)
    ]
    whole = PreparedFeed(prepared, 3, 500, 25).epoch()
    assert whole[1] == (
        f"256x256: {counts[prepared.buckets.index((256, 256))]} images, 1 batch per epoch. "
        f"{counts[prepared.buckets.index((256, 256))] - 25} are left over in each epoch, "
        "different ones each time"
    )


def test_crops_and_captions_change_from_epoch_to_epoch(prepared):
    feed = PreparedFeed(prepared, 3, 4000, 4)
    row, shown = [prepared.name(row) for row in range(110)].index("x4.png"), set()
    for batch in range(feed.plan.before(12)):
        for position in np.flatnonzero(feed.rows[feed.plan.ids(batch)] == row):
            _, image, _ = feed[batch * 4 + int(position)]
            shown.add((image.semantic_latents.tobytes(), tuple(image.tokens)))
    assert len(shown) > 3  # of three crops and two captions


def test_any_start_and_any_number_of_processes_give_the_same(prepared):
    feed = PreparedFeed(prepared, 3, 48, 4)
    whole = list(batches(feed, 0, 48, 4, 0))
    resumed = list(batches(PreparedFeed(prepared, 3, 48, 4), 32, 48, 4, 1))
    assert all(same(a, b) for a, b in zip(whole[8:], resumed, strict=True))
    shares = [list(batches(feed, 0, 48, 4, 0, Processes(CPU, rank, 2).rank_slice)) for rank in range(2)]
    for batch, first, second in zip(whole, *shares, strict=True):
        assert torch.equal(
            batch.semantic_latents, torch.cat([first.semantic_latents, second.semantic_latents])
        )
        assert torch.equal(batch.indices, torch.cat([first.indices, second.indices]))
    other = list(batches(PreparedFeed(prepared, 4, 48, 4), 0, 48, 4, 0))
    assert not any(same(a, b) for a, b in zip(whole, other, strict=True))


def test_the_stage_gets_the_same_inputs_as_from_images(few, cascade, tmp_path):
    """Centred squares, which the stage's own compressor and text encoder are given too."""
    square = make(few, tmp_path / "out", cascade, size=128, max_ratio=1.0, crop="centre", crops=1)
    stage, feed = make_stage(cascade), PreparedFeed(square, 0, 48, 4)
    (batch,) = batches(feed, 0, 4, 4, 0)
    rows = [int(feed.rows[item]) for item in feed.plan.ids(0)]
    pictures = [np.array(resize_crop(open_image(few / square.name(r)), 128, 128)) for r in rows]
    captions = []
    for row, tokens in zip(rows, batch.tokens, strict=True):
        (caption,) = (
            text
            for choice, text in enumerate(square.captions(row))
            if square.tokens(row, choice).tolist() == tokens.tolist()
        )
        captions.append(caption)
    images = torch.from_numpy(np.stack(pictures))
    with torch.no_grad():
        expected = stage.prepare(Batch(batch.indices, images, captions, []), CPU)
        found = stage.prepare_stored(batch, CPU)
    assert found.keys() == expected.keys()
    assert (found["x"] - expected["x"]).abs().max() < 2e-3 * expected["x"].abs().max()
    assert torch.equal(found["mask"], expected["mask"])
    assert torch.equal(found["states"], expected["states"])


@pytest.mark.parametrize("kept", ["fp16", "int8"])
@pytest.mark.parametrize("positions", ["real", "all"])
def test_stored_states_are_those_of_the_tokens(few, cascade, tmp_path, kept, positions):
    found = make(few, tmp_path / "out", cascade, crops=1, text_states=kept, text_positions=positions)
    stage = make_stage(cascade)
    (stored,) = batches(PreparedFeed(found, 0, 4, 4, "states"), 0, 4, 4, 0)
    (tokens,) = batches(PreparedFeed(found, 0, 4, 4, "tokens"), 0, 4, 4, 0)
    assert same(stored, tokens)
    with torch.no_grad():
        ours, theirs = stage.prepare_stored(stored, CPU), stage.prepare_stored(tokens, CPU)
    assert torch.equal(ours["mask"], theirs["mask"])
    assert ours["states"].shape == theirs["states"].shape
    seen = torch.ones_like(ours["mask"]) if positions == "all" else ours["mask"]
    scale = theirs["states"].abs().amax(-1, keepdim=True)
    error = (ours["states"] - theirs["states"]).abs() / scale
    assert error[seen].max() < (0.51 / 127 if kept == "int8" else 1e-3)
    # Hidden padding says nothing, so the losses agree whatever stands there.
    random = ImageRandom(0, stored.indices)
    losses = [loss(stage, inputs, random) for inputs in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_captions_are_dropped_by_image(prepared, cascade):
    stage = make_stage(cascade)
    stage.config = dataclasses.replace(stage.config, caption_dropout=1.0)
    (batch,) = batches(PreparedFeed(prepared, 0, 4, 4, "states"), 0, 4, 4, 0)
    with torch.no_grad():
        inputs = stage.prepare_stored(batch, CPU)
    random = ImageRandom(0, batch.indices)
    before = loss(stage, inputs, random)
    changed = {**inputs, "states": inputs["states"] + 7, "mask": ~inputs["mask"]}
    assert loss(stage, changed, random) == before
    stage.config = dataclasses.replace(stage.config, caption_dropout=0.0)
    assert loss(stage, changed, random) != before


# Damage


class Damaged(PreparedSet):
    """Names in ``broken`` hold NaN in their states, as far as anyone can tell."""

    broken: tuple[str, ...] = ()

    def semantic_latents(self, index, crop=0):
        if self.name(index) in self.broken:
            raise DataError(f"{self.name(index)} holds NaN")
        return super().semantic_latents(index, crop)


def test_unreadable_images_are_replaced_by_the_next_of_the_same_size(prepared):
    damaged = Damaged(prepared.folder)
    feed = PreparedFeed(damaged, 3, 48, 4)
    rows = feed.rows[feed.plan.ids(1)]
    damaged.broken = (damaged.name(int(rows[2])),)
    whole, skipped = list(batches(PreparedFeed(prepared, 3, 48, 4), 0, 48, 4, 0)), []
    for number, (batch, fine) in enumerate(zip(batches(feed, 0, 48, 4, 1), whole, strict=True)):
        skipped += batch.skipped
        if number == 1:
            kept = [0, 1, 3]
            assert torch.equal(batch.semantic_latents[kept], fine.semantic_latents[kept])
            bucket = [r for r in feed.rows if damaged.bucket_ids[r] == damaged.bucket_ids[rows[2]]]
            successor = int(bucket[(bucket.index(rows[2]) + 1) % len(bucket)])
            crops = [torch.tensor(damaged.semantic_latents(successor, crop)) for crop in range(3)]
            assert any(torch.equal(batch.semantic_latents[2], crop) for crop in crops)
    assert skipped
    assert set(skipped) == {(damaged.broken[0], f"{damaged.broken[0]} holds NaN")}
    damaged.broken = tuple(damaged.name(row) for row in range(len(damaged)))
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"^none of the \d+ images of a size can be read, the last"):
            list(batches(feed, 0, 4, 4, workers))


def job_of(stage, feed, folder, settings, log) -> StageJob:
    return StageJob(
        stage=stage, feed=feed, folder=folder, settings=settings, processes=Processes(CPU), log=log
    )


def test_nan_in_stored_states_is_skipped_counted_and_named(few, cascade, tmp_path, settings):
    made = make(few, tmp_path / "out", cascade, crops=1, text_states="fp16")
    feed = PreparedFeed(made, 0, 48, 4, "states")
    row = int(feed.rows[feed.plan.ids(0)[1]])
    name, choice = made.name(row), int(feed[1][1].tokens.tolist() != made.tokens(row, 0).tolist())
    stored = made.states(row, choice).astype(np.float16).tobytes()
    (path,) = [p for p in (made.folder / "texts").glob("*.arrow") if stored in p.read_bytes()]
    nan = np.array(np.nan, np.float16).tobytes()
    path.write_bytes(path.read_bytes().replace(stored, nan + stored[2:]))
    feed = PreparedFeed(PreparedSet(made.folder, verify=False), 0, 48, 4, "states")
    log = Log(tmp_path / "log.jsonl")
    stage = make_stage(cascade, images=4)
    Trainer(job_of(stage, feed, tmp_path / "run", settings, log)).train()
    (event,) = [event for event in log.events() if event["event"] == "skipped"]
    assert event["name"] == name
    assert "its text states contain NaN" in event["reason"]


# Runs


class Stops(PreparedFeed):
    """Raises at an image: the process is gone as far as the loop can tell."""

    def __getitem__(self, index):
        if index == 29:
            raise SystemExit
        return super().__getitem__(index)


@pytest.mark.parametrize("texts", ["tokens", "states"])
def test_a_broken_run_ends_as_the_unbroken_one(prepared, cascade, tmp_path, settings, texts):
    def run(folder, feed, **changes):
        log = Log(tmp_path / f"{folder}.jsonl")
        stage = make_stage(cascade)
        job = job_of(stage, feed, tmp_path / folder, dataclasses.replace(settings, **changes), log)
        return Trainer(job).train(), log

    whole, _ = run("whole", PreparedFeed(prepared, 5, 48, 4, texts))
    with pytest.raises(SystemExit):
        run("broken", Stops(prepared, 5, 48, 4, texts), checkpoint_seconds=0.0)
    broken, log = run("broken", PreparedFeed(prepared, 5, 48, 4, texts), workers=1)
    assert [event["images"] for event in log.events() if event["event"] == "start"] == [0, 28]
    assert newest(broken.parent)[1]["files"] == newest(whole.parent)[1]["files"]
    other, _ = run("other", PreparedFeed(prepared, 6, 48, 4, texts))
    assert newest(other.parent)[1]["files"] != newest(whole.parent)[1]["files"]


# Held out and measured


def test_the_held_out_part_is_that_of_the_folder(photos, prepared):
    folder = FolderSource(photos, split="heldout")
    names = {folder.name(item) for item in range(len(folder))}
    assert names
    assert {prepared.name(int(row)) for row in prepared.rows("heldout")} == names
    assert len(prepared.rows("train")) == 110 - len(names)


def test_a_small_set_holds_out_none(cascade, tmp_path):
    small = make(write_photos(tmp_path / "photos", 9), tmp_path / "out", cascade)
    assert len(small.rows("train")) == 9
    assert len(small.rows("heldout")) == 0
    assert held_out(open_source(str(tmp_path / "out"), "heldout", verify=False), 256) is None


def test_validation_by_hand(prepared, cascade, monkeypatch):
    pictures = held_out(open_source(str(prepared.folder), "heldout", verify=False), 256)
    assert isinstance(pictures, HeldOutLatents)
    assert len(pictures) == min(len(prepared.rows("heldout")), IMAGES)
    assert len(HeldOutLatents(prepared, 0, 1)) == 1
    found = list(pictures.batches(2))
    assert torch.cat([batch.indices for batch in found]).tolist() == list(range(len(pictures)))
    shown = {
        batch.semantic_latents[i].numpy().tobytes()
        for batch in found
        for i in range(len(batch.semantic_latents))
    }
    stored = {
        prepared.semantic_latents(int(r), c).tobytes() for r in prepared.rows("heldout") for c in range(3)
    }
    assert shown <= stored

    stage = make_stage(cascade)
    averages = {"prior": make_average(stage.prior)}
    validation = Validation(stage, pictures, dtype=None, device=CPU)
    first = validation(averages)
    assert all(0 < value < 10 for value in first["bins"])
    assert Validation(stage, pictures, dtype=None, device=CPU)(averages) == first
    monkeypatch.setattr(StageC, "predict", lambda self, averages, inputs, x, t: torch.zeros_like(x))
    errors = Validation(stage, pictures, dtype=None, device=CPU)(averages)["bins"]
    expected = 0.0
    for batch in found:
        noise = ImageRandom(0, batch.indices).normal("validation 3", batch.semantic_latents.shape[1:])
        expected += noise.square().flatten(1).mean(1).sum().item()
    assert errors[3] == pytest.approx(expected / len(pictures), rel=1e-5)


def test_statistics_equal_those_of_the_images(few, cascade, tmp_path):
    square = make(few, tmp_path / "out", cascade, size=128, max_ratio=1.0, crop="centre", crops=1)
    rows = square.rows("train")
    names = [square.name(int(row)) for row in rows]
    pictures = [np.array(resize_crop(open_image(few / name), 128, 128)) for name in names]
    images = torch.from_numpy(np.stack(pictures))
    batch = Batch(torch.arange(len(rows)), images, [""] * len(rows), [])
    expected = measure_statistics(cascade.compressor, iter([batch]), CPU)
    # Once through, in another order.
    found = measure_stored_statistics(some_latents(square, len(rows), 7))
    assert found.mean == pytest.approx(expected.mean, rel=1e-3, abs=1e-3)
    assert found.std == pytest.approx(expected.std, rel=1e-3)


def test_statistics_of_several_sizes_and_of_none(prepared):
    maps = list(some_latents(prepared, 30, 0))
    assert len({found.shape for found in maps}) > 1
    columns = np.concatenate([found.reshape(2, -1) for found in maps], axis=1).astype(np.float64)
    found = measure_stored_statistics(iter(maps))
    assert found.mean == pytest.approx(columns.mean(1))
    assert found.std == pytest.approx(columns.std(1, ddof=1))
    row = int(prepared.rows("train")[item_at(0, len(prepared.rows("train")), 0)])  # of the first map
    others = list(some_latents(prepared, 30, 0, [prepared.name(row)]))
    assert [found.tobytes() for found in others] == [found.tobytes() for found in maps[1:]]
    damaged = Damaged(prepared.folder)
    damaged.broken = tuple(damaged.name(row) for row in range(len(damaged)))
    with pytest.raises(DataError, match="no semantic latents of the prepared set can be read"):
        measure_stored_statistics(some_latents(damaged, 30, 0))
    with pytest.raises(UserError, match=r"is at most 0\.001\. Below 0\.1 they contain no information"):
        measure_stored_statistics([np.zeros((2, 3, 3), np.float16)])


# What makes no sense


def test_incomplete_batches_are_refused(prepared):
    with pytest.raises(
        UserError, match=r"images must be a multiple of batch_size=4 .* got 50\. Use 48 images"
    ):
        PreparedFeed(prepared, 0, 50, 4)


def test_stages_that_need_images():
    reasons = {stage: kind_of(stage).needs_images for stage in "abc"}
    with pytest.raises(
        UserError, match=r"data=set is a prepared set, which has no images, and Stage B trains the compressor"
    ):
        refuse_prepared("set", reasons["b"])
    with pytest.raises(UserError, match=r"Stage A learns from pixels\. Use the images, or train only c"):
        refuse_prepared("set", reasons["a"])
    with pytest.raises(UserError, match=r"prepared_images must be 0 .* got 9: data=set"):
        refuse_prepared("set", reasons["c"], 9)
    refuse_prepared("set", reasons["c"])


def test_sets_of_another_kind(prepared, few, cascade, tmp_path):
    bare = make(few, tmp_path / "out", cascade, crops=1)

    def check(prepared=prepared, **changes):
        settings = {
            "compressor": cascade.compressor,
            "text_encoder": cascade.text_encoder,
            "view_scale": 0.75,
            "image_size": 256,
            "texts": "states",
            "text_positions": "real",
        }
        check_prepared(prepared, **{**settings, **changes})

    check()
    check(bare, texts="tokens", text_positions="all")
    other = copy.deepcopy(cascade.compressor)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(UserError, match=r"made with another compressor\. Prepare it with this model"):
        check(compressor=other)
    with pytest.raises(UserError, match=r"was prepared at view_scale 0\.75, and the model has 1\.0"):
        check(view_scale=1.0)
    with pytest.raises(
        UserError, match=r"image_size must be 256 for .* 3 sizes have about 256x256 pixels, got 128\. Use 256"
    ):
        check(image_size=128)
    with pytest.raises(
        UserError, match=r"needs stored text states, .* Use tokens, or prepare it with --text-states"
    ):
        check(bare)
    with pytest.raises(UserError, match=r"text_positions=all needs the states of padding"):
        check(text_positions="all")


def test_folders_that_are_prepared_sets(prepared, photos, tmp_path):
    assert is_prepared(prepared.folder)
    assert not is_prepared(photos)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "plan.json").write_text("{}")
    assert is_prepared(tmp_path)
    with pytest.raises(DataError, match="it is not finished"):
        held_out(open_source(str(tmp_path), "heldout", verify=False), 256)

"""Previews and validation never end a run, nothing is lost by them, and the best checkpoint stays."""

import gc
import weakref

import pytest
import torch

from wuerstchen.errors import UserError, out_of_memory_named
from wuerstchen.train.engine.checkpoint import best_of, newest
from wuerstchen.train.engine.observe import LessMemoryWarning, SkippedWarning
from wuerstchen.train.engine.saving import CheckpointSaver
from wuerstchen.train.engine.validation import Validation

from .test_loop import digests, run


class Losses(Validation):
    """A validation that finds given losses, one a call; an error among them is raised."""

    def __init__(self, *losses) -> None:
        self.losses = list(losses)

    @property
    def due(self) -> bool:
        return False

    def __call__(self, averages):
        loss = self.losses.pop(0)
        if isinstance(loss, BaseException):
            raise loss
        return {"loss": loss, "bins": [loss]}


def images_of(log, kind: str) -> list[int]:
    return [event["images"] for event in log.events() if event["event"] == kind]


def test_a_preview_without_memory_is_drawn_with_less(tmp_path, toy_stage, toy_source, settings):
    """It was skipped, and so were all after it. Drawing names what does not fit in an error of its own."""
    stage, ways, held = toy_stage(), [], []
    draws = stage.preview

    def preview(*given, low_memory):
        ways.append(low_memory)
        assert not any(reference() for reference in held)
        if not low_memory:
            large = torch.zeros(10)
            held.append(weakref.ref(large))
            with out_of_memory_named("batch_size=2"):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return draws(*given)

    stage.preview = preview
    with pytest.warns(
        LessMemoryWarning, match="the preview at image 40 of stage A ran out of memory"
    ) as warned:
        short, log = run(tmp_path / "short", stage, toy_source(), settings, preview_every=40)
    assert len(warned) == 1
    assert ways == [False, True, True, True]
    assert images_of(log, "preview with less memory") == [40]
    assert images_of(log, "preview") == [40, 80, 120]
    whole, _ = run(tmp_path / "whole", toy_stage(), toy_source(), settings)
    assert digests(short) == digests(whole)


def test_a_preview_without_memory_is_skipped_and_the_run_goes_on(tmp_path, toy_stage, toy_source, settings):
    """It ended the run, at every start again, with a message about the batch."""
    stage, held, seen = toy_stage(), [], []

    def preview(averages, pixels, device, *, low_memory):
        seen.append(newest(tmp_path / "short" / "checkpoints")[1]["images"])
        large = torch.zeros(10)
        held.append(weakref.ref(large))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    stage.preview = preview
    with pytest.warns((LessMemoryWarning, SkippedWarning)) as warned:
        short, log = run(tmp_path / "short", stage, toy_source(), settings, preview_every=40)
    said = str(warned[1].message)  # the first is of the other way to draw
    assert said.startswith("the preview at image 40 of stage A was skipped: out of memory. Training goes on")
    assert all(option in said for option in ("--preview-every", "--preview-prompts", "--recompute"))
    assert "batch" not in said
    assert seen == [40, 40, 80, 120]  # twice at first; a checkpoint of that moment was whole before
    assert images_of(log, "preview skipped") == [40, 80, 120]
    gc.collect()
    assert not any(reference() for reference in held)
    whole, _ = run(tmp_path / "whole", toy_stage(), toy_source(), settings)
    assert digests(short) == digests(whole)


@pytest.mark.parametrize("error", [MemoryError(), UserError("the disk is full"), ValueError("odd")])
def test_whatever_happens_in_a_validation_it_does_not_end_the_run(
    error, tmp_path, toy_stage, toy_source, settings
):
    with pytest.warns(SkippedWarning, match="validation at image 60 of stage A was skipped") as warned:
        _, log = run(
            tmp_path, toy_stage(), toy_source(), settings, validation=Losses(error, 1.0), preview_every=60
        )
    assert ("--preview-every" in str(warned[0].message)) == isinstance(error, MemoryError)
    assert images_of(log, "validation") == [120]
    assert images_of(log, "preview") == [60, 120]


@pytest.mark.parametrize("images", [60, 120])
@pytest.mark.parametrize("killed_in", ["preview", "validation"])
def test_what_a_kill_prevents_is_made_up_for(images, killed_in, tmp_path, toy_stage, toy_source, settings):
    """The last preview and validation were lost for good."""
    stage = toy_stage()
    draws, count = stage.preview, images // 60 - 1
    losses = Losses(*[1.0] * count, SystemExit())
    if killed_in == "preview":
        calls = iter([False] * count + [True])

        def preview(*given, **named):
            if next(calls):
                raise SystemExit
            return draws(*given, **named)

        stage.preview = preview
    with pytest.raises(SystemExit):
        run(tmp_path, stage, toy_source(), settings, validation=losses, preview_every=60)
    assert newest(tmp_path / "checkpoints")[1]["images"] == images
    for _ in range(2):  # once, and not once more
        again = Losses(0.5, 0.4)
        _, log = run(tmp_path, toy_stage(), toy_source(), settings, validation=again, preview_every=60)
    assert images_of(log, "preview") == [60, 120]
    assert images_of(log, "validation") == [60, 120]
    assert sorted(path.stem for path in (tmp_path / "previews").iterdir()) == [f"{n:012d}" for n in (60, 120)]


class Due(Losses):
    """It would take so little time that every checkpoint may have one."""

    @property
    def due(self) -> bool:
        return True


def test_validations_at_given_points_only(tmp_path, toy_stage, toy_source, settings):
    """The best checkpoint would else depend on the time that previews and checkpoints take."""
    given = {"preview_every": 60, "validate_every": 40, "checkpoint_seconds": 0.0}
    _, log = run(tmp_path, toy_stage(), toy_source(), settings, validation=Due(2.0, 1.0, 3.0), **given)
    assert images_of(log, "preview") == [60, 120]
    assert images_of(log, "validation") == [40, 80, 120]
    assert best_of(tmp_path / "checkpoints") == {"images": 80, "loss": 1.0}


@pytest.mark.parametrize("images", [40, 80, 120])
def test_a_validation_at_a_given_point_is_made_up_for(images, tmp_path, toy_stage, toy_source, settings):
    given = {"preview_every": 60, "validate_every": 40}
    losses = Losses(*[1.0] * (images // 40 - 1), SystemExit())
    with pytest.raises(SystemExit):
        run(tmp_path, toy_stage(), toy_source(), settings, validation=losses, **given)
    assert newest(tmp_path / "checkpoints")[1]["images"] == images
    for _ in range(2):
        again = Losses(0.5, 0.4, 0.3)
        _, log = run(tmp_path, toy_stage(), toy_source(), settings, validation=again, **given)
    assert images_of(log, "validation") == [40, 80, 120]
    assert images_of(log, "preview") == [60, 120]


def test_the_checkpoint_with_the_lowest_validation_loss_stays(tmp_path, toy_stage, toy_source, settings):
    losses = Losses(0.9, 0.3, 0.5, None, 0.4, 0.6)
    run(tmp_path, toy_stage(), toy_source(), settings, validation=losses, preview_every=20)
    assert best_of(tmp_path / "checkpoints") == {"images": 40, "loss": 0.3}
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.is_dir())
    assert kept == [40, 100, 120]


def test_a_validation_without_its_checkpoint_is_not_the_best(
    tmp_path, toy_stage, toy_source, settings, monkeypatch
):
    """Its number would keep a folder that is not there, and free the one before."""
    whole = CheckpointSaver.is_complete
    monkeypatch.setattr(
        CheckpointSaver, "is_complete", lambda saving, images: images != 40 and whole(saving, images)
    )
    losses = Losses(0.9, 0.3, 0.5, 0.7, 0.6, 0.8)
    run(tmp_path, toy_stage(), toy_source(), settings, validation=losses, preview_every=20)
    assert best_of(tmp_path / "checkpoints") == {"images": 60, "loss": 0.5}


def test_milestones_stay(tmp_path, toy_stage, toy_source, settings):
    """At each multiple, which batches of 4 meet or pass."""
    _, log = run(tmp_path, toy_stage(), toy_source(), settings, keep_every=30)
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [32, 60, 92, 120]
    assert images_of(log, "checkpoint") == kept


def test_a_milestone_found_damaged_is_made_again(tmp_path, toy_stage, toy_source, settings):
    whole, _ = run(tmp_path, toy_stage(), toy_source(), settings, keep_every=30)
    expected = digests(whole)
    for images in (92, 120):
        (tmp_path / "checkpoints" / f"{images:012d}" / "networks.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="damaged"):
        again, _ = run(tmp_path, toy_stage(), toy_source(), settings, keep_every=30)
    assert digests(again) == expected
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [32, 60, 92, 120]

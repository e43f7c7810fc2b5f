"""The loop: what it computes does not depend on where it was stopped."""

import dataclasses
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from wuerstchen.errors import CheckpointError, UserError
from wuerstchen.image_files import read_settings
from wuerstchen.train.engine import checkpoint_writer, loop
from wuerstchen.train.engine.checkpoint import newest, read_averages
from wuerstchen.train.engine.distributed import Processes
from wuerstchen.train.engine.job import StageJob
from wuerstchen.train.engine.loop import Interrupted, Trainer
from wuerstchen.train.engine.saving import CheckpointNotWrittenWarning
from wuerstchen.train.feed.images import Feed
from wuerstchen.train.report.events import Log

CPU = torch.device("cpu")


def make_job(stage, feed, folder, settings, **more) -> StageJob:
    """A stage to train in this process, with a log in the folder unless another is given."""
    given = {"processes": Processes(CPU), "log": Log(folder / "log.jsonl"), **more}
    return StageJob(stage=stage, feed=feed, folder=folder, settings=settings, **given)


def run(folder: Path, stage, source, settings, validation=None, **changes):
    settings = dataclasses.replace(settings, **changes)
    log = Log(folder / "log.jsonl")
    folder.mkdir(exist_ok=True)
    feed = Feed(source, 5, settings.preview_size, stage.captions)
    more = {"log": log, "header": {"recipe": "toy"}, "validation": validation}
    return Trainer(make_job(stage, feed, folder, settings, **more)).train(), log


def digests(checkpoint: Path) -> dict[str, str]:
    found = newest(checkpoint.parent)
    assert found is not None
    assert found[0] == checkpoint
    return found[1]["files"]


class StopAt:
    """Raises at an image: the process is gone as far as the loop can tell."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __call__(self, batch) -> None:
        if self.index in batch.indices.tolist():
            raise SystemExit


@pytest.mark.parametrize("stops", [[2], [50], [3, 30, 31, 77, 119]])
def test_a_broken_run_ends_as_the_unbroken_one(stops, tmp_path, toy_stage, toy_source, settings):
    """Weights, averages and optimizers bit for bit, with dropout, batch norm and previews on the way."""
    whole, _ = run(tmp_path / "whole", toy_stage(), toy_source(), settings, preview_every=20)
    for stop in stops:
        with pytest.raises(SystemExit):
            run(
                tmp_path / "broken",
                toy_stage(on_batch=StopAt(stop)),
                toy_source(),
                settings,
                checkpoint_seconds=0.0,
            )
    # The last start loads images in another process and draws no previews: neither may matter.
    broken, log = run(tmp_path / "broken", toy_stage(), toy_source(), settings, workers=1)
    assert digests(broken) == digests(whole)
    starts = [event["images"] for event in log.events() if event["event"] == "start"]
    assert starts == [0, *(stop // 4 * 4 for stop in stops)]


def test_state_differs_between_seeds_and_moments(tmp_path, toy_stage, toy_source, settings):
    """The comparison above can fail."""
    one, _ = run(tmp_path / "1", toy_stage(), toy_source(), settings)
    two, _ = run(tmp_path / "2", toy_stage(), toy_source(), settings, seed=1)
    three, _ = run(tmp_path / "3", toy_stage(images=116), toy_source(), settings)
    assert len({tuple(digests(path).values()) for path in (one, two, three)}) == 3


def test_seeds_follow_from_run_stage_and_image(tmp_path, toy_stage, toy_source, settings):
    """Of dropout, of the noise, and so of all that is drawn: two that are alike draw the same."""
    seen = {}
    for name, seed in (("a", 0), ("a", 1), ("b", 0)):
        draws = seen[name, seed] = []
        stage = toy_stage(
            images=20, on_batch=lambda random, d=draws: d.append((torch.initial_seed(), random))
        )
        stage.name = name
        run(tmp_path / f"{name}{seed}", stage, toy_source(), settings, seed=seed)
    dropout = [number for draws in seen.values() for number, _ in draws]
    assert len(dropout) == len(set(dropout)) == 15
    assert len({random.seed for draws in seen.values() for _, random in draws}) == 3


def test_every_update_has_the_rates_of_its_end(tmp_path, toy_stage, toy_source, settings, monkeypatch):
    """The warmup's first update is one batch into it. A network may have a rate of its own."""
    found = []
    monkeypatch.setattr(loop, "set_rate", lambda optimizer, rate: found.append(rate))
    stage = toy_stage(images=24)
    stage.rates = {"critic": 4e-3}
    run(tmp_path, stage, toy_source(), settings)
    shares = [0.25, 0.5, 0.75, 1, 1, 1]  # batches of 4, a warmup of 16
    assert found[::2] == pytest.approx([1e-2 * share for share in shares])
    assert found[1::2] == pytest.approx([4e-3 * share for share in shares])


def test_networks_train_in_training_mode(tmp_path, toy_stage, toy_source, settings):
    stage = toy_stage(images=8)
    for network in stage.networks.values():
        network.eval()
    run(tmp_path, stage, toy_source(), settings)
    assert stage.networks["model"][1].num_batches_tracked == 2


def test_every_network_trains_and_the_average_follows(tmp_path, toy_stage, toy_source, settings):
    stage, before = toy_stage(), toy_stage()
    path, _ = run(tmp_path, stage, toy_source(), settings)
    average = read_averages(path, "model")
    weight = [stage.networks["model"][0].weight, before.networks["model"][0].weight]
    distance = [(average["0.weight"] - w).norm() for w in weight]
    assert 0 < distance[0] < distance[1]
    for name in ("model", "critic"):
        pairs = zip(stage.networks[name].parameters(), before.networks[name].parameters(), strict=True)
        assert all(not torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("every", [7, 1000])
def test_an_average_that_follows_rarely_ends_at_the_last_update(
    every, tmp_path, toy_stage, toy_source, settings
):
    """Of a stage shorter than ``ema_every`` the result was the random weights that it began with."""
    averages = []
    for folder, changes in (("each", {}), ("rarely", {"ema_every": every})):
        stage = toy_stage(images=60)
        stage.optimization = dataclasses.replace(stage.optimization, ema_decay=0.5, **changes)
        path, _ = run(tmp_path / folder, stage, toy_source(), settings)
        averages.append(read_averages(path, "model")["0.weight"])
    before, after = toy_stage().networks["model"][0].weight, stage.networks["model"][0].weight
    assert (averages[1] - after).norm() < 0.2 * (before - after).norm()
    assert (averages[1] - averages[0]).norm() < 0.2 * (before - after).norm()


def test_a_network_learns_from_its_own_loss_alone(tmp_path, toy_stage, toy_source, settings):
    """The critic sits in the model's loss; its gradient from there is not its own."""
    stage = toy_stage(images=4)
    losses = stage.losses
    stage.losses = lambda *given: (entry for entry in losses(*given) if entry[0] == "model")
    run(tmp_path, stage, toy_source(), settings)
    assert all(p.grad is None for p in stage.networks["critic"].parameters())


def test_bf16_trains_and_resumes_exactly(tmp_path, toy_stage, toy_source, settings):
    whole, _ = run(tmp_path / "whole", toy_stage(), toy_source(), settings, autocast=torch.bfloat16)
    plain, _ = run(tmp_path / "plain", toy_stage(), toy_source(), settings)
    stage = toy_stage(on_batch=StopAt(50))
    with pytest.raises(SystemExit):
        run(
            tmp_path / "broken",
            stage,
            toy_source(),
            settings,
            autocast=torch.bfloat16,
            checkpoint_seconds=0.0,
        )
    broken, _ = run(tmp_path / "broken", toy_stage(), toy_source(), settings, autocast=torch.bfloat16)
    assert digests(whole) == digests(broken) != digests(plain)


GROUP_STOP = """
import os, signal, sys
sys.path[:0] = {folders!r}
from conftest import ToySource, ToyStage
from test_loop import run
from wuerstchen.train.engine.job import Settings
from wuerstchen.train.engine.loop import Interrupted
from pathlib import Path
def stop(batch):
    if 40 in batch.indices.tolist():
        os.killpg(0, signal.SIGTERM)
settings = Settings(seed=0, autocast=None, workers=2, checkpoint_seconds=1e9, log_every=1, preview_every=0,
                    preview_size=4, previews=2)
try:
    run(Path({run!r}), ToyStage(on_batch=stop), ToySource(), settings)
except Interrupted as stopped:
    print(stopped)
"""


def test_a_signal_to_the_whole_group_leaves_a_checkpoint_too(tmp_path):
    """As a scheduler or a terminal sends it: the processes that load images must not die of it first."""
    code = GROUP_STOP.format(folders=[str(p) for p in Path(__file__).parents[:2]], run=str(tmp_path / "run"))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, start_new_session=True
    )
    assert done.stdout == "stopped at image 44 of 120 of stage A\n", done.stderr
    assert newest(tmp_path / "run" / "checkpoints")[1]["images"] == 44


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_and_a_clean_end(number, tmp_path, toy_stage, toy_source, settings):
    def interrupt(batch) -> None:
        if 40 in batch.indices.tolist():
            for _ in range(2 if number == signal.SIGTERM else 1):  # torchrun repeats what came to all
                os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="stopped at image 44 of 120"):
        run(tmp_path, toy_stage(on_batch=interrupt), toy_source(), settings)
    assert signal.getsignal(number) is before
    found = newest(tmp_path / "checkpoints")
    assert found is not None
    assert found[1]["images"] == 44
    _, log = run(tmp_path, toy_stage(), toy_source(), settings)
    assert [e["images"] for e in log.events() if e["event"] == "start"] == [0, 44]
    assert [e["images"] for e in log.events() if e["event"] == "stopped"] == [44]


def test_a_signal_in_the_last_update_is_heard_too(tmp_path, toy_stage, toy_source, settings):
    """The stage is whole by then, but what comes after it must not begin."""

    def interrupt(batch) -> None:
        if 119 in batch.indices.tolist():
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="stopped at image 120 of 120"):
        run(tmp_path, toy_stage(on_batch=interrupt), toy_source(), settings)
    _, log = run(tmp_path, toy_stage(), toy_source(), settings)
    assert [e["images"] for e in log.events() if e["event"] == "start"] == [0, 120]


def test_a_signal_after_the_last_update_is_heard_too(tmp_path, toy_stage, toy_source, settings, monkeypatch):
    """It was lost: the next stage began, and the signal had to be sent again."""
    closes = checkpoint_writer.Writer.close

    def close(writer) -> None:
        closes(writer)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(checkpoint_writer.Writer, "close", close)
    with pytest.raises(Interrupted, match="stopped at image 120 of 120") as caught:
        run(tmp_path, toy_stage(), toy_source(), settings)
    assert caught.value.images == 120
    _, log = run(tmp_path, toy_stage(), toy_source(), settings)
    assert [e["images"] for e in log.events() if e["event"] == "stopped"] == [120]


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path, toy_stage, toy_source, settings):
    stage = toy_stage()

    def poison(batch) -> None:
        if 8 in batch.indices.tolist():
            torch.nn.init.constant_(stage.networks["critic"].bias, torch.nan)

    stage.on_batch = poison
    with pytest.raises(UserError, match=r"the loss of model is nan at image 8 of stage A") as caught:
        run(tmp_path, stage, toy_source(), settings)
    assert newest(tmp_path / "checkpoints") is None
    # It says which images were in the batch, and what can be changed.
    (event,) = [e for e in Log(tmp_path / "log.jsonl").events() if e["event"] == "not finite"]
    names = Feed(toy_source(), 5, 4, True).names(range(8, 12))
    assert (event["images"], event["batch"]) == (8, names)
    said = str(caught.value)
    assert f"The batch contains {', '.join(names[:3])} and 1 more, listed in log.jsonl." in said
    assert all(f"--change {change}" in said for change in ("learning_rate=0.005", "precision=fp32", "skip+="))


def test_out_of_memory_says_size_and_batch(tmp_path, toy_stage, toy_source, settings):
    def full(batch) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(
        UserError, match=r"batch_size=4 at 4x4 pixels does not fit into memory\. Use a smaller"
    ):
        run(tmp_path, toy_stage(on_batch=full), toy_source(), settings)


def test_other_errors_are_not_taken_for_a_lack_of_memory(tmp_path, toy_stage, toy_source, settings):
    def broken(batch) -> None:
        raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match="size mismatch"):
        run(tmp_path, toy_stage(on_batch=broken), toy_source(), settings)


def test_unreadable_images_are_skipped_and_logged(tmp_path, toy_stage, toy_source, settings):
    _, log = run(tmp_path, toy_stage(images=20), toy_source(broken=(3,)), settings)
    skipped = [event for event in log.events() if event["event"] == "skipped"]
    assert [event["name"] for event in skipped] == ["3.png", "3.png"]  # once an epoch of ten
    assert "3.png is broken" in skipped[0]["reason"]


def test_checkpoints_that_cannot_be_written_do_not_end_a_run_with_a_whole_one(
    tmp_path, monkeypatch, toy_stage, toy_source, settings
):
    """A disk that is full for a while ended it."""
    writes, failing = checkpoint_writer.write_tensors, []

    def full_for_a_while(tensors, path, header):
        if any(name in str(path) for name in failing):
            raise OSError(errno.ENOSPC, "No space left on device")
        writes(tensors, path, header)

    monkeypatch.setattr(checkpoint_writer, "write_tensors", full_for_a_while)
    failing[:] = [f"{images:012d}" for images in range(20, 112, 4)]
    with pytest.warns(CheckpointNotWrittenWarning) as warned:
        path, log = run(tmp_path / "full", toy_stage(), toy_source(), settings, checkpoint_seconds=0.0)
    said = str(warned[0].message)
    assert "at image 20 of stage A cannot be written: No space left on device. Training goes on" in said
    assert "everything after image 16 is lost. Free some disk space" in said
    events = log.events()
    assert {e["images"] for e in events if e["event"] == "checkpoint failed"} == set(range(20, 112, 4))
    assert [e["images"] for e in events if e["event"] == "checkpoint"] == [4, 8, 12, 16, 112, 116, 120]
    monkeypatch.undo()
    whole, _ = run(tmp_path / "whole", toy_stage(), toy_source(), settings)
    assert digests(path) == digests(whole)


@pytest.mark.parametrize("first", [4, 120])
def test_a_checkpoint_that_must_not_be_missing_ends_the_run(
    first, tmp_path, monkeypatch, toy_stage, toy_source, settings
):
    """The first one of a stage, or the last, which the next stage reads."""
    writes = checkpoint_writer.write_tensors

    def full(tensors, path, header):
        if f"{first:012d}" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        writes(tensors, path, header)

    monkeypatch.setattr(checkpoint_writer, "write_tensors", full)
    with pytest.raises(CheckpointError, match=rf"{first:012d} cannot be written: No space left"):
        run(tmp_path, toy_stage(), toy_source(), settings, checkpoint_seconds=0.0)


def test_the_log_tells_speed_and_losses(tmp_path, toy_stage, toy_source, settings):
    _, log = run(tmp_path, toy_stage(images=20), toy_source(), settings, log_every=2)
    progress = [event for event in log.events() if event["event"] == "progress"]
    assert [event["images"] for event in progress] == [8, 16, 20]
    assert {"loss", "loss_critic", "spread", "learning_rate", "images_per_second"} <= progress[0].keys()
    previews = sorted((tmp_path / "previews").iterdir())
    assert [p.name for p in previews] == ["000000000020.png"]
    # What a report tells of it; the toy's one row is as wide as the preview.
    assert read_settings(previews[0]) == {"stage": "a", "images": 20, "rows": ["seen"], "columns": 2}


def test_lines_of_progress_say_what_was_spent(tmp_path, toy_stage, toy_source, settings):
    _, log = run(tmp_path, toy_stage(images=20), toy_source(), settings)
    lines = [e for e in log.events() if e["event"] == "progress"]
    assert len(lines) == 5
    spent = [e["seconds"] for e in lines]
    assert spent == sorted(spent)
    assert {e["kwh"] for e in lines} == {None}  # nothing measures it here, and nothing is guessed
    assert "memory_gib" not in lines[0]
    assert "matrix_share" not in lines[0]


def test_a_clock_that_is_set_back_and_forth_changes_no_interval(
    tmp_path, monkeypatch, toy_stage, toy_source, settings
):
    """Checkpoints are due by a clock that nobody sets."""
    calls = iter(range(10**6))
    monkeypatch.setattr("time.time", lambda: 1e9 + (-1) ** next(calls) * 1e6)
    _, log = run(tmp_path, toy_stage(), toy_source(), settings, checkpoint_seconds=3600.0)
    assert [e["images"] for e in log.events() if e["event"] == "checkpoint"] == [120]


def test_checkpoints_are_written_while_training_goes_on(
    tmp_path, monkeypatch, toy_stage, toy_source, settings
):
    """With a disk so slow that updates pass meanwhile; what is written is the state of its moment."""
    writes = checkpoint_writer.write_tensors

    def slowly(*given):
        time.sleep(0.1)
        writes(*given)

    monkeypatch.setattr(checkpoint_writer, "write_tensors", slowly)
    slow, log = run(tmp_path / "slow", toy_stage(images=160), toy_source(), settings, checkpoint_seconds=0.02)
    events = log.events()
    first = next(n for n, event in enumerate(events) if event["event"] == "checkpoint")
    updates = sum(event["event"] == "progress" for event in events[:first])
    assert updates * 4 > events[first]["images"]
    monkeypatch.undo()
    quick, _ = run(tmp_path / "quick", toy_stage(images=160), toy_source(), settings)
    assert digests(slow) == digests(quick)

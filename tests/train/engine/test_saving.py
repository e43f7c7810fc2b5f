"""When checkpoints are noted as whole, and what is owed after one that could not be written."""

import dataclasses
import errno
from pathlib import Path

import pytest
import torch

from wuerstchen.errors import CheckpointError
from wuerstchen.train.engine import checkpoint_writer
from wuerstchen.train.engine.checkpoint import TrainingState
from wuerstchen.train.engine.checkpoint_writer import CheckpointNotWritten, Writer
from wuerstchen.train.engine.distributed import Processes
from wuerstchen.train.engine.faults import Faults
from wuerstchen.train.engine.loop import Trainer
from wuerstchen.train.engine.saving import CheckpointNotWrittenWarning, CheckpointSaver
from wuerstchen.train.feed.images import Feed
from wuerstchen.train.report.cost import CostMeter
from wuerstchen.train.report.events import Log

from .test_loop import make_job

CPU = torch.device("cpu")


class NoFaults(Faults):
    """All updates went well."""

    def __init__(self) -> None:
        pass

    def check(self, values=None):
        pass


class Second(Processes):
    """The second process of two, whose first is not there to be asked."""

    def all_reduce_sum(self, value):
        return value


class OfSecond(Writer):
    """Its writer, which has nothing to write. The first process cannot write."""

    started = False

    def start(self, state, header):
        self.started = True

    def wait(self):
        if self.started:
            self.started = False
            raise CheckpointNotWritten("another process could not write its part")
        return self.folder


def test_a_process_that_wrote_nothing_takes_no_checkpoint_for_whole_by_itself(
    tmp_path, toy_stage, toy_source, settings
):
    """It noted the checkpoint as whole, and ended in a KeyError when the first process had failed."""
    state = TrainingState(networks={}, averages={}, optimizers={}, images=8)
    writer = OfSecond(tmp_path, Second(CPU, rank=1, count=2))
    log, faults = Log(tmp_path / "log.jsonl", writes=False), NoFaults()
    job = make_job(toy_stage(), Feed(toy_source(), 5, 4, captions=True), tmp_path, settings, log=log)
    saving = CheckpointSaver(writer, job, state, faults, CostMeter(CPU))
    state.images = 12
    saving.start()
    saving.poll()
    assert not saving.is_complete(12)
    assert saving.wait() is None
    assert saving.is_complete(8)
    saving.start()
    with pytest.raises(CheckpointError):
        saving.wait(required=True)


def failures_and_kept(folder, stage, source, settings):
    folder.mkdir()
    log = Log(folder / "log.jsonl")
    feed = Feed(source, 5, settings.preview_size, stage.captions)
    with pytest.warns(CheckpointNotWrittenWarning):
        Trainer(make_job(stage, feed, folder, settings, log=log)).train()
    failed = [event["images"] for event in log.events() if event["event"] == "checkpoint failed"]
    return failed, sorted(int(path.name) for path in (folder / "checkpoints").glob("[0-9]*"))


def test_the_next_checkpoint_takes_the_place_of_a_milestone_that_could_not_be_written(
    tmp_path, monkeypatch, toy_stage, toy_source, settings
):
    """Nothing was kept until the milestone after it."""
    writes = checkpoint_writer.write_tensors

    def write(tensors, path, header):
        if "000000000040" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        writes(tensors, path, header)

    monkeypatch.setattr(checkpoint_writer, "write_tensors", write)
    settings = dataclasses.replace(settings, keep_every=20, checkpoint_seconds=0.0)
    failed, kept = failures_and_kept(tmp_path / "run", toy_stage(), toy_source(), settings)
    assert failed == [40]
    assert kept == [20, 44, 60, 80, 100, 116, 120]


def test_a_milestone_on_a_full_disk_is_not_tried_at_every_update(
    tmp_path, monkeypatch, toy_stage, toy_source, settings
):
    makes = Path.mkdir

    def make(path, *arguments, **options):
        if path.name in [f".{images:012d}.partial" for images in range(40, 60)]:
            raise OSError(errno.ENOSPC, "No space left on device")
        makes(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", make)
    settings = dataclasses.replace(settings, keep_every=20)
    failed, kept = failures_and_kept(tmp_path / "run", toy_stage(), toy_source(), settings)
    assert failed == [40]
    assert kept == [20, 60, 80, 100, 120]

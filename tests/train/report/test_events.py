"""TensorBoard by choice: what is written, and what is said without it."""

import resource
import sys
import types

import pytest
from PIL import Image

from wuerstchen.errors import UserError
from wuerstchen.train.report.events import Log, LogNotWrittenWarning, check_tensorboard, read_events


class Writer:
    """Stands in for SummaryWriter and keeps what it is given."""

    made: list["Writer"] = []  # noqa: RUF012

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.closed = folder, purge_step, False
        self.scalars, self.images = [], []
        Writer.made.append(self)

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def add_image(self, name, image, step, dataformats):
        self.images.append((name, image.shape, step, dataformats))

    def flush(self):
        pass

    def close(self):
        self.closed = True


@pytest.fixture
def writers(monkeypatch):
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    Writer.made = []
    return Writer.made


def test_events_go_to_one_folder_per_stage_and_lost_points_are_purged(tmp_path, writers):
    log = Log(tmp_path / "log.jsonl", tensorboard=True)
    log.event("accepted changed data", before="x", now="y")
    log.event("start", stage="a", images=0, total=9, resumed=False, device="cpu")
    log.event("progress", stage="a", images=5, loss=0.5, kwh=None)
    log.event("validation", stage="a", images=5, loss=0.25, bins=[1.0, None])
    folder = tmp_path / "stage_a" / "previews"
    folder.mkdir(parents=True)
    Image.new("RGB", (6, 4)).save(folder / f"{5:012d}.png")
    log.event("preview", stage="a", images=5)
    log.event("preview", stage="a", images=6)  # one that drew nothing
    log.event("start", stage="c2", images=7, total=9, resumed=True, device="cpu")
    log.event("end", seconds=1.0)
    first, second = writers
    assert (first.folder, first.purge_step) == (str(tmp_path / "tensorboard" / "a"), 1)
    assert (second.folder, second.purge_step) == (str(tmp_path / "tensorboard" / "c2"), 8)
    assert first.scalars == [
        ("progress/loss", 0.5, 5),
        ("validation/loss", 0.25, 5),
        ("validation/bin 1 of 2", 1.0, 5),
    ]
    assert first.images == [("preview", (4, 6, 3), 5, "HWC")]
    assert first.closed
    assert second.closed
    assert len(log.events()) == 8  # the log is the same with and without


def test_without_tensorboard_nothing_of_it_is_imported(tmp_path, writers):
    log = Log(tmp_path / "log.jsonl")
    log.event("start", stage="a", images=0)
    assert writers == []


def test_missing_tensorboard_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r'pip install "wuerstchen\[tensorboard\]", or leave the option out'):
        check_tensorboard()


def test_real_event_files_can_be_read_back(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start in (0, 5):
        log = Log(tmp_path / "log.jsonl", tensorboard=True)
        log.event("start", stage="a", images=start, total=20)
        for images in range(start + 1, 11):
            log.event("progress", stage="a", images=images, loss=float(start))
        log.event("end")
    found = EventAccumulator(str(tmp_path / "tensorboard" / "a")).Reload().Scalars("progress/loss")
    assert [(entry.step, entry.value) for entry in found] == [
        (n, 0.0 if n < 6 else 5.0) for n in range(1, 11)
    ]


def test_lines_that_do_not_fit_on_a_full_disk_are_written_later(tmp_path):
    """The run ended with its log. A limit on the size of files stands for the disk."""
    log = Log(tmp_path / "log.jsonl")
    log.event("first", text="x" * 100)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, limits[1]))
    try:
        log.event("kept", text="y" * 100)
        with pytest.warns(LogNotWrittenWarning, match=r"cannot be written: .* Training continues"):
            log.event("kept", text="y" * 100)
        log.event("kept", text="y" * 100)  # said once
        assert log.path.read_text().count("\n") == 2
        assert log.path.read_text().endswith("\n")
        assert [event["event"] for event in log.events()] == ["first", "kept", "kept", "kept"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.event("last")
    kinds = [event["event"] for event in read_events(log.path)]
    assert kinds == ["first", "kept", "kept", "kept", "last"]

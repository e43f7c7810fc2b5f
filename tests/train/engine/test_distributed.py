"""Many processes compute what one does: losses to rounding, and bit for bit at the same number."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

from wuerstchen.errors import UserError
from wuerstchen.train.engine import distributed
from wuerstchen.train.engine.checkpoint import newest
from wuerstchen.train.engine.distributed import Processes

STAGES = ("a", "b", "b2", "a2", "c", "c2")
CPU = torch.device("cpu")
DAMAGED = ["01.png", "03.png", "12.png", "14.png"]


def folder_of(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"number {number}")
    return folder


def run_script(folder: Path, *parts: str) -> None:
    """Runs functions of distributed_runs.py."""
    script = Path(__file__).with_name("distributed_runs.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, folder, *parts],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of a run in 2 processes, of its ends with 1 process, and of a run on damaged images."""
    folder = tmp_path_factory.mktemp("parallel")
    pictures = folder_of(folder / "pictures", 16)
    for name in DAMAGED:
        (pictures / name).write_bytes(b"nothing")
    for count in (16, 17):
        folder_of(folder / str(count), count)
    run_script(folder, "whole", "alone", "damaged", "missing_second", "different")
    return folder


@pytest.fixture(scope="module")
def more_runs(runs):
    """The same folder with a run that was killed three times, ends with 4 processes, runs on tokens, and
    sharded runs."""
    run_script(runs, "four", "killed", "tokens", "sharded", "missing_first")
    return runs


def test_gradients_are_averages_of_all_processes(monkeypatch):
    """Large ones, which travel alone, and small ones together. Here both processes have the same."""
    sent = []

    def all_reduce(tensor, *_, async_op=False):
        sent.append(tensor.numel())
        tensor *= 2
        return SimpleNamespace(wait=lambda: None) if async_op else None

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(distributed, "_LARGE", 100)
    network = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 2))
    x = torch.randn(4, 20)
    network(x).sum().backward()
    expected = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    with Processes(CPU, 0, 2).averaging_gradients(list(network.parameters())):
        network(x).sum().backward()
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert sent == [400, 20 + 40 + 2]


def losses(folder: Path) -> dict[str, list[tuple[int, dict[str, float]]]]:
    found: dict = {stage: [] for stage in STAGES}
    for line in (folder / "log.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "progress":
            values = {k: v for k, v in event.items() if k.startswith(("loss", "gradient", "reconstruction"))}
            found[event["stage"]].append((event["images"], values))
    return found


@pytest.mark.parametrize("stage", ["a", "b", "c"])
@pytest.mark.parametrize(
    ("count", "folder"), [("1", "runs"), pytest.param("4", "more_runs", marks=pytest.mark.slow)]
)
def test_another_number_of_processes_goes_on_with_the_same_losses(request, count, folder, stage):
    """Dropout is off in this run: with it, every number of processes has masks of its own."""
    runs = request.getfixturevalue(folder)
    images, ours = losses(runs / "2")[stage][-1]
    ((resumed, theirs),) = losses(runs / f"{count}{stage}")[stage]
    assert resumed == images == 16
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert theirs[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("count", ["1", "4"])
def test_so_it_does_with_tokens(more_runs, count):
    """Stage B of v1: which tokens are noised, and with what, is a matter of the image alone."""
    images, ours = losses(more_runs / "v1")["b"][-1]
    ((resumed, theirs),) = losses(more_runs / f"{count}v1")["b"]
    assert resumed == images == 16
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert theirs[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name


@pytest.mark.slow
def test_an_update_of_v1_done_again_gives_the_same_bits(more_runs):
    name = Path("model") / "decoder.safetensors"
    assert (more_runs / "v1" / name).read_bytes() == (more_runs / "2v1" / name).read_bytes()
    assert (more_runs / "v1" / name).read_bytes() != (more_runs / "1v1" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["b", "c"])
def test_sharded_processes_have_the_same_losses(more_runs, stage):
    """From the stage's beginning, sharded and with blocks computed again; then by one process from a
    checkpoint that two have sharded."""
    expected = losses(more_runs / "2")[stage]
    sharded = losses(more_runs / f"sharded {stage}")[stage]
    assert [images for images, _ in sharded] == [8, 16]
    for (_, ours), (_, theirs) in zip(expected, sharded, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-5, abs=1e-5)
    ((images, alone),) = losses(more_runs / f"back {stage}")[stage]
    assert images == 16
    assert alone == pytest.approx(sharded[-1][1], rel=1e-5, abs=1e-5)
    path, state = newest(more_runs / f"sharded {stage}" / f"stage_{stage}" / "checkpoints")
    assert "networks.1-of-2.safetensors" in state["files"]
    assert (more_runs / f"sharded {stage}" / f"stage_{stage}" / "previews" / f"{path.name}.png").is_file()


@pytest.mark.slow
def test_many_processes_rehearse_together(more_runs):
    events = [json.loads(line) for line in (more_runs / "sharded c" / "log.jsonl").read_text().splitlines()]
    assert [e["stage"] for e in events if e["event"] == "rehearsed"] == list(STAGES)


def files(folder: Path) -> dict[str, dict[str, str]]:
    found = {stage: newest(folder / f"stage_{stage}" / "checkpoints") for stage in STAGES}
    return {stage: state["files"] for stage, (_, state) in found.items()}


@pytest.mark.slow
def test_kills_of_single_processes_change_nothing(more_runs):
    """Weights, averages and optimizers, bit for bit, at the same number of processes."""
    assert files(more_runs / "2") == files(more_runs / "killed")
    model = {path.name: path.read_bytes() for path in (more_runs / "2" / "model").glob("*.safetensors")}
    assert len(model) == 5
    for name, content in model.items():
        assert (more_runs / "killed" / "model" / name).read_bytes() == content


def test_one_process_writes(runs):
    """Nothing is in the log twice."""
    events = [json.loads(line) for line in (runs / "2" / "log.jsonl").read_text().splitlines()]
    assert [e["stage"] for e in events if e["event"] == "start"] == list(STAGES)
    assert sum(e["event"] == "end" for e in events) == 1


def said_by_two(folder: Path) -> list[list[str]]:
    """What each of two processes of one command has said on stderr, both of which ended with exit code 2."""
    assert (folder / "codes").read_text() == "2 2"
    return [(folder / f"stderr {rank}").read_text().splitlines() for rank in (0, 1)]


@pytest.mark.parametrize(
    ("wrong", "folder"), [pytest.param(0, "more_runs", marks=pytest.mark.slow), (1, "runs")]
)
def test_what_one_process_cannot_read_is_one_line_in_each(request, wrong, folder):
    """The others lost their connection in the middle of a talk, and said so in a traceback."""
    said = said_by_two(request.getfixturevalue(folder) / f"missing {wrong}")
    assert [len(lines) for lines in said] == [1, 1]
    assert "nowhere' does not exist. Use a folder" in said[wrong][0]
    assert said[1 - wrong][0].startswith(f"Error: process {1 - wrong} lost its connection to the others: ")


def test_processes_with_different_data_are_refused(runs):
    """Each trained on its own, and an epoch was none."""
    said = said_by_two(runs / "different")
    assert [len(lines) for lines in said] == [1, 1]
    for rank in (0, 1):
        assert f"Error: rank {rank} has different data in" in said[rank][0]


def test_images_that_any_process_cannot_read_are_named(runs):
    """Those of the first process were. An epoch of Stage A meets all."""
    events = [json.loads(line) for line in (runs / "damaged" / "log.jsonl").read_text().splitlines()]
    skipped = [e["name"] for e in events if e["event"] == "skipped" and e["stage"] == "a"]
    assert sorted(skipped) == DAMAGED


def test_batches_are_shared_evenly():
    second = Processes(CPU, rank=1, count=4)
    assert list(second.rank_slice(range(16, 32))) == [20, 21, 22, 23]
    second.check_batches("a", 64, 16)
    for images, batch_size in ((64, 6), (60, 16)):
        with pytest.raises(
            UserError, match=r"cannot be split evenly across 4 processes\. Make batch_size a multiple of 4"
        ):
            second.check_batches("a", images, batch_size)
    assert list(Processes(CPU).rank_slice(range(3))) == [0, 1, 2]

"""Run by test_distributed.py in a process of its own: trains a tiny recipe in 2 processes, and on in 1 or 4.

Its arguments are a folder and the names of functions below.

Processes are forked from one that has imported everything, which is what makes this fast. Nothing in it may
have started threads before.
"""

import dataclasses
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import torch

import wuerstchen.train.run as run
from wuerstchen.checkpoints.text_encoder import read_text_encoder
from wuerstchen.cli import main
from wuerstchen.models.paella import PaellaConfig
from wuerstchen.pipeline import BUNDLED
from wuerstchen.recipes.tiny import tiny
from wuerstchen.train.config import Phase, Recipe
from wuerstchen.train.report.announce import RunMonitor

torch.set_num_threads(1)


def recipe(*, v1: bool = False, **changes: object) -> Recipe:
    """All stages, batch statistics and second phases, in a few updates; no dropout.

    Stage B is v1's or v2's.
    """
    full = tiny()

    def short(stage):
        optimization = dataclasses.replace(stage.optimization, images=16, batch_size=8, warmup=0)
        second = dataclasses.replace(optimization, images=8, learning_rate=5e-4)
        if stage is full.stage_c:
            return dataclasses.replace(stage, optimization=optimization, phases=(Phase(optimization=second),))
        refine_images = 0 if changes.get("stages") == ("a",) else 8
        return dataclasses.replace(stage, optimization=optimization, refine_images=refine_images)

    of_v1 = PaellaConfig(
        num_labels=full.vqgan.num_vq_embeddings,
        c_token=16,
        c_cond=32,
        c_hidden=(16, 32),
        nhead=(-1, 2),
        blocks=(1, 1),
        level_config=("CT", "CTA"),
        clip_embd=384,
        dropout=0.0,
    )
    return dataclasses.replace(
        full,
        decoder=of_v1 if v1 else dataclasses.replace(full.decoder, dropout=0.0),
        prior=dataclasses.replace(full.prior, dropout=0.0),
        stage_a=dataclasses.replace(short(full.stage_a), adversarial_from=4),
        stage_b=short(full.stage_b),
        stage_c=short(full.stage_c),
        statistics_images=8,
        prior_steps=2,
        decoder_steps=1,
        workers=0,
        preview_prompts=("cat",),
        checkpoint_seconds=0.0,
        log_every=1,
        **changes,
    )


def one(rank: int, count: int, port: int, folder: str, changes: dict) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    monitor = RunMonitor(rehearse=changes.pop("rehearse", False))
    run.train(recipe(**changes), Path(folder), device="cpu", monitor=monitor)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(count: int, folder: Path, **changes: object) -> list[multiprocessing.Process]:
    port, fork = free_port(), multiprocessing.get_context("fork")
    arguments = ((rank, count, port, str(folder), changes) for rank in range(count))
    processes = [fork.Process(target=one, args=a) for a in arguments]
    for process in processes:
        process.start()
    return processes


def train(count: int, folder: Path, **changes: object) -> None:
    processes = start(count, folder, **changes)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * count


def kill_one(folder: Path, victim: int, stage: str) -> float:
    """Kills one of two processes in a stage; returns how long the other took to end, which torchrun helps."""
    processes = start(2, folder)
    while not any((folder / f"stage_{stage}" / "checkpoints").glob("[0-9]*")):
        assert all(process.is_alive() for process in processes)
        time.sleep(0.01)
    os.kill(processes[victim].pid, signal.SIGKILL)
    began = time.monotonic()
    for process in processes:
        process.join(60)
        assert process.exitcode not in (0, None)
    return time.monotonic() - began


def without_last(folder: Path, other: Path, stages: tuple[str, ...]) -> None:
    """Copies a run folder, with the last update of some stages undone."""
    shutil.copytree(folder, other)
    (other / "log.jsonl").unlink()
    for stage in stages:
        shutil.rmtree(max((other / f"stage_{stage}" / "checkpoints").iterdir()))


def whole(folder: Path) -> None:
    train(2, folder / "2")


def alone(folder: Path) -> None:
    for stage in ("a", "b", "c"):
        without_last(folder / "2", folder / f"1{stage}", (stage,))
        train(1, folder / f"1{stage}")


def damaged(folder: Path) -> None:
    train(2, folder / "damaged", data=str(folder / "pictures"), stages=("a",))


def command(rank: int, port: int, folder: Path, options: list[str]) -> None:
    """One of two processes of ``wuerstchen train``; its stderr goes to a file."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.dup2(os.open(folder / f"stderr {rank}", os.O_CREAT | os.O_WRONLY), 2)
    common = ["train", "tiny", "--device", "cpu", "--workers", "0", "--no-rehearsal"]
    sys.exit(main([*common, "--run-dir", str(folder / "run"), *options]))


def refused(folder: Path, *options: list[str]) -> None:
    """The command in two processes, each with options of its own; their exit codes go to a file."""
    folder.mkdir()
    port, fork = free_port(), multiprocessing.get_context("fork")
    arguments = ((rank, port, folder, given) for rank, given in enumerate(options))
    processes = [fork.Process(target=command, args=a) for a in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    (folder / "codes").write_text(" ".join(str(process.exitcode) for process in processes))


def missing_first(folder: Path) -> None:
    refused(folder / "missing 0", ["--data", str(folder / "nowhere")], [])


def missing_second(folder: Path) -> None:
    refused(folder / "missing 1", [], ["--data", str(folder / "nowhere")])


def different(folder: Path) -> None:
    refused(folder / "different", *(["--data", str(folder / str(count))] for count in (16, 17)))


def four(folder: Path) -> None:
    for stage in ("a", "b", "c"):
        without_last(folder / "2", folder / f"4{stage}", (stage,))
        train(4, folder / f"4{stage}")


def killed(folder: Path) -> None:
    for victim, stage in ((1, "a"), (0, "b"), (1, "c")):
        print("ended after", kill_one(folder / "killed", victim, stage))
    train(2, folder / "killed")


def tokens(folder: Path) -> None:
    """Stage B of v1, on the Stage A of the whole run."""
    changes = {"v1": True, "stages": ("b",), "fresh": ("b",), "start_from": str(folder / "2" / "model")}
    train(2, folder / "v1", **changes)
    for count in (1, 2, 4):
        other = folder / f"{count}v1"
        without_last(folder / "v1", other, ("b", "b2"))
        shutil.rmtree(other / "model")
        train(count, other, **changes)


def sharded(folder: Path) -> None:
    """Sharded over 2 from a checkpoint that is not, and back to 1 from one that is."""
    for stage in ("b", "c"):
        other, back = folder / f"sharded {stage}", folder / f"back {stage}"
        without_last(folder / "2", other, ())
        shutil.rmtree(other / f"stage_{stage}" / "checkpoints")
        train(2, other, sharding="full", recompute="blocks", rehearse=stage == "c")
        without_last(other, back, (stage,))
        train(1, back)


if __name__ == "__main__":
    read_text_encoder(BUNDLED / "text_encoder")  # imports what every process would
    for name in sys.argv[2:]:
        globals()[name](Path(sys.argv[1]))

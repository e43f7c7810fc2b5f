"""Run by test_prepared_run.py in a process of its own: trains Stage C on a prepared set, in 1 and 2 of them.

Its arguments are a folder, and ``whole`` or ``killed``.

Processes are forked from one that has imported everything, which is what makes this fast. Nothing in it may
have started threads before.
"""

import dataclasses
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch

import wuerstchen.train.run as run
from wuerstchen.checkpoints.text_encoder import read_text_encoder
from wuerstchen.data import prepared_check
from wuerstchen.pipeline import BUNDLED
from wuerstchen.recipes.tiny import tiny
from wuerstchen.train.config import Phase, Recipe


def recipe(folder: Path) -> Recipe:
    """Stage C of the model in ``folder``, from nothing, on ``folder``'s prepared set; no dropout."""
    full = tiny()

    def short(images: int) -> dict:
        return {"images": images, "batch_size": 8, "warmup": 0}

    optimization = dataclasses.replace(full.stage_c.optimization, **short(32))
    second = Phase(optimization=dataclasses.replace(optimization, **short(16)))
    return dataclasses.replace(
        full,
        data=str(folder / "set"),
        stages=("c",),
        start_from=str(folder / "model"),
        fresh=("c",),
        prior=dataclasses.replace(full.prior, dropout=0.0, c_in=2),
        compressor=dataclasses.replace(full.compressor, c_latent=2),
        decoder=dataclasses.replace(full.decoder, effnet_embd=2),
        previewer=dataclasses.replace(full.previewer, c_in=2),
        stage_c=dataclasses.replace(full.stage_c, optimization=optimization, phases=(second,)),
        statistics_images=64,
        prior_steps=2,
        decoder_steps=1,
        workers=0,
        preview_prompts=("cat",),
        checkpoint_seconds=0.0,
        log_every=1,
    )


def one(rank: int, count: int, port: int, folder: Path, name: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    run.train(recipe(folder), folder / name, device="cpu")


def start(count: int, folder: Path, name: str) -> list[multiprocessing.Process]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=one, args=(rank, count, port, folder, name)) for rank in range(count)]
    for process in processes:
        process.start()
    return processes


def train(count: int, folder: Path, name: str) -> None:
    processes = start(count, folder, name)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * count


def kill(folder: Path, name: str, stage: str) -> None:
    """Kills a run of one process after its first checkpoint of a stage."""
    (process,) = start(1, folder, name)
    while not any((folder / name / f"stage_{stage}" / "checkpoints").glob("[0-9]*")):
        assert process.is_alive()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def refuse(*_: object) -> None:
    raise PermissionError


def train_on_a_copy(folder: Path, name: str) -> None:
    """By two processes, on a set that was copied without its times to a disk that cannot be written; what
    they hash is listed in ``hashed``."""
    hashes, touch = prepared_check.sha256, os.utime
    for shard in (folder / "set").glob("*/*.arrow"):
        os.utime(shard)

    def listed(path: Path) -> str:
        with open(folder / "hashed", "a") as file:
            file.write(f"{path.parent.name}/{path.name}\n")
        return hashes(path)

    prepared_check.sha256, os.utime = listed, refuse
    train(2, folder, name)
    prepared_check.sha256, os.utime = hashes, touch


def whole(folder: Path) -> None:
    train(1, folder, "1")
    train_on_a_copy(folder, "2")


def killed(folder: Path) -> None:
    for stage in ("c", "c2"):
        kill(folder, "killed", stage)
    train(1, folder, "killed")


if __name__ == "__main__":
    torch.set_num_threads(1)
    read_text_encoder(BUNDLED / "text_encoder")  # imports what every process would
    globals()[sys.argv[2]](Path(sys.argv[1]))

"""Run by test_sharded.py in a process of its own: small things in several processes, forked from this one.

Prints a JSON object: by scenario what its processes have found.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from test_loop import make_job
from test_update import PriorStage, make_inputs, make_step
from torch import nn

from conftest import ToySource, ToyStage
from wuerstchen.data import prepared_check
from wuerstchen.errors import UserError
from wuerstchen.train.engine import checkpoint, checkpoint_writer, distributed, sharding
from wuerstchen.train.engine.distributed import Processes
from wuerstchen.train.engine.factored import keep_in_bf16
from wuerstchen.train.engine.job import Settings, StageJob
from wuerstchen.train.engine.loop import Interrupted, Trainer
from wuerstchen.train.engine.optim import make_optimizer
from wuerstchen.train.engine.sharding import empty_copy, gather, is_sharded, shard
from wuerstchen.train.engine.state import make_state
from wuerstchen.train.engine.update import TrainStep, recompute_blocks
from wuerstchen.train.feed.images import Feed
from wuerstchen.train.report.events import Log
from wuerstchen.train.run_data import verify_sets
from wuerstchen.train.run_folder import check_colours

torch.set_num_threads(1)
CPU = torch.device("cpu")
SETTINGS = Settings(
    seed=0,
    autocast=None,
    workers=0,
    checkpoint_seconds=1e9,
    log_every=1,
    preview_every=0,
    preview_size=4,
    previews=2,
)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def together(count: int, work: Callable[[Processes], object], doomed: int | None = None) -> list[object]:
    """What ``work`` gives in each of ``count`` processes; of a ``doomed`` one nothing is expected."""
    fork = multiprocessing.get_context("fork")
    port, results = free_port(), fork.SimpleQueue()

    def one(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        try:
            with distributed.distributed(CPU) as processes:
                results.put((rank, work(processes)))
        except BaseException:
            results.put((rank, traceback.format_exc()))

    children = [fork.Process(target=one, args=(rank,)) for rank in range(count)]
    for child in children:
        child.start()
    found = dict(results.get() for _ in range(count - (doomed is not None)))
    for child in children:
        child.join(60)
    return [found.get(rank) for rank in range(count)]


def sharded_step(processes: Processes, **optimization) -> TrainStep:
    stage = PriorStage(**optimization)
    step = make_step(stage, processes)
    average = step.state.averages["prior"]
    whole = empty_copy(average)
    for network in (*stage.networks.values(), average):
        shard(network, processes)
    assert is_sharded(stage.prior) == is_sharded(average) == (processes.count > 1)
    assert not is_sharded(stage.critic)
    step.state.whole["prior"] = whole
    step.state.optimizers = {n: make_optimizer(m, stage.optimization) for n, m in stage.networks.items()}
    return step


def run_updates(step: TrainStep, updates: int = 2) -> dict[str, float]:
    inputs, indices = make_inputs()
    part = step.processes.rank_slice(range(8))
    values = {}
    for _ in range(updates):
        rows = slice(part.start, part.stop)
        values = step({name: tensor[rows] for name, tensor in inputs.items()}, indices[rows])
        step.state.updates += 1
        step.state.images += 8
    stacked = torch.stack(list(values.values()))
    step.processes.all_reduce_mean_([stacked])
    return dict(zip(values, stacked.tolist(), strict=True))


def state_of(step: TrainStep) -> dict[str, torch.Tensor]:
    """All of the state, whole."""
    groups = checkpoint.tensors_of(step.state)
    tensors = {f"{g}/{key}": t for g, tensors in groups.items() for key, t in tensors.items()}
    return {k: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone() for k, t in tensors.items()}


def farthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[key] - other[key]).abs().max().item() for key in one)


def updates(folder: Path) -> object:
    """Sharded, in parts and with blocks computed again, against one process that does it plainly."""
    alone = make_step(PriorStage())
    expected = run_updates(alone)
    wanted = state_of(alone)

    def work(processes: Processes) -> object:
        found = []
        for accumulate in (1, 2):
            step = sharded_step(processes, accumulate=accumulate)
            recompute_blocks(step.stage.prior)
            values = run_updates(step)
            local = sum(p.to_local().numel() for p in step.stage.prior.parameters())
            copy = gather(step.state.averages["prior"], step.state.whole["prior"], processes)
            same = True
            if processes.is_main:
                average = alone.state.averages["prior"]
                same = farthest(copy.state_dict(), average.state_dict()) < 2e-6
            found.append(
                {
                    "values": max(abs(values[n] / expected[n] - 1) for n in expected if n != "spread"),
                    "state": farthest(state_of(step), wanted),
                    "share": local / sum(p.numel() for p in step.stage.prior.parameters()),
                    "copy": same,
                }
            )
        return found

    return together(2, work)


def checkpoints(folder: Path) -> object:
    """Written by two, read by one, two and four; and what they hold."""

    def write(processes: Processes) -> object:
        step = sharded_step(processes)
        run_updates(step)
        writer = checkpoint_writer.Writer(folder, processes)
        writer.start(step.state, {"recipe": "r"})
        before = state_of(step)
        run_updates(step)  # what is written is the state of that moment
        assert farthest(before, state_of(step)) > 0
        writer.wait()
        if processes.is_main:
            torch.save(before, folder / "expected.pt")
        return True

    def read(processes: Processes) -> object:
        step = sharded_step(processes)
        if processes.count == 1:
            assert not is_sharded(step.stage.prior)
        found = checkpoint.newest_of_all(folder, processes)
        checkpoint.restore(step.state, *found)
        expected = torch.load(folder / "expected.pt", weights_only=True)
        assert (step.state.images, step.state.updates) == (16, 2)
        return farthest(state_of(step), expected)

    return [together(2, write), *(together(count, read) for count in (1, 2, 4))]


def full_disk(folder: Path) -> object:
    """One of two cannot write: both are told at the next exchange, and what was there stays whole."""

    def work(processes: Processes) -> object:
        step = sharded_step(processes)
        writer = checkpoint_writer.Writer(folder, processes)
        run_updates(step)
        writer.start(step.state, {})
        writer.wait()
        run_updates(step)
        if processes.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, resource.RLIM_INFINITY))
        writer.start(step.state, {})
        try:
            writer.wait()
        except UserError as error:
            return [str(error), sorted(p.name for p in folder.iterdir())]

    return together(2, work)


def memory(folder: Path) -> object:
    """Weights in bf16: two processes have the same bits after three updates, and nearly those of one."""

    def work(processes: Processes) -> object:
        found = []
        for choice, accumulate in (("low", 1), ("low", 2), ("lowest", 1)):
            stage = PriorStage(accumulate=accumulate)
            step = make_step(stage, processes)
            step.dtype = torch.bfloat16
            for network in stage.networks.values():
                keep_in_bf16(network, accumulates=accumulate > 1, least=1)
            optimizers = {n: make_optimizer(m, stage.optimization) for n, m in stage.networks.items()}
            step.state.optimizers = optimizers
            if choice == "lowest":
                for optimizer in optimizers.values():
                    optimizer.update_in_backward(processes.all_reduce_mean_)
            values = run_updates(step, updates=3)
            digest = hashlib.sha256()
            for parameter in stage.prior.parameters():
                digest.update(parameter.detach().float().numpy().tobytes())
            found.append([values["loss"], values["gradient_prior"], digest.hexdigest()])
        return found

    return [together(1, work), together(2, work)]


def host_averages(folder: Path) -> object:
    """Averages in host memory are read by each process itself, because NCCL cannot send them."""
    together(1, lambda processes: loop(processes, folder, ToyStage(images=8)))

    def work(processes: Processes) -> object:
        sent, broadcast = [], checkpoint.dist.broadcast
        checkpoint.dist.broadcast = lambda tensor, src: sent.append(tensor) or broadcast(tensor, src=src)
        step = make_state(job_of(processes, folder, ToyStage(images=8)))
        elsewhere = Processes(torch.device("meta"), processes.rank, processes.count)
        once = len(sent)
        found = checkpoint.newest_of_all(folder / "checkpoints", processes)
        reading = checkpoint._Reading(elsewhere)
        with contextlib.ExitStack() as files:
            stored = checkpoint._Stored(*found, "averages", files)
            for key, tensor in checkpoint.tensors_of(step)["averages"].items():
                expected = tensor.clone()
                tensor.zero_()
                reading.fill(stored, key, tensor)
                assert torch.equal(tensor, expected)
        return [once > 0, len(reading._broadcasts)]

    return together(2, work)


def job_of(processes: Processes, folder: Path, stage: ToyStage, **changes: object) -> StageJob:
    log = Log(folder / "log.jsonl", processes.is_main)
    settings = dataclasses.replace(SETTINGS, **changes)
    return make_job(
        stage, Feed(ToySource(), 5, 4, stage.captions), folder, settings, processes=processes, log=log
    )


def loop(processes: Processes, folder: Path, stage: ToyStage, **changes: object) -> str:
    try:
        Trainer(job_of(processes, folder, stage, **changes)).train()
    except (UserError, Interrupted) as stopped:
        return str(stopped)
    return "finished"


def divided(folder: Path) -> object:
    """A checkpoint that is not sharded, read by two and by four: what each has read, and what all then have.
    Then one of two meets a file that cannot be read."""
    together(1, lambda processes: loop(processes, folder, ToyStage(images=8)))

    def read(processes: Processes) -> object:
        filled, hashed = [], []
        fill, sha256 = checkpoint._Stored.fill, checkpoint.sha256_of

        def filling(self, key, *given) -> None:
            filled.append(key)
            fill(self, key, *given)

        def hashing(path: Path) -> str:
            hashed.append(path.name)
            return sha256(path)

        checkpoint._Stored.fill, checkpoint.sha256_of = filling, hashing
        state = make_state(job_of(processes, folder, ToyStage(images=8)))
        digest = hashlib.sha256()
        for group, tensors in checkpoint.tensors_of(state).items():
            for key in sorted(tensors):
                digest.update(f"{group}/{key}".encode() + tensors[key].numpy().tobytes())
        average = nn.Sequential(nn.Linear(48, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
        path = folder / "checkpoints" / "000000000008"
        checkpoint.load_averages(average, path, "model", processes)
        same = farthest(average.state_dict(), state.averages["model"].state_dict()) == 0
        return [filled, hashed, digest.hexdigest(), state.images, same]

    def cannot(processes: Processes) -> object:
        if processes.rank == 1:

            def broken(self, *given) -> None:
                raise ValueError("a disk has gone")

            checkpoint._Stored.fill = broken
        try:
            make_state(job_of(processes, folder, ToyStage(images=8)))
        except UserError as error:
            return str(error)

    results = [together(count, read) for count in (1, 2, 4)]
    return [*results, together(2, cannot)]


def lack(folder: Path) -> object:
    """The first process has no memory for the whole of a sharded network: the exchange ends all the same."""

    def work(processes: Processes) -> object:
        step, calls, whole = sharded_step(processes), iter(range(10**6)), sharding._whole

        def scarce(tensor: torch.Tensor) -> torch.Tensor:
            if processes.is_main and next(calls) == 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return whole(tensor)

        sharding._whole = scarce
        said = ""
        try:
            gather(step.state.averages["prior"], step.state.whole["prior"], processes)
        except torch.OutOfMemoryError as error:
            said = str(error)
        return [said, processes.all_reduce_sum(1.0)]

    return together(2, work)


def damaged(folder: Path) -> object:
    """The newest of two checkpoints is damaged in a file that the second process reads: both go on from the
    one before."""

    def work(processes: Processes) -> object:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = checkpoint.newest_of_all(folder / "checkpoints", processes)
        return [found[1]["images"], [str(warning.message) for warning in caught]]

    together(1, lambda processes: loop(processes, folder, ToyStage(images=8), checkpoint_seconds=0.0))
    path = folder / "checkpoints" / "000000000008" / "networks.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    first = together(2, work)
    (folder / "checkpoints" / "000000000004" / "state.json").write_text("{")
    try:
        second = together(2, work)
    finally:
        shutil.rmtree(folder / "checkpoints")
    return [first, second, together(2, lambda p: checkpoint.newest_of_all(folder / "checkpoints", p))]


def not_finite(folder: Path) -> object:
    """A loss of one process is not a number: none makes the update, and all say at which image."""

    def work(processes: Processes) -> object:
        stage = ToyStage()

        def broken(drawn) -> None:
            if processes.rank == 1 and int(drawn.indices[0]) == 42:
                with torch.no_grad():
                    stage.networks["critic"].bias.fill_(torch.nan)

        stage.on_batch = broken
        said = loop(processes, folder, stage)
        return [said, bool(stage.networks["model"][0].weight.isfinite().all())]

    return together(2, work)


def stopped(folder: Path) -> object:
    """SIGTERM to one of two."""

    def work(processes: Processes) -> object:
        def stop(drawn) -> None:
            if processes.rank == 1 and int(drawn.indices[0]) == 42:
                os.kill(os.getpid(), signal.SIGTERM)

        return loop(processes, folder, ToyStage(on_batch=stop))

    return [together(2, work), checkpoint.newest(folder / "checkpoints")[1]["images"]]


def surveys(folder: Path) -> object:
    """Two processes look at data, the first for longer than exchanges may take; each file is read by one."""
    (folder / "run.json").write_text("{}")
    described = {"images": {"shards": []}, "texts": {"shards": []}}
    for table, number in (("images", 0), ("images", 1), ("images", 2), ("texts", 0)):
        path = folder / table / f"{number}.arrow"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"%d" % number)
        described[table]["shards"].append(
            {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": 1}
        )
    (folder / "prepared.json").write_text("{}")
    old = (folder / "prepared.json").stat().st_mtime - 10
    os.utime(folder / "prepared.json", (old, old))
    distributed._TIMEOUT = datetime.timedelta(seconds=2)

    def work(processes: Processes) -> object:
        read, reads = [], prepared_check.sha256

        def slowly(path: Path) -> str:
            if processes.is_main and not read:
                time.sleep(3)
            read.append(f"{path.parent.name}/{path.name}")
            return reads(path)

        def converted(rank: int, count: int) -> str | None:
            read.append(f"{rank} of {count}")
            time.sleep(0 if rank else 3)
            return f"{rank}.png"

        prepared_check.sha256 = slowly
        found = SimpleNamespace(folder=folder, description=described)
        said = []
        for _ in range(2):  # once, and not once more
            verify_sets([found], processes)
        (folder / "images" / "1.arrow").write_bytes(b"x")
        for what in (
            lambda: verify_sets([found], processes),
            lambda: check_colours(folder, converted, Log(folder / "log.jsonl", False), False, processes),
        ):
            try:
                what()
            except UserError as error:
                said.append(str(error))
            processes.barrier()
        return [read, said]

    try:
        return together(2, work)
    finally:
        distributed._TIMEOUT = datetime.timedelta(minutes=30)


def dead(folder: Path) -> object:
    """One of two is killed: the other ends by itself, without anybody's help."""
    began = time.monotonic()

    def work(processes: Processes) -> object:
        def die(drawn) -> None:
            if processes.rank == 1 and int(drawn.indices[0]) == 42:
                os.kill(os.getpid(), signal.SIGKILL)

        return loop(processes, folder, ToyStage(on_batch=die), checkpoint_seconds=0.0)

    result = together(2, work, doomed=1)[0]
    return [result, time.monotonic() - began, checkpoint.newest(folder / "checkpoints")[1]["images"]]


def kills(folder: Path, count: int = 3) -> object:
    """One process, killed ``count`` times at random moments, every third in the middle of a checkpoint."""
    fork, rng = multiprocessing.get_context("fork"), random.Random(count)
    writes = checkpoint_writer.write_tensors
    broken = folder / "broken"

    def slowly(*given) -> None:
        writes(*given)
        time.sleep(0.01)

    def train(where: Path) -> None:
        checkpoint_writer.write_tensors = slowly
        where.mkdir(exist_ok=True)
        loop(Processes(CPU), where, ToyStage(images=240), checkpoint_seconds=0.0)

    def logged(kind: str) -> int:
        path = broken / "log.jsonl"
        return path.read_text().count(f'"event": "{kind}"') if path.exists() else 0

    def writing() -> bool:
        with contextlib.suppress(FileNotFoundError):  # it was renamed just now
            return any(broken.glob("checkpoints/.*.partial/*.safetensors"))
        return False

    for number in range(count):
        starts, progress = logged("start"), logged("progress") + rng.randrange(6)
        child = fork.Process(target=train, args=(broken,))
        child.start()
        while child.is_alive() and (logged("start") == starts or logged("progress") < progress):
            time.sleep(0.001)
        if number % 3 == 0:
            while child.is_alive() and not writing():
                pass
        else:
            time.sleep(rng.random() * 0.02)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode == -signal.SIGKILL
    for where in (broken, folder / "whole"):
        child = fork.Process(target=train, args=(where,))
        child.start()
        child.join()
        assert child.exitcode == 0
    files = [checkpoint.newest(folder / where / "checkpoints")[1]["files"] for where in ("broken", "whole")]
    return {"same": files[0] == files[1], "starts": logged("start"), "updates": logged("progress")}


def twenty_kills(folder: Path) -> object:
    return kills(folder, 20)


def main() -> None:
    folder, found = Path(sys.argv[1]), {}
    ordinary = (
        updates,
        memory,
        host_averages,
        checkpoints,
        divided,
        lack,
        damaged,
        full_disk,
        not_finite,
        stopped,
        surveys,
        dead,
        kills,
    )
    for scenario in (twenty_kills,) if sys.argv[2:] == ["slow"] else ordinary:
        inside = folder / scenario.__name__
        inside.mkdir()
        try:
            found[scenario.__name__] = scenario(inside)
        except Exception:
            found[scenario.__name__] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main()

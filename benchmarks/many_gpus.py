"""Training speed of Stage C at its published size on 1, 2, 4 and 8 GPUs of one host, in one run.

    python benchmarks/many_gpus.py --gpus 1 2 4 8 --batches 8 32 --out build/many_gpus

Starts one process per GPU itself (torchrun). Measures for each number of GPUs:

- speed: images per second, MFU and memory of whole updates with random latents and text states: fp32
  weights and optimizer, bf16 compute, compiled blocks and a weight average. In four modes: replicated weights
  with each update recorded as a CUDA graph, the same with 4 micro-batches, sharded weights (FSDP2), and FSDP2
  with recompute. --batches are images per GPU and forward pass.
- losses: the first 20 updates on the same images, without dropout. They must agree across numbers of GPUs.
- checkpoint: the bytes and seconds of a checkpoint, and how many updates training loses meanwhile.
- resume: seconds to read the checkpoint that another number of GPUs wrote, and the losses after it.

Rows are appended to OUT/rows.jsonl. Start the same command again to measure only what is missing. At the end
a table is printed and written to OUT/table.md.
"""

import argparse
import contextlib
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import free, matrix_rate
from scaling_table import table
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from wuerstchen.diffusion.objective import PUBLISHED_OBJECTIVE
from wuerstchen.models.prior import Prior, PriorConfig
from wuerstchen.train.config import Optimization
from wuerstchen.train.engine import throughput
from wuerstchen.train.engine.checkpoint import TrainingState, newest_of_all, restore
from wuerstchen.train.engine.checkpoint_writer import Writer
from wuerstchen.train.engine.distributed import Processes, distributed
from wuerstchen.train.engine.ema import make_average
from wuerstchen.train.engine.optim import make_optimizer, set_rate
from wuerstchen.train.engine.sharding import shard
from wuerstchen.train.engine.update import (
    StepRunner,
    TrainStep,
    compile_regions,
    make_bf16_weights,
    recompute_blocks,
)
from wuerstchen.train.feed.random import ImageRandom
from wuerstchen.train.stages.base import Inputs, Losses

AVERAGED_EVERY = 100  # updates, as in the recipes of the published sizes
COMPARED_UPDATES = 20  # whose losses are compared
AFTER_CHECKPOINT = 3  # updates whose losses a resumed run must repeat
CHUNK = 5  # updates between two looks at whether a checkpoint is complete
TEXT_TOKENS = 77


@dataclass(frozen=True)
class Mode:
    """How updates run."""

    sharded: bool = False
    recompute: bool = False
    accumulate: int = 1


MODES = {
    "replicated": Mode(),
    "accumulate 4": Mode(accumulate=4),
    "FSDP2": Mode(sharded=True),
    "FSDP2, recompute": Mode(sharded=True, recompute=True),
}


class RandomStageC:
    """Stage C with ready-made inputs."""

    name = "c"
    averaged = ("prior",)
    captions, reads_images = True, False
    rates: dict[str, float] = {}  # noqa: RUF012
    rate_scales: dict[str, float] = {}  # noqa: RUF012
    preview_labels: dict[str, list[str]] = {}  # noqa: RUF012

    def __init__(self, prior: Prior, optimization: Optimization) -> None:
        self.prior = prior
        self.optimization = optimization
        self.networks = {"prior": prior}

    def prepare(self, batch, device) -> Inputs:
        raise NotImplementedError

    def check(self, values) -> None:
        pass

    def preview(self, averages, pixels, device, *, low_memory=False) -> list:
        return []

    def losses(self, inputs: Inputs, random: ImageRandom) -> Losses:
        x = inputs["x"]
        t = PUBLISHED_OBJECTIVE.times(random.uniform("time"))
        noise = random.normal("noise", x.shape[1:])
        context = self.prior.context(inputs["states"], None, cache_kv=False)
        output = self.prior(PUBLISHED_OBJECTIVE.noised(x, noise, t), t, context)
        yield "prior", PUBLISHED_OBJECTIVE.loss(output, x, noise, t).mean(), {}


class Training:
    """Updates of Stage C in one mode, on ``rows`` images per process and update."""

    def __init__(
        self,
        mode: Mode,
        rows: int,
        options: argparse.Namespace,
        processes: Processes,
        *,
        dropout: bool = True,
        checkpoints: Path | None = None,
    ) -> None:
        """Continues the newest of ``checkpoints`` if given. Starts with random weights otherwise."""
        torch._dynamo.reset()
        torch.manual_seed(0)
        self.processes, self.rows, self.side = processes, rows, options.side
        device = processes.device
        shape: dict[str, Any] = {} if not options.tiny else {"c": 64, "c_cond": 32, "depth": 2, "nhead": 2}
        if not dropout:
            shape["dropout"] = 0.0
        self.config = PriorConfig(**shape)
        with device:
            prior = Prior(self.config).train()
        batch = rows * processes.count
        optimization = Optimization(images=10**9, batch_size=batch, accumulate=mode.accumulate)
        stage = RandomStageC(prior, optimization)
        self.flops_per_image = throughput.update_flops(
            stage, self.inputs(1), self.numbers(1), 0, torch.bfloat16
        )
        average = make_average(prior)
        if mode.sharded:
            for network in (prior, average):
                shard(network, processes)
        self.state = TrainingState(
            {"prior": prior}, {"prior": average}, {"prior": make_optimizer(prior, optimization)}
        )
        self.restored = None if checkpoints is None else self._restore(checkpoints)
        if mode.recompute:
            recompute_blocks(prior)
        on_gpu = device.type == "cuda"
        if on_gpu:
            compile_regions(prior)
        records = on_gpu and not mode.sharded
        copies = make_bf16_weights(stage, self.state) if records else None
        self.step = TrainStep(stage, self.state, 0, torch.bfloat16, processes, copies)
        set_rate(self.state.optimizers["prior"], 1e-4)
        self.update = StepRunner(self.step, records)

    def _restore(self, checkpoints: Path) -> dict[str, float]:
        """Reads the newest checkpoint. Returns the seconds for checking its files, and for everything."""
        self.processes.barrier()
        began = time.perf_counter()
        found = newest_of_all(checkpoints, self.processes)
        assert found is not None, f"{checkpoints} has no checkpoint"
        verified = time.perf_counter() - began
        restore(self.state, *found, self.processes)
        if self.processes.device.type == "cuda":
            torch.cuda.synchronize()
        self.processes.barrier()
        return {"seconds": round(time.perf_counter() - began, 2), "verify_seconds": round(verified, 2)}

    def numbers(self, rows: int, first: int = 0) -> Tensor:
        """The numbers of this process's images in a batch that begins at image ``first``."""
        begin = first + self.processes.rank * rows
        return torch.arange(begin, begin + rows, device=self.processes.device)

    def inputs(self, rows: int, first: int = 0) -> Inputs:
        """Latents and text states, which depend only on the numbers of their images."""
        random = ImageRandom(1, self.numbers(rows, first))
        return {
            "x": random.normal("latents", (self.config.c_in, self.side, self.side)),
            "states": random.normal("states", (TEXT_TOKENS, self.config.c_cond)),
        }

    def make_update(self, inputs: Inputs, numbers: Tensor) -> Tensor:
        """One update. Returns its loss, without waiting for the device."""
        every = self.state.updates % AVERAGED_EVERY == 0
        self.step.decay = 0.999**AVERAGED_EVERY if every else None
        values = self.update(inputs, numbers)
        self.state.updates += 1
        self.state.images += self.rows * self.processes.count
        return values["loss"]

    def seconds(self, updates: int) -> float:
        """The duration of updates that all read the same images."""
        inputs, numbers = self.inputs(self.rows), self.numbers(self.rows)
        self.processes.barrier()
        began = time.perf_counter()
        for _ in range(updates):
            loss = self.make_update(inputs, numbers)
        loss.item()
        self.processes.barrier()
        return time.perf_counter() - began

    def losses(self, updates: int) -> list[float]:
        """The losses of updates on the next images."""
        found = []
        for _ in range(updates):
            first = self.state.images
            loss = self.make_update(self.inputs(self.rows, first), self.numbers(self.rows, first))
            found.append(round(loss.item(), 6))
        return found

    def close(self) -> None:
        self.update.close()


def speed(mode: str, batch: int, options: argparse.Namespace, processes: Processes) -> dict[str, Any]:
    """Images per second, MFU and memory of one mode."""
    device, accumulate = processes.device, MODES[mode].accumulate
    rows = batch * accumulate
    updates = max(1, options.updates // accumulate)
    # What the MFU in a run's log is measured against; on a CPU, any rate will do.
    peak = throughput.matrix_rate(device) or matrix_rate(device, torch.float32, 256)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with contextlib.closing(Training(MODES[mode], rows, options, processes)) as training:
        training.seconds(options.warm)
        # The median of three rounds, each long enough to make launch overhead negligible.
        seconds = sorted(training.seconds(updates) for _ in range(3))[1]
        rate = updates * rows * processes.count / seconds
        flops = training.flops_per_image
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    del training
    free()
    return {
        "images_per_second": round(rate, 2),
        "mfu": round(rate / processes.count * flops / peak, 4),
        "memory_gib": round(memory, 2),
    }


def losses_and_checkpoint(mode: str, options: argparse.Namespace, processes: Processes) -> dict[str, Any]:
    """The first losses, then a checkpoint while training goes on."""
    folder = checkpoint_folder(options, processes.count, mode)
    if processes.is_main:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    processes.barrier()
    rows = options.compared_batch // processes.count
    with contextlib.closing(Training(MODES[mode], rows, options, processes, dropout=False)) as training:
        found: dict[str, Any] = {"losses": training.losses(COMPARED_UPDATES)}
        each = training.seconds(CHUNK * 2) / (CHUNK * 2)
        writer = Writer(folder, processes)
        # The first checkpoint also allocates pinned memory, and later ones use it again.
        found["first_checkpoint"] = _while_training(training, writer, each)
        found["checkpoint"] = _while_training(training, writer, each)
        path = writer.wait()
        writer.close()
        found["bytes"] = sum(file.stat().st_size for file in path.iterdir())
        found["update_seconds"] = round(each, 4)
    return found


def _while_training(training: Training, writer: Writer, each: float) -> dict[str, Any]:
    """Writes a checkpoint while updates go on. ``each`` is how long an update takes otherwise."""
    processes = training.processes
    if processes.is_main:  # an older one would take disk space
        for old in writer.folder.iterdir():
            shutil.rmtree(old)
    processes.barrier()
    images, began = training.state.images, time.perf_counter()
    writer.start(training.state, {})
    started = time.perf_counter() - began
    losses, updates = training.losses(AFTER_CHECKPOINT), AFTER_CHECKPOINT
    while processes.any_rank(writer.busy):
        training.seconds(CHUNK)
        updates += CHUNK
    seconds = time.perf_counter() - began
    writer.wait()
    return {
        "images": images,
        "seconds": round(seconds, 2),
        "start_seconds": round(started, 3),
        "updates_meanwhile": updates,
        "updates_lost": round(max(0.0, seconds / each - updates), 1),
        "losses_after": losses,
    }


def resume(written_by: int, options: argparse.Namespace, processes: Processes) -> dict[str, Any]:
    """Continues a checkpoint that ``written_by`` GPUs have written."""
    mode = MODES["FSDP2" if processes.count > 1 else "replicated"]
    rows = options.compared_batch // processes.count
    folder = resumable(options, written_by)
    training = Training(mode, rows, options, processes, dropout=False, checkpoints=folder)
    with contextlib.closing(training):
        return {**(training.restored or {}), "losses_after": training.losses(AFTER_CHECKPOINT)}


def checkpoint_folder(options: argparse.Namespace, count: int, mode: str) -> Path:
    return Path(options.out) / "checkpoints" / f"{count} {'sharded' if MODES[mode].sharded else 'whole'}"


def resumable(options: argparse.Namespace, count: int) -> Path:
    """The checkpoint of ``count`` GPUs that other numbers of GPUs resume."""
    return checkpoint_folder(options, count, "FSDP2" if count > 1 else "replicated")


class Rows:
    """Measurements in OUT/rows.jsonl. Those that are already there are not repeated."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def add(self, processes: Processes, key: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
        """Measures unless there is a row with this ``key``. All processes call it."""
        if processes.any_rank(any(key.items() <= row.items() for row in self.read())):
            return
        row = {**key, **measure()}
        free()
        if processes.is_main:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
        processes.barrier()  # the others read the file next


def work(options: argparse.Namespace) -> None:
    """The measurements of one number of GPUs, in one of its processes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = Rows(Path(options.out) / "rows.jsonl")
    with distributed(device) as processes:
        count = processes.count
        modes = [name for name, mode in MODES.items() if count > 1 or not mode.sharded]
        compared = [name for name in ("replicated", "FSDP2") if name in modes]
        name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        setting = {"gpus": count, "device": name, "torch": torch.__version__}
        if options.resumes and resumable(options, options.resumes).is_dir():
            key = {"part": "resume", **setting, "written_by": options.resumes}
            rows.add(processes, key, lambda: resume(options.resumes, options, processes))
        if options.only_resumes:
            return
        if "speed" in options.parts:
            for batch in options.batches:
                for mode in modes:
                    key = {"part": "speed", "mode": mode, "batch": batch, **setting}
                    rows.add(processes, key, lambda b=batch, m=mode: speed(m, b, options, processes))
        if "checkpoint" in options.parts:
            for mode in compared:
                key = {"part": "checkpoint", "mode": mode, **setting}
                rows.add(processes, key, lambda m=mode: losses_and_checkpoint(m, options, processes))
                if count > 1 and mode == "replicated" and processes.is_main:  # nothing resumes it
                    shutil.rmtree(checkpoint_folder(options, count, mode), ignore_errors=True)


def start(count: int, options: argparse.Namespace, resumes: int = 0, *, only_resumes: bool = False) -> bool:
    """Runs ``work`` in ``count`` processes. Returns whether they succeeded."""
    arguments = ["--work", "--out", options.out]
    arguments += ["--batches", *map(str, options.batches), "--parts", *options.parts]
    for name in ("warm", "updates", "side", "compared_batch"):
        arguments += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    arguments += ["--tiny"] if options.tiny else []
    arguments += ["--resumes", str(resumes)] if resumes else []
    arguments += ["--only-resumes"] if only_resumes else []
    try:
        torchrun(["--standalone", "--nproc-per-node", str(count), str(Path(__file__)), *arguments])
    except ChildFailedError as error:
        print(f"{count} GPUs: {error}", file=sys.stderr)
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32], help="images per GPU and pass")
    parser.add_argument(
        "--parts", nargs="+", choices=["speed", "checkpoint"], default=["speed", "checkpoint"]
    )
    parser.add_argument("--out", default="build/many_gpus", help="folder for rows, table and checkpoints")
    parser.add_argument("--compared-batch", type=int, default=32, help="images per compared update")
    parser.add_argument("--side", type=int, default=24, help="positions per side of the semantic latents")
    parser.add_argument("--warm", type=int, default=5)
    parser.add_argument("--updates", type=int, default=20, help="per round; there are three rounds")
    parser.add_argument("--tiny", action="store_true", help="use a small network, to test this script")
    for name, kind in (("--work", "store_true"), ("--only-resumes", "store_true")):
        parser.add_argument(name, action=kind, help=argparse.SUPPRESS)  # used by the script itself
    parser.add_argument("--resumes", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(options)
    if options.compared_batch % max(options.gpus):
        parser.error(f"--compared-batch must be a multiple of {max(options.gpus)}")
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    before, failed = 0, []
    for count in options.gpus:
        if not start(count, options, before):
            failed.append(count)
        if before:
            shutil.rmtree(resumable(options, before), ignore_errors=True)
        before = count
    if len(options.gpus) > 1 and not start(options.gpus[0], options, before, only_resumes=True):
        failed.append(options.gpus[0])
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    text = table(Rows(out / "rows.jsonl").read())
    (out / "table.md").write_text(text)
    print(text)
    if failed:
        sys.exit(f"these numbers of GPUs failed: {' '.join(map(str, failed))}. See their errors above.")
    return None


if __name__ == "__main__":
    main()

"""Training speed of Stage C at its published size on several GPUs, with one process per GPU.

    torchrun --nproc-per-node 1 benchmarks/two_gpus.py --batch 8
    torchrun --nproc-per-node 2 benchmarks/two_gpus.py --batch 8

``--batch`` is per GPU, so twice as many images per second is perfect scaling. Measures whole updates on
random latents and text states on the device: fp32 weights and optimizer, bf16 compute, compiled blocks, and a
weight average. The first measurement has replicated weights and a CUDA graph per update, the second sharded
weights. Rank 0 prints a table line and a JSON line for each.
"""

import argparse
import json
import time

import torch

from wuerstchen.diffusion.objective import PUBLISHED_OBJECTIVE
from wuerstchen.models.prior import Prior, PriorConfig
from wuerstchen.train.config import Optimization
from wuerstchen.train.engine.checkpoint import TrainingState
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


class RandomStageC:
    """Stage C with ready-made inputs."""

    name = "c"
    averaged = ("prior",)
    captions, reads_images = True, False
    rates: dict[str, float] = {}  # noqa: RUF012
    rate_scales: dict[str, float] = {}  # noqa: RUF012

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


def measure(sharding: str, options: argparse.Namespace, processes: Processes) -> dict[str, float | str | int]:
    device = processes.device
    torch.manual_seed(0)
    torch._dynamo.reset()
    config = PriorConfig() if not options.tiny else PriorConfig(c=64, c_cond=32, depth=2, nhead=2)
    with device:
        prior = Prior(config).train()
    batch = options.batch * processes.count
    optimization = Optimization(
        images=10**9, batch_size=batch * options.accumulate, accumulate=options.accumulate
    )
    average = make_average(prior)
    if sharding == "full":
        for network in (prior, average):
            shard(network, processes)
    state = TrainingState(
        {"prior": prior}, {"prior": average}, {"prior": make_optimizer(prior, optimization)}
    )
    if options.recompute:
        recompute_blocks(prior)
    if not options.eager:
        compile_regions(prior)
    records = device.type == "cuda" and sharding == "none" and not options.eager
    stage = RandomStageC(prior, optimization)
    step = TrainStep(
        stage, state, 0, torch.bfloat16, processes, make_bf16_weights(stage, state) if records else None
    )
    set_rate(state.optimizers["prior"], 1e-4)
    update = StepRunner(step, records)
    rows = options.batch * options.accumulate
    inputs = {
        "x": torch.randn(rows, config.c_in, options.side, options.side, device=device),
        "states": torch.randn(rows, 77, config.c_cond, device=device),
    }
    indices = torch.arange(rows, device=device) + processes.rank * rows

    def run(updates: int) -> float:
        processes.barrier()
        began = time.perf_counter()
        for number in range(updates):
            step.decay = 0.999**AVERAGED_EVERY if number % AVERAGED_EVERY == 0 else None
            values = update(inputs, indices)
        values["loss"].item()
        processes.barrier()
        return time.perf_counter() - began

    run(options.warm)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    # The median of several runs, each long enough to make launch overhead negligible.
    seconds = sorted(run(options.updates) for _ in range(3))[1]
    update.close()
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return {
        "benchmark": "two_gpus",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "processes": processes.count,
        "sharding": sharding,
        "batch_per_gpu": options.batch,
        "accumulate": options.accumulate,
        "recompute": options.recompute,
        "images_per_second": round(options.updates * rows * processes.count / seconds, 2),
        "memory_gib": round(memory, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=8, help="images per GPU and forward pass")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--side", type=int, default=24, help="positions per side of the semantic latents")
    parser.add_argument("--warm", type=int, default=5)
    parser.add_argument("--updates", type=int, default=50)
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="use a small network, to test the script")
    parser.add_argument("--sharding", nargs="+", default=["none", "full"])
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with distributed(device) as processes:
        for sharding in options.sharding:
            if sharding == "full" and processes.count == 1:
                continue
            result = measure(sharding, options, processes)
            if processes.is_main:
                print(f"{processes.count} × {sharding:5} {result['images_per_second']:8.2f} img/s")
                print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()

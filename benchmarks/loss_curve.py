"""Checks that fast updates learn as well as eager ones: 200 of each on the same images, times and noise.

    python benchmarks/loss_curve.py [--updates 200] [--depth 8] [--plain 4]

A prior of the published width overfits 256 random latents with random texts: once with compiled blocks,
recorded updates and the MLP kernels, and several times in plain eager mode, each with its own dropout seed.
Plain curves differ by the effects of dropout and rounding. The fast curve must be as close to them. Prints
means over ten updates, and the distances between curves.
"""

import argparse
import dataclasses
import json
from itertools import combinations

import torch
from training import CUDA, StageC

from wuerstchen.models.mlp import ChannelMLP
from wuerstchen.models.prior import PriorConfig
from wuerstchen.train.engine.checkpoint import TrainingState
from wuerstchen.train.engine.distributed import Processes
from wuerstchen.train.engine.ema import make_average
from wuerstchen.train.engine.optim import learning_rate, make_optimizer, set_rate
from wuerstchen.train.engine.update import StepRunner, TrainStep, compile_regions, make_bf16_weights

BATCH, IMAGES, WINDOW = 8, 256, 10


def curve(depth: int, updates: int, seed: int, fast: bool) -> torch.Tensor:
    """Losses, as means over ten updates."""
    has_kernels = ChannelMLP._has_kernels
    if not fast:
        ChannelMLP._has_kernels = lambda self, hidden: False  # type: ignore[method-assign]
    try:
        torch.manual_seed(0)
        StageC.config = PriorConfig(depth=depth)
        stage = StageC(BATCH)
        stage.optimization = dataclasses.replace(stage.optimization, warmup=20 * BATCH)
        optimizer = make_optimizer(stage.network, stage.optimization)
        averages = {"network": make_average(stage.network)}
        state = TrainingState(networks=stage.networks, averages=averages, optimizers={"network": optimizer})
        if fast:
            compile_regions(stage.network)
        copies = make_bf16_weights(stage, state) if fast else {}  # type: ignore[arg-type]
        update = StepRunner(TrainStep(stage, state, 0, torch.bfloat16, Processes(CUDA), copies), record=fast)  # type: ignore[arg-type]
        torch.manual_seed(1)
        data = stage.data(IMAGES)
        torch.manual_seed(seed)  # for dropout
        losses = []
        for number in range(updates):
            indices = torch.arange(number * BATCH, (number + 1) * BATCH, device=CUDA)
            set_rate(optimizer, learning_rate(stage.optimization, (number + 1) * BATCH))
            chosen = {name: tensor[indices % IMAGES] for name, tensor in data.items()}
            losses.append(update(chosen, indices)["loss"].clone())
        return torch.stack(losses).cpu().unflatten(0, (-1, WINDOW)).mean(1)
    finally:
        ChannelMLP._has_kernels = has_kernels  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--plain", type=int, default=4, help="number of plain curves, at least two")
    options = parser.parse_args()
    fast = curve(options.depth, options.updates, seed=2, fast=True)
    plain = [curve(options.depth, options.updates, 3 + n, fast=False) for n in range(options.plain)]
    print("update    fast  plain")
    for row, values in enumerate(zip(fast, *plain, strict=True)):
        print(f"{(row + 1) * WINDOW:6}  " + "  ".join(f"{value:.5f}" for value in values))
    compared = {
        "two plain curves": list(combinations(plain, 2)),
        "fast and plain": [(fast, p) for p in plain],
    }
    for name, pairs in compared.items():
        means, most = zip(*((d.mean(), d.max()) for d in ((a - b).abs() for a, b in pairs)), strict=True)
        print(
            f"{name}: mean difference {min(means):.5f} to {max(means):.5f}, largest difference "
            f"{min(most):.5f} to {max(most):.5f}"
        )
    rows = {"fast": fast, **{f"plain {n}": p for n, p in enumerate(plain)}}
    print(json.dumps({name: [round(v, 6) for v in values.tolist()] for name, values in rows.items()}))


if __name__ == "__main__":
    main()

"""Whether fast updates learn as plain ones do: 200 of them on the same pictures, times and noise.

    python benchmarks/loss_curve.py [--updates 200] [--depth 8] [--plain 4]

A prior of the published width on 256 random maps with random texts, which it learns by heart: once with
blocks compiled, updates recorded and the MLP's kernels, and several times as everything is written (eager, no
kernels), each with a seed of dropout of its own. Plain curves are apart by what dropout and rounding do; the
fast one has to be as near to them. Prints means over ten updates and the distances.
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

BATCH, PICTURES, WINDOW = 8, 256, 10


def curve(depth: int, updates: int, seed: int, fast: bool) -> torch.Tensor:
    """The loss of each update, means over ten."""
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
        pictures = stage.data(PICTURES)
        torch.manual_seed(seed)  # of dropout
        losses = []
        for number in range(updates):
            indices = torch.arange(number * BATCH, (number + 1) * BATCH, device=CUDA)
            set_rate(optimizer, learning_rate(stage.optimization, (number + 1) * BATCH))
            chosen = {name: tensor[indices % PICTURES] for name, tensor in pictures.items()}
            losses.append(update(chosen, indices)["loss"].clone())
        return torch.stack(losses).cpu().unflatten(0, (-1, WINDOW)).mean(1)
    finally:
        ChannelMLP._has_kernels = has_kernels  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--plain", type=int, default=4, help="plain curves, at least two")
    options = parser.parse_args()
    fast = curve(options.depth, options.updates, seed=2, fast=True)
    plain = [curve(options.depth, options.updates, 3 + n, fast=False) for n in range(options.plain)]
    print("update    fast  plain")
    for row, values in enumerate(zip(fast, *plain, strict=True)):
        print(f"{(row + 1) * WINDOW:6}  " + "  ".join(f"{value:.5f}" for value in values))
    apart = {"of two plain ones": list(combinations(plain, 2)), "fast and plain": [(fast, p) for p in plain]}
    for name, pairs in apart.items():
        means, most = zip(*((d.mean(), d.max()) for d in ((a - b).abs() for a, b in pairs)), strict=True)
        print(
            f"{name}: {min(means):.5f} to {max(means):.5f} apart on average, {min(most):.5f} to "
            f"{max(most):.5f} at most"
        )
    rows = {"fast": fast, **{f"plain {n}": p for n, p in enumerate(plain)}}
    print(json.dumps({name: [round(v, 6) for v in values.tolist()] for name, values in rows.items()}))


if __name__ == "__main__":
    main()

"""Updates a second of Stage C at the published size on one GPU, against diffusers' network beside it.

    python benchmarks/training.py [--batches 8 32 64] [--no-compiled-peer]

Random weights and data: maps of 24×24, text of 77×1280, dropout on. Both have fp32 weights and AdamW states
and compute in bf16 autocast. The peer is diffusers' WuerstchenPrior in the original's step (p2 weight,
clipping, AdamW), as it stands and under torch.compile; ours is the step that `wuerstchen train` makes, with
compiled blocks and an average of the weights. A matrix product of 8192³ in bf16 is measured beside them;
FLOP are three times those of the forward pass.
"""

import argparse
import dataclasses
import gc
import json
import time
from collections.abc import Callable
from importlib.metadata import version

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from wuerstchen.diffusion.schedule import PUBLISHED_SCHEDULE, training_timesteps
from wuerstchen.models.prior import Prior, PriorConfig
from wuerstchen.train.config import Optimization
from wuerstchen.train.ema import make_average
from wuerstchen.train.optim import make_optimizer
from wuerstchen.train.parallel import Processes
from wuerstchen.train.random import ImageRandom
from wuerstchen.train.snapshot import TrainingState
from wuerstchen.train.stages import Inputs, Losses, diffusion_loss
from wuerstchen.train.step import Step, compile_regions

CUDA = torch.device("cuda")
CONFIG = PriorConfig()
PEER_BATCH = 8


class StageC:
    """What the step needs of Stage C, on data that are there already."""

    name = "c"
    averaged = ("prior",)

    def __init__(self, prior: Prior, batch: int) -> None:
        self.optimization = Optimization(images=10**9, batch_size=batch)
        self.networks: dict[str, nn.Module] = {"prior": prior}

    def losses(self, inputs: Inputs, random: ImageRandom) -> Losses:
        x = inputs["map"]
        t = training_timesteps(random.uniform("t"))
        noise = random.normal("noise", x.shape[1:])
        prior = self.networks["prior"]
        predicted = prior(PUBLISHED_SCHEDULE.add_noise(x, noise, t), t, prior.context(inputs["text"]))
        yield "prior", diffusion_loss(predicted, noise, t, "p2"), {}


def data(batch: int) -> Inputs:
    return {
        "map": torch.randn(batch, 16, 24, 24, device=CUDA),
        "text": torch.randn(batch, 77, 1280, device=CUDA),
    }


def our_step(batch: int, compiled: bool = True) -> Callable[[], None]:
    torch.manual_seed(0)
    with CUDA:
        prior = Prior(CONFIG).train()
    stage = StageC(prior, batch)
    state = TrainingState(
        networks=stage.networks,
        averages={"prior": make_average(prior)},
        optimizers={"prior": make_optimizer(prior, stage.optimization)},
    )
    if compiled:
        compile_regions(prior)
    step = Step(stage, state, 0, True, Processes(CUDA))  # type: ignore[arg-type]
    inputs, indices = data(batch), torch.arange(batch, device=CUDA)
    return lambda: step(inputs, indices)


def peer_step(batch: int, compiled: bool) -> Callable[[], None]:
    from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior import WuerstchenPrior

    fields = {k: v for k, v in dataclasses.asdict(CONFIG).items() if k != "prediction"}
    with CUDA:
        prior = WuerstchenPrior(**fields).train()
    network = torch.compile(prior) if compiled else prior
    optimizer = torch.optim.AdamW(prior.parameters(), lr=1e-4)
    inputs = data(batch)

    def step() -> None:
        x = inputs["map"]
        t = (torch.rand(batch, device=CUDA) * 1.08 + 0.001).clamp(0.001, 1.0)
        noise = torch.randn_like(x)
        noised = PUBLISHED_SCHEDULE.add_noise(x, noise, t)
        with torch.autocast("cuda", torch.bfloat16):
            predicted = network(noised, t, inputs["text"])
            errors = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
            loss = (errors * PUBLISHED_SCHEDULE.p2_weight(t)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def forward_flop() -> int:
    """Of one picture."""
    with CUDA, FlopCounterMode(display=False) as counter, torch.no_grad():
        prior = Prior(CONFIG).eval()
        prior(torch.randn(1, 16, 24, 24), torch.rand(1), prior.context(torch.randn(1, 77, 1280)))
    return counter.get_total_flops()


def measure(make: Callable[[], Callable[[], None]], seconds: float = 6.0) -> dict[str, float] | None:
    """Updates a second after the first three, which compile; None where memory does not suffice."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    try:
        step = make()
        step()
        torch.cuda.synchronize()
        first = time.perf_counter() - began
        for _ in range(2):
            step()
        torch.cuda.synchronize()
        began, updates = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            step()
            torch.cuda.synchronize()
            updates += 1
        took = time.perf_counter() - began
    except torch.OutOfMemoryError:
        return None
    gib = torch.cuda.max_memory_allocated() / 2**30
    return {"updates_per_second": updates / took, "gib": gib, "seconds_to_first_update": first}


def matrix_rate() -> float:
    """FLOP a second of a product of 8192×8192 matrices in bf16, on random data."""
    a, b = (torch.randn(8192, 8192, device=CUDA, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(10):
        a @ b
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(50):
        a @ b
    torch.cuda.synchronize()
    return 50 * 2 * 8192**3 / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--no-compiled-peer", action="store_true", help="compiling it takes minutes")
    options = parser.parse_args()
    rate, flop = matrix_rate(), 3 * forward_flop()
    print(f"{torch.cuda.get_device_name()}: {rate / 1e12:.0f} TFLOP/s, {flop / 1e12:.2f} TFLOP a picture")
    rows = {}

    def row(name: str, batch: int, make: Callable[[], Callable[[], None]]) -> None:
        found = measure(make)
        if found is None:
            print(f"{name:<40} does not fit", flush=True)
            return
        images = found["updates_per_second"] * batch
        rows[name] = {**found, "images_per_second": images, "share_of_matrix_rate": images * flop / rate}
        print(
            f"{name:<40} {images:7.1f} img/s {100 * images * flop / rate:5.1f} % of the matrix rate "
            f"{found['gib']:6.1f} GiB, first update after {found['seconds_to_first_update']:.0f} s",
            flush=True,
        )

    row(f"diffusers, batch {PEER_BATCH}", PEER_BATCH, lambda: peer_step(PEER_BATCH, False))
    for batch in options.batches:
        row(f"wuerstchen, batch {batch}", batch, lambda batch=batch: our_step(batch))
    if not options.no_compiled_peer:
        row(f"diffusers, compiled, batch {PEER_BATCH}", PEER_BATCH, lambda: peer_step(PEER_BATCH, True))
    ours = rows.get(f"wuerstchen, batch {PEER_BATCH}")
    for name, found in rows.items():
        if name.startswith("diffusers") and ours is not None:
            print(f"{ours['images_per_second'] / found['images_per_second']:.2f} times {name}")
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "torch": version("torch"), "rows": rows}))


if __name__ == "__main__":
    main()

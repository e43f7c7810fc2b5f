"""Training speed of Stages C and B at the published sizes on one GPU, compared with diffusers' networks.

    python benchmarks/training.py [--stages c b] [--batches 8 32 64] [--no-compiled-peer]

Weights and data are random, and dropout is on. Stage C has semantic latents of 24×24 and text of 77×1280.
Stage B at 512 pixels has latents of 128×128, semantic latents of 12×12 and text of 77×1024. The compressor is
left out on both sides, because diffusers cannot train one. Both sides have fp32 weights and AdamW states, and
compute in bf16 autocast. The peer is diffusers' network with the original's training step (p2 weight,
clipping, AdamW), eager and under torch.compile. Ours is the update of `wuerstchen train`: compiled blocks,
bf16 weights maintained by the optimizer, an average of the weights, all recorded as a CUDA graph. MFU is
relative to a bf16 matrix product of 8192³ measured here, and counts three times the FLOP of the forward pass.
"""

import argparse
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from measuring import free, matrix_rate
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from wuerstchen.checkpoints.diffusers_config import shared_fields
from wuerstchen.diffusion.objective import PUBLISHED_OBJECTIVE
from wuerstchen.models.decoder import Decoder, DecoderConfig
from wuerstchen.models.prior import Prior, PriorConfig
from wuerstchen.train.config import Optimization
from wuerstchen.train.engine.checkpoint import TrainingState
from wuerstchen.train.engine.distributed import Processes
from wuerstchen.train.engine.ema import make_average
from wuerstchen.train.engine.optim import make_optimizer
from wuerstchen.train.engine.update import StepRunner, TrainStep, compile_regions, make_bf16_weights
from wuerstchen.train.feed.random import ImageRandom
from wuerstchen.train.stages.base import Inputs, Losses

CUDA = torch.device("cuda")
AVERAGED_EVERY = 100  # updates, as in the original and in the recipes of its sizes


class StageC:
    """The prior on ready-made data, with the interface of a stage in ``wuerstchen.train.engine.update``."""

    name = "c"
    peer_batch = 8
    config: Any = PriorConfig()

    def __init__(self, batch: int) -> None:
        self.optimization = Optimization(images=10**9, batch_size=batch)
        with CUDA:
            self.network = self.make()
        self.averaged = ("network",)
        self.networks: dict[str, nn.Module] = {"network": self.network}

    def make(self) -> nn.Module:
        return Prior(self.config)

    @staticmethod
    def data(batch: int) -> Inputs:
        return {
            "x": torch.randn(batch, 16, 24, 24, device=CUDA),
            "text": torch.randn(batch, 77, 1280, device=CUDA),
        }

    def predict(self, x: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
        return self.network(x, t, self.network.context(inputs["text"], cache_kv=False))

    def losses(self, inputs: Inputs, random: ImageRandom) -> Losses:
        x = inputs["x"]
        t = PUBLISHED_OBJECTIVE.times(random.uniform("t"))
        noise = random.normal("noise", x.shape[1:])
        output = self.predict(PUBLISHED_OBJECTIVE.noised(x, noise, t), t, inputs)
        yield "network", PUBLISHED_OBJECTIVE.loss(output, x, noise, t).mean(), {}

    @classmethod
    def peer(cls) -> nn.Module:
        from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior import WuerstchenPrior

        return WuerstchenPrior(**shared_fields(cls.config))

    @staticmethod
    def peer_predict(peer: nn.Module, x: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
        return peer(x, t, inputs["text"])


class StageB(StageC):
    """The decoder at 512 pixels."""

    name = "b"
    peer_batch = 32
    config = DecoderConfig()

    def make(self) -> nn.Module:
        return Decoder(self.config)

    @staticmethod
    def data(batch: int) -> Inputs:
        return {
            "x": torch.randn(batch, 4, 128, 128, device=CUDA),
            "semantic_latents": torch.randn(batch, 16, 12, 12, device=CUDA),
            "text": torch.randn(batch, 77, 1024, device=CUDA),
        }

    def predict(self, x: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
        size = (x.shape[2], x.shape[3])
        return self.network(
            x, t, self.network.context(inputs["semantic_latents"], size, inputs["text"], cache_kv=False)
        )

    @classmethod
    def peer(cls) -> nn.Module:
        from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext import WuerstchenDiffNeXt

        return WuerstchenDiffNeXt(**shared_fields(cls.config))

    @staticmethod
    def peer_predict(peer: nn.Module, x: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
        return peer(x, t, inputs["semantic_latents"], inputs["text"])


def our_step(stage_type: type[StageC], batch: int) -> Callable[[], None]:
    torch.manual_seed(0)
    stage = stage_type(batch)
    state = TrainingState(
        networks=stage.networks,
        averages={"network": make_average(stage.network)},
        optimizers={"network": make_optimizer(stage.network, stage.optimization)},
    )
    compile_regions(stage.network)
    step = TrainStep(stage, state, 0, torch.bfloat16, Processes(CUDA), make_bf16_weights(stage, state))  # type: ignore[arg-type]
    update = StepRunner(step, record=True)
    inputs, indices = stage.data(batch), torch.arange(batch, device=CUDA)

    def one() -> None:
        state.updates += 1
        step.decay = 0.999**AVERAGED_EVERY if state.updates % AVERAGED_EVERY == 0 else None
        update(inputs, indices)

    return one


def peer_step(stage: type[StageC], batch: int, compiled: bool) -> Callable[[], None]:
    with CUDA:
        peer = stage.peer().train()
    network = torch.compile(peer) if compiled else peer
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-4)
    inputs = stage.data(batch)

    def step() -> None:
        x = inputs["x"]
        t = (torch.rand(batch, device=CUDA) * 1.08 + 0.001).clamp(0.001, 1.0)
        noise = torch.randn_like(x)
        noised = PUBLISHED_OBJECTIVE.noised(x, noise, t)
        with torch.autocast("cuda", torch.bfloat16):
            predicted = stage.peer_predict(network, noised, t, inputs)
            errors = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
            loss = (errors * PUBLISHED_OBJECTIVE.weight(t)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def forward_flop(stage_type: type[StageC]) -> int:
    """FLOP of the forward pass of one image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        stage = stage_type(1)
        inputs = stage.data(1)
        stage.predict(inputs["x"], torch.rand(1, device=CUDA), inputs)
    return counter.get_total_flops()


def measure(make: Callable[[], Callable[[], None]], seconds: float = 6.0) -> dict[str, float] | None:
    """Updates per second after ten updates that compile and record. None if it does not fit into memory."""
    free()
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    try:
        step = make()
        step()
        torch.cuda.synchronize()
        first = time.perf_counter() - began
        for _ in range(9):
            step()
        torch.cuda.synchronize()
        began, updates = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            for _ in range(4):
                step()
            torch.cuda.synchronize()
            updates += 4
        took = time.perf_counter() - began
    except torch.OutOfMemoryError:
        return None
    gib = torch.cuda.max_memory_allocated() / 2**30
    return {"updates_per_second": updates / took, "gib": gib, "seconds_to_first_update": first}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", nargs="+", choices=["c", "b"], default=["c", "b"])
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument(
        "--no-compiled-peer", action="store_true", help="skip compiling the peer, which takes minutes"
    )
    options = parser.parse_args()
    rate = matrix_rate(CUDA, torch.bfloat16)
    print(f"{torch.cuda.get_device_name()}: {rate / 1e12:.0f} TFLOP/s")
    rows = {}

    def row(name: str, batch: int, flop: int, make: Callable[[], Callable[[], None]]) -> None:
        found = measure(make)
        if found is None:
            print(f"{name:<48} does not fit", flush=True)
            return
        images = found["updates_per_second"] * batch
        rows[name] = {**found, "images_per_second": images, "mfu": images * flop / rate}
        print(
            f"{name:<48} {images:7.1f} img/s {100 * images * flop / rate:5.1f} % MFU "
            f"{found['gib']:6.1f} GiB, first update after {found['seconds_to_first_update']:.0f} s",
            flush=True,
        )

    for stage in (StageC, StageB):
        if stage.name not in options.stages:
            continue
        flop, batch, title = 3 * forward_flop(stage), stage.peer_batch, f"Stage {stage.name.upper()}"
        print(f"{title}: {flop / 1e12:.2f} TFLOP per image")
        peers = {f"{title}, diffusers, batch {batch}": False}
        if not options.no_compiled_peer:
            peers[f"{title}, diffusers, compiled, batch {batch}"] = True
        for name, compiled in peers.items():
            row(name, batch, flop, lambda s=stage, b=batch, c=compiled: peer_step(s, b, c))
        for size in sorted({batch, *options.batches}):
            row(f"{title}, wuerstchen, batch {size}", size, flop, lambda s=stage, b=size: our_step(s, b))
        ours = rows.get(f"{title}, wuerstchen, batch {batch}")
        for name in peers:
            if ours is not None and name in rows:
                print(f"{ours['images_per_second'] / rows[name]['images_per_second']:.2f}× {name}")
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "torch": version("torch"), "rows": rows}))


if __name__ == "__main__":
    main()

"""Model FLOPs utilisation (MFU) and memory use of a stage.

The usual convention: an update costs three times the FLOPs of its forward passes, and recomputation is not
counted. The peak is measured here on a large matrix product, not taken from the data sheet.
"""

import contextlib
import functools
import time
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from wuerstchen.train.feed.random import ImageRandom
from wuerstchen.train.stages.base import Inputs, Stage, autocast

_SIDE = 8192


@functools.cache
def matrix_rate(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float | None:
    """FLOP/s of products of two 8192 × 8192 matrices in ``dtype``; None on devices other than NVIDIA GPUs."""
    if device.type != "cuda":
        return None
    try:
        generator = torch.Generator(device).manual_seed(0)  # leaves the state of the global one alone
        x, y = (torch.randn(_SIDE, _SIDE, device=device, dtype=dtype, generator=generator) for _ in range(2))
        for _ in range(5):
            torch.mm(x, y)
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        for _ in range(20):
            torch.mm(x, y)
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        return None
    return 20 * 2 * _SIDE**3 / (time.perf_counter() - began)


@torch.no_grad()
def update_flops(
    stage: Stage,
    inputs: Inputs,
    indices: Int[Tensor, " b"],
    seed: int,
    dtype: torch.dtype | None,
) -> int:
    """FLOPs of one update on these inputs: three times the forward passes of ``stage.losses``.

    The frozen networks in ``stage.prepare`` are not counted. Networks and generators are left unchanged:
    everything runs in eval mode.
    """
    device = indices.device
    counter = FlopCounterMode(display=False)
    # The counter does not see inside compiled blocks.
    with _evaluating(stage.networks.values()), torch.compiler.set_stance("force_eager"):
        losses = stage.losses(inputs, ImageRandom(seed, indices))
        with counter, autocast(device, dtype):
            for _ in losses:
                pass
    return 3 * counter.get_total_flops()


@contextlib.contextmanager
def _evaluating(networks: Any) -> Iterator[None]:
    modes: list[tuple[nn.Module, bool]] = [(m, m.training) for n in networks for m in n.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class Gauge:
    """MFU and memory for progress events. Measures nothing on a CPU."""

    def __init__(
        self,
        stage: Stage,
        seed: int,
        dtype: torch.dtype | None,
        device: torch.device,
    ) -> None:
        self.stage = stage
        self.seed = seed
        self.dtype = dtype
        self.device = device
        self.peak = matrix_rate(device, dtype or torch.bfloat16)
        self.flops_per_image: float | None = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def before_update(self, inputs: Inputs, indices: Int[Tensor, " b"]) -> None:
        """Counts the FLOPs of the first update."""
        if self.peak is not None and self.flops_per_image is None:
            flops = update_flops(self.stage, inputs, indices, self.seed, self.dtype)
            self.flops_per_image = flops / len(indices)

    def read(self, images_per_second: float) -> dict[str, float]:
        """``memory_gib``, the peak since the stage began, and ``matrix_share``, the MFU, where they are
        known.

        ``matrix_share`` is the name of the MFU in log.jsonl.
        """
        known = {}
        if self.device.type == "cuda":
            known["memory_gib"] = round(torch.cuda.max_memory_allocated(self.device) / 2**30, 3)
        if self.peak and self.flops_per_image:
            known["matrix_share"] = round(images_per_second * self.flops_per_image / self.peak, 4)
        return known

"""The GPU memory for fine-tuning the published prior, including frozen networks and previews.

    python benchmarks/finetune_memory.py [--batches 32 64] [--recompute] [--card-gb 80]

Weights and images are random. Updates are those of the recipe `v2-finetune` on images of 1024 pixels: the
compressor and the text encoder compute the inputs, and the update is recorded as a CUDA graph. The process is
limited to the memory of a card of --card-gb, less 0.7 GB for the CUDA context. A preview of two prompts is
drawn at the end as in a run, in low-memory mode if needed.
"""

import argparse
import dataclasses
import json
import time
from typing import Any

import torch
from measuring import free
from random_model import random_v2

from wuerstchen.errors import UserError
from wuerstchen.models.cascade import PUBLISHED_STATISTICS, Cascade
from wuerstchen.models.compressor import Compressor, CompressorConfig
from wuerstchen.recipes.v2 import v2_finetune
from wuerstchen.train.config import Recipe
from wuerstchen.train.engine.checkpoint import TrainingState
from wuerstchen.train.engine.distributed import Processes
from wuerstchen.train.engine.ema import make_average
from wuerstchen.train.engine.optim import make_optimizer
from wuerstchen.train.engine.update import (
    StepRunner,
    TrainStep,
    compile_regions,
    make_bf16_weights,
    recompute_blocks,
)
from wuerstchen.train.feed.images import Batch
from wuerstchen.train.stages.base import inputs_of
from wuerstchen.train.stages.prior import StageC

CONTEXT = 0.7e9  # bytes of the CUDA context, which torch does not count
UPDATES = 6  # three eager, one recorded, two replayed


def measure(recipe: Recipe, cascade: Cascade, batch: int, size: int, device: torch.device) -> dict[str, Any]:
    """Memory in GiB after setup, at the peak of updates, and at the peak including a preview."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    optimization = dataclasses.replace(recipe.stage_c.optimization, batch_size=batch)
    prior = cascade.prior
    assert prior is not None
    prior.to(device).train().requires_grad_(True)
    config = dataclasses.replace(recipe.stage_c, optimization=optimization)
    settings = dataclasses.replace(cascade.settings, latent_statistics=PUBLISHED_STATISTICS)
    model = dataclasses.replace(cascade, settings=settings)
    stage = StageC(config, recipe, model, device=device)
    state = TrainingState(
        networks=stage.networks,
        averages={"prior": make_average(prior)},
        optimizers={"prior": make_optimizer(prior, optimization)},
    )
    records = device.type == "cuda"
    if recipe.recompute == "blocks":
        recompute_blocks(prior)
    if records:
        compile_regions(prior)
    copies = make_bf16_weights(stage, state) if records else {}
    step = TrainStep(stage, state, 0, torch.bfloat16, Processes(device), copies)  # type: ignore[arg-type]
    update = StepRunner(step, records)
    found: dict[str, Any] = {"batch": batch, "recompute": recipe.recompute, "before": _allocated()}
    began = time.monotonic()
    for number in range(UPDATES):
        images = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8)
        captions = [f"image {number} {row}" for row in range(batch)]
        seen = Batch(torch.arange(batch), images, captions, [])
        state.updates += 1
        step.decay = None
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            inputs = inputs_of(stage, seen, device)
        update(inputs, seen.indices.to(device))
    found["peak of updates"], found["reserved"] = _peak(), _peak(reserved=True)
    found["seconds"] = round(time.monotonic() - began, 1)
    found["preview"] = "as usual"
    try:
        stage.preview(state.averages, torch.empty(0), device)
    except (torch.OutOfMemoryError, UserError):  # as a run does (``train/engine/observe.py``)
        found["preview"] = "with less memory"
    if found["preview"] != "as usual":
        free()
        stage.preview(state.averages, torch.empty(0), device, low_memory=True)
    found["peak with a preview"], found["reserved with a preview"] = _peak(), _peak(reserved=True)
    update.close()
    return found


def _allocated() -> float | None:
    return round(torch.cuda.memory_allocated() / 2**30, 2) if torch.cuda.is_available() else None


def _peak(reserved: bool = False) -> float | None:
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    most = torch.cuda.max_memory_reserved() if reserved else torch.cuda.max_memory_allocated()
    return round(most / 2**30, 2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[64])
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--card-gb", type=float, default=80.0)
    parser.add_argument(
        "--tiny", action="store_true", help="use small networks and images, to test this script"
    )
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (options.card_gb * 1e9 - CONTEXT) / whole))
    recipe = dataclasses.replace(
        v2_finetune(),
        precision="bf16",
        recompute="blocks" if options.recompute else "none",
        preview_prompts=("a cat", "a tree"),
        prior_steps=3,
        decoder_steps=2,
    )
    for batch in options.batches:
        cascade = random_v2(device, tiny=options.tiny)
        backbone = "efficientnet_lite0" if options.tiny else "efficientnet_v2_s"
        with device:
            compressor = Compressor(CompressorConfig(backbone=backbone)).eval()
        settings = dataclasses.replace(
            cascade.settings, prior_steps=3, decoder_steps=2, image_size=128 if options.tiny else 1024
        )
        cascade = dataclasses.replace(cascade, compressor=compressor, settings=settings)
        try:
            found = measure(recipe, cascade, batch, settings.image_size, device)
        except torch.OutOfMemoryError as error:
            found = {"batch": batch, "recompute": recipe.recompute, "out of memory": str(error)[:200]}
        print(json.dumps(found), flush=True)
        del cascade
        free()


if __name__ == "__main__":
    main()

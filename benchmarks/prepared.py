"""Training speed of Stage C including the frozen networks, on image files and on prepared sets.

    python benchmarks/prepared.py [--published] [--batch 8] [--workers 8] [--seconds 10]

Compares three sources of the same images: files, for which latents and text states are computed during
training; a prepared set with token ids, for which text states are computed during training; and a prepared
set with stored text states. The time includes loading. Without --published all networks are tiny, on any
device. With it they have the published sizes and random weights, images have 1024 pixels, and training runs
on a GPU in bf16 with all optimizations. Prints a table and a line of JSON.
"""

import argparse
import dataclasses
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from wuerstchen.checkpoints.text_encoder import read_text_encoder
from wuerstchen.data.folder import FolderSource
from wuerstchen.data.prepare import prepare
from wuerstchen.data.prepare_job import Execution, Rank
from wuerstchen.data.prepare_networks import Networks
from wuerstchen.data.prepare_plan import PrepareConfig
from wuerstchen.data.prepared import PreparedSet
from wuerstchen.data.readers import FolderReader
from wuerstchen.models.cascade import Cascade, CascadeSettings, LatentStatistics
from wuerstchen.models.compressor import Compressor, CompressorConfig
from wuerstchen.models.decoder import Decoder
from wuerstchen.models.prior import Prior
from wuerstchen.models.text import PromptTooLongWarning
from wuerstchen.models.vqgan import VQGAN
from wuerstchen.pipeline import BUNDLED
from wuerstchen.recipes.tiny import tiny
from wuerstchen.train.engine.checkpoint import TrainingState
from wuerstchen.train.engine.distributed import Processes
from wuerstchen.train.engine.ema import make_average
from wuerstchen.train.engine.optim import make_optimizer
from wuerstchen.train.engine.update import StepRunner, TrainStep, compile_regions, make_bf16_weights
from wuerstchen.train.feed.images import Feed, batches
from wuerstchen.train.feed.prepared import PreparedFeed
from wuerstchen.train.stages.base import inputs_of
from wuerstchen.train.stages.prior import StageC

_IMAGES = 10**9  # of the run, which is never completed


def photos(folder: Path, count: int, size: int) -> None:
    """Writes JPEG files with 1.5 times the training resolution, as photographs would be larger."""
    rng, side = np.random.default_rng(0), size * 3 // 2
    for number in range(count):
        noise = rng.integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((side, side)).save(folder / f"{number:03}.jpg", quality=90)
        (folder / f"{number:03}.txt").write_text(f"image number {number} of a thing on a background")


def make_cascade(published: bool, device: torch.device) -> Cascade:
    torch.manual_seed(0)
    if not published:
        recipe = tiny()
        return Cascade(
            settings=CascadeSettings(image_size=recipe.image_size, text_mask=True),
            vqgan=VQGAN(recipe.vqgan),
            decoder=Decoder(recipe.decoder),
            compressor=Compressor(recipe.compressor),
            prior=Prior(recipe.prior),
            text_encoder=read_text_encoder(BUNDLED / "text_encoder"),
        )
    from random_model import random_v2

    with device:
        compressor = Compressor(CompressorConfig())
    return dataclasses.replace(random_v2(device), compressor=compressor)


def step_of(stage: StageC, fast: bool, device: torch.device) -> TrainStep:
    prior = stage.prior.to(device).requires_grad_(True).train()
    networks: dict[str, nn.Module] = {"prior": prior}
    state = TrainingState(
        networks=networks,
        averages={"prior": make_average(prior)},
        optimizers={"prior": make_optimizer(prior, stage.optimization)},
    )
    if fast:
        compile_regions(prior)
    return TrainStep(
        stage,
        state,
        0,
        torch.bfloat16 if fast else None,
        Processes(device),
        make_bf16_weights(stage, state) if fast else None,
    )


def rate(step: TrainStep, updates: Iterator, seconds: float, fast: bool) -> float:
    """Images per second, after four updates that compile, record, and fill the queues of the workers."""
    device, update_of = step.device, StepRunner(step, record=fast)

    def update() -> int:
        batch = next(updates)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=fast):
            inputs = inputs_of(step.stage, batch, device)
        update_of(inputs, batch.indices.to(device))
        return len(batch.indices)

    def finished() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(4):
        update()
    finished()
    began, images = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        images += update()
        finished()
    return images / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--published", action="store_true", help="use the published sizes, on a GPU")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, default=None, help="default: 8 with --published, else 1")
    parser.add_argument(
        "--seconds", type=float, default=None, help="per source (default: 10 with --published, else 3)"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore", PromptTooLongWarning)
    published: bool = options.published
    device = torch.device("cuda" if published or torch.cuda.is_available() else "cpu")
    workers = options.workers if options.workers is not None else (8 if published else 1)
    seconds = options.seconds if options.seconds is not None else (10.0 if published else 3.0)
    cascade = make_cascade(published, device)
    for network in cascade.networks().values():
        network.to(device).eval()
    assert cascade.compressor is not None
    assert cascade.prior is not None
    assert cascade.text_encoder is not None
    size, channels = cascade.settings.image_size, cascade.compressor.config.c_latent
    recipe = dataclasses.replace(tiny(), text_positions="all" if published else "real")
    optimization = dataclasses.replace(
        recipe.stage_c.optimization, images=_IMAGES // options.batch * options.batch, batch_size=options.batch
    )
    config = dataclasses.replace(recipe.stage_c, optimization=optimization)
    statistics = LatentStatistics(mean=(0.0,) * channels, std=(1.0,) * channels)
    settings = dataclasses.replace(cascade.settings, latent_statistics=statistics)
    stage = StageC(config, recipe, dataclasses.replace(cascade, settings=settings))
    step = step_of(stage, published, device)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "photos").mkdir()
        photos(root / "photos", 64, size)
        networks = Networks(
            compressor=cascade.compressor, text_encoder=cascade.text_encoder, settings=cascade.settings
        )
        prepare(
            FolderReader(root / "photos"),
            root / "set",
            networks,
            PrepareConfig(
                size=size, max_ratio=1.0, crop="random", crops=2, text_states="int8", batch_size=options.batch
            ),
            Execution(device=device, workers=workers, rank=Rank()),
        )
        prepared = PreparedSet(root / "set")
        images, batch = optimization.images, options.batch
        sources: dict[str, Callable[[], Feed | PreparedFeed]] = {
            "image files": lambda: Feed(FolderSource(root / "photos"), 0, size, captions=True),
            "prepared, tokens": lambda: PreparedFeed(prepared, 0, images, batch, "tokens"),
            "prepared, states": lambda: PreparedFeed(prepared, 0, images, batch, "states"),
        }
        rows: dict[str, float] = {}
        for name, make in sources.items():
            updates = iter(batches(make(), 0, images, batch, workers))
            rows[name] = rate(step, updates, seconds, fast=published)
            updates.close()  # type: ignore[attr-defined]
            ratio = rows[name] / rows["image files"]
            print(f"{name:<20} {rows[name]:8.1f} images/s  {ratio:5.2f}× image files", flush=True)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    settings = {"published": published, "batch": batch, "size": size, "workers": workers}
    print(json.dumps({"device": machine, "torch": version("torch"), **settings, "images_per_second": rows}))


if __name__ == "__main__":
    main()

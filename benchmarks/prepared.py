"""Images a second of Stage C's whole step, with the frozen networks, on pictures and on a prepared set.

    python benchmarks/prepared.py [--published] [--batch 8] [--workers 8] [--seconds 10]

Three sources of the same pictures: files, whose maps and texts are made on the way; a prepared set whose
token ids the text encoder reads on the way; one whose stored states are read. Loading is part of the time.
Without --published all networks are tiny, on whatever device there is. With it they have the published sizes
and random weights, and pictures 1024 pixels, on a GPU, in bf16, as fast as training is. A table, and a line
of JSON.
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

_IMAGES = 10**9  # of a run that is never trained to its end


def photos(folder: Path, count: int, size: int) -> None:
    """Pictures as cameras give them: JPEG files half as large again as what is trained on."""
    draw, side = np.random.default_rng(0), size * 3 // 2
    for number in range(count):
        noise = draw.integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((side, side)).save(folder / f"{number:03}.jpg", quality=90)
        (folder / f"{number:03}.txt").write_text(f"picture number {number} of a thing on a background")


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
    """Images a second, after the first four updates, which compile, record and fill the workers' queues."""
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
    parser.add_argument("--published", action="store_true", help="published sizes, on a GPU")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, default=None, help="(8 with --published, else 1)")
    parser.add_argument("--seconds", type=float, default=None, help="a source (10 with --published, else 3)")
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
            "pictures": lambda: Feed(FolderSource(root / "photos"), 0, size, captions=True),
            "prepared, tokens": lambda: PreparedFeed(prepared, 0, images, batch, "tokens"),
            "prepared, states": lambda: PreparedFeed(prepared, 0, images, batch, "states"),
        }
        rows: dict[str, float] = {}
        for name, make in sources.items():
            updates = iter(batches(make(), 0, images, batch, workers))
            rows[name] = rate(step, updates, seconds, fast=published)
            updates.close()  # type: ignore[attr-defined]
            ratio = rows[name] / rows["pictures"]
            print(f"{name:<20} {rows[name]:8.1f} images/s  {ratio:5.2f} times pictures", flush=True)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    settings = {"published": published, "batch": batch, "size": size, "workers": workers}
    print(json.dumps({"device": machine, "torch": version("torch"), **settings, "images_per_second": rows}))


if __name__ == "__main__":
    main()

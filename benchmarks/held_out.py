"""The error of a trained stage on many held-out images, for the rows of docs/experiments.jsonl."""

import functools
from pathlib import Path

import torch
from torch import Tensor

from wuerstchen.data.emoji import EmojiSource
from wuerstchen.data.plan import generator
from wuerstchen.diffusion.objective import Objective
from wuerstchen.diffusion.schedule import PUBLISHED_SCHEDULE
from wuerstchen.models.cascade import Cascade
from wuerstchen.train.config import Recipe
from wuerstchen.train.engine.validation import Denoising, HeldOut
from wuerstchen.train.feed.random import ImageRandom
from wuerstchen.train.stages.base import Stage, autocast, inputs_of
from wuerstchen.train.stages.decoder import StageB
from wuerstchen.train.stages.prior import StageC

IMAGES = 2_400
TIMES = 8
_BATCH = 200


@functools.lru_cache(maxsize=1)
def held_out_images(data: Path, size: int, count: int) -> HeldOut:
    """``count`` images composed from the 150 emoji of *val*, always the same: 16 images of each at
    ``IMAGES``, with other places, colours, backgrounds and captions."""
    source = EmojiSource(data, "validation", cache=True)
    examples = [
        source.example(number % len(source), generator(0, number, "held-out images"), size)
        for number in range(count)
    ]
    images = torch.stack([torch.from_numpy(example.image) for example in examples])
    return HeldOut(images=images, captions=[example.caption for example in examples])


def errors_on(images: HeldOut, model: Cascade, stage_name: str, recipe: Recipe) -> list[float]:
    """The mean squared error of the predicted noise at eight fixed noise levels, from little noise to much.

    The levels are those of evenly spaced times of the cosine schedule for every objective, so that runs with
    different objectives can be compared. Images and noise are the same for every run.
    """
    stage = _stage(model, stage_name, recipe)
    assert isinstance(stage, Denoising)
    device, half = model.vqgan.device, torch.bfloat16 if model.vqgan.device.type == "cuda" else None
    averages = {name: network.eval() for name, network in stage.networks.items()}
    sums = torch.zeros(TIMES, dtype=torch.float64)
    for batch in images.batches(_BATCH):
        numbers = batch.indices.to(device)
        with torch.no_grad(), autocast(device, half):
            inputs = inputs_of(stage, batch, device)
            clean = inputs[stage.denoises]
            for k in range(TIMES):
                noise = ImageRandom(0, numbers).normal(f"held out {k}", clean.shape[1:])
                t = _time(stage.objective, (k + 0.5) / TIMES).to(device).expand(len(numbers))
                x_t = stage.objective.noised(clean, noise, t)
                output = stage.predict(averages, inputs, x_t, t)
                found = stage.objective.to_noise(output.float(), x_t, t)
                sums[k] += (found - noise).square().flatten(1).mean(1).sum().double().cpu()
    return [round(value, 6) for value in (sums / len(images)).tolist()]


def _stage(model: Cascade, name: str, recipe: Recipe) -> Stage:
    """The stage with the networks of a model."""
    if name == "b":
        return StageB(recipe.stage_b, recipe, model)
    return StageC(recipe.stage_c, recipe, model)


def _time(objective: Objective, t: float) -> Tensor:
    """The time at which an objective has the signal-to-noise ratio of the cosine schedule at time ``t``."""
    time = torch.tensor(t)
    if objective.path == "variance_preserving":
        return time
    alpha_bar = PUBLISHED_SCHEDULE.alpha_bar(time)
    signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    return sigma / (signal + sigma)

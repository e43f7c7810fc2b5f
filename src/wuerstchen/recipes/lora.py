"""Adapters for Stage C on your own images."""

import dataclasses
from collections.abc import Collection

from wuerstchen.recipes.mini import mini
from wuerstchen.recipes.v2 import v2_finetune
from wuerstchen.train.config import Optimization, Recipe, StageLoraConfig
from wuerstchen.train.config_lora import FEWEST_UPDATES

_WARMUP, _VALIDATE, _PREVIEW = 20, 25, 100
"""The length of the warm-up, and the distances of validations and previews, in updates."""


def lora() -> Recipe:
    """An adapter (LoRA) on your own images, by default for the bundled model.

    Hardware: two CPU cores. Time: 5 minutes for 300 updates. Cost: negligible. Result: an adapter file for
    wuerstchen generate --lora. Give your images with --data FOLDER, and one caption for all of them with
    --caption, or captions in files. --start-from MODEL takes another model.
    """
    return _adapter(mini(), "lora", "bundled", batch_size=8, learning_rate=5e-4)


def v2_lora() -> Recipe:
    """An adapter (LoRA) for the published Stage C on your own images at 1024×1024 pixels.

    Hardware: one GPU with 8 GB (estimated). Time: not measured. Cost: see the rehearsal. Result: an adapter
    file of 25 MB for wuerstchen generate --model warp-ai/wuerstchen --lora. The published folders have no
    compressor. It is downloaded from warp-ai/EfficientNetEncoder (81 MB), unless --compressor names a copy or
    the original's file of Stage B.
    """
    base = v2_finetune()
    base = dataclasses.replace(base, stage_b=dataclasses.replace(base.stage_b, compressor_init=""))
    return _adapter(base, "v2-lora", "warp-ai/wuerstchen", batch_size=4, learning_rate=1e-4)


def with_batches(recipe: Recipe, given: Collection[str]) -> Recipe:
    """The recipe of an adapter with intervals that fit its batch size and length, except those in ``given``:
    ``warmup``, ``validate_every`` and ``preview_every``.

    The warm-up is 20 updates, and at most a tenth of the training.
    """
    config = recipe.stage_lora
    optimization, size = config.optimization, config.optimization.batch_size
    updates = optimization.images // size if config.updates is None else config.updates or FEWEST_UPDATES
    if "warmup" not in given:
        warmup = min(_WARMUP, updates // 10) * size
        config = dataclasses.replace(config, optimization=dataclasses.replace(optimization, warmup=warmup))
    intervals = {"validate_every": _VALIDATE * size, "preview_every": _PREVIEW * size}
    own = {name: images for name, images in intervals.items() if name not in given}
    return dataclasses.replace(recipe, stage_lora=config, **own)


def _adapter(base: Recipe, name: str, start: str, batch_size: int, learning_rate: float) -> Recipe:
    optimization = Optimization(
        images=300 * batch_size,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup=_WARMUP * batch_size,
        betas=(0.9, 0.99),
        weight_decay=0.01,
        ema_decay=0.99,
    )
    return dataclasses.replace(
        base,
        name=name,
        data="photos",
        stages=("lora",),
        start_from=start,
        stage_lora=StageLoraConfig(optimization=optimization),
        held_out=0.15,
        preview_prompts=(),
        preview_every=_PREVIEW * batch_size,
        validate_every=_VALIDATE * batch_size,
        prepared_images=0,
        workers=1,
        log_every=10,
        checkpoint_seconds=60.0,
    )

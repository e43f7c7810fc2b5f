"""Adapters for Stage C on your own images."""

import dataclasses

from wuerstchen.recipes.mini import mini
from wuerstchen.recipes.v2 import v2_finetune
from wuerstchen.train.config import Optimization, Recipe, StageLoraConfig


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


def _adapter(base: Recipe, name: str, start: str, batch_size: int, learning_rate: float) -> Recipe:
    optimization = Optimization(
        images=300 * batch_size,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup=20 * batch_size,
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
        preview_every=100 * batch_size,
        validate_every=25 * batch_size,
        prepared_images=0,
        workers=1,
        log_every=10,
        checkpoint_seconds=60.0,
    )

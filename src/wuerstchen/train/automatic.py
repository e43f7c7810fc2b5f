"""Resolves ``auto`` in a recipe for the machine that trains."""

import dataclasses
from typing import Any

from wuerstchen.data.prepared import PreparedSet
from wuerstchen.errors import DataError, UserError
from wuerstchen.train.config import Recipe, with_time_densities
from wuerstchen.train.config_lora import (
    FEWEST_IMAGES,
    cached_crops,
    check_result,
    check_training,
    with_length,
)
from wuerstchen.train.engine.distributed import Processes
from wuerstchen.train.fit_images import fitted
from wuerstchen.train.precision import gpu_precision
from wuerstchen.train.run_data import open_training_images
from wuerstchen.train.stage_table import trained_kinds


def resolved(recipe: Recipe, processes: Processes, stored: dict[str, Any] | None = None) -> Recipe:
    """The recipe with every ``auto`` replaced by its value on this machine, and with the objectives' own time
    densities. The run folder records these values. ``stored`` is the ``run.json`` of a started run.

    Raises ``UserError`` if the machine or other settings do not support ``acceleration=graph``, or if the
    machine does not support the choice of ``memory``.
    """
    device = processes.device
    gpu = device.type == "cuda"
    if recipe.precision == "auto":
        lacks = gpu and gpu_precision(device) == "fp16"
        half = "fp16" if processes.any_rank(lacks) else "bf16"
        if recipe.memory != "normal" and half == "fp16":
            raise UserError(
                f"memory={recipe.memory} needs a GPU that supports bf16, and {device} does not. Use "
                "memory=normal."
            )
        precision = half if gpu or recipe.memory != "normal" else "fp32"
        recipe = dataclasses.replace(recipe, precision=precision)
    shards = recipe.sharding == "full" and processes.count > 1
    # torch 2.11 draws the dropout masks of compiled, recomputed blocks in a way that graphs cannot record.
    repeats_masks = recipe.recompute == "blocks" and _drops_out(recipe)
    if recipe.acceleration == "auto":
        fast = "compile" if shards or repeats_masks or recipe.memory == "lowest" else "graph"
        recipe = dataclasses.replace(recipe, acceleration=fast if gpu else "none")
    if recipe.acceleration == "graph" and not gpu:
        raise UserError(f"acceleration=graph needs a CUDA GPU, got {device}. Use compile or none.")
    if recipe.acceleration == "graph" and shards:
        raise UserError("acceleration=graph does not support sharding=full. Use acceleration=compile.")
    if recipe.acceleration == "graph" and recipe.memory == "lowest":
        raise UserError("acceleration=graph does not support memory=lowest. Use acceleration=compile.")
    if recipe.acceleration == "graph" and repeats_masks:
        raise UserError(
            "acceleration=graph does not support recompute=blocks together with dropout. Use "
            "acceleration=compile, or a dropout of 0."
        )
    if recipe.trains("lora"):
        recipe = _fitted_to_images(recipe, {} if stored is None else stored["recipe"])
    recipe, changed = fitted(recipe)
    if changed and processes.is_main:
        print(f"Fitted to {recipe.fit_images:,} images: {', '.join(changed)}")
    return with_time_densities(recipe)


def _fitted_to_images(recipe: Recipe, stored: dict[str, Any]) -> Recipe:
    """The recipe of an adapter with the length and the image cache that fit the number of images.

    A started run keeps those in its ``stored`` recipe, even if images were added. Raises ``UserError`` for
    settings that have no effect on an adapter.
    """
    check_result(recipe.storage, recipe.max_shard_size)
    check_training(recipe.stage_lora, recipe.fresh)
    source = open_training_images(recipe)
    is_prepared = isinstance(source, PreparedSet)
    count = len(source.rows("train")) if is_prepared else len(source)
    if count < FEWEST_IMAGES:
        raise DataError(
            f"{recipe.data} has {count} {'image' if count == 1 else 'images'} to train on. An adapter needs "
            f"at least {FEWEST_IMAGES}, and 10 or more are better. Add images."
        )
    crops = 0 if is_prepared else recipe.prepared_images or cached_crops(recipe.stage_lora, count)
    config = with_length(recipe.stage_lora, count)
    before = stored.get("stage_lora", {}).get("optimization", {})
    if not recipe.stage_lora.updates and recipe.stage_lora.updates is not None and before:
        optimization = dataclasses.replace(config.optimization, images=before["images"])
        config = dataclasses.replace(config, optimization=optimization)
    if not recipe.prepared_images and before:
        crops = stored.get("prepared_images", crops)
    return dataclasses.replace(recipe, stage_lora=config, prepared_images=crops)


def _drops_out(recipe: Recipe) -> bool:
    """Whether a network that gradients pass through has dropout: a trained one, or the one below an
    adapter."""
    parts = [part for kind in trained_kinds(recipe) for part in kind.makes or kind.builds_on]
    rates = [getattr(getattr(recipe, part, None), "dropout", 0) for part in parts]
    return any(max(rate, default=0) if isinstance(rate, tuple) else rate for rate in rates)

"""Adapts a recipe to a data set of few images: batch sizes, lengths, and the image cache."""

from typing import Any

from wuerstchen.train.config import Recipe, as_dict, differing_fields
from wuerstchen.train.overview import MANY_EPOCHS
from wuerstchen.train.recorded_recipe import recipe_of
from wuerstchen.train.stage_table import result_of

CROPS = 64
"""Crops of each image in the image cache."""
_PER_EPOCH = 4  # batches of an epoch, at least
_LEAST_BATCH = 4  # for batch statistics


def fitted(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe adapted to ``fit_images`` images, and the fields that differ, with both values.

    Values are only reduced, so that smaller ones of a user stay. An adapted recipe stays as it is:

    - A batch is a power of two, with at most a quarter of the images and at least 4.
    - A phase has at most 500 epochs, in whole batches. Of a phase that was reduced, warm-up is at most a
      tenth, the discriminator starts in its first half, and the weights are averaged over at most a tenth.
    - The image cache has at most 64 crops of each image.

    Adapters have rules of their own, and phases that read other data stay as they are.
    """
    count = recipe.fit_images
    if not count or result_of(recipe):
        return recipe, []
    fields = as_dict(recipe)
    fields["prepared_images"] = min(recipe.prepared_images, CROPS * count)
    for name in ("stage_a", "stage_b", "stage_c"):
        stage = fields[name]
        is_reduced = _fit(stage["optimization"], count)
        if stage.get("refine_images"):
            images = min(stage["refine_images"], MANY_EPOCHS * count)
            stage["refine_images"] = _whole(images, stage["optimization"]["batch_size"])
        if is_reduced and "adversarial_from" in stage:
            half = stage["optimization"]["images"] // 2
            stage["adversarial_from"] = min(stage["adversarial_from"], half)
        for phase in stage.get("phases", ()):
            if not phase["data"]:
                _fit(phase["optimization"], count)
    result = recipe_of(fields, "the recipe")
    return result, differing_fields(as_dict(recipe), as_dict(result))


def _fit(optimization: dict[str, Any], count: int) -> bool:
    """Reduces the settings of a phase. Returns whether its length or its batches had to be reduced."""
    before = optimization["images"], optimization["batch_size"]
    parts = optimization["accumulate"]
    most = max(_LEAST_BATCH, 1 << max(count // _PER_EPOCH, 1).bit_length() - 1)
    if optimization["batch_size"] > most:
        optimization["batch_size"] = max(most // parts, 1) * parts
    images, batch = min(optimization["images"], MANY_EPOCHS * count), optimization["batch_size"]
    if (images, batch) == before:
        return False
    optimization["images"] = images = _whole(images, batch)
    optimization["warmup"] = min(optimization["warmup"], images // 10)
    longest = round(max(0.0, 1 - 10 * batch / images), 4)
    optimization["ema_decay"] = min(optimization["ema_decay"], longest)
    return True


def _whole(images: int, batch_size: int) -> int:
    """The images of whole batches, at least one."""
    return max(images // batch_size, 1) * batch_size

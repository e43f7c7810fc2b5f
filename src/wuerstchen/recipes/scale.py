"""Scales the networks of a recipe down."""

import dataclasses
from typing import Any

from wuerstchen.errors import UserError
from wuerstchen.models.decoder import DecoderConfig
from wuerstchen.models.paella import PaellaConfig
from wuerstchen.train.config import Recipe
from wuerstchen.train.stage_table import trained_kinds

UNIT = 64
"""Scaled widths are rounded to a multiple of this, or of the channels per attention head. Small widths are
rounded to a multiple of 1/8 of it."""


def scaled(recipe: Recipe, width: float = 1.0, depth: float = 1.0) -> Recipe:
    """The recipe with the width and depth of its trained networks multiplied by factors in (0, 1].

    Attention heads keep their channels, and there are fewer of them. Pretrained networks keep their size: the
    compressor's backbone, text encoders, and networks of ``start_from``. Raises ``UserError`` for other
    factors, and if a trained stage starts from weights, which already have a shape.
    """
    for name, factor in (("width", width), ("depth", depth)):
        if not 0 < factor <= 1:
            raise UserError(f"--{name} must be above 0 and at most 1, got {factor}. 1 is the full size.")
    if width == depth == 1:
        return recipe
    for kind in trained_kinds(recipe):
        stage = kind.short
        if kind.result:
            raise UserError(
                f"--width and --depth are for networks of a model, and {recipe.name} trains an adapter. "
                "Leave them out. --rank sets its size."
            )
        if recipe.start_from and stage not in recipe.fresh:
            raise UserError(
                f"--width and --depth cannot change Stage {stage.upper()}, which starts from the weights of "
                f"{recipe.start_from}. Leave them out, or use --fresh {stage}."
            )
    changes: dict[str, Any] = {}
    if "a" in recipe.stages:
        vqgan = recipe.vqgan
        changes["vqgan"] = dataclasses.replace(
            vqgan,
            embed_dim=_width(vqgan.embed_dim, width),
            bottleneck_blocks=_count(vqgan.bottleneck_blocks, depth),
        )
    if "b" in recipe.stages:
        changes["decoder"] = _decoder(recipe.decoder, width, depth)
    if "c" in recipe.stages:
        prior = recipe.prior
        head = prior.c // prior.nhead
        c = _width(prior.c, width, head)
        changes["prior"] = dataclasses.replace(prior, c=c, nhead=c // head, depth=_count(prior.depth, depth))
    return dataclasses.replace(recipe, **changes)


def _decoder(
    decoder: DecoderConfig | PaellaConfig, width: float, depth: float
) -> DecoderConfig | PaellaConfig:
    """Stage B, scaled level by level."""
    heads = [c // n if n > 0 else None for c, n in zip(decoder.c_hidden, decoder.nhead, strict=True)]
    widths = [_width(c, width, head) for c, head in zip(decoder.c_hidden, heads, strict=True)]
    return dataclasses.replace(
        decoder,
        c_cond=_width(decoder.c_cond, width),
        c_hidden=tuple(widths),
        nhead=tuple(-1 if head is None else c // head for c, head in zip(widths, heads, strict=True)),
        blocks=tuple(_count(n, depth) for n in decoder.blocks),
    )


def _width(channels: int, factor: float, head: int | None = None) -> int:
    """The scaled width, rounded to a multiple of a head's channels or of ``UNIT``."""
    wanted = channels * factor
    unit = head or (UNIT if wanted >= UNIT else UNIT // 8)
    return min(channels, max(1, round(wanted / unit)) * unit)


def _count(number: int, factor: float) -> int:
    return max(1, round(number * factor))

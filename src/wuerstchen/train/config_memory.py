"""The choices of ``Recipe.memory``: what they need, and what they do not support."""

from collections.abc import Iterable
from typing import Literal

from wuerstchen.errors import UserError
from wuerstchen.train.config_stages import Optimization

Memory = Literal["normal", "low", "lowest"]
SUPPORTED = ("c",)
"""Stages that support other choices than ``normal``, by their short names."""


def check_memory(
    memory: Memory,
    stages: Iterable[str],
    precision: str,
    sharding: str,
    optimizations: Iterable[Optimization],
) -> None:
    """Raises ``UserError`` if a choice of memory does not fit the other settings."""
    if memory == "normal":
        return
    unsupported = [stage for stage in stages if stage not in SUPPORTED]
    if "lora" in unsupported:
        raise UserError(
            f"memory={memory} is for Stage C, got stages with lora. Use memory=normal, which keeps only the "
            "adapter in fp32, and --stage-lora.base-weights int8 to save memory."
        )
    if unsupported:
        raise UserError(
            f"memory={memory} is for Stage C, got stages with {unsupported[0]}. Use --stages c, or "
            "memory=normal."
        )
    if precision not in ("auto", "bf16"):
        raise UserError(
            f"memory={memory} keeps weights in bf16 and needs precision=bf16, got {precision}. Use "
            "--precision bf16, or memory=normal."
        )
    if sharding == "full":
        raise UserError(
            f"memory={memory} does not support sharding=full, which saves memory in its own way. Use one of "
            "the two."
        )
    for optimization in optimizations:
        if optimization.optimizer != "adamw":
            raise UserError(
                f"memory={memory} has an optimizer of its own and needs optimizer=adamw, got "
                f"{optimization.optimizer}. Use optimizer=adamw, or memory=normal."
            )
        if memory == "lowest" and optimization.accumulate > 1:
            raise UserError(
                "memory=lowest frees each gradient at once and needs accumulate=1, got "
                f"{optimization.accumulate}. Use memory=low to accumulate gradients."
            )

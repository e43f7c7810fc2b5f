"""Training runs: tested ones, and those of the paper, as one function each.

The docstring of a recipe states its hardware, time, cost and result.
"""

from wuerstchen.recipes.lora import lora, v2_lora
from wuerstchen.recipes.mini import mini, mini_few
from wuerstchen.recipes.tiny import tiny
from wuerstchen.recipes.v1 import v1_stage_b, v1_stage_c
from wuerstchen.recipes.v2 import v2, v2_finetune, v2_finetune_2048, v2_stage_a, v2_stage_b, v2_stage_c

RECIPES = {
    "tiny": tiny,
    "mini": mini,
    "mini-few": mini_few,
    "lora": lora,
    "v2-lora": v2_lora,
    "v2": v2,
    "v2-stage-a": v2_stage_a,
    "v2-stage-b": v2_stage_b,
    "v2-stage-c": v2_stage_c,
    "v2-finetune": v2_finetune,
    "v2-finetune-2048": v2_finetune_2048,
    "v1-stage-b": v1_stage_b,
    "v1-stage-c": v1_stage_c,
}
"""The recipes that ``wuerstchen train`` offers, by name."""

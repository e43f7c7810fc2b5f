"""Runs that are known to work: a function each, whose docstring states hardware, time, cost and result."""

from wuerstchen.recipes.mini import mini
from wuerstchen.recipes.tiny import tiny
from wuerstchen.recipes.v1 import v1_stage_b, v1_stage_c

RECIPES = {"tiny": tiny, "mini": mini, "v1_stage_b": v1_stage_b, "v1_stage_c": v1_stage_c}
"""The recipes that ``wuerstchen train`` offers, by name."""

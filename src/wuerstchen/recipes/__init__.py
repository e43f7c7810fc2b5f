"""Runs that are known to work: a function each, whose docstring states hardware, time, cost and result."""

from wuerstchen.recipes.mini import mini
from wuerstchen.recipes.tiny import tiny

RECIPES = {"tiny": tiny, "mini": mini}
"""The recipes that ``wuerstchen train`` offers, by name."""

"""``wuerstchen`` with a recipe ``tiny`` whose Stage C has a second phase, which options cannot add."""

import dataclasses
import sys

from wuerstchen import recipes
from wuerstchen.recipes.tiny import tiny
from wuerstchen.train.config import Phase, Recipe


def phased() -> Recipe:
    """tiny, and then Stage C once more."""
    recipe = tiny()
    second = Phase(optimization=dataclasses.replace(recipe.stage_c.optimization, learning_rate=5e-4))
    return dataclasses.replace(recipe, stage_c=dataclasses.replace(recipe.stage_c, phases=(second,)))


if __name__ == "__main__":
    from wuerstchen.cli import main

    recipes.RECIPES["tiny"] = phased
    sys.exit(main(sys.argv[1:]))

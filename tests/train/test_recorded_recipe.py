"""A recipe survives ``run.json``, and fields are named by their paths."""

import dataclasses
import json

import pytest

from wuerstchen.errors import RunFolderError, UserError
from wuerstchen.recipes import RECIPES
from wuerstchen.recipes.tiny import tiny
from wuerstchen.train.config import as_dict
from wuerstchen.train.recorded_recipe import get, parsed, recipe_of, replaced


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_comes_back_from_json(name):
    recipe = RECIPES[name]()
    assert recipe_of(json.loads(json.dumps(as_dict(recipe))), "run.json") == recipe


def test_fields_missing_in_older_recipes_get_defaults():
    fields = as_dict(dataclasses.replace(tiny(), seed=3))
    for name in ("skip", "keep_every", "recompute"):
        del fields[name]
    del fields["stage_a"]["measure_scale"]
    assert recipe_of(fields, "run.json") == dataclasses.replace(tiny(), seed=3)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("seed", "3", "seed='3'"),
        ("seed", True, "seed=True"),
        ("stage_c.optimization.betas", [0.9], "argument"),
        ("stage_c.phases", 3, "stage_c.phases=3"),
        ("precision", "int8", "precision='int8'"),
        ("decoder", {"odd": 1}, "decoder="),
    ],
)
def test_invalid_recipes_are_refused_by_name(path, value, named):
    with pytest.raises(
        RunFolderError, match=r"run\.json has a recipe that this version cannot read"
    ) as caught:
        recipe_of(replaced(as_dict(tiny()), path, value), "run.json")
    assert named in str(caught.value)


def test_a_field_of_a_newer_version_is_named():
    fields = as_dict(tiny())
    fields["stage_c"]["optimization"]["momentum"] = 0.5
    with pytest.raises(RunFolderError, match=r"stage_c\.optimization\.momentum is unknown"):
        recipe_of(fields, "run.json")


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("stage_a.optimization.learning_rate", "1e-5", 1e-5),
        ("stage_a.optimization.images", "400_000", 400_000),
        ("stage_a.optimization.images", "4e5", 400_000),
        ("stage_a.optimization.betas", "0.9,0.95", [0.9, 0.95]),
        ("stage_a.measure_scale", "false", False),
        ("stage_a.crop", "none", None),
        ("stage_a.crop", "64", 64),
        ("precision", "fp32", "fp32"),
        ("skip", "a.png,b/c.png", ["a.png", "b/c.png"]),
        ("skip", '["a, b.png"]', ["a, b.png"]),
        ("skip", "", []),
    ],
)
def test_values_are_parsed_by_the_type_of_the_field(path, text, value):
    assert parsed(tiny(), path, text) == value
    assert get(as_dict(recipe_of(replaced(as_dict(tiny()), path, value), "x")), path) == value


@pytest.mark.parametrize(
    ("path", "text", "kind"),
    [
        ("seed", "1.5", "an integer"),
        ("seed", "many", "an integer"),
        ("seed", "1e999", "an integer"),
        ("stage_a.optimization.learning_rate", "low", "a number"),
        ("stored_texts", "words", "one of tokens, states"),
        ("stage_a.measure_scale", "perhaps", "true or false"),
    ],
)
def test_invalid_values_are_refused_by_name(path, text, kind):
    with pytest.raises(UserError) as caught:
        parsed(tiny(), path, text)
    assert str(caught.value) == f"--change {path}={text} is not valid for {path}, which must be {kind}."

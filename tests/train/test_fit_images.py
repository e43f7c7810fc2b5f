"""Recipes for few images: what is reduced, and that a run resumes with it."""

import dataclasses
import json

import pytest
from PIL import Image

from wuerstchen.data.sources import Source
from wuerstchen.errors import RunFolderError, UserError
from wuerstchen.recipes import RECIPES
from wuerstchen.recipes.mini import mini
from wuerstchen.recipes.tiny import tiny
from wuerstchen.train.config import Phase, Recipe
from wuerstchen.train.fit_images import fitted
from wuerstchen.train.overview import overview, readings
from wuerstchen.train.report.announce import RunMonitor
from wuerstchen.train.run import train


def fit(recipe: Recipe, count: int) -> Recipe:
    return fitted(dataclasses.replace(recipe, fit_images=count))[0]


@pytest.mark.parametrize(("count", "batch", "images"), [(40, 8, 20_000), (400, 64, 200_000 // 64 * 64)])
def test_mini_on_forty_and_four_hundred_images(count, batch, images):
    recipe, changed = fitted(dataclasses.replace(mini(), fit_images=count))
    optimization = recipe.stage_c.optimization
    assert optimization.ema_decay == pytest.approx(1 - 10 * batch / images, abs=1e-4)
    assert (optimization.batch_size, optimization.images) == (batch, images)
    assert optimization.warmup == images // 10
    assert recipe.prepared_images == 64 * count
    assert recipe.stage_a.adversarial_from <= recipe.stage_a.optimization.images // 2
    assert all(reading.images <= 500 * count for reading in readings(recipe))
    assert all(reading.images % reading.batch_size == 0 for reading in readings(recipe))
    names = {text.partition(" ")[0] for text in changed}
    assert {"prepared_images", "stage_b.optimization.batch_size", "stage_c.optimization.images"} <= names
    assert any(text == f"stage_b.optimization.batch_size (256, now {batch})" for text in changed)
    assert fitted(recipe) == (recipe, [])  # as a resumed run has it


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_can_be_fitted_and_nothing_grows(name):
    recipe = RECIPES[name]()
    for count in (1, 5, 40, 400, 10**9):
        small = fit(recipe, count)
        for old, new in zip(readings(recipe), readings(small), strict=True):
            assert new.images <= old.images
            assert new.batch_size <= old.batch_size
            assert new.batch_size % new.accumulate == 0
    assert dataclasses.replace(small, fit_images=0) == recipe  # of 10⁹ images nothing is reduced


def test_smaller_values_of_a_user_stay():
    optimization = dataclasses.replace(tiny().stage_c.optimization, batch_size=4, images=80, warmup=0)
    recipe = dataclasses.replace(
        tiny(), stage_c=dataclasses.replace(tiny().stage_c, optimization=optimization)
    )
    assert fit(recipe, 40).stage_c == recipe.stage_c
    shorter = fit(recipe, 1).stage_c.optimization
    assert (shorter.batch_size, shorter.images) == (4, 80)


def test_phases_with_other_data_stay():
    own = Phase(optimization=tiny().stage_c.optimization, data="sample")
    other = dataclasses.replace(own, data="")
    recipe = dataclasses.replace(tiny(), stage_c=dataclasses.replace(tiny().stage_c, phases=(own, other)))
    found = fit(recipe, 8).stage_c.phases
    assert found[0] == own
    assert found[1].optimization.images == 2400
    assert found[1].optimization.batch_size == 4


def test_the_default_changes_nothing_and_negative_numbers_are_refused():
    assert fitted(mini()) == (mini(), [])
    with pytest.raises(UserError, match="fit_images must be at least 0, got -1"):
        dataclasses.replace(mini(), fit_images=-1)


def test_the_warning_of_many_epochs_names_the_option(toy_source):
    source = toy_source(4)
    assert isinstance(source, Source)
    recipe = dataclasses.replace(tiny(), data="photos")
    assert any("--fit-images 4" in text for text in overview(recipe, {"photos": source}, None)[1])
    assert not overview(fit(recipe, 4), {"photos": source}, None)[1]


def test_a_fitted_run_resumes_and_belongs_to_its_number(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("wuerstchen.train.run.TrainingRun.train", lambda self: self.run_dir / "model")
    (tmp_path / "data").mkdir()
    for number in range(12):
        Image.new("RGB", (130, 130), (number, 0, 0)).save(tmp_path / "data" / f"{number}.png")
        (tmp_path / "data" / f"{number}.txt").write_text(f"thing {number}")
    recipe = dataclasses.replace(tiny(), data=str(tmp_path / "data"), stages=("a",), workers=0)
    begin = {"device": "cpu", "monitor": RunMonitor(rehearse=False)}
    small = dataclasses.replace(recipe, fit_images=12)
    train(small, tmp_path / "run", **begin)
    assert "Fitted to 12 images: " in capsys.readouterr().out
    stored = json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]
    assert (stored["fit_images"], stored["stage_a"]["optimization"]["batch_size"]) == (12, 4)
    train(small, tmp_path / "run", **begin)
    with pytest.raises(RunFolderError, match="fit_images"):
        train(recipe, tmp_path / "run", **begin)

"""What won on the small model is an option of the recipes of the published size, and off by default."""

import dataclasses

import pytest

from wuerstchen.cli import make_parser
from wuerstchen.cli.train import overridden
from wuerstchen.errors import UserError
from wuerstchen.recipes import RECIPES
from wuerstchen.train.config import as_dict
from wuerstchen.train.initial_weights import read_start
from wuerstchen.train.recorded_recipe import get

from ..configurations import SMALL_COMPRESSOR, SMALL_DECODER, SMALL_PREVIEWER, SMALL_PRIOR, SMALL_VQGAN

OF_C = {
    "stage_c.optimization.optimizer": "muon",
    "stage_c.optimization.ema_decay": 0.9995,
    "stage_c.time_density": "logit_normal",
    "stage_c.time_shift": 1.5,
    "stage_c.known_fraction": 0.15,
    "stage_c.dispersive_weight": 0.25,
    "stage_c.text_noise": 0.3,
    "mirrored": 0.5,
}
"""Options that leave the networks as they are."""
KEYS = {"prior.text_blocks": 2, "prior.registers": 4, "prior.prediction": "velocity", "prior.depth": 8}
"""Options that change the tensors of Stage C."""
OF_B = {
    "stage_b.optimization.optimizer": "muon",
    "stage_b.optimization.ema_decay": 0.9995,
    "stage_b.time_shift": 2.0,
    "stage_b.feature_weight": 0.5,
    "stage_b.previewer_weight": 2.0,
}
LITE = ["--compressor.backbone", "efficientnet_lite0"]


def given(name, *words):
    options = make_parser().parse_known_args(["train", name])[0]
    options.overrides = [*words]
    return overridden(RECIPES[name](), options)


def words_of(changes):
    return [word for path, value in changes.items() for word in (f"--{path.replace('_', '-')}", str(value))]


@pytest.mark.parametrize(
    ("name", "changes"),
    [("v2", OF_C | OF_B | KEYS), ("v2-stage-b", OF_B), ("v2-stage-c", OF_C | KEYS), ("v2-finetune", OF_C)],
)
def test_the_options_are_set_on_the_command_line_and_off_without_it(name, changes):
    before, after = as_dict(given(name)), as_dict(given(name, *words_of(changes)))
    for path, value in changes.items():
        assert get(after, path) == value != get(before, path), path


def test_later_phases_keep_their_own_optimizer():
    """Each phase of Stage C has its own settings, as in the paper."""
    path = "stage_c.phases.0.optimization.optimizer"
    fields = as_dict(given("v2", *words_of({"stage_c.optimization.optimizer": "muon", path: "muon"})))
    optimizers = [phase["optimization"]["optimizer"] for phase in fields["stage_c"]["phases"]]
    assert [fields["stage_c"]["optimization"]["optimizer"], *optimizers] == ["muon", "muon", "adamw", "adamw"]


def test_depths_are_for_the_small_backbone():
    with pytest.raises(UserError, match=r"only for efficientnet_lite0, got \(8, 16\) for efficientnet_v2_s"):
        given("v2-stage-b", "--compressor.depths", "8", "16")
    recipe = given("v2-stage-b", *LITE, "--compressor.depths", "8", "16")
    assert recipe.compressor.depths == (8, 16)


def finetuning(model, **changes):
    """v2-finetune of a small model."""
    return dataclasses.replace(
        RECIPES["v2-finetune"](),
        start_from=str(model),
        text_positions="real",
        vqgan=SMALL_VQGAN,
        compressor=SMALL_COMPRESSOR,
        decoder=SMALL_DECODER,
        previewer=SMALL_PREVIEWER,
        prior=dataclasses.replace(SMALL_PRIOR, **changes),
    )


def test_trained_weights_refuse_what_would_change_their_tensors(model_folder):
    """New layers of a published prior would start from random weights without a word."""
    assert read_start(finetuning(model_folder)).parts.prior is not None
    for path, value in KEYS.items():
        field = path.removeprefix("prior.")
        known = getattr(SMALL_PRIOR, field)
        with pytest.raises(UserError) as refused:
            read_start(finetuning(model_folder, **{field: value}))
        said = str(refused.value)
        assert f"{path}={value} of the recipe does not match the weights of {model_folder}" in said
        assert f"Use --{path.replace('_', '-')} {known}." in said

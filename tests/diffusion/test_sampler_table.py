"""The table of samplers: which objectives they support, and who reads it."""

import argparse

import numpy as np
import pytest
import torch

from wuerstchen.cli import make_parser
from wuerstchen.cli.options import sampling_of
from wuerstchen.diffusion.objective import FlowMatching
from wuerstchen.diffusion.sampler_table import (
    SAMPLERS,
    Sampler,
    check_compatible,
    check_sampler,
    sampler_help,
    samplers_for,
)
from wuerstchen.diffusion.schedule import uniform_timesteps
from wuerstchen.errors import UserError
from wuerstchen.evaluate.scoring import Renderer
from wuerstchen.models.cascade import CascadeSettings
from wuerstchen.pipeline import Sampling, Wuerstchen
from wuerstchen.serve.schemas import JobRequest


def test_the_default_follows_the_path():
    assert samplers_for("variance_preserving") == ["ddpm", "dpm", "ddim", "few"]
    assert samplers_for("linear") == ["euler", "few"]


def test_an_unsupported_objective_is_refused_with_the_samplers_that_support_it():
    check_compatible("ddim", "velocity", "variance_preserving")
    message = r"prior_sampler=ddpm is incompatible with .* the objective flow\. Use euler or few\.$"
    with pytest.raises(UserError, match=message):
        check_compatible("ddpm", "flow", "linear")
    with pytest.raises(UserError, match=r"Use ddpm or dpm or ddim or few\.$"):
        check_compatible("euler", "noise", "variance_preserving")
    with pytest.raises(
        UserError, match=r"prior_sampler must be one of ddpm, dpm, ddim, euler, few, got 'plms'"
    ):
        check_sampler("plms")
    with pytest.raises(UserError, match=message):
        CascadeSettings(prior_objective=FlowMatching())
    assert CascadeSettings(prior_objective=FlowMatching(), prior_sampler="euler").prior_sampler == "euler"


def test_a_model_refuses_an_incompatible_sampler(small_cascade):
    model = Wuerstchen(small_cascade, torch.device("cpu"))
    with pytest.raises(UserError, match=r"prior_sampler=euler is incompatible with"):
        model.generate("a cat", sampling=Sampling(prior_sampler="euler"))
    drawn = [
        np.asarray(model.generate("a cat", sampling=Sampling(prior_sampler=name))[0])
        for name in samplers_for("variance_preserving")
    ]
    assert len({image.tobytes() for image in drawn}) == 4


def test_every_row_has_a_help_text_and_timesteps():
    for name, row in SAMPLERS.items():
        assert f"{name}, {row.help}" in sampler_help()
        times = row.timesteps(row.steps)
        assert (len(times), times[0], times[-1]) == (row.steps + 1, 1, 0)


def options_of(parser: argparse.ArgumentParser, command: str) -> str:
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return " ".join(commands.choices[command].format_help().split())


def test_a_new_row_appears_everywhere(small_cascade, monkeypatch):
    """A sampler that jumps to the predicted clean latents at once: command line, service, evaluation."""
    calls = []

    def jump(predict, x, timesteps, generators, objective, on_step=None):
        calls.append(len(x))
        t = torch.full((len(x),), timesteps[0])
        return objective.to_clean(predict(x, t), x, t)

    row = Sampler(
        help="jumps to the end at once",
        paths=("variance_preserving",),
        steps=1,
        function=jump,
        timesteps=uniform_timesteps,
    )
    monkeypatch.setitem(SAMPLERS, "jump", row)
    for command in ("generate", "evaluate"):
        help_text = options_of(make_parser(), command)
        assert "jump" in help_text
        assert "jumps to the end at once" in help_text
    assert "jump" in str(JobRequest.model_json_schema())
    assert JobRequest(prompts=["a cat"], prior_sampler="jump").prior_sampler == "jump"
    assert samplers_for("variance_preserving")[-1] == "jump"  # as the service describes a model
    options = make_parser().parse_args(["evaluate", "--prior-sampler", "jump", "--decoder-steps", "1"])
    model = Wuerstchen(small_cascade, torch.device("cpu"))
    renderer = Renderer(model=model, sampling=sampling_of(options))
    assert renderer.model.settings_of(renderer.sampling)["prior_sampler"] == "jump"  # in the report
    model.generate(["a cat", "a dog"], sampling=renderer.sampling)
    assert calls == [2]

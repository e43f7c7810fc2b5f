"""Stages B and C train with any objective, resume bit for bit, and their models draw."""

import dataclasses
import json
import shutil
from typing import ClassVar

import numpy as np
import pytest
import torch

from wuerstchen.checkpoints.native import read_cascade
from wuerstchen.diffusion.objective import OBJECTIVES, FlowMatching
from wuerstchen.errors import RunFolderError, UserError
from wuerstchen.pipeline import Sampling, Wuerstchen
from wuerstchen.recipes.tiny import tiny
from wuerstchen.train.config import Optimization, StageBConfig, StageCConfig
from wuerstchen.train.engine.checkpoint import newest
from wuerstchen.train.run import TrainingRun, train

from ..configurations import SMALL_COMPRESSOR, SMALL_DECODER, SMALL_PREVIEWER, SMALL_PRIOR, SMALL_VQGAN

LEARNING = Optimization(images=8, batch_size=4, learning_rate=1e-3)


def recipe(start, prediction: str, **changes):
    """Stages B and C with the smallest networks, on a model with a Stage A."""
    own = tiny()
    given = {
        "stages": ("b", "c"),
        "start_from": str(start),
        "fresh": ("b", "c"),
        "vqgan": SMALL_VQGAN,
        "compressor": SMALL_COMPRESSOR,
        "decoder": dataclasses.replace(SMALL_DECODER, prediction=prediction),
        "prior": dataclasses.replace(SMALL_PRIOR, dropout=0.0, prediction=prediction),
        "previewer": SMALL_PREVIEWER,
        "stage_b": StageBConfig(optimization=LEARNING, loss_weight="velocity", time_shift=1.5),
        "stage_c": StageCConfig(optimization=LEARNING, time_density="uniform"),
        "statistics_images": 8,
        "prior_steps": 2,
        "decoder_steps": 2,
        "preview_prompts": ("cat",),
        "workers": 0,
        "checkpoint_seconds": 0.0,
        "log_every": 1,
    }
    return dataclasses.replace(own, **{**given, **changes})


def files_of(run_dir):
    return {s: newest(run_dir / f"stage_{s}" / "checkpoints")[1]["files"] for s in ("b", "c")}


@pytest.mark.parametrize("prediction", [pytest.param("noise", marks=pytest.mark.slow), "velocity", "flow"])
def test_each_objective_trains_resumes_and_draws(prediction, model_folder, tmp_path):
    chosen = recipe(model_folder, prediction)
    model = train(chosen, tmp_path, device="cpu")
    finished = files_of(tmp_path)
    losses = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {event["stage"] for event in losses if event["event"] == "progress"} == {"b", "c"}
    for stage in ("b", "c"):
        shutil.rmtree(newest(tmp_path / f"stage_{stage}" / "checkpoints")[0])
    shutil.rmtree(model)
    train(chosen, tmp_path, device="cpu")
    assert files_of(tmp_path) == finished

    described = json.loads((model / "model.json").read_text())
    assert described["format"] == (2 if prediction == "flow" else 1)
    of_cosine = {"loss_weight": "p2", "schedule": {"s": 0.008, "scaler": 1.0}}
    of_prior = {"time_density": "uniform"} if prediction == "flow" else of_cosine
    assert described["objectives"]["prior"] == {"kind": prediction, "time_shift": 1.0, **of_prior}
    assert described["objectives"]["decoder"]["kind"] == prediction
    assert described["objectives"]["decoder"]["time_shift"] == 1.5
    cascade = read_cascade(model)
    sampler = "euler" if prediction == "flow" else "ddpm"
    assert cascade.settings.prior_sampler == sampler
    assert cascade.settings.prior_objective.as_json() == described["objectives"]["prior"]
    image = Wuerstchen(cascade, torch.device("cpu")).generate("a cat")[0]
    assert np.asarray(image).std() > 1

    unsuited = Sampling(prior_sampler="ddpm" if prediction == "flow" else "euler")
    with pytest.raises(UserError, match="is incompatible with this model"):
        Wuerstchen(cascade, torch.device("cpu")).generate("a cat", sampling=unsuited)


@pytest.fixture
def begin(monkeypatch, tmp_path):
    """Starts or continues a run without training. Returns the recipe in force."""
    recipes = []
    monkeypatch.setattr(TrainingRun, "train", lambda self: recipes.append(self.recipe) or self.run_dir)

    def begin(chosen, *changes):
        train(chosen, tmp_path, device="cpu", changes=changes)
        return recipes[-1]

    return begin


@pytest.mark.parametrize(("prediction", "density"), [("velocity", "uniform"), ("flow", "logit_normal")])
def test_a_run_of_an_older_version_keeps_its_times(prediction, density, model_folder, tmp_path, begin):
    """Older versions recorded logit_normal for every objective, and used it only for flow matching."""
    chosen = recipe(model_folder, prediction, stage_c=StageCConfig(optimization=LEARNING))
    explicit = {
        other: dataclasses.replace(chosen, stage_c=dataclasses.replace(chosen.stage_c, time_density=other))
        for other in ("uniform", "logit_normal")
    }
    assert begin(chosen).stage_c.time_density == density
    path = tmp_path / "run.json"
    content = json.loads(path.read_text())
    assert content["recipe"]["stage_c"]["time_density"] == density
    del content["time_density"]
    old = {**content["recipe"]["stage_c"], "time_density": "logit_normal"}
    change = {
        "field": "stage_c.time_density", "before": "uniform", "after": "logit_normal",
        "stage": "c", "images": 0, "time": 0.0,
    }  # fmt: skip
    content |= {"recipe": {**content["recipe"], "stage_c": old}, "changes": [change]}
    path.write_text(json.dumps(content))
    for same in (chosen, explicit[density]):
        found = begin(same)
        assert (found.stage_b.time_density, found.stage_c.time_density) == (density, density)
    other = "uniform" if prediction == "flow" else "logit_normal"
    with pytest.raises(RunFolderError, match=r"stage_c\.time_density"):
        begin(explicit[other])
    # A change that is made now holds from then on.
    assert begin(chosen, f"stage_c.time_density={other}").stage_c.time_density == other
    assert begin(chosen).stage_c.time_density == other
    assert begin(chosen, "stage_c.time_density=none").stage_c.time_density == density
    assert begin(chosen).stage_c.time_density == density


def test_the_cosine_path_trains_at_logit_normal_times(model_folder, tmp_path):
    config = StageCConfig(optimization=LEARNING, time_density="logit_normal")
    model = train(recipe(model_folder, "velocity", stage_c=config), tmp_path, device="cpu")
    objective = read_cascade(model).settings.prior_objective
    assert objective.time_density == "logit_normal"
    assert read_cascade(model).settings.decoder_objective.time_density == "uniform"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CleanPrediction(FlowMatching):
    """A toy: the network predicts x₀ itself, along the straight line."""

    kind: ClassVar[str] = "clean"

    def errors(self, output, x0, noise, t):
        return (output - x0).square().flatten(1).mean(1)

    def to_clean(self, output, x_t, t):
        return output

    def to_noise(self, output, x_t, t):
        t = t.view(-1, 1, 1, 1)
        return (x_t - (1 - t) * output) / t

    def to_velocity(self, output, x_t, t):
        return (x_t - output) / t.view(-1, 1, 1, 1)


def test_an_objective_of_its_own_trains(model_folder, tmp_path, monkeypatch):
    """One class and one entry in the table are enough to train, to store the model and to draw."""
    monkeypatch.setitem(OBJECTIVES, "clean", CleanPrediction)
    chosen = recipe(model_folder, "clean", decoder=recipe(model_folder, "noise").decoder)
    model = train(chosen, tmp_path, device="cpu")
    cascade = read_cascade(model)
    assert isinstance(cascade.settings.prior_objective, CleanPrediction)
    assert cascade.settings.prior_sampler == "euler"
    assert Wuerstchen(cascade, torch.device("cpu")).generate("a cat")[0].size == (128, 128)
    events = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    first = next(e for e in events if e["event"] == "progress" and e["stage"] == "c")
    # The last layer starts at zero, so the loss is the mean square of the normalised latents.
    assert first["loss"] == pytest.approx(1.0, abs=0.5)


def test_a_start_with_another_objective_is_refused(model_folder, tmp_path):
    with pytest.raises(UserError, match=r"--prior\.prediction noise"):
        train(recipe(model_folder, "flow", stages=("c",), fresh=()), tmp_path, device="cpu")


def test_an_unknown_prediction_is_refused(model_folder):
    with pytest.raises(UserError, match=r"prediction must be one of noise, velocity, flow, .*got 'epsilon'"):
        recipe(model_folder, "epsilon")

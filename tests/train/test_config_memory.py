"""Training with less memory: what is refused, and whole runs of the recipe that it is for."""

import dataclasses
import functools
import json
from contextlib import contextmanager

import pytest
import torch

from wuerstchen.checkpoints.native import read_cascade
from wuerstchen.errors import UserError
from wuerstchen.recipes.lora import lora, v2_lora
from wuerstchen.recipes.mini import mini
from wuerstchen.recipes.v2 import v2_finetune
from wuerstchen.train.automatic import resolved
from wuerstchen.train.config import as_dict, differing_fields
from wuerstchen.train.engine import state
from wuerstchen.train.engine.checkpoint import newest, read_averages
from wuerstchen.train.engine.distributed import Processes
from wuerstchen.train.engine.factored import keep_in_bf16
from wuerstchen.train.feed.images import Batch
from wuerstchen.train.run import train
from wuerstchen.train.stages.prior import StageC

from .test_initial_weights import compressor_file, finetune, photos, published  # noqa: F401 (fixtures)


def with_optimization(**changes):
    stage = v2_finetune().stage_c
    return dataclasses.replace(stage, optimization=dataclasses.replace(stage.optimization, **changes))


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"precision": "fp32"}, ("precision=bf16", "got fp32")),
        ({"precision": "fp16"}, ("precision=bf16", "got fp16")),
        ({"sharding": "full"}, ("sharding=full",)),
        ({"stage_c": with_optimization(optimizer="muon")}, ("optimizer=adamw", "got muon")),
        (
            {"stage_c": with_optimization(accumulate=4), "memory": "lowest"},
            ("accumulate=1", "got 4", "memory=low "),
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes, facts):
    with pytest.raises(UserError) as refused:
        dataclasses.replace(v2_finetune(), **{"memory": "low", **changes})
    assert all(fact in str(refused.value) for fact in facts)


def test_it_is_for_stage_c():
    with pytest.raises(UserError, match=r"memory=low is for Stage C, got stages with a\."):
        dataclasses.replace(mini(), memory="low")
    with pytest.raises(UserError, match=r"--stage-lora\.base-weights int8 to save memory\."):
        dataclasses.replace(lora(), memory="low")  # to train the whole Stage C would be no advice
    assert dataclasses.replace(mini(), memory="low", stages=("c",), start_from="x").memory == "low"
    assert dataclasses.replace(v2_finetune(), memory="low", stage_c=with_optimization(accumulate=4))


def test_automatic_settings_follow_the_memory(monkeypatch):
    base, cpu = v2_finetune(), Processes(torch.device("cpu"))
    assert resolved(base, cpu).precision == "fp32"
    low = dataclasses.replace(base, memory="low")
    assert resolved(low, cpu).precision == "bf16"
    gpu = Processes(torch.device("cuda"))
    monkeypatch.setattr("wuerstchen.train.automatic.gpu_precision", lambda device: "bf16")
    assert resolved(low, gpu).acceleration == "graph"
    lowest = dataclasses.replace(base, memory="lowest")
    assert resolved(lowest, gpu).acceleration == "compile"
    with pytest.raises(UserError, match="does not support memory=lowest"):
        resolved(dataclasses.replace(lowest, acceleration="graph"), gpu)
    monkeypatch.setattr("wuerstchen.train.automatic.gpu_precision", lambda device: "fp16")
    assert resolved(base, gpu).precision == "fp16"
    with pytest.raises(UserError, match="memory=low needs a GPU that supports bf16"):
        resolved(low, gpu)


def test_recomputed_dropout_below_an_adapter_is_not_recorded(monkeypatch):
    """The frozen prior drops out too. Recording it ends in an error of torch after minutes of compiling."""
    monkeypatch.setattr("wuerstchen.train.automatic.gpu_precision", lambda device: "bf16")
    monkeypatch.setattr("wuerstchen.train.automatic._fitted_to_images", lambda recipe, _: recipe)
    gpu, recipe = Processes(torch.device("cuda")), v2_lora()
    assert resolved(recipe, gpu).acceleration == "graph"
    recomputed = dataclasses.replace(recipe, recompute="blocks")
    assert resolved(recomputed, gpu).acceleration == "compile"
    without = dataclasses.replace(recipe.prior, dropout=0.0)
    assert resolved(dataclasses.replace(recomputed, prior=without), gpu).acceleration == "graph"


def test_runs_of_earlier_versions_trained_as_normal():
    stored, given = as_dict(v2_finetune()), as_dict(v2_finetune())
    del stored["memory"]
    assert differing_fields(stored, given) == []
    low = as_dict(dataclasses.replace(v2_finetune(), memory="low"))
    assert differing_fields(stored, low) == ["memory (normal, now low)"]


@pytest.mark.parametrize("memory", ["low", "lowest"])
def test_fine_tuning_with_less_memory(memory, published, photos, compressor_file, tmp_path, monkeypatch):  # noqa: F811
    """Nearly the model of a normal run, with validation and previews by an average in fp32."""
    monkeypatch.setattr(state, "keep_in_bf16", functools.partial(keep_in_bf16, least=1))
    priors = {}
    for choice in ("normal", memory):
        recipe = finetune(published, photos, compressor_file, memory=choice)
        folder = tmp_path / choice
        train(recipe, folder, device="cpu")
        priors[choice] = read_cascade(folder / "model").prior.state_dict()
    events = [json.loads(line)["event"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert "preview" in events
    assert not any("skipped" in event for event in events)
    path, _ = newest(folder / "stage_c" / "checkpoints")
    weights = read_averages(path, "prior", raw=True)
    assert weights["blocks.0.channelwise.0.weight"].dtype is torch.bfloat16
    assert {tensor.dtype for tensor in priors[memory].values()} == {torch.float32}
    given = priors["normal"]
    assert any(not torch.equal(given[name], tensor) for name, tensor in priors[memory].items())
    for name, tensor in priors[memory].items():
        assert (tensor - given[name]).abs().max() < 0.01, name  # two updates at a rate of 0.001
    train(recipe, folder, device="cpu")  # nothing is left, and nothing is refused


class Visits:
    """A residence that only notes what visits it."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.seen = []

    @contextmanager
    def using(self, *modules):
        self.seen.append([type(module).__name__ for module in modules])
        yield

    def release(self) -> None:
        self.seen.append("release")


def test_frozen_networks_are_on_the_gpu_only_while_they_compute(small_cascade):
    recipe = dataclasses.replace(mini(), memory="lowest", stages=("c",), start_from="x")
    stage = StageC(recipe.stage_c, recipe, small_cascade)
    images = torch.randint(256, (2, 128, 128, 3), dtype=torch.uint8)
    batch, cpu = Batch(torch.arange(2), images, ["a cat", ""], []), torch.device("cpu")
    expected = stage.prepare(batch, cpu)
    stage._place(torch.device("meta"), ("compressor", "text_encoder"))
    assert next(stage.compressor.parameters()).device == cpu  # it waits in host memory
    stage.residence = visits = Visits()
    inputs = stage.prepare(batch, cpu)
    assert visits.seen == [["Compressor"], "release", ["TextEncoder"], "release"]
    assert all(torch.equal(inputs[name], tensor) for name, tensor in expected.items())
    stage._place(torch.device("meta"), ("compressor",))
    stage.residence = visits = Visits()
    stage.prepare(batch, cpu)
    assert visits.seen == [["Compressor"], "release"]

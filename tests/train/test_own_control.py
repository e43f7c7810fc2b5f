"""A control network that the package does not know. Its parts are those of the example in CONTRIBUTING.md.

It reads the edges of an image and adds residuals inside the frozen prior, through ``PriorContext.residuals``.
"""

import dataclasses
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from wuerstchen.checkpoints import native
from wuerstchen.checkpoints.native import Provenance, read_network, write_network
from wuerstchen.pipeline import load
from wuerstchen.sampling import Sampling
from wuerstchen.train import stage_table
from wuerstchen.train.feed.images import pixels_of
from wuerstchen.train.run import train

# --- models/control.py ---


@dataclass(frozen=True, kw_only=True)
class ControlConfig:
    c: int
    depth: int = 1


class Control(nn.Module):
    """The edges of an image as residuals for the first ``depth`` groups of the prior's blocks."""

    def __init__(self, config: ControlConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(nn.Conv2d(1, config.c, 3, padding=1) for _ in range(config.depth))
        for layer in self.layers:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, edges, size):
        small = F.interpolate(edges, size=tuple(size), mode="area")
        return [layer(small).permute(0, 2, 3, 1) for layer in self.layers]


def edges_of(pixels):
    grey = pixels.mean(1, keepdim=True)
    return F.pad(grey.diff(dim=2).abs(), (0, 0, 0, 1)) + F.pad(grey.diff(dim=3).abs(), (0, 1))


# --- train/stages/control.py ---


@pytest.fixture
def residual_runs(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    yield importlib.import_module("residual_runs")
    del sys.modules["residual_runs"]


TRAINED: list[Control] = []


def control_stage(residual_runs):
    class ControlStage(residual_runs.ResidualStage):
        name = "control"
        averaged = ("control",)

        def __init__(self, optimization, control, *others) -> None:
            super().__init__(optimization, control, *others)
            self.networks = {"control": control}

        def use_averages(self, averages) -> None:
            pass

        def prepare(self, batch, device):
            edges = edges_of(pixels_of(batch.images.to(device)))
            return {**super().prepare(batch, device), "edges": edges}

        def losses(self, inputs, random):
            x, prior = inputs["x"], self.frozen.prior
            noised, t = x + random.normal("noise", x.shape[1:]), random.uniform("time")
            residuals = self.networks["control"](inputs["edges"], x.shape[2:])
            context = prior.context(inputs["states"], inputs.get("mask"), *residuals, cache_kv=False)
            yield "control", (prior(noised, t, context) - x).square().mean(), {}

    def phases(recipe):
        (phase,) = residual_runs._phases(recipe)
        return [dataclasses.replace(phase, name="control")]

    def train_control(run) -> None:
        frozen = run.parts.cascade(run.settings_of_model())
        for network in frozen.networks().values():
            network.to(run.device).eval().requires_grad_(False)
        (named,) = phases(run.recipe)
        config = ControlConfig(c=run.recipe.prior.c)
        stage = ControlStage(named.phase.optimization, Control(config), frozen, run.statistics, run.recipe)
        TRAINED[:] = [run.train_phase(stage, named.phase)(Control(config), "control")]

    def write(run, folder: Path) -> None:
        provenance = Provenance(recipe=run.recipe.name, seed=0, images=residual_runs.IMAGES, data="")
        write_network(TRAINED[0], folder / "control.safetensors", provenance)

    return dataclasses.replace(
        residual_runs.RESIDUAL,
        name="control",
        short="control",
        phases=phases,
        train=train_control,
        write=write,
    )


def drawn(model, control: Control, image: torch.Tensor):
    """What ``generate`` draws if the prior's context has the residuals of a control image."""
    prior = model.cascade.prior
    context, size = prior.context, model.cascade.settings.latent_size(128, 128)

    def controlled(text, mask=None, **options):
        residuals = [r.expand(len(text), -1, -1, -1) for r in control(edges_of(image), size)]
        return context(text, mask, *residuals, **options)

    prior.context = controlled
    try:
        (image,) = model.generate("a cat", sampling=Sampling(prior_steps=2, decoder_steps=1))
    finally:
        prior.context = context
    return image.tobytes()


def test_a_control_network_trains_is_stored_and_steers(residual_runs, model_folder, tmp_path, monkeypatch):
    """It needs a row in the table of stages and one in the table of stored networks."""
    global CONTROL
    CONTROL = control_stage(residual_runs)
    monkeypatch.setattr(stage_table, "STAGES", (*residual_runs.table(), f"{__name__}:CONTROL"))
    monkeypatch.setitem(native.NETWORKS, "control", (Control, ControlConfig))
    recipe = dataclasses.replace(residual_runs.recipe(model_folder), stages=("control",))
    folder = train(recipe, tmp_path / "run", device="cpu")

    control, provenance = read_network(folder / "control.safetensors")
    assert isinstance(control, Control)
    assert provenance.images == residual_runs.IMAGES
    assert control.layers[0].weight.abs().max() > 0
    model = load(folder, "cpu")
    image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    plain = model.generate("a cat", sampling=Sampling(prior_steps=2, decoder_steps=1))[0].tobytes()
    assert drawn(model, Control(control.config), image) == plain  # as initialised it changes nothing
    for layer in control.layers:
        layer.weight.data.mul_(100)
    assert drawn(model, control, image) != plain
    assert drawn(model, control, image) != drawn(model, control, image.flip(3))

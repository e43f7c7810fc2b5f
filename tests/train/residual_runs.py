"""A new stage in one file: a small residual network beside a frozen prior.

Run as a script with MODEL RUN_DIR, it trains and kills itself with SIGKILL after a checkpoint.
"""

import dataclasses
import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from wuerstchen.models.compressor import compressor_input
from wuerstchen.recipes.tiny import tiny
from wuerstchen.train import stage_table
from wuerstchen.train.config import Phase, Recipe
from wuerstchen.train.feed.images import pixels_of
from wuerstchen.train.stages.base import NamedPhase, StageKind, encoded_captions

IMAGES = 12


class ResidualStage:
    """Trains the residual to denoise together with the prior, and to stay near its own average."""

    name = "residual"
    averaged = ("residual",)
    captions = True
    reads_images = False
    rates: dict[str, float] = {}  # noqa: RUF012
    rate_scales: dict[str, float] = {}  # noqa: RUF012
    preview_labels: dict[str, list[str]] = {}  # noqa: RUF012

    def __init__(self, optimization, residual, frozen, statistics, recipe) -> None:
        self.optimization = optimization
        self.networks: dict[str, nn.Module] = {"residual": residual}
        self.frozen, self.statistics, self.recipe = frozen, statistics, recipe
        self.averages: dict[str, nn.Module] = {}
        self.begun: list[list[torch.Tensor]] = []

    def use_averages(self, averages) -> None:
        self.averages = averages
        self.begun = [p.detach().clone() for p in averages["residual"].parameters()]

    def prepare(self, batch, device):
        images = pixels_of(batch.images.to(device))
        z = self.frozen.compressor(compressor_input(images, self.recipe.view_scale))
        text = encoded_captions(self.frozen.text_encoder, batch.captions, self.recipe)
        return {"x": self.statistics.normalise(z), **text}

    def losses(self, inputs, random):
        x, prior = inputs["x"], self.frozen.prior
        noised = x + random.normal("noise", x.shape[1:])
        t = random.uniform("time")
        residual = self.networks["residual"](noised)
        with torch.no_grad():
            base = prior(noised, t, prior.context(inputs["states"], inputs.get("mask")))
            average = self.averages["residual"](noised)
        loss = (base + residual - x).square().mean() + (residual - average).square().mean()
        yield "residual", loss, {"apart": (residual - average).detach().abs().mean()}

    def check(self, values) -> None:
        pass

    def preview(self, averages, pixels, device, *, low_memory=False):
        return []


def _phases(recipe: Recipe) -> list[NamedPhase]:
    phase = Phase(optimization=recipe.stage_c.optimization)
    return [NamedPhase(name="residual", phase=phase, config="stage_c", path="stage_c", trains=())]


def _network(recipe: Recipe) -> nn.Module:
    channels = recipe.prior.c_in
    return nn.Sequential(nn.Conv2d(channels, 4, 1), nn.GELU(), nn.Dropout(0.2), nn.Conv2d(4, channels, 1))


RESULTS: list[nn.Module] = []


def _train(run) -> None:
    run.seed_weights("residual")
    frozen = run.parts.cascade(run.settings_of_model())
    for network in frozen.networks().values():
        network.to(run.device).eval().requires_grad_(False)
    (named,) = _phases(run.recipe)
    residual = _network(run.recipe)
    stage = ResidualStage(named.phase.optimization, residual, frozen, run.statistics, run.recipe)
    averages = run.train_phase(stage, named.phase)
    RESULTS[:] = [averages(_network(run.recipe), "residual")]


def _write(run, folder: Path) -> None:
    save_file(RESULTS[0].state_dict(), folder / "residual.safetensors")


RESIDUAL = StageKind(
    name="residual",
    short="residual",
    config="stage_c",
    makes=(),
    builds_on=("prior",),
    reads_captions=True,
    phases=_phases,
    train=_train,
    write=_write,
)


def table() -> tuple[str, ...]:
    """The table of stages with this one."""
    return (*stage_table.STAGES, f"{__name__}:RESIDUAL")


def recipe(model: Path) -> Recipe:
    base = tiny()
    optimization = dataclasses.replace(
        base.stage_c.optimization, images=IMAGES, batch_size=4, warmup=0, learning_rate=1e-2
    )
    return dataclasses.replace(
        base,
        stages=("residual",),
        start_from=str(model),
        stage_c=dataclasses.replace(base.stage_c, optimization=optimization),
        checkpoint_seconds=0.0,
        log_every=1,
        workers=0,
    )


if __name__ == "__main__":
    from wuerstchen.train.report.events import Log
    from wuerstchen.train.run import train

    stage_table.STAGES = table()
    writes = Log.event

    def event(self, kind, **values):
        writes(self, kind, **values)
        if kind == "checkpoint" and 0 < values["images"] < IMAGES:
            os.kill(os.getpid(), signal.SIGKILL)

    Log.event = event
    train(recipe(Path(sys.argv[1])), Path(sys.argv[2]), device="cpu")

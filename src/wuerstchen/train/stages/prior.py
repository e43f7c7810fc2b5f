"""Training of Stage C: the prior, on the semantic latents of the finished compressor."""

import dataclasses
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float16
from PIL import Image
from torch import Tensor, nn

from wuerstchen.checkpoints.average import weighted_average
from wuerstchen.data.plan import stable_hash
from wuerstchen.data.prepared import PreparedSet
from wuerstchen.diffusion.known_cells import with_known_cells
from wuerstchen.diffusion.objective import Objective
from wuerstchen.errors import DataError, UserError
from wuerstchen.models.cascade import Cascade, LatentStatistics
from wuerstchen.models.compressor import Compressor, compressor_input
from wuerstchen.models.prior import Prior
from wuerstchen.pipeline import Wuerstchen
from wuerstchen.runtime.offload import OneAtATime, Residence
from wuerstchen.sampling import Sampling
from wuerstchen.train.config import Phase, Recipe, StageCConfig
from wuerstchen.train.feed.images import Batch
from wuerstchen.train.feed.known_cells import mean_of_unknown, random_regions
from wuerstchen.train.feed.prepared import StoredBatch, check_prepared, some_latents
from wuerstchen.train.feed.random import ImageRandom
from wuerstchen.train.precision import AUTOCAST_DTYPES, with_autocast_weights
from wuerstchen.train.stages.base import (
    MIN_STD,
    PIECE,
    Inputs,
    Losses,
    NamedPhase,
    Run,
    StageKind,
    encoded_captions,
    full_precision,
    in_chunks,
    numbered,
    objective_of,
    text_inputs,
    with_captions_dropped,
)
from wuerstchen.train.stages.dispersive import dispersive_loss

Need = Literal["compressor", "text_encoder"]
"""Frozen networks that compute the inputs of updates. Prepared sets may need neither."""


class StageC:
    """Trains the prior on the normalised semantic latents of the frozen compressor."""

    averaged = ("prior",)
    captions = True
    reads_images = False
    denoises = "x"

    def __init__(
        self,
        config: StageCConfig,
        recipe: Recipe,
        model: Cascade,
        phase: NamedPhase | None = None,
        *,
        device: torch.device | None = None,
        needs: Collection[Need] = ("compressor", "text_encoder"),
    ) -> None:
        """The prior of the ``model`` is trained. The other networks are frozen. Without a ``phase`` it is the
        first one.

        On a ``device`` other than the CPU, only the frozen networks in ``needs`` stay on it. The others are
        moved to it for previews. If ``device`` is None, nothing is moved.
        """
        assert model.prior is not None
        assert model.compressor is not None
        assert model.text_encoder is not None
        self.name = "c" if phase is None else phase.name
        self.config = config
        self.recipe = recipe
        self.optimization = config.optimization if phase is None else phase.phase.optimization
        self.prior = model.prior
        self.statistics = model.settings.latent_statistics
        # Without the student, so that previews show the network that is trained.
        frozen = dataclasses.replace(model, prior=None, prior_student=None)
        assert frozen.compressor is not None
        assert frozen.text_encoder is not None
        self.compressor = frozen.compressor.eval().requires_grad_(False)
        self.text_encoder = frozen.text_encoder
        if device is not None:
            frozen.text_encoder.to(device)
        self.no_text = frozen.text_encoder.encode([""])
        self.frozen = frozen
        self.networks: dict[str, nn.Module] = {"prior": self.prior}
        self.rates: dict[str, float] = {}
        self.rate_scales: dict[str, float] = {}
        self.preview_labels = {"prompts": list(recipe.preview_prompts)}
        self.visitors: list[nn.Module] = []
        """Frozen networks that are on the device only while they compute."""
        self.residence: Residence | None = None
        """Moves them there."""
        if device is not None and device.type != "cpu":
            self._place(device, needs)

    def _place(self, device: torch.device, needs: Collection[Need]) -> None:
        """Keeps on ``device`` only what updates need, in the precision that they need, or moves it there for
        each use with ``memory=lowest``."""
        for network in self.frozen.networks().values():
            network.to("cpu")
        if "text_encoder" in needs:
            half = AUTOCAST_DTYPES.get(self.recipe.precision)
            if half is not None:
                self.text_encoder = with_autocast_weights(self.text_encoder, half)
        networks = [getattr(self, name) for name in needs]
        if self.recipe.memory == "lowest":
            self.visitors, self.residence = networks, OneAtATime(device)
            return
        for network in networks:
            network.to(device)

    @contextmanager
    def _present(self, network: nn.Module) -> Iterator[None]:
        """Inside this context, a frozen network that updates need is on their device."""
        if self.residence is None or network not in self.visitors:
            yield
            return
        with self.residence.using(network):
            yield
        self.residence.release()

    def prepare(self, batch: Batch, device: torch.device) -> Inputs:
        with full_precision(device), self._present(self.compressor):
            z = in_chunks(self._semantic_latents, batch.images.to(device))["z"]
        with self._present(self.text_encoder):
            text = encoded_captions(self.text_encoder, batch.captions, self.recipe)
        return {"x": self.statistics.normalise(z), **text}

    def _semantic_latents(self, pixels: Float[Tensor, "b 3 h w"]) -> Inputs:
        return {"z": self.compressor(compressor_input(pixels, self.recipe.view_scale)).float()}

    def prepare_stored(self, batch: StoredBatch, device: torch.device) -> Inputs:
        """``prepare`` on stored outputs of the compressor and maybe of the text encoder."""
        x = self.statistics.normalise(batch.semantic_latents.to(device).float())
        with self._present(self.text_encoder):
            return {"x": x, **text_inputs(batch.texts(self.text_encoder, device), self.recipe)}

    @property
    def objective(self) -> Objective:
        return objective_of(self.recipe.prior.prediction, self.config)

    def losses(self, inputs: Inputs, random: ImageRandom) -> Losses:
        x = inputs["x"]
        if self.config.text_noise:
            inputs = inputs | {"states": with_noise(inputs["states"], random, self.config.text_noise)}
        states, mask = with_captions_dropped(self.no_text, inputs, random, self.config.caption_dropout)
        objective = self.objective
        t = objective.times(random.uniform("time"))
        noise = random.normal("noise", x.shape[1:])
        context = self.prior.context(states, mask, cache_kv=False)
        noised, known = objective.noised(x, noise, t), None
        if self.config.known_fraction:
            known = random_regions(random, x.shape[2:], self.config.known_fraction)
            noised, t = with_known_cells(noised, t, x, known)
        weight, terms = self.config.dispersive_weight, {}
        if weight:
            quarter = max(1, self.prior.config.depth // 4)
            output, features = self.prior.with_features(noised, t, context, quarter)
            terms["dispersive"] = dispersive_loss(features)
        else:
            output = self.prior(noised, t, context)
        losses = objective.loss(output, x, noise, t)
        loss = (losses if known is None else mean_of_unknown(losses, known)).mean()
        yield "prior", loss + weight * terms["dispersive"] if weight else loss, terms

    def check(self, values: dict[str, float]) -> None:
        pass

    def predict(self, averages: dict[str, nn.Module], inputs: Inputs, x: Tensor, t: Tensor) -> Tensor:
        prior = averages["prior"]
        assert isinstance(prior, Prior)
        return prior(x, t, prior.context(inputs["states"], inputs.get("mask")))

    def preview(
        self,
        averages: dict[str, nn.Module],
        pixels: Tensor,
        device: torch.device,
        *,
        low_memory: bool = False,
    ) -> list[Image.Image]:
        """Images of the recipe's prompts by Stages C, B and A."""
        prior = averages["prior"]
        assert isinstance(prior, Prior)
        cascade = dataclasses.replace(self.frozen, prior=prior)
        return previews(cascade, self.recipe, device, low_memory)


def previews(
    cascade: Cascade, recipe: Recipe, device: torch.device, low_memory: bool, sampling: Sampling | None = None
) -> list[Image.Image]:
    """Images of the recipe's prompts."""
    prompts = list(recipe.preview_prompts)
    if not prompts:
        return []
    if device.type == "cpu" and not low_memory:
        return Wuerstchen(cascade, device).generate(prompts, sampling=sampling)
    # Networks that updates do not need are moved here one at a time. The averages stay where they are.
    model = Wuerstchen(cascade, device, low_memory="layer" if low_memory else "stage")
    most = 1 if low_memory else max(1, min(8, PIECE // cascade.settings.image_size**2))
    try:
        return model.generate(prompts, batch_size=most, sampling=sampling)
    finally:
        model.residence.release()


def with_noise(
    states: Float[Tensor, "b t d"], random: ImageRandom, deviation: float
) -> Float[Tensor, "b t d"]:
    """The text states with Gaussian noise. ``deviation`` is in multiples of the root mean square of each."""
    size = states.float().square().mean(dim=-1, keepdim=True).sqrt()
    noise = random.normal("text_noise", states.shape[1:])
    return (states + deviation * size * noise).to(states.dtype)


@torch.no_grad()
def measure_statistics(
    compressor: Compressor, batches: Iterator[Batch], device: torch.device, view_scale: float = 0.75
) -> LatentStatistics:
    """Mean and standard deviation of each channel of the semantic latents of some images."""
    views = (compressor_input(batch.pixels(device), view_scale) for batch in batches)
    latents = torch.cat([compressor(view).float().cpu() for view in views])
    return _statistics(latents.double().transpose(0, 1).flatten(1))


def measure_stored_statistics(latents: Iterable[Float16[np.ndarray, "c h w"]]) -> LatentStatistics:
    """``measure_statistics`` of stored latents of any sizes. Raises ``DataError`` if there are none."""
    columns = [torch.from_numpy(found.astype(np.float64)).flatten(1) for found in latents]
    if not columns:
        raise DataError("no semantic latents of the prepared set can be read. Prepare the set again.")
    return _statistics(torch.cat(columns, dim=1))


def _statistics(columns: Float[Tensor, "c n"]) -> LatentStatistics:
    spread = columns.std(1).clamp(min=1e-3).tolist()  # a constant channel must not divide by zero
    if max(spread) < MIN_STD:
        raise UserError(
            f"the standard deviation of the semantic latents is at most {max(spread):.3g}. Below {MIN_STD} "
            "they contain no information about the images. Train Stage B again with a lower "
            "stage_b.backbone_rate."
        )
    return LatentStatistics(mean=tuple(columns.mean(1).tolist()), std=tuple(spread))


def _phases(recipe: Recipe) -> list[NamedPhase]:
    return numbered("c", "stage_c", recipe.stage_c, ("prior",))


def _of_phase(config: StageCConfig, phase: Phase) -> StageCConfig:
    """The settings of the stage with those that a phase replaces."""
    return config if phase.time_shift is None else dataclasses.replace(config, time_shift=phase.time_shift)


def train(run: Run) -> None:
    """Trains all phases of Stage C, after measuring the statistics of the semantic latents."""
    recipe, config, initial = run.recipe, run.recipe.stage_c, run.start.parts.prior
    run.seed_weights("c")
    prior = Prior(recipe.prior)
    if initial is not None:
        prior.load_state_dict(initial.state_dict())
    run.parts.prior = None
    if initial is None:  # trained weights keep their normalisation
        run.statistics = _measured_statistics(run)
    phases, finals = _phases(recipe), []
    for named in phases:
        if not recipe.selects(named.name):
            continue
        prior.requires_grad_(True)
        frozen = run.parts.cascade(run.settings_of_model(named.phase.image_size))
        model = dataclasses.replace(frozen, prior=prior)
        needed = needs(run, named.phase)
        settings = _of_phase(config, named.phase)
        stage = StageC(settings, recipe, model, named, device=run.device, needs=needed)
        finals.append(run.train_phase(stage, named.phase))
        prior = finals[-1](Prior(recipe.prior), "prior")
    if config.blend < 1 and recipe.selects(phases[-1].name):
        # The phase before the last one was trained in this run, or the run started from it.
        before = Prior(recipe.prior).to(run.device)
        if len(finals) > 1:
            before = finals[-2](before, "prior")
        else:
            assert initial is not None
            before.load_state_dict(initial.state_dict())
        prior.load_state_dict(weighted_average(before.state_dict(), prior.state_dict(), config.blend))
    run.parts.prior = prior


def needs(run: Run, phase: Phase) -> tuple[Need, ...]:
    """The frozen networks that compute the inputs of a phase of Stage C."""
    if not run.makes_updates:
        return ()
    if not isinstance(run.source(phase), PreparedSet):
        return ("compressor", "text_encoder")
    return ("text_encoder",) if run.recipe.stored_texts == "tokens" else ()


def _measured_statistics(run: Run) -> LatentStatistics:
    """Measures the statistics once, on images of the model's size."""
    recipe, compressor = run.recipe, run.parts.compressor
    assert compressor is not None

    def measure() -> dict[str, Any]:
        source = run.measured_source()
        if isinstance(source, PreparedSet):
            seed = stable_hash(recipe.seed, "map") >> 1
            latents = some_latents(source, recipe.statistics_images, seed, recipe.skip)
            return dataclasses.asdict(measure_stored_statistics(latents))
        images = run.some_images("map", recipe.image_size)
        network = compressor.to(run.device)
        return dataclasses.asdict(measure_statistics(network, images, run.device, recipe.view_scale))

    channels = recipe.compressor.c_latent
    of_rehearsals = {"mean": [0.0] * channels, "std": [1.0] * channels}
    found = run.measured_once("stage_c", measure, {}) or of_rehearsals
    return LatentStatistics(**{name: tuple(values) for name, values in found.items()})


def check(run: Run) -> None:
    """Raises ``UserError`` for prepared sets made with other networks or that a phase cannot use."""
    check_sources(run, _phases(run.recipe))


def check_sources(run: Run, phases: list[NamedPhase]) -> None:
    """``check`` for the ``phases`` of a stage that reads captions and semantic latents."""
    recipe, parts = run.recipe, run.parts
    for named in phases:
        if not recipe.selects(named.name):
            continue
        source, phase = run.source(named.phase), named.phase
        if not isinstance(source, PreparedSet):
            continue
        assert parts.compressor is not None
        assert parts.text_encoder is not None
        check_prepared(
            source,
            compressor=parts.compressor,
            text_encoder=parts.text_encoder,
            view_scale=recipe.view_scale,
            image_size=phase.image_size or recipe.image_size,
            texts=recipe.stored_texts,
            text_positions=recipe.text_positions,
        )


PRIOR_STAGE = StageKind(
    name="prior",
    short="c",
    config="stage_c",
    changeable=frozenset(
        {
            "loss_weight",
            "time_shift",
            "time_density",
            "caption_dropout",
            "text_noise",
            "dispersive_weight",
            "known_fraction",
            "blend",
            "max_ratio",
        }
    ),
    makes=("prior",),
    builds_on=("decoder",),
    reads_captions=True,
    phases=_phases,
    train=train,
    check=check,
)

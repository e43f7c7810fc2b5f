"""Interfaces of the training stages: a stage's definition (``StageKind``), its access to the run (``Run``),
and a phase as the training loop sees it (``Stage``).

A phase works in two steps. ``prepare`` computes what does not change during training: the outputs of frozen
networks for an image and its caption. ``losses`` yields ``(network, loss, terms)``, and the loop updates that
network from each loss before it asks for the next one. ``losses`` decides nothing on the host, so an update
can be recorded once and replayed.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor, nn

from wuerstchen.data.prepared import PreparedSet
from wuerstchen.data.sources import Source
from wuerstchen.diffusion.objective import Objective, default_time_density, make_objective
from wuerstchen.diffusion.sampler_table import samplers_for
from wuerstchen.models.cascade import CascadeSettings, LatentStatistics
from wuerstchen.models.text import TextEncoder, TextStates
from wuerstchen.train.config import (
    Optimization,
    Phase,
    Recipe,
    StageBConfig,
    StageCConfig,
    phases_of,
)
from wuerstchen.train.decoder_kinds import decoder_kind
from wuerstchen.train.feed.images import Batch, pixels_of
from wuerstchen.train.feed.prepared import StoredBatch
from wuerstchen.train.feed.random import ImageRandom
from wuerstchen.train.initial_weights import InitialWeights, Parts
from wuerstchen.train.stages.abilities import KeepsBest as KeepsBest
from wuerstchen.train.stages.abilities import LendsEncoders as LendsEncoders
from wuerstchen.train.stages.abilities import ReadsOnlyCaptions as ReadsOnlyCaptions
from wuerstchen.train.stages.abilities import UsesAverages as UsesAverages
from wuerstchen.train.stages.abilities import UsesBackbones as UsesBackbones

MIN_STD = 0.1  # of semantic latents. Batch norm keeps it near 1 as long as the images differ

Losses = Iterator[tuple[str, Tensor, dict[str, Tensor]]]


Inputs = dict[str, Tensor]
"""What an update reads, with one row per image."""


@runtime_checkable
class Stage(Protocol):
    """The interface of a stage's phase to the training loop."""

    name: str
    optimization: Optimization
    networks: dict[str, nn.Module]
    """The trained networks. Each has its own optimizer."""
    averaged: tuple[str, ...]
    """Names of the networks that have a weight average."""
    captions: bool
    """Whether batches need captions."""
    reads_images: bool
    """Whether ``losses`` reads ``inputs["images"]``, the images as (b, h, w, 3) in uint8."""
    rates: dict[str, float]
    """Learning rates of networks that do not use that of ``optimization``."""
    rate_scales: dict[str, float]
    """Factors of the learning rate by prefix of the parameter name."""
    preview_labels: dict[str, list[str]]
    """What the images of ``preview`` show: ``rows`` from the top, or a list of ``prompts``."""

    def prepare(self, batch: Batch, device: torch.device) -> Inputs:
        """The outputs of frozen networks for a batch.

        Called without gradients, once per image if they are cached, and under the autocast of updates.
        Targets must be computed in ``full_precision``.
        """
        ...

    def losses(self, inputs: Inputs, random: ImageRandom) -> Losses:
        """Yields one loss for each network that this batch updates."""
        ...

    def check(self, values: dict[str, float]) -> None:
        """Raises ``UserError`` if the values of an update show that training has failed."""
        ...

    def preview(
        self,
        averages: dict[str, nn.Module],
        pixels: Tensor,
        device: torch.device,
        *,
        low_memory: bool = False,
    ) -> list[Image.Image]:
        """Images that show the progress of training, generated with the averaged weights.

        With ``low_memory`` they are generated one at a time, and networks that are not on ``device`` are
        moved there layer by layer. This needs the least memory and is much slower.
        """
        ...


N = TypeVar("N", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class NamedPhase:
    """A phase of training with its own checkpoints."""

    name: str
    """In run folders (``RUN/stage_{name}``), logs and messages: b, b2 ..."""
    phase: Phase
    config: str
    """The recipe's field with the stage's settings, as ``stage_b``."""
    path: str
    """Path of the phase in the recipe, as ``stage_b.phases.0``. Empty for the refinement of a stage."""
    trains: tuple[str, ...]
    """The parts of the model that it trains."""
    keeps_inputs: bool = False
    """Whether stages that build on this one stay valid, because nothing changes that they are trained on."""
    unused: frozenset[str] = frozenset()
    """Settings of the stage that the phase does not use."""

    @property
    def own(self) -> dict[str, str]:
        """Settings of the stage that the phase replaces, with the paths of its own values."""
        of_refinement = {"time_shift": "refine_shift", "feature_weight": "refine_feature_weight"}
        names = [name for name in of_refinement if getattr(self.phase, name) is not None]
        refines = not self.path
        return {n: f"{self.config}.{of_refinement[n]}" if refines else f"{self.path}.{n}" for n in names}


@runtime_checkable
class Averages(Protocol):
    """The averaged weights at the end of a phase."""

    def __call__(self, network: N, name: str) -> N:
        """Loads the averaged weights of the network that was trained under this ``name`` into ``network``.

        Returns it on the run's device, in eval mode and frozen.
        """
        ...


@runtime_checkable
class Run(Protocol):
    """What a stage gets to train with: the results of earlier stages, the data, and the training loop.

    Rehearsals and exports train the stages in the same way. A rehearsal discards the results, and in an
    export ``train_phase`` returns the weights of checkpoints.
    """

    recipe: Recipe
    device: torch.device
    start: InitialWeights
    """What the run starts from. It must not be changed."""
    parts: Parts
    """The networks of the model so far. A stage replaces those that it makes. Networks that are not trained
    are on the CPU until a stage moves them."""
    statistics: LatentStatistics
    """Statistics of the semantic latents, for Stage C."""
    ended_at: dict[str, int]
    """The images of the checkpoint whose averages a phase ended with, by the name of the phase."""
    results: dict[str, Any]
    """What stages make that is not a part of the model, by the short names of the stages."""
    makes_updates: bool
    """Whether ``train_phase`` makes updates. If not, stages can leave out what only updates need."""

    def train_phase(self, stage: "Stage", phase: Phase, *, multiple: int = 1) -> Averages:
        """Trains a phase to its end, from its last checkpoint if there is one. The sides of its images are
        multiples of ``multiple`` pixels."""
        ...

    def is_new(self, name: str) -> bool:
        """Whether the phase with this name has no checkpoint yet."""
        ...

    def seed_weights(self, name: str) -> None:
        """Seeds torch's generator for initial weights, by the recipe's seed and this name."""
        ...

    def source(self, phase: Phase) -> Source | PreparedSet:
        """The data set that a phase reads."""
        ...

    def measured_source(self) -> Source | PreparedSet:
        """The data set for measurements."""
        ...

    def some_images(self, purpose: str, size: int) -> Iterator[Batch]:
        """Training images of ``size`` pixels for a measurement, in an order that depends on its
        ``purpose``."""
        ...

    def measured_once(
        self, folder: str, measure: Callable[[], dict[str, Any]], known: dict[str, Any]
    ) -> dict[str, Any]:
        """The result of ``measure``, stored in the run's ``folder`` for later starts.

        Runs that measure nothing return ``known`` instead: the values of the recipe, if it has any.
        """
        ...

    def tensors_once(
        self, name: str, make: Callable[[], dict[str, Tensor]], known: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The result of ``make`` on the CPU, stored in the run folder's file ``name`` for later starts.

        Runs that measure nothing return ``known`` instead.
        """
        ...

    def settings_of_model(self, image_size: int | None = None) -> CascadeSettings:
        """The settings of the model so far, optionally with another image size."""
        ...


@dataclass(frozen=True, kw_only=True)
class StageKind:
    """A stage: what it makes, what it needs, and how it is trained."""

    name: str
    short: str
    """Its name in ``stages`` of recipes, and in run folders after ``stage_``."""
    config: str
    """The recipe's field with its settings, as ``stage_b``."""
    changeable: frozenset[str] = frozenset()
    """Fields of these settings that ``--change`` may change in the middle of a run."""
    makes: tuple[str, ...]
    """The parts of the model that it trains."""
    optional: tuple[str, ...] = ()
    """Which of these parts are optional in a model."""
    builds_on: tuple[str, ...] = ()
    """Names of the stages whose results it uses."""
    refines: bool = False
    """Whether it is a later phase of the stage with the same ``short`` name, after other stages have been
    trained."""
    reads_captions: bool = False
    """Whether it reads captions with the text encoder of Stage C."""
    reads_images: bool = True
    """Whether it reads images or their latents. If not, it can be trained on captions alone."""
    needs_images: str = ""
    """Why it cannot be trained on a prepared set. Empty if it can."""
    phases: Callable[[Recipe], list[NamedPhase]]
    """All its phases in a recipe that trains it. Empty if the recipe leaves it out."""
    train: Callable[[Run], None]
    """Trains its phases that the recipe selects (``Recipe.selects``) and puts what it makes into
    ``Run.parts``."""
    check: Callable[[Run], None] | None = None
    """Called before any stage is trained. Raises ``UserError`` for problems."""
    result: str = ""
    """Name of the folder in the run for a result that is used together with the model that the run starts
    from, such as an adapter. The run then takes the settings of that model and writes no other. Empty for
    stages of a model."""
    write: Callable[[Run, Path], None] | None = None
    """Writes results that are not parts of a model, such as an adapter, into the model folder. Only rank 0
    calls it."""


def numbered(
    kind: str, config_name: str, config: StageBConfig | StageCConfig, makes: tuple[str, ...]
) -> list[NamedPhase]:
    """The phases of a stage that can have several: c, c2, c3 ..."""
    return [
        NamedPhase(
            name=kind if number == 0 else f"{kind}{number + 1}",
            phase=phase,
            config=config_name,
            path=config_name if number == 0 else f"{config_name}.phases.{number - 1}",
            trains=makes,
        )
        for number, phase in enumerate(phases_of(config))
    ]


def sides_multiple(recipe: Recipe) -> int:
    """Image sides must be multiples of this to be decoded, because each level of the decoder halves them."""
    return recipe.vqgan.factor * recipe.decoder.size_multiple


def full_precision(device: torch.device) -> torch.autocast:
    """Disables autocast, so that frozen networks compute targets in fp32.

    Under bf16 autocast the bundled model's semantic latents had an error of 0.035 standard deviations, with
    biases of channels up to 0.033 that training would learn. With convolutions in TF32, torch's default for
    fp32 on GPUs, the error is 0.003. Text states (0.004 in bf16) are inputs only and stay under autocast, as
    in the original's trainer.
    """
    return torch.autocast(device.type, enabled=False)


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Autocast to ``dtype``; with None everything is computed in the precision of the weights."""
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


PIECE = 2**22
"""Pixels that frozen networks process at a time: 4 images of 1024 × 1024. Stage A in fp32 needs 0.8 GiB for
each."""


def in_chunks(
    function: Callable[[Float[Tensor, "b 3 h w"]], Inputs],
    images: UInt8[Tensor, "b h w 3"],
    most: int = PIECE,
) -> Inputs:
    """Applies frozen networks to at most ``most`` pixels at a time, but at least one image. Joins the results
    by name."""
    count = max(1, most // (images.shape[1] * images.shape[2]))
    made = [function(pixels_of(piece)) for piece in images.split(count)]
    return {name: torch.cat([part[name] for part in made]) for name in made[0]}


def objective_of(prediction: str, config: StageBConfig | StageCConfig) -> Objective:
    """The objective of a stage whose network predicts ``prediction``."""
    return make_objective(
        prediction,
        loss_weight=config.loss_weight,
        time_shift=config.time_shift,
        time_density=config.time_density or default_time_density(prediction),
    )


@runtime_checkable
class ReadsStored(Protocol):
    """A stage that can also be trained on prepared sets."""

    def prepare_stored(self, batch: StoredBatch, device: torch.device) -> Inputs:
        """``prepare`` without the networks whose outputs are stored."""
        ...


def inputs_of(stage: Stage, batch: Batch | StoredBatch, device: torch.device) -> Inputs:
    """Everything that an update reads of a batch."""
    if isinstance(batch, StoredBatch):
        assert isinstance(stage, ReadsStored)
        return stage.prepare_stored(batch, device)
    inputs = stage.prepare(batch, device)
    return inputs | ({"images": batch.images.to(device)} if stage.reads_images else {})


def encoded_captions(text_encoder: TextEncoder, captions: list[str], recipe: Recipe) -> Inputs:
    """The captions as inputs: states (b, t, d) and, unless padding is attended to, masks (b, t)."""
    return text_inputs(text_encoder.encode(captions), recipe)


def text_inputs(encoded: TextStates, recipe: Recipe) -> Inputs:
    """Encoded texts as inputs, like ``encoded_captions``."""
    states = {"states": encoded.states.float()}
    return states if recipe.text_positions == "all" else {**states, "mask": encoded.mask}


def with_captions_dropped(
    empty: TextStates, inputs: Inputs, random: ImageRandom, probability: float, purpose: str = "caption"
) -> tuple[Float[Tensor, "b t d"], Bool[Tensor, "b t"] | None]:
    """States and mask of the captions in ``inputs``, replaced by those of an empty text with this
    ``probability`` for each image.

    The mask is None if ``inputs`` has none.
    """
    drop = random.uniform(purpose) < probability
    states = torch.where(drop[:, None, None], empty.states, inputs["states"])
    if "mask" not in inputs:
        return states, None
    return states, torch.where(drop[:, None], empty.mask, inputs["mask"])


def cascade_settings(
    recipe: Recipe, statistics: LatentStatistics, start: CascadeSettings | None = None
) -> CascadeSettings:
    """The settings of the model that a recipe trains. Settings that recipes do not have come from the model
    at its ``start``, if there is one."""
    settings, decoder = start or CascadeSettings(), decoder_kind(recipe.decoder)
    objectives = {"prior": settings.prior_objective, "decoder": settings.decoder_objective}
    if "c" in recipe.stages:
        objectives["prior"] = objective_of(recipe.prior.prediction, recipe.stage_c)
    if "b" in recipe.stages and decoder.objective is not None:
        objectives["decoder"] = decoder.objective(recipe)
    fitting = samplers_for(objectives["prior"].path)
    # A recipe that does not train Stage C may name a sampler for a later Stage C with another objective.
    wanted = (recipe.prior_sampler, settings.prior_sampler)
    sampler = next((name for name in wanted if name in fitting), fitting[0])
    student = (settings.prior_student_steps, settings.prior_student_guidance)
    if "few" in recipe.stages:
        student = (recipe.stage_few.steps, recipe.prior_guidance)
    of_decoder = settings.decoder_student_steps
    if "few_b" in recipe.stages:
        of_decoder = recipe.stage_few_b.steps
    return dataclasses.replace(
        settings,
        prior_objective=objectives["prior"],
        decoder_objective=objectives["decoder"],
        prior_sampler=sampler,
        prior_equal_steps=settings.prior_equal_steps or decoder.settings.prior_equal_steps,
        image_size=recipe.image_size,
        # 128 pixels are three positions of the semantic latents. The decoder's levels may need more.
        size_multiple=math.lcm(128, recipe.vqgan.factor * recipe.decoder.size_multiple),
        view_scale=recipe.view_scale,
        latent_statistics=statistics,
        text_mask=recipe.text_positions == "real",
        prior_steps=recipe.prior_steps,
        prior_guidance=recipe.prior_guidance,
        prior_guidance_interval=recipe.prior_guidance_interval,
        prior_known_cells=(
            recipe.stage_c.known_fraction > 0 if "c" in recipe.stages else settings.prior_known_cells
        ),
        decoder_steps=recipe.decoder_steps,
        decoder_guidance=recipe.decoder_guidance,
        decoder_shift=recipe.decoder_shift,
        prior_student_steps=student[0],
        prior_student_guidance=student[1],
        decoder_student_steps=of_decoder,
    )

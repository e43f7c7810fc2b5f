"""What the files of stages share: what a stage is (``StageKind``), what it is handed (``Run``), and what the
training loop needs to know of one of its phases (``Stage``).

A phase works in two steps. ``prepare`` is what does not change while it trains: what frozen networks make of
a picture and of its caption. ``losses`` is the rest: it yields ``(network, loss, terms)`` for each batch, and
the loop makes one update of that network from each loss before it asks for the next. ``losses`` decides
nothing on the host, so that an update can be recorded once and replayed.
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
from wuerstchen.diffusion.objective import Objective, make_objective
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
from wuerstchen.train.initial_weights import Parts, Start

LEAST_SPREAD = 0.1  # of the map, which its batch norm keeps near 1 as long as pictures differ at all

Losses = Iterator[tuple[str, Tensor, dict[str, Tensor]]]


Inputs = dict[str, Tensor]
"""What an update reads, a row a picture."""


@runtime_checkable
class Stage(Protocol):
    """What the loop needs to know of a stage."""

    name: str
    optimization: Optimization
    networks: dict[str, nn.Module]
    """Trained, each by an optimizer of its own."""
    averaged: tuple[str, ...]
    """Those of which a weight average is kept."""
    captions: bool
    """Whether batches need captions."""
    reads_images: bool
    """Whether ``losses`` reads ``inputs["images"]``: the pictures themselves, (b, h, w, 3) in uint8."""
    rates: dict[str, float]
    """Learning rates of networks that have their own in place of ``optimization``'s."""
    rate_scales: dict[str, float]
    """Shares of the learning rate, for parameters whose names begin so."""
    preview_labels: dict[str, list[str]]
    """What the images of ``preview`` show: ``rows`` from the top, or ``prompts``, one an image."""

    def prepare(self, batch: Batch, device: torch.device) -> Inputs:
        """What frozen networks make of a batch. Called without gradients, once a picture if it is kept, and
        under autocast if updates are: targets are computed in ``full_precision``."""
        ...

    def losses(self, inputs: Inputs, random: ImageRandom) -> Losses:
        """One loss for each update that this batch makes."""
        ...

    def check(self, values: dict[str, float]) -> None:
        """Raises ``UserError`` where the values of an update show that going on is in vain."""
        ...

    def preview(
        self,
        averages: dict[str, nn.Module],
        pixels: Tensor,
        device: torch.device,
        *,
        low_memory: bool = False,
    ) -> list[Image.Image]:
        """Pictures of the state of training, drawn with the averaged weights.

        With ``low_memory`` they are drawn one at a time, and networks that are not on ``device`` visit it a
        layer at a time: the least memory, and much slower.
        """
        ...


@runtime_checkable
class UsesAverages(Protocol):
    """A stage whose losses use the weight averages: a student that learns from its own average, say."""

    def use_averages(self, averages: dict[str, nn.Module]) -> None:
        """Is called once, before the first update of a start, with the averages by the networks' names.

        They hold what a checkpoint has restored, and follow the networks after every update. ``losses`` may
        run them, without gradients, and must not change them.
        """
        ...


N = TypeVar("N", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class NamedPhase:
    """One stretch of training, with checkpoints and a log of its own."""

    name: str
    """In run folders (``RUN/stage_{name}``), logs and messages: b, b2 ..."""
    phase: Phase
    config: str
    """The recipe's field with the stage's settings, as ``stage_b``."""
    path: str
    """Path of the phase in the recipe, as ``stage_b.phases.0``; empty for the refinement of a stage."""
    trains: tuple[str, ...]
    """The parts of the model that it changes."""


@runtime_checkable
class Averages(Protocol):
    """The averaged weights that a phase has ended with."""

    def __call__(self, network: N, name: str) -> N:
        """``network``, which is built as the one that was trained under this ``name``, with its averaged
        weights: on the run's device, in eval mode and frozen."""
        ...


@runtime_checkable
class Run(Protocol):
    """What a stage is handed to train with: the results of the stages before it, the data, and the loop.

    Where a run is only rehearsed or exported, the stages are trained in the same way: nothing is kept of
    what they make, or ``train_phase`` gives the weights of checkpoints.
    """

    recipe: Recipe
    device: torch.device
    start: Start
    """What the run starts from, which stays as it is."""
    parts: Parts
    """The networks of the model so far. A stage replaces those that it makes. Networks that no stage is
    trained on lie on the CPU until one moves them."""
    statistics: LatentStatistics
    """Of the semantic latents, for Stage C."""
    makes_updates: bool
    """Whether ``train_phase`` makes updates at all. If not, what only updates need can be left out."""

    def train_phase(self, stage: "Stage", phase: Phase, *, multiple: int = 1) -> Averages:
        """Trains a phase to its end, from its last checkpoint if there is one. Sides of its images are
        multiples of ``multiple`` pixels."""
        ...

    def begins(self, name: str) -> bool:
        """Whether the phase of this name has no checkpoint yet."""
        ...

    def seed_weights(self, name: str) -> None:
        """Seeds torch's generator for initial weights, by the recipe's seed and this name."""
        ...

    def source(self, phase: Phase) -> Source | PreparedSet:
        """The data set that a phase reads."""
        ...

    def measured_source(self) -> Source | PreparedSet:
        """The data set that is measured on."""
        ...

    def some_images(self, purpose: str, size: int) -> Iterator[Batch]:
        """Training images of ``size`` pixels to measure on, in an order that the ``purpose`` seeds."""
        ...

    def measured_once(
        self, folder: str, measure: Callable[[], dict[str, Any]], known: dict[str, Any]
    ) -> dict[str, Any]:
        """What ``measure`` finds, written into the run's ``folder`` and read from there by later starts.

        Where nothing is measured, ``known`` takes its place: what the recipe says, if it says anything.
        """
        ...

    def settings_of_model(self, image_size: int | None = None) -> CascadeSettings:
        """The settings of the model as it is so far, by choice with another image size."""
        ...


@dataclass(frozen=True, kw_only=True)
class StageKind:
    """Something that can be trained: what it makes, what it needs, and how it is done."""

    name: str
    short: str
    """What recipes call it in ``stages``, and run folders after ``stage_``."""
    config: str
    """The recipe's field with its settings, as ``stage_b``."""
    changeable: frozenset[str] = frozenset()
    """Fields of these settings that ``--change`` may change in the middle of a run."""
    makes: tuple[str, ...]
    """The parts of the model that it trains."""
    optional: tuple[str, ...] = ()
    """Those of them that a model can do without."""
    builds_on: tuple[str, ...] = ()
    """Names of the stages whose results it uses."""
    refines: bool = False
    """Whether it goes on with what the stage of the same ``short`` name has made, after others."""
    reads_captions: bool = False
    """Whether it reads captions with the text encoder of Stage C."""
    needs_images: str = ""
    """Why it cannot learn from a prepared set; empty if it can."""
    phases: Callable[[Recipe], list[NamedPhase]]
    """Its phases by a recipe that trains it; none if the recipe leaves it out."""
    train: Callable[[Run], None]
    """Trains all its phases and puts what it makes into ``Run.parts``."""
    check: Callable[[Run], None] | None = None
    """Raises ``UserError`` for what would stop it, before any stage is trained."""
    write: Callable[[Run, Path], None] | None = None
    """Writes what is no part of a model, an adapter say, into the folder of the finished model."""


def numbered(
    kind: str, config_name: str, config: StageBConfig | StageCConfig, makes: tuple[str, ...]
) -> list[NamedPhase]:
    """The phases of a stage that has several: c, c2, c3 ..."""
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
    """What sides of images are multiples of where latents are decoded: the decoder's levels halve them."""
    return recipe.vqgan.factor * recipe.decoder.size_multiple


def full_precision(device: torch.device) -> torch.autocast:
    """Within, frozen networks compute what is to be learnt in fp32, whatever autocast is around.

    Under bf16 autocast the bundled model's semantic latents had an error of 0.035 of their deviation, with
    biases of channels up to 0.033 that training would learn; with convolutions in TF32, torch's default for
    fp32 on GPUs, 0.003. Text states (0.004 in bf16) are only read, and stay under autocast, as in the
    original's trainer.
    """
    return torch.autocast(device.type, enabled=False)


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Autocast to ``dtype``; with None everything is computed in the precision of the weights."""
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


PIECE = 2**22
"""Pixels that frozen networks see at a time, 4 images of 1024: in fp32 Stage A takes 0.8 GiB for each of
those."""


def in_pieces(
    function: Callable[[Float[Tensor, "b 3 h w"]], Inputs],
    images: UInt8[Tensor, "b h w 3"],
    most: int = PIECE,
) -> Inputs:
    """What frozen networks make of images, of at most ``most`` pixels at a time, or one image; joined by
    name."""
    count = max(1, most // (images.shape[1] * images.shape[2]))
    made = [function(pixels_of(piece)) for piece in images.split(count)]
    return {name: torch.cat([part[name] for part in made]) for name in made[0]}


def objective_of(prediction: str, config: StageBConfig | StageCConfig) -> Objective:
    """The objective of a stage whose network predicts ``prediction``."""
    return make_objective(
        prediction,
        loss_weight=config.loss_weight,
        time_shift=config.time_shift,
        time_density=config.time_density,
    )


@runtime_checkable
class ReadsStored(Protocol):
    """A stage that learns from prepared sets too."""

    def prepare_stored(self, batch: StoredBatch, device: torch.device) -> Inputs:
        """As ``prepare``, without the networks whose results are stored."""
        ...


def inputs_of(stage: Stage, batch: Batch | StoredBatch, device: torch.device) -> Inputs:
    """All that an update reads of a batch."""
    if isinstance(batch, StoredBatch):
        assert isinstance(stage, ReadsStored)
        return stage.prepare_stored(batch, device)
    inputs = stage.prepare(batch, device)
    return inputs | ({"images": batch.images.to(device)} if stage.reads_images else {})


def encoded_captions(text_encoder: TextEncoder, captions: list[str], recipe: Recipe) -> Inputs:
    """The captions as inputs: states of (b, t, d), and masks of (b, t) unless padding is attended to."""
    return text_inputs(text_encoder.encode(captions), recipe)


def text_inputs(encoded: TextStates, recipe: Recipe) -> Inputs:
    """Texts as inputs, likewise."""
    states = {"states": encoded.states.float()}
    return states if recipe.text_positions == "all" else {**states, "mask": encoded.mask}


def with_captions_dropped(
    empty: TextStates, inputs: Inputs, random: ImageRandom, share: float
) -> tuple[Float[Tensor, "b t d"], Bool[Tensor, "b t"] | None]:
    """The captions of ``inputs``, for a ``share`` of the pictures in place of it the states of no text.

    The mask is None where ``inputs`` has none.
    """
    drop = random.uniform("caption") < share
    states = torch.where(drop[:, None, None], empty.states, inputs["states"])
    if "mask" not in inputs:
        return states, None
    return states, torch.where(drop[:, None], empty.mask, inputs["mask"])


def cascade_settings(
    recipe: Recipe, statistics: LatentStatistics, start: CascadeSettings | None = None
) -> CascadeSettings:
    """The settings of the model that a recipe makes; those that no recipe has are of the model at its
    ``start``, if there is one."""
    settings, decoder = start or CascadeSettings(), decoder_kind(recipe.decoder)
    objectives = {"prior": settings.prior_objective, "decoder": settings.decoder_objective}
    if "c" in recipe.stages:
        objectives["prior"] = objective_of(recipe.prior.prediction, recipe.stage_c)
    if "b" in recipe.stages and decoder.objective is not None:
        objectives["decoder"] = decoder.objective(recipe)
    fitting = samplers_for(objectives["prior"].path)
    return dataclasses.replace(
        settings,
        prior_objective=objectives["prior"],
        decoder_objective=objectives["decoder"],
        prior_sampler=settings.prior_sampler if settings.prior_sampler in fitting else fitting[0],
        prior_equal_steps=settings.prior_equal_steps or decoder.settings.prior_equal_steps,
        image_size=recipe.image_size,
        # 128 pixels are three positions of the map; the decoder's levels may need more.
        size_multiple=math.lcm(128, recipe.vqgan.factor * recipe.decoder.size_multiple),
        view_scale=recipe.view_scale,
        latent_statistics=statistics,
        text_mask=recipe.text_positions == "real",
        prior_steps=recipe.prior_steps,
        prior_guidance=recipe.prior_guidance,
        decoder_steps=recipe.decoder_steps,
        decoder_guidance=recipe.decoder_guidance,
        decoder_shift=recipe.decoder_shift,
    )

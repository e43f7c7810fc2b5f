"""Training of Stage B: the latent diffusion decoder of v2, and the phases of any kind of decoder."""

import dataclasses
import math

from jaxtyping import Float, UInt8
from torch import Tensor, nn

from wuerstchen.diffusion.objective import Objective, check_prediction
from wuerstchen.errors import UserError
from wuerstchen.models.cascade import PUBLISHED_STATISTICS, Cascade, CascadeSettings
from wuerstchen.models.compressor import Compressor
from wuerstchen.models.decoder import Decoder, DecoderConfig
from wuerstchen.models.previewer import Previewer
from wuerstchen.train.config import Phase, Recipe, StageBConfig, refining
from wuerstchen.train.decoder_kinds import DecoderKind, decoder_kind
from wuerstchen.train.feed.images import pixels_of
from wuerstchen.train.feed.random import ImageRandom
from wuerstchen.train.initial_weights import fill_compressor
from wuerstchen.train.stages.base import (
    Inputs,
    NamedPhase,
    Run,
    Stage,
    StageKind,
    cascade_settings,
    numbered,
    objective_of,
    sides_multiple,
)
from wuerstchen.train.stages.decoding import DecoderAndCompressor, DecoderOnly, Decoding, WithCompressor
from wuerstchen.train.stages.perceptual import perceptual_network


class _Latents(Decoding):
    """v2's decoder learns to denoise Stage A's latents."""

    denoises = "latents"

    @property
    def objective(self) -> Objective:
        return objective_of(self.recipe.decoder.prediction, self.config)

    def targets(self, pixels: Float[Tensor, "b 3 h w"]) -> Inputs:
        return {"latents": self.vqgan.encode(pixels).float()}

    def decoder_loss(
        self, decoder: nn.Module, z: Float[Tensor, "b c mh mw"], inputs: Inputs, random: ImageRandom
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        assert isinstance(decoder, Decoder)
        latents = inputs["latents"]
        states, mask = self.text_of(inputs, random)
        context = decoder.context(
            self.augment(z, random), tuple(latents.shape[2:]), states, mask, cache_kv=False
        )
        objective = self.objective
        t = objective.times(random.uniform("time"))
        noise = random.normal("noise", latents.shape[1:])
        x = objective.noised(latents, noise, t)
        output = decoder(x, t, context)
        loss = objective.loss(output, latents, noise, t).mean()
        if not self.config.feature_weight:
            return loss, {}
        features = self.feature_loss(output, x, t, inputs["images"])
        return loss + self.config.feature_weight * features, {"features": features}

    def feature_loss(
        self,
        output: Float[Tensor, "b c h w"],
        x: Float[Tensor, "b c h w"],
        t: Float[Tensor, " b"],
        images: UInt8[Tensor, "b h4 w4 3"],
    ) -> Float[Tensor, ""]:
        """The mean of ᾱ(t) · d(D(x̂₀), image), with d of ``PerceptualLoss`` and D the frozen Stage A.

        At high noise x̂₀ is the mean of many images, whose features are not those of any one of them. The
        factor ᾱ, the fraction of x_t that is signal, therefore goes to 0 there. With noise prediction it also
        cancels the factor 1/√ᾱ in the gradient of x̂₀, which would let pure noise dominate. Only the first
        ``feature_fraction`` of the batch is decoded: batches are shuffled, so it is a random sample.
        """
        assert self.perceptual is not None
        rows = math.ceil(len(x) * self.config.feature_fraction)
        output, x, t = output[:rows], x[:rows], t[:rows]
        drawn = self.vqgan.decode(self.objective.to_clean(output, x, t)).float()
        distances = self.perceptual.of_each(drawn, pixels_of(images[:rows]))
        return (self.objective.alpha_bar(t) * distances).mean()

    def predict(self, averages: dict[str, nn.Module], inputs: Inputs, x: Tensor, t: Tensor) -> Tensor:
        decoder, z = self.decoder_and_latents(averages, inputs)
        assert isinstance(decoder, Decoder)
        size = tuple(x.shape[2:])
        return decoder(x, t, decoder.context(z, size, inputs.get("states"), inputs.get("mask")))


class StageB(_Latents, WithCompressor):
    """Trains v2's latent diffusion decoder together with the semantic compressor."""


class StageBRefinement(_Latents, DecoderOnly):
    """The last phase of v2's Stage B: trains only the decoder, on the finished compressor's latents."""


def _check_recipe(recipe: Recipe) -> None:
    """Raises ``UserError`` if the latents of Stage A and of the decoder differ in their channels."""
    decoder, channels = recipe.decoder, recipe.vqgan.latent_channels
    assert isinstance(decoder, DecoderConfig)
    check_prediction(decoder.prediction)
    if not channels == decoder.c_in == decoder.c_out:
        raise UserError(
            f"the latents have {channels} channels in vqgan.latent_channels, {decoder.c_in} in "
            f"decoder.c_in and {decoder.c_out} in decoder.c_out. All three must be equal."
        )


def _objective(recipe: Recipe) -> Objective:
    return objective_of(recipe.decoder.prediction, recipe.stage_b)


LATENT_DECODER = DecoderKind(
    version="v2",
    works_on="latents",
    config=DecoderConfig,
    network=Decoder,
    with_compressor=StageB,
    refinement=StageBRefinement,
    check=_check_recipe,
    objective=_objective,
    settings=CascadeSettings(),
)


_MAKES = ("decoder", "compressor", "previewer")


def _phases(recipe: Recipe) -> list[NamedPhase]:
    config = recipe.stage_b
    found = numbered("b", "stage_b", config, _MAKES)
    if config.refine_images:
        phase = dataclasses.replace(
            found[-1].phase,
            optimization=refining(config),
            time_shift=config.refine_shift,
            feature_weight=config.refine_feature_weight,
            decoder_only=True,
        )
        name = f"b{len(found) + 1}"
        found.append(NamedPhase(name=name, phase=phase, config="stage_b", path="", trains=_MAKES))
    alone = {
        "trains": ("decoder", "previewer"),
        "keeps_inputs": True,
        "unused": frozenset({"previewer_weight"}),
    }
    return [dataclasses.replace(named, **alone) if named.phase.decoder_only else named for named in found]


def _of_phase(config: StageBConfig, phase: Phase) -> StageBConfig:
    """The settings of the stage with those that a phase replaces."""
    own = {"time_shift": phase.time_shift, "feature_weight": phase.feature_weight}
    return dataclasses.replace(config, **{name: value for name, value in own.items() if value is not None})


def train(run: Run) -> None:
    """Trains all phases of Stage B: the decoder with the compressor and the previewer."""
    recipe, config, vqgan, given = run.recipe, run.recipe.stage_b, run.parts.vqgan, run.start.parts
    assert vqgan is not None
    run.seed_weights("b")
    compressor = Compressor(recipe.compressor)
    if given.compressor is not None:
        compressor.load_state_dict(given.compressor.state_dict())
    elif run.is_new("b"):
        fill_compressor(recipe, compressor)
    kind = decoder_kind(recipe.decoder)
    # Initial weights are drawn in this order.
    decoder, previewer = kind.network(recipe.decoder), Previewer(recipe.previewer)
    for network, initial in ((decoder, given.decoder), (previewer, given.previewer)):
        if initial is not None:
            network.load_state_dict(initial.state_dict())
    text = run.parts.text_encoder_of_decoder()
    vqgan.to(run.device)
    if text is not None and recipe.decoder.clip_embd is not None:
        text.to(run.device)
    multiple = sides_multiple(recipe)
    phases = [named for named in _phases(recipe) if recipe.selects(named.name)]
    compares = any(_of_phase(config, named.phase).feature_weight > 0 for named in phases)
    perceptual = perceptual_network(run.device) if compares and run.makes_updates else None
    for named in phases:
        of_phase = _of_phase(config, named.phase)
        model = Cascade(
            settings=cascade_settings(recipe, PUBLISHED_STATISTICS),
            vqgan=vqgan,
            decoder=decoder,
            compressor=compressor,
            previewer=previewer,
            text_encoder=text,
        )
        if not named.phase.decoder_only:
            for network in (decoder, compressor, previewer):
                network.requires_grad_(True)
            compressor.freeze_early_layers(config.frozen_stride)
            stage: Stage = kind.with_compressor(of_phase, recipe, model, named, perceptual)
            averages = run.train_phase(stage, named.phase, multiple=multiple)
            both = averages(
                DecoderAndCompressor(kind.network(recipe.decoder), Compressor(recipe.compressor)),
                "decoder_and_compressor",
            )
            decoder, compressor = both.decoder, both.compressor
        else:
            compressor.to(run.device)  # frozen here, so the loop does not move it
            for network in (decoder, previewer):
                network.requires_grad_(True)
            stage = kind.refinement(of_phase, recipe, model, named, perceptual)
            averages = run.train_phase(stage, named.phase, multiple=multiple)
            decoder = averages(kind.network(recipe.decoder), "decoder")
        previewer = averages(Previewer(recipe.previewer), "previewer")
    run.parts.decoder, run.parts.compressor, run.parts.previewer = decoder, compressor, previewer


def check(run: Run) -> None:
    """Reads the compressor's weights once before anything is trained, because Stage B may start hours
    later."""
    if run.start.parts.compressor is None and run.is_new("b"):
        fill_compressor(run.recipe, Compressor(run.recipe.compressor))


DECODER_STAGE = StageKind(
    name="decoder",
    short="b",
    config="stage_b",
    changeable=frozenset(
        {
            "loss_weight",
            "label_smoothing",
            "time_shift",
            "time_density",
            "map_dropout",
            "map_noise",
            "caption_dropout",
            "previewer_rate",
            "previewer_weight",
            "feature_weight",
            "feature_fraction",
            "refine_images",
            "refine_rate",
            "refine_shift",
            "refine_feature_weight",
            "max_ratio",
        }
    ),
    makes=_MAKES,
    optional=("previewer",),
    builds_on=("vqgan",),
    needs_images="Stage B trains the compressor that makes them",
    phases=_phases,
    train=train,
    check=check,
)

"""Training of a student of Stage B, which samples in one or a few steps.

The student learns to jump from noise to the latents of an image, given the semantic latents of this image.
The distance of the latents alone would make it predict the mean of all images with these semantic latents,
which is blurred. So its jumps are decoded by the frozen Stage A and compared to the image in the features of
a network, and optionally by a discriminator.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from wuerstchen.device import to_device
from wuerstchen.diffusion.schedule import few_timesteps
from wuerstchen.errors import UserError
from wuerstchen.images import to_images
from wuerstchen.models.cascade import Cascade
from wuerstchen.models.compressor import compressor_input
from wuerstchen.models.decoder import Decoder, DecoderContext
from wuerstchen.models.efficientnet import EfficientNetLite
from wuerstchen.models.vqgan import Discriminator
from wuerstchen.pipeline import Wuerstchen
from wuerstchen.sampling import Sampling
from wuerstchen.train.config import Phase, Recipe, StageFewBConfig
from wuerstchen.train.feed.images import Batch, pixels_of
from wuerstchen.train.feed.random import ImageRandom
from wuerstchen.train.stages.base import (
    Inputs,
    Losses,
    NamedPhase,
    Run,
    StageKind,
    encoded_captions,
    full_precision,
    in_chunks,
    sides_multiple,
)
from wuerstchen.train.stages.decoding import augmented
from wuerstchen.train.stages.few import pseudo_huber
from wuerstchen.train.stages.perceptual import PerceptualLoss, perceptual_network
from wuerstchen.train.stages.vqgan import random_crops

_VALIDATION_SEED = 0  # not the recipe's, so that runs with different seeds can be compared


class StageFewDecoder:
    """Trains the student on images, their latents and their semantic latents."""

    averaged = ("decoder_student",)

    def __init__(
        self,
        config: StageFewBConfig,
        recipe: Recipe,
        model: Cascade,
        student: Decoder,
        perceptual: EfficientNetLite | None = None,
        *,
        device: torch.device | None = None,
    ) -> None:
        """The networks of the ``model`` are frozen. Those that updates need are moved to the ``device``, if
        it is given. Updates with a ``feature_weight`` need the ``perceptual`` network."""
        assert model.compressor is not None
        self.name = "few_b"
        self.config = config
        self.recipe = recipe
        self.optimization = config.optimization
        self.frozen = dataclasses.replace(model, decoder_student=None)
        self.objective = model.settings.decoder_objective
        self.vqgan = model.vqgan.eval().requires_grad_(False)
        self.compressor = model.compressor.eval().requires_grad_(False)
        self.text_encoder = model.text_encoder_of_decoder()
        self.captions = self.text_encoder is not None
        self.perceptual = None if perceptual is None else PerceptualLoss(perceptual)
        self.student = student
        self.networks: dict[str, nn.Module] = {"decoder_student": student}
        self.discriminator: Discriminator | None = None
        if config.adversarial_weight > 0:
            width, depth = config.discriminator_width, config.discriminator_depth
            self.discriminator = Discriminator(self.vqgan.config.in_channels, width, depth)
            self.networks["discriminator"] = self.discriminator
        self.reads_images = config.feature_weight + config.adversarial_weight > 0
        self.rates: dict[str, float] = {}
        self.rate_scales: dict[str, float] = {}
        self.preview_labels = {"rows": ["original", "Stage A only", "student and Stage A", "Stages B and A"]}
        self.times = [min(t, self.objective.highest_jump) for t in few_timesteps(config.steps)]
        times = torch.tensor(self.times[:-1], dtype=torch.float32, device="cpu")
        self._times = times if device is None else to_device(times, device)
        if device is not None:
            for network in filter(None, (self.vqgan, self.compressor, self.text_encoder)):
                network.to(device)

    def prepare(self, batch: Batch, device: torch.device) -> Inputs:
        with full_precision(device):
            found = in_chunks(self._frozen, batch.images.to(device))
        if self.text_encoder is not None:
            found |= encoded_captions(self.text_encoder, batch.captions, self.recipe)
        return {**found, "number": batch.indices.to(device)}

    def _frozen(self, pixels: Float[Tensor, "b 3 h w"]) -> Inputs:
        z = self.compressor(compressor_input(pixels, self.recipe.view_scale)).float()
        return {"latents": self.vqgan.encode(pixels).float(), "z": z}

    def losses(self, inputs: Inputs, random: ImageRandom) -> Losses:
        config, latents, student = self.config, inputs["latents"], self.student
        context = self._context(student, augmented(inputs["z"], random, config), inputs)
        noise = random.normal("noise", latents.shape[1:])
        x, t = noise, self._times[0].expand(len(latents))
        if config.steps > 1:
            x, t = self._starts(context, latents, noise, random)
        clean = self._jump(student, x, t, context)
        distance = (pseudo_huber(clean, latents) / math.sqrt(latents[0].numel())).mean()
        total, terms = config.latent_weight * distance, {"latents": distance}
        if not self.reads_images:
            yield "decoder_student", total, terms
            return
        drawn, pixels = self._decoded(clean, inputs["images"], random)
        if config.feature_weight:
            assert self.perceptual is not None
            terms["features"] = self.perceptual.of_each(drawn, pixels).mean()
            total = total + config.feature_weight * terms["features"]
        if self.discriminator is None:
            yield "decoder_student", total, terms
            return
        verdicts = -self.discriminator(drawn).float().flatten(1).mean(1)
        listens = (random.indices[: len(verdicts)] >= config.adversarial_from).float()
        terms["adversarial"] = verdicts.mean()
        yield "decoder_student", total + config.adversarial_weight * (listens * verdicts).mean(), terms
        # Hinge loss, as in Stage A.
        real = F.relu(1 - self.discriminator(pixels).float()).mean()
        fake = F.relu(1 + self.discriminator(drawn.detach()).float()).mean()
        yield "discriminator", real + fake, {"discriminator": real + fake}

    def _context(self, student: Decoder, z: Tensor, inputs: Inputs) -> DecoderContext:
        height, width = inputs["latents"].shape[2:]
        states, mask = inputs.get("states"), inputs.get("mask")
        return student.context(z, (int(height), int(width)), states, mask, cache_kv=False)

    def _jump(self, student: Decoder, x: Tensor, t: Tensor, context: DecoderContext) -> Tensor:
        """The student's x̂₀, in fp32."""
        return self.objective.to_clean(student(x, t, context).float(), x, t)

    def _starts(
        self, context: DecoderContext, latents: Tensor, noise: Tensor, random: ImageRandom
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, " b"]]:
        """What the student jumps from, and the times: pure noise, or noised latents of the image or of the
        student's own first estimate."""
        config, first = self.config, self._times[0].expand(len(latents))
        with torch.no_grad():
            estimate = self._jump(self.student, noise, first, context)
        u, later = random.uniform("step"), config.steps - 1
        place = 1 + ((u - config.pure_noise) / (1 - config.pure_noise) * later).long().clamp(max=later - 1)
        is_first = u < config.pure_noise
        t = self._times[torch.where(is_first, 0, place)]
        own = random.uniform("own") < config.own_estimates
        base = torch.where(own[:, None, None, None], estimate, latents)
        noised = self.objective.noised(base, random.normal("later noise", latents.shape[1:]), t)
        return torch.where(is_first[:, None, None, None], noise, noised), t

    def _decoded(
        self, clean: Float[Tensor, "b c h w"], images: UInt8[Tensor, "b h4 w4 3"], random: ImageRandom
    ) -> tuple[Float[Tensor, "b2 3 s s2"], Float[Tensor, "b2 3 s s2"]]:
        """The first part of the jumps in pixels, and the same squares of the images."""
        crop, factor = self.config.crop, self.vqgan.config.factor
        rows = math.ceil(len(clean) * self.config.feature_fraction)
        if crop is not None and min(images.shape[1:3]) > crop:
            images = random_crops(images, crop, random, grid=factor)
            clean = random_crops(clean.permute(0, 2, 3, 1), crop // factor, random).permute(0, 3, 1, 2)
        return self.vqgan.decode(clean[:rows]).float(), pixels_of(images[:rows])

    def endpoint_errors(
        self, averages: dict[str, nn.Module], inputs: Inputs, k: int
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """For each image after ``k + 1`` steps of sampling with the averaged weights, without augmentation:
        the mean squared error of the latents, and ``latent_weight`` times their distance."""
        student, latents = averages["decoder_student"], inputs["latents"]
        assert isinstance(student, Decoder)
        random = ImageRandom(_VALIDATION_SEED, inputs["number"])
        context = self._context(student, inputs["z"], inputs)
        clean = latents
        for step in range(k + 1):
            t = self._times[step].expand(len(latents))
            noise = random.normal(f"validation {step}", latents.shape[1:])
            x = noise if step == 0 else self.objective.noised(clean, noise, t)
            clean = self._jump(student, x, t, context)
        distances = pseudo_huber(clean, latents) / math.sqrt(latents[0].numel())
        return (clean - latents).square().flatten(1).mean(1), self.config.latent_weight * distances

    def check(self, values: dict[str, float]) -> None:
        pass

    def preview(
        self,
        averages: dict[str, nn.Module],
        pixels: Tensor,
        device: torch.device,
        *,
        low_memory: bool = False,
    ) -> list[Image.Image]:
        """Originals, then reconstructions by Stage A, by the student, and by Stage B."""
        student = averages["decoder_student"]
        assert isinstance(student, Decoder)
        frozen = self.frozen
        cascade = Cascade(
            settings=frozen.settings,
            vqgan=self.vqgan,
            decoder=frozen.decoder,
            decoder_student=student,
            compressor=self.compressor,
            text_encoder=self.text_encoder,
        )
        originals, parts = to_images(pixels), pixels.split(1 if low_memory else len(pixels))
        stage_a = [self.vqgan.decode(self.vqgan.encode(part)).clamp(0, 1).float() for part in parts]
        # The full decoder is needed here only, so it does not stay on the device.
        mode = "layer" if low_memory else None if device.type == "cpu" else "stage"
        model = Wuerstchen(cascade, device, low_memory=mode)
        rows = [originals, [image for part in stage_a for image in to_images(part)]]
        try:
            for sampling in (Sampling(), Sampling(full=True)):
                done = (model.reconstruct(i, size=i.width, sampling=sampling) for i in originals)
                rows.append([reconstruction.image for reconstruction in done])
        finally:
            model.residence.release()
        return [image for row in rows for image in row]


def _phases(recipe: Recipe) -> list[NamedPhase]:
    config = recipe.stage_few_b
    phase = Phase(optimization=config.optimization, image_size=config.image_size)
    makes = FEW_DECODER_STAGE.makes
    return [NamedPhase(name="few_b", phase=phase, config="stage_few_b", path="stage_few_b", trains=makes)]


def train(run: Run) -> None:
    """Trains the student, from the weights of the decoder or of a student that the run starts from."""
    recipe, parts = run.recipe, run.parts
    (named,) = _phases(recipe)
    begun = parts.decoder_student or parts.decoder
    assert isinstance(begun, Decoder)
    config = dataclasses.replace(begun.config, dropout=0.0)
    run.seed_weights("few_b")
    student = Decoder(config)
    student.load_state_dict(begun.state_dict())
    parts.decoder_student = None
    model = parts.cascade(run.settings_of_model(named.phase.image_size))
    compares = recipe.stage_few_b.feature_weight > 0 and run.makes_updates
    perceptual = perceptual_network(run.device) if compares else None
    stage = StageFewDecoder(recipe.stage_few_b, recipe, model, student, perceptual, device=run.device)
    averages = run.train_phase(stage, named.phase, multiple=sides_multiple(recipe))
    parts.decoder_student = averages(Decoder(config), "decoder_student")


def check(run: Run) -> None:
    """Raises ``UserError`` for a decoder of tokens, and for crops that do not fit its latents."""
    recipe, crop = run.recipe, run.recipe.stage_few_b.crop
    if run.parts.decoder is not None and not isinstance(run.parts.decoder, Decoder):
        raise UserError(
            "stages must not have few_b for a decoder of tokens (v1), got few_b. Students of Stage B need a "
            "decoder of latents (v2)."
        )
    if crop is not None and crop % recipe.vqgan.factor:
        raise UserError(
            f"stage_few_b.crop must be a multiple of {recipe.vqgan.factor}, the factor of Stage A, got "
            f"{crop}. 128 is common."
        )


FEW_DECODER_STAGE = StageKind(
    name="decoder_student",
    short="few_b",
    config="stage_few_b",
    changeable=frozenset(
        {
            *("pure_noise", "own_estimates", "map_noise", "map_dropout", "feature_fraction"),
            *("latent_weight", "adversarial_from"),
        }
    ),
    makes=("decoder_student",),
    optional=("decoder_student",),
    builds_on=("decoder",),
    needs_images="the student of Stage B learns from pixels",
    phases=_phases,
    train=train,
    check=check,
)

"""Training of Stage A: the VQGAN against its discriminator, then a refinement of its decoder alone."""

import copy
import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from PIL import Image
from torch import Tensor, nn

from wuerstchen.images import to_images
from wuerstchen.models.cascade import Cascade
from wuerstchen.models.compressor import compressor_input
from wuerstchen.models.decoder import Decoder
from wuerstchen.models.efficientnet import EfficientNetLite
from wuerstchen.models.text import TextEncoder
from wuerstchen.models.vqgan import VQGAN, Discriminator
from wuerstchen.train.config import Phase, Recipe, StageAConfig, refining
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
from wuerstchen.train.stages.perceptual import PerceptualLoss, perceptual_network


def random_crops(
    images: Shaped[Tensor, "b h w c"], side: int, random: ImageRandom, grid: int = 1
) -> Shaped[Tensor, "b side side c"]:
    """A random square of each image, with corners at multiples of ``grid``.

    Positions are the same at every scale: crops of 32 out of 64 latents match crops of 128 out of 256 pixels
    on a grid of 4.
    """
    height, width = images.shape[1:3]
    places = random.uniform("crop", (2,))
    steps = torch.arange(side, device=images.device)
    rows = (places[:, :1] * ((height - side) // grid + 1)).long() * grid + steps
    columns = (places[:, 1:] * ((width - side) // grid + 1)).long() * grid + steps
    numbers = torch.arange(len(images), device=images.device)[:, None, None]
    return images[numbers, rows[:, :, None], columns[:, None, :]]


def codes_used(indices: Int[Tensor, "b h w"], codes: int) -> Float[Tensor, ""]:
    """How many of the ``codes`` a batch uses. Only a few mean that the codebook has collapsed."""
    used = torch.zeros(codes, dtype=torch.float32, device=indices.device)
    return used.scatter_(0, indices.flatten(), 1.0).sum()


class _Reconstructing:
    """What both phases of Stage A share: the losses of a reconstruction."""

    captions = False
    reads_images = True

    def __init__(self, config: StageAConfig, vqgan: VQGAN, perceptual: EfficientNetLite | None) -> None:
        self.config = config
        self.vqgan = vqgan
        self.networks: dict[str, nn.Module] = {}
        self.rates: dict[str, float] = {}
        self.rate_scales: dict[str, float] = {}
        self.preview_labels = {"rows": ["original", "Stage A, unquantised", "Stage A"]}
        self.perceptual = None if perceptual is None else PerceptualLoss(perceptual)
        self.discriminator: Discriminator | None = None
        if config.adversarial_weight > 0:
            width, depth = config.discriminator_width, config.discriminator_depth
            self.discriminator = Discriminator(vqgan.config.in_channels, width, depth)
            self.networks["discriminator"] = self.discriminator

    def image_losses(
        self,
        network: str,
        output: Float[Tensor, "b c h w"],
        pixels: Float[Tensor, "b c h w"],
        further: dict[str, Tensor],
        random: ImageRandom,
    ) -> Losses:
        """Yields the loss of ``network``, which made ``output``, with ``further`` terms, and the
        discriminator's."""
        config, output = self.config, output.float()
        squared, absolute = F.mse_loss(output, pixels), F.l1_loss(output, pixels)
        terms = {"reconstruction": squared + config.l1_weight * absolute, **further}
        total = torch.stack(list(terms.values())).sum()
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(output, pixels)
            total = total + config.perceptual_weight * terms["perceptual"]
        if self.discriminator is not None:
            verdicts = -self.discriminator(output).float().flatten(1).mean(1)
            listens = (random.indices >= config.adversarial_from).float()
            terms["adversarial"] = verdicts.mean()
            total = total + config.adversarial_weight * (listens * verdicts).mean()
        yield network, total, terms
        if self.discriminator is not None:
            # Hinge loss (arXiv 1705.02894): images that are already told apart clearly give no gradient.
            real = F.relu(1 - self.discriminator(pixels).float()).mean()
            fake = F.relu(1 + self.discriminator(output.detach()).float()).mean()
            yield "discriminator", real + fake, {"discriminator": real + fake}

    def check(self, values: dict[str, float]) -> None:
        pass

    def reconstructions(self, vqgan: nn.Module, pixels: Tensor, one_by_one: bool) -> list[Image.Image]:
        """Originals, then reconstructions without and with quantisation."""
        parts = pixels.split(1 if one_by_one else len(pixels))
        rows = [parts, *([vqgan(part, quantise=q)[0].clamp(0, 1) for part in parts] for q in (False, True))]
        return [image for row in rows for part in row for image in to_images(part.float())]


class StageA(_Reconstructing):
    """Trains the VQGAN against its discriminator."""

    name = "a"
    averaged = ("vqgan",)

    def __init__(
        self,
        config: StageAConfig,
        vqgan: VQGAN,
        perceptual: EfficientNetLite | None,
        *,
        keeps_codes: bool = False,
    ) -> None:
        """``keeps_codes`` says that the codebook is already trained and is not initialised again."""
        super().__init__(config, vqgan, perceptual)
        self.optimization = config.optimization
        self.networks = {"vqgan": vqgan, **self.networks}
        if config.codebook_init == "normal" and not keeps_codes:
            nn.init.normal_(vqgan.vquantizer.embedding.weight)

    def prepare(self, batch: Batch, device: torch.device) -> Inputs:
        return {}

    def losses(self, inputs: Inputs, random: ImageRandom) -> Losses:
        config, images = self.config, inputs["images"]
        if config.crop is not None:
            images = random_crops(images, config.crop, random)
        pixels = pixels_of(images)
        quantise = random.uniform("quantise") >= config.quantise_dropout
        output, quantised = self.vqgan(pixels, quantise=quantise)
        used = codes_used(quantised.indices, self.vqgan.config.num_vq_embeddings)
        further = {"quantiser": quantised.loss}
        for network, loss, terms in self.image_losses("vqgan", output, pixels, further, random):
            yield network, loss, terms | ({"codes_used": used} if network == "vqgan" else {})

    def preview(
        self,
        averages: dict[str, nn.Module],
        pixels: Tensor,
        device: torch.device,
        *,
        low_memory: bool = False,
    ) -> list[Image.Image]:
        """Originals, then reconstructions without and with quantisation."""
        return self.reconstructions(averages["vqgan"], pixels, low_memory)


_RESAMPLED_AT = (0.5, 0.35, 0.2, 0.08)  # times at which latents are noised and denoised by Stage B


class StageARefinement(_Reconstructing):
    """The second phase of Stage A, after Stage B: trains only the way from latents to pixels.

    The latents do not change, so Stages B and C stay valid. A fraction of them is noised and denoised by
    Stage B, so that the decoder does not amplify Stage B's small errors at edges.
    """

    name = "a2"
    averaged = ("decoder_half",)

    def __init__(
        self,
        config: StageAConfig,
        vqgan: VQGAN,
        perceptual: EfficientNetLite | None,
        stage_b: Cascade,
        text_encoder: TextEncoder | None,
        recipe: Recipe,
    ) -> None:
        super().__init__(config, vqgan.eval().requires_grad_(False), perceptual)
        assert stage_b.compressor is not None
        self.optimization = refining(config)
        self.recipe = recipe
        self.decoder = stage_b.decoder.eval().requires_grad_(False)
        self.objective = stage_b.settings.decoder_objective
        self.compressor = stage_b.compressor.eval().requires_grad_(False)
        self.text_encoder = text_encoder if stage_b.decoder.config.clip_embd is not None else None
        self.captions = self.text_encoder is not None
        decoder_half = vqgan.decoder_half().requires_grad_(True)
        self.networks = {"decoder_half": decoder_half, **self.networks}

    def prepare(self, batch: Batch, device: torch.device) -> Inputs:
        with full_precision(device):
            frozen = in_chunks(self._frozen, batch.images.to(device))
        latents, z = frozen["latents"], frozen["z"]
        states = mask = None
        if self.text_encoder is not None:
            text = encoded_captions(self.text_encoder, batch.captions, self.recipe)
            states, mask = text["states"], text.get("mask")
        context = self.decoder.context(z, tuple(latents.shape[2:]), states, mask)
        random = ImageRandom(0, batch.indices.to(device))
        redrawn = latents
        for t in _RESAMPLED_AT:
            times = torch.full((len(latents),), t, dtype=torch.float32, device=device)
            noise = random.normal(f"noise at {t}", latents.shape[1:])
            x = self.objective.noised(redrawn, noise, times)
            redrawn = self.objective.to_clean(self.decoder(x, times, context).float(), x, times)
        return {"latents": latents, "redrawn": redrawn}

    def _frozen(self, pixels: Float[Tensor, "b 3 h w"]) -> Inputs:
        z = self.compressor(compressor_input(pixels, self.recipe.view_scale)).float()
        return {"latents": self.vqgan.encode(pixels).float(), "z": z}

    def losses(self, inputs: Inputs, random: ImageRandom) -> Losses:
        config, factor = self.config, self.vqgan.config.factor
        images, latents = inputs["images"], inputs["latents"]
        redrawn = random.uniform("redrawn") < config.refine_redrawn
        quantise = (random.uniform("quantise") >= config.quantise_dropout) & ~redrawn
        z = torch.where(redrawn[:, None, None, None], inputs["redrawn"], latents)
        if config.crop is not None:
            images = random_crops(images, config.crop, random, grid=factor)
            z = random_crops(z.permute(0, 2, 3, 1), config.crop // factor, random).permute(0, 3, 1, 2)
        z = z * self.vqgan.config.scale_factor
        with torch.no_grad():
            codes = self.vqgan.vquantizer(z).latents
        output = self.vqgan.unembed(torch.where(quantise[:, None, None, None], codes, z))
        yield from self.image_losses("decoder_half", output, pixels_of(images), {}, random)

    def preview(
        self,
        averages: dict[str, nn.Module],
        pixels: Tensor,
        device: torch.device,
        *,
        low_memory: bool = False,
    ) -> list[Image.Image]:
        """Originals, then reconstructions without and with quantisation."""
        refined = VQGAN(self.vqgan.config).to(device).eval()
        refined.load_state_dict(self.vqgan.state_dict())
        refined.decoder_half().load_state_dict(averages["decoder_half"].state_dict())
        return self.reconstructions(refined, pixels, low_memory)


def _phase(recipe: Recipe) -> list[NamedPhase]:
    config = recipe.stage_a
    phase = Phase(optimization=config.optimization, image_size=config.image_size)
    return [NamedPhase(name="a", phase=phase, config="stage_a", path="stage_a", trains=("vqgan",))]


def _refinement(recipe: Recipe) -> list[NamedPhase]:
    config = recipe.stage_a
    if not config.refine_images:
        return []
    phase = Phase(optimization=refining(config), image_size=config.image_size)
    made = ("vqgan",)
    return [NamedPhase(name="a2", phase=phase, config="stage_a", path="", trains=made, keeps_inputs=True)]


def train(run: Run) -> None:
    """Trains Stage A, and measures the scale of its latents."""
    recipe, config, initial = run.recipe, run.recipe.stage_a, run.start.parts.vqgan
    run.seed_weights("a")
    network = VQGAN(recipe.vqgan)
    if initial is not None:
        network = copy.deepcopy(initial).requires_grad_(True)
    shape = network.config
    (named,) = _phase(recipe)
    averages = run.train_phase(
        StageA(config, network, _perceptual(run), keeps_codes=initial is not None),
        named.phase,
        multiple=sides_multiple(recipe),
    )
    # Into a new network: the trained one may be compiled.
    trained = averages(VQGAN(shape), "vqgan")
    if config.measure_scale:
        trained.config = dataclasses.replace(trained.config, scale_factor=_latent_scale(run, trained))
    run.parts.vqgan = trained


def _perceptual(run: Run) -> EfficientNetLite | None:
    """The network of Stage A's perceptual loss."""
    if run.recipe.stage_a.perceptual == "none" or not run.makes_updates:
        return None
    return perceptual_network(run.device)


def _latent_scale(run: Run, vqgan: VQGAN) -> float:
    """The standard deviation of the latents, measured once. It becomes their scale factor."""

    def measure() -> dict[str, Any]:
        size = run.recipe.stage_a.image_size or run.recipe.image_size
        z = torch.cat([vqgan.embed(b.pixels(run.device)) for b in run.some_images("latents", size)])
        return {"scale_factor": round(float(z.cpu().double().std()), 6)}

    known = {"scale_factor": vqgan.config.scale_factor}
    return run.measured_once("stage_a", measure, known)["scale_factor"]


def train_refinement(run: Run) -> None:
    """Trains the second phase of Stage A."""
    recipe, config, vqgan, parts = run.recipe, run.recipe.stage_a, run.parts.vqgan, run.parts
    assert vqgan is not None
    assert isinstance(parts.decoder, Decoder)  # v2's: recipes of v1 have no such phase
    run.seed_weights("a2")
    frozen = Cascade(
        settings=run.settings_of_model(),  # with the objective of a Stage B from the start
        vqgan=vqgan,
        decoder=parts.decoder,
        compressor=parts.compressor,
    )
    text = parts.text_encoder_of_decoder()
    for network in filter(None, (vqgan, parts.decoder, parts.compressor)):
        network.to(run.device)
    if text is not None and parts.decoder.config.clip_embd is not None:
        text.to(run.device)
    stage = StageARefinement(config, vqgan, _perceptual(run), frozen, text, recipe)
    (named,) = _refinement(recipe)
    averages = run.train_phase(stage, named.phase, multiple=sides_multiple(recipe))
    # Into a new network: the trained one may be compiled.
    refined = VQGAN(vqgan.config)
    refined.load_state_dict(vqgan.state_dict())
    averages(refined.decoder_half(), "decoder_half")
    parts.vqgan = refined.to(run.device).eval().requires_grad_(False)


VQGAN_STAGE = StageKind(
    name="vqgan",
    short="a",
    config="stage_a",
    changeable=frozenset({"l1_weight", "perceptual_weight", "adversarial_from", "quantise_dropout"}),
    makes=("vqgan",),
    needs_images="Stage A learns from pixels",
    phases=_phase,
    train=train,
)
VQGAN_REFINEMENT = StageKind(
    name="vqgan_refinement",
    short="a",
    config="stage_a",
    changeable=frozenset({"refine_images", "refine_rate", "refine_redrawn"}),
    makes=("vqgan",),
    builds_on=("vqgan", "decoder"),
    refines=True,
    needs_images="Stage A learns from pixels",
    phases=_refinement,
    train=train_refinement,
)

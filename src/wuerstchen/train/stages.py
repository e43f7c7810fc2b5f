"""The three stages as training sees them: a batch in, losses out. The loop around them is one, in loop.py.

A stage works in two steps. ``prepare`` is what does not change while it trains: what frozen networks make of
a picture and of its caption. ``losses`` is the rest: it yields ``(network, loss, terms)`` for each batch, and
the loop makes one update of that network from each loss before it asks for the next. ``losses`` decides
nothing on the host, so that an update can be recorded once and replayed.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from PIL import Image
from torch import Tensor, nn

from wuerstchen.diffusion.schedule import PUBLISHED_SCHEDULE, Weighting, training_timesteps
from wuerstchen.errors import UserError
from wuerstchen.images import to_images
from wuerstchen.models.cascade import PUBLISHED_MAP, Cascade, CascadeSettings, MapStatistics
from wuerstchen.models.compressor import Compressor, compressor_input
from wuerstchen.models.decoder import Decoder
from wuerstchen.models.efficientnet import EfficientNetLite
from wuerstchen.models.previewer import Previewer
from wuerstchen.models.prior import Prior
from wuerstchen.models.text import TextEncoder, TextStates
from wuerstchen.models.vqgan import VQGAN, Discriminator
from wuerstchen.pipeline import Wuerstchen
from wuerstchen.train.config import Optimization, Recipe, StageAConfig, StageBConfig, StageCConfig
from wuerstchen.train.feed import Batch, pixels_of
from wuerstchen.train.random import ImageRandom

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

    def prepare(self, batch: Batch, device: torch.device) -> Inputs:
        """What frozen networks make of a batch. Called without gradients, once a picture if it is kept."""
        ...

    def losses(self, inputs: Inputs, random: ImageRandom) -> Losses:
        """One loss for each update that this batch makes."""
        ...

    def check(self, values: dict[str, float]) -> None:
        """Raises ``UserError`` where the values of an update show that going on is in vain."""
        ...

    def preview(
        self, averages: dict[str, nn.Module], pixels: Tensor, device: torch.device
    ) -> list[Image.Image]:
        """Pictures of the state of training, drawn with the averaged weights."""
        ...


def _refining(config: StageAConfig | StageBConfig | StageCConfig) -> Optimization:
    """How the second phase of a stage learns."""
    return dataclasses.replace(
        config.optimization, images=config.refine_images, learning_rate=config.refine_rate
    )


def diffusion_loss(
    predicted: Float[Tensor, "b c h w"],
    noise: Float[Tensor, "b c h w"],
    t: Float[Tensor, " b"],
    weighting: Weighting,
) -> Float[Tensor, ""]:
    """Mean over pictures of w(t) · ‖ε̂ − ε‖² / n, with w by ``CosineSchedule.loss_weight``."""
    errors = (predicted.float() - noise).square().flatten(1).mean(1)
    return (errors * PUBLISHED_SCHEDULE.loss_weight(t, weighting)).mean()


# --- Stage A ---


class PerceptualLoss(nn.Module):
    """Distance of two pictures in the features of an image network, in the manner of arXiv 1801.03924.

    At each resolution the features are scaled to unit length a position and compared by squared distance.
    """

    def __init__(self, network: EfficientNetLite) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)

    def forward(self, x: Float[Tensor, "b 3 h w"], y: Float[Tensor, "b 3 h w"]) -> Float[Tensor, ""]:
        with torch.no_grad():
            targets = self.network.feature_maps(y)
        pairs = zip(self.network.feature_maps(x), targets, strict=True)
        distances = [
            (F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)).square().sum(1).mean()
            for a, b in pairs
        ]
        return torch.stack(distances).mean()


def random_crops(
    images: Shaped[Tensor, "b h w c"], side: int, random: ImageRandom, grid: int = 1
) -> Shaped[Tensor, "b side side c"]:
    """A square of each picture, at a place of its own whose coordinates are multiples of ``grid``.

    The places are the same at every scale: crops of 32 out of 64 latents are those of 128 out of 256 pixels
    on a grid of 4.
    """
    height, width = images.shape[1:3]
    places = random.uniform("crop", (2,))
    steps = torch.arange(side, device=images.device)
    rows = (places[:, :1] * ((height - side) // grid + 1)).long() * grid + steps
    columns = (places[:, 1:] * ((width - side) // grid + 1)).long() * grid + steps
    pictures = torch.arange(len(images), device=images.device)[:, None, None]
    return images[pictures, rows[:, :, None], columns[:, None, :]]


class _Pictures:
    """What both phases of Stage A share: the losses of a picture against its original."""

    captions = False
    reads_images = True

    def __init__(self, config: StageAConfig, vqgan: VQGAN, perceptual: EfficientNetLite | None) -> None:
        self.config = config
        self.vqgan = vqgan
        self.networks: dict[str, nn.Module] = {}
        self.rates: dict[str, float] = {}
        self.rate_scales: dict[str, float] = {}
        self.perceptual = None if perceptual is None else PerceptualLoss(perceptual)
        self.discriminator: Discriminator | None = None
        if config.adversarial_weight > 0:
            width, depth = config.discriminator_width, config.discriminator_depth
            self.discriminator = Discriminator(vqgan.config.in_channels, width, depth)
            self.networks["discriminator"] = self.discriminator

    def picture_losses(
        self,
        network: str,
        output: Float[Tensor, "b c h w"],
        pixels: Float[Tensor, "b c h w"],
        further: dict[str, Tensor],
        random: ImageRandom,
    ) -> Losses:
        """The loss of ``network``, which drew ``output``, with ``further`` terms, and the discriminator's."""
        config, output = self.config, output.float()
        squared, absolute = F.mse_loss(output, pixels), F.l1_loss(output, pixels)
        terms = {"reconstruction": squared + config.l1_weight * absolute, **further}
        total = torch.stack(list(terms.values())).sum()
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(output, pixels)
            total = total + config.perceptual_weight * terms["perceptual"]
        if self.discriminator is not None:
            terms["adversarial"] = -self.discriminator(output).float().mean()
            listens = (random.indices[0] >= config.adversarial_from).float()
            total = total + config.adversarial_weight * listens * terms["adversarial"]
        yield network, total, terms
        if self.discriminator is not None:
            # Hinge loss (arXiv 1705.02894): only what is not yet told apart clearly teaches anything.
            real = F.relu(1 - self.discriminator(pixels).float()).mean()
            fake = F.relu(1 + self.discriminator(output.detach()).float()).mean()
            yield "discriminator", real + fake, {"discriminator": real + fake}

    def check(self, values: dict[str, float]) -> None:
        pass

    def pictures(self, vqgan: nn.Module, pixels: Tensor) -> list[Image.Image]:
        """Originals, then unquantised and quantised reconstructions."""
        rows = [pixels, *(vqgan(pixels, quantise=q)[0].clamp(0, 1) for q in (False, True))]
        return [image for row in rows for image in to_images(row.float())]


class StageA(_Pictures):
    """The VQGAN against its discriminator."""

    name = "a"
    averaged = ("vqgan",)

    def __init__(self, config: StageAConfig, vqgan: VQGAN, perceptual: EfficientNetLite | None) -> None:
        super().__init__(config, vqgan, perceptual)
        self.optimization = config.optimization
        self.networks = {"vqgan": vqgan, **self.networks}
        if config.codebook_init == "normal":
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
        yield from self.picture_losses("vqgan", output, pixels, {"quantiser": quantised.loss}, random)

    def preview(
        self, averages: dict[str, nn.Module], pixels: Tensor, device: torch.device
    ) -> list[Image.Image]:
        """Originals, then unquantised and quantised reconstructions."""
        return self.pictures(averages["vqgan"], pixels)


_REDRAWN_FROM = (0.5, 0.35, 0.2, 0.08)  # times that Stage B denoises at, each time anew from noise


class StageARefinement(_Pictures):
    """The second phase of Stage A, after Stage B: the way from latents to pixels alone.

    The latents stay as they are, so Stages B and C are not touched. A share of them is what Stage B makes of
    the real ones out of noise, so that its small errors at edges do not come out larger than they are.
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
    ) -> None:
        super().__init__(config, vqgan.eval().requires_grad_(False), perceptual)
        assert stage_b.compressor is not None
        self.optimization = _refining(config)
        self.decoder = stage_b.decoder.eval().requires_grad_(False)
        self.compressor = stage_b.compressor.eval().requires_grad_(False)
        self.text_encoder = text_encoder if stage_b.decoder.config.clip_embd is not None else None
        self.captions = self.text_encoder is not None
        half = vqgan.decoder_half().requires_grad_(True)
        self.networks = {"decoder_half": half, **self.networks}

    def prepare(self, batch: Batch, device: torch.device) -> Inputs:
        pixels = batch.pixels(device)
        latents = self.vqgan.encode(pixels).float()
        states = mask = None
        if self.text_encoder is not None:
            text = self.text_encoder.encode(batch.captions)
            states, mask = text.states, text.mask
        z = self.compressor(compressor_input(pixels))
        context = self.decoder.context(z, tuple(latents.shape[2:]), states, mask)
        random = ImageRandom(0, batch.indices.to(device))
        redrawn = latents
        for t in _REDRAWN_FROM:
            times = torch.full((len(latents),), t, device=device)
            noise = random.normal(f"noise at {t}", latents.shape[1:])
            x = PUBLISHED_SCHEDULE.add_noise(redrawn, noise, times)
            redrawn = PUBLISHED_SCHEDULE.clean(x, self.decoder(x, times, context).float(), times)
        return {"latents": latents, "redrawn": redrawn}

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
        yield from self.picture_losses("decoder_half", output, pixels_of(images), {}, random)

    def preview(
        self, averages: dict[str, nn.Module], pixels: Tensor, device: torch.device
    ) -> list[Image.Image]:
        """Originals, then unquantised and quantised reconstructions."""
        refined = VQGAN(self.vqgan.config).to(device).eval()
        refined.load_state_dict(self.vqgan.state_dict())
        refined.decoder_half().load_state_dict(averages["decoder_half"].state_dict())
        return self.pictures(refined, pixels)


# --- Stage B ---


class DecoderAndCompressor(nn.Module):
    """What Stage B trains as one."""

    def __init__(self, decoder: Decoder, compressor: Compressor) -> None:
        super().__init__()
        self.decoder = decoder
        self.compressor = compressor


class _Decoding:
    """What both phases of Stage B share: the decoder's loss on a map, and the previewer's."""

    captions: bool

    def __init__(
        self, config: StageBConfig, vqgan: VQGAN, text_encoder: TextEncoder | None, recipe: Recipe
    ) -> None:
        self.config = config
        self.recipe = recipe
        self.vqgan = vqgan.eval().requires_grad_(False)
        self.text_encoder = text_encoder if recipe.decoder.clip_embd is not None else None
        self.captions = self.text_encoder is not None
        self.no_text = None if self.text_encoder is None else self.text_encoder.encode([""])
        self.rates = {"previewer": config.previewer_rate}

    def prepare_text(self, batch: Batch, device: torch.device) -> Inputs:
        return {} if self.text_encoder is None else encoded_captions(self.text_encoder, batch.captions)

    def disturb(self, z: Float[Tensor, "b c h w"], random: ImageRandom) -> Float[Tensor, "b c h w"]:
        """Zeroes the map of some pictures and noises that of others, so that B bears with what C draws.

        The noise has the map's own scale: its BatchNorm keeps every channel near unit variance.
        """
        config = self.config
        noised = PUBLISHED_SCHEDULE.add_noise(
            z, random.normal("map noise", z.shape[1:]), random.uniform("map time") / 2
        )
        u = random.uniform("map choice")[:, None, None, None]
        z = torch.where(u >= 1 - config.map_noise * (1 - config.map_dropout), noised, z)
        return torch.where(u < config.map_dropout, 0.0, z)

    def decoder_loss(
        self, decoder: Decoder, z: Float[Tensor, "b c mh mw"], inputs: Inputs, random: ImageRandom
    ) -> Float[Tensor, ""]:
        states = mask = None
        if self.no_text is not None:
            states, mask = with_captions_dropped(self.no_text, inputs, random, self.config.caption_dropout)
        latents = inputs["latents"]
        context = decoder.context(self.disturb(z, random), tuple(latents.shape[2:]), states, mask)
        t = training_timesteps(random.uniform("time"), self.config.time_shift)
        noise = random.normal("noise", latents.shape[1:])
        predicted = decoder(PUBLISHED_SCHEDULE.add_noise(latents, noise, t), t, context)
        return diffusion_loss(predicted, noise, t, self.config.loss_weight)

    def pictures(
        self,
        decoder: Decoder,
        compressor: Compressor,
        previewer: Previewer,
        pixels: Tensor,
        device: torch.device,
    ) -> list[Image.Image]:
        """Originals, Stage A's reconstructions, those of A+B, and the previewer's."""
        cascade = Cascade(
            settings=cascade_settings(self.recipe, PUBLISHED_MAP),
            vqgan=self.vqgan,
            decoder=decoder,
            compressor=compressor,
            text_encoder=self.text_encoder,
        )
        model = Wuerstchen(cascade, device)
        originals = to_images(pixels)
        stage_a = to_images(self.vqgan.decode(self.vqgan.encode(pixels)).clamp(0, 1).float())
        previews = previewer(compressor(compressor_input(pixels))).clamp(0, 1)
        return [
            *originals,
            *stage_a,
            *(model.reconstruct(image).image for image in originals),
            *to_images(F.interpolate(previews, size=pixels.shape[2:], mode="nearest")),
        ]


def previewer_loss(
    previewer: nn.Module, z: Float[Tensor, "b c mh mw"], pixels: Float[Tensor, "b 3 h w"]
) -> Float[Tensor, ""]:
    """Mean squared error against the pictures, shrunk to the size of previews."""
    drawn = previewer(z.detach()).float()
    return F.mse_loss(drawn, F.interpolate(pixels, size=drawn.shape[2:], mode="area"))


class StageB(_Decoding):
    """The latent diffusion decoder and, with it, the semantic compressor."""

    name = "b"
    averaged = ("decoder_and_compressor", "previewer")
    reads_images = True

    def __init__(
        self,
        config: StageBConfig,
        vqgan: VQGAN,
        decoder: Decoder,
        compressor: Compressor,
        previewer: Previewer,
        text_encoder: TextEncoder | None,
        recipe: Recipe,
    ) -> None:
        super().__init__(config, vqgan, text_encoder, recipe)
        self.optimization = config.optimization
        self.trained = DecoderAndCompressor(decoder, compressor)
        self.previewer = previewer
        self.networks: dict[str, nn.Module] = {
            "decoder_and_compressor": self.trained,
            "previewer": previewer,
        }
        self.rate_scales = {"compressor.backbone.": config.backbone_rate}

    def prepare(self, batch: Batch, device: torch.device) -> Inputs:
        latents = self.vqgan.encode(batch.pixels(device)).float()
        return {"latents": latents, **self.prepare_text(batch, device)}

    def losses(self, inputs: Inputs, random: ImageRandom) -> Losses:
        pixels = pixels_of(inputs["images"])
        z = self.trained.compressor(compressor_input(pixels)).float()
        loss = self.decoder_loss(self.trained.decoder, z, inputs, random)
        yield "decoder_and_compressor", loss, {"map_std": z.detach().std()}
        yield "previewer", previewer_loss(self.previewer, z, pixels), {}

    def check(self, values: dict[str, float]) -> None:
        if values["map_std"] < LEAST_SPREAD:
            raise UserError(
                f"the semantic map's deviation fell to {values['map_std']:.3g}, so all pictures look alike "
                "to the compressor; use a lower stage_b.backbone_rate in another --run-dir"
            )

    def preview(
        self, averages: dict[str, nn.Module], pixels: Tensor, device: torch.device
    ) -> list[Image.Image]:
        """Originals, Stage A's reconstructions, those of A+B, and the previewer's."""
        trained, previewer = averages["decoder_and_compressor"], averages["previewer"]
        assert isinstance(trained, DecoderAndCompressor)
        assert isinstance(previewer, Previewer)
        return self.pictures(trained.decoder, trained.compressor, previewer, pixels, device)


class StageBRefinement(_Decoding):
    """The second phase of Stage B: the decoder alone, on the maps of the finished compressor."""

    name = "b2"
    averaged = ("decoder", "previewer")
    reads_images = False

    def __init__(
        self,
        config: StageBConfig,
        vqgan: VQGAN,
        decoder: Decoder,
        compressor: Compressor,
        previewer: Previewer,
        text_encoder: TextEncoder | None,
        recipe: Recipe,
    ) -> None:
        config = dataclasses.replace(config, time_shift=config.refine_shift)
        super().__init__(config, vqgan, text_encoder, recipe)
        self.optimization = _refining(config)
        self.decoder = decoder
        self.compressor = compressor.eval().requires_grad_(False)
        self.previewer = previewer
        self.networks: dict[str, nn.Module] = {"decoder": decoder, "previewer": previewer}
        self.rate_scales: dict[str, float] = {}

    def prepare(self, batch: Batch, device: torch.device) -> Inputs:
        pixels = batch.pixels(device)
        z = self.compressor(compressor_input(pixels)).float()
        return {
            "latents": self.vqgan.encode(pixels).float(),
            "z": z,
            "small": F.interpolate(pixels, size=self.previewer.size(*z.shape[2:]), mode="area"),
            **self.prepare_text(batch, device),
        }

    def losses(self, inputs: Inputs, random: ImageRandom) -> Losses:
        yield "decoder", self.decoder_loss(self.decoder, inputs["z"], inputs, random), {}
        yield "previewer", previewer_loss(self.previewer, inputs["z"], inputs["small"]), {}

    def check(self, values: dict[str, float]) -> None:
        pass

    def preview(
        self, averages: dict[str, nn.Module], pixels: Tensor, device: torch.device
    ) -> list[Image.Image]:
        """Originals, Stage A's reconstructions, those of A+B, and the previewer's."""
        decoder, previewer = averages["decoder"], averages["previewer"]
        assert isinstance(decoder, Decoder)
        assert isinstance(previewer, Previewer)
        return self.pictures(decoder, self.compressor, previewer, pixels, device)


# --- Text ---


def encoded_captions(text_encoder: TextEncoder, captions: list[str]) -> Inputs:
    """The captions as inputs: states of (b, t, d), masks of (b, t)."""
    encoded = text_encoder.encode(captions)
    return {"states": encoded.states.float(), "mask": encoded.mask}


def with_captions_dropped(
    empty: TextStates, inputs: Inputs, random: ImageRandom, share: float
) -> tuple[Float[Tensor, "b t d"], Bool[Tensor, "b t"]]:
    """The captions of ``inputs``, for a ``share`` of the pictures in place of it the states of no text."""
    drop = random.uniform("caption") < share
    states = torch.where(drop[:, None, None], empty.states, inputs["states"])
    return states, torch.where(drop[:, None], empty.mask, inputs["mask"])


# --- Stage C ---


class StageC:
    """The prior, on the frozen compressor's normalised maps. Its second phase is the same by another name."""

    averaged = ("prior",)
    captions = True
    reads_images = False

    def __init__(
        self,
        config: StageCConfig,
        recipe: Recipe,
        prior: Prior,
        frozen: Cascade,
        statistics: MapStatistics,
        *,
        refines: bool = False,
    ) -> None:
        assert frozen.compressor is not None
        assert frozen.text_encoder is not None
        self.name = "c2" if refines else "c"
        self.config = config
        self.recipe = recipe
        self.optimization = _refining(config) if refines else config.optimization
        self.prior = prior
        self.compressor = frozen.compressor.eval().requires_grad_(False)
        self.text_encoder = frozen.text_encoder
        self.no_text = frozen.text_encoder.encode([""])
        self.frozen = frozen
        self.statistics = statistics
        self.networks: dict[str, nn.Module] = {"prior": prior}
        self.rates: dict[str, float] = {}
        self.rate_scales: dict[str, float] = {}

    def prepare(self, batch: Batch, device: torch.device) -> Inputs:
        z = self.compressor(compressor_input(batch.pixels(device))).float()
        return {"x": self.statistics.normalise(z), **encoded_captions(self.text_encoder, batch.captions)}

    def losses(self, inputs: Inputs, random: ImageRandom) -> Losses:
        x = inputs["x"]
        states, mask = with_captions_dropped(self.no_text, inputs, random, self.config.caption_dropout)
        t = training_timesteps(random.uniform("time"), self.config.time_shift)
        noise = random.normal("noise", x.shape[1:])
        context = self.prior.context(states, mask)
        predicted = self.prior(PUBLISHED_SCHEDULE.add_noise(x, noise, t), t, context)
        yield "prior", diffusion_loss(predicted, noise, t, self.config.loss_weight), {}

    def check(self, values: dict[str, float]) -> None:
        pass

    def preview(
        self, averages: dict[str, nn.Module], pixels: Tensor, device: torch.device
    ) -> list[Image.Image]:
        """Pictures of the recipe's prompts, through C, B and A."""
        prior = averages["prior"]
        assert isinstance(prior, Prior)
        cascade = Cascade(
            settings=cascade_settings(self.recipe, self.statistics),
            vqgan=self.frozen.vqgan,
            decoder=self.frozen.decoder,
            compressor=self.frozen.compressor,
            prior=prior,
            text_encoder=self.frozen.text_encoder,
        )
        prompts = list(self.recipe.preview_prompts)
        return Wuerstchen(cascade, device).generate(prompts) if prompts else []


def cascade_settings(recipe: Recipe, statistics: MapStatistics) -> CascadeSettings:
    """The settings of the model that a recipe makes."""
    return CascadeSettings(
        image_size=recipe.image_size,
        # 128 pixels are three positions of the map; the decoder's levels may need more.
        size_multiple=math.lcm(128, recipe.vqgan.factor * recipe.decoder.size_multiple),
        map_statistics=statistics,
        text_mask=True,
        prior_steps=recipe.prior_steps,
        prior_guidance=recipe.prior_guidance,
        decoder_steps=recipe.decoder_steps,
        decoder_guidance=recipe.decoder_guidance,
        decoder_shift=recipe.decoder_shift,
    )


@torch.no_grad()
def measure_map(compressor: Compressor, batches: Iterator[Batch], device: torch.device) -> MapStatistics:
    """Mean and standard deviation of each channel of the map over some pictures."""
    maps = torch.cat([compressor(compressor_input(batch.pixels(device))).float().cpu() for batch in batches])
    columns = maps.double().transpose(0, 1).flatten(1)
    spread = columns.std(1).clamp(min=1e-3).tolist()  # a channel may lie idle, but is not to divide by zero
    if max(spread) < LEAST_SPREAD:
        raise UserError(
            f"the semantic map's deviation over the pictures is {max(spread):.3g} at most, so it says "
            "nothing about them; train Stage B anew with a lower stage_b.backbone_rate"
        )
    return MapStatistics(mean=tuple(columns.mean(1).tolist()), std=tuple(spread))

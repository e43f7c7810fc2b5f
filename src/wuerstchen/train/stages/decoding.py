"""Training of Stage B, as far as v1 and v2 share it: the decoder with the compressor, then the decoder alone.

``WithCompressor`` and ``DecoderOnly`` say which networks are trained. What the decoder learns, latents
in v2 or tokens in v1, is in decoder.py and paella.py.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from wuerstchen.diffusion.schedule import CosineSchedule
from wuerstchen.errors import UserError
from wuerstchen.images import to_images
from wuerstchen.models.cascade import PUBLISHED_STATISTICS, Cascade
from wuerstchen.models.compressor import Compressor, compressor_input
from wuerstchen.models.decoder import Decoder
from wuerstchen.models.efficientnet import EfficientNetLite
from wuerstchen.models.paella import Paella
from wuerstchen.models.previewer import Previewer
from wuerstchen.pipeline import Wuerstchen
from wuerstchen.train.config import Recipe, StageBConfig, refining
from wuerstchen.train.feed.images import Batch, pixels_of
from wuerstchen.train.feed.random import ImageRandom
from wuerstchen.train.stages.base import (
    MIN_STD,
    Inputs,
    Losses,
    NamedPhase,
    cascade_settings,
    encoded_captions,
    full_precision,
    in_chunks,
    with_captions_dropped,
)
from wuerstchen.train.stages.perceptual import PerceptualLoss

LATENTS_NOISE = CosineSchedule()
"""How semantic latents are noised for Stage B, whatever the objectives of Stages B and C are."""


class DecoderAndCompressor(nn.Module):
    """Decoder and compressor as one network, with one optimizer."""

    def __init__(self, decoder: Decoder | Paella, compressor: Compressor) -> None:
        super().__init__()
        self.decoder = decoder
        self.compressor = compressor


class Decoding:
    """What all kinds of Stage B share: augmented semantic latents, text, and previews."""

    captions: bool

    def __init__(
        self,
        config: StageBConfig,
        recipe: Recipe,
        model: Cascade,
        perceptual: EfficientNetLite | None,
    ) -> None:
        """The ``model`` has the networks: those that are trained and, frozen, the others. Updates with a
        ``feature_weight`` need the ``perceptual`` network."""
        assert model.compressor is not None
        assert model.previewer is not None
        self.config = config
        self.recipe = recipe
        self.vqgan = model.vqgan.eval().requires_grad_(False)
        self.text_encoder = model.text_encoder_of_decoder()
        self.perceptual = None if perceptual is None else PerceptualLoss(perceptual)
        self.captions = self.text_encoder is not None
        self.no_text = None if self.text_encoder is None else self.text_encoder.encode([""])
        self.rates = {"previewer": config.previewer_rate}
        self.preview_labels = {
            "rows": [
                "original",
                "Stage A only",
                "Stages B and A",
                "previewer",
            ]
        }

    def prepare_text(self, batch: Batch, device: torch.device) -> Inputs:
        if self.text_encoder is None:
            return {}
        return encoded_captions(self.text_encoder, batch.captions, self.recipe)

    def augment(self, z: Float[Tensor, "b c h w"], random: ImageRandom) -> Float[Tensor, "b c h w"]:
        """Drops the semantic latents of some images and noises those of others, so that Stage B tolerates
        errors of Stage C.

        The noise has the scale of the latents: their batch norm keeps every channel near unit variance.
        """
        return augmented(z, random, self.config)

    def targets(self, pixels: Float[Tensor, "b 3 h w"]) -> Inputs:
        """The decoder's targets, computed by the frozen Stage A."""
        raise NotImplementedError

    def decoder_loss(
        self, decoder: nn.Module, z: Float[Tensor, "b c mh mw"], inputs: Inputs, random: ImageRandom
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The loss of a decoder on semantic latents, and further terms to log."""
        raise NotImplementedError

    def decoder_and_latents(
        self, averages: dict[str, nn.Module], inputs: Inputs
    ) -> tuple[nn.Module, Float[Tensor, "b c mh mw"]]:
        """The averaged decoder and its semantic latents, without augmentation."""
        raise NotImplementedError

    def text_of(self, inputs: Inputs, random: ImageRandom) -> tuple[Tensor | None, Tensor | None]:
        """States and mask of the captions, some of them dropped. None for a decoder that reads no text."""
        if self.no_text is None:
            return None, None
        return with_captions_dropped(self.no_text, inputs, random, self.config.caption_dropout)

    def stage_a(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Reconstructions by Stage A alone: an upper bound for Stage B."""
        return self.vqgan.decode(self.vqgan.encode(pixels))

    def reconstructions(
        self,
        decoder: Decoder | Paella,
        compressor: Compressor,
        previewer: Previewer,
        pixels: Tensor,
        device: torch.device,
        low_memory: bool,
    ) -> list[Image.Image]:
        """Originals, then reconstructions by Stage A, by Stages B and A, and by the previewer."""
        cascade = Cascade(
            settings=cascade_settings(self.recipe, PUBLISHED_STATISTICS),
            vqgan=self.vqgan,
            decoder=decoder,
            compressor=compressor,
            text_encoder=self.text_encoder,
        )
        model = Wuerstchen(cascade, device, low_memory="layer" if low_memory else None)
        originals, parts = to_images(pixels), pixels.split(1 if low_memory else len(pixels))
        stage_a = [image for part in parts for image in to_images(self.stage_a(part).clamp(0, 1).float())]
        views = (compressor_input(part, self.recipe.view_scale) for part in parts)
        previews = torch.cat([previewer(compressor(view)).clamp(0, 1) for view in views])
        return [
            *originals,
            *stage_a,
            *(model.reconstruct(image, size=image.width).image for image in originals),
            *to_images(F.interpolate(previews, size=pixels.shape[2:], mode="nearest")),
        ]


@runtime_checkable
class Augmentation(Protocol):
    """How semantic latents are augmented for Stage B."""

    @property
    def map_noise(self) -> float: ...

    @property
    def map_dropout(self) -> float: ...


def augmented(
    z: Float[Tensor, "b c h w"], random: ImageRandom, config: Augmentation
) -> Float[Tensor, "b c h w"]:
    """Semantic latents of which some are zeroed and some are noised (``Decoding.augment``)."""
    noised = LATENTS_NOISE.add_noise(
        z, random.normal("map noise", z.shape[1:]), random.uniform("map time") / 2
    )
    u = random.uniform("map choice")[:, None, None, None]
    z = torch.where(u >= 1 - config.map_noise * (1 - config.map_dropout), noised, z)
    return torch.where(u < config.map_dropout, 0.0, z)


def previewer_loss(
    previewer: nn.Module, z: Float[Tensor, "b c mh mw"], pixels: Float[Tensor, "b 3 h w"]
) -> Float[Tensor, ""]:
    """Mean squared error against the images, scaled down to the size of previews."""
    drawn = previewer(z).float()
    return F.mse_loss(drawn, F.interpolate(pixels, size=drawn.shape[2:], mode="area"))


class WithCompressor(Decoding):
    """Phases that train the decoder together with the semantic compressor."""

    averaged = ("decoder_and_compressor", "previewer")
    reads_images = True

    def __init__(
        self,
        config: StageBConfig,
        recipe: Recipe,
        model: Cascade,
        phase: NamedPhase | None = None,
        perceptual: EfficientNetLite | None = None,
    ) -> None:
        """Without a ``phase`` it is the first one."""
        super().__init__(config, recipe, model, perceptual)
        assert model.compressor is not None
        assert model.previewer is not None
        self.name = "b" if phase is None else phase.name
        self.optimization = config.optimization if phase is None else phase.phase.optimization
        self.trained = DecoderAndCompressor(model.decoder, model.compressor)
        self.previewer = model.previewer
        self.networks: dict[str, nn.Module] = {
            "decoder_and_compressor": self.trained,
            "previewer": self.previewer,
        }
        self.rate_scales = {"compressor.backbone.": config.backbone_rate}

    def prepare(self, batch: Batch, device: torch.device) -> Inputs:
        with full_precision(device):
            targets = in_chunks(self.targets, batch.images.to(device))
        return {**targets, **self.prepare_text(batch, device)}

    def losses(self, inputs: Inputs, random: ImageRandom) -> Losses:
        pixels = pixels_of(inputs["images"])
        z = self.trained.compressor(compressor_input(pixels, self.recipe.view_scale)).float()
        loss, terms = self.decoder_loss(self.trained.decoder, z, inputs, random)
        if self.config.previewer_weight:
            # The loop gives this gradient to the compressor only. The previewer learns from its own loss.
            loss = loss + self.config.previewer_weight * previewer_loss(self.previewer, z, pixels)
        yield "decoder_and_compressor", loss, {"map_std": z.detach().std(), **terms}
        yield "previewer", previewer_loss(self.previewer, z.detach(), pixels), {}

    def check(self, values: dict[str, float]) -> None:
        if values["map_std"] < MIN_STD:
            raise UserError(
                f"the standard deviation of the semantic latents fell to {values['map_std']:.3g}. Below "
                f"{MIN_STD} all images look the same to the compressor. Use a lower stage_b.backbone_rate in "
                "another --run-dir."
            )

    def decoder_and_latents(
        self, averages: dict[str, nn.Module], inputs: Inputs
    ) -> tuple[nn.Module, Float[Tensor, "b c mh mw"]]:
        trained = averages["decoder_and_compressor"]
        assert isinstance(trained, DecoderAndCompressor)
        view = compressor_input(pixels_of(inputs["images"]), self.recipe.view_scale)
        return trained.decoder, trained.compressor(view).float()

    def preview(
        self,
        averages: dict[str, nn.Module],
        pixels: Tensor,
        device: torch.device,
        *,
        low_memory: bool = False,
    ) -> list[Image.Image]:
        """Originals, then reconstructions by Stage A, by Stages B and A, and by the previewer."""
        trained, previewer = averages["decoder_and_compressor"], averages["previewer"]
        assert isinstance(trained, DecoderAndCompressor)
        assert isinstance(previewer, Previewer)
        return self.reconstructions(
            trained.decoder, trained.compressor, previewer, pixels, device, low_memory
        )


class DecoderOnly(Decoding):
    """Phases that train only the decoder, on the semantic latents of the finished compressor."""

    averaged = ("decoder", "previewer")

    def __init__(
        self,
        config: StageBConfig,
        recipe: Recipe,
        model: Cascade,
        phase: NamedPhase | None = None,
        perceptual: EfficientNetLite | None = None,
    ) -> None:
        """Without a ``phase`` it is the refinement after a single first phase."""
        if phase is None:
            config = dataclasses.replace(
                config, time_shift=config.refine_shift, feature_weight=config.refine_feature_weight
            )
        super().__init__(config, recipe, model, perceptual)
        assert model.compressor is not None
        assert model.previewer is not None
        self.name = "b2" if phase is None else phase.name
        self.reads_images = config.feature_weight > 0
        self.optimization = refining(config) if phase is None else phase.phase.optimization
        self.decoder = model.decoder
        self.compressor = model.compressor.eval().requires_grad_(False)
        self.previewer = model.previewer
        self.networks: dict[str, nn.Module] = {"decoder": self.decoder, "previewer": self.previewer}
        self.rate_scales: dict[str, float] = {}

    def prepare(self, batch: Batch, device: torch.device) -> Inputs:
        with full_precision(device):
            found = in_chunks(self._frozen, batch.images.to(device))
        return {**found, **self.prepare_text(batch, device)}

    def _frozen(self, pixels: Float[Tensor, "b 3 h w"]) -> Inputs:
        z = self.compressor(compressor_input(pixels, self.recipe.view_scale)).float()
        small = F.interpolate(pixels, size=self.previewer.size(*z.shape[2:]), mode="area")
        return {**self.targets(pixels), "z": z, "small": small}

    def losses(self, inputs: Inputs, random: ImageRandom) -> Losses:
        yield "decoder", *self.decoder_loss(self.decoder, inputs["z"], inputs, random)
        yield "previewer", previewer_loss(self.previewer, inputs["z"], inputs["small"]), {}

    def check(self, values: dict[str, float]) -> None:
        pass

    def decoder_and_latents(
        self, averages: dict[str, nn.Module], inputs: Inputs
    ) -> tuple[nn.Module, Float[Tensor, "b c mh mw"]]:
        return averages["decoder"], inputs["z"]

    def preview(
        self,
        averages: dict[str, nn.Module],
        pixels: Tensor,
        device: torch.device,
        *,
        low_memory: bool = False,
    ) -> list[Image.Image]:
        """Originals, then reconstructions by Stage A, by Stages B and A, and by the previewer."""
        decoder, previewer = averages["decoder"], averages["previewer"]
        assert isinstance(decoder, Decoder | Paella)
        assert isinstance(previewer, Previewer)
        return self.reconstructions(decoder, self.compressor, previewer, pixels, device, low_memory)

"""What the stages are told: how long and how fast each learns, and by which losses."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from wuerstchen.diffusion.flow import TimeDensity
from wuerstchen.diffusion.objective import LossWeight
from wuerstchen.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """How long and how fast one stage learns. All lengths are in images."""

    images: int
    batch_size: int
    optimizer: Literal["adamw", "muon"] = "adamw"
    """``muon`` updates the matrices inside blocks by orthogonalised momentum and everything else by AdamW,
    at the same learning rate (``train.muon``). Not with sharded networks."""
    learning_rate: float = 1e-4
    warmup: int = 0
    """Images over which the learning rate rises from 0."""
    decay: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, as published, or a cosine down to a twentieth at the end."""
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    """Gradients longer than this are shortened to it."""
    ema_decay: float = 0.999
    """Of the weight average, an update; it starts lower, so that the first weights are soon forgotten."""
    ema_every: int = 1
    """Updates between those that the average follows, by ``ema_decay`` to this power; it follows the last one
    too. A billion parameters are worth more than 1: the original has 100."""
    accumulate: int = 1
    """Parts that a batch is computed in, one after the other, for a batch that does not fit into memory at
    once. Gradients are added up and travel between processes once an update. The update is that of the whole
    batch to rounding, but for what has a state: batch norms see one part (over all processes) at a time and
    follow each, and the discriminator's spectral norm iterates once a part."""

    def __post_init__(self) -> None:
        counts = ("images", "batch_size", "ema_every", "accumulate")
        for name, least in (*((n, 1) for n in counts), ("warmup", 0)):
            if getattr(self, name) < least:
                raise UserError(
                    f"{name}={getattr(self, name)} must be at least {least}; give a larger number"
                )
        if self.batch_size % self.accumulate:
            raise UserError(
                f"batch_size={self.batch_size} cannot be computed in accumulate={self.accumulate} equal "
                f"parts; use a multiple of {self.accumulate}"
            )
        if not 0 < self.learning_rate < 1:
            raise UserError(f"learning_rate={self.learning_rate} must be between 0 and 1; 1e-4 is common")
        if not self.clip_norm > 0 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(
                f"clip_norm={self.clip_norm} must be above 0 and betas={self.betas} from 0 to below 1; 1.0 "
                "and 0.9 0.999 are common"
            )
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"weight_decay={self.weight_decay} must be at least 0; 0.01 is common")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay={self.ema_decay} must be from 0 to below 1; 0.999 is common")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A further part of a stage: it goes on from the averaged weights of the one before, with an optimizer of
    its own."""

    optimization: Optimization
    image_size: int | None = None
    """Side of the pictures in pixels; None for the recipe's."""
    max_ratio: float = 1.0
    """Each batch is square or, as likely, so many times wider than high, or higher than wide; 1 is square.
    Emoji are always square, and a prepared set has sizes of its own."""
    data: str = ""
    """Another data set than the recipe's; empty for the recipe's."""

    def __post_init__(self) -> None:
        check_side(self.image_size)
        _check_ratio(self.max_ratio)


def _check_ratio(ratio: float) -> None:
    if not 1 <= ratio <= 4:
        raise UserError(f"max_ratio={ratio} must be from 1 to 4; 1 keeps pictures square")


def check_side(size: int | None) -> None:
    if size is not None and (size < 128 or size % 128):
        near = max(128, round(size / 128) * 128)
        raise UserError(f"image_size={size} must be a multiple of 128; use {near}")


def _check_shares(config: object, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise UserError(f"{name}={getattr(config, name)} must be a share from 0 to 1; give one")


def _check_shift(shift: float) -> None:
    if not 0 < shift <= 100:
        raise UserError(f"time_shift={shift} must be above 0 and at most 100; 1 is no shift")


def _check_refinement(images: int, rate: float) -> None:
    if images < 0:
        raise UserError(f"refine_images={images} must be at least 0; 0 leaves the phase out")
    if not 0 < rate < 1:
        raise UserError(f"refine_rate={rate} must be between 0 and 1; 5e-4 is common")


@dataclass(frozen=True, kw_only=True)
class StageAConfig:
    """Stage A: reconstruction, perceptual, adversarial and quantiser terms."""

    optimization: Optimization
    image_size: int | None = None
    """Side of the pictures in pixels; None for the recipe's."""
    crop: int | None = None
    """Side of the random crops to train on; None for whole pictures. The network is convolutional."""
    l1_weight: float = 0.0
    """Weight of the absolute error beside the squared one, which is all that the original has. The squared
    error alone leaves small models blurred and slow to find pure white and black."""
    perceptual: Literal["efficientnet_lite0", "none"] = "efficientnet_lite0"
    """The network whose features are compared."""
    perceptual_weight: float = 0.1
    adversarial_weight: float = 0.01
    adversarial_from: int = 0
    """Images after which the discriminator, which learns from the beginning, is listened to."""
    discriminator_width: int = 512
    discriminator_depth: int = 6
    quantise_dropout: float = 0.1
    """Share of the pictures that pass unquantised."""
    measure_scale: bool = True
    """Whether ``vqgan.scale_factor`` becomes the measured deviation of the latents after the stage."""
    codebook_init: Literal["uniform", "normal"] = "normal"
    """``normal`` spreads the codes over the latents, whose batch norm gives them unit variance. ``uniform``
    is as published, ±1/codes: all codes then lie in one spot far inside the latents, the few that are nearest
    to any of them move out, and the others are never used again. Of 1,024 codes 11 were used after 100
    updates and 7 after 400, with ``normal`` about 360 in each batch of 16 crops."""
    refine_images: int = 0
    """Length of a second phase, after Stage B: the way from latents to pixels goes on alone, from its
    averaged weights with a fresh optimizer and discriminator. 0 for none."""
    refine_rate: float = 5e-4
    """Learning rate of the second phase."""
    refine_redrawn: float = 0.5
    """Share of its pictures whose latents Stage B has drawn anew out of noise."""

    def __post_init__(self) -> None:
        check_side(self.image_size)
        if self.crop is not None and self.crop < 16:
            raise UserError(f"crop={self.crop} must be at least 16; leave it out for whole pictures")
        for name in ("discriminator_width", "discriminator_depth"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1; give a larger number")
        _check_shares(self, "quantise_dropout", "refine_redrawn")
        _check_refinement(self.refine_images, self.refine_rate)
        for name in ("l1_weight", "perceptual_weight", "adversarial_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(
                    f"{name}={getattr(self, name)} must be a number of at least 0; 0 leaves it out"
                )


@dataclass(frozen=True, kw_only=True)
class StageBConfig:
    """Stage B, with the compressor trained along with it."""

    optimization: Optimization
    image_size: int | None = None
    """Side of the pictures in pixels in the first phase; None for the recipe's."""
    max_ratio: float = 1.0
    """Of the first phase, as ``Phase.max_ratio``."""
    phases: tuple[Phase, ...] = ()
    """Further phases, in order, of decoder and compressor together; the decoder alone comes after them."""
    compressor_init: str = ""
    """Weights the backbone starts from: a torchvision .pth or timm .safetensors file; empty for the
    installed EfficientNet-Lite0 (only for that backbone)."""
    backbone_rate: float = 0.1
    """Share of the learning rate for the pretrained backbone. At the full rate its activations saturate
    within a few hundred updates, and the map is the same for every picture from then on."""
    frozen_stride: int = 1
    """The backbone's layers down to this stride stay as they are; 8 halves the cost of training it."""
    loss_weight: LossWeight = "p2"
    """Of a decoder of latents (v2) that predicts noise or velocity; flow matching weighs no errors."""
    label_smoothing: float = 0.1
    """Of a decoder of tokens (v1): the share of the aim that is spread evenly over all of them."""
    time_shift: float = 1.0
    """How far training times are moved towards noise (``diffusion.schedule.shifted``, or of flow matching
    ``diffusion.flow.flow_shifted``); 1 is as published."""
    time_density: TimeDensity = "logit_normal"
    """Which times flow matching trains how often (``diffusion.flow.flow_times``)."""
    map_dropout: float = 0.05
    """Share of the pictures whose map is zeroed."""
    map_noise: float = 0.3
    """Share of the other pictures whose map is noised, to a time uniform in [0, 0.5)."""
    caption_dropout: float = 0.05
    """Share of the pictures without their caption, where the decoder reads text at all."""
    previewer_rate: float = 1e-3
    """Learning rate of the previewer, which is trained along on the map, without a say in it."""
    refine_images: int = 0
    """Length of a last phase: the decoder goes on alone, from its averaged weights with a fresh optimizer,
    on the maps of the compressor, which stays as it is. 0 for none."""
    refine_rate: float = 5e-4
    """Learning rate of that phase."""
    refine_shift: float = 1.0
    """``time_shift`` of that phase, which finds the layout learnt and texture not yet."""

    @property
    def images(self) -> int:
        """Images over all phases of decoder and compressor together."""
        return sum(phase.optimization.images for phase in phases_of(self))

    def __post_init__(self) -> None:
        check_side(self.image_size)
        shares = ("map_dropout", "map_noise", "caption_dropout", "backbone_rate", "label_smoothing")
        _check_shares(self, *shares)
        _check_ratio(self.max_ratio)
        _check_shift(self.time_shift)
        _check_shift(self.refine_shift)
        _check_refinement(self.refine_images, self.refine_rate)
        if not 0 < self.previewer_rate < 1:
            raise UserError(f"previewer_rate={self.previewer_rate} must be between 0 and 1; 1e-3 is common")


@dataclass(frozen=True, kw_only=True)
class StageCConfig:
    """Stage C, on the frozen compressor's maps."""

    optimization: Optimization
    image_size: int | None = None
    """Side of the pictures in pixels in the first phase; None for the recipe's."""
    max_ratio: float = 1.0
    """Of the first phase, as ``Phase.max_ratio``."""
    phases: tuple[Phase, ...] = ()
    """Further phases, in order."""
    blend: float = 1.0
    """Share of the last phase's averaged weights in the prior; the rest is of the phase before it."""
    loss_weight: LossWeight = "p2"
    """Of a prior that predicts noise or velocity; flow matching weighs no errors."""
    time_shift: float = 1.0
    """How far training times are moved towards noise (``diffusion.schedule.shifted``, or of flow matching
    ``diffusion.flow.flow_shifted``); 1 is as published."""
    time_density: TimeDensity = "logit_normal"
    """Which times flow matching trains how often (``diffusion.flow.flow_times``)."""
    caption_dropout: float = 0.05
    """Share of the pictures trained without their caption, for classifier-free guidance."""

    @property
    def images(self) -> int:
        """Images over all phases."""
        return sum(phase.optimization.images for phase in phases_of(self))

    def __post_init__(self) -> None:
        _check_shares(self, "caption_dropout", "blend")
        _check_ratio(self.max_ratio)
        check_side(self.image_size)
        if self.blend < 1 and not self.phases:
            raise UserError(f"blend={self.blend} needs two phases to blend; give phases, or leave it at 1")
        _check_shift(self.time_shift)


def phases_of(config: StageBConfig | StageCConfig) -> tuple[Phase, ...]:
    """All phases of a stage, the first included."""
    first = Phase(optimization=config.optimization, image_size=config.image_size, max_ratio=config.max_ratio)
    return (first, *config.phases)


def refining(config: StageAConfig | StageBConfig) -> Optimization:
    """How the phase of a stage learns that refines one network alone."""
    return dataclasses.replace(
        config.optimization, images=config.refine_images, learning_rate=config.refine_rate
    )

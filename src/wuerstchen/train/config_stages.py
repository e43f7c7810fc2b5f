"""The settings of each stage: length, learning rate and losses."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from wuerstchen.diffusion.densities import TimeDensity
from wuerstchen.diffusion.objective import LossWeight
from wuerstchen.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """How one phase is optimized. All lengths are in images."""

    images: int
    batch_size: int
    optimizer: Literal["adamw", "muon"] = "adamw"
    """``muon`` updates the matrices inside blocks by orthogonalised momentum, and everything else by AdamW
    with the same learning rate (``train.engine.muon``). It does not support sharding."""
    learning_rate: float = 1e-4
    warmup: int = 0
    """Images over which the learning rate increases from 0."""
    decay: Literal["constant", "cosine"] = "constant"
    """The schedule after the warm-up: constant, as published, or a cosine that ends at a twentieth."""
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    """Gradients are clipped to this norm."""
    ema_decay: float = 0.999
    """EMA decay per update. It starts lower, to forget the initial weights quickly."""
    ema_every: int = 1
    """Updates between EMA steps. Each step decays by ``ema_decay ** ema_every``. The last update is always
    included. Use a value above 1 for billion-parameter models. The original uses 100."""
    accumulate: int = 1
    """Micro-batches per batch, for batches that do not fit into memory. Gradients are accumulated, and
    exchanged between processes once per update. The update equals that of the whole batch up to rounding,
    except for layers with state: batch norms use and track the statistics of each micro-batch (over all
    processes), and the discriminator's spectral norm iterates once per micro-batch."""

    def __post_init__(self) -> None:
        counts = ("images", "batch_size", "ema_every", "accumulate")
        for name, least in (*((n, 1) for n in counts), ("warmup", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if self.batch_size % self.accumulate:
            raise UserError(
                f"batch_size must be a multiple of accumulate={self.accumulate}, got {self.batch_size}."
            )
        if not 0 < self.learning_rate < 1:
            raise UserError(
                f"learning_rate must be between 0 and 1, got {self.learning_rate}. 1e-4 is common."
            )
        if not self.clip_norm > 0 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(
                f"clip_norm must be above 0 and betas must be in [0, 1), got clip_norm={self.clip_norm} and "
                f"betas={self.betas}. Common values are 1.0 and (0.9, 0.999)."
            )
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"weight_decay must be at least 0, got {self.weight_decay}. 0.01 is common.")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay must be from 0 to below 1, got {self.ema_decay}. 0.999 is common.")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """An additional phase of a stage. It continues from the averaged weights of the phase before it, with a
    new optimizer."""

    optimization: Optimization
    image_size: int | None = None
    """Side of the images in pixels. None for the recipe's."""
    max_ratio: float = 1.0
    """Aspect ratio of wide and tall batches. Each batch is square, wide or tall with equal probability. 1
    makes all batches square. Emoji are always square, and a prepared set has its own sizes."""
    data: str = ""
    """Another data set. Empty for the recipe's."""
    time_shift: float | None = None
    """The stage's ``time_shift`` in this phase. None for that of the stage."""
    feature_weight: float | None = None
    """Stage B's ``feature_weight`` in this phase. None for that of the stage."""
    decoder_only: bool = False
    """Trains only Stage B's decoder, with the compressor frozen. Not for Stage C."""

    def __post_init__(self) -> None:
        check_side(self.image_size)
        _check_ratio(self.max_ratio)
        if self.time_shift is not None:
            _check_shift(self.time_shift)
        if self.feature_weight is not None:
            check_weights(self, "feature_weight")


def _check_ratio(ratio: float) -> None:
    if not 1 <= ratio <= 4:
        raise UserError(f"max_ratio must be between 1 and 4, got {ratio}. 1 keeps images square.")


def check_side(size: int | None) -> None:
    if size is not None and (size < 128 or size % 128):
        near = max(128, round(size / 128) * 128)
        raise UserError(f"image_size must be a multiple of 128, got {size}. Use {near}.")


def check_fractions(config: object, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise UserError(f"{name} must be between 0 and 1, got {getattr(config, name)}.")


def check_weights(config: object, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) < math.inf:
            raise UserError(f"{name} must be at least 0, got {getattr(config, name)}. 0 leaves it out.")


def _check_shift(shift: float) -> None:
    if not 0 < shift <= 100:
        raise UserError(f"time_shift must be above 0 and at most 100, got {shift}. 1 is no shift.")


def _check_refinement(images: int, rate: float) -> None:
    if images < 0:
        raise UserError(f"refine_images must be at least 0, got {images}. 0 leaves the phase out.")
    if not 0 < rate < 1:
        raise UserError(f"refine_rate must be between 0 and 1, got {rate}. 5e-4 is common.")


@dataclass(frozen=True, kw_only=True)
class StageAConfig:
    """Stage A: reconstruction, perceptual, adversarial and quantiser losses."""

    optimization: Optimization
    image_size: int | None = None
    """Side of the images in pixels. None for the recipe's."""
    crop: int | None = None
    """Side of the random crops to train on, which is possible because the network is convolutional. None for
    whole images."""
    l1_weight: float = 0.0
    """Weight of the absolute error, in addition to the squared error. The original has only the squared
    error, with which small models stay blurred and learn pure white and black slowly."""
    perceptual: Literal["efficientnet_lite0", "none"] = "efficientnet_lite0"
    """The network whose features the perceptual loss compares."""
    perceptual_weight: float = 0.1
    adversarial_weight: float = 0.01
    adversarial_from: int = 0
    """Images after which the adversarial loss is used. The discriminator trains from the start."""
    discriminator_width: int = 512
    discriminator_depth: int = 6
    quantise_dropout: float = 0.1
    """Fraction of the images that skip quantisation."""
    measure_scale: bool = True
    """Whether ``vqgan.scale_factor`` is set to the measured standard deviation of the latents at the end."""
    codebook_init: Literal["uniform", "normal"] = "normal"
    """``normal`` spreads the codes over the latents, which a batch norm keeps at unit variance. ``uniform``
    is as published, ±1/codes. It starts with all codes close together near the centre. A few of them move
    out, and the others are never used again: of 1,024 codes, 11 were in use after 100 updates and 7 after
    400. With ``normal``, each batch of 16 crops uses about 360."""
    refine_images: int = 0
    """Images in a second phase after Stage B, which trains only the decoder from latents to pixels. It starts
    from the averaged weights, with a new optimizer and discriminator. 0 for none."""
    refine_rate: float = 5e-4
    """Learning rate of the second phase."""
    refine_redrawn: float = 0.5
    """Fraction of its images whose latents Stage B samples from noise."""

    def __post_init__(self) -> None:
        check_side(self.image_size)
        if self.crop is not None and self.crop < 16:
            raise UserError(
                f"crop must be at least 16, got {self.crop}. Remove it to train on complete images."
            )
        for name in ("discriminator_width", "discriminator_depth"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}.")
        check_fractions(self, "quantise_dropout", "refine_redrawn")
        _check_refinement(self.refine_images, self.refine_rate)
        check_weights(self, "l1_weight", "perceptual_weight", "adversarial_weight")


@dataclass(frozen=True, kw_only=True)
class StageBConfig:
    """Stage B and the compressor, which are trained together."""

    optimization: Optimization
    image_size: int | None = None
    """Side of the images in the first phase, in pixels. None for the recipe's."""
    max_ratio: float = 1.0
    """Aspect ratio of wide and tall batches in the first phase, as ``Phase.max_ratio``."""
    phases: tuple[Phase, ...] = ()
    """More phases, in order, of decoder and compressor together or of the decoder alone (``decoder_only``).
    The refinement of the decoder comes after them."""
    compressor_init: str = ""
    """Initial weights of the backbone: a torchvision .pth or timm .safetensors file. Empty for the installed
    EfficientNet-Lite0, if that is the backbone."""
    backbone_rate: float = 0.1
    """Learning rate of the pretrained backbone, as a fraction of ``optimization.learning_rate``. At the full
    rate its activations saturate within a few hundred updates, and all images then get the same semantic
    latents."""
    frozen_stride: int = 1
    """Freezes the backbone's layers down to this stride. 8 halves the cost of training it."""
    loss_weight: LossWeight = "p2"
    """Loss weighting of a decoder of latents (v2) that predicts noise or velocity. Flow matching has none."""
    label_smoothing: float = 0.1
    """Label smoothing of a decoder of tokens (v1): the probability that is spread evenly over all tokens."""
    time_shift: float = 1.0
    """Timestep shift of training times towards noise (``diffusion.schedule.shifted``, or
    ``diffusion.flow.flow_shifted`` for flow matching). 1 is no shift, as published."""
    time_density: TimeDensity | None = None
    """Distribution of training times before the shift. ``logit_normal`` trains mostly in the middle. None is
    the objective's own: ``logit_normal`` for flow matching, otherwise ``uniform``, as published."""
    map_dropout: float = 0.05
    """Fraction of the images whose semantic latents are zeroed."""
    map_noise: float = 0.3
    """Fraction of the other images whose semantic latents are noised, to a time uniform in [0, 0.5)."""
    caption_dropout: float = 0.05
    """Fraction of the images that train without their caption, if the decoder reads text."""
    previewer_rate: float = 1e-3
    """Learning rate of the previewer."""
    previewer_weight: float = 0.0
    """Weight of the previewer's loss in the compressor's loss, so that the semantic latents keep colours and
    shapes in a form that is easy to read. 0 trains the previewer on detached semantic latents only."""
    feature_weight: float = 0.0
    """Weight of the feature loss of a decoder of latents (v2): the image predicted by the decoder and Stage A
    is compared to the original in the features of EfficientNet-Lite0, weighted by ᾱ(t). 0 leaves it out."""
    feature_fraction: float = 0.25
    """Fraction of each batch for which the feature loss is computed. Decoding to pixels is expensive. These
    are the first images of a batch, or with ``accumulate`` and several processes those of each part."""
    refine_images: int = 0
    """Images in a last phase that trains only the decoder, with the compressor frozen. It starts from the
    averaged weights, with a new optimizer. 0 for none."""
    refine_rate: float = 5e-4
    """Learning rate of the last phase."""
    refine_shift: float = 1.0
    """``time_shift`` of the last phase. By then the decoder knows layout, but not yet texture."""
    refine_feature_weight: float = 0.0
    """``feature_weight`` of the last phase."""

    @property
    def images(self) -> int:
        """Images over all phases that train decoder and compressor together."""
        return sum(phase.optimization.images for phase in phases_of(self) if not phase.decoder_only)

    def __post_init__(self) -> None:
        check_side(self.image_size)
        fractions = ("map_dropout", "map_noise", "caption_dropout", "backbone_rate", "label_smoothing")
        check_fractions(self, *fractions)
        _check_ratio(self.max_ratio)
        _check_shift(self.time_shift)
        _check_shift(self.refine_shift)
        _check_refinement(self.refine_images, self.refine_rate)
        check_weights(self, "previewer_weight", "feature_weight", "refine_feature_weight")
        if not 0 < self.feature_fraction <= 1:
            raise UserError(
                f"feature_fraction must be above 0 and at most 1, got {self.feature_fraction}. 0.25 is "
                "common."
            )
        if not 0 < self.previewer_rate < 1:
            raise UserError(
                f"previewer_rate must be between 0 and 1, got {self.previewer_rate}. 1e-3 is common."
            )


@dataclass(frozen=True, kw_only=True)
class StageCConfig:
    """Stage C, on the semantic latents of the frozen compressor."""

    optimization: Optimization
    image_size: int | None = None
    """Side of the images in the first phase, in pixels. None for the recipe's."""
    max_ratio: float = 1.0
    """Aspect ratio of wide and tall batches in the first phase, as ``Phase.max_ratio``."""
    phases: tuple[Phase, ...] = ()
    """More phases, in order."""
    blend: float = 1.0
    """Weight of the last phase's averaged weights in the prior. The rest comes from the phase before it."""
    loss_weight: LossWeight = "p2"
    """Loss weighting of a prior that predicts noise or velocity. Flow matching has none."""
    time_shift: float = 1.0
    """Timestep shift of training times towards noise (``diffusion.schedule.shifted``, or
    ``diffusion.flow.flow_shifted`` for flow matching). 1 is no shift, as published."""
    time_density: TimeDensity | None = None
    """Distribution of training times before the shift. ``logit_normal`` trains mostly in the middle. None is
    the objective's own: ``logit_normal`` for flow matching, otherwise ``uniform``, as published."""
    caption_dropout: float = 0.05
    """Fraction of the images that train without their caption, for classifier-free guidance."""
    text_noise: float = 0.0
    """Standard deviation of Gaussian noise on the text states in training, in multiples of the root mean
    square of each state. Noise on embeddings regularises (NEFTune, arXiv 2310.05914). 0 adds none."""
    dispersive_weight: float = 0.0
    """Weight of the dispersive loss (``train.stages.dispersive``) on the features after a quarter of the
    blocks. It compares the images of a batch, or with ``accumulate`` and several processes those of each
    part. 0 leaves it out."""
    known_fraction: float = 0.0
    """Fraction of the images that train with known cells: a random region of their latents is clean, at time
    0, and has no loss. This prepares Stage C for inpainting. 0 trains without, as published."""

    @property
    def images(self) -> int:
        """Images over all phases."""
        return sum(phase.optimization.images for phase in phases_of(self))

    def __post_init__(self) -> None:
        check_fractions(self, "caption_dropout", "blend", "known_fraction")
        _check_ratio(self.max_ratio)
        check_side(self.image_size)
        for name in ("decoder_only", "feature_weight"):
            if any(getattr(phase, name) for phase in self.phases):
                raise UserError(f"{name} is for phases of Stage B, got a phase of Stage C. Remove it.")
        if self.blend < 1 and not self.phases:
            raise UserError(
                f"blend must be 1 without further phases, got {self.blend}. It blends two phases."
            )
        _check_shift(self.time_shift)
        check_weights(self, "dispersive_weight", "text_noise")


def phases_of(config: StageBConfig | StageCConfig) -> tuple[Phase, ...]:
    """All phases of a stage, including the first."""
    first = Phase(optimization=config.optimization, image_size=config.image_size, max_ratio=config.max_ratio)
    return (first, *config.phases)


def refining(config: StageAConfig | StageBConfig) -> Optimization:
    """The optimization of the phase that refines one network of a stage."""
    return dataclasses.replace(
        config.optimization, images=config.refine_images, learning_rate=config.refine_rate
    )

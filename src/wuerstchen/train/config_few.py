"""The settings of students of Stages C and B, which sample in few steps."""

from dataclasses import dataclass

from wuerstchen.errors import UserError
from wuerstchen.train.config_stages import Optimization, check_fractions, check_side, check_weights


def _optimization(batch_size: int, updates: int, warmup: int) -> Optimization:
    """For a student as small as that of the bundled model. ``warmup`` is in updates."""
    return Optimization(
        images=batch_size * updates,
        batch_size=batch_size,
        learning_rate=5e-4,
        warmup=batch_size * warmup,
        decay="cosine",
        betas=(0.9, 0.99),
        ema_decay=0.999,
    )


_OF_STUDENTS = _optimization(2048, updates=5_000, warmup=100)
_OF_DECODER_STUDENTS = _optimization(256, updates=10_000, warmup=200)


@dataclass(frozen=True, kw_only=True)
class StageFewConfig:
    """A student of Stage C for few steps, on samples of the finished prior."""

    optimization: Optimization = _OF_STUDENTS
    """Its images count captions: each gives a trajectory of the prior."""
    image_size: int | None = None
    """Side of the images whose semantic latents are sampled, in pixels. None for the recipe's."""
    steps: int = 1
    """Steps that the model takes with the student unless a request says otherwise."""
    teacher_steps: int = 12
    """Most steps of a trajectory of the prior, by DPM-Solver++ or, for flow matching, Euler's method."""
    points: int = 1
    """Points of each trajectory that an update trains on. Trajectories are expensive: without
    ``prepared_images`` use about as many as they have steps."""
    pure_noise: float = 0.5
    """Fraction of the points that are the start of the trajectory, pure noise. The others are uniform."""
    trajectories: int = 0
    """Trajectories that are computed once at the start, if the recipe has ``prepared_images``. 0 for as many
    as these."""

    def __post_init__(self) -> None:
        check_side(self.image_size)
        _check_least(self, ("steps", 1), ("points", 1), ("teacher_steps", 3), ("trajectories", 0))
        _check_pure_noise(self.pure_noise)


@dataclass(frozen=True, kw_only=True)
class StageFewBConfig:
    """A student of Stage B for few steps, on images and their semantic latents."""

    optimization: Optimization = _OF_DECODER_STUDENTS
    image_size: int | None = None
    """Side of the images, in pixels. None for the recipe's."""
    steps: int = 1
    """Steps that the model takes with the student unless a request says otherwise. The student is trained at
    the times of so many steps."""
    pure_noise: float = 0.5
    """Fraction of the images that train the first step, from pure noise. The others train later steps, if
    there are any."""
    own_estimates: float = 0.5
    """Fraction of the images that train later steps from the student's own first estimate, as in sampling.
    The others train them from the latents of the image."""
    latent_weight: float = 1.0
    """Weight of the distance of the latents, the pseudo-Huber loss per root of their number."""
    feature_weight: float = 1.0
    """Weight of the feature loss: the image that Stage A decodes is compared to the original in the features
    of EfficientNet-Lite0. 0 leaves it out."""
    feature_fraction: float = 0.5
    """Fraction of each batch that is decoded, for the feature loss and the discriminator."""
    crop: int | None = 128
    """Side of the random squares that are decoded, in pixels. None for whole images."""
    map_noise: float = 0.3
    """Fraction of the images whose semantic latents are noised, to a time uniform in [0, 0.5)."""
    map_dropout: float = 0.0
    """Fraction of the images whose semantic latents are zeroed."""
    adversarial_weight: float = 0.0
    """Weight of a discriminator's verdict on the decoded images. 0 trains without one."""
    adversarial_from: int = 0
    """Images before the student listens to the discriminator, which learns from the start."""
    discriminator_width: int = 128
    """Channels of the last convolution of the discriminator."""
    discriminator_depth: int = 4
    """Convolutions of the discriminator, each with stride 2."""

    def __post_init__(self) -> None:
        check_side(self.image_size)
        _check_least(self, ("steps", 1), ("adversarial_from", 0), ("discriminator_depth", 1))
        _check_least(self, ("discriminator_width", 2 ** max(self.discriminator_depth - 3, 3)))
        _check_pure_noise(self.pure_noise)
        check_fractions(self, "own_estimates", "map_noise", "map_dropout")
        check_weights(self, "latent_weight", "feature_weight", "adversarial_weight")
        if not self.latent_weight + self.feature_weight:
            raise UserError("latent_weight and feature_weight are both 0. Set one of them above 0.")
        if not 0 < self.feature_fraction <= 1:
            raise UserError(
                f"feature_fraction must be above 0 and at most 1, got {self.feature_fraction}. 0.5 is common."
            )
        if self.crop is not None and self.crop <= (smallest := 2**self.discriminator_depth):
            raise UserError(
                f"crop must be more than {smallest} pixels with discriminator_depth="
                f"{self.discriminator_depth}, got {self.crop}. 128 is common."
            )


def _check_least(config: object, *least: tuple[str, int]) -> None:
    for name, value in least:
        if getattr(config, name) < value:
            raise UserError(f"{name} must be at least {value}, got {getattr(config, name)}.")


def _check_pure_noise(fraction: float) -> None:
    if not 0 <= fraction < 1:
        raise UserError(f"pure_noise must be from 0 to below 1, got {fraction}. 0.5 is common.")

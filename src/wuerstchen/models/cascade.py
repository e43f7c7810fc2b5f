"""A complete Würstchen model: its networks and its settings."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from wuerstchen.device import to_device
from wuerstchen.diffusion.objective import PUBLISHED_OBJECTIVE, Objective
from wuerstchen.diffusion.sampler_table import SAMPLERS, check_compatible, samplers_for
from wuerstchen.errors import UserError
from wuerstchen.models.compressor import Compressor, latent_side
from wuerstchen.models.decoder import Decoder, DecoderConfig
from wuerstchen.models.paella import Paella
from wuerstchen.models.previewer import Previewer
from wuerstchen.models.prior import Prior
from wuerstchen.models.text import TextEncoder
from wuerstchen.models.vqgan import VQGAN
from wuerstchen.sampling import ALL_TIMES, NO_STUDENTS, Sampling, checked_interval, completed


@dataclass(frozen=True)
class LatentStatistics:
    """How Stage C's semantic latents are normalised: (z − mean) / std, per channel or the same for all.

    Stage B reads the compressor's output z. Stage C's diffusion needs unit variance.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean:
            raise UserError(
                f"mean and std must have one value each per channel, got {len(self.mean)} means and "
                f"{len(self.std)} standard deviations."
            )
        if not all(map(math.isfinite, (*self.mean, *self.std))) or min(self.std) <= 0:
            raise UserError(
                "Statistics of semantic latents must be finite, with std above 0, got "
                f"mean={self.mean}, std={self.std}. Measure them again."
            )

    def normalise(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        mean, std = (
            to_device(torch.tensor(v, dtype=z.dtype, device="cpu"), z.device) for v in (self.mean, self.std)
        )
        return (z - mean[:, None, None]) / std[:, None, None]

    def restore(self, normalised: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The inverse of ``normalise``."""
        z = normalised
        mean, std = (
            to_device(torch.tensor(v, dtype=z.dtype, device="cpu"), z.device) for v in (self.mean, self.std)
        )
        return z * std[:, None, None] + mean[:, None, None]


MIN_SIDE = 64
SIDE_STEP = 8
MAX_IMAGE_SIZE = 2**16
MAX_SIDES = 16
"""Largest side of an image, relative to the side that the model was trained on."""

PUBLISHED_STATISTICS = LatentStatistics(mean=(-1.0,), std=(42.0,))
"""Of the published v2: Stage C works on (z + 1) / 42."""


def _listed(settings: "CascadeSettings", names: tuple[str, ...]) -> str:
    return ", ".join(f"{name}={getattr(settings, name)!r}" for name in names)


@dataclass(frozen=True, kw_only=True)
class CascadeSettings:
    """The settings of a trained model. The defaults are the published v2."""

    image_size: int = 1024
    """Side of the training images, in pixels."""
    size_multiple: int = 128
    """Images are sampled with sides that are multiples of this, then cropped to the size asked for. The
    default is 3 positions of the semantic latents."""
    view_scale: float = 0.75
    """Side of the compressor's input, relative to the image's."""
    latent_statistics: LatentStatistics = field(default=PUBLISHED_STATISTICS)
    text_mask: bool = False
    """Whether attention ignores padding. The published models attend to it."""
    prior_steps: int = 29
    prior_equal_steps: bool = False
    """Whether Stage C takes equal steps, as in v1. v2 spends two thirds of them on the noisiest third."""
    prior_sampler: str = "ddpm"
    """Stage C's sampler, by its name in ``diffusion.sampler_table``."""
    prior_guidance: float = 4.0
    prior_guidance_interval: tuple[float, float] = ALL_TIMES
    """Lowest and highest time at which Stage C is guided."""
    prior_known_cells: bool = False
    """Whether Stage C was trained with known cells (``StageCConfig.known_fraction``). Edits then show it what
    they keep without noise."""
    decoder_steps: int = 12
    decoder_guidance: float = 1.0
    """1 is no guidance, as published."""
    decoder_shift: float = 1.0
    """Timestep shift of Stage B towards noise (``diffusion.schedule.shifted``). 1 is no shift, as
    published."""
    decoder_temperatures: tuple[float, float] = (1.0, 0.6)
    """Temperatures of the first and last step of a Stage B on tokens (v1)."""
    prior_objective: Objective = PUBLISHED_OBJECTIVE
    """The objective that Stage C was trained with."""
    decoder_objective: Objective = PUBLISHED_OBJECTIVE
    """The objective that Stage B was trained with. Not used by a Stage B on tokens."""
    prior_student_steps: int = 0
    """Steps that the student of Stage C was trained for. 0 for a model without a student."""
    prior_student_guidance: float = 1.0
    """Guidance of the samples that the student of Stage C was trained on. It needs no guidance itself."""
    decoder_student_steps: int = 0
    """Steps that the student of Stage B was trained for. 0 for a model without a student."""

    def __post_init__(self) -> None:
        integers = ("image_size", "size_multiple", "prior_steps", "decoder_steps")
        if not all(type(getattr(self, name)) is int and getattr(self, name) >= 1 for name in integers):
            raise UserError(
                f"{_listed(self, integers)} must be integers of at least 1. Download the model again."
            )
        for name in ("prior_student_steps", "decoder_student_steps"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 0:
                raise UserError(
                    f"{name} must be an integer of at least 0, got {getattr(self, name)!r}. Download the "
                    "model again."
                )
        real = (
            *("view_scale", "prior_guidance", "decoder_guidance", "decoder_shift"),
            "prior_student_guidance",
        )
        if not all(
            isinstance(getattr(self, n), int | float) and math.isfinite(getattr(self, n)) for n in real
        ):
            raise UserError(f"{_listed(self, real)} must be finite numbers. Download the model again.")
        if not 0.25 <= self.view_scale <= 4 or self.image_size > MAX_IMAGE_SIZE:
            raise UserError(
                f"view_scale must be from 0.25 to 4, got {self.view_scale}, and image_size at most "
                f"{MAX_IMAGE_SIZE}, got {self.image_size}. Download the model again."
            )
        interval = checked_interval("prior_guidance_interval", self.prior_guidance_interval)
        object.__setattr__(self, "prior_guidance_interval", interval)
        for name in ("text_mask", "prior_equal_steps", "prior_known_cells"):
            if type(getattr(self, name)) is not bool:
                raise UserError(
                    f"{name} must be true or false, got {getattr(self, name)!r}. Download the model again."
                )
        check_compatible(self.prior_sampler, self.prior_objective.kind, self.prior_objective.path)
        if SAMPLERS[self.prior_sampler].for_students:
            raise UserError(
                f"prior_sampler must be a sampler of the prior itself, got {self.prior_sampler!r}, which is "
                "for its student. Download the model again."
            )
        if len(self.decoder_temperatures) != 2 or not all(
            isinstance(t, int | float) and math.isfinite(t) and t > 0 for t in self.decoder_temperatures
        ):
            raise UserError(
                f"decoder_temperatures must be two numbers above 0, got {self.decoder_temperatures}. "
                "Download the model again."
            )
        if not self.decoder_shift > 0:
            raise UserError(
                f"decoder_shift must be above 0, got {self.decoder_shift}. Download the model again."
            )

    def completed(
        self, sampling: Sampling, students: Sampling = NO_STUDENTS, beyond: Sequence[str] = ()
    ) -> Sampling:
        """Complete sampling settings, with the model's defaults for those not given.

        ``sampling.completed`` describes ``students`` and ``beyond``. Raises ``UserError`` for a sampler that
        is incompatible with the model, and for a student's sampler together with what it does not support.
        """
        if not isinstance(sampling, Sampling):
            raise UserError(f"sampling must be a wuerstchen.Sampling, got a {type(sampling).__name__}.")
        if sampling.prior_sampler is not None:
            check_compatible(sampling.prior_sampler, self.prior_objective.kind, self.prior_objective.path)
        if sampling.decoder_sampler is not None:
            objective = self.decoder_objective
            check_compatible(sampling.decoder_sampler, objective.kind, objective.path, "decoder_sampler")
        return completed(sampling, self.full, students, beyond)

    @property
    def full(self) -> Sampling:
        """The complete sampling settings of the full networks."""
        return Sampling(
            guidance=self.prior_guidance,
            guidance_interval=self.prior_guidance_interval,
            prior_sampler=self.prior_sampler,
            prior_steps=self.prior_steps,
            decoder_steps=self.decoder_steps,
            decoder_sampler=samplers_for(self.decoder_objective.path)[0],
            decoder_shift=self.decoder_shift,
            decoder_guidance=self.decoder_guidance,
        )

    def canvas(self, width: int, height: int) -> tuple[int, int]:
        """The smallest canvas that works with the grids of all stages and contains an image of this size.

        The image is cropped from its center. Raises ``UserError`` for a size that is not supported.
        """
        multiple, most = self.size_multiple, MAX_SIDES * self.image_size
        for side in (width, height):
            if side < MIN_SIDE or side % SIDE_STEP or side > most:
                fit = min(max(round(side / SIDE_STEP) * SIDE_STEP, MIN_SIDE), most)
                raise UserError(
                    f"Sides of an image must be multiples of {SIDE_STEP} from {MIN_SIDE} to {most}, got "
                    f"{width}x{height}. Use {fit} in place of {side}."
                )
        return tuple(-(-side // multiple) * multiple for side in (width, height))

    @property
    def map_statistics(self) -> LatentStatistics:
        """The former name of ``latent_statistics``."""
        return self.latent_statistics

    def map_size(self, width: int, height: int) -> tuple[int, int]:
        """The former name of ``latent_size``."""
        return self.latent_size(width, height)

    def latent_size(self, width: int, height: int) -> tuple[int, int]:
        """Height and width of an image's semantic latents."""
        return latent_side(round(height * self.view_scale)), latent_side(round(width * self.view_scale))


PUBLISHED_V1 = CascadeSettings(
    image_size=512,
    latent_statistics=LatentStatistics(mean=(0.0,), std=(1.0,)),
    prior_steps=60,
    prior_equal_steps=True,
    prior_guidance=6.0,
    decoder_steps=8,
    decoder_guidance=2.0,
)
"""Würstchen v1 with its notebook's settings: Stage C works on the compressor's output."""


@dataclass(kw_only=True)
class OptionalParts:
    """The optional networks of a model. Missing ones are None."""

    compressor: Compressor | None = None
    prior: Prior | None = None
    prior_student: Prior | None = None
    """Samples like the guided prior in a few unguided steps, with the sampler ``few``. Its objective is that
    of the prior."""
    decoder_student: Decoder | None = None
    """Samples in a few steps, with the sampler ``few``. Its objective is that of the decoder."""
    previewer: Previewer | None = None
    text_encoder: TextEncoder | None = None
    decoder_text_encoder: TextEncoder | None = None
    """Stage B's text encoder, if it does not share Stage C's."""

    order: ClassVar[tuple[str, ...]] = (
        *("vqgan", "decoder", "compressor", "prior", "prior_student", "decoder_student", "previewer"),
        *("text_encoder", "decoder_text_encoder"),
    )
    """Names of the networks, in the order of ``networks``."""

    def networks(self) -> dict[str, torch.nn.Module]:
        """The networks that exist, by name."""
        return {name: getattr(self, name) for name in self.order if getattr(self, name) is not None}


@dataclass
class Cascade(OptionalParts):
    """The networks and settings of a model."""

    settings: CascadeSettings
    vqgan: VQGAN
    decoder: Decoder | Paella

    def __post_init__(self) -> None:
        """Raises ``UserError`` if the parts do not fit together."""
        decoder, text = self.decoder.config, self.text_encoder_of_decoder()
        if isinstance(self.decoder, Paella):
            latents = ("codes", self.vqgan.config.num_vq_embeddings, self.decoder.config.num_labels)
        else:
            latents = ("latent channels", self.vqgan.config.latent_channels, self.decoder.config.c_in)
        fits = [("vqgan", "decoder", *latents)]
        semantic: list[tuple[str, int]] = []  # parts with semantic latents, and their channels
        if isinstance(self.decoder, Paella) or any(self.decoder.config.conditioned):
            semantic.append(("decoder", decoder.effnet_embd))
        if self.compressor is not None:
            semantic.append(("compressor", self.compressor.config.c_latent))
        for name, prior in (("prior", self.prior), ("prior_student", self.prior_student)):
            if prior is None:
                continue
            semantic.append((name, prior.config.c_in))
            if self.text_encoder is not None:
                width = self.text_encoder.width
                fits.append(("text_encoder", name, "channels of text states", width, prior.config.c_cond))
        if text is not None and decoder.clip_embd is not None:
            fits.append(("text encoder", "decoder", "channels of text states", text.width, decoder.clip_embd))
        channels = len(self.settings.latent_statistics.mean)
        if channels > 1:
            semantic.append(("map_statistics", channels))  # its name in model.json
        for part, channels in semantic[1:]:
            first, expected = semantic[0]
            fits.append((part, first, "channels of semantic latents", channels, expected))
        for one, other, what, has, expected in fits:
            if has != expected:
                raise UserError(
                    f"The {one} has {has} {what}, but the {other} has {expected}. Both must come "
                    "from the same model. Download both again."
                )

        self._check_students()
        self._check_objectives()
        step = decoder.size_multiple * self.vqgan.config.factor
        if self.settings.size_multiple % step:
            raise UserError(
                f"size_multiple must be a multiple of {step} for the grids of the decoder and the vqgan, "
                f"got {self.settings.size_multiple}. Download the model again."
            )

    def _check_students(self) -> None:
        """Raises ``UserError`` for a student without its network, its steps or its shape."""
        if self.prior_student is not None and self.prior is None:
            raise UserError(
                "This model has a prior_student without its prior. The prior samples what the student does "
                "not support. Add the prior, or leave out both."
            )
        for name in ("prior_student", "decoder_student"):
            if getattr(self, name) is not None and not getattr(self.settings, f"{name}_steps"):
                raise UserError(
                    f"{name}_steps must be at least 1 for a model with a {name}, got 0. Download the model "
                    "again."
                )
        if self.decoder_student is not None:
            student, decoder = self.decoder_student.config, self.decoder.config
            if not isinstance(decoder, DecoderConfig) or dataclasses.replace(
                student, dropout=0.0
            ) != dataclasses.replace(decoder, dropout=0.0):
                raise UserError(
                    "The decoder_student and the decoder must have the same shape, got different ones. "
                    "Download both again."
                )

    def _check_objectives(self) -> None:
        """Raises ``UserError`` if a network was trained with another objective than the settings say."""
        settings = self.settings
        pairs: list[tuple[str, Prior | Decoder, Objective]] = []
        if self.prior is not None:
            pairs.append(("prior", self.prior, settings.prior_objective))
        if self.prior_student is not None:
            pairs.append(("prior_student", self.prior_student, settings.prior_objective))
        if isinstance(self.decoder, Decoder):
            pairs.append(("decoder", self.decoder, settings.decoder_objective))
        if self.decoder_student is not None:
            pairs.append(("decoder_student", self.decoder_student, settings.decoder_objective))
        for part, network, objective in pairs:
            if network.config.prediction != objective.kind:
                raise UserError(
                    f"The {part} predicts {network.config.prediction!r}, but "
                    f"{part.removesuffix('_student')}_objective is "
                    f"{objective.kind!r}. They must be the same. Download the model again."
                )

    @property
    def students(self) -> Sampling:
        """The sampling settings of the students that the model has, None for those of other networks."""
        found, settings = NO_STUDENTS, self.settings
        if self.prior_student is not None:
            steps = settings.prior_student_steps
            found = dataclasses.replace(found, guidance=1.0, prior_steps=steps, prior_sampler="few")
        if self.decoder_student is not None:
            steps = settings.decoder_student_steps
            found = dataclasses.replace(
                found, decoder_guidance=1.0, decoder_steps=steps, decoder_sampler="few"
            )
        return found

    def completed(self, sampling: Sampling, beyond: Sequence[str] = ()) -> Sampling:
        """Complete sampling settings, with those of the model's students and networks where they are None
        (``sampling.completed``)."""
        named = getattr(sampling, "decoder_sampler", None)  # other types are refused below
        if named is not None and isinstance(self.decoder, Paella):
            raise UserError(
                f"decoder_sampler {named} does not fit this model, whose Stage B samples "
                "tokens. Leave it out."
            )
        return self.settings.completed(sampling, self.students, beyond)

    def prior_for(self, sampling: Sampling) -> Prior:
        """The network that samples Stage C: with the sampler ``few`` the student, if there is one.

        The model must have a prior.
        """
        found = self.prior_student if sampling.prior_sampler == "few" else None
        found = found or self.prior
        assert found is not None
        return found

    def decoder_for(self, sampling: Sampling) -> Decoder | Paella:
        """The network that samples Stage B: with the sampler ``few`` the student, if there is one."""
        found = self.decoder_student if sampling.decoder_sampler == "few" else None
        return found or self.decoder

    def text_encoder_of_decoder(self) -> TextEncoder | None:
        """The text encoder that Stage B uses; None if it takes no text."""
        if self.decoder.config.clip_embd is None:
            return None
        return self.decoder_text_encoder or self.text_encoder

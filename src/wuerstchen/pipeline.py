"""From text to pictures, and from pictures through the map and back: pure steps, to be read from the top.

prompt → text states → Stage C: map (b, 16, h, w) → Stage B: latents (b, 4, H, W) → Stage A: pixels
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from wuerstchen.checkpoints.native import read_cascade
from wuerstchen.diffusion.samplers import ddpm, draw_noise, guided
from wuerstchen.diffusion.schedule import PUBLISHED_SCHEDULE, stage_c_timesteps, uniform_timesteps
from wuerstchen.errors import UserError, out_of_memory_named
from wuerstchen.images import center_crop_resize, to_images, to_tensor
from wuerstchen.models.cascade import Cascade
from wuerstchen.models.compressor import Compressor, compressor_input
from wuerstchen.models.prior import Prior
from wuerstchen.models.text import TextEncoder

BUNDLED = Path(__file__).parent / "bundled"
MAX_SEED = 2**32 - 1  # a CPU generator keeps 32 bits: larger seeds would repeat the noise of smaller ones
MAX_STEPS = 1000

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, steps done and steps in all."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sample. ``None`` stands for the model's own setting."""

    guidance: float | None = None
    """Guidance scale of Stage C; 1 is none."""
    prior_steps: int | None = None
    decoder_steps: int | None = None
    decoder_guidance: float | None = None
    decoder_shift: float | None = None
    """How far Stage B's steps lean towards noise; 1 is equal steps."""

    def __post_init__(self) -> None:
        for name in ("guidance", "decoder_guidance"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and 0 <= value <= 100):
                raise UserError(
                    f"{name} {value} must be a number from 0 to 100; 1 is no guidance, 4 is common"
                )
        if self.decoder_shift is not None and not 0 < self.decoder_shift <= 100:
            raise UserError(f"decoder_shift {self.decoder_shift} must be above 0 and at most 100; 1 is none")
        for name in ("prior_steps", "decoder_steps"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MAX_STEPS:
                raise UserError(f"{name} {value} must be from 1 to {MAX_STEPS}; 29 and 12 are common")


@dataclass(frozen=True)
class Reconstruction:
    """A picture, what Stages A and B make of its map, and how small that map is."""

    original: Image.Image
    image: Image.Image
    map_size: tuple[int, int, int]
    """Channels, height and width."""

    @property
    def spatial_compression(self) -> float:
        """How many times smaller a side of the map is than the picture's."""
        return self.original.height / self.map_size[1]

    @property
    def element_compression(self) -> float:
        """Numbers in the picture over numbers in the map."""
        return 3 * self.original.height * self.original.width / math.prod(self.map_size)


def load(model: str | Path | None = None, device: str | torch.device | None = None) -> "Wuerstchen":
    """Loads a model folder, or the bundled model when none is named, onto ``device`` (a GPU if there is one).

    Needs no network. Raises ``CheckpointError`` for a folder that is damaged or no model.
    """
    return Wuerstchen(read_cascade(BUNDLED if model is None else Path(model)), default_device(device))


def default_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for, or the first that is there: CUDA, Apple's MPS, the CPU."""
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # a build without CUDA asserts
            raise UserError(f"device {str(device)!r} is not there; use cpu, cuda or mps") from error
        if torch.device(device).type == "meta":
            raise UserError("device 'meta' computes nothing; use cpu, cuda or mps")
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


class Wuerstchen:
    """A model ready to draw. ``cascade`` holds its networks."""

    def __init__(self, cascade: Cascade, device: torch.device) -> None:
        self.cascade = cascade
        self.device = device
        for network in cascade.networks().values():
            network.to(device).eval()

    @torch.inference_mode()
    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        negative: str = "",
        seed: int | Sequence[int] = 0,
        count: int = 1,
        size: int | tuple[int, int] | None = None,
        sampling: Sampling | None = None,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> list[Image.Image]:
        """Draws ``count`` pictures of each prompt, in order: all of the first prompt, then the next.

        Picture number i of the call has seed ``seed + i``, or ``seed[i]`` of a list, and noise of its own:
        drawn alone with that seed it is the same picture, up to rounding. ``size`` is (width, height) in
        pixels or one number for both; ``negative`` is the text to steer away from. Raises ``UserError`` for
        what cannot be drawn.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        sampling = self._resolved(sampling or Sampling())
        width, height = self._checked_size(size)
        seeds = _checked_request(prompts, seed, count, batch_size)
        prior, text_encoder = self.cascade.prior, self.cascade.text_encoder
        if prior is None or text_encoder is None:
            raise UserError("this model has no Stage C or no text encoder; it reconstructs, but cannot draw")

        texts = [prompt for prompt in prompts for _ in range(count)]
        images: list[Image.Image] = []
        for start in range(0, len(texts), batch_size):
            batch = texts[start : start + batch_size]
            generators = _generators(seeds[start : start + batch_size])
            with out_of_memory_named(f"batch_size={len(batch)} at {width}x{height} pixels"):
                z = self._sample_map(
                    prior, text_encoder, batch, negative, (width, height), sampling, generators, progress
                )
                latents = self._sample_latents(z, batch, (width, height), sampling, generators, progress)
                images += to_images(self.cascade.vqgan.decode(latents).clamp(0, 1))
        return images

    @torch.inference_mode()
    def reconstruct(
        self,
        image: Image.Image,
        *,
        seed: int = 0,
        size: int | None = None,
        sampling: Sampling | None = None,
        progress: Progress | None = None,
    ) -> Reconstruction:
        """Squeezes a picture (centre crop to a square) through the semantic map and back."""
        (result,) = self.reconstruct_batch(
            [image], seeds=[seed], size=size, sampling=sampling, progress=progress
        )
        return result

    @torch.inference_mode()
    def reconstruct_batch(
        self,
        images: Sequence[Image.Image],
        *,
        seeds: Sequence[int],
        size: int | None = None,
        sampling: Sampling | None = None,
        progress: Progress | None = None,
    ) -> list[Reconstruction]:
        """``reconstruct`` for several pictures at once, each with a seed and noise of its own."""
        compressor = self.cascade.compressor
        if compressor is None:
            raise UserError("this model has no compressor, so it cannot encode pictures; use one that has")
        sampling = self._resolved(sampling or Sampling())
        side, _ = self._checked_size(size)
        generators = _generators(_checked_request([""] * len(images), seeds, 1, len(images)))
        originals = [center_crop_resize(image, side) for image in images]
        with out_of_memory_named(f"batch_size={len(images)} at {side}x{side} pixels"):
            pixels = torch.stack([to_tensor(original) for original in originals])
            z = self.encode(compressor, pixels.to(self.device))
            latents = self._sample_latents(
                z, [""] * len(images), (side, side), sampling, generators, progress
            )
            results = to_images(self.cascade.vqgan.decode(latents).clamp(0, 1))
        map_size = (z.shape[1], z.shape[2], z.shape[3])
        return [
            Reconstruction(original=original, image=result, map_size=map_size)
            for original, result in zip(originals, results, strict=True)
        ]

    def settings_of(self, sampling: Sampling) -> dict[str, float]:
        """The sampling settings in full, as they are recorded with a picture."""
        return dataclasses.asdict(self._resolved(sampling))

    def encode(self, compressor: Compressor, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c mh mw"]:
        """The semantic map of pictures in [0, 1], as Stage B reads it."""
        return compressor(compressor_input(pixels, self.cascade.settings.view_scale))

    def _sample_map(
        self,
        prior: Prior,
        text_encoder: TextEncoder,
        prompts: list[str],
        negative: str,
        size: tuple[int, int],
        sampling: Sampling,
        generators: list[torch.Generator],
        progress: Progress | None,
    ) -> Float[Tensor, "b c mh mw"]:
        """Stage C: the semantic map that the texts describe, in Stage B's units."""
        assert sampling.guidance is not None
        assert sampling.prior_steps is not None
        settings = self.cascade.settings

        guides = sampling.guidance != 1
        encoded = text_encoder.encode(prompts + [negative] * len(prompts) if guides else prompts)
        context = prior.context(encoded.states, encoded.mask if settings.text_mask else None)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            return prior(x, t, context)

        shape = (prior.config.c_in, *settings.map_size(*size))
        sample = ddpm(
            guided(predict, sampling.guidance) if guides else predict,
            draw_noise(shape, generators).to(self.device),
            stage_c_timesteps(sampling.prior_steps),
            generators,
            PUBLISHED_SCHEDULE,
            _reporter(progress, "Stage C", sampling.prior_steps),
        )
        return settings.map_statistics.restore(sample)

    def _sample_latents(
        self,
        z: Float[Tensor, "b c mh mw"],
        prompts: list[str],
        size: tuple[int, int],
        sampling: Sampling,
        generators: list[torch.Generator],
        progress: Progress | None,
    ) -> Float[Tensor, "b 4 h w"]:
        """Stage B: Stage A's latents of the picture that the map describes."""
        assert sampling.decoder_guidance is not None
        assert sampling.decoder_steps is not None
        assert sampling.decoder_shift is not None
        decoder = self.cascade.decoder
        factor = self.cascade.vqgan.config.factor
        grid = (size[1] // factor, size[0] // factor)

        guides = sampling.decoder_guidance != 1
        if guides:
            z, prompts = torch.cat([z, torch.zeros_like(z)]), prompts + [""] * len(prompts)
        states = mask = None
        encoder = self.cascade.text_encoder_of_decoder()
        if encoder is not None:
            text = encoder.encode(prompts)
            states, mask = text.states, text.mask if self.cascade.settings.text_mask else None
        context = decoder.context(z, grid, states, mask)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            return decoder(x, t, context)

        return ddpm(
            guided(predict, sampling.decoder_guidance) if guides else predict,
            draw_noise((decoder.config.c_in, *grid), generators).to(self.device),
            uniform_timesteps(sampling.decoder_steps, sampling.decoder_shift),
            generators,
            PUBLISHED_SCHEDULE,
            _reporter(progress, "Stage B", sampling.decoder_steps),
        )

    def _resolved(self, sampling: Sampling) -> Sampling:
        """Fills what was left open from the model's settings."""
        own = self.cascade.settings
        return Sampling(
            guidance=own.prior_guidance if sampling.guidance is None else sampling.guidance,
            prior_steps=sampling.prior_steps or own.prior_steps,
            decoder_steps=sampling.decoder_steps or own.decoder_steps,
            decoder_shift=sampling.decoder_shift or own.decoder_shift,
            decoder_guidance=(
                own.decoder_guidance if sampling.decoder_guidance is None else sampling.decoder_guidance
            ),
        )

    def _checked_size(self, size: int | tuple[int, int] | None) -> tuple[int, int]:
        settings = self.cascade.settings
        if size is None:
            size = settings.image_size
        width, height = (size, size) if isinstance(size, int) else size
        settings.check_size(width, height)
        return width, height


def check_seed(seed: int, pictures: int) -> None:
    """Raises ``UserError`` unless ``seed`` and those of the pictures after it can be used."""
    if not 0 <= seed <= MAX_SEED - pictures + 1:
        raise UserError(
            f"seed {seed} must be from 0 to {MAX_SEED}, and so must those of the pictures after it; "
            "use another"
        )


def _checked_request(
    prompts: list[str], seed: int | Sequence[int], count: int, batch_size: int
) -> Sequence[int]:
    """The seed of each picture. Raises ``UserError`` for what asks for no picture or an impossible one."""
    if not prompts:
        raise UserError("no prompt was given, so there is nothing to draw; give at least one")
    if count < 1:
        raise UserError(f"count {count} draws nothing; use at least 1")
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size} draws nothing; use at least 1")
    pictures = count * len(prompts)
    if isinstance(seed, int):
        check_seed(seed, pictures)
        return range(seed, seed + pictures)
    if len(seed) != pictures:
        raise UserError(f"{len(seed)} seeds do not fit {pictures} pictures; give one for each, or one number")
    for one in seed:
        check_seed(one, 1)
    return seed


def _generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _reporter(progress: Progress | None, stage: str, steps: int) -> Callable[[int, Tensor], None] | None:
    return None if progress is None else lambda step, _: progress(stage, step + 1, steps)

"""Morphs: images between two prompts, two images or two seeds, each of them sampled."""

import dataclasses
import math
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor

from wuerstchen.diffusion.known_cells import Known
from wuerstchen.diffusion.morphs import slerp
from wuerstchen.diffusion.sampler_table import samplers_for
from wuerstchen.errors import UserError, shown
from wuerstchen.images import upright_rgb
from wuerstchen.models.cascade import Cascade
from wuerstchen.models.text import TextStates
from wuerstchen.sampling import MORPH, Sampling, check_seed, checked_strength, checked_texts
from wuerstchen.sampling_batch import Begin, KnownParts, Morph, Progress, SamplingBatch

MAX_FRAMES = 1000


@dataclass(frozen=True, kw_only=True)
class MorphRequest:
    """What a caller asks for (``Wuerstchen.morph``)."""

    start: Any
    end: Any
    frames: Any
    negative: Any
    seed: Any
    end_seed: Any
    size: Any
    strength: Any
    sampling: Sampling | None
    batch_size: Any
    progress: Progress | None


@runtime_checkable
class MorphModel(Protocol):
    """What a morph needs of a model."""

    cascade: Cascade
    device: torch.device

    def _check_stage_c(self) -> None: ...

    def _completed(self, sampling: Sampling, negatives: Any, edits: bool, what: str = ...) -> Sampling: ...

    def _from_scratch(self, inits: Any, size: Any) -> list[Begin]: ...

    def _encode_prompts(self, batch: SamplingBatch) -> TextStates: ...

    def _sample_prior(self, batch: SamplingBatch, text: TextStates) -> Tensor: ...

    def _sampled(self, batch: SamplingBatch) -> list[Image.Image]: ...


def morph_frames(model: MorphModel, request: MorphRequest) -> list[Image.Image]:
    """The frames of a morph. Raises ``UserError`` for an invalid request."""
    model._check_stage_c()
    texts, images = _ends(request)
    negatives = checked_texts(request.negative, "negative")
    if len(negatives) != 1:
        raise UserError(f"negative must be one text, got {len(negatives)}. A morph has one for all frames.")
    sampling = model._completed(calm_sampling(model.cascade, request.sampling), negatives, True, MORPH)
    seed = int(request.seed)
    end_seed = seed if request.end_seed is None else int(request.end_seed)
    strength = checked_strength(request.strength, is_edit=False)
    begins = model._from_scratch([image for image in images if image is not None], request.size)
    batch = SamplingBatch(
        prompts=[texts[0]],
        negatives=negatives,
        seeds=[seed],
        size=begins[0].size,
        canvas=begins[0].canvas,
        sampling=sampling,
        progress=request.progress,
    )
    ends = None
    if any(image is not None for image in images):
        given = iter(begins)
        ends = [
            _latents_of(model, batch, text, seed) if image is None else next(given).init_latents
            for text, image, seed in zip(texts, images, (seed, end_seed), strict=True)
        ]
    weights = torch.linspace(0, 1, int(request.frames), dtype=torch.float32, device="cpu")
    frames: list[Image.Image] = []
    for part in weights.split(int(request.batch_size)):
        count = len(part)
        morph = Morph(prompts=[texts[1]] * count, seeds=[end_seed] * count, weights=part)
        frames += model._sampled(
            dataclasses.replace(
                batch,
                prompts=[texts[0]] * count,
                negatives=negatives * count,
                seeds=[seed] * count,
                morph=morph,
                known=None if ends is None else _between(ends, part, strength, model.device),
                strength=1.0 if ends is None else max(strength, 1e-3),
            )
        )
    return frames


def _ends(request: MorphRequest) -> tuple[list[str], list[Image.Image | None]]:
    """The prompts of both ends, and their images. Images have an empty prompt. Checks the numbers too."""
    for name, most in (("frames", MAX_FRAMES), ("batch_size", MAX_FRAMES)):
        value, least = getattr(request, name), 2 if name == "frames" else 1
        if not isinstance(value, Integral) or isinstance(value, bool) or not least <= value <= most:
            raise UserError(f"{name} must be an integer from {least} to {most}, got {value!r}.")
    check_seed(request.seed, 1)
    if request.end_seed is not None:
        check_seed(request.end_seed, 1, "end_seed")
    texts: list[str] = []
    images: list[Image.Image | None] = []
    for name in ("start", "end"):
        value = getattr(request, name)
        if not isinstance(value, str | Image.Image):
            raise UserError(f"{name} must be a prompt or a PIL image, got {type(value)}.")
        texts.append(value if isinstance(value, str) else "")
        images.append(None if isinstance(value, str) else upright_rgb(value, name))
    same_text = isinstance(request.start, str) and request.start == request.end
    if same_text and request.end_seed in (None, request.seed):
        raise UserError(
            f"start and end are the same prompt with the same seed: {shown(request.start)}. Pass another "
            "end_seed, or another prompt."
        )
    return texts, images


def calm_sampling(cascade: Cascade, sampling: Sampling | None) -> Sampling:
    """The settings of a morph: by default with a sampler of Stage C without fresh noise."""
    sampling = sampling or Sampling()
    if sampling.prior_sampler is not None:
        return sampling
    fitting = samplers_for(cascade.settings.prior_objective.path)
    calm = next(name for name in ("dpm", "euler") if name in fitting)
    return dataclasses.replace(sampling, prior_sampler=calm)


def _latents_of(model: MorphModel, batch: SamplingBatch, text: str, seed: int) -> Tensor:
    """Stage C's normalized sample of a prompt."""
    batch = dataclasses.replace(batch, prompts=[text], seeds=[seed])
    z = model._sample_prior(batch, model._encode_prompts(batch))
    return model.cascade.settings.latent_statistics.normalise(z)


def _between(ends: list[Any], weights: Tensor, strength: float, device: torch.device) -> KnownParts:
    """Semantic latents between those of the ends. Both ends stay as they are."""
    first, last = (end.cpu().expand(len(weights), -1, -1, -1) for end in ends)
    clean = slerp(first, last, weights)
    strengths = [strength * math.sin(math.pi * weight) for weight in weights.tolist()]
    strengths = [0.0 if value < 1e-6 else value for value in strengths]
    cells = torch.tensor(strengths, dtype=torch.float32, device="cpu").view(-1, 1, 1)
    cells = cells.expand(-1, *clean.shape[2:]).contiguous()
    return KnownParts(Known(clean.to(device), cells.to(device)))

"""Images of a subject's class that the model draws itself, for prior preservation (arXiv 2208.12242).

An adapter that learns one dog also changes all others. Training on images of dogs that the untrained adapter
draws prevents it. Only Stage C draws them: updates read semantic latents.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from wuerstchen.data.plan import stable_hash
from wuerstchen.models.cascade import Cascade, CascadeSettings
from wuerstchen.models.prior import Prior
from wuerstchen.models.text import TextStates
from wuerstchen.progress_bar import bar
from wuerstchen.train.feed.random import ImageRandom
from wuerstchen.train.stages.base import Run, autocast
from wuerstchen.train.stages.few import teacher_times, trajectories

_TOGETHER = 16  # images drawn at a time
_STEPS = 16  # by a sampler of second order


@dataclass(frozen=True)
class ClassImages:
    """The semantic latents of drawn images, and their prompt."""

    latents: Float[Tensor, "n c h w"]
    """Normalised."""
    text: TextStates
    """The prompt that they were drawn for, (1, t, d)."""


@torch.no_grad()
def draw_class_images(run: Run, prior: Prior, model: Cascade, dtype: torch.dtype | None) -> ClassImages:
    """Draws the images of ``recipe.stage_lora`` with the ``prior`` and the guidance of the ``model``.

    They are stored in the run folder for later starts. ``dtype`` is that of autocast.
    """
    config, settings, device = run.recipe.stage_lora, model.settings, run.device
    assert model.text_encoder is not None
    encoder = model.text_encoder.to(device)
    with autocast(device, dtype):
        text = encoder.encode([config.class_prompt, ""])
    encoder.to("cpu" if device.type != "cpu" else device)
    size = config.image_size or settings.image_size
    shape = (prior.config.c_in, *settings.latent_size(size, size))
    prior.to(device)

    def draw() -> dict[str, Tensor]:
        seed = stable_hash(run.recipe.seed, "class images") >> 1
        numbers = torch.arange(config.class_images, device=device).split(_TOGETHER)
        drawn = [
            _samples(prior, settings, text, ImageRandom(seed, some).normal("noise", shape), dtype)
            for some in bar(numbers, desc=f"drawing images of {config.class_prompt!r}", leave=False)
        ]
        return {"latents": torch.cat(drawn)}

    of_rehearsals = {"latents": torch.zeros(config.class_images, *shape, dtype=torch.float32, device="cpu")}
    latents = run.tensors_once("stage_lora/class_images.safetensors", draw, of_rehearsals)["latents"]
    return ClassImages(latents.to(device), _row(text, 0, 1))


def _row(text: TextStates, number: int, count: int) -> TextStates:
    """One text of several, ``count`` times."""
    states, mask = (tensor[number : number + 1] for tensor in (text.states, text.mask))
    return TextStates(states=states.float().expand(count, -1, -1), mask=mask.expand(count, -1))


def _samples(
    prior: Prior,
    settings: CascadeSettings,
    text: TextStates,
    noise: Float[Tensor, "b c h w"],
    dtype: torch.dtype | None,
) -> Float[Tensor, "b c h w"]:
    """Samples of the first of two texts, guided away from the second one."""
    objective, count = settings.prior_objective, len(noise)
    points = trajectories(
        prior,
        objective,
        _row(text, 0, count),
        _row(text, 1, count),
        noise,
        teacher_times(objective, _STEPS),
        masks=settings.text_mask,
        guidance=settings.prior_guidance,
        interval=settings.prior_guidance_interval,
        dtype=dtype,
    )
    return points[:, -1]


def class_inputs(drawn: ClassImages, rows: Tensor, *, masks: bool) -> dict[str, Tensor]:
    """What an update reads of these images. ``masks`` is whether attention ignores padding."""
    text = _row(drawn.text, 0, len(rows))
    inputs = {"x": drawn.latents[rows], "states": text.states}
    return {**inputs, "mask": text.mask} if masks else inputs

"""Noise on discrete tokens, and their sampler (Paella, arXiv 2211.07292), for Stage B of v1.

Noising replaces tokens by random ones: at time t in [0, 1], a fraction t of the tokens is replaced.
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from wuerstchen.diffusion.samplers import OnStep
from wuerstchen.errors import UserError

PredictLogits = Callable[[Tensor, Tensor], Tensor]
"""(tokens: b h w, t: b) → logits: b labels h w."""

POSITIONS = 1024
"""Number of positions to sample at once: 32 MiB per intermediate tensor with 8192 labels in fp32."""


def draw_tokens(
    shape: Sequence[int], labels: int, generators: Sequence[torch.Generator]
) -> Int[Tensor, "b ..."]:
    """Uniformly random tokens below ``labels``, for one image from each generator, on its device."""
    images = [torch.randint(labels, tuple(shape), generator=g, device=g.device) for g in generators]
    return torch.stack(images)


def add_noise(
    tokens: Int[Tensor, "b h w"],
    noise: Int[Tensor, "b h w"],
    t: Float[Tensor, " b"],
    u: Float[Tensor, "b h w"],
) -> tuple[Int[Tensor, "b h w"], Bool[Tensor, "b h w"]]:
    """Tokens at time ``t``, and the mask of those replaced by ``noise``: u ≤ t, with u uniform in [0, 1)."""
    mask = u <= t[:, None, None]
    return torch.where(mask, noise, tokens), mask


def loss_weight(t: Float[Tensor, " b"], mask: Bool[Tensor, "b h w"]) -> Float[Tensor, "b h w"]:
    """The weight of each position in the loss: 1 if it was noised, 0.3 + 0.7·t if it must be kept."""
    return torch.where(mask, 1.0, (0.3 + 0.7 * t)[:, None, None])


def draw_labels(
    logits: Float[Tensor, "b labels h w"], temperature: float, u: Float[Tensor, "b h w"]
) -> Int[Tensor, "b h w"]:
    """Samples a label per position from softmax(logits / temperature): where its cumulative sum exceeds
    ``u``.

    ``u`` is uniform in [0, 1). One random number per position costs far less than ``torch.multinomial``,
    which needs one per logit. The result is the same on any device and in any chunks, except for rounding.
    Raises ``UserError`` for logits that are not finite.
    """
    exact = torch.promote_types(logits.dtype, torch.float32)
    images = []
    for image, numbers in zip(logits, u, strict=True):
        drawn = []
        rows = image.flatten(1).T.split(POSITIONS)
        for chunk, goals in zip(rows, numbers.flatten().split(POSITIONS), strict=True):
            sums = (chunk.to(exact) / temperature).softmax(dim=1).cumsum(dim=1)
            total = sums[:, -1:]
            if not total.isfinite().all():
                raise UserError(
                    "The network's logits are not finite, so no token can be sampled. "
                    "Check its weights, and use fp32 or bf16 instead of fp16."
                )
            # The sums end at 1 only up to rounding. u·total stays below total, so a label is always found.
            drawn.append(torch.searchsorted(sums, goals[:, None].to(exact) * total, right=True)[:, 0])
        images.append(torch.cat(drawn).unflatten(0, image.shape[1:]))
    return torch.stack(images)


def sample_tokens(
    predict: PredictLogits,
    noise: Int[Tensor, "b h w"],
    timesteps: Sequence[float],
    generators: Sequence[torch.Generator],
    temperatures: tuple[float, float] = (1.0, 0.6),
    on_step: OnStep | None = None,
) -> Int[Tensor, "b h w"]:
    """Samples tokens along decreasing ``timesteps`` from 1 to 0, starting from ``noise`` (``draw_tokens``).

    Each step samples every token again from the prediction. Between steps the result is noised to the time of
    the next step, always with the same ``noise``. The temperature goes linearly from the first to the second
    of ``temperatures``. Guidance works on logits as on predicted noise: wrap ``predict`` in
    ``samplers.guided``. The original's notebook uses 8 steps, temperatures 1 to 0.6 and guidance 2. The
    defaults of its function are 12 steps, temperatures 0.7 to 0.3 and guidance 8.

    An image depends only on its own generator, not on the rest of the batch. ``on_step`` gets the tokens
    before they are noised again.
    """
    if not all(math.isfinite(value) and value > 0 for value in temperatures):
        raise UserError(
            f"temperatures must be finite numbers above 0, got {temperatures}. (1.0, 0.6) is common."
        )
    times = torch.tensor(list(timesteps), dtype=torch.float32, device=noise.device)
    steps = len(times) - 1

    def draw_uniform() -> Tensor:
        images = [
            torch.rand(noise.shape[1:], generator=g, device=g.device, dtype=torch.float32) for g in generators
        ]
        return torch.stack(images).to(noise.device)

    tokens = noise
    for step, temperature in enumerate(
        torch.linspace(*temperatures, steps, dtype=torch.float32, device="cpu").tolist()
    ):
        now = times[step].expand(len(noise))
        if step > 0:
            tokens, _ = add_noise(tokens, noise, now, draw_uniform())
        tokens = draw_labels(predict(tokens, now), temperature, draw_uniform())
        if on_step is not None:
            on_step(step, tokens)
    return tokens

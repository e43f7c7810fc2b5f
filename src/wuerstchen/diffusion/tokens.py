"""Noise on discrete tokens and the sampler that takes it away (Paella, arXiv 2211.07292), for Stage B of v1.

A token is noised by putting a random one in its place, not by adding to it: at time t in [0, 1] that has
happened to a share t of the tokens.
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
"""How many positions are drawn at once: 32 MiB an intermediate result with 8192 labels in fp32."""


def draw_tokens(
    shape: Sequence[int], labels: int, generators: Sequence[torch.Generator]
) -> Int[Tensor, "b ..."]:
    """Tokens at random below ``labels``, one picture from each generator, on the generators' device."""
    pictures = [torch.randint(labels, tuple(shape), generator=g, device=g.device) for g in generators]
    return torch.stack(pictures)


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
    """What a position counts in training: 1 where it was noised, 0.3 + 0.7·t where it only has to be kept."""
    return torch.where(mask, 1.0, (0.3 + 0.7 * t)[:, None, None])


def draw_labels(
    logits: Float[Tensor, "b labels h w"], temperature: float, u: Float[Tensor, "b h w"]
) -> Int[Tensor, "b h w"]:
    """A label at each position from softmax(logits / temperature): where its cumulative sum exceeds ``u``.

    ``u`` is uniform in [0, 1). One number a position costs far less than the noise on every logit that
    ``torch.multinomial`` draws, and makes the result the same whichever device and chunks it is computed on,
    but for rounding. Raises ``UserError`` for logits that are not finite.
    """
    exact = torch.promote_types(logits.dtype, torch.float32)
    pictures = []
    for picture, numbers in zip(logits, u, strict=True):
        drawn = []
        rows = picture.flatten(1).T.split(POSITIONS)
        for chunk, goals in zip(rows, numbers.flatten().split(POSITIONS), strict=True):
            sums = (chunk.to(exact) / temperature).softmax(dim=1).cumsum(dim=1)
            total = sums[:, -1:]
            if not total.isfinite().all():
                raise UserError(
                    "the network's logits are not finite, so no token can be drawn; "
                    "check its weights, and use fp32 or bf16 in place of fp16"
                )
            # The sums end at 1 only up to rounding. u·total stays below total, so a label is always found.
            drawn.append(torch.searchsorted(sums, goals[:, None].to(exact) * total, right=True)[:, 0])
        pictures.append(torch.cat(drawn).unflatten(0, picture.shape[1:]))
    return torch.stack(pictures)


def sample_tokens(
    predict: PredictLogits,
    noise: Int[Tensor, "b h w"],
    timesteps: Sequence[float],
    generators: Sequence[torch.Generator],
    temperatures: tuple[float, float] = (1.0, 0.6),
    on_step: OnStep | None = None,
) -> Int[Tensor, "b h w"]:
    """Draws tokens along ``timesteps``, which fall from 1 to 0, starting from ``noise`` (``draw_tokens``).

    Each step draws every token anew from the prediction. Between steps the result is noised to the time of
    the next, always with the same ``noise``. The temperature goes evenly from the first to the second of
    ``temperatures``. Guidance mixes logits as it mixes predicted noise: wrap ``predict`` in
    ``samplers.guided``. The original's notebook takes 8 steps, temperatures 1 to 0.6 and guidance 2; its
    function alone defaults to 12 steps, temperatures 0.7 to 0.3 and guidance 8.

    A picture depends on its own generator alone, never on its batch. ``on_step`` gets the tokens before they
    are noised again.
    """
    if not all(math.isfinite(value) and value > 0 for value in temperatures):
        raise UserError(f"temperatures={temperatures} must be finite numbers above 0; use (1.0, 0.6)")
    times = torch.tensor(list(timesteps), dtype=torch.float32, device=noise.device)
    steps = len(times) - 1

    def draw_uniform() -> Tensor:
        pictures = [
            torch.rand(noise.shape[1:], generator=g, device=g.device, dtype=torch.float32) for g in generators
        ]
        return torch.stack(pictures).to(noise.device)

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

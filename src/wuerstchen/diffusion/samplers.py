"""Samplers: short functions from noise to a sample, over any callable that predicts the noise."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from wuerstchen.diffusion.schedule import CosineSchedule
from wuerstchen.diffusion.transfer import sent
from wuerstchen.errors import UserError

PredictNoise = Callable[[Tensor, Tensor], Tensor]
"""(x: b c h w, t: b) → ε̂: b c h w."""

OnStep = Callable[[int, Tensor], None]
"""Called after each step with its number (from 0) and the sample."""


PriorSampler = Literal["ddpm", "dpm"]
"""How Stage C goes from noise to a map: by ``ddpm``, or by ``dpm_solver``."""


def check_prior_sampler(name: str) -> None:
    """Raises ``UserError`` for a word that is no ``PriorSampler``."""
    if name not in get_args(PriorSampler):
        raise UserError(f"prior_sampler={name!r} is unknown; use one of {', '.join(get_args(PriorSampler))}")


def draw_noise(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Float[Tensor, "b ..."]:
    """Standard normal noise, one picture from each generator, on the generators' device in fp32.

    A picture's noise depends on its own generator alone, never on the batch it is drawn in.
    """
    return torch.stack(
        [torch.randn(tuple(shape), generator=g, device=g.device, dtype=torch.float32) for g in generators]
    )


def guided(predict: PredictNoise, scale: float) -> PredictNoise:
    """Classifier-free guidance (arXiv 2207.12598): ε̂ = lerp(ε̂_uncond, ε̂_cond, scale).

    ``predict`` is asked once a step for a batch of twice the size: the pictures with their condition, then
    the same without. Small networks take hardly longer for both than for one.
    """

    def both(x: Tensor, t: Tensor) -> Tensor:
        conditional, unconditional = predict(torch.cat([x, x]), torch.cat([t, t])).chunk(2)
        return torch.lerp(unconditional, conditional, scale)

    return both


def ddpm(
    predict: PredictNoise,
    x: Float[Tensor, "b c h w"],
    timesteps: Sequence[float],
    generators: Sequence[torch.Generator],
    schedule: CosineSchedule,
    on_step: OnStep | None = None,
) -> Float[Tensor, "b c h w"]:
    """Ancestral sampling (arXiv 2006.11239, algorithm 2) along ``timesteps``, which fall from noise to 0.

    From t to t', with α = ᾱ(t)/ᾱ(t'):
    μ = (x − (1 − α)·ε̂ / √(1 − ᾱ(t))) / √α and x' = μ + √((1 − α)(1 − ᾱ(t'))/(1 − ᾱ(t)))·z.
    The last step, to t' = 0, adds no noise; it still draws, as the published scheduler does.
    """
    times = sent(torch.tensor(list(timesteps), dtype=torch.float32, device="cpu"), x.device)
    alpha_bars = schedule.alpha_bar(times)
    now, then = alpha_bars[:-1], alpha_bars[1:]
    alpha = now / then
    std = ((1 - alpha) * (1 - then) / (1 - now)).sqrt() * (times[1:] != 0)
    loss, left, root = 1 - alpha, (1 - now).sqrt(), alpha.sqrt()
    for step in range(len(times) - 1):
        noise_pred = predict(x, times[step].expand(len(x)))
        mean = (x - loss[step] * noise_pred / left[step]) / root[step]
        x = mean + std[step] * sent(draw_noise(x.shape[1:], generators), x.device, x.dtype)
        if on_step is not None:
            on_step(step, x)
    return x


def ddim(
    predict: PredictNoise,
    x: Float[Tensor, "b c h w"],
    timesteps: Sequence[float],
    schedule: CosineSchedule,
    on_step: OnStep | None = None,
) -> Float[Tensor, "b c h w"]:
    """Deterministic sampling (arXiv 2010.02502, equation 12 with η = 0) along falling ``timesteps``."""
    times = sent(torch.tensor(list(timesteps), dtype=torch.float32, device="cpu"), x.device)
    alpha_bars = schedule.alpha_bar(times)
    for step in range(len(times) - 1):
        noise_pred = predict(x, times[step].expand(len(x)))
        now, then = alpha_bars[step], alpha_bars[step + 1]
        clean = (x - (1 - now).sqrt() * noise_pred) / now.sqrt()
        x = then.sqrt() * clean + (1 - then).sqrt() * noise_pred
        if on_step is not None:
            on_step(step, x)
    return x


def dpm_solver(
    predict: PredictNoise,
    x: Float[Tensor, "b c h w"],
    timesteps: Sequence[float],
    schedule: CosineSchedule,
    on_step: OnStep | None = None,
) -> Float[Tensor, "b c h w"]:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): deterministic, second order, one prediction a step.

    With λ = ½·ln(ᾱ/(1 − ᾱ)), h = λ(t') − λ(t) and x̂₀ the predicted picture:
    x' = √((1 − ᾱ')/(1 − ᾱ))·x + √ᾱ'·(1 − e^−h)·D, with D = x̂₀ + (h/2h₋)·(x̂₀ − x̂₀₋), where the minus stands
    for the step before. The first step and the last, which goes to the picture itself, have D = x̂₀.
    """
    times = torch.tensor(list(timesteps), dtype=torch.float32, device="cpu")
    alpha_bars = schedule.alpha_bar(times.double()).tolist()
    logs = [math.log(a / (1 - a)) / 2 for a in alpha_bars]
    times = sent(times, x.device)
    before: Tensor | None = None
    for step in range(len(times) - 1):
        now, then, h = alpha_bars[step], alpha_bars[step + 1], logs[step + 1] - logs[step]
        noise_pred = predict(x, times[step].expand(len(x)))
        clean = (x - math.sqrt(1 - now) * noise_pred) / math.sqrt(now)
        direction = clean
        if before is not None and step + 2 < len(times):
            h_before = logs[step] - logs[step - 1]
            if h_before > 0:  # near its ends the schedule is cut, and steps there are none
                direction = clean + h / (2 * h_before) * (clean - before)
        x = math.sqrt((1 - then) / (1 - now)) * x - math.sqrt(then) * math.expm1(-h) * direction
        before = clean
        if on_step is not None:
            on_step(step, x)
    return x

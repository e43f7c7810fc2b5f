"""Samplers: short functions from noise to a sample, for any callable that predicts.

All have the same signature: ``predict``, the noise to start from, decreasing timesteps from noise to 0, a
random generator per image, the objective that ``predict`` was trained with, and ``on_step``. Deterministic
samplers ignore the generators. ``sampler_table.py`` lists them by name.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from wuerstchen.device import to_device
from wuerstchen.diffusion.objective import Objective

Predict = Callable[[Tensor, Tensor], Tensor]
"""(x: b c h w, t: b, or b h w for a time per cell) → a prediction in terms of the objective: b c h w."""

OnStep = Callable[[int, Tensor], None]
"""Called after each step with its index and the sample, which it may change in place."""


def draw_noise(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Float[Tensor, "b ..."]:
    """Standard normal noise, for one image from each generator, on the generators' device in fp32.

    An image's noise depends only on its own generator, not on the rest of the batch.
    """
    return torch.stack(
        [torch.randn(tuple(shape), generator=g, device=g.device, dtype=torch.float32) for g in generators]
    )


def guided(predict: Predict, scale: float) -> Predict:
    """Classifier-free guidance (arXiv 2207.12598) of noise or velocity: lerp(uncond, cond, scale).

    ``predict`` runs once per step on twice the batch: the conditional images, then the unconditional ones.
    Small networks take hardly longer for both than for one.
    """

    def both(x: Tensor, t: Tensor) -> Tensor:
        conditional, unconditional = predict(torch.cat([x, x]), torch.cat([t, t])).chunk(2)
        return torch.lerp(unconditional, conditional, scale)

    return both


def guided_within(
    guided: Predict,
    unguided: Predict,
    interval: tuple[float, float],
    timesteps: Sequence[float],
    on_step: OnStep | None = None,
) -> tuple[Predict, OnStep]:
    """Guidance in an interval of times (arXiv 2404.07724): ``guided`` in it, ``unguided`` before and after.

    Returns the prediction and the ``on_step`` to pass to a sampler with ``timesteps``. The second one counts
    the steps, so that the choice does not wait for times on a GPU.
    """
    low, high, *times = torch.tensor([*interval, *timesteps], dtype=torch.float32, device="cpu").tolist()
    choices = [guided if low <= t <= high else unguided for t in times]
    steps = 0

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return choices[steps](x, t)

    def after_step(step: int, x: Tensor) -> None:
        nonlocal steps
        steps = step + 1
        if on_step is not None:
            on_step(step, x)

    return predict, after_step


def ddpm(
    predict: Predict,
    x: Float[Tensor, "b c h w"],
    timesteps: Sequence[float],
    generators: Sequence[torch.Generator],
    objective: Objective,
    on_step: OnStep | None = None,
) -> Float[Tensor, "b c h w"]:
    """Ancestral sampling (arXiv 2006.11239, algorithm 2) along decreasing ``timesteps`` from noise to 0.

    From t to t', with α = ᾱ(t)/ᾱ(t'):
    μ = (x − (1 − α)·ε̂ / √(1 − ᾱ(t))) / √α and x' = μ + √((1 − α)(1 − ᾱ(t'))/(1 − ᾱ(t)))·z.
    The last step, to t' = 0, adds no noise, but advances the generators, as the published scheduler does.
    """
    times = to_device(torch.tensor(list(timesteps), dtype=torch.float32, device="cpu"), x.device)
    alpha_bars = objective.alpha_bar(times)
    now, then = alpha_bars[:-1], alpha_bars[1:]
    alpha = now / then
    std = ((1 - alpha) * (1 - then) / (1 - now)).sqrt() * (times[1:] != 0)
    loss, left, root = 1 - alpha, (1 - now).sqrt(), alpha.sqrt()
    for step in range(len(times) - 1):
        t = times[step].expand(len(x))
        noise_pred = objective.to_noise(predict(x, t), x, t)
        mean = (x - loss[step] * noise_pred / left[step]) / root[step]
        x = mean + std[step] * to_device(draw_noise(x.shape[1:], generators), x.device, x.dtype)
        if on_step is not None:
            on_step(step, x)
    return x


def ddim(
    predict: Predict,
    x: Float[Tensor, "b c h w"],
    timesteps: Sequence[float],
    generators: Sequence[torch.Generator],
    objective: Objective,
    on_step: OnStep | None = None,
) -> Float[Tensor, "b c h w"]:
    """Deterministic sampling (arXiv 2010.02502, equation 12 with η = 0) along decreasing ``timesteps``."""
    times = to_device(torch.tensor(list(timesteps), dtype=torch.float32, device="cpu"), x.device)
    alpha_bars = objective.alpha_bar(times)
    for step in range(len(times) - 1):
        t = times[step].expand(len(x))
        noise_pred = objective.to_noise(predict(x, t), x, t)
        now, then = alpha_bars[step], alpha_bars[step + 1]
        clean = (x - (1 - now).sqrt() * noise_pred) / now.sqrt()
        x = then.sqrt() * clean + (1 - then).sqrt() * noise_pred
        if on_step is not None:
            on_step(step, x)
    return x


def dpm_solver(
    predict: Predict,
    x: Float[Tensor, "b c h w"],
    timesteps: Sequence[float],
    generators: Sequence[torch.Generator],
    objective: Objective,
    on_step: OnStep | None = None,
) -> Float[Tensor, "b c h w"]:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): deterministic, second order, one prediction per step.

    With λ = ½·ln(ᾱ/(1 − ᾱ)), h = λ(t') − λ(t) and x̂₀ the predicted image:
    x' = √((1 − ᾱ')/(1 − ᾱ))·x + √ᾱ'·(1 − e^−h)·D, with D = x̂₀ + (h/2h₋)·(x̂₀ − x̂₀₋), where the minus denotes
    the previous step. The first and the last step have D = x̂₀.
    """
    times = torch.tensor(list(timesteps), dtype=torch.float32, device="cpu")
    alpha_bars = objective.alpha_bar(times.double()).tolist()
    logs = [math.log(a / (1 - a)) / 2 for a in alpha_bars]
    times = to_device(times, x.device)
    before: Tensor | None = None
    for step in range(len(times) - 1):
        now, then, h = alpha_bars[step], alpha_bars[step + 1], logs[step + 1] - logs[step]
        t = times[step].expand(len(x))
        noise_pred = objective.to_noise(predict(x, t), x, t)
        clean = (x - math.sqrt(1 - now) * noise_pred) / math.sqrt(now)
        direction = clean
        if before is not None and step + 2 < len(times):
            h_before = logs[step] - logs[step - 1]
            if h_before > 0:  # the schedule is clamped near its ends, where a step may change nothing
                direction = clean + h / (2 * h_before) * (clean - before)
        x = math.sqrt((1 - then) / (1 - now)) * x - math.sqrt(then) * math.expm1(-h) * direction
        before = clean
        if on_step is not None:
            on_step(step, x)
    return x


def euler(
    predict: Predict,
    x: Float[Tensor, "b c h w"],
    timesteps: Sequence[float],
    generators: Sequence[torch.Generator],
    objective: Objective,
    on_step: OnStep | None = None,
) -> Float[Tensor, "b c h w"]:
    """Euler's method along dx/dt of a linear path (arXiv 2210.02747): x' = x + (t' − t)·v̂, deterministic."""
    times = torch.tensor(list(timesteps), dtype=torch.float32, device="cpu")
    steps = (times[1:] - times[:-1]).tolist()
    times = to_device(times, x.device)
    for step, length in enumerate(steps):
        t = times[step].expand(len(x))
        x = x + length * objective.to_velocity(predict(x, t), x, t)
        if on_step is not None:
            on_step(step, x)
    return x


def few(
    predict: Predict,
    x: Float[Tensor, "b c h w"],
    timesteps: Sequence[float],
    generators: Sequence[torch.Generator],
    objective: Objective,
    on_step: OnStep | None = None,
) -> Float[Tensor, "b c h w"]:
    """Sampling in a few steps (arXiv 2303.01469, algorithm 1): x̂₀ at each time, then noised again with fresh
    noise to the next time.

    For networks that were trained for it (``train.stages.few``). ``predict`` returns the network's output as
    it is. Times above ``Objective.highest_jump`` are lowered to it.
    """
    times = [min(t, objective.highest_jump) for t in timesteps]
    for step, (now, then) in enumerate(itertools.pairwise(times)):
        t = torch.full((len(x),), now, dtype=torch.float32, device=x.device)
        x = objective.to_clean(predict(x, t), x, t)
        if then > 0:
            noise = to_device(draw_noise(x.shape[1:], generators), x.device, x.dtype)
            x = objective.noised(x, noise, torch.full_like(t, then))
        if on_step is not None:
            on_step(step, x)
    return x

"""Diffusion objectives: how images are noised, what networks predict, and how losses are weighted.

An ``Objective`` combines a path from image to noise, the network's prediction target, the weights of the loss
and the distribution of training times. ``model.json`` stores those of Stages B and C. Networks do not know
their objective: they return their output, and training, validation and samplers convert it with the
objective.

To add an objective, write a subclass with its own ``kind`` and add it to ``OBJECTIVES``.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import torch
from jaxtyping import Float
from torch import Tensor

from wuerstchen.diffusion.densities import TimeDensity
from wuerstchen.diffusion.flow import flow_times, flow_timesteps
from wuerstchen.diffusion.schedule import (
    CosineSchedule,
    Times,
    columns,
    training_timesteps,
    uniform_timesteps,
)
from wuerstchen.errors import UserError, shown

LossWeight = Literal["p2", "velocity"]
"""Weight of ‖ε̂ − ε‖² in the loss of the objectives ``noise`` and ``velocity``: ``p2`` is 1 − ᾱ, as published,
and ``velocity`` is 1/ᾱ, which makes the loss ‖v̂ − v‖²."""


def _mean_square(difference: Float[Tensor, "b ..."], t: Times) -> Times:
    """The mean over everything that has the same time: over each image, or over the channels of each cell."""
    squares = difference.square()
    return squares.flatten(1).mean(1) if t.ndim < 2 else squares.mean(1)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{name} must be a finite number, got {shown(value)}.")
    return value


def _check_choice(name: str, value: Any, kind: Any) -> None:
    if value not in get_args(kind):
        raise UserError(f"{name} must be one of {', '.join(get_args(kind))}, got {shown(value)}.")


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """The base of all objectives. ``x0`` are clean images or latents (b, c, h, w). ``t`` are
    times in [0, 1]: one per image, (b,), or one per cell, (b, h, w).

    Two objectives are equal if a network's output means the same under both. Loss weights and training times
    do not count.
    """

    kind: ClassVar[str]
    """The name in ``model.json`` and in ``prediction`` of a network's configuration."""
    path: ClassVar[str]
    """How noise is mixed in, ``variance_preserving`` or ``linear``. Samplers support one of them."""
    highest_jump: ClassVar[float] = 1.0
    """The highest time from which a single output of the network gives x̂₀ precisely."""

    time_shift: float = field(default=1.0, compare=False)
    """Timestep shift of training times towards noise. 1 is no shift."""
    time_density: TimeDensity = field(default="uniform", compare=False)
    """Distribution of training times, before the shift."""

    def __post_init__(self) -> None:
        """Raises ``UserError`` for invalid values."""
        if not 0 < _number("time_shift", self.time_shift) <= 100:
            raise UserError(
                f"time_shift must be above 0 and at most 100, got {self.time_shift}. Use 1 for none."
            )
        _check_choice("time_density", self.time_density, TimeDensity)

    @abstractmethod
    def times(self, u: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Times to train at, from ``u`` uniform in [0, 1)."""

    @abstractmethod
    def scales(self, t: Float[Tensor, "..."]) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
        """The factors of the signal and of the noise in x_t."""

    @abstractmethod
    def errors(
        self,
        output: Float[Tensor, "b ..."],
        x0: Float[Tensor, "b ..."],
        noise: Float[Tensor, "b ..."],
        t: Times,
    ) -> Times:
        """The mean squared error of each image, or of each cell if cells have times, before it is
        weighted."""

    @abstractmethod
    def weight(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The weight of an error at time t in the loss."""

    @abstractmethod
    def to_clean(
        self, output: Float[Tensor, "b ..."], x_t: Float[Tensor, "b ..."], t: Times
    ) -> Float[Tensor, "b ..."]:
        """The predicted image x̂₀."""

    @abstractmethod
    def to_noise(
        self, output: Float[Tensor, "b ..."], x_t: Float[Tensor, "b ..."], t: Times
    ) -> Float[Tensor, "b ..."]:
        """The predicted noise ε̂."""

    @abstractmethod
    def timesteps(self, steps: int, shift: float = 1.0) -> list[float]:
        """``steps + 1`` times from 1 to 0, evenly spaced before the timestep ``shift`` towards noise."""

    def noised(
        self, x0: Float[Tensor, "b ..."], noise: Float[Tensor, "b ..."], t: Times
    ) -> Float[Tensor, "b ..."]:
        """The network's input x_t."""
        signal, sigma = (columns(factor, x0) for factor in self.scales(t))
        return signal * x0 + sigma * noise

    def loss(
        self,
        output: Float[Tensor, "b ..."],
        x0: Float[Tensor, "b ..."],
        noise: Float[Tensor, "b ..."],
        t: Times,
    ) -> Times:
        """The weighted error of each image, or of each cell if cells have times. ``output`` is the network's
        output for ``noised(x0, noise, t)``."""
        return self.errors(output, x0, noise, t) * self.weight(t)

    def alpha_bar(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The fraction of x_t's variance that is signal, for data of unit variance."""
        signal, sigma = self.scales(t)
        return signal**2 / (signal**2 + sigma**2)

    def to_velocity(
        self, output: Float[Tensor, "b ..."], x_t: Float[Tensor, "b ..."], t: Times
    ) -> Float[Tensor, "b ..."]:
        """ε̂ − x̂₀, which is dx/dt on a linear path."""
        return self.to_noise(output, x_t, t) - self.to_clean(output, x_t, t)

    def for_sampling(self) -> "Objective":
        """The objective to use for guidance and sampling: itself, or noise prediction on the same path.

        ``predictions_for_sampling`` converts a network's output to it.
        """
        return self

    def as_json(self) -> dict[str, Any]:
        """The objective as JSON, which ``objective_of_json`` reads."""
        return {"kind": self.kind, **dataclasses.asdict(self)}


@dataclass(frozen=True, kw_only=True)
class _CosinePath(Objective):
    """x_t = √ᾱ·x₀ + √(1 − ᾱ)·ε along a cosine schedule, with the errors of the predicted noise."""

    path: ClassVar[str] = "variance_preserving"

    schedule: CosineSchedule = field(default_factory=CosineSchedule)
    loss_weight: LossWeight = field(default="p2", compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice("loss_weight", self.loss_weight, LossWeight)

    def times(self, u: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """As published with the density ``uniform`` and no shift (``schedule.training_timesteps``)."""
        return training_timesteps(u, self.time_shift, self.time_density)

    def scales(self, t: Float[Tensor, "..."]) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
        alpha_bar = self.schedule.alpha_bar(t)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def alpha_bar(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return self.schedule.alpha_bar(t)

    def weight(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """1 − ᾱ under ``p2``, 1/ᾱ under ``velocity``.

        ``p2`` is (k + ᾱ/(1 − ᾱ))^−γ of arXiv 2204.00227 with k = γ = 1, as in the original's code. The paper
        has (1 − ᾱ)/(1 + ᾱ). Since ‖x̂₀ − x₀‖² = ‖ε̂ − ε‖²·(1 − ᾱ)/ᾱ, the weight of the image's error is ᾱ under
        ``p2`` and 1/(1 − ᾱ) under ``velocity``: the first emphasises texture, the second also the
        composition, which is decided at high noise.
        """
        alpha_bar = self.schedule.alpha_bar(t)
        return 1 - alpha_bar if self.loss_weight == "p2" else 1 / alpha_bar

    def to_clean(
        self, output: Float[Tensor, "b ..."], x_t: Float[Tensor, "b ..."], t: Times
    ) -> Float[Tensor, "b ..."]:
        return self.schedule.clean(x_t, self.to_noise(output, x_t, t), t)

    def timesteps(self, steps: int, shift: float = 1.0) -> list[float]:
        return uniform_timesteps(steps, shift)

    def as_json(self) -> dict[str, Any]:
        """Without a uniform ``time_density``, because older versions refuse it."""
        values = super().as_json()
        return {k: v for k, v in values.items() if (k, v) != ("time_density", "uniform")}


@dataclass(frozen=True, kw_only=True)
class NoisePrediction(_CosinePath):
    """The published objective: the network predicts ε.

    At time 1 the error of x̂₀ is 100 times that of ε̂, at 0.98 it is 28 times.
    """

    kind: ClassVar[str] = "noise"
    highest_jump: ClassVar[float] = 0.98

    def errors(
        self,
        output: Float[Tensor, "b ..."],
        x0: Float[Tensor, "b ..."],
        noise: Float[Tensor, "b ..."],
        t: Times,
    ) -> Times:
        """‖ε̂ − ε‖² / n."""
        return _mean_square(output - noise, t)

    def to_noise(
        self, output: Float[Tensor, "b ..."], x_t: Float[Tensor, "b ..."], t: Times
    ) -> Float[Tensor, "b ..."]:
        return output


@dataclass(frozen=True, kw_only=True)
class VelocityPrediction(_CosinePath):
    """The network predicts v = √ᾱ·ε − √(1 − ᾱ)·x₀ (arXiv 2202.00512), whose scale does not vanish at high
    noise."""

    kind: ClassVar[str] = "velocity"

    def errors(
        self,
        output: Float[Tensor, "b ..."],
        x0: Float[Tensor, "b ..."],
        noise: Float[Tensor, "b ..."],
        t: Times,
    ) -> Times:
        """‖ε̂ − ε‖² / n for the noise computed from the velocity, which is ᾱ·‖v̂ − v‖² / n."""
        return _mean_square(self.to_noise(output, self.noised(x0, noise, t), t) - noise, t)

    def to_noise(
        self, output: Float[Tensor, "b ..."], x_t: Float[Tensor, "b ..."], t: Times
    ) -> Float[Tensor, "b ..."]:
        """ε = √ᾱ·v + √(1 − ᾱ)·x_t."""
        signal, sigma = (columns(factor, x_t) for factor in self.scales(t))
        return signal * output + sigma * x_t

    def for_sampling(self) -> Objective:
        """Noise prediction. Guidance and sampling of velocity models use the predicted noise."""
        return NoisePrediction(schedule=self.schedule)


@dataclass(frozen=True, kw_only=True)
class FlowMatching(Objective):
    """The network predicts ε − x₀, the velocity of the straight line x_t = (1 − t)·x₀ + t·ε (``flow.py``).

    The squared error is not weighted.
    """

    kind: ClassVar[str] = "flow"
    path: ClassVar[str] = "linear"

    time_density: TimeDensity = field(default="logit_normal", compare=False)

    def times(self, u: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return flow_times(u, self.time_density, self.time_shift)

    def scales(self, t: Float[Tensor, "..."]) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
        return 1 - t, t

    def errors(
        self,
        output: Float[Tensor, "b ..."],
        x0: Float[Tensor, "b ..."],
        noise: Float[Tensor, "b ..."],
        t: Times,
    ) -> Times:
        """‖v̂ − (ε − x₀)‖² / n."""
        return _mean_square(output - (noise - x0), t)

    def weight(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return torch.ones_like(t)

    def to_clean(
        self, output: Float[Tensor, "b ..."], x_t: Float[Tensor, "b ..."], t: Times
    ) -> Float[Tensor, "b ..."]:
        """x̂₀ = x_t − t·v̂."""
        return x_t - columns(t, x_t) * output

    def to_noise(
        self, output: Float[Tensor, "b ..."], x_t: Float[Tensor, "b ..."], t: Times
    ) -> Float[Tensor, "b ..."]:
        """ε̂ = x_t + (1 − t)·v̂."""
        return x_t + (1 - columns(t, x_t)) * output

    def to_velocity(
        self, output: Float[Tensor, "b ..."], x_t: Float[Tensor, "b ..."], t: Times
    ) -> Float[Tensor, "b ..."]:
        return output

    def timesteps(self, steps: int, shift: float = 1.0) -> list[float]:
        return flow_timesteps(steps, shift)


OBJECTIVES: dict[str, type[Objective]] = {
    cls.kind: cls for cls in (NoisePrediction, VelocityPrediction, FlowMatching)
}
"""All objectives by kind."""

PUBLISHED_OBJECTIVE = NoisePrediction()
"""The objective of Stages B and C in v2, and of Stage C in v1."""


def check_prediction(prediction: str) -> None:
    """Raises ``UserError`` for an unknown objective."""
    if prediction not in OBJECTIVES:
        raise UserError(f"prediction must be one of {', '.join(OBJECTIVES)}, got {prediction!r}.")


def default_time_density(kind: str) -> TimeDensity:
    """The distribution of training times that an objective has by default. Raises ``UserError``."""
    check_prediction(kind)
    return OBJECTIVES[kind].time_density


def make_objective(kind: str, **options: Any) -> Objective:
    """The objective of a kind. Ignores ``options`` that it does not have. Raises ``UserError``."""
    check_prediction(kind)
    cls = OBJECTIVES[kind]
    names = {field.name for field in dataclasses.fields(cls)}
    return cls(**{name: value for name, value in options.items() if name in names})


def objective_of_json(value: Any) -> Objective:
    """The objective from ``Objective.as_json``. Raises ``UserError`` for anything else."""
    kind = value.get("kind") if isinstance(value, dict) else value
    if not isinstance(value, dict) or not isinstance(kind, str) or kind not in OBJECTIVES:
        raise UserError(
            f"The objective is unknown: {shown(kind)}. This version has {', '.join(OBJECTIVES)}. "
            "Upgrade wuerstchen, or download the model again."
        )
    cls = OBJECTIVES[kind]
    values = {name: item for name, item in value.items() if name != "kind"}
    unknown = values.keys() - {field.name for field in dataclasses.fields(cls)}
    if unknown:
        raise UserError(
            f"The objective {cls.kind} has no setting {shown(min(unknown))}. Upgrade wuerstchen, or "
            "download the model again."
        )
    hints = get_type_hints(cls)
    return cls(**{name: _value_of_json(name, hints[name], item) for name, item in values.items()})


def _value_of_json(name: str, hint: Any, value: Any) -> Any:
    """The value of an objective's field. Raises ``UserError`` if its type is not ``hint``."""
    if hint is float:
        return float(_number(name, value))
    if get_origin(hint) is Literal:
        _check_choice(name, value, hint)
        return value
    assert hint is CosineSchedule
    known = [field.name for field in dataclasses.fields(CosineSchedule)]
    if not isinstance(value, dict) or value.keys() - set(known):
        raise UserError(
            f"{name} must be an object with the numbers {' and '.join(known)}, got {shown(value)}. "
            "Download the model again."
        )
    return CosineSchedule(**{name: float(_number(name, item)) for name, item in value.items()})


@dataclass(frozen=True)
class PredictionsForSampling:
    """A network's output converted to ``objective.for_sampling()``, as a function of x_t, t and a context."""

    network: Callable[..., Tensor]
    objective: Objective

    def __call__(self, x_t: Float[Tensor, "b c h w"], t: Times, context: Any) -> Float[Tensor, "b c h w"]:
        output = self.network(x_t, t, context)
        return self.objective.to_noise(output, x_t.to(output.dtype), t).to(x_t.dtype)


def predictions_for_sampling(
    network: Callable[..., Tensor], objective: Objective, sampled: Objective | None = None
) -> Callable[..., Tensor]:
    """The function that samplers call: the network itself, or its output converted to noise. ``sampled`` is
    the objective to convert to, by default ``objective.for_sampling()``.

    It takes x_t, t and the network's context. Equal arguments give equal functions, so that recordings are
    reused.
    """
    if type(sampled or objective.for_sampling()) is type(objective):
        return network
    return PredictionsForSampling(network, objective)

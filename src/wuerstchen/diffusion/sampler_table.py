"""The samplers by name. The command line, Python, the service, the page and the evaluation read this table.

To add a sampler, write a function with the signature of those in ``samplers.py`` and add a row here. This
module does not import torch, so that ``--help`` answers at once.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from wuerstchen.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """One row of the table."""

    help: str
    """A short description."""
    paths: tuple[str, ...]
    """The paths of objectives that it supports (``Objective.path``)."""
    steps: int
    """A common number of Stage C's steps. Each model has its own default."""
    function: Callable[..., Any]
    """(predict, x, timesteps, generators, objective, on_step) → sample, see ``samplers.py``."""
    timesteps: Callable[[int], list[float]]
    """Stage C's timesteps from 1 to 0, for a number of steps."""
    for_students: bool = False
    """Whether it is for students for few steps. Then ``predict`` returns the network's output as it is, and
    the objective is the network's own. Otherwise they are those of ``Objective.for_sampling``."""


def _later(module: str, name: str) -> Callable[..., Any]:
    """A function in a module that needs torch, which is imported when the function is called."""

    def call(*arguments: Any, **options: Any) -> Any:
        found = getattr(importlib.import_module(f"wuerstchen.diffusion.{module}"), name)
        return found(*arguments, **options)

    return call


_STAGE_C = _later("schedule", "stage_c_timesteps")

SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(
        help="as published, with fresh noise at every step",
        paths=("variance_preserving",),
        steps=29,
        function=_later("samplers", "ddpm"),
        timesteps=_STAGE_C,
    ),
    "dpm": Sampler(
        help="DPM-Solver++(2M), deterministic, second order, for fewer steps",
        paths=("variance_preserving",),
        steps=12,
        function=_later("samplers", "dpm_solver"),
        timesteps=_STAGE_C,
    ),
    "ddim": Sampler(
        help="deterministic, first order",
        paths=("variance_preserving",),
        steps=29,
        function=_later("samplers", "ddim"),
        timesteps=_STAGE_C,
    ),
    "euler": Sampler(
        help="for flow matching, deterministic, first order",
        paths=("linear",),
        steps=28,
        function=_later("samplers", "euler"),
        timesteps=_later("flow", "flow_timesteps"),
    ),
    "few": Sampler(
        help="for a student trained for few steps, with fresh noise between them",
        paths=("variance_preserving", "linear"),
        steps=2,
        function=_later("samplers", "few"),
        timesteps=_later("schedule", "few_timesteps"),
        for_students=True,
    ),
}
"""The first row that supports an objective's path is its default."""


def sampler_help() -> str:
    """All samplers in one line, for help texts."""
    rows = (f"{name}, {row.help} ({row.steps} steps are common)" for name, row in SAMPLERS.items())
    return "; ".join(rows)


def check_sampler(name: Any, setting: str = "prior_sampler") -> None:
    """Raises ``UserError`` for a name that is not in the table. ``setting`` is where it was given."""
    if name not in SAMPLERS:
        raise UserError(f"{setting} must be one of {', '.join(SAMPLERS)}, got {name!r}.")


def samplers_for(path: str) -> list[str]:
    """The names of the samplers for objectives with this path, the default first."""
    return [name for name, row in SAMPLERS.items() if path in row.paths]


def check_compatible(name: str, kind: str, path: str, setting: str = "prior_sampler") -> None:
    """Raises ``UserError`` if a sampler does not support objectives of this ``kind`` and ``path``."""
    check_sampler(name, setting)
    if path not in SAMPLERS[name].paths:
        stage = "Stage B" if setting == "decoder_sampler" else "Stage C"
        raise UserError(
            f"{setting}={name} is incompatible with this model. Its {stage} was trained with the "
            f"objective {kind}. Use {' or '.join(samplers_for(path))}."
        )

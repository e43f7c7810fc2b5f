"""The samplers by name. The command line, Python, the service, the page and the evaluation read this table.

To add one, write a function with the signature of those in ``samplers.py`` and give it a row. Nothing here
imports torch: options and schemas are made without it.
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
    """What it is, in a few words."""
    paths: tuple[str, ...]
    """The paths of the objectives that it suits (``Objective.path``)."""
    steps: int
    """A common number of steps of Stage C; each model has a number of its own."""
    function: Callable[..., Any]
    """(predict, x, timesteps, generators, objective, on_step) → sample; see ``samplers.py``."""
    timesteps: Callable[[int], list[float]]
    """The times of Stage C for a number of steps, from 1 to 0."""


def _later(module: str, name: str) -> Callable[..., Any]:
    """A function of a module that is imported when it is called: they need torch."""

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
        help="DPM-Solver++(2M), deterministic and of second order, for fewer steps",
        paths=("variance_preserving",),
        steps=12,
        function=_later("samplers", "dpm_solver"),
        timesteps=_STAGE_C,
    ),
    "ddim": Sampler(
        help="deterministic and of first order",
        paths=("variance_preserving",),
        steps=29,
        function=_later("samplers", "ddim"),
        timesteps=_STAGE_C,
    ),
    "euler": Sampler(
        help="of flow matching, deterministic and of first order",
        paths=("linear",),
        steps=28,
        function=_later("samplers", "euler"),
        timesteps=_later("flow", "flow_timesteps"),
    ),
}
"""The first row that suits an objective is its default."""


def sampler_help() -> str:
    """All samplers in one line, for ``--help`` and the like."""
    rows = (f"{name}, {row.help} ({row.steps} steps are common)" for name, row in SAMPLERS.items())
    return "; ".join(rows)


def check_sampler(name: Any) -> None:
    """Raises ``UserError`` for a name that is not in the table."""
    if name not in SAMPLERS:
        raise UserError(f"prior_sampler={name!r} is unknown; use one of {', '.join(SAMPLERS)}")


def samplers_for(path: str) -> list[str]:
    """The names of the samplers that suit objectives with this path, the default first."""
    return [name for name, row in SAMPLERS.items() if path in row.paths]


def check_suits(name: str, kind: str, path: str) -> None:
    """Raises ``UserError`` where a sampler does not suit the objective of a ``kind`` with this ``path``."""
    check_sampler(name)
    if path not in SAMPLERS[name].paths:
        raise UserError(
            f"prior_sampler={name} does not suit this model, whose Stage C was trained with the objective "
            f"{kind}. Use {' or '.join(samplers_for(path))}."
        )

"""The origin of weights, as the headers of native files store it."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from wuerstchen.version import __version__


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The origin of weights."""

    recipe: str
    seed: int
    images: int
    """Number of images seen in training."""
    data: str
    """Fingerprint of the dataset."""
    licence: str = ""
    changes: tuple[str, ...] = ()
    """Changes to the recipe during training, oldest first."""
    versions: dict[str, str] = dataclasses.field(
        default_factory=lambda: {"wuerstchen": __version__, "torch": torch.__version__}
    )


def described(provenance: Provenance) -> dict[str, Any]:
    """For a header: without ``changes`` if there are none, because older versions do not know that field."""
    found = dataclasses.asdict(provenance)
    return found if provenance.changes else {k: v for k, v in found.items() if k != "changes"}


def provenance_of(header: dict[str, Any]) -> Provenance:
    return Provenance(**{**header, "changes": tuple(header.get("changes", ()))})

"""The table of the kinds of Stage B: v2's decoder of latents, and v1's decoder of tokens.

A row has everything in which the kinds differ in training, so nothing else asks whether a model is v1 or v2.
As in the table of stages, rows are names: a recipe can be checked without importing the modules of the stages
in a circle.
"""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wuerstchen.diffusion.objective import Objective
    from wuerstchen.models.cascade import CascadeSettings
    from wuerstchen.train.config import Recipe

DECODERS = (
    "wuerstchen.train.stages.decoder:LATENT_DECODER",
    "wuerstchen.train.stages.paella:TOKEN_DECODER",
)
"""Where the ``DecoderKind`` objects are."""


@dataclass(frozen=True, kw_only=True)
class DecoderKind:
    """One kind of Stage B."""

    version: str
    """The version of Würstchen that has it: v1 or v2."""
    works_on: str
    """What the decoder predicts, for messages: latents or tokens."""
    config: type
    """The configuration of its network."""
    network: Callable[[Any], Any]
    """The class of its network, called with a ``config``."""
    with_compressor: Callable[..., Any]
    """The class of its phases that train the compressor too (``stages.decoding.WithCompressor``)."""
    refinement: Callable[..., Any]
    """The class of its last phase, which trains the decoder alone (``stages.decoding.DecoderOnly``)."""
    check: "Callable[[Recipe], None]"
    """Raises ``UserError`` for recipes that do not fit it."""
    objective: "Callable[[Recipe], Objective] | None"
    """The objective of a recipe's decoder. None if the kind has no choice of objectives."""
    settings: "CascadeSettings"
    """How the published model of this kind samples."""


def decoder_kind(config: object) -> DecoderKind:
    """The kind of Stage B whose network has this configuration. Raises ``KeyError`` if there is none."""
    for place in DECODERS:
        kind = pkgutil.resolve_name(place)
        if isinstance(config, kind.config):
            return kind
    raise KeyError(type(config).__name__)

"""Changes to recipes by the paths of fields, for the benchmarks that train variants of a recipe."""

import dataclasses
import json
from typing import Any

C32 = {"compressor.c_latent": 32, "prior.c_in": 32, "decoder.effnet_embd": 32, "previewer.c_in": 32}
MUON_B = {"stage_b.optimization.optimizer": "muon"}
MUON_C = {"stage_c.optimization.optimizer": "muon"}
DEPTHS = {"compressor.depths": (8, 16)}
BEST_C = MUON_C | {
    "stage_c.optimization.learning_rate": 2e-3,
    "stage_c.text_noise": 0.3,
    "prior.text_blocks": 2,
    "prior.dropout": 0.1,
}
"""The best short training of Stage C so far, see docs/experiments.md."""


def with_changes(config: Any, changes: dict[str, Any]) -> Any:
    """Replaces fields of nested frozen dataclasses, given by dotted names, all at once."""
    nested: dict[str, dict[str, Any]] = {}
    plain: dict[str, Any] = {}
    for name, value in changes.items():
        first, _, rest = name.partition(".")
        if rest:
            nested.setdefault(first, {})[rest] = value
        else:
            plain[first] = value
    plain |= {name: with_changes(getattr(config, name), inner) for name, inner in nested.items()}
    return dataclasses.replace(config, **plain)


def parse_change(text: str) -> tuple[str, Any]:
    """The name and the value of a change such as ``stage_b.time_shift=1.0``. Values are JSON."""
    name, _, value = text.partition("=")
    found = json.loads(value)
    return name, tuple(found) if isinstance(found, list) else found

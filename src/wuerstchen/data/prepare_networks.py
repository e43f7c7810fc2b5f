"""The two networks that data is prepared with, from a model in any layout."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wuerstchen.checkpoints.hub import local_folder
from wuerstchen.checkpoints.layouts import Sources, layout_of, read_model
from wuerstchen.checkpoints.native import read_network, read_settings
from wuerstchen.checkpoints.text_encoder import read_text_encoder
from wuerstchen.errors import UserError
from wuerstchen.models.cascade import CascadeSettings
from wuerstchen.models.compressor import Compressor
from wuerstchen.models.text import TextEncoder


@dataclass(frozen=True, kw_only=True)
class Networks:
    """What pictures and captions are prepared with."""

    compressor: Compressor
    text_encoder: TextEncoder
    settings: CascadeSettings


def read_networks(
    model: str | Path, *, text_encoder: str | None = None, revision: str | None = None
) -> Networks:
    """The compressor and the text encoder of a model, in any layout that has them, onto the CPU.

    Raises ``CheckpointError`` for what is damaged, ``UserError`` for a model without one of the two.
    """
    path = local_folder(model, revision=revision)
    if text_encoder is None and path.is_dir() and layout_of(path) == "native":
        settings, parts = read_settings(path / "model.json")
        found: dict[str, Any] = {}
        if "compressor" in parts:
            found["compressor"], _ = read_network(path / "compressor.safetensors")
        if "text_encoder" in parts:
            found["text_encoder"] = read_text_encoder(path / "text_encoder")
    else:
        cascade = read_model(path, Sources(text_encoder=text_encoder, revision=revision))
        settings = cascade.settings
        found = {name: getattr(cascade, name) for name in ("compressor", "text_encoder")}
    for part in ("compressor", "text_encoder"):
        if found.get(part) is None:
            raise UserError(
                f"model {str(model)!r} is wrong because it has no {part.replace('_', ' ')}, which data is"
                " prepared with; give one that has, such as the original's .pt files or a native folder"
            )
    return Networks(
        compressor=found["compressor"].eval(), text_encoder=found["text_encoder"], settings=settings
    )

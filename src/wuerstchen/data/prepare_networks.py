"""The two networks that prepare data, read from a model in any layout."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wuerstchen.checkpoints.compressors import fits_published, read_published_compressor
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
    """The networks that prepare images and captions."""

    compressor: Compressor
    text_encoder: TextEncoder
    settings: CascadeSettings


def read_networks(
    model: str | Path,
    *,
    text_encoder: str | None = None,
    compressor: str | None = None,
    revision: str | None = None,
) -> Networks:
    """Reads the compressor and the text encoder of a model in any layout onto the CPU.

    ``compressor`` is for a model without one (``checkpoints.compressors``). The published v2 takes the
    published one. Raises ``CheckpointError`` for damaged files, and ``UserError`` for a model without one of
    the two.
    """
    path = local_folder(model, revision=revision)
    if text_encoder is None and compressor is None and path.is_dir() and layout_of(path) == "native":
        settings, parts = read_settings(path / "model.json")
        found: dict[str, Any] = {}
        if "compressor" in parts:
            found["compressor"], _ = read_network(path / "compressor.safetensors")
        if "text_encoder" in parts:
            found["text_encoder"] = read_text_encoder(path / "text_encoder")
    else:
        sources = Sources(text_encoder=text_encoder, compressor=compressor, revision=revision)
        cascade = read_model(path, sources)
        settings = cascade.settings
        if cascade.compressor is None and fits_published(cascade.decoder, settings):
            cascade.compressor = read_published_compressor()
        found = {name: getattr(cascade, name) for name in ("compressor", "text_encoder")}
    for part in ("compressor", "text_encoder"):
        if found.get(part) is None:
            raise UserError(
                f"Model {str(model)!r} has no {part.replace('_', ' ')}. Preparing data needs one. Use a model"
                " that has it, such as the original .pt files or a native folder, or give it with --"
                f"{part.replace('_', '-')}."
            )
    return Networks(
        compressor=found["compressor"].eval(), text_encoder=found["text_encoder"], settings=settings
    )

"""The layouts of models by name. Whatever reads or writes a model uses this table.

To add a layout, write one file with a function that reads it, a function that writes it, and a ``Layout``
that names both. Then add a row. Nothing here imports torch, so the command line can list the layouts.
"""

import pkgutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

    from wuerstchen.checkpoints.native import Provenance
    from wuerstchen.models.cascade import Cascade, CascadeSettings

    Incomplete = tuple[CascadeSettings, dict[str, Any], dict[str, Provenance]]

Storage = Literal["float32", "float16", "int8"]
"""How weights are stored."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Folders, or names on the hub, of parts that are not taken from the model's own folder."""

    prior: str | Path | None = None
    """A Stage C pipeline, or a folder with only its network, which then uses the model's text encoder."""
    text_encoder: str | Path | None = None
    """Only for models in the original's files, which contain no text encoders."""
    decoder_text_encoder: str | Path | None = None
    """As ``text_encoder``, for Stage B."""
    compressor: str | Path | None = None
    """For models without one, such as the published diffusers folders (``checkpoints.compressors``)."""
    revision: str | None = None
    """The revision of the model, if it comes from the hub."""
    local_files_only: bool = False


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one program stores models."""

    marker: str
    """The file that identifies the layout, for messages."""
    matches: Callable[[Path], bool]
    """Whether a folder or a file has this layout."""
    read: "Callable[[Path, Sources, torch.dtype, Collection[str]], Cascade]"
    """(path, sources, dtype, leave_out) → a whole model on the CPU, if needed without ``leave_out``."""
    write: "Callable[[Cascade, Path, Storage, Path], None]"
    """(cascade, folder, storage, source): writes a model that was read from ``source`` to a new folder."""
    parts: frozenset[str] | None = None
    """The parts that can be stored. None: all of them."""
    storages: tuple[Storage, ...] = ("float32", "float16")
    shards: bool = True
    """Whether its weight files can be split into shards (``checkpoints/shards.py``)."""
    assumed_settings: "Callable[[Cascade], CascadeSettings] | None" = None
    """The settings that a reader of this layout assumes for a model. None: the layout stores its settings."""
    check: "Callable[[Cascade, str], None]" = lambda cascade, name: None
    """Raises ``UserError`` for a model that the layout of this name cannot store for any other reason."""
    read_parts: "Callable[[Path], Incomplete] | None" = None
    """Reads settings, parts and provenance of a model that may be incomplete. None: ``read`` is used."""
    int8_file: Callable[[Path], Path | None] = lambda path: None
    """A file of the model that is stored in int8, if there is one."""
    other_folders: Callable[[Path, Sources], list[Path]] = lambda path, sources: []
    """Folders outside the model's own that ``read`` reads weights from."""


LAYOUTS = {
    "native": "wuerstchen.checkpoints.native:NATIVE_LAYOUT",
    "diffusers": "wuerstchen.checkpoints.pipeline_folders:DIFFUSERS_LAYOUT",
    "paddle": "wuerstchen.checkpoints.pipeline_folders:PADDLE_LAYOUT",
    "original": "wuerstchen.checkpoints.original:ORIGINAL_LAYOUT",
}
"""Where the ``Layout`` objects are. A folder has the first layout that matches it."""


def layout_named(name: str) -> Layout:
    """The layout with this name. Raises ``KeyError`` if there is none."""
    return pkgutil.resolve_name(LAYOUTS[name])

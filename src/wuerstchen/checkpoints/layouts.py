"""Detects the layout of a model, reads it, and converts models between layouts."""

import contextlib
import dataclasses
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from wuerstchen.checkpoints.files import new_folder, open_safetensors, read_json
from wuerstchen.checkpoints.foreign import check_not_cascade, is_called_cascade
from wuerstchen.checkpoints.hub import local_folder
from wuerstchen.checkpoints.layout_table import LAYOUTS, Layout, Storage, layout_named
from wuerstchen.checkpoints.layout_table import Sources as Sources
from wuerstchen.checkpoints.native import Provenance
from wuerstchen.checkpoints.shards import size_in_bytes, split_files
from wuerstchen.checkpoints.variants import is_spare_variant
from wuerstchen.errors import CheckpointError, UserError
from wuerstchen.models.cascade import Cascade, CascadeSettings


def layout_of(path: Path) -> str:
    """The name of the layout of a model's folder or file, as in ``LAYOUTS``.

    Raises ``CheckpointError`` for files of Stable Cascade, a folder with only one network, and anything else
    that is not a model.
    """
    for name in LAYOUTS:
        if layout_named(name).matches(path):
            return name
    _check_not_cascade(path)
    if (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} contains only one network. Use a complete model, and pass this folder as prior."
        )
    markers = [f"no {marker}" for marker in dict.fromkeys(layout_named(name).marker for name in LAYOUTS)]
    raise CheckpointError(
        f"{path} is not a model: it has {', '.join(markers[:-1])} and {markers[-1]}. "
        "Use a folder that has one of them."
    )


def _check_not_cascade(path: Path) -> None:
    """Raises ``CheckpointError`` for Stable Cascade, which is published as single files."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    for file in files[:20]:
        if file.suffix == ".safetensors":
            names: list[str] = []
            with contextlib.suppress(CheckpointError), open_safetensors(file) as opened:  # damaged files
                names = list(opened.keys())
            check_not_cascade(file, names)
        if is_called_cascade(file):
            check_not_cascade(file, class_name="StableCascade")
    if (path / "config.json").is_file():
        check_not_cascade(path, class_name=read_json(path / "config.json").get("_class_name"))


def read_model(
    source: str | Path,
    sources: Sources | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    leave_out: Collection[str] = (),
) -> Cascade:
    """Reads a model in any layout onto the CPU. ``source`` is a path or a name on the hub.

    ``leave_out`` names parts that are not needed. Raises ``CheckpointError`` if a part is missing or damaged,
    ``UserError`` if the parts do not fit together.
    """
    sources = sources or Sources()
    path = local_folder(source, revision=sources.revision, local_files_only=sources.local_files_only)
    cascade = layout_named(layout_of(path)).read(path, sources, dtype, leave_out)
    if sources.compressor is not None and "compressor" not in leave_out:
        _add_compressor(cascade, path, sources, dtype)
    # Checked again: a decoder without its own text encoder uses Stage C's, which may have another width.
    return dataclasses.replace(cascade, **dict.fromkeys(leave_out)) if leave_out else cascade


def _add_compressor(cascade: Cascade, path: Path, sources: Sources, dtype: torch.dtype) -> None:
    from wuerstchen.checkpoints.compressors import check_scale, read_compressor

    assert sources.compressor is not None
    if cascade.compressor is not None:
        raise UserError(f"{path} has a compressor, which its Stage B was trained with. Omit compressor.")
    found = read_compressor(sources.compressor, dtype=dtype, local_files_only=sources.local_files_only)
    if found is None:
        raise UserError(f"{sources.compressor} has only a backbone. Use a complete compressor.")
    check_scale(found, cascade.settings.latent_statistics, str(sources.compressor))
    cascade.compressor = found
    cascade.__post_init__()  # checks that it fits the other parts


def read_incomplete(path: Path) -> tuple[CascadeSettings, dict[str, Any], dict[str, Provenance]]:
    """Settings, parts by name, and the provenance that is known, of a model that may lack parts."""
    layout = layout_named(layout_of(path))
    if layout.read_parts is not None:
        return layout.read_parts(path)
    cascade = read_model(path)
    return cascade.settings, dict(cascade.networks()), {}


def convert(
    source: str | Path,
    target: Path,
    layout: str,
    sources: Sources | None = None,
    *,
    storage: Storage = "float32",
    max_shard_size: str = "",
    leave_out: Collection[str] = (),
) -> None:
    """Reads a model in any layout and writes it to the new folder ``target`` in another.

    Parts in ``leave_out`` are not written. Weight files larger than ``max_shard_size``, such as ``16MB``, are
    split into shards with an index. Raises ``UserError`` if the layout cannot store one of the others,
    or a setting.
    """
    if layout not in LAYOUTS:
        raise UserError(f"layout {layout!r} is unknown. Use one of {', '.join(LAYOUTS)}.")
    unknown = set(leave_out) - {f.name for f in dataclasses.fields(Cascade)} | set(leave_out) & {"settings"}
    if unknown or set(leave_out) & {"vqgan", "decoder"}:
        raise UserError(
            f"{', '.join(leave_out)} cannot be left out. Name parts other than vqgan and decoder."
        )
    if os.path.lexists(target):  # before anything is downloaded or read
        raise CheckpointError(f"{target} already exists. Choose another folder or remove it.")
    sources = sources or Sources()
    path = local_folder(source, revision=sources.revision, local_files_only=sources.local_files_only)
    written = layout_named(layout)
    if max_shard_size:
        size_in_bytes(max_shard_size)
        if not written.shards:
            raise UserError(
                f"max_shard_size is not supported by the {layout} layout, whose files cannot be split. "
                "Remove it, or use another layout."
            )
    if "int8" not in written.storages and (file := layout_named(layout_of(path)).int8_file(path)):
        raise UserError(
            f"{file} is stored in int8, which the {layout} layout does not support. Keep the native layout, "
            "or convert it to native with --storage float32 first."
        )
    cascade = read_model(path, sources, leave_out=leave_out)
    if storage not in written.storages:
        raise UserError(
            f"storage {storage} is not supported by the {layout} layout. Use {' or '.join(written.storages)}."
        )
    _check_fits(cascade, written, layout)
    if not max_shard_size:
        written.write(cascade, target, storage, path)
        return
    with new_folder(target) as partial:
        partial.rmdir()  # layouts create the folder that they write
        written.write(cascade, partial, storage, path)
        split_files(partial, max_shard_size)


def _check_fits(cascade: Cascade, layout: Layout, name: str) -> None:
    """Raises ``UserError`` for what a layout cannot store. Parts that can be left out come last."""
    layout.check(cascade, name)
    if layout.parts is not None and (lacking := [p for p in cascade.networks() if p not in layout.parts]):
        raise UserError(
            f"{' and '.join(lacking)} cannot be stored in the {name} layout, which "
            f"holds {', '.join(sorted(layout.parts))}. Add --leave-out "
            f"{' '.join(lacking)}, or keep the native layout."
        )
    if layout.assumed_settings is None:
        return
    assumed = layout.assumed_settings(cascade)
    for field in dataclasses.fields(cascade.settings):
        value, theirs = getattr(cascade.settings, field.name), getattr(assumed, field.name)
        if value != theirs:
            raise UserError(
                f"{field.name}={value} cannot be stored in the {name} layout, which "
                f"assumes {theirs}. Keep the native layout."
            )


def weight_files(path: Path, sources: Sources | None = None) -> list[Path]:
    """The files of weights that ``read_model`` reads, with those of a Stage C in another folder.

    Variants (fp16) of default weights are left out.
    """
    if path.is_file():
        return [path]
    folders = [path, *layout_named(layout_of(path)).other_folders(path, sources or Sources())]
    endings = ("*.safetensors", "*.bin", "*.pt")
    found = {file for root in folders for ending in endings for file in root.rglob(ending) if file.is_file()}
    return sorted(file for file in found if not is_spare_variant(file))

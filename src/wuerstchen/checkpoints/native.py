"""The native layout: a folder with ``model.json`` and one safetensors file per network.

The header of every file describes its content and its ``Provenance``. Nothing here can run code: tensors are
safetensors, everything else is JSON, and pickles are refused.
"""

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from wuerstchen.checkpoints import differences
from wuerstchen.checkpoints.adapter_metadata import weights_hash
from wuerstchen.checkpoints.files import (
    check_header,
    new_folder,
    open_safetensors,
    parse_json,
    read_json,
    write_json,
    write_safetensors,
)
from wuerstchen.checkpoints.int8 import dequantize, in_float16, quantize_rows
from wuerstchen.checkpoints.layout_table import Layout, Sources
from wuerstchen.checkpoints.layout_table import Storage as Storage
from wuerstchen.checkpoints.native_objectives import (
    OF_OBJECTIVES,
    diffusing,
    format_of,
    implied,
    named_objective,
    with_objectives,
)
from wuerstchen.checkpoints.provenance import Provenance as Provenance
from wuerstchen.checkpoints.provenance import described, provenance_of
from wuerstchen.checkpoints.shards import read_joined, split_files
from wuerstchen.checkpoints.text_encoder import copy_text_encoder, read_text_encoder, write_text_encoder
from wuerstchen.checkpoints.weights import plain_names
from wuerstchen.diffusion.objective import Objective, check_prediction, objective_of_json
from wuerstchen.errors import CheckpointError, UserError, shown
from wuerstchen.models.cascade import Cascade, CascadeSettings, LatentStatistics
from wuerstchen.models.compressor import Compressor, CompressorConfig
from wuerstchen.models.decoder import Decoder, DecoderConfig
from wuerstchen.models.paella import Paella, PaellaConfig
from wuerstchen.models.previewer import Previewer, PreviewerConfig
from wuerstchen.models.prior import ADDED_FIELDS, Prior, PriorConfig
from wuerstchen.models.text import TextEncoder
from wuerstchen.models.vqgan import VQGAN, VQGANConfig
from wuerstchen.sampling import ALL_TIMES

FORMAT = 2
"""Increased by one whenever older versions would misread new files.

Format 2 can store objectives that format 1 cannot (``native_objectives.format_of``). Files that older
versions can still read correctly are written as format 1, in which the objective follows from the network's
prediction.
"""

MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: dict}
"""Functions that convert a header from format n to n + 1. ``read_parts`` adds the objectives that format 1
does not store, because it has the networks."""

PartStorage = Storage | Literal["int4_difference"]
"""How one network is stored. ``int4_difference`` is for the networks in ``BASES``."""
BASES = {"prior_student": "prior", "decoder_student": "decoder"}
"""The networks that were trained from another network in the same folder."""

NETWORKS: dict[str, tuple[type[nn.Module], type]] = {
    "vqgan": (VQGAN, VQGANConfig),
    "compressor": (Compressor, CompressorConfig),
    "decoder": (Decoder, DecoderConfig),
    "paella": (Paella, PaellaConfig),
    "prior": (Prior, PriorConfig),
    "prior_student": (Prior, PriorConfig),
    "decoder_student": (Decoder, DecoderConfig),
    "previewer": (Previewer, PreviewerConfig),
}
TEXT_ENCODERS = ("text_encoder", "decoder_text_encoder")
_HEADER = "wuerstchen"


def migrate(header: dict[str, Any], path: Path) -> dict[str, Any]:
    """Converts a header to the current format. Raises ``CheckpointError`` if that is impossible."""
    found = header.get("format")
    if not isinstance(found, int) or found < 1:
        raise CheckpointError(
            f"{path}: format must be an integer of at least 1, got {shown(found)}. Download the file again."
        )
    if found > FORMAT:
        raise CheckpointError(
            f"{path} has format {shown(found)}. This version reads formats up to {FORMAT}. "
            "Upgrade with: pip install --upgrade wuerstchen"
        )
    for step in range(found, FORMAT):
        header = MIGRATIONS[step](header)
    return header


def write_tensors(
    tensors: Mapping[str, Tensor],
    path: Path,
    header: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file atomically, with our header in addition to ``metadata``."""
    write_safetensors(tensors, path, {**(metadata or {}), _HEADER: json.dumps(header)})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file by ``write_tensors``. Never unpickles."""
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is not a file. Download the model again.")
    try:
        check_header(path)
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_HEADER, "null")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist. Check the name.") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file ({error}). Download it "
            "again, or convert it if it is a pickle."
        ) from error
    try:
        header = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"the header of {path} cannot be read ({error}). Download it again.") from error
    if not isinstance(header, dict):
        raise CheckpointError(
            f"{path} was not written by wuerstchen: its metadata has no {_HEADER} header. Use a native model."
        )
    return tensors, migrate(header, path)


def write_network(
    network: nn.Module, path: Path, provenance: Provenance, storage: PartStorage = "float32"
) -> None:
    """Writes one network with its configuration. ``int8`` quantizes matrices by row and stores the rest in
    fp16. ``int4_difference`` stores the differences to the network in ``BASES``, which must already be in the
    same folder."""
    kind = next(name for name, (cls, _) in NETWORKS.items() if isinstance(network, cls))
    tensors, base = dict(network.state_dict()), None
    if storage == "float16":
        tensors = in_float16(tensors)
    elif storage == "int8":
        tensors = quantize_rows(tensors)
    elif storage == differences.STORAGE:
        base = _base_of(path)
        tensors = differences.quantize_differences(tensors, dict(base.state_dict()))
    header = {
        "format": format_of(implied(network)),
        "kind": kind,
        "storage": storage,
        "config": _described_config(network.config),
        "provenance": described(provenance),
    }
    if base is not None:
        header["base"] = weights_hash(base)
    write_tensors(tensors, path, header)


def _base_of(path: Path) -> nn.Module:
    """The network that the one in the file ``path`` was trained from, in fp32, from the same folder."""
    base = BASES.get(path.name.split(".")[0])
    if base is None:
        raise CheckpointError(
            f"{path} cannot contain differences to another network. Only these files can: "
            f"{', '.join(f'{name}.safetensors' for name in BASES)}. Give it its name back."
        )
    return read_network(path.with_name(f"{base}.safetensors"))[0]


def read_network(path: Path, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Provenance]:
    """Reads one network, in eval mode, also from shards (``checkpoints/shards.py``). Raises
    ``CheckpointError`` if anything does not match its header."""
    tensors, header = read_joined(path, read_tensors)
    try:
        cls, config_cls = NETWORKS[header["kind"]]
        config = config_cls(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in header["config"].items()}
        )
        check_prediction(getattr(config, "prediction", "noise"))
        provenance = provenance_of(header["provenance"])
        with torch.device("meta"):
            network = cls(config)
        tensors = plain_names(tensors, path)
        if header["storage"] == "int8":
            tensors = dequantize(tensors)
        elif header["storage"] == differences.STORAGE:
            base = _base_of(path)
            if weights_hash(base) != header["base"]:
                raise CheckpointError(
                    f"{path} contains differences to another network than the one in its folder, so its "
                    "weights cannot be restored. Download the whole model again."
                )
            tensors = differences.add_differences(tensors, dict(base.state_dict()))
        for key, wanted in network.state_dict().items():
            if key in tensors and tensors[key].is_floating_point() != wanted.is_floating_point():
                raise ValueError(f"{key} is {tensors[key].dtype}")
        state = {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}
        network.load_state_dict(state, assign=True)
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        detail = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} does not match its header ({detail}). Download it again.") from error
    return network.eval().requires_grad_(False), provenance


_LATER_FIELDS: dict[str, Any] = {"depths": (), **dict.fromkeys(ADDED_FIELDS, 0)}
"""Fields of configurations that older versions do not know, with their defaults. Headers leave out the
defaults, so that older versions can read networks without these options."""


def _described_config(config: Any) -> dict[str, Any]:
    fields = dataclasses.asdict(config)
    return {k: v for k, v in fields.items() if k not in _LATER_FIELDS or v != _LATER_FIELDS[k]}


def write_cascade(
    cascade: Cascade,
    folder: Path,
    provenance: Mapping[str, Provenance],
    storage: Mapping[str, PartStorage] | None = None,
    text_encoder: Path | None = None,
) -> None:
    """Writes a whole model to a new folder, atomically.

    The files of the frozen text encoder are copied from the folder ``text_encoder`` (``copy_text_encoder``).
    A CLIP can also be written without it.
    """
    write_parts(cascade.settings, cascade.networks(), folder, provenance, storage, text_encoder)


def write_parts(
    settings: CascadeSettings,
    networks: Mapping[str, nn.Module],
    folder: Path,
    provenance: Mapping[str, Provenance],
    storage: Mapping[str, PartStorage] | None = None,
    text_encoder: Path | None = None,
    write_extra: Callable[[Path], None] | None = None,
    max_shard_size: str = "",
) -> None:
    """``write_cascade`` for a model that may be incomplete, for example Stage A alone.

    ``write_extra`` may write additional files into the temporary folder before it is renamed. Files of
    networks that are larger than ``max_shard_size``, such as ``16MB``, are split, but no additional ones:
    their readers may not read shards.
    """
    with new_folder(folder) as partial:
        parts = [part for part in networks if part in NETWORKS]
        for part in parts:
            stored = (storage or {}).get(part, "float32")
            write_network(networks[part], partial / f"{part}.safetensors", provenance[part], stored)
        for part in TEXT_ENCODERS:
            encoder = networks.get(part)
            if part == "text_encoder" and text_encoder is not None:
                copy_text_encoder(text_encoder, partial / part)
            elif encoder is not None:
                assert isinstance(encoder, TextEncoder)
                write_text_encoder(encoder, partial / part)
            else:
                continue
            parts.append(part)
        if max_shard_size:
            split_files(partial, max_shard_size)
        if write_extra is not None:
            write_extra(partial)
        own = diffusing(networks)
        objectives = {part: named_objective(settings, part) for part in OF_OBJECTIVES if part in own}
        values = {IN_FILES.get(name, name): value for name, value in dataclasses.asdict(settings).items()}
        for part in OF_OBJECTIVES:
            del values[f"{part}_objective"]
        if settings.prior_guidance_interval == ALL_TIMES:  # older versions do not know it
            del values["prior_guidance_interval"]
        if "prior_student" not in networks:
            del values["prior_student_steps"], values["prior_student_guidance"]
        if "decoder_student" not in networks:
            del values["decoder_student_steps"]
        if not settings.prior_known_cells:
            del values["prior_known_cells"]
        description = {
            "format": max([1, *map(format_of, objectives.values())]),
            "parts": parts,
            "objectives": {part: objective.as_json() for part, objective in objectives.items()},
            "settings": values,
        }
        write_json(partial / "model.json", description)


IN_FILES = {"latent_statistics": "map_statistics"}
"""Settings with another name in ``model.json``."""


def read_settings(path: Path) -> tuple[CascadeSettings, list[str]]:
    """The settings and the names of the parts in a ``model.json``.

    Objectives that are not stored get the published value here. ``read_parts`` takes them from the networks.
    """
    return _read_description(path)[:2]


def _read_description(path: Path) -> tuple[CascadeSettings, list[str], dict[str, Objective]]:
    """Settings, parts, and the stored objectives."""
    try:
        description = migrate(read_json(path), path)
        raw = dict(description["settings"])
        statistics = LatentStatistics(**{k: tuple(v) for k, v in raw.pop("map_statistics").items()})
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
        named = {str(k): objective_of_json(v) for k, v in description.get("objectives", {}).items()}
        of_settings = {f"{part}_objective": named[part] for part in OF_OBJECTIVES if part in named}
        settings = CascadeSettings(latent_statistics=statistics, **values, **of_settings)
        return settings, list(map(str, description["parts"])), named
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path} is not a valid model description "
            f"({type(error).__name__}: {error}). Download the model again."
        ) from error


def read_cascade(folder: Path, dtype: torch.dtype = torch.float32) -> Cascade:
    """Reads a whole model onto the CPU."""
    settings, parts, _ = read_parts(folder, dtype)
    missing = {"vqgan", "decoder"} - set(parts)
    if missing:
        raise CheckpointError(
            f"{folder} has no {' and no '.join(sorted(missing))}. Download the model again."
        )
    return Cascade(settings=settings, **parts)


def read_parts(
    folder: Path, dtype: torch.dtype = torch.float32
) -> tuple[CascadeSettings, dict[str, Any], dict[str, Provenance]]:
    """Settings, parts by name, and the provenance of each network, of a model that may be incomplete."""
    if not (folder / "model.json").is_file():
        raise CheckpointError(
            f"{folder} is not a model folder: it has no model.json. Use a folder that has one."
        )
    settings, names, objectives = _read_description(folder / "model.json")
    parts: dict[str, Any] = {}
    provenance: dict[str, Provenance] = {}
    for name in names:
        if name in TEXT_ENCODERS:
            parts[name] = read_text_encoder(folder / name, dtype)
        elif name in NETWORKS and name != "paella":
            parts[name], provenance[name] = read_network(folder / f"{name}.safetensors", dtype)
            kinds = (Decoder, Paella) if name == "decoder" else NETWORKS[name][0]
            if not isinstance(parts[name], kinds):
                raise CheckpointError(
                    f"{folder / name}.safetensors contains another network. Download it again."
                )
        else:
            raise CheckpointError(
                f"{folder}/model.json names an unknown part: {shown(name)}. Upgrade wuerstchen."
            )
    return with_objectives(settings, parts, objectives, folder), parts, provenance


def is_native_network(path: Path) -> bool:
    """Whether a safetensors file was written by ``write_network``, by its header."""
    try:
        with open_safetensors(path) as file:
            return _HEADER in (file.metadata() or {})
    except CheckpointError:
        return False


def text_encoder_folder(model: Path) -> Path | None:
    """The text encoder in a native model, for ``write_cascade`` to copy. None for other layouts.

    A native model may have a BERT, whose folder is copied because it cannot be written again.
    """
    return model / "text_encoder" if _is_native(model) else None


def _read(path: Path, sources: Sources, dtype: torch.dtype, leave_out: Collection[str]) -> Cascade:
    if sources.prior or sources.text_encoder or sources.decoder_text_encoder:
        raise UserError(
            f"{path} is a native model, which contains all networks. Do not pass prior, text_encoder or "
            "decoder_text_encoder."
        )
    return read_cascade(path, dtype)


def _write(cascade: Cascade, folder: Path, storage: Storage, source: Path) -> None:
    converted = Provenance(recipe=f"converted from {source.name}", seed=0, images=0, data="")
    parts = [part for part in cascade.networks() if part in NETWORKS]
    provenance = dict.fromkeys(parts, converted)
    if _is_native(source):
        provenance = {part: read_network(source / f"{part}.safetensors")[1] for part in parts}
    copied = None if cascade.text_encoder is None else text_encoder_folder(source)
    write_cascade(cascade, folder, provenance, dict.fromkeys(parts, storage), copied)


def _int8_file(folder: Path) -> Path | None:
    files = sorted(folder.glob("*.safetensors"))
    return next((file for file in files if read_tensors(file)[1].get("storage") == "int8"), None)


def _is_native(path: Path) -> bool:
    return (path / "model.json").is_file()


NATIVE_LAYOUT = Layout(
    marker="model.json",
    matches=_is_native,
    read=_read,
    write=_write,
    storages=("float32", "float16", "int8"),
    read_parts=read_parts,
    int8_file=_int8_file,
)

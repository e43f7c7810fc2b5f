"""The project's own layout: a folder with ``model.json`` and one safetensors file a network.

Every file carries, in its header, what it is and where it came from (``Provenance``). Nothing here can run
code: tensors are safetensors, all else is JSON, and a pickle is refused by its first bytes.
"""

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from wuerstchen.checkpoints.files import (
    check_header,
    new_folder,
    open_safetensors,
    parse_json,
    read_json,
    write_json,
    write_safetensors,
)
from wuerstchen.checkpoints.int8 import dequantize, quantize_rows
from wuerstchen.checkpoints.layout_table import Layout, Sources
from wuerstchen.checkpoints.layout_table import Storage as Storage
from wuerstchen.checkpoints.text_encoder import copy_text_encoder, read_text_encoder, write_text_encoder
from wuerstchen.checkpoints.weights import plain_names
from wuerstchen.diffusion.objective import (
    NoisePrediction,
    Objective,
    VelocityPrediction,
    check_prediction,
    make_objective,
    objective_of_json,
)
from wuerstchen.diffusion.schedule import PUBLISHED_SCHEDULE
from wuerstchen.errors import CheckpointError, UserError, shown
from wuerstchen.models.cascade import Cascade, CascadeSettings, LatentStatistics
from wuerstchen.models.compressor import Compressor, CompressorConfig
from wuerstchen.models.decoder import Decoder, DecoderConfig
from wuerstchen.models.paella import Paella, PaellaConfig
from wuerstchen.models.previewer import Previewer, PreviewerConfig
from wuerstchen.models.prior import Prior, PriorConfig
from wuerstchen.models.text import TextEncoder
from wuerstchen.models.vqgan import VQGAN, VQGANConfig
from wuerstchen.version import __version__

FORMAT = 2
"""Raised by one whenever older programs would misread what is written.

Format 2 names objectives that format 1 has no words for (``_format_of``). What older programs read right is
still written as format 1, where the objective follows from what a network predicts.
"""

MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: dict}
"""From format n to n + 1: one function a step, on the header alone. ``read_parts`` finds the objectives that
format 1 does not name, because it sees the networks."""

NETWORKS: dict[str, tuple[type[nn.Module], type]] = {
    "vqgan": (VQGAN, VQGANConfig),
    "compressor": (Compressor, CompressorConfig),
    "decoder": (Decoder, DecoderConfig),
    "paella": (Paella, PaellaConfig),
    "prior": (Prior, PriorConfig),
    "previewer": (Previewer, PreviewerConfig),
}
TEXT_ENCODERS = ("text_encoder", "decoder_text_encoder")
_HEADER = "wuerstchen"


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where weights came from."""

    recipe: str
    seed: int
    images: int
    """Images seen in training."""
    data: str
    """Fingerprint of the data set."""
    licence: str = ""
    changes: tuple[str, ...] = ()
    """What was changed in the recipe while it was trained, oldest first."""
    versions: dict[str, str] = dataclasses.field(
        default_factory=lambda: {"wuerstchen": __version__, "torch": torch.__version__}
    )


def migrate(header: dict[str, Any], path: Path) -> dict[str, Any]:
    """Brings a header to the current format, or says what to do about it."""
    found = header.get("format")
    if not isinstance(found, int) or found < 1:
        raise CheckpointError(
            f"{path} has format {shown(found)}, which is no number from 1; get the file again"
        )
    if found > FORMAT:
        raise CheckpointError(
            f"{path} has format {shown(found)}, newer than {FORMAT}, the newest this version reads; "
            "upgrade with: pip install --upgrade wuerstchen"
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
    """Writes a safetensors file whole, with our header in it, and ``metadata`` of others beside it."""
    write_safetensors(tensors, path, {**(metadata or {}), _HEADER: json.dumps(header)})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file that ``write_tensors`` made. Never unpickles."""
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is no file; get the model again")
    try:
        check_header(path)
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_HEADER, "null")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; check the name") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}); get it again, or convert it if it is a pickle"
        ) from error
    try:
        header = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{path} has a header that cannot be read ({error}); get it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} was not written by wuerstchen (no header); give a native model folder")
    return tensors, migrate(header, path)


def write_network(
    network: nn.Module, path: Path, provenance: Provenance, storage: Storage = "float32"
) -> None:
    """Writes one network with its configuration. ``int8`` stores matrices by row, the rest in fp16."""
    kind = next(name for name, (cls, _) in NETWORKS.items() if isinstance(network, cls))
    tensors = dict(network.state_dict())
    if storage == "float16":
        tensors = {k: t.half() if t.is_floating_point() else t for k, t in tensors.items()}
    elif storage == "int8":
        tensors = quantize_rows(tensors)
    header = {
        "format": _format_of(_implied(network)),
        "kind": kind,
        "storage": storage,
        "config": dataclasses.asdict(network.config),  # type: ignore[arg-type]
        "provenance": _described(provenance),
    }
    write_tensors(tensors, path, header)


def read_network(path: Path, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Provenance]:
    """Reads one network, in eval mode. Raises ``CheckpointError`` for anything that does not fit."""
    tensors, header = read_tensors(path)
    try:
        cls, config_cls = NETWORKS[header["kind"]]
        config = config_cls(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in header["config"].items()}
        )
        check_prediction(getattr(config, "prediction", "noise"))
        provenance = _provenance(header["provenance"])
        with torch.device("meta"):
            network = cls(config)
        tensors = plain_names(tensors, path)
        if header["storage"] == "int8":
            tensors = dequantize(tensors)
        for key, wanted in network.state_dict().items():
            if key in tensors and tensors[key].is_floating_point() != wanted.is_floating_point():
                raise ValueError(f"{key} is {tensors[key].dtype}")
        state = {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}
        network.load_state_dict(state, assign=True)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        detail = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path} does not hold what its header says ({detail}); get it again"
        ) from error
    return network.eval().requires_grad_(False), provenance


def _described(provenance: Provenance) -> dict[str, Any]:
    """As a header has it: without changes where there are none, which older versions do not know."""
    described = dataclasses.asdict(provenance)
    return described if provenance.changes else {k: v for k, v in described.items() if k != "changes"}


def _provenance(described: dict[str, Any]) -> Provenance:
    return Provenance(**{**described, "changes": tuple(described.get("changes", ()))})


def write_cascade(
    cascade: Cascade,
    folder: Path,
    provenance: Mapping[str, Provenance],
    storage: Mapping[str, Storage] | None = None,
    text_encoder: Path | None = None,
) -> None:
    """Writes a whole model into a new folder; the folder appears when everything in it is written.

    ``text_encoder`` is the folder of the frozen text encoder, whose files are copied (``copy_text_encoder``);
    CLIP is written without one.
    """
    write_parts(cascade.settings, cascade.networks(), folder, provenance, storage, text_encoder)


def write_parts(
    settings: CascadeSettings,
    networks: Mapping[str, nn.Module],
    folder: Path,
    provenance: Mapping[str, Provenance],
    storage: Mapping[str, Storage] | None = None,
    text_encoder: Path | None = None,
    further: Callable[[Path], None] | None = None,
) -> None:
    """``write_cascade`` for a model that may not be whole yet: Stage A alone, say, which others build on.

    ``further`` writes more files into the folder, before it appears under its name.
    """
    with new_folder(folder) as partial:
        parts = [part for part in networks if part in NETWORKS]
        for part in parts:
            how = (storage or {}).get(part, "float32")
            write_network(networks[part], partial / f"{part}.safetensors", provenance[part], how)
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
        if further is not None:
            further(partial)
        objectives = {part: _named(settings, part) for part in OF_OBJECTIVES if part in _diffusing(networks)}
        values = {IN_FILES.get(name, name): value for name, value in dataclasses.asdict(settings).items()}
        for part in OF_OBJECTIVES:
            del values[f"{part}_objective"]
        description = {
            "format": max([1, *map(_format_of, objectives.values())]),
            "parts": parts,
            "objectives": {part: objective.as_json() for part, objective in objectives.items()},
            "settings": values,
        }
        write_json(partial / "model.json", description)


IN_FILES = {"latent_statistics": "map_statistics"}
"""Settings that ``model.json`` knows by another name."""

OF_OBJECTIVES = ("decoder", "prior")
"""The parts whose objectives are settings of a model: ``CascadeSettings.decoder_objective`` and so on."""


def _named(settings: CascadeSettings, part: str) -> Objective:
    return getattr(settings, f"{part}_objective")


def _diffusing(networks: Mapping[str, Any]) -> dict[str, Prior | Decoder]:
    """The networks that have an objective, by name."""
    return {name: network for name, network in networks.items() if isinstance(network, Prior | Decoder)}


def _implied(network: nn.Module) -> Objective | None:
    """The objective of a network that is described by what it predicts alone; None if it has none."""
    return make_objective(network.config.prediction) if isinstance(network, Prior | Decoder) else None


def _format_of(objective: Objective | None) -> int:
    """The oldest format that has words for an objective. Readers of format 1 take every network that does not
    predict noise for one that predicts the velocity along the published schedule."""
    if isinstance(objective, NoisePrediction | VelocityPrediction):
        return 1 if objective.schedule == PUBLISHED_SCHEDULE else 2
    return 1 if objective is None else 2


def read_settings(path: Path) -> tuple[CascadeSettings, list[str]]:
    """The settings and the names of the parts in a ``model.json``.

    Objectives that it does not name are the published ones here; ``read_parts`` reads them off the networks.
    """
    return _read_description(path)[:2]


def _read_description(path: Path) -> tuple[CascadeSettings, list[str], dict[str, Objective]]:
    """Settings, parts and the objectives that are named."""
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
            f"{path} is no description of a model ({type(error).__name__}: {error}); get the model again"
        ) from error


def read_cascade(folder: Path, dtype: torch.dtype = torch.float32) -> Cascade:
    """Reads a model folder, onto the CPU."""
    settings, parts, _ = read_parts(folder, dtype)
    missing = {"vqgan", "decoder"} - set(parts)
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(sorted(missing))}; get the model again")
    return Cascade(settings=settings, **parts)


def read_parts(
    folder: Path, dtype: torch.dtype = torch.float32
) -> tuple[CascadeSettings, dict[str, Any], dict[str, Provenance]]:
    """Settings, parts by name, and where each network came from, of a model that need not be whole."""
    if not (folder / "model.json").is_file():
        raise CheckpointError(f"{folder} is no model folder: it has no model.json; give one that has")
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
                raise CheckpointError(f"{folder / name}.safetensors holds another network; get it again")
        else:
            raise CheckpointError(
                f"{folder}/model.json names an unknown part {shown(name)}; upgrade wuerstchen"
            )
    return _with_objectives(settings, parts, objectives, folder), parts, provenance


def _with_objectives(
    settings: CascadeSettings, parts: Mapping[str, Any], named: Mapping[str, Objective], folder: Path
) -> CascadeSettings:
    """The settings with the objectives of models that name none (format 1); checks those that are named."""
    found: dict[str, Any] = {}
    for part, network in _diffusing(parts).items():
        implied = _implied(network)
        objective = named.get(part, implied)
        assert objective is not None
        if objective.kind != network.config.prediction:
            raise CheckpointError(
                f"{folder}/model.json says that the {part} has the objective {objective.kind!r}, and its "
                f"file that it predicts {network.config.prediction!r}; get the model again"
            )
        if part not in named and _format_of(implied) > 1:
            raise CheckpointError(
                f"{folder}/model.json does not name the objective of its {part}; get the model again"
            )
        found[f"{part}_objective"] = objective
    return dataclasses.replace(settings, **found)


def is_native_network(path: Path) -> bool:
    """Whether a safetensors file says that ``write_network`` made it."""
    try:
        with open_safetensors(path) as file:
            return _HEADER in (file.metadata() or {})
    except CheckpointError:
        return False


def _read(path: Path, sources: Sources, dtype: torch.dtype, leave_out: Collection[str]) -> Cascade:
    if sources.prior or sources.text_encoder or sources.decoder_text_encoder:
        raise UserError(f"{path} is a native model, which contains all its parts. Do not give others.")
    return read_cascade(path, dtype)


def _write(cascade: Cascade, folder: Path, storage: Storage, source: Path) -> None:
    provenance = Provenance(recipe=f"converted from {source.name}", seed=0, images=0, data="")
    parts = [part for part in cascade.networks() if part in NETWORKS]
    # The text encoder of a native model is a folder with its own vocabulary. It is copied.
    copied = source / "text_encoder" if _is_native(source) and cascade.text_encoder is not None else None
    write_cascade(cascade, folder, dict.fromkeys(parts, provenance), dict.fromkeys(parts, storage), copied)


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

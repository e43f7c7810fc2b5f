"""The layout of the original repository: ``.pt`` files with dictionaries of tensors, and no configuration.

The keys determine which network a dictionary contains, the shapes its configuration. Values that no shape
determines have their published value: the width of attention heads, patches of 2×2, Stage A's scale factor.
Our names are those of diffusers. Its script ``convert_wuerstchen.py`` shows the three differences: the
original stores queries, keys and values as one matrix, and uses other names for the projection after
attention and for the codebook.
"""

import dataclasses
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wuerstchen.checkpoints.files import new_folder
from wuerstchen.checkpoints.hub import local_folder
from wuerstchen.checkpoints.layout_table import Layout, Sources, Storage
from wuerstchen.checkpoints.native import Provenance
from wuerstchen.checkpoints.original_config import (
    BACKBONES,
    HEAD_WIDTH,
    PAELLA_HEAD_WIDTH,
    Config,
    StateDict,
    config_of,
)
from wuerstchen.checkpoints.text_encoder import read_text_encoder
from wuerstchen.checkpoints.torch_files import check_apart, check_whole, read_torch_file
from wuerstchen.checkpoints.weights import plain_names
from wuerstchen.errors import CheckpointError, UserError, shown
from wuerstchen.models.cascade import PUBLISHED_V1, Cascade, CascadeSettings
from wuerstchen.models.compressor import Compressor, CompressorConfig
from wuerstchen.models.decoder import Decoder, DecoderConfig
from wuerstchen.models.paella import Paella, PaellaConfig
from wuerstchen.models.prior import ADDED_FIELDS, Prior, PriorConfig
from wuerstchen.models.vqgan import VQGAN, VQGANConfig

STATE_KEYS = ("ema_state_dict", "state_dict_ema", "state_dict")
"""The keys of the network in a file. The first that exists is read: averaged weights are preferred."""
COMPRESSOR_KEY = "effnet_state_dict"
"""The key of the semantic compressor, which was trained with Stage B, in Stage B's file."""
MAX_KEYS = 5_000
"""Limit of tensors, more than three times as many as any published network has."""

VQGAN_FILE = "vqgan_f4_v1_500k.pt"
"""For v1 and v2."""
V1_FILES = {"decoder": "model_stage_b.pt", "prior": "model_stage_c_ema.pt"}
V2_FILES = {"decoder": "model_v2_stage_b.pt", "prior": "model_v2_stage_c.pt"}
PUBLISHED_TEXT_ENCODERS = {1280: "warp-ai/wuerstchen-prior", 1024: "warp-ai/wuerstchen"}
"""The text encoders that the published models were trained with, by width. The files do not contain them."""


def find_original(source: Path) -> list[Path]:
    """``source`` itself if it is a ``.pt`` file, otherwise the sorted ``.pt`` files in that folder."""
    if source.is_file():
        return [source] if source.suffix == ".pt" else []
    return sorted(path for path in source.glob("*.pt") if path.is_file() and path.name[0] != ".")


def read_original(source: Path, *, dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
    """The networks in a ``.pt`` file, or in all ``.pt`` files of a folder, in eval mode on the CPU.

    The keys of the result are ``vqgan``, ``decoder``, ``compressor`` and ``prior``, if the files contain
    them. A file may be a state dict, a dictionary of state dicts, or a checkpoint of the original's training
    scripts, whose training state is ignored. Floating-point weights are converted to ``dtype``. Without
    conversion they stay memory-mapped.

    Raises ``CheckpointError`` if a file is damaged or contains anything but these networks, if a key is
    missing or unexpected, if a shape is wrong, and if two files contain the same part.
    """
    paths = find_original(source)
    if not paths:
        reason = "is not a .pt file and contains none" if source.exists() else "does not exist"
        raise CheckpointError(f"{source} {reason}. Use one of the original's .pt files, or their folder.")
    networks: dict[str, nn.Module] = {}
    origins: dict[str, str] = {}
    for path in paths:
        for state in _state_dicts(read_torch_file(path), path):
            part, network = network_of(state, dtype=dtype)
            if part in networks:
                raise CheckpointError(
                    f"{state.place} contains a {part}, and so does "
                    f"{origins[part]}. Use the files of one model."
                )
            networks[part], origins[part] = network, state.place
    return networks


def read_original_compressor(path: Path, *, dtype: torch.dtype = torch.float32) -> Compressor | None:
    """The compressor in one of the original's files, without reading the other networks. None if there is
    none. Raises ``CheckpointError`` like ``read_original``."""
    content = read_torch_file(path)
    if isinstance(content, Mapping) and content.get(COMPRESSOR_KEY) is not None:
        state = _state_dict(content[COMPRESSOR_KEY], f"{path}[{COMPRESSOR_KEY!r}]")
    elif isinstance(content, Mapping) and "mapper.0.weight" in content:
        state = _state_dict(content, str(path))
    else:
        return None
    _, network = network_of(state, dtype=dtype)
    return network if isinstance(network, Compressor) else None


def write_original(parts: Mapping[str, nn.Module], folder: Path) -> list[Path]:
    """Writes networks (keys of ``parts``: vqgan, decoder, compressor, prior) under the published names.

    The names are v1's if the decoder is, or if there is no decoder and the prior reads text states of width
    1024. Every file is written atomically and contains only tensors. The layout cannot store a model's
    settings: the reader has to know how the semantic latents are normalized.

    Raises ``CheckpointError`` before anything is written if a file already exists, and for networks that the
    layout cannot store or that would be read back as other networks.
    """
    states = {part: _state_to_write(part, network) for part, network in parts.items()}
    if "compressor" in states and "decoder" not in states:
        raise CheckpointError(
            "the compressor cannot be written alone: the original stores it in "
            "Stage B's file. Pass the decoder too."
        )
    names = V1_FILES if _is_v1(parts) else V2_FILES
    contents: dict[str, dict[str, dict[str, Tensor]]] = {}
    if "vqgan" in states:
        contents[VQGAN_FILE] = {"state_dict": states["vqgan"]}
    if "decoder" in states:
        contents[names["decoder"]] = {"state_dict": states["decoder"]}
    if "compressor" in states:
        contents[names["decoder"]][COMPRESSOR_KEY] = states["compressor"]
    if "prior" in states:
        contents[names["prior"]] = {"ema_state_dict": states["prior"]}

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be created ({error.strerror}). Choose another folder."
        ) from error
    paths = [folder / name for name in contents]
    for path in paths:
        if path.exists():
            raise CheckpointError(f"{path} already exists. Choose another folder or remove it.")
    for path, content in zip(paths, contents.values(), strict=True):
        _write_whole(content, path)
    return paths


def network_of(state: StateDict, *, dtype: torch.dtype = torch.float32) -> tuple[str, nn.Module]:
    """The part that a state dict contains, and its network.

    Raises ``CheckpointError`` before anything is allocated if it is unknown or inconsistent.
    """
    config = config_of(state)
    part, network_class = _NETWORKS[type(config)]
    try:
        with torch.device("meta"):
            network = network_class(config)
    except RuntimeError as error:  # more values than an integer can count
        raise CheckpointError(
            f"{state.place}: the shapes are not those of a {part} "
            f"({str(error).partition(chr(10))[0]}). Download the file again."
        ) from error
    expected = _to_original(network.state_dict())
    for key in sorted(expected.keys() | state.tensors.keys()):
        if key not in expected:
            raise CheckpointError(
                f"{state.place}: {shown(key)} is not a key of this {part}. Download the file again."
            )
        ours, theirs = expected[key], state.tensors.get(key)
        if theirs is None:
            raise state.error(key, "missing", tuple(ours.shape))
        if ours.shape != theirs.shape:
            raise state.error(key, tuple(theirs.shape), tuple(ours.shape))
        if ours.is_floating_point() != theirs.is_floating_point():
            raise state.error(key, theirs.dtype, ours.dtype)
    network.load_state_dict(_from_original(state.tensors, dtype), assign=True)
    return part, network.eval().requires_grad_(False)


def _state_dicts(content: object, path: Path) -> Iterator[StateDict]:
    """The state dicts of networks in the content of a file, without the training state."""
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} contains a {type(content).__name__}, not tensors by "
            "name. Use one of the original's files."
        )
    names = [name for name in STATE_KEYS if content.get(name) is not None][:1]
    names += [COMPRESSOR_KEY] if content.get(COMPRESSOR_KEY) is not None else []
    if not names:
        yield _state_dict(content, str(path))
    for name in names:
        yield _state_dict(content[name], f"{path}[{name!r}]")


def _state_dict(content: object, place: str) -> StateDict:
    if not isinstance(content, Mapping) or not 0 < len(content) <= MAX_KEYS:
        what = f"{len(content)} entries" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise CheckpointError(
            f"{place} contains {what}, not the tensors of a network. Use one of the original's files."
        )
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{place}: the entry {shown(key)} is not a tensor. Use one of the original's files: a state "
                f"dict, or one under {', '.join((*STATE_KEYS, COMPRESSOR_KEY))}."
            )
        check_whole(value, f"{place}: the entry {shown(key)}")
    check_apart(content.values(), place)
    content = plain_names(content, place)
    # A saved DistributedDataParallel adds a prefix to all names.
    wrapped = all(key.startswith("module.") for key in content)
    return StateDict(
        place, {key.removeprefix("module.") if wrapped else key: t for key, t in content.items()}
    )


# Conversion of names to the original's and back


_NETWORKS: dict[type, tuple[str, type[nn.Module]]] = {
    VQGANConfig: ("vqgan", VQGAN),
    DecoderConfig: ("decoder", Decoder),
    PaellaConfig: ("decoder", Paella),
    CompressorConfig: ("compressor", Compressor),
    PriorConfig: ("prior", Prior),
}
_RENAMED = {
    "attention.to_out.0.": "attention.attn.out_proj.",
    "vquantizer.embedding.": "vquantizer.codebook.",
}


def _to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for key, tensor in state.items():
        block, projection, leaf = key.rpartition("attention.to_q.")
        if projection:
            rows = [state[f"{block}attention.to_{name}.{leaf}"] for name in "qkv"]
            found[f"{block}attention.attn.in_proj_{leaf}"] = torch.cat(rows)
        elif "attention.to_k." not in key and "attention.to_v." not in key:
            for ours, theirs in _RENAMED.items():
                key = key.replace(ours, theirs)
            found[key] = tensor
    return found


def _from_original(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        tensor = tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
        block, fused, leaf = key.rpartition("attention.attn.in_proj_")
        if fused:
            for name, rows in zip("qkv", tensor.chunk(3), strict=True):
                # Not views of one tensor: safetensors would refuse to write them.
                found[f"{block}attention.to_{name}.{leaf}"] = rows.clone()
        else:
            for ours, theirs in _RENAMED.items():
                key = key.replace(theirs, ours)
            found[key] = tensor
    return found


# Writing


def _is_v1(parts: Mapping[str, nn.Module]) -> bool:
    decoder, prior = parts.get("decoder"), parts.get("prior")
    if decoder is None and isinstance(prior, Prior):
        return prior.config.c_cond == 1024
    return isinstance(decoder, Paella)


def _state_to_write(part: str, network: nn.Module) -> dict[str, Tensor]:
    """The tensors of a network under the original's names. Checks that they are read back as the same
    network."""
    if part not in {name for name, _ in _NETWORKS.values()}:
        raise _cannot_hold(part, "the original's files cannot contain it")
    config: Any = network.config
    assert _NETWORKS[type(config)] == (part, type(network))
    if getattr(config, "prediction", "noise") != "noise":
        raise _cannot_hold(
            part, f"it predicts the {config.prediction}, the original's networks predict noise"
        )
    for name in ADDED_FIELDS if isinstance(config, PriorConfig) else ():
        if value := getattr(config, name):
            raise _cannot_hold(part, f"its {name} is {value}, the original's priors have none")
    if isinstance(config, DecoderConfig) and config.clip_embd is None:
        raise _cannot_hold(part, "it reads no text, the original's decoders do")
    if isinstance(config, CompressorConfig) and config.backbone not in BACKBONES.values():
        raise _cannot_hold(part, f"its backbone is {config.backbone}, the original's is EfficientNetV2")
    width = PAELLA_HEAD_WIDTH if isinstance(config, PaellaConfig) else HEAD_WIDTH
    if any(c != heads * width for c, heads in _widths_and_heads(config)):
        raise _cannot_hold(part, f"its nhead is {config.nhead}, but readers assume {width} channels per head")
    with torch.device("meta"):
        plain = type(network)(config)
    if plain.state_dict().keys() != network.state_dict().keys():
        raise _cannot_hold(part, "its weights do not match its configuration. Does it have adapters?")
    tensors = _to_original(network.state_dict())
    try:
        _, again = network_of(StateDict(f"the {part}", {key: t.to("meta") for key, t in tensors.items()}))
    except CheckpointError as error:
        raise _cannot_hold(part, f"it could not be read back ({error})") from error
    derived: Any = again.config
    for field in dataclasses.fields(config):
        ours, theirs = getattr(config, field.name), getattr(derived, field.name)
        if field.name not in ("dropout", "nhead") and ours != theirs:
            raise _cannot_hold(part, f"its {field.name} is {ours}, but a reader would assume {theirs}")
    return {key: _compact(tensor) for key, tensor in tensors.items()}


def _widths_and_heads(config: Config) -> list[tuple[int, int]]:
    """Width and number of heads of all attention blocks, by level."""
    if isinstance(config, PriorConfig):
        return [(config.c, config.nhead)]
    if isinstance(config, DecoderConfig | PaellaConfig):
        levels = zip(config.c_hidden, config.nhead, config.level_config, strict=True)
        return [(width, heads) for width, heads, kinds in levels if "A" in kinds]
    return []


def _cannot_hold(part: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"the {part} cannot be written in the original's layout: {reason}. "
        "Omit it, or keep the native layout."
    )


def _compact(tensor: Tensor) -> Tensor:
    """The tensor on the CPU with its own storage, because torch.save writes the whole storage of a view."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _write_whole(content: Mapping[str, Any], path: Path) -> None:
    """Writes a file atomically: under a temporary name, flushed to disk, then renamed."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} cannot be written ({error}). Free some space or choose another folder."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _read(path: Path, sources: Sources, dtype: torch.dtype, leave_out: Collection[str]) -> Cascade:
    """A whole model. Its text encoders come from ``sources``, or are the published ones."""
    if sources.prior is not None:
        raise UserError(
            f"{path} holds the original's files, which take no prior from "
            "elsewhere. Put the .pt file of Stage C next to them."
        )
    parts: dict[str, Any] = dict(read_original(path, dtype=dtype))
    missing = {"vqgan", "decoder"} - parts.keys()
    if missing:
        raise CheckpointError(
            f"{path} contains {', '.join(parts)}, but no {' and no '.join(sorted(missing))}. "
            "Put the files of Stages A, B and C into one folder."
        )
    wanted: dict[str, int] = {}
    if "prior" in parts:
        wanted["text_encoder"] = parts["prior"].config.c_cond
    if "prior" not in parts or parts["decoder"].config.clip_embd != wanted["text_encoder"]:
        wanted["decoder_text_encoder"] = parts["decoder"].config.clip_embd
    for part, width in wanted.items():
        if part in leave_out:
            continue
        source = getattr(sources, part) or PUBLISHED_TEXT_ENCODERS.get(width)
        if source is None:
            raise CheckpointError(
                f"{path} needs a {part} with states of width {width}, and none is published. Pass its folder."
            )
        folder = local_folder(
            source, local_files_only=sources.local_files_only, only=("text_encoder/*", "tokenizer/*")
        )
        parts[part] = read_text_encoder(folder, dtype)
    return Cascade(settings=_published_settings(parts["decoder"]), **parts)


def _read_parts(path: Path) -> tuple[CascadeSettings, dict[str, Any], dict[str, Provenance]]:
    parts: dict[str, Any] = dict(read_original(path))
    return _published_settings(parts.get("decoder")), parts, {}


def _published_settings(decoder: nn.Module | None) -> CascadeSettings:
    return PUBLISHED_V1 if isinstance(decoder, Paella) else CascadeSettings()


def _write(cascade: Cascade, folder: Path, storage: Storage, source: Path) -> None:
    dtype = torch.float16 if storage == "float16" else torch.float32
    networks = {name: network.to(dtype) for name, network in cascade.networks().items()}
    with new_folder(folder) as partial:
        write_original(networks, partial)


ORIGINAL_LAYOUT = Layout(
    marker=".pt file",
    shards=False,
    matches=lambda path: path.suffix == ".pt" or any(path.glob("*.pt")),
    read=_read,
    write=_write,
    parts=frozenset({"vqgan", "decoder", "prior", "compressor"}),
    read_parts=_read_parts,
    assumed_settings=lambda cascade: _published_settings(cascade.decoder),
)

"""Any layout of a model: telling which one a folder has, reading it whole, and writing it in another."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from wuerstchen.checkpoints.clip import clip_tokenizer_of
from wuerstchen.checkpoints.diffusers import (
    COMBINED_PIPELINE,
    TORCH,
    DecoderFolder,
    PriorFolder,
    TensorLayout,
    linked_prior,
    pipeline_class,
    read_decoder_folder,
    read_prior_folder,
    read_prior_network,
)
from wuerstchen.checkpoints.diffusers_write import write_model_folder
from wuerstchen.checkpoints.files import new_folder, open_safetensors, read_json
from wuerstchen.checkpoints.foreign import check_not_cascade, is_called_cascade
from wuerstchen.checkpoints.hub import local_folder
from wuerstchen.checkpoints.native import (
    NETWORKS,
    TEXT_ENCODERS,
    Provenance,
    Storage,
    read_cascade,
    read_tensors,
    write_cascade,
)
from wuerstchen.checkpoints.original import read_original, write_original
from wuerstchen.checkpoints.paddle import PADDLE, is_paddle
from wuerstchen.checkpoints.text_encoder import read_text_encoder
from wuerstchen.checkpoints.variants import is_spare_variant
from wuerstchen.diffusion.schedule import PUBLISHED_SCHEDULE
from wuerstchen.errors import CheckpointError, UserError
from wuerstchen.models.cascade import PUBLISHED_V1, Cascade, CascadeSettings, LatentStatistics
from wuerstchen.models.decoder import Decoder
from wuerstchen.models.paella import Paella
from wuerstchen.models.text import TextEncoder
from wuerstchen.models.vqgan import VQGAN

Layout = Literal["native", "diffusers", "original", "paddle"]

PLACES = {
    "diffusers": {"vqgan", "decoder", "prior", "text_encoder", "decoder_text_encoder"},
    "paddle": {"vqgan", "decoder", "prior", "text_encoder", "decoder_text_encoder"},
    "original": {"vqgan", "decoder", "prior", "compressor"},
}
"""The parts that a layout has a place for; the native one has one for all."""

# The original's files hold no text encoders. These are the ones its models were trained with, by width.
PUBLISHED_TEXT_ENCODERS = {1280: "warp-ai/wuerstchen-prior", 1024: "warp-ai/wuerstchen"}


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where parts come from that are not to be taken from the model's own folder.

    Each is a folder or a name on the hub.
    """

    prior: str | Path | None = None
    """A pipeline of Stage C, or a folder of its network alone (the text encoder is then the model's own)."""
    text_encoder: str | Path | None = None
    """For a model of the original's files alone, which hold none; so the next."""
    decoder_text_encoder: str | Path | None = None
    revision: str | None = None
    """Of the model, where it comes from the hub."""
    local_files_only: bool = False


def layout_of(path: Path) -> Layout:
    """The layout of a model's folder or file. Raises ``CheckpointError`` if it has none that is known."""
    if (path / "model.json").is_file():
        return "native"
    if (path / "model_index.json").is_file():
        return "paddle" if is_paddle(path) else "diffusers"
    if path.suffix == ".pt" or any(path.glob("*.pt")):
        return "original"
    _check_not_cascade(path)
    if (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} holds one network and no whole model; name the whole one, and this as prior"
        )
    raise CheckpointError(
        f"{path} is no model: it has no model.json, no model_index.json and no .pt file; "
        "give a folder that has one"
    )


def _check_not_cascade(path: Path) -> None:
    """Raises ``CheckpointError`` for files of Stable Cascade, which is published in single files."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    for file in files[:20]:
        if file.suffix == ".safetensors":
            names: list[str] = []
            with (
                contextlib.suppress(CheckpointError),
                open_safetensors(file) as opened,
            ):  # a damaged one is none
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
    """Reads a model in any layout onto the CPU; ``source`` is a path or a name on the hub.

    ``leave_out`` names parts that are not wanted. Raises ``CheckpointError`` if a part is missing or damaged,
    ``UserError`` if parts do not fit one another; nothing is then loaded.
    """
    sources = sources or Sources()
    path = local_folder(source, revision=sources.revision, local_files_only=sources.local_files_only)
    layout = layout_of(path)
    if layout == "native":
        if sources.prior or sources.text_encoder or sources.decoder_text_encoder:
            raise UserError(f"{path} is a native model, which has all its parts; leave out the other sources")
        cascade = read_cascade(path, dtype)
    elif layout == "original":
        cascade = _read_original(path, sources, dtype, leave_out)
    else:
        cascade = _read_pipelines(path, sources, dtype, PADDLE if layout == "paddle" else TORCH)
    # Checked again: a decoder that loses its text encoder reads Stage C's, which may not fit.
    return dataclasses.replace(cascade, **dict.fromkeys(leave_out)) if leave_out else cascade


def convert(
    source: str | Path,
    target: Path,
    layout: Layout,
    sources: Sources | None = None,
    *,
    storage: Storage = "float32",
    leave_out: Collection[str] = (),
) -> None:
    """Reads a model in any layout and writes it into the new folder ``target`` in another.

    Raises ``UserError`` if the layout has no place for a part or a setting; parts in ``leave_out`` are left
    behind knowingly.
    """
    if layout not in get_args(Layout):
        raise UserError(f"layout {layout!r} is unknown; use one of {', '.join(get_args(Layout))}")
    unknown = set(leave_out) - {f.name for f in dataclasses.fields(Cascade)} | set(leave_out) & {"settings"}
    if unknown or set(leave_out) & {"vqgan", "decoder"}:
        raise UserError(f"{', '.join(leave_out)} cannot be left out; name parts other than vqgan and decoder")
    if os.path.lexists(target):  # before anything is fetched or read
        raise CheckpointError(f"{target} exists already; choose another folder or remove it")
    sources = sources or Sources()
    path = local_folder(source, revision=sources.revision, local_files_only=sources.local_files_only)
    native = layout_of(path) == "native"
    if native and layout != "native":
        _check_not_int8(path, layout)
    cascade = read_model(path, sources, leave_out=leave_out)
    if layout == "native":
        whence = Provenance(recipe=f"converted from {path.name}", seed=0, images=0, data="")
        parts = {part: whence for part in cascade.networks() if part in NETWORKS}
        small = dict.fromkeys(parts, storage)
        # A text encoder of ours is a folder with a vocabulary of its own, and is copied.
        copied = path / "text_encoder" if native and cascade.text_encoder is not None else None
        write_cascade(cascade, target, parts, small, copied)
        return
    if storage == "int8":
        raise UserError(f"int8 has no place in the {layout} layout; use float32 or float16")
    _check_places(cascade, layout)
    dtype = torch.float16 if storage == "float16" else torch.float32
    if layout == "original":
        networks = {name: part for name, part in cascade.networks().items() if name not in TEXT_ENCODERS}
        with new_folder(target) as partial:
            write_original({name: part.to(dtype) for name, part in networks.items()}, partial)
        return
    decoder, prior = _pipelines_of(cascade)
    write_model_folder(decoder, prior, target, dtype=dtype, layout=PADDLE if layout == "paddle" else TORCH)


def _read_pipelines(path: Path, sources: Sources, dtype: torch.dtype, layout: TensorLayout) -> Cascade:
    """A model of two pipelines, the second named by the first or given."""
    if sources.text_encoder is not None or sources.decoder_text_encoder is not None:
        raise UserError(f"{path} has text encoders of its own; leave out the other sources")
    decoder = read_decoder_folder(path, dtype=dtype, layout=layout)
    own = path if pipeline_class(path, layout) == COMBINED_PIPELINE else None
    network = None
    if sources.prior is not None:
        given = _fetched(sources.prior, sources)
        if (given / "model_index.json").is_file():
            own = given
        else:
            network = read_prior_network(given, dtype=dtype, layout=layout)
    if own is None:
        own = _fetched(linked_prior(path), sources)
    own_layout = PADDLE if is_paddle(own) else TORCH
    prior = read_prior_folder(own, dtype=dtype, layout=own_layout, given=[] if network is None else ["prior"])
    prior.prior = network or prior.prior
    return cascade_of(decoder, prior)


def cascade_of(decoder: DecoderFolder, prior: PriorFolder) -> Cascade:
    """One model of two pipelines. Raises ``CheckpointError`` for numbers that are not the published ones."""
    published = (42.67, 10.67, PUBLISHED_SCHEDULE, PUBLISHED_SCHEDULE)
    found = (prior.resolution_multiple, decoder.latent_dim_scale, prior.schedule, decoder.schedule)
    if found != published:
        raise CheckpointError(
            f"resolution_multiple, latent_dim_scale and schedules {found} are not the published {published}; "
            "load such a model with wuerstchen.diffusers"
        )
    assert decoder.text_encoder is not None
    assert decoder.tokenizer is not None
    assert prior.text_encoder is not None
    assert prior.tokenizer is not None
    assert decoder.decoder is not None
    assert decoder.vqgan is not None
    statistics = LatentStatistics(mean=(-prior.latent_std,), std=(prior.latent_mean,))
    return Cascade(
        settings=CascadeSettings(
            latent_statistics=statistics, size_multiple=_size_multiple(decoder.decoder, decoder.vqgan)
        ),
        vqgan=decoder.vqgan,
        decoder=decoder.decoder,
        prior=prior.prior,
        text_encoder=TextEncoder.from_transformers(prior.text_encoder, prior.tokenizer),
        decoder_text_encoder=TextEncoder.from_transformers(decoder.text_encoder, decoder.tokenizer),
    )


def _size_multiple(decoder: Decoder, vqgan: VQGAN) -> int:
    """The published multiple of sizes, or the next that the grids of these networks fit."""
    return math.lcm(CascadeSettings.size_multiple, decoder.config.size_multiple * vqgan.config.factor)


def _pipelines_of(cascade: Cascade) -> tuple[DecoderFolder, PriorFolder | None]:
    """The inverse of ``cascade_of``."""
    text, decoder_text = cascade.text_encoder, cascade.text_encoder_of_decoder()
    if decoder_text is None:
        raise UserError("the model has no text encoder for Stage B, which the layout needs; give one")
    assert not isinstance(cascade.decoder, Paella)
    decoder = DecoderFolder(
        decoder=cascade.decoder,
        vqgan=cascade.vqgan,
        text_encoder=decoder_text.model,
        tokenizer=clip_tokenizer_of(decoder_text),
    )
    if cascade.prior is None:
        return decoder, None
    if text is None:
        raise UserError("the model has no text encoder for Stage C, which the layout needs; give one")
    statistics = cascade.settings.latent_statistics
    prior = PriorFolder(
        prior=cascade.prior,
        text_encoder=text.model,
        tokenizer=clip_tokenizer_of(text),
        latent_mean=statistics.std[0],
        latent_std=-statistics.mean[0],
    )
    return decoder, prior


def _read_original(path: Path, sources: Sources, dtype: torch.dtype, leave_out: Collection[str]) -> Cascade:
    """A model of the original's files, with text encoders from elsewhere."""
    if sources.prior is not None:
        raise UserError(
            f"{path} holds the original's files, which take no prior from elsewhere; put the .pt file of "
            "Stage C beside them"
        )
    parts: dict[str, Any] = dict(read_original(path, dtype=dtype))
    missing = {"vqgan", "decoder"} - parts.keys()
    if missing:
        raise CheckpointError(
            f"{path} holds {', '.join(parts)} and lacks {', '.join(sorted(missing))}; "
            "put the files of Stages A, B and C into one folder"
        )
    v1 = isinstance(parts["decoder"], Paella)
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
                f"{path} needs a {part} with states of width {width}, and none is published; give its folder"
            )
        folder = _fetched(source, sources, only=("text_encoder/*", "tokenizer/*"))
        parts[part] = read_text_encoder(folder, dtype)
    return Cascade(settings=PUBLISHED_V1 if v1 else CascadeSettings(), **parts)


def _fetched(source: str | Path, sources: Sources, only: tuple[str, ...] = ()) -> Path:
    return local_folder(source, local_files_only=sources.local_files_only, only=only)


def _check_places(cascade: Cascade, layout: str) -> None:
    """Raises ``UserError`` naming what a layout has no place for: first what cannot be left behind."""
    is_v1 = isinstance(cascade.decoder, Paella)
    if is_v1 and layout != "original":
        raise UserError(f"the decoder of v1 has no place in the {layout} layout; use original or native")
    for part in sorted(PLACES[layout] & set(TEXT_ENCODERS)):
        encoder = getattr(cascade, part)
        if encoder is not None and encoder.model.config.model_type != "clip_text_model":
            raise UserError(
                f"{part} has no place in the {layout} layout: it is no CLIP; keep the native layout"
            )
    lacking = [part for part in cascade.networks() if part not in PLACES[layout]]
    if lacking:
        verb = "has" if len(lacking) == 1 else "have"
        raise UserError(
            f"{' and '.join(lacking)} {verb} no place in the {layout} layout, which holds "
            f"{', '.join(sorted(PLACES[layout]))}; add --leave-out {' '.join(lacking)}, or keep the "
            "native layout"
        )
    settings = cascade.settings
    if layout != "original" and len(settings.latent_statistics.mean) == 1:
        settings = dataclasses.replace(settings, latent_statistics=CascadeSettings().latent_statistics)
    published = PUBLISHED_V1 if is_v1 else CascadeSettings()
    if layout != "original" and isinstance(cascade.decoder, Decoder):
        multiple = _size_multiple(cascade.decoder, cascade.vqgan)
        published = dataclasses.replace(published, size_multiple=multiple)
    for field in dataclasses.fields(settings):
        value, theirs = getattr(settings, field.name), getattr(published, field.name)
        if value != theirs:
            raise UserError(
                f"{field.name}={value} has no place in the {layout} layout, which means {theirs}; "
                "keep the native layout"
            )


def _check_not_int8(folder: Path, layout: str) -> None:
    """Raises ``UserError`` if a native folder holds a network in int8."""
    for path in sorted(folder.glob("*.safetensors")):
        if read_tensors(path)[1].get("storage") == "int8":
            raise UserError(
                f"{path} is stored in int8, which has no place in the {layout} layout; "
                f"keep the native layout, or convert it to native with --storage float32 first"
            )


def weight_files(path: Path, sources: Sources | None = None) -> list[Path]:
    """The files of weights that ``read_model`` reads, its linked or given Stage C included.

    Variants (fp16) beside full weights are not among them.
    """
    sources = sources or Sources()
    if path.is_file():
        return [path]
    roots = [path]
    if layout_of(path) in ("diffusers", "paddle"):
        if sources.prior is not None:
            roots.append(_fetched(sources.prior, sources))
        elif pipeline_class(path, PADDLE if is_paddle(path) else TORCH) != COMBINED_PIPELINE:
            roots.append(_fetched(linked_prior(path), sources))
    endings = ("*.safetensors", "*.bin", "*.pt")
    found = {file for root in roots for ending in endings for file in root.rglob(ending) if file.is_file()}
    return sorted(file for file in found if not is_spare_variant(file))

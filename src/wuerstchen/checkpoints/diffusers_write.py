"""Writes diffusers' folders of Würstchen pipelines."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from wuerstchen.checkpoints.clip import (
    write_clip,
    write_clip_tokenizer,
)
from wuerstchen.checkpoints.diffusers import (
    CLASSES,
    COMBINED_PIPELINE,
    COMPONENTS,
    DECODER_PIPELINE,
    INNER_PRIOR,
    NUMBERS,
    PRIOR_PIPELINE,
    TORCH,
    DecoderFolder,
    PriorFolder,
    TensorLayout,
)
from wuerstchen.checkpoints.diffusers_config import shared_fields
from wuerstchen.checkpoints.files import new_folder, write_json, write_safetensors
from wuerstchen.errors import UserError
from wuerstchen.models.decoder import Decoder
from wuerstchen.models.prior import ADDED_FIELDS, Prior
from wuerstchen.models.vqgan import VQGAN


def write_prior_folder(parts: PriorFolder, folder: Path) -> None:
    """Writes a Stage C pipeline to a new folder, in the published layout.

    diffusers up to 0.37 loads it, and later versions after ``wuerstchen.diffusers.register()``. Raises
    ``UserError`` for networks that the layout cannot store.
    """
    _check_writable(parts.prior)
    with new_folder(folder) as partial:
        _write_prior_parts(parts, partial, "")
        _write_index(partial, PRIOR_PIPELINE, parts)


def write_decoder_folder(parts: DecoderFolder, folder: Path) -> None:
    """Writes a pipeline of Stages B and A to a new folder. See ``write_prior_folder``."""
    _check_writable(parts.decoder)
    with new_folder(folder) as partial:
        _write_decoder_parts(parts, partial)
        _write_index(partial, DECODER_PIPELINE, parts)
        _write_readme(parts, partial)


def write_model_folder(
    decoder: DecoderFolder,
    prior: PriorFolder | None,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    layout: TensorLayout = TORCH,
) -> None:
    """Writes a whole model: a pipeline of Stages B and A, with the Stage C pipeline in a subfolder.

    Weights are stored in ``dtype``.
    """
    _check_writable(decoder.decoder)
    decoder.prior = None if prior is None else INNER_PRIOR
    with new_folder(folder) as partial:
        _write_decoder_parts(decoder, partial, layout, dtype)
        _write_index(partial, DECODER_PIPELINE, decoder, layout)
        _write_readme(decoder, partial)
        if prior is not None:
            _check_writable(prior.prior)
            (partial / INNER_PRIOR).mkdir()
            _write_prior_parts(prior, partial / INNER_PRIOR, "", layout, dtype)
            _write_index(partial / INNER_PRIOR, PRIOR_PIPELINE, prior, layout)


def write_combined_folder(decoder: DecoderFolder, prior: PriorFolder, folder: Path) -> None:
    """Writes all nine components as one pipeline.

    This layout cannot store the numbers of the two halves. Raises ``UserError`` unless they are diffusers'
    defaults.
    """
    _check_writable(decoder.decoder)
    _check_writable(prior.prior)
    for half, name in ((prior, PRIOR_PIPELINE), (decoder, DECODER_PIPELINE)):
        for number, default in NUMBERS[name].items():
            if getattr(half, number) != default:
                raise UserError(
                    f"{number}={getattr(half, number)} cannot be stored in a {COMBINED_PIPELINE}, which "
                    f"assumes {default}. Save the two halves in separate folders."
                )
    with new_folder(folder) as partial:
        _write_decoder_parts(decoder, partial)
        _write_prior_parts(prior, partial, "prior_")
        _write_index(partial, COMBINED_PIPELINE, decoder)


def _check_writable(network: Prior | Decoder | None) -> None:
    """Raises ``UserError`` if diffusers' classes cannot represent this network."""
    if network is not None and network.config.prediction != "noise":
        raise UserError(
            f"a network that predicts the {network.config.prediction} cannot be stored in diffusers' layout, "
            "whose networks predict the noise. Keep the native layout."
        )
    for name in ADDED_FIELDS if isinstance(network, Prior) else ():
        if value := getattr(network.config, name):
            raise UserError(
                f"a prior with {name}={value} cannot be stored in diffusers' layout, whose priors have none. "
                "Keep the native layout."
            )
    if isinstance(network, Decoder) and network.config.clip_embd is None:
        raise UserError(
            "a Stage B without text cannot be stored in diffusers' layout. Keep the native layout."
        )


def _write_prior_parts(
    parts: PriorFolder,
    folder: Path,
    prefix: str,
    layout: TensorLayout = TORCH,
    dtype: torch.dtype | None = None,
) -> None:
    _write_network(parts.prior, "prior", folder / f"{prefix}prior", layout, dtype)
    _write_text(parts, folder, prefix, layout, dtype)


def _write_decoder_parts(
    parts: DecoderFolder, folder: Path, layout: TensorLayout = TORCH, dtype: torch.dtype | None = None
) -> None:
    _write_network(parts.decoder, "decoder", folder / "decoder", layout, dtype)
    _write_network(parts.vqgan, "vqgan", folder / "vqgan", layout, dtype)
    _write_text(parts, folder, "", layout, dtype)


def _write_readme(parts: DecoderFolder, folder: Path) -> None:
    if parts.prior is not None:
        text = f"---\npipeline_tag: text-to-image\nprior:\n- {parts.prior}\n---\n"
        (folder / "README.md").write_text(text, encoding="utf-8")


def _write_network(
    network: Prior | Decoder | VQGAN | None,
    part: str,
    folder: Path,
    layout: TensorLayout,
    dtype: torch.dtype | None,
) -> None:
    if network is None:
        raise UserError(f"the model has no {part}, which this layout needs. Load the whole model.")
    folder.mkdir()
    fields = {"_class_name": CLASSES[part][0], **shared_fields(network.config)}
    write_json(folder / "config.json", fields)
    weights = folder / f"{layout.network_stems[0]}.safetensors"
    write_safetensors(layout.tensors(network), weights, {"format": layout.network_format}, dtype)


def _write_text(
    parts: PriorFolder | DecoderFolder,
    folder: Path,
    prefix: str,
    layout: TensorLayout,
    dtype: torch.dtype | None,
) -> None:
    if parts.text_encoder is None or parts.tokenizer is None:
        raise UserError("the model has no text encoder, which this layout needs. Load the whole model.")
    place, tensors = folder / f"{prefix}text_encoder", layout.tensors(parts.text_encoder)
    write_clip(parts.text_encoder, place, tensors=tensors, written=layout.text_format, dtype=dtype)
    write_clip_tokenizer(parts.tokenizer, folder / f"{prefix}tokenizer")
    (folder / f"{prefix}scheduler").mkdir()
    schedule = {"_class_name": CLASSES["scheduler"][0], **dataclasses.asdict(parts.schedule)}
    write_json(folder / f"{prefix}scheduler" / "scheduler_config.json", schedule)


def _write_index(
    folder: Path, name: str, parts: PriorFolder | DecoderFolder, layout: TensorLayout = TORCH
) -> None:
    index: dict[str, Any] = {"_class_name": name, f"_{layout.own_library}_version": layout.version}
    text = layout.text_library
    library = {"scheduler": layout.own_library, "text_encoder": text, "tokenizer": text}
    for part in sorted(COMPONENTS[name]):
        kind = part.removeprefix("prior_") if name == COMBINED_PIPELINE else part
        index[part] = [library.get(kind, "wuerstchen"), CLASSES[kind][0]]
    write_json(folder / "model_index.json", index | {key: getattr(parts, key) for key in NUMBERS[name]})

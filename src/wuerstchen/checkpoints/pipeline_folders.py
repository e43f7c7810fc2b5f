"""Models of two pipelines, as diffusers and ppdiffusers store them. Only the tensors differ."""

import dataclasses
import math
from collections.abc import Collection
from pathlib import Path

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
from wuerstchen.checkpoints.hub import local_folder
from wuerstchen.checkpoints.layout_table import Layout, Sources, Storage
from wuerstchen.checkpoints.paddle import PADDLE, is_paddle
from wuerstchen.diffusion.schedule import PUBLISHED_SCHEDULE
from wuerstchen.errors import CheckpointError, UserError
from wuerstchen.models.cascade import Cascade, CascadeSettings, LatentStatistics
from wuerstchen.models.decoder import Decoder
from wuerstchen.models.paella import Paella
from wuerstchen.models.text import TextEncoder
from wuerstchen.models.vqgan import VQGAN


def cascade_of(decoder: DecoderFolder, prior: PriorFolder) -> Cascade:
    """The model that two pipelines make.

    Raises ``CheckpointError`` unless their numbers are the published ones.
    """
    published = (42.67, 10.67, PUBLISHED_SCHEDULE, PUBLISHED_SCHEDULE)
    found = (prior.resolution_multiple, decoder.latent_dim_scale, prior.schedule, decoder.schedule)
    if found != published:
        raise CheckpointError(
            f"resolution_multiple, latent_dim_scale and the schedules are {found}, not the published "
            f"{published}. Load this model with wuerstchen.diffusers."
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
    """The published multiple of sizes, or the next one that fits the grids of these networks."""
    return math.lcm(CascadeSettings.size_multiple, decoder.config.size_multiple * vqgan.config.factor)


def _pipelines_of(cascade: Cascade) -> tuple[DecoderFolder, PriorFolder | None]:
    """The inverse of ``cascade_of``."""
    text, decoder_text = cascade.text_encoder, cascade.text_encoder_of_decoder()
    if decoder_text is None:
        raise UserError(
            "this layout needs a text encoder for Stage B, and the model has none. Pass "
            "--decoder-text-encoder."
        )
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
        raise UserError(
            "this layout needs a text encoder for Stage C, and the model has none. Pass --text-encoder."
        )
    statistics = cascade.settings.latent_statistics
    prior = PriorFolder(
        prior=cascade.prior,
        text_encoder=text.model,
        tokenizer=clip_tokenizer_of(text),
        latent_mean=statistics.std[0],
        latent_std=-statistics.mean[0],
    )
    return decoder, prior


def _tensors_in(folder: Path) -> TensorLayout:
    return PADDLE if is_paddle(folder) else TORCH


def _read(path: Path, sources: Sources, dtype: torch.dtype, leave_out: Collection[str]) -> Cascade:
    """Stages B and A from ``path``, Stage C from ``sources``, from ``path``, or from the linked pipeline."""
    if sources.text_encoder is not None or sources.decoder_text_encoder is not None:
        raise UserError(
            f"{path} already contains text encoders. Do not pass text_encoder or decoder_text_encoder."
        )
    layout = _tensors_in(path)
    decoder = read_decoder_folder(path, dtype=dtype, layout=layout)
    folder = path if pipeline_class(path, layout) == COMBINED_PIPELINE else None
    network = None
    if sources.prior is not None:
        given = local_folder(sources.prior, local_files_only=sources.local_files_only)
        if (given / "model_index.json").is_file():
            folder = given
        else:
            network = read_prior_network(given, dtype=dtype, layout=layout)
    if folder is None:
        folder = local_folder(linked_prior(path), local_files_only=sources.local_files_only)
    given_parts = [] if network is None else ["prior"]
    prior = read_prior_folder(folder, dtype=dtype, layout=_tensors_in(folder), given=given_parts)
    prior.prior = network or prior.prior
    return cascade_of(decoder, prior)


def _other_folders(path: Path, sources: Sources) -> list[Path]:
    """The pipeline of Stage C, if it is not in ``path`` itself."""
    if sources.prior is not None:
        prior = sources.prior
    elif pipeline_class(path, _tensors_in(path)) != COMBINED_PIPELINE:
        prior = linked_prior(path)
    else:
        return []
    return [local_folder(prior, local_files_only=sources.local_files_only)]


def _write_diffusers(cascade: Cascade, folder: Path, storage: Storage, source: Path) -> None:
    _write(cascade, folder, storage, TORCH)


def _write_paddle(cascade: Cascade, folder: Path, storage: Storage, source: Path) -> None:
    _write(cascade, folder, storage, PADDLE)


def _write(cascade: Cascade, folder: Path, storage: Storage, layout: TensorLayout) -> None:
    decoder, prior = _pipelines_of(cascade)
    dtype = torch.float16 if storage == "float16" else torch.float32
    write_model_folder(decoder, prior, folder, dtype=dtype, layout=layout)


def _check(cascade: Cascade, name: str) -> None:
    """Raises ``UserError`` for networks that the pipelines' classes do not have."""
    if isinstance(cascade.decoder, Paella):
        raise UserError(f"the decoder of v1 cannot be stored in the {name} layout. Use original or native.")
    for part in ("decoder_text_encoder", "text_encoder"):
        encoder = getattr(cascade, part)
        if encoder is not None and encoder.model.config.model_type != "clip_text_model":
            raise UserError(
                f"{part} cannot be stored in the {name} layout: it is not a CLIP. Keep the native layout."
            )


def _assumed_settings(cascade: Cascade) -> CascadeSettings:
    """The published settings, with the two that the folders store."""
    settings = CascadeSettings()
    if len(cascade.settings.latent_statistics.mean) == 1:
        settings = dataclasses.replace(settings, latent_statistics=cascade.settings.latent_statistics)
    if isinstance(cascade.decoder, Decoder):
        multiple = _size_multiple(cascade.decoder, cascade.vqgan)
        settings = dataclasses.replace(settings, size_multiple=multiple)
    return settings


def _is_pipeline(path: Path) -> bool:
    return (path / "model_index.json").is_file()


DIFFUSERS_LAYOUT = Layout(
    marker="model_index.json",
    matches=lambda path: _is_pipeline(path) and not is_paddle(path),
    read=_read,
    write=_write_diffusers,
    parts=frozenset({"vqgan", "decoder", "prior", "text_encoder", "decoder_text_encoder"}),
    check=_check,
    assumed_settings=_assumed_settings,
    other_folders=_other_folders,
)
PADDLE_LAYOUT = dataclasses.replace(
    DIFFUSERS_LAYOUT,
    matches=lambda path: _is_pipeline(path) and is_paddle(path),
    write=_write_paddle,
    shards=False,
)

"""Pipelines out of folders and from the hub, and back into folders."""

import inspect
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wuerstchen.checkpoints.diffusers import (
    COMBINED_PIPELINE,
    DECODER_PARTS,
    PRIOR_PARTS,
    PRIOR_PIPELINE,
    DecoderFolder,
    PriorFolder,
    linked_prior,
    pipeline_class,
    read_decoder_folder,
    read_prior_folder,
    write_combined_folder,
    write_decoder_folder,
    write_prior_folder,
)
from wuerstchen.checkpoints.hub import HUB_NAME, local_folder
from wuerstchen.diffusers.base import DiffusionPipeline, plain
from wuerstchen.diffusers.combined import WuerstchenCombinedPipeline
from wuerstchen.diffusers.decoder import WuerstchenDecoderPipeline
from wuerstchen.diffusers.prior import WuerstchenPriorPipeline
from wuerstchen.diffusers.scheduler import DDPMWuerstchenScheduler
from wuerstchen.diffusion.schedule import CosineSchedule
from wuerstchen.errors import CheckpointError, UserError, UserNotice
from wuerstchen.lora import lora_names

PIPELINES = {
    kind.__name__: kind
    for kind in (WuerstchenPriorPipeline, WuerstchenDecoderPipeline, WuerstchenCombinedPipeline)
}
PRIOR_NUMBERS = ("latent_mean", "latent_std", "resolution_multiple")
DECODER_NUMBERS = ("latent_dim_scale",)

# Of a network in a folder; what is left there of an earlier one must not be taken for it.
_WEIGHT_FILES = ("diffusion_pytorch_model*", "model*.safetensors*", "pytorch_model*")


class Source:
    """Where a pipeline is loaded from and how, as ``from_pretrained`` is told; the rest are parts of it.

    ``settings`` is emptied of what is understood. ``prefix`` is what the names of the settings begin with.
    """

    def __init__(self, settings: dict[str, Any], prefix: str = "", like: "Source | None" = None) -> None:
        def taken(name: str, default: Any = None) -> Any:
            return settings.pop(prefix + name, default if like is None else getattr(like, name))

        given = taken("torch_dtype")  # which newer versions of diffusers call dtype
        self.torch_dtype = settings.pop(prefix + "dtype", None) or given
        self.cache_dir = taken("cache_dir")
        self.local_files_only = taken("local_files_only", False)
        self.token = taken("token")
        self.use_safetensors = taken("use_safetensors")
        self.revision = settings.pop(prefix + "revision", None)
        variant = settings.pop(prefix + "variant", None)
        settings.pop(prefix + "low_cpu_mem_usage", None)  # it always is
        self.dtype = torch.float32 if self.torch_dtype is None else self.torch_dtype
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise TypeError(
                f"'{prefix}torch_dtype' must be a floating torch.dtype, but got {self.dtype!r}; "
                "torch.float16 is one"
            )
        if variant is not None:
            warnings.warn(
                f"variant={variant!r} is not looked for: {prefix}torch_dtype converts the full weights",
                UserNotice,
                stacklevel=4,
            )

    def folder(self, name_or_path: str | Path) -> Path:
        """The folder that is meant, on this machine. Raises ``CheckpointError`` if there is none."""
        folder = local_folder(
            name_or_path,
            revision=self.revision,
            cache_dir=self.cache_dir,
            local_files_only=self.local_files_only,
            token=self.token,
        )
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is no folder; give the folder of a pipeline")
        for part in sorted({path.parent for path in folder.glob("*/*.bin")}) if self.use_safetensors else ():
            if not any(part.glob("*.safetensors")):
                raise CheckpointError(
                    f"{part} holds no safetensors, which use_safetensors=True asks for; leave that out"
                )
        return folder


def load(kind: Any, name_or_path: str | Path, settings: dict[str, Any]) -> Any:
    """``kind.from_pretrained``; the base of all pipelines stands for the one that the folder holds."""
    settings = dict(settings)
    source = Source(settings)
    folder = source.folder(name_or_path)
    if kind is DiffusionPipeline:
        kind = PIPELINES[pipeline_class(folder)]
    prior_source = None
    if issubclass(kind, WuerstchenCombinedPipeline):
        prior_source = Source(settings, "prior_", like=source)
    known = list(inspect.signature(kind).parameters)
    for name in settings:
        if name not in known:
            raise TypeError(
                f"{kind.__name__}.from_pretrained() got an unexpected keyword argument {name!r}; its parts "
                f"are {', '.join(known)}"
            )
    if prior_source is not None:
        pipe = kind(**combined_arguments(folder, source, prior_source, settings))
    elif issubclass(kind, WuerstchenPriorPipeline):
        return kind(**prior_arguments(folder, source.dtype, settings))
    else:
        pipe = kind(**decoder_arguments(folder, source.dtype, settings))
    pipe._pipes()[-1]._prior_name = prior_name(folder)
    return pipe


def save(pipe: Any, folder: Path) -> None:
    """``pipe.save_pretrained``."""
    if isinstance(pipe, WuerstchenCombinedPipeline):
        decoder, prior = decoder_folder_of(pipe.decoder_pipe), prior_folder_of(pipe.prior_pipe)
        write_over(folder, lambda new: write_combined_folder(decoder, prior, new))
    elif isinstance(pipe, WuerstchenPriorPipeline):
        write_over(folder, lambda new: write_prior_folder(prior_folder_of(pipe), new))
    else:
        write_over(folder, lambda new: write_decoder_folder(decoder_folder_of(pipe), new))


def prior_arguments(folder: Path, dtype: torch.dtype, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the prior pipeline is made of: parts and numbers ``given``, the rest read."""
    read = read_prior_folder(folder, dtype=dtype, given=[name for name in PRIOR_PARTS if name in given])
    parts = {
        "tokenizer": read.tokenizer,
        "text_encoder": read.text_encoder,
        "prior": read.prior,
        "scheduler": DDPMWuerstchenScheduler.from_schedule(read.schedule),
    }
    return {**parts, **{name: getattr(read, name) for name in PRIOR_NUMBERS}, **given}


def decoder_arguments(folder: Path, dtype: torch.dtype, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the decoder pipeline is made of: parts and numbers ``given``, the rest read."""
    read = read_decoder_folder(folder, dtype=dtype, given=[name for name in DECODER_PARTS if name in given])
    parts = {
        "tokenizer": read.tokenizer,
        "text_encoder": read.text_encoder,
        "decoder": read.decoder,
        "vqgan": read.vqgan,
        "scheduler": DDPMWuerstchenScheduler.from_schedule(read.schedule),
    }
    return {**parts, **{name: getattr(read, name) for name in DECODER_NUMBERS}, **given}


def combined_arguments(
    folder: Path, source: Source, prior_source: Source, given: Mapping[str, Any]
) -> dict[str, Any]:
    """What the combined pipeline is made of, out of its own folder or the decoder's and the prior's."""
    prior_given = {
        name.removeprefix("prior_"): part for name, part in given.items() if name.startswith("prior_")
    }
    decoder_given = {name: part for name, part in given.items() if not name.startswith("prior_")}
    kind = pipeline_class(folder)
    if kind == PRIOR_PIPELINE:
        raise CheckpointError(f"{folder} holds a {kind} alone; give the folder of the decoder that names it")
    arguments = decoder_arguments(folder, source.dtype, decoder_given)
    if all(name in prior_given for name in PRIOR_PARTS):
        prior = prior_given
    elif kind == COMBINED_PIPELINE:
        prior = prior_arguments(folder, prior_source.dtype, prior_given)
    else:
        linked = prior_source.folder(linked_prior(folder))
        prior = prior_arguments(linked, prior_source.dtype, prior_given)
    return {**arguments, **{f"prior_{name}": value for name, value in prior.items()}}


def prior_name(folder: Path) -> str | None:
    """The prior on the hub that a decoder's folder names, if it does: it goes with the decoder when saved."""
    if pipeline_class(folder) == COMBINED_PIPELINE or not (folder / "README.md").is_file():
        return None
    try:
        name = linked_prior(folder)
    except CheckpointError:
        return None
    return name if isinstance(name, str) and HUB_NAME.fullmatch(name) else None


def prior_folder_of(pipe: Any) -> PriorFolder:
    """The prior pipeline as it is written. Raises ``UserError`` while adapters are loaded."""
    prior = plain(pipe.prior)
    for network in (prior, pipe.text_encoder):
        if isinstance(network, nn.Module) and lora_names(network):
            raise UserError(
                f"adapters {', '.join(lora_names(network))} are loaded and have no place in this folder; "
                "call unload_lora_weights, after fuse_lora to keep them in the weights"
            )
    return PriorFolder(
        prior=prior,
        text_encoder=plain(pipe.text_encoder),
        tokenizer=pipe.tokenizer,
        schedule=_schedule_of(pipe.scheduler),
        **pipe.config,
    )


def decoder_folder_of(pipe: Any) -> DecoderFolder:
    """The decoder pipeline as it is written."""
    return DecoderFolder(
        decoder=plain(pipe.decoder),
        vqgan=plain(pipe.vqgan),
        text_encoder=plain(pipe.text_encoder),
        tokenizer=pipe.tokenizer,
        schedule=_schedule_of(pipe.scheduler),
        prior=pipe._prior_name,
        **pipe.config,
    )


def _schedule_of(scheduler: Any) -> CosineSchedule:
    missing = [name for name in ("s", "scaler") if name not in scheduler.config]
    if missing:
        raise UserError(
            f"{type(scheduler).__name__} has no {missing[0]}, and this folder has a place for "
            "DDPMWuerstchenScheduler alone; set one as scheduler before saving"
        )
    return CosineSchedule(s=float(scheduler.config["s"]), scaler=float(scheduler.config["scaler"]))


def write_over(folder: Path, write: Callable[[Path], None]) -> None:
    """Lets ``write`` make ``folder``, or replace a pipeline in it; other files there are left alone."""
    if not folder.exists():
        write(folder)
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; choose another folder")
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving.") as name:
            new = Path(name) / "pipeline"
            write(new)
            for path in sorted(new.rglob("*")):
                target = folder / path.relative_to(new)
                if path.is_dir():
                    target.mkdir(exist_ok=True)
                    for stale in (file for pattern in _WEIGHT_FILES for file in target.glob(pattern)):
                        stale.unlink()
                else:
                    os.replace(path, target)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written ({error.strerror}); choose another") from error

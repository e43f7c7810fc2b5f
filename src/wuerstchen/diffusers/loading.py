"""Pipelines out of folders and from the hub, and back into folders."""

import inspect
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

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
    read_prior_network,
)
from wuerstchen.checkpoints.diffusers_write import (
    write_combined_folder,
    write_decoder_folder,
    write_prior_folder,
)
from wuerstchen.checkpoints.hub import HUB_NAME, local_folder
from wuerstchen.checkpoints.variants import has_variant
from wuerstchen.diffusers.base import DiffusionPipeline, plain
from wuerstchen.diffusers.combined import WuerstchenCombinedPipeline
from wuerstchen.diffusers.decoder import WuerstchenDecoderPipeline
from wuerstchen.diffusers.options import checked_device_map, checked_dtypes, drop_options
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
        self.local_files_only = bool(taken("local_files_only", False))
        self.force_download = bool(taken("force_download", False))
        self.token = taken("token")
        self.use_safetensors = taken("use_safetensors")
        self.variant = taken("variant")
        self.revision = settings.pop(prefix + "revision", None)
        self.dtype = checked_dtypes(f"{prefix}torch_dtype", self.torch_dtype, prefix)
        if self.variant is not None and not re.fullmatch(r"\w[\w-]{,39}", str(self.variant)):
            raise UserError(
                f"{prefix}variant={str(self.variant)[:80]!r} is no name of a variant. A name has letters and "
                "digits. Use 'fp16', say."
            )

    def folder(self, name_or_path: str | Path) -> Path:
        """The folder that is meant, on this machine. Raises ``CheckpointError`` if there is none."""
        folder = local_folder(
            name_or_path,
            revision=self.revision,
            cache_dir=self.cache_dir,
            local_files_only=self.local_files_only,
            token=self.token,
            force_download=self.force_download,
            variant=self.variant,
        )
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is no folder; give the folder of a pipeline")
        if self.variant is not None and not has_variant(folder, self.variant):
            warnings.warn(
                f"{folder} has no variant {self.variant!r}. Its full weights are read, and torch_dtype "
                "converts them.",
                UserNotice,
                stacklevel=4,
            )
        for part in sorted({path.parent for path in folder.glob("*/*.bin")}) if self.use_safetensors else ():
            if not any(part.glob("*.safetensors")):
                raise CheckpointError(
                    f"{part} holds no safetensors, which use_safetensors=True asks for; leave that out"
                )
        return folder


def load(kind: Any, name_or_path: str | Path, settings: dict[str, Any]) -> Any:
    """``kind.from_pretrained``; the base of all pipelines stands for the one that the folder holds."""
    settings = dict(settings)
    device = checked_device_map(settings.pop("device_map", None), settings.pop("max_memory", None))
    connected = settings.pop("load_connected_pipeline", False)
    if "use_auth_token" in settings:  # the name of old scripts
        settings.setdefault("token", settings.pop("use_auth_token"))
    drop_options(settings)
    source = Source(settings)
    folder = source.folder(name_or_path)
    if kind is DiffusionPipeline:
        kind = PIPELINES[pipeline_class(folder)]
        if connected and kind is WuerstchenDecoderPipeline:
            kind = WuerstchenCombinedPipeline
    prior_source, prior = None, None
    if issubclass(kind, WuerstchenCombinedPipeline):
        prior_source, prior = Source(settings, "prior_", like=source), settings.pop("prior", None)
    known = list(inspect.signature(kind).parameters)
    for name in settings:
        if name not in known:
            raise TypeError(
                f"{kind.__name__}.from_pretrained() got an unexpected keyword argument {name!r}; its parts "
                f"are {', '.join(known)}"
            )
    if prior_source is not None:
        pipe = kind(**combined_arguments(folder, source, prior_source, settings, prior))
    elif issubclass(kind, WuerstchenPriorPipeline):
        pipe = kind(**prior_arguments(folder, source, settings))
    else:
        pipe = kind(**decoder_arguments(folder, source, settings))
    if not issubclass(kind, WuerstchenPriorPipeline):
        pipe._pipes()[-1]._prior_name = prior_name(folder)
    if device is not None:
        pipe.to(device)
        pipe.hf_device_map = dict.fromkeys(pipe._networks(), str(device))
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


def prior_arguments(folder: Path, source: Source, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the prior pipeline is made of: parts and numbers ``given``, the rest read."""
    read = read_prior_folder(
        folder,
        dtype=source.dtype,
        given=[name for name in PRIOR_PARTS if name in given],
        variant=source.variant,
    )
    parts = {
        "tokenizer": read.tokenizer,
        "text_encoder": read.text_encoder,
        "prior": read.prior,
        "scheduler": DDPMWuerstchenScheduler.from_schedule(read.schedule),
    }
    return {**parts, **{name: getattr(read, name) for name in PRIOR_NUMBERS}, **given}


def decoder_arguments(folder: Path, source: Source, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the decoder pipeline is made of: parts and numbers ``given``, the rest read."""
    read = read_decoder_folder(
        folder,
        dtype=source.dtype,
        given=[name for name in DECODER_PARTS if name in given],
        variant=source.variant,
    )
    parts = {
        "tokenizer": read.tokenizer,
        "text_encoder": read.text_encoder,
        "decoder": read.decoder,
        "vqgan": read.vqgan,
        "scheduler": DDPMWuerstchenScheduler.from_schedule(read.schedule),
    }
    return {**parts, **{name: getattr(read, name) for name in DECODER_NUMBERS}, **given}


def combined_arguments(
    folder: Path,
    source: Source,
    prior_source: Source,
    given: Mapping[str, Any],
    prior_place: Any = None,
) -> dict[str, Any]:
    """What the combined pipeline is made of, out of its own folder or the decoder's and the prior's.

    ``prior_place`` is a folder or a name on the hub to take Stage C from: a pipeline, or its network alone.
    """
    prior_given = {
        name.removeprefix("prior_"): part for name, part in given.items() if name.startswith("prior_")
    }
    decoder_given = {name: part for name, part in given.items() if not name.startswith("prior_")}
    kind = pipeline_class(folder)
    if kind == PRIOR_PIPELINE:
        raise CheckpointError(f"{folder} holds a {kind} alone; give the folder of the decoder that names it")
    place = None
    if prior_place is not None:
        if not isinstance(prior_place, str | Path):
            raise UserError(
                f"prior is a {type(prior_place).__name__}. It must be a folder or a name on the hub. Give a "
                "network of your own as prior_prior."
            )
        place = prior_source.folder(prior_place)
        if not (place / "model_index.json").is_file():
            network = read_prior_network(place, dtype=prior_source.dtype, variant=prior_source.variant)
            prior_given, place = {"prior": network, **prior_given}, None
    arguments = decoder_arguments(folder, source, decoder_given)
    if all(name in prior_given for name in PRIOR_PARTS):
        prior = prior_given
    elif place is not None:
        prior = prior_arguments(place, prior_source, prior_given)
    elif kind == COMBINED_PIPELINE:
        prior = prior_arguments(folder, prior_source, prior_given)
    else:
        prior = prior_arguments(prior_source.folder(linked_prior(folder)), prior_source, prior_given)
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

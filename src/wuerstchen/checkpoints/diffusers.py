"""Reads diffusers' folders: a prior pipeline (Stage C) and a decoder pipeline (Stages B and A), which may
reference its prior.

All versions are read: the published ones of 2023 (libraries called ``wuerstchen``, ``.bin`` or safetensors,
whole or in shards, and variants such as fp16), those that diffusers writes since 0.38 and cannot load itself,
and a prior network alone with its configuration at the root. Class names are compared with a fixed list. No
code from a folder is run.
"""

import dataclasses
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wuerstchen.checkpoints.clip import (
    Fill,
    fill_torch,
    read_clip,
    read_clip_tokenizer,
)
from wuerstchen.checkpoints.diffusers_config import MAX_COUNT, MAX_NUMBER, as_float, read_config
from wuerstchen.checkpoints.files import read_json
from wuerstchen.checkpoints.foreign import check_not_cascade
from wuerstchen.checkpoints.hub import HUB_NAME
from wuerstchen.checkpoints.readme import read_front_matter
from wuerstchen.checkpoints.weights import StoredTensors
from wuerstchen.diffusion.schedule import CosineSchedule
from wuerstchen.errors import CheckpointError, UserError
from wuerstchen.models.decoder import Decoder, DecoderConfig
from wuerstchen.models.prior import Prior, PriorConfig
from wuerstchen.models.vqgan import VQGAN, VQGANConfig

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

PRIOR_PIPELINE = "WuerstchenPriorPipeline"
DECODER_PIPELINE = "WuerstchenDecoderPipeline"
COMBINED_PIPELINE = "WuerstchenCombinedPipeline"
INNER_PRIOR = "prior_pipeline"
"""The subfolder for the Stage C pipeline in the folder of a whole model."""
PRIOR_PARTS = ("prior", "scheduler", "text_encoder", "tokenizer")
DECODER_PARTS = ("decoder", "scheduler", "text_encoder", "tokenizer", "vqgan")
COMPONENTS = {
    PRIOR_PIPELINE: PRIOR_PARTS,
    DECODER_PIPELINE: DECODER_PARTS,
    COMBINED_PIPELINE: (*DECODER_PARTS, *(f"prior_{part}" for part in PRIOR_PARTS)),
}
CLASSES = {
    "prior": ("WuerstchenPrior",),
    "decoder": ("WuerstchenDiffNeXt",),
    "vqgan": ("PaellaVQModel",),
    "scheduler": ("DDPMWuerstchenScheduler",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
# Numbers that a pipeline stores in addition to its components, with diffusers' defaults.
NUMBERS = {
    PRIOR_PIPELINE: {"latent_mean": 42.0, "latent_std": 1.0, "resolution_multiple": 42.67},
    DECODER_PIPELINE: {"latent_dim_scale": 10.67},
    COMBINED_PIPELINE: {},
}
_NETWORKS: dict[str, tuple[Any, Any]] = {
    "prior": (Prior, PriorConfig),
    "decoder": (Decoder, DecoderConfig),
    "vqgan": (VQGAN, VQGANConfig),
}


Dtypes = torch.dtype | None | Mapping[str, torch.dtype | None]
"""The dtype of the networks: one for all, or one for each part by name. None keeps the stored dtype."""


def _dtype_of(dtypes: Dtypes, part: str) -> torch.dtype | None:
    return dtypes[part] if isinstance(dtypes, Mapping) else dtypes


@dataclass(frozen=True)
class TensorLayout:
    """How a program names and stores the tensors of a network."""

    libraries: frozenset[str]
    """The libraries that ``model_index.json`` may name for its classes."""
    network_stems: tuple[str, ...]
    text_stems: tuple[str, ...]
    fill: Fill
    tensors: Callable[[nn.Module], dict[str, Tensor]]
    """The tensors of a network as they are written."""
    network_format: str
    """The ``format`` in the metadata of a file."""
    text_format: str
    own_library: str
    """The library of schedulers in a new ``model_index.json``, and its version."""
    version: str
    text_library: str


TORCH = TensorLayout(
    libraries=frozenset({"wuerstchen", "diffusers", "transformers"}),
    network_stems=("diffusion_pytorch_model",),
    text_stems=("model", "pytorch_model"),
    fill=fill_torch,
    tensors=nn.Module.state_dict,
    network_format="pt",
    text_format="pt",
    own_library="diffusers",
    version="0.21.0",
    text_library="transformers",
)


@dataclass(kw_only=True)
class PriorFolder:
    """A Stage C pipeline. Parts that were not requested are None."""

    prior: Prior | None
    text_encoder: "CLIPTextModel | None"
    tokenizer: "CLIPTokenizer | None"
    schedule: CosineSchedule = dataclasses.field(default_factory=CosineSchedule)
    latent_mean: float = 42.0
    """The factor that converts Stage C's semantic latents to Stage B's units."""
    latent_std: float = 1.0
    """Subtracted after the multiplication."""
    resolution_multiple: float = 42.67
    """Pixels per position of the semantic latents."""


@dataclass(kw_only=True)
class DecoderFolder:
    """A pipeline of Stages B and A. Parts that were not requested are None."""

    decoder: Decoder | None
    vqgan: VQGAN | None
    text_encoder: "CLIPTextModel | None"
    tokenizer: "CLIPTokenizer | None"
    schedule: CosineSchedule = dataclasses.field(default_factory=CosineSchedule)
    latent_dim_scale: float = 10.67
    """Latents per position of the semantic latents."""
    prior: str | None = None
    """The matching Stage C pipeline: a folder inside this one, or a name on the hub."""


def pipeline_class(folder: Path, layout: TensorLayout = TORCH) -> str:
    """The class of the pipeline in a folder. Raises ``CheckpointError`` if it is none of the three."""
    return _read_index(folder, layout)[0]


def read_prior_folder(
    folder: Path,
    *,
    dtype: Dtypes = torch.float32,
    given: Collection[str] = (),
    layout: TensorLayout = TORCH,
    variant: str | None = None,
) -> PriorFolder:
    """Reads a Stage C pipeline, or the Stage C half of a combined one, frozen and in eval mode.

    Components named in ``given`` are not read. Weights of ``variant`` (fp16) are preferred to full ones.
    Raises ``CheckpointError`` for a part that is missing or damaged, has an unknown class, or does not match
    its configuration. Shapes are checked before anything is allocated.
    """
    name, numbers = _read_index(folder, layout)
    if name == DECODER_PIPELINE:
        raise CheckpointError(f"{folder} holds a {name}, which has no Stage C. Use a {PRIOR_PIPELINE}.")
    prefix = "prior_" if name == COMBINED_PIPELINE else ""
    parts: dict[str, Any] = dict.fromkeys(("prior", "text_encoder", "tokenizer"))
    if "prior" not in given:
        parts["prior"] = read_prior_network(
            folder / f"{prefix}prior", dtype=dtype, layout=layout, variant=variant
        )
    parts |= _read_text(folder, prefix, dtype, given, layout, variant)
    if "scheduler" not in given:
        parts["schedule"] = read_schedule(folder / f"{prefix}scheduler")
    return PriorFolder(**parts, **numbers)


def read_decoder_folder(
    folder: Path,
    *,
    dtype: Dtypes = torch.float32,
    given: Collection[str] = (),
    layout: TensorLayout = TORCH,
    variant: str | None = None,
) -> DecoderFolder:
    """Reads a pipeline of Stages B and A, or that half of a combined one. See ``read_prior_folder``."""
    name, numbers = _read_index(folder, layout)
    if name == PRIOR_PIPELINE:
        raise CheckpointError(f"{folder} holds a {name}, which has no Stage B. Use a {DECODER_PIPELINE}.")
    parts: dict[str, Any] = dict.fromkeys(("decoder", "vqgan", "text_encoder", "tokenizer"))
    for part in ("decoder", "vqgan"):
        if part not in given:
            parts[part] = read_network(folder / part, part, dtype=dtype, layout=layout, variant=variant)
    parts |= _read_text(folder, "", dtype, given, layout, variant)
    if "scheduler" not in given:
        parts["schedule"] = read_schedule(folder / "scheduler")
    return DecoderFolder(**parts, **numbers, prior=_prior_line(folder))


def read_prior_network(
    folder: Path,
    *,
    dtype: Dtypes = torch.float32,
    layout: TensorLayout = TORCH,
    variant: str | None = None,
) -> Prior:
    """Reads only Stage C's network, from a folder with its ``config.json`` and weights."""
    return read_network(folder, "prior", dtype=dtype, layout=layout, variant=variant)


def linked_prior(folder: Path) -> Path | str:
    """The Stage C pipeline named in the ``prior:`` line of a folder's README: a subfolder or a hub name.

    Raises ``CheckpointError`` if there is no such line, or if it names anything else.
    """
    name = _prior_line(folder)
    if name is None:
        raise CheckpointError(
            f"{folder} has no Stage C, and the front matter of its README.md has no prior: entry. Pass the "
            "folder of Stage C as prior."
        )
    return folder / name if _is_inside(folder, name) else name


def _read_index(folder: Path, layout: TensorLayout) -> tuple[str, dict[str, float]]:
    """The pipeline's class and numbers in ``model_index.json``. Checks all entries."""
    path = folder / "model_index.json"
    index = read_json(path)
    name = index.pop("_class_name", None)
    check_not_cascade(folder, class_name=name)
    if not isinstance(name, str) or name not in COMPONENTS:
        raise CheckpointError(
            f"{path}: _class_name must be one of {', '.join(COMPONENTS)}, got {_short(name)}. "
            "Use the folder of a Würstchen v2 model."
        )
    numbers = dict(NUMBERS[name])
    for part in COMPONENTS[name]:
        entry = index.pop(part, None)
        classes = CLASSES[part.removeprefix("prior_") if name == COMBINED_PIPELINE else part]
        if not isinstance(entry, list) or len(entry) != 2:
            raise CheckpointError(
                f"{path}: {part} must be [library, class], got {_short(entry)}. Download it again."
            )
        if not (entry[0] in tuple(layout.libraries) and entry[1] in classes):  # both may be of any type
            raise CheckpointError(
                f"{path}: the class of {part} must be {' or '.join(classes)} of "
                f"{', '.join(sorted(layout.libraries))}, got {_short(entry)}. Download it again."
            )
    for key, value in index.items():
        if key in numbers:
            if type(value) not in (int, float) or not abs(value) <= MAX_NUMBER:  # false for NaN
                raise CheckpointError(
                    f"{path}: {key} must be a number up to {MAX_NUMBER}, got "
                    f"{_short(value)}. Download it again."
                )
            numbers[key] = float(value)
        elif not key.startswith("_") and value not in (None, [None, None]):
            raise CheckpointError(f"{path}: a {name} has no {key!r}. Use the folder of a Würstchen v2 model.")
    return name, numbers


def read_network(
    folder: Path,
    part: str,
    *,
    dtype: Dtypes = torch.float32,
    layout: TensorLayout = TORCH,
    variant: str | None = None,
) -> Any:
    """Reads one network (``prior``, ``decoder`` or ``vqgan``) from a folder with ``config.json`` and weights.

    Raises ``CheckpointError`` like ``read_prior_folder``.
    """
    network_class, config_class = _NETWORKS[part]
    path = folder / "config.json"
    raw = read_json(path)
    class_name = raw.get("_class_name", CLASSES[part][0])
    check_not_cascade(folder, class_name=class_name)
    if class_name not in CLASSES[part]:
        raise CheckpointError(
            f"{path}: _class_name must be {CLASSES[part][0]}, got "
            f"{_short(class_name)}. Download the model again."
        )
    config = read_config(path, raw, config_class)
    stored = StoredTensors.in_folder(folder, layout.network_stems, variant)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            # A network without a timestep (c_r=0) has layers without inputs.
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            network = network_class(config)
    except (RuntimeError, ValueError, ArithmeticError) as error:  # an invalid size, or a dropout of 2
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{path} is not a valid configuration ({reason}). Download it again."
        ) from error
    wanted = _dtype_of(dtype, part)
    layout.fill(network, stored, stored.dtype() if wanted is None else wanted)
    return network


def _read_text(
    folder: Path,
    prefix: str,
    dtype: Dtypes,
    given: Collection[str],
    layout: TensorLayout,
    variant: str | None,
) -> dict[str, Any]:
    """The text encoder and the tokenizer, unless they are in ``given``."""
    parts: dict[str, Any] = {}
    if "text_encoder" not in given:
        parts["text_encoder"] = read_clip(
            folder / f"{prefix}text_encoder",
            dtype=_dtype_of(dtype, "text_encoder"),
            stems=layout.text_stems,
            variant=variant,
            fill_from=layout.fill,
        )
    if "tokenizer" not in given:
        parts["tokenizer"] = read_clip_tokenizer(folder / f"{prefix}tokenizer", parts.get("text_encoder"))
    return parts


def read_schedule(folder: Path) -> CosineSchedule:
    """The noise schedule that a folder's ``scheduler_config.json`` describes."""
    path = folder / "scheduler_config.json"
    raw = read_json(path)
    name = raw.get("_class_name", CLASSES["scheduler"][0])
    fields = {key: value for key, value in raw.items() if not key.startswith("_")}
    if name not in CLASSES["scheduler"] or set(fields) - {"s", "scaler"}:
        raise CheckpointError(
            f"{path} describes a {name} with the fields {', '.join(fields) or 'none'}. It must be a "
            f"{CLASSES['scheduler'][0]} with s and scaler. Download the model again."
        )
    fields = {key: as_float(path, key, value, MAX_COUNT) for key, value in fields.items()}
    try:
        return CosineSchedule(**fields)
    except UserError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _prior_line(folder: Path) -> str | None:
    """The prior in the README's front matter, None if there is none. A path must be inside the folder."""
    path = folder / "README.md"
    if not path.is_file():
        return None

    value = read_front_matter(path).get("prior")
    if isinstance(value, list) and value:
        value = value[0]
    if value is None:
        return None
    if not isinstance(value, str) or not (_is_inside(folder, value) or HUB_NAME.fullmatch(value)):
        # Other types are not printed: a few lines of YAML can describe an endless list.
        shown = _short(value) if isinstance(value, str) else f"a {type(value).__name__}"
        raise CheckpointError(
            f"{path}: the entry prior: must name a folder inside the model or OWNER/NAME on the hub, got "
            f"{shown}. Correct it, or pass the folder of Stage C as prior."
        )
    return value


def _is_inside(folder: Path, name: str) -> bool:
    """Whether ``folder`` contains a folder of that name, after all links are resolved."""
    try:
        inside, root = (folder / name).resolve(), folder.resolve()
        return inside != root and inside.is_relative_to(root) and inside.is_dir()
    except (OSError, ValueError, RuntimeError):  # a name that is too long, a zero byte, circular links
        return False


def _short(value: object) -> str:
    """A value of any type and length, shortened for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"

"""The folders that diffusers writes: one pipeline for Stage C, another for Stages B and A, which may name it.

All generations are read: the published ones of 2023 (libraries called ``wuerstchen``, ``.bin`` or
safetensors, whole or in shards, and variants such as fp16), those that diffusers 0.38 and later write and
cannot load, and a prior alone with its configuration at the root. Class names are compared with a fixed list;
no code from a folder is run.
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
"""Where a folder that holds a whole model keeps the pipeline of Stage C."""
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
# Numbers that a pipeline keeps beside its components, with diffusers' defaults.
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
"""What networks are read in: a dtype for all, or one for each part by name. None is as they are stored."""


def _dtype_of(dtypes: Dtypes, part: str) -> torch.dtype | None:
    return dtypes[part] if isinstance(dtypes, Mapping) else dtypes


@dataclass(frozen=True)
class TensorLayout:
    """How a program names and stores the tensors of a network."""

    libraries: frozenset[str]
    """What ``model_index.json`` may call the libraries of its classes."""
    network_stems: tuple[str, ...]
    text_stems: tuple[str, ...]
    fill: Fill
    tensors: Callable[[nn.Module], dict[str, Tensor]]
    """A network's tensors as they are written."""
    network_format: str
    """What a file of them says about itself."""
    text_format: str
    own_library: str
    """What a ``model_index.json`` that is written calls the library of schedulers, and its version."""
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
    """A pipeline of Stage C. A part that the reader was not asked for is None."""

    prior: Prior | None
    text_encoder: "CLIPTextModel | None"
    tokenizer: "CLIPTokenizer | None"
    schedule: CosineSchedule = dataclasses.field(default_factory=CosineSchedule)
    latent_mean: float = 42.0
    """The factor that brings Stage C's map to Stage B's units."""
    latent_std: float = 1.0
    """What is subtracted after it."""
    resolution_multiple: float = 42.67
    """Pixels a position of the map."""


@dataclass(kw_only=True)
class DecoderFolder:
    """A pipeline of Stages B and A. A part that the reader was not asked for is None."""

    decoder: Decoder | None
    vqgan: VQGAN | None
    text_encoder: "CLIPTextModel | None"
    tokenizer: "CLIPTokenizer | None"
    schedule: CosineSchedule = dataclasses.field(default_factory=CosineSchedule)
    latent_dim_scale: float = 10.67
    """Latents a position of the map."""
    prior: str | None = None
    """The pipeline of Stage C that belongs to it: a folder inside it, or a name on the hub."""


def pipeline_class(folder: Path, layout: TensorLayout = TORCH) -> str:
    """Which of the three pipelines a folder holds. Raises ``CheckpointError`` for anything else."""
    return _read_index(folder, layout)[0]


def read_prior_folder(
    folder: Path,
    *,
    dtype: Dtypes = torch.float32,
    given: Collection[str] = (),
    layout: TensorLayout = TORCH,
    variant: str | None = None,
) -> PriorFolder:
    """Reads a pipeline of Stage C, or the Stage C half of a combined one, frozen and in eval mode.

    Components named in ``given`` are left out. Weights of a ``variant`` (fp16) come before full ones. Raises
    ``CheckpointError`` for a part that is missing or damaged, of an unknown class, or of other sizes than its
    configuration says; sizes are checked before anything is allocated.
    """
    name, numbers = _read_index(folder, layout)
    if name == DECODER_PIPELINE:
        raise CheckpointError(f"{folder} holds a {name}, which has no Stage C; give a {PRIOR_PIPELINE}")
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
    """Reads a pipeline of Stages B and A, or that half of a combined one, like ``read_prior_folder``."""
    name, numbers = _read_index(folder, layout)
    if name == PRIOR_PIPELINE:
        raise CheckpointError(f"{folder} holds a {name}, which has no Stage B; give a {DECODER_PIPELINE}")
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
    """Reads Stage C's network alone: a folder with its ``config.json`` and weights, as the variants are."""
    return read_network(folder, "prior", dtype=dtype, layout=layout, variant=variant)


def linked_prior(folder: Path) -> Path | str:
    """The Stage C that the ``prior:`` line of a folder's README names: a folder inside it, or a hub name.

    Raises ``CheckpointError`` if there is no such line, or if it points anywhere else.
    """
    name = _prior_line(folder)
    if name is None:
        raise CheckpointError(
            f"{folder} has no Stage C, and no line prior: in a README.md that names one; "
            "give the folder of Stage C as prior"
        )
    return folder / name if _is_inside(folder, name) else name


def _read_index(folder: Path, layout: TensorLayout) -> tuple[str, dict[str, float]]:
    """The pipeline's class and numbers in ``model_index.json``, all of it checked."""
    path = folder / "model_index.json"
    index = read_json(path)
    name = index.pop("_class_name", None)
    check_not_cascade(folder, class_name=name)
    if not isinstance(name, str) or name not in COMPONENTS:
        raise CheckpointError(
            f"{path} is wrong because its _class_name is {_short(name)}, none of {', '.join(COMPONENTS)}; "
            "give the folder of a Würstchen v2 model"
        )
    numbers = dict(NUMBERS[name])
    for part in COMPONENTS[name]:
        entry = index.pop(part, None)
        classes = CLASSES[part.removeprefix("prior_") if name == COMBINED_PIPELINE else part]
        if not isinstance(entry, list) or len(entry) != 2:
            raise CheckpointError(
                f"{path} is wrong because {part} is {_short(entry)} there, not [library, class]; get it again"
            )
        if not (entry[0] in tuple(layout.libraries) and entry[1] in classes):  # either may be no text
            raise CheckpointError(
                f"{path} is wrong because {part} is of class {_short(entry)}, and only "
                f"{' or '.join(classes)} of {', '.join(sorted(layout.libraries))} can be; get it again"
            )
    for key, value in index.items():
        if key in numbers:
            if type(value) not in (int, float) or not abs(value) <= MAX_NUMBER:  # a NaN is not
                raise CheckpointError(
                    f"{path} is wrong because {key} is {_short(value)}, no number up to {MAX_NUMBER}; "
                    "get it again"
                )
            numbers[key] = float(value)
        elif not key.startswith("_") and value not in (None, [None, None]):
            raise CheckpointError(
                f"{path} is wrong because a {name} has no {key!r}; give the folder of a Würstchen v2 model"
            )
    return name, numbers


def read_network(
    folder: Path,
    part: str,
    *,
    dtype: Dtypes = torch.float32,
    layout: TensorLayout = TORCH,
    variant: str | None = None,
) -> Any:
    """Reads one network, a ``prior``, ``decoder`` or ``vqgan``: a folder of its ``config.json`` and weights.

    Raises ``CheckpointError`` like ``read_prior_folder``.
    """
    network_class, config_class = _NETWORKS[part]
    path = folder / "config.json"
    raw = read_json(path)
    class_name = raw.get("_class_name", CLASSES[part][0])
    check_not_cascade(folder, class_name=class_name)
    if class_name not in CLASSES[part]:
        raise CheckpointError(
            f"{path} is wrong because its _class_name is {_short(class_name)} where "
            f"{CLASSES[part][0]} belongs; get the model again"
        )
    config = read_config(path, raw, config_class)
    stored = StoredTensors.in_folder(folder, layout.network_stems, variant)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            # A network that reads no timestep (c_r=0) has layers without inputs.
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            network = network_class(config)
    except (RuntimeError, ValueError, ArithmeticError) as error:  # no number of values, or a dropout of 2
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{path} is wrong because it makes no network ({reason}); get it again"
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
    """The text encoder and the tokenizer, as far as they are asked for."""
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
            f"{path} is wrong because it describes a {name} of {', '.join(fields) or 'nothing'}, where a "
            f"{CLASSES['scheduler'][0]} of s and scaler belongs; get the model again"
        )
    fields = {key: as_float(path, key, value, MAX_COUNT) for key, value in fields.items()}
    try:
        return CosineSchedule(**fields)
    except UserError as error:
        raise CheckpointError(f"{path} is wrong: {error}") from error


def _prior_line(folder: Path) -> str | None:
    """What the README's front matter says of the prior, None if nothing. A path must stay inside."""
    path = folder / "README.md"
    if not path.is_file():
        return None

    value = read_front_matter(path).get("prior")
    if isinstance(value, list) and value:
        value = value[0]
    if value is None:
        return None
    if not isinstance(value, str) or not (_is_inside(folder, value) or HUB_NAME.fullmatch(value)):
        # What is no text is not turned into some: YAML writes a list of endless length in a few lines.
        shown = _short(value) if isinstance(value, str) else "no text"
        raise CheckpointError(
            f"{path} is wrong because its line prior: names {shown}, neither a folder inside it nor "
            "OWNER/NAME on the hub; mend the line, or give the folder of Stage C as prior"
        )
    return value


def _is_inside(folder: Path, name: str) -> bool:
    """Whether there is a folder of that name inside ``folder``, wherever links lead."""
    try:
        inside, root = (folder / name).resolve(), folder.resolve()
        return inside != root and inside.is_relative_to(root) and inside.is_dir()
    except (OSError, ValueError, RuntimeError):  # too long a name, a zero byte, links in a circle
        return False


def _short(value: object) -> str:
    """A value of any kind and length, for one line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"

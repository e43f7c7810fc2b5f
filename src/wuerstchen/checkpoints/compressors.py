"""The semantic compressor alone, for models that have none: the published diffusers folders.

It is published twice: as a folder in diffusers' form (``warp-ai/EfficientNetEncoder``), and in the original's
file of Stage B, under ``effnet_state_dict``. Stable Cascade's encoder has the same backbone, but is another
network, and is refused.
"""

from pathlib import Path

import torch
from torch import Tensor

from wuerstchen.checkpoints.files import read_json
from wuerstchen.checkpoints.hub import local_folder
from wuerstchen.checkpoints.native import is_native_network, read_network
from wuerstchen.checkpoints.original import (
    COMPRESSOR_KEY,
    find_original,
    network_of,
    read_original_compressor,
)
from wuerstchen.checkpoints.original_config import StateDict
from wuerstchen.checkpoints.weights import StoredTensors, read_tensors_of
from wuerstchen.errors import CheckpointError, UserError, shown
from wuerstchen.models.cascade import PUBLISHED_V1, CascadeSettings, LatentStatistics
from wuerstchen.models.compressor import Compressor
from wuerstchen.models.decoder import Decoder, DecoderConfig

PUBLISHED_COMPRESSOR = "warp-ai/EfficientNetEncoder"
"""The published compressor of v2 on the hub, 81 MB."""
_CLASSES = ("EfficientNetEncoder", "WuerstchenEfficientNetEncoder")
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_ON_HUB = [
    "config.json",
    *(f"{stem}.{end}" for stem in _STEMS for end in ("safetensors", "bin")),
    "model_v2_stage_b.pt",
    "compressor.safetensors",
]
"""What is downloaded of a repository."""
SCALES = (0.1, 10.0)
"""Allowed standard deviations of normalised semantic latents. Stage C is trained on about 1."""


def read_compressor(
    source: str | Path, *, dtype: torch.dtype = torch.float32, local_files_only: bool = False
) -> Compressor | None:
    """A compressor with its mapper, frozen and in eval mode. None for a file with only a backbone.

    ``source`` is a folder in diffusers' form, one of the original's files with a compressor or their folder,
    a native model or its ``compressor.safetensors``, a file of its tensors, or a name on the hub. Only the
    compressor's files are downloaded. Raises ``CheckpointError`` if there is none, if it is damaged, or if it
    is Stable Cascade's.
    """
    if Path(source).suffix in (".pth", ".safetensors", ".bin"):  # never a name on the hub
        path = Path(source)
    else:
        path = local_folder(source, local_files_only=local_files_only, only=_ON_HUB)
    if path.is_file() or not path.is_dir():
        return _of_file(path, source, dtype)
    if (path / "compressor.safetensors").is_file():
        return _native(path / "compressor.safetensors", dtype)
    if (path / "config.json").is_file() and not (path / "model_index.json").is_file():
        return _of_diffusers(path, dtype)
    for file in find_original(path):
        if (found := read_original_compressor(file, dtype=dtype)) is not None:
            return found
    raise _none_in(source)


def check_scale(compressor: Compressor, statistics: LatentStatistics, where: str) -> None:
    """Raises ``UserError`` if the compressor's latents are not of the scale that Stage C was trained on.

    The compressor ends in a batch norm, so over its training images the standard deviation of a channel is
    the norm's weight. Stage C sees it divided by that of ``statistics``. v1 does not normalise its latents,
    whose scale is then unknown.
    """
    if statistics == PUBLISHED_V1.latent_statistics:
        return
    weights = compressor.mapper[1].weight.detach().double().abs().cpu()
    scale = float(
        (weights / torch.tensor(statistics.std, dtype=torch.float64, device="cpu")).square().mean().sqrt()
    )
    if not SCALES[0] <= scale <= SCALES[1]:
        raise UserError(
            f"{where} is the compressor of another model: its semantic latents have a standard deviation of "
            f"{scale:.3g} after this model's normalisation. It must be about 1, from {SCALES[0]:g} to "
            f"{SCALES[1]:g}. Use the compressor that Stage B was trained with."
        )


def fits_published(decoder: object, settings: CascadeSettings) -> bool:
    """Whether a model has the published v2's Stage B and normalisation, and so its compressor."""
    published = CascadeSettings()
    return (
        isinstance(decoder, Decoder)
        and (decoder.config.c_hidden, decoder.config.effnet_embd)
        == (DecoderConfig().c_hidden, DecoderConfig().effnet_embd)
        and (settings.latent_statistics, settings.view_scale)
        == (published.latent_statistics, published.view_scale)
    )


def read_published_compressor(dtype: torch.dtype = torch.float32) -> Compressor:
    """The published compressor of v2, from the hub or its cache.

    Raises ``CheckpointError`` with what to do if it cannot be downloaded.
    """
    try:
        found = read_compressor(PUBLISHED_COMPRESSOR, dtype=dtype)
    except CheckpointError as error:
        raise CheckpointError(
            f"this model has no compressor, and the published one cannot be used: {error} Give a copy of it, "
            "or the original's model_v2_stage_b.pt, as the compressor."
        ) from error
    assert found is not None
    return found


def _of_file(path: Path, source: str | Path, dtype: torch.dtype) -> Compressor | None:
    if path.suffix == ".pt":
        found = read_original_compressor(path, dtype=dtype)
        if found is None:
            raise _none_in(source)
        return found
    if path.suffix == ".safetensors" and is_native_network(path):
        return _native(path, dtype)
    tensors = read_tensors_of(path)
    return _of_tensors(tensors, path, dtype) if "mapper.0.weight" in tensors else None


def _native(path: Path, dtype: torch.dtype) -> Compressor:
    network, _ = read_network(path, dtype)
    if not isinstance(network, Compressor):
        raise _none_in(path)
    return network


def _of_diffusers(folder: Path, dtype: torch.dtype) -> Compressor:
    name = read_json(folder / "config.json").get("_class_name")
    if name not in _CLASSES:
        raise CheckpointError(
            f"{folder} contains a {shown(name)}, not a compressor, which is a {_CLASSES[0]}. Use "
            f"{PUBLISHED_COMPRESSOR}."
        )
    return _of_tensors(StoredTensors.in_folder(folder, _STEMS).read(), folder, dtype)


def _of_tensors(tensors: dict[str, Tensor], path: Path, dtype: torch.dtype) -> Compressor:
    if not {"mapper.1.weight", "mapper.1.bias"} & tensors.keys():
        raise CheckpointError(
            f"{path} is the encoder of Stable Cascade: its last batch norm has no learned weight. Its "
            "latents have another scale and meaning, so Würstchen cannot use it. Use "
            f"{PUBLISHED_COMPRESSOR}, or the original's model_v2_stage_b.pt."
        )
    _, network = network_of(StateDict(str(path), tensors), dtype=dtype)
    assert isinstance(network, Compressor)
    return network


def _none_in(source: str | Path) -> CheckpointError:
    return CheckpointError(
        f"{source} has no compressor. Use {PUBLISHED_COMPRESSOR}, the original's file of Stage B (which has "
        f"{COMPRESSOR_KEY}), or a native model."
    )

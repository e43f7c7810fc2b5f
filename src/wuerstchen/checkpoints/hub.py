"""Where a model lies: a folder of this machine, or a name on the Hugging Face hub and its ordinary cache."""

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from wuerstchen.errors import CheckpointError

BUNDLED = Path(__file__).parents[1] / "bundled"
"""The model in the package, also called "bundled", as images drawn by it say."""
PHOTO_NOTE = (
    "This model was trained on emoji. It keeps flat drawings, but a photograph comes out as blobs of its "
    "colours."
)
"""What to know before giving an image to the model in the package."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DESCRIPTIONS = ["*.json", "*.txt", "*.md"]
# What the original repository calls the v2 files; its v1 files have to be fetched by name.
_ORIGINAL_V2 = [
    "vqgan_f4_v1_500k.pt",
    "model_v2_stage_b.pt",
    "model_v2_stage_c_finetune_interpolation.pt",
]
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pdparams")
# Which are not fetched where there are full weights.
_VARIANTS = [f"*.{name}{end}" for name in ("fp16", "bf16", "non_ema") for end in (".*", "-*")]


def is_bundled(model: str | Path | None) -> bool:
    """Whether ``model`` names the model in the package, as None does. Fetches nothing."""
    if model is None:
        return True
    if os.path.exists(model):
        return Path(model).resolve() == BUNDLED.resolve()
    return str(model) == BUNDLED.name


def local_folder(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    force_download: bool = False,
    variant: str | None = None,
    only: Sequence[str] = (),
) -> Path:
    """The folder of a model: ``name_or_path`` itself if it exists, else a copy from the hub.

    ``bundled`` is the model in the package. A name like ``warp-ai/wuerstchen`` is fetched into the hub's
    cache, or found there: with ``local_files_only`` or ``HF_HUB_OFFLINE=1`` nothing else is tried; with
    ``force_download`` it is fetched again. Of each network one file format is fetched: those of ``variant``
    where there are, else full weights, else other variants, and safetensors before pickles. ``only`` are
    patterns of the files that are wanted.
    Raises ``CheckpointError`` if it is neither a path nor a name that can be had.
    """
    path = Path(name_or_path)
    if os.path.exists(path):  # Path.exists raises for a name that is too long
        return _model_of_run(path)
    name = str(name_or_path)
    if name == BUNDLED.name:
        return BUNDLED
    if not HUB_NAME.fullmatch(name) or ".." in name:
        raise CheckpointError(
            f"{name[:200]!r} does not exist, and is no name on the hub; give a folder, a file, or OWNER/NAME"
        )
    # Only here: without a network nobody waits for the hub's client.
    from huggingface_hub import snapshot_download

    def fetch(patterns: list[str], ignored: Sequence[str]) -> Path:
        try:
            return Path(
                snapshot_download(
                    name,
                    revision=revision,
                    cache_dir=cache_dir,
                    local_files_only=local_files_only,
                    token=token,
                    force_download=force_download,
                    allow_patterns=patterns,
                    ignore_patterns=list(ignored),
                )
            )
        except Exception as error:  # the hub's client raises its own kinds, httpx's, and OSError
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise CheckpointError(
                f"{name!r} is no folder here, and the hub gives none ({type(error).__name__}: {reason});"
                " check the name and the network, or give the path of a copy"
            ) from error

    if only:
        folder = fetch(list(only), _VARIANTS)
        return fetch(list(only), ()) if _without_weights(folder) else folder
    # What is tried for the parts that have no weights yet.
    attempts: list[tuple[list[str], Sequence[str]]] = []
    if variant is not None:
        for ending in (".safetensors", ".bin"):
            attempts.append(([f"*.{variant}{ending}", f"*.{variant}-*{ending}"], ()))
    attempts += [(["*.safetensors"], _VARIANTS), (["*.bin"], _VARIANTS)]
    attempts += [(["*.safetensors"], ()), (["*.bin"], ())]
    folder = fetch([*_DESCRIPTIONS, *attempts[0][0]], attempts[0][1])
    for patterns, ignored in attempts[1:]:
        if not any(path.suffix in _WEIGHTS for path in folder.rglob("*.*")):
            folder = fetch([*_DESCRIPTIONS, *patterns, *_ORIGINAL_V2], ignored)
        elif lacking := _without_weights(folder):
            inside = [f"{part}/{pattern}" for part in lacking for pattern in patterns]
            folder = fetch([*_DESCRIPTIONS, *inside], ignored)
        else:
            break
    return folder


def _without_weights(folder: Path) -> list[str]:
    """The folders inside that describe a network and hold no weights."""
    described = sorted(config.parent for config in folder.rglob("*/config.json"))
    lacking = [part for part in described if not any(path.suffix in _WEIGHTS for path in part.iterdir())]
    return [part.relative_to(folder).as_posix() for part in lacking if part != folder]


def _model_of_run(path: Path) -> Path:
    """The model in the folder of a run; a path that is no run's is itself.

    Raises ``CheckpointError`` where a run has no model yet, with the command that makes one.
    """
    if (path / "run.json").is_file() and not (path / "model.json").is_file():
        if (path / "model" / "model.json").is_file():
            return path / "model"
        if not any(path.glob("stage_*/checkpoints/[0-9]*")):
            raise CheckpointError(
                f"{path} is the folder of a run that has no checkpoint yet, so there is no model in it. "
                "Let it train until it has one"
            )
        raise CheckpointError(
            f"{path} is the folder of a run that has not ended, so there is no model in it yet. Make one of "
            f"its newest checkpoint with: wuerstchen export {shlex.quote(str(path))} MODEL, and give MODEL"
        )
    if (path / "state.json").is_file() and path.absolute().parent.name == "checkpoints":
        stage = path.absolute().parents[1]
        which = f"--stage {stage.name.removeprefix('stage_')} --checkpoint {path.name.lstrip('0')}"
        raise CheckpointError(
            f"{path} is a checkpoint of a run and no model. Make a model of it with: wuerstchen export "
            f"{shlex.quote(str(stage.parent))} MODEL {which}, and give MODEL"
        )
    return path

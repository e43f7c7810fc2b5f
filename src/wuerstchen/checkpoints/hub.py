"""Finds the files of a model: in a local folder, or on the Hugging Face hub, in its usual cache."""

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from wuerstchen.errors import CheckpointError

BUNDLED = Path(__file__).parents[1] / "bundled"
"""The bundled model. Its name is "bundled", also in the settings of images."""
PHOTO_NOTE = (
    "This model was trained on emoji. It reconstructs flat drawings, but a "
    "photograph comes out as blobs of its colours."
)
"""What to say before encoding an image with the bundled model."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DESCRIPTIONS = ["*.json", "*.txt", "*.md"]
# The v2 files of the original repository. Its v1 files have to be downloaded by name.
_ORIGINAL_V2 = [
    "vqgan_f4_v1_500k.pt",
    "model_v2_stage_b.pt",
    "model_v2_stage_c_finetune_interpolation.pt",
]
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pdparams")
# Not downloaded if there are default weights.
_VARIANTS = [f"*.{name}{end}" for name in ("fp16", "bf16", "non_ema") for end in (".*", "-*")]


def is_bundled(model: str | Path | None) -> bool:
    """Whether ``model`` refers to the bundled model: None, its name, or its path. Downloads nothing."""
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
    """The folder of a model: ``name_or_path`` itself if it exists, otherwise a copy from the hub.

    ``bundled`` is the bundled model. A name like ``warp-ai/wuerstchen`` is looked up in the hub's cache, and
    downloaded into it if it is missing. ``local_files_only`` and ``HF_HUB_OFFLINE=1`` prevent the download,
    ``force_download`` repeats it. Only one file format is downloaded for each network: ``variant`` if it
    exists, then default weights, then other variants, and safetensors before pickles. ``only`` restricts the
    download to these patterns of file names. Raises ``CheckpointError`` if it is neither an existing path nor
    an available name.
    """
    path = Path(name_or_path)
    if os.path.exists(path):  # Path.exists raises for a name that is too long
        return _model_of_run(path)
    name = str(name_or_path)
    if name == BUNDLED.name:
        return BUNDLED
    if not HUB_NAME.fullmatch(name) or ".." in name:
        raise CheckpointError(
            f"{name[:200]!r} does not exist, and is not a name on the hub. "
            "Use a folder, a file, or OWNER/NAME."
        )
    repository = _Repository(name, revision, cache_dir, local_files_only, token, force_download)
    return repository.fetch_only(list(only)) if only else repository.fetch_model(variant)


@dataclass(frozen=True)
class _Repository:
    """A repository on the hub, and the options of the hub's client."""

    name: str
    revision: str | None
    cache_dir: str | Path | None
    local_files_only: bool
    token: str | bool | None
    force_download: bool

    def fetch_only(self, patterns: list[str]) -> Path:
        """Downloads files that match ``patterns``. Variants only where there are no default weights."""
        folder = self._fetch(patterns, _VARIANTS)
        return self._fetch(patterns, ()) if _without_weights(folder) else folder

    def fetch_model(self, variant: str | None) -> Path:
        """Downloads a whole model, and for each part the first kind of weights that it has."""
        attempts = _kinds_of_weights(variant)
        patterns, ignored = next(attempts)
        folder = self._fetch([*_DESCRIPTIONS, *patterns], ignored)
        for patterns, ignored in attempts:
            if not any(path.suffix in _WEIGHTS for path in folder.rglob("*.*")):
                folder = self._fetch([*_DESCRIPTIONS, *patterns, *_ORIGINAL_V2], ignored)
            elif lacking := _without_weights(folder):
                inside = [f"{part}/{pattern}" for part in lacking for pattern in patterns]
                folder = self._fetch([*_DESCRIPTIONS, *inside], ignored)
            else:
                break
        return folder

    def _fetch(self, patterns: list[str], ignored: Sequence[str]) -> Path:
        from huggingface_hub import snapshot_download  # imported late: local models do not need it

        try:
            return Path(
                snapshot_download(
                    self.name,
                    revision=self.revision,
                    cache_dir=self.cache_dir,
                    local_files_only=self.local_files_only,
                    token=self.token,
                    force_download=self.force_download,
                    allow_patterns=patterns,
                    ignore_patterns=list(ignored),
                )
            )
        except Exception as error:  # the hub's client raises its own errors, httpx's, and OSError
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise CheckpointError(
                f"{self.name!r} is not a local folder, and cannot be downloaded from the "
                f"hub ({type(error).__name__}: {reason}). Check the name and the "
                "network, or give the path of a copy."
            ) from error


def _kinds_of_weights(variant: str | None) -> Iterator[tuple[list[str], Sequence[str]]]:
    """Patterns of weight files to download and to ignore, the preferred kind first."""
    if variant is not None:
        for ending in (".safetensors", ".bin"):
            yield [f"*.{variant}{ending}", f"*.{variant}-*{ending}"], ()
    for ignored in (_VARIANTS, ()):
        for ending in (".safetensors", ".bin"):
            yield [f"*{ending}"], ignored


def _without_weights(folder: Path) -> list[str]:
    """The subfolders with the description of a network, but without weights."""
    described = sorted(config.parent for config in folder.rglob("*/config.json"))
    lacking = [part for part in described if not any(path.suffix in _WEIGHTS for path in part.iterdir())]
    return [part.relative_to(folder).as_posix() for part in lacking if part != folder]


def _model_of_run(path: Path) -> Path:
    """The model in a run folder. Any other path is returned as it is.

    Raises ``CheckpointError`` with the command that exports a model, if the run has none yet.
    """
    if (path / "run.json").is_file() and not (path / "model.json").is_file():
        if (path / "model" / "model.json").is_file():
            return path / "model"
        if not any(path.glob("stage_*/checkpoints/[0-9]*")):
            raise CheckpointError(
                f"{path} is a run folder without a checkpoint, so it contains no "
                "model yet. Wait for its first checkpoint."
            )
        raise CheckpointError(
            f"{path} is the folder of an unfinished run, so it contains no model yet. Export its newest "
            f"checkpoint with: wuerstchen export {shlex.quote(str(path))} MODEL, and give MODEL"
        )
    if (path / "state.json").is_file() and path.absolute().parent.name == "checkpoints":
        stage = path.absolute().parents[1]
        which = f"--stage {stage.name.removeprefix('stage_')} --checkpoint {path.name.lstrip('0')}"
        raise CheckpointError(
            f"{path} is a training checkpoint, not a model. Export it with: wuerstchen export "
            f"{shlex.quote(str(stage.parent))} MODEL {which}, and give MODEL"
        )
    return path

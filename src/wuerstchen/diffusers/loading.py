"""Loading pipelines from folders and the hub, and replacing their folders."""

import os
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wuerstchen.checkpoints.hub import local_folder
from wuerstchen.checkpoints.variants import has_variant
from wuerstchen.diffusers.options import checked_dtypes
from wuerstchen.errors import CheckpointError, UserError, UserNotice

# Weights in a network's folder. Those of an earlier network there must be removed.
_WEIGHT_FILES = ("diffusion_pytorch_model*", "model*.safetensors*", "pytorch_model*")


class LoadOptions:
    """Options of ``from_pretrained`` about where and how to load, removed from ``settings``.

    The names of options start with ``prefix``. Missing ones default to those of ``like``.
    """

    def __init__(self, settings: dict[str, Any], prefix: str = "", like: "LoadOptions | None" = None) -> None:
        def taken(name: str, default: Any = None) -> Any:
            return settings.pop(prefix + name, default if like is None else getattr(like, name))

        given = taken("torch_dtype")  # called dtype in newer versions of diffusers
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
                f"{prefix}variant is not a valid name: {str(self.variant)[:80]!r}. It must have "
                "only letters and "
                "digits. Use 'fp16', for example."
            )

    def folder(self, name_or_path: str | Path) -> Path:
        """The local folder. Raises ``CheckpointError`` if there is none."""
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
            raise CheckpointError(f"{folder} is not a folder. Pass the folder of a pipeline.")
        if self.variant is not None and not has_variant(folder, self.variant):
            warnings.warn(
                f"{folder} has no variant {self.variant!r}. Its default weights are read, and torch_dtype "
                "converts them.",
                UserNotice,
                stacklevel=4,
            )
        for part in sorted({path.parent for path in folder.glob("*/*.bin")}) if self.use_safetensors else ():
            if not any(part.glob("*.safetensors")):
                raise CheckpointError(
                    f"{part} has no .safetensors files, which use_safetensors=True requires. Remove "
                    "use_safetensors=True to load its .bin files."
                )
        return folder


def write_over(folder: Path, write: Callable[[Path], None]) -> None:
    """Lets ``write`` create ``folder``, or replaces a pipeline in it. Other files in it are kept."""
    if not folder.exists():
        write(folder)
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file. Choose another folder.")
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
        raise CheckpointError(
            f"{folder} cannot be written: {error.strerror}. Choose another folder."
        ) from error

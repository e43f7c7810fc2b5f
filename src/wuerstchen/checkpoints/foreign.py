"""Recognizes Stable Cascade, which is often mistaken for Würstchen but has other networks."""

import re
from collections.abc import Iterable
from pathlib import Path

from wuerstchen.errors import CheckpointError

_MAPPERS = re.compile(r"(^|[._])(clip_txt_pooled|clip_txt|clip_img|pixels)_mapper[._]")
# Stage C of Würstchen has one level. Stable Diffusion's keys continue with ``attentions`` or ``resnets``.
_LEVELS = re.compile(
    r"^(lora_(prior_)?unet[._]|prior\.|unet\.)?(down|up)_blocks[._]\d+[._]\d+[._]"
    r"(attention|channelwise|depthwise|kv_mapper|mapper)"
)
_FILES = re.compile(r"(stable_cascade|effnet_encoder|stage_[abc](_lite)?(_bf16)?$)")


def check_not_cascade(path: Path, names: Iterable[str] = (), class_name: object = None) -> None:
    """Raises ``CheckpointError`` if the names of tensors or the class of a file are Stable Cascade's."""
    is_class = isinstance(class_name, str) and class_name.startswith("StableCascade")
    if is_class or any(_MAPPERS.search(name) for name in names):
        raise CheckpointError(
            f"{path} is a file of Stable Cascade, which is not supported. "
            "Use a model of Würstchen v1 or v2, such as warp-ai/wuerstchen."
        )


def check_adapter_not_cascade(where: str, layers: Iterable[str]) -> None:
    """``check_not_cascade`` for an adapter, by the names of its layers."""
    if any(_MAPPERS.search(f"{layer}.") or _LEVELS.match(layer) for layer in layers):
        raise CheckpointError(
            f"{where} is an adapter for Stable Cascade, which is not supported. "
            "Use an adapter that was trained for Würstchen v2."
        )


def is_called_cascade(path: Path) -> bool:
    """Whether a file has a published name of Stable Cascade. Not all files are recognizable by their
    tensors."""
    return path.suffix in (".safetensors", ".ckpt") and _FILES.match(path.stem) is not None

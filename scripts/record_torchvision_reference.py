"""Records outputs of torchvision's EfficientNetV2-S and -L for tests/models/test_efficientnet.py.

Needs torchvision, which the package must not depend on, so run it in a separate environment:

    pip install torch==2.13.0 pillow numpy && pip install --no-deps torchvision==0.28.0
    python scripts/record_torchvision_reference.py

The weights depend only on their names, so the file contains a few dozen outputs per network and no weights.
"""

import importlib
import importlib.util
import json
import os
import sys
import zlib
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

REFERENCE = Path(__file__).parents[1] / "tests" / "models" / "torchvision_reference.json"
# Gains of the random convolutions, chosen so that the output of untrained weights still depends on the image.
GAIN = {"efficientnet_v2_s": 1.11, "efficientnet_v2_l": 1.0}
OUTPUTS = 48


def fill_by_name(state: dict[str, Tensor], gain: float) -> None:
    """Fills each entry of ``features`` with values that depend only on its name and shape.

    Uniform numbers come directly from the generator's bits, so they are the same on all machines.
    """
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        uniform = torch.rand(tensor.shape, generator=generator) * 2 - 1
        if tensor.ndim == 4:  # variance gain² / fan in
            tensor.copy_(uniform * gain * (3 / tensor[0].numel()) ** 0.5)
        elif name.endswith(("1.weight", "running_var")):
            tensor.copy_(1 + 0.3 * uniform)
        else:
            tensor.copy_(0.05 * uniform)


def sample_images() -> Tensor:
    """Two images in [0, 1] of 96×64 pixels: noise, and noise that gets darker towards one corner."""
    images = torch.rand(2, 3, 96, 64, generator=torch.Generator().manual_seed(7))
    images[1] *= torch.linspace(1, 0, 96).view(96, 1) * torch.linspace(1, 0, 64)
    return images


def normalise(images: Tensor) -> Tensor:
    """Normalises with ImageNet's mean and standard deviation, like torchvision's Normalize."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return (images - mean) / std


def sample_outputs(output: Tensor) -> Tensor:
    """``OUTPUTS`` values spread over channels and positions, by a prime step."""
    return output.contiguous().flatten()[::311][:OUTPUTS]


def import_torchvision() -> ModuleType:
    """Imports torchvision, with placeholders for two operators if its compiled part cannot be loaded.

    With the CPU build of torch, that part lacks its CUDA libraries. The networks do not need it. Raises
    ``ImportError`` if torchvision is not installed.
    """
    if importlib.util.find_spec("torchvision") is None:
        raise ImportError("torchvision is not installed")
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        torchvision = importlib.import_module("torchvision")
        torchvision.__dict__["placeholders"] = library  # they live as long as the library object
        return torchvision


def main() -> None:
    torchvision = import_torchvision()
    recorded: dict[str, object] = {
        "torchvision": torchvision.__version__.partition("+")[0],
        "torch": torch.__version__.partition("+")[0],
    }
    for name, gain in GAIN.items():
        features = getattr(torchvision.models, name)(weights=None).features.eval()
        fill_by_name(features.state_dict(), gain)
        with torch.no_grad():
            output = features(normalise(sample_images()))
        recorded[name] = {
            "shape": list(output.shape),
            "mean": output.mean().item(),
            "std": output.std().item(),
            "sample": sample_outputs(output).tolist(),
        }
        print(f"{name}: {tuple(output.shape)}, mean {output.mean():.4f}, std {output.std():.4f}")
    temporary = REFERENCE.with_suffix(".tmp")
    temporary.write_text(json.dumps(recorded, indent=1) + "\n")
    os.replace(temporary, REFERENCE)


if __name__ == "__main__":
    main()

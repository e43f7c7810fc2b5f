"""The blocks of Stages B and C.

Features are channels-last, ``b h w c``, so that the wide linear layers, which do most of the work, need no
transposition. Convolutions see the same memory as a ``channels_last`` tensor.

Legend: ``b`` batch, ``h w`` grid, ``c`` width, ``t`` text positions, ``n`` heads, ``d`` width of a head.
Parameter names are those of the published checkpoints in diffusers' layout.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from wuerstchen.errors import UserError
from wuerstchen.models.mlp import ChannelMLP, GlobalResponseNorm
from wuerstchen.models.traits import BlockTraits

LAYER_NORM_EPS = 1e-6
TIMESTEP_SCALE = 10_000


def layer_norm(x: Tensor) -> Tensor:
    """Layer norm over the last axis, without weights: the only kind in Würstchen."""
    return F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)


def to_channels_last(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b h w c"]:
    return x.permute(0, 2, 3, 1).contiguous()


def convolve(conv: nn.Module, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h2 w2 c2"]:
    """Applies a convolution, or another channels-first module, to channels-last features."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def pointwise(conv: nn.Module, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c2"]:
    """A 1×1 convolution, computed as a linear layer."""
    if type(conv) is not nn.Conv2d:  # an adapter has replaced it
        return convolve(conv, x)
    return F.linear(x, conv.weight.flatten(1), conv.bias)


def exact_output(
    conv: nn.Module, x: Float[Tensor, "b h w c"], dtype: torch.dtype
) -> Float[Tensor, "b c2 h w"]:
    """A model's last layer norm and 1×1 convolution, always in at least fp32.

    The next operation divides by the result: Stage C by |1 − b|, where half precision cannot tell b from 1.
    """
    exact = torch.promote_types(dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        if type(conv) is not nn.Conv2d:  # an adapter has replaced it
            # In float32, cuDNN may round to ten bits (TF32).
            wide = torch.float64 if x.is_cuda else exact
            weights = {name: weight.to(wide) for name, weight in conv.named_parameters()}
            inner = layer_norm(x.to(exact)).permute(0, 3, 1, 2).to(wide)
            return torch.func.functional_call(conv, weights, (inner,)).to(exact)
        bias = None if conv.bias is None else conv.bias.to(exact)
        return F.linear(layer_norm(x.to(exact)), conv.weight.flatten(1).to(exact), bias).permute(0, 3, 1, 2)


def check_times(r: Float[Tensor, "..."], batch: int, grid: Sequence[int]) -> None:
    """Raises ``ValueError`` unless there is one time per image, (b,), or one per cell, (b, h, w)."""
    if r.ndim == 0 or r.shape[0] not in (1, batch) or r.shape[1:] not in ((), tuple(grid)):
        raise ValueError(
            f"r has the shape {tuple(r.shape)}. It needs one time per image, ({batch},), or one per cell of "
            f"the latents, {(batch, *grid)}. Pass one of these shapes."
        )


def timestep_embedding(r: Float[Tensor, "b ..."], width: int) -> Float[Tensor, "b ... width"]:
    """Sine and cosine features of the timestep ``r`` in [0, 1], of each image or each cell.

    The order of operations is part of the model: the features of r·10000 are so steep that a different order
    changes the output by 1e-4. Odd widths end in a zero.
    """
    half = width // 2
    frequencies = torch.arange(half, device=r.device).float()
    frequencies = frequencies.mul(-math.log(TIMESTEP_SCALE) / (half - 1)).exp()
    angles = (r * TIMESTEP_SCALE)[..., None] * frequencies
    features = torch.cat([angles.sin(), angles.cos()], dim=-1)
    return F.pad(features, (0, width % 2)).to(r.dtype)


class Network(nn.Module):
    """A whole network, with its device and dtype."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


_CONVOLUTION = BlockTraits(
    takes="skips",
    compile=True,
    recompute=True,
    shard="block",
    orthogonalise=True,
    fuse=(nn.Conv2d, ChannelMLP, nn.Linear, nn.GELU, GlobalResponseNorm, nn.Dropout, nn.Linear),
)


class ResBlock(nn.Module):
    """Stage C's block: depthwise convolution, layer norm, MLP with global response norm, residual.

    In Stage B of v1 it also takes ``c_skip`` channels, a multiple of ``c``, concatenated before the
    convolution. The groups then pair adjacent channels of the concatenation, not channel i of ``x`` with
    channel i of the skip. So with ``c_skip = c`` the first half of the output depends only on ``x``, and the
    second half only on the skip.
    """

    allows = _CONVOLUTION

    def __init__(self, c: int, c_skip: int = 0, *, kernel_size: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(c + c_skip, c, kernel_size, padding=kernel_size // 2, groups=c)
        self.channelwise = ChannelMLP(c, c, dropout)

    def forward(
        self, x: Float[Tensor, "b h w c"], skip: Float[Tensor, "b h w c_skip"] | None = None
    ) -> Float[Tensor, "b h w c"]:
        joined = x if skip is None else torch.cat([x, skip], dim=-1)
        return x + self.channelwise(layer_norm(convolve(self.depthwise, joined)))


class ConditionedResBlock(nn.Module):
    """Stage B's block in v2: ``ResBlock`` with ``c_skip`` more channels, concatenated after the norm."""

    allows = _CONVOLUTION

    def __init__(self, c: int, c_skip: int = 0, *, kernel_size: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(c, c, kernel_size, padding=kernel_size // 2, groups=c)
        self.channelwise = ChannelMLP(c + c_skip, c, dropout)

    def forward(
        self, x: Float[Tensor, "b h w c"], *skips: Float[Tensor, "b h w _"]
    ) -> Float[Tensor, "b h w c"]:
        inner = layer_norm(convolve(self.depthwise, x))
        return x + self.channelwise(torch.cat([inner, *skips], dim=-1) if skips else inner)


class TimestepBlock(nn.Module):
    """Scales and shifts every channel by the timestep of the image, or of each position."""

    allows = BlockTraits(takes="timestep", compile=True, recompute=True, fuse=(nn.Linear,))

    def __init__(self, c: int, c_r: int) -> None:
        super().__init__()
        self.mapper = nn.Linear(c_r, 2 * c)

    def forward(
        self, x: Float[Tensor, "b h w c"], r_embed: Float[Tensor, "b c_r"] | Float[Tensor, "b h w c_r"]
    ) -> Float[Tensor, "b h w c"]:
        factors = self.mapper(r_embed)
        if factors.ndim == 2:
            factors = factors[:, None, None, :]
        scale, shift = factors.chunk(2, dim=-1)
        return torch.addcmul(shift, x, 1 + scale)


@dataclass(frozen=True)
class KeysValues:
    """The text for one attention block: computed once per prompt, read at every step."""

    keys: Float[Tensor, "b n t d"]
    values: Float[Tensor, "b n t d"]
    mask: Bool[Tensor, "b t"] | None  # False where the text is padding; None attends to everything


@dataclass(frozen=True)
class TextTokens:
    """The text for all attention blocks, in training. Each block computes keys and values itself, so that it
    can be compiled, sharded or recomputed on its own."""

    tokens: Float[Tensor, "b t c_cond"]
    mask: Bool[Tensor, "b t"] | None


class Attention(nn.Module):
    """Multi-head attention's four linear layers, under diffusers' names."""

    def __init__(self, c: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        inner = c // heads * heads  # less than c if heads do not divide it, as in diffusers
        self.to_q = nn.Linear(c, inner)
        self.to_k = nn.Linear(c, inner)
        self.to_v = nn.Linear(c, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, c)])

    def split_heads(self, x: Float[Tensor, "b s c"]) -> Float[Tensor, "b n s d"]:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, source: Float[Tensor, "b t c"], mask: Bool[Tensor, "b t"] | None) -> KeysValues:
        return KeysValues(self.split_heads(self.to_k(source)), self.split_heads(self.to_v(source)), mask)

    def keys_values_at_once(
        self, source: Float[Tensor, "b t c"], mask: Bool[Tensor, "b t"] | None
    ) -> KeysValues:
        """``keys_values``, in training as one matrix product. Concatenating weights is cheap if they are cast
        anyway.

        Without gradients the layers are called, because only a call moves offloaded weights to the device.
        """
        plain = type(self.to_k) is type(self.to_v) is nn.Linear  # an adapter may have replaced one
        if not plain or not torch.is_grad_enabled():
            return self.keys_values(source, mask)
        weight = torch.cat([self.to_k.weight, self.to_v.weight])
        both = F.linear(source, weight, torch.cat([self.to_k.bias, self.to_v.bias]))
        keys, values = both.chunk(2, dim=-1)
        return KeysValues(self.split_heads(keys), self.split_heads(values), mask)

    def forward(self, tokens: Float[Tensor, "b s c"], attended: KeysValues) -> Float[Tensor, "b s c"]:
        mask = attended.mask
        # Dropout acts on the attention weights, as in the original.
        output = F.scaled_dot_product_attention(
            self.split_heads(self.to_q(tokens)),
            attended.keys,
            attended.values,
            attn_mask=None if mask is None else mask[:, None, None, :],
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.to_out[0](output.transpose(1, 2).flatten(2))


class AttnBlock(nn.Module):
    """Attention from every position of the grid to the grid and the text together."""

    allows = BlockTraits(
        takes="text",
        compile=True,
        recompute=True,
        shard="block",
        orthogonalise=True,
        fuse=(
            *(Attention, nn.Linear, nn.Linear, nn.Linear, nn.ModuleList, nn.Linear),
            *(nn.Sequential, nn.SiLU, nn.Linear),
        ),
    )

    def __init__(self, c: int, c_cond: int, heads: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = Attention(c, heads, dropout)
        self.kv_mapper = nn.Sequential(nn.SiLU(), nn.Linear(c_cond, c))

    def keys_values(self, text: Float[Tensor, "b t c_cond"], mask: Bool[Tensor, "b t"] | None) -> KeysValues:
        """Keys and values of the text, the same at every step."""
        return self.attention.keys_values(self.kv_mapper(text), mask)

    def forward(self, x: Float[Tensor, "b h w c"], text: KeysValues | TextTokens) -> Float[Tensor, "b h w c"]:
        tokens = layer_norm(x).flatten(1, 2)
        mask = None if text.mask is None else F.pad(text.mask, (tokens.shape[1], 0), value=True)
        if isinstance(text, TextTokens):
            source = torch.cat([tokens, self.kv_mapper(text.tokens)], dim=1)
            attended = self.attention.keys_values_at_once(source, mask)
        else:
            own = self.attention.keys_values(tokens, None)
            keys = torch.cat([own.keys, text.keys], dim=2)
            attended = KeysValues(keys, torch.cat([own.values, text.values], dim=2), mask)
        return x + self.attention(tokens, attended).unflatten(1, x.shape[1:3])


class SelfAttnBlock(nn.Module):
    """Attention from every position of the grid to the grid, for networks without text."""

    allows = BlockTraits(
        compile=True,
        recompute=True,
        shard="block",
        orthogonalise=True,
        fuse=(Attention, nn.Linear, nn.Linear, nn.Linear, nn.ModuleList, nn.Linear),
    )

    def __init__(self, c: int, heads: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = Attention(c, heads, dropout)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        tokens = layer_norm(x).flatten(1, 2)
        attended = self.attention.keys_values_at_once(tokens, None)
        return x + self.attention(tokens, attended).unflatten(1, x.shape[1:3])


class Resampling(nn.Sequential):
    """A layer norm, then a convolution that halves or doubles the grid between two levels.

    The published keys count the layer norm, which has no weights, as the first entry.
    """

    allows = BlockTraits()

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__(nn.Identity(), convolution)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h2 w2 c2"]:
        return convolve(self[1], layer_norm(x))


def init_linear_and_conv(module: nn.Module) -> None:
    """The original's default: Xavier-uniform weights and zero biases.

    The original has query, key and value in one (3c, c) matrix, so their bound is that matrix's √(6 / 4c).
    Transposed convolutions keep PyTorch's default.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for layer in module.modules():
        if isinstance(layer, Attention):
            for projection in (layer.to_q, layer.to_k, layer.to_v):
                nn.init.xavier_uniform_(projection.weight, gain=math.sqrt(0.5))


def init_blocks(blocks: list[nn.Module], depth: int) -> None:
    """Scales residual branches by 1/√depth, and makes timestep blocks the identity."""
    with torch.no_grad():
        for block in blocks:
            if isinstance(block, ResBlock | ConditionedResBlock):
                block.channelwise[-1].weight.mul_(math.sqrt(1 / depth))
            elif isinstance(block, TimestepBlock):
                nn.init.zeros_(block.mapper.weight)


def check_dropout(dropout: float) -> None:
    if not 0 <= dropout <= 1:
        raise UserError(f"dropout must be from 0 to 1, got {dropout}. 0.1 is common.")


def check_timestep_width(c_r: int) -> None:
    """Raises ``UserError`` for a single frequency: ``timestep_embedding`` divides by their number minus
    one."""
    if c_r < 0 or c_r in (2, 3):
        raise UserError(f"c_r must be 0, 1 or at least 4, got {c_r}. 64 is published.")


MAX_BLOCKS = 1_000
"""Over ten times as many as any published network has. More would take for ever to build."""

MAX_LEVELS = 16
"""At 16 levels a side has at least 32,768 positions."""


def check_levels(
    c_hidden: tuple[int, ...], nhead: tuple[int, ...], blocks: tuple[int, ...], level_config: tuple[str, ...]
) -> None:
    """Raises ``UserError`` if the levels of a U-Net do not fit together."""
    if len(c_hidden) > MAX_LEVELS:
        raise UserError(f"c_hidden must have at most {MAX_LEVELS} levels, got {len(c_hidden)}.")
    for name, entries in {"nhead": nhead, "blocks": blocks, "level_config": level_config}.items():
        if len(entries) != len(c_hidden):
            raise UserError(
                f"{name} must have one entry for each of the {len(c_hidden)} levels of "
                f"c_hidden={c_hidden}, got {entries}."
            )
    if min(blocks) < 0:
        raise UserError(
            f"blocks must be at least 0 for every level, got {blocks}. 0 is a level without blocks."
        )
    total = sum(count * len(kinds) for count, kinds in zip(blocks, level_config, strict=True))
    if total > MAX_BLOCKS:
        raise UserError(f"blocks and level_config must make at most {MAX_BLOCKS} blocks, got {total}.")
    for width, heads, count, kinds in zip(c_hidden, nhead, blocks, level_config, strict=True):
        if set(kinds) - set("CTA"):
            raise UserError(
                f"level_config may only have the letters C, T and A, got {kinds!r}. 'CT' is common."
            )
        if "A" in kinds and count and not 1 <= heads <= width:
            raise UserError(
                f"nhead must be from 1 to the level's width {width}, got {heads}. Use a divisor of the "
                f"width, or remove the A from {kinds!r}."
            )

"""Blocks on GPUs when nothing is learnt: fewer passes over memory and fewer products, with the same result.

``models.blocks`` hands over to ``run_fused`` where it can. A block that cannot be had this way, because an
adapter has replaced one of its layers or a weight is elsewhere for now, runs as it is written. What is done:

- Layer norms join what stands before them: the depthwise convolution, or scale and shift by the timestep.
- Residuals are added by the matrix product, onto x in place: x ← x + y·Wᵀ. Its bias is added by the pass over
  x that comes before or after.
- Queries, keys and values of the grid are one product, and so are scales and shifts of all timestep blocks,
  where weights lie one after another (``join_layers``). Attention reads the text's keys and values, which are
  the same at every step, where they were left.
- Stage B's map enters through a product of its own 16 channels, not of the 1024 that it is mapped to:
  W·(M·e + m) = (W·M)·e + W·m. That is a sixth of the decoder's arithmetic.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from wuerstchen.device import runs_triton
from wuerstchen.models.layers import (
    Attention,
    AttnBlock,
    KeysValues,
    Resampling,
    TextTokens,
)
from wuerstchen.models.traits import fused_layers, traits_of


def suits(x: Tensor) -> bool:
    """Whether blocks of ``x``'s network may run fused here and now."""
    return (
        x.is_cuda
        and x.dtype != torch.float64
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cuda")
        and not torch.compiler.is_compiling()
        and runs_triton(x.device)
    )


@dataclass(frozen=True)
class FactoredMap:
    """Stage B's map at one level: its own few channels, and what each block multiplies them by."""

    positions: Float[Tensor, "b h w e"]
    mapper: tuple[Float[Tensor, "c_cond e"], Float[Tensor, " c_cond"]]
    """M and m."""
    factors: list[tuple[Float[Tensor, "c4 e"], Float[Tensor, " c4"]]]
    """Of each block in order: W·M, and the bias with W·m in it."""

    def whole(self) -> Float[Tensor, "b h w c_cond"]:
        """The map as blocks take it that run as they are written."""
        return F.linear(self.positions, *self.mapper)


def factored_map(
    blocks: Iterable[nn.Module], mapper: nn.Conv2d, positions: Float[Tensor, "b h w e"]
) -> FactoredMap | None:
    """The map as the convolution blocks among ``blocks`` take it; None if one of them is not to be fused."""
    readers = [block for block in blocks if traits_of(block).takes == "maps"]
    if not all(is_plain(block, positions) for block in readers):
        return None
    assert mapper.bias is not None
    m, bias = mapper.weight.flatten(1), mapper.bias
    factors = []
    for block in readers:
        first = block.channelwise[0]
        w = first.weight[:, first.in_features - len(m) :]  # the map comes last
        factors.append((w @ m, torch.addmv(first.bias, w, bias)))
    return FactoredMap(positions, (m, bias), factors)


def is_plain(block: nn.Module, x: Tensor) -> bool:
    """Whether a block has all its layers as they were made, with biases, which lie where ``x`` does, and
    nothing else is to be called."""
    layers, expected = list(block.modules()), fused_layers(block)
    return (
        bool(expected)
        and tuple(type(layer) for layer in layers[1:]) == expected
        and not any(layer.training or "forward" in vars(layer) for layer in layers)
        and all(getattr(layer, "bias", x) is not None for layer in layers)
        and all(getattr(layer, "approximate", "none") == "none" for layer in layers)
        and all(p.device == x.device and p.dtype == x.dtype for p in block.parameters())
        and not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
    )


def keys_values(
    block: AttnBlock, tokens: Float[Tensor, "b t c_cond"], mask: Bool[Tensor, "b t"] | None
) -> KeysValues:
    """As ``block.keys_values``, by one product where its weights lie one after another."""
    attention = block.attention
    joined = _joined((attention.to_k, attention.to_v)) if is_plain(block, tokens) else None
    if joined is None:
        return block.keys_values(tokens, mask)
    keys, values = F.linear(block.kv_mapper(tokens), *joined).chunk(2, dim=-1)
    return KeysValues(attention.split_heads(keys), attention.split_heads(values), mask)


def run_fused(
    blocks: Iterable[nn.Module],
    x: Float[Tensor, "b h w c"],
    r_embed: Float[Tensor, "b c_r"],
    texts: Iterator[KeysValues | TextTokens],
    skip: Float[Tensor, "b h w c_skip"] | None = None,
    level_map: Float[Tensor, "b _ _ c_cond"] | FactoredMap | None = None,
) -> Float[Tensor, "b _ _ _"]:
    """As ``models.blocks.run_blocks``, on the current device. ``x`` may be overwritten."""
    from wuerstchen.models.fused import block_kernels

    factors = iter(level_map.factors if isinstance(level_map, FactoredMap) else ())
    sequence = list(blocks)
    timesteps, kernels = _mapped_timesteps(sequence, x, r_embed), _taps(sequence, x)
    x, waiting = x.contiguous(), _Waiting()
    for number, block in enumerate(sequence):
        skip = skip if number == 0 else None  # the first block takes it, or none
        takes = traits_of(block).takes
        if takes == "timestep":
            factors_r = next(timesteps)
            if factors_r is not None:
                waiting = _Waiting(waiting.bias, factors_r)
                continue
            x = block(waiting.done(x), r_embed)
        elif takes == "text":
            text = next(texts)
            if isinstance(text, KeysValues) and is_plain(block, x):
                attention, out = block.attention, block.attention.to_out[0]
                tokens = block_kernels.scale_shift_norm_(x, *waiting.over(x), out.bias)
                _add_product(x, _attended(attention, tokens.flatten(1, 2), text), out.weight)
                waiting = _Waiting()
                continue
            x = block(waiting.done(x), text)
        elif takes == "maps":
            x, taps = waiting.done(x), next(kernels)
            if taps is not None:
                inner = block_kernels.depthwise_norm(x, taps, block.depthwise.bias)
                first, _, norm, _, last = block.channelwise
                hidden, bias = _first_layer(first, inner, skip, level_map, factors)
                hidden = hidden.flatten(1, 2)
                block_kernels.response_norm_(hidden, bias, norm.gamma.flatten(), norm.beta.flatten())
                _add_product(x, hidden, last.weight)
                waiting = _Waiting(last.bias)
                continue
            given = level_map
            if isinstance(level_map, FactoredMap):
                given, _ = level_map.whole(), next(factors)
            x = block(x, *(joined for joined in (skip, given) if joined is not None))
        elif isinstance(block, Resampling):  # its convolution has made a new map: no copy is needed
            x, waiting = block(waiting.done(x)).contiguous(), _Waiting()
            continue
        else:
            x = block(waiting.done(x))
        # A copy: who was called may keep what it returned.
        x, waiting = x.clone(memory_format=torch.contiguous_format), _Waiting()
    return waiting.done(x)


@dataclass(frozen=True)
class _Waiting:
    """What x still lacks: a bias, then the scale and shift of a timestep."""

    bias: Float[Tensor, " c"] | None = None
    factors: Float[Tensor, "b c2"] | None = None

    def over(self, x: Float[Tensor, "b h w c"]) -> tuple[Float[Tensor, " c"], Float[Tensor, "b c2"]]:
        """Both, zeros where there are none."""
        b, c = len(x), x.shape[-1]
        bias = x.new_zeros(c) if self.bias is None else self.bias
        return bias, x.new_zeros(b, 2 * c) if self.factors is None else self.factors

    def done(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        """``x`` with all of it, in place."""
        from wuerstchen.models.fused import block_kernels

        if self.bias is not None or self.factors is not None:
            block_kernels.scale_shift_(x, *self.over(x))
        return x


def _add_product(
    x: Float[Tensor, "b h w c"], y: Float[Tensor, "b n d"], weight: Float[Tensor, "c d"]
) -> None:
    """x ← x + y·Wᵀ, in place."""
    x.flatten(0, 2).addmm_(y.flatten(0, 1), weight.t())


def _first_layer(
    layer: nn.Linear,
    inner: Float[Tensor, "b h w c"],
    skip: Float[Tensor, "b h w c_skip"] | None,
    level_map: Float[Tensor, "b h w c_cond"] | FactoredMap | None,
    factors: Iterator[tuple[Tensor, Tensor]],
) -> tuple[Float[Tensor, "b h w c4"], Float[Tensor, " c4"]]:
    """The linear layer on what a block joins, without joining it, and the bias that it still lacks."""
    parts = [part for part in (inner, skip, level_map) if isinstance(part, Tensor)]
    widths = [part.shape[-1] for part in parts]
    of_map = len(level_map.mapper[1]) if isinstance(level_map, FactoredMap) else 0
    if sum(widths) + of_map != layer.in_features:
        raise ValueError(f"maps of {sum(widths) + of_map} channels do not fit {layer.in_features}")
    *weights, _ = layer.weight.split([*widths, of_map], dim=1)
    products, bias = list(zip(parts, weights, strict=True)), layer.bias
    if isinstance(level_map, FactoredMap):
        factor, bias = next(factors)
        products.append((level_map.positions, factor))
    first, *others = products
    hidden = F.linear(*first)
    for part, weight in others:
        if part.shape[:-1] != hidden.shape[:-1]:
            raise ValueError(f"a map of {tuple(part.shape)} does not fit one of {tuple(hidden.shape)}")
        hidden.flatten(0, 2).addmm_(part.flatten(0, 2), weight.t())
    return hidden, bias


def _attended(
    attention: Attention, tokens: Float[Tensor, "b n c"], text: KeysValues
) -> Float[Tensor, "b n c_heads"]:
    """What the grid's tokens make of themselves and the text, before the output's product."""
    from wuerstchen.models.fused import attention_kernel

    if len(text.keys) != len(tokens):
        raise ValueError(
            f"a text of {len(text.keys)} samples does not fit {len(tokens)} maps; give one for each"
        )
    projections = (attention.to_q, attention.to_k, attention.to_v)
    joined = _joined(projections)
    if joined is None:
        queries, keys, values = (projection(tokens) for projection in projections)
    else:
        queries, keys, values = F.linear(tokens, *joined).chunk(3, dim=-1)
    if attention_kernel.suits(queries, attention.heads) and text.keys.dtype == queries.dtype:
        return attention_kernel.attend(queries, keys, values, text.keys, text.values, text.mask)
    n, mask = tokens.shape[1], text.mask
    mask = None if mask is None else F.pad(mask, (n, 0), value=True)[:, None, None, :]
    queries, keys, values = map(attention.split_heads, (queries, keys, values))
    keys, values = torch.cat([keys, text.keys], dim=2), torch.cat([values, text.values], dim=2)
    return F.scaled_dot_product_attention(queries, keys, values, mask).transpose(1, 2).flatten(2)


def _joined(layers: Sequence[nn.Module]) -> tuple[Tensor, Tensor] | None:
    """Weight and bias of layers as one, if they lie one after another in memory; without a copy."""
    joined = []
    for tensors in ([layer.weight for layer in layers], [layer.bias for layer in layers]):
        first = tensors[0]
        storage, place = first.untyped_storage().data_ptr(), first.storage_offset()
        for tensor in tensors:
            if not tensor.is_contiguous():
                return None
            if tensor.untyped_storage().data_ptr() != storage or tensor.storage_offset() != place:
                return None
            place += tensor.numel()
        shape = (sum(len(tensor) for tensor in tensors), *first.shape[1:])
        joined.append(first.detach().as_strided(shape, first.stride()))
    return joined[0], joined[1]


def join_layers(network: nn.Module) -> None:
    """Lays weights that are used at once one after another: each attention block's queries, keys and values,
    and in a sequence of blocks the timestep's mappers and the depthwise convolutions.

    They are views of one tensor then. The ``save_model`` of safetensors and of accelerate takes such for tied
    weights and leaves them out; ``torch.save``, ``safetensors.torch.save_file`` and we do not.
    ``p.data = p.data.clone()`` for each parameter undoes it.
    """
    with _JOINS:
        for module in network.modules():
            if isinstance(module, Attention):
                _join([module.to_q, module.to_k, module.to_v])
            elif isinstance(module, nn.ModuleList):
                blocks = [block for block in module.children() if traits_of(block).fuse]  # without None
                fused = [(traits_of(block).takes, block) for block in blocks]
                _join([block.mapper for takes, block in fused if takes == "timestep"])
                _join([block.depthwise for takes, block in fused if takes == "maps"])


_JOINS = threading.Lock()  # two threads that draw with one network for the first time


def _join(layers: Sequence[nn.Module]) -> None:
    if not layers or not all(type(layer) in (nn.Linear, nn.Conv2d) for layer in layers):
        return
    if any(layer.bias is None for layer in layers) or len({layer.weight.shape[1:] for layer in layers}) > 1:
        return
    if _joined(layers) is not None:
        return
    # What is made in inference mode could never be trained again.
    with torch.inference_mode(False), torch.no_grad():
        for name in ("weight", "bias"):
            own = [getattr(layer, name) for layer in layers]
            parts = torch.cat([tensor.data for tensor in own]).split([len(tensor) for tensor in own])
            for tensor, part in zip(own, parts, strict=True):
                tensor.data = part


def _mapped_timesteps(
    blocks: Sequence[nn.Module], x: Tensor, r_embed: Float[Tensor, "b c_r"]
) -> Iterator[Float[Tensor, "b c2"] | None]:
    """Scale and shift of each timestep block in order, by one product where their mappers lie together; None
    for a block that is not to be fused."""
    steps = [block for block in blocks if traits_of(block).takes == "timestep"]
    plain = [is_plain(step, x) for step in steps]
    mappers = [step.mapper if fits else None for step, fits in zip(steps, plain, strict=True)]
    joined = _joined(mappers) if steps and all(plain) else None
    if joined is not None:
        return iter(F.linear(r_embed, *joined).split([mapper.out_features for mapper in mappers], dim=-1))
    return (None if mapper is None else mapper(r_embed) for mapper in mappers)


def _taps(blocks: Sequence[nn.Module], x: Tensor) -> Iterator[Float[Tensor, "k2 c"] | None]:
    """The depthwise weights of each convolution block in order, channels last: as they lie, a read of one tap
    would touch those of all. One pass turns all of them. None for a block that is not to be fused."""
    convolutions = [block for block in blocks if traits_of(block).takes == "maps"]
    # Where a skip joins before the convolution, as in v1, groups read more than one channel.
    plain = [is_plain(block, x) and block.depthwise.weight.shape[1] == 1 for block in convolutions]
    layers = [block.depthwise for block, fits in zip(convolutions, plain, strict=True) if fits]
    if not layers:
        return iter([None] * len(plain))
    weights, joined = [layer.weight for layer in layers], _joined(layers)
    rows = (torch.cat(weights) if joined is None else joined[0]).flatten(1)
    turned = iter(rows.t().contiguous().split([len(weight) for weight in weights], dim=1))
    return (next(turned) if fits else None for fits in plain)


MOST_HIDDEN = 2**25
"""Elements of the widest map of Stage A's blocks that are there at a time: 64 MiB in half precision."""


def run_mixing(block: nn.Module, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
    """Stage A's block (``MixingResidualBlock``). Its MLP takes some positions after others, which bounds the
    memory. It runs on the current device. ``x`` is overwritten."""
    from wuerstchen.models.fused import block_kernels

    x, gammas = x.contiguous(), block.gammas
    first, _, last = block.channelwise
    normed = block_kernels.norm_affine(x, gammas)
    conv = block.depthwise[1]
    taps = conv.weight.flatten(1).t().contiguous()
    inner = block_kernels.edge_mix_(x, normed, taps, conv.bias, gammas, last.bias)
    rows, residual = inner.flatten(0, 2), x.flatten(0, 2)
    part = max(1, MOST_HIDDEN // first.out_features)
    for some, sums in zip(rows.split(part), residual.split(part), strict=True):
        hidden = block_kernels.gelu_(F.linear(some, first.weight, first.bias), gammas)
        sums.addmm_(hidden, last.weight.t())
    return x

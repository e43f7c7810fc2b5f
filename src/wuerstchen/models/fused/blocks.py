"""Fused blocks for sampling on GPUs: fewer passes over memory, fewer matrix products, the same result.

``models.blocks`` calls ``run_fused`` where it can. A block with a layer that an adapter has replaced, or with
an offloaded weight, runs unfused. The optimisations:

- Layer norms are fused with the operation before them: the depthwise convolution, or the timestep's scale and
  shift.
- The matrix product adds the residual in place: x ← x + y·Wᵀ. Its bias is added by the pass over x before or
  after it.
- Queries, keys and values of the grid are one product, and so are scales and shifts of all timestep blocks,
  if the weights are adjacent in memory (``join_layers``). Attention reads the text's keys and values, which
  are the same at every step, in place.
- The semantic latents of Stage B are multiplied as 16 channels, not as the 1024 that they are mapped to:
  W·(M·e + m) = (W·M)·e + W·m. That saves a sixth of the decoder's arithmetic.
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
    SelfAttnBlock,
    TextTokens,
)
from wuerstchen.models.traits import fused_layers, traits_of


def can_fuse(x: Tensor) -> bool:
    """Whether blocks can run fused on ``x``, in the present modes of torch."""
    return (
        x.is_cuda
        and x.dtype != torch.float64
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cuda")
        and not torch.compiler.is_compiling()
        and runs_triton(x.device)
    )


@dataclass(frozen=True)
class FactoredCondition:
    """The semantic latents at one level of Stage B: their few channels, and each block's factor for them."""

    positions: Float[Tensor, "b h w e"]
    mapper: tuple[Float[Tensor, "c_cond e"], Float[Tensor, " c_cond"]]
    """M and m in the formula above."""
    factors: list[tuple[Float[Tensor, "c4 e"], Float[Tensor, " c4"]]]
    """For each block in order: W·M, and the bias including W·m."""

    def full(self) -> Float[Tensor, "b h w c_cond"]:
        """The condition as unfused blocks take it."""
        return F.linear(self.positions, *self.mapper)


def factored_condition(
    blocks: Iterable[nn.Module], mapper: nn.Conv2d, positions: Float[Tensor, "b h w e"]
) -> FactoredCondition | None:
    """The condition for the convolution blocks of a level; None if one of them cannot be fused."""
    readers = [block for block in blocks if traits_of(block).takes == "skips"]
    if not all(is_plain(block, positions) for block in readers):
        return None
    assert mapper.bias is not None
    m, bias = mapper.weight.flatten(1), mapper.bias
    factors = []
    for block in readers:
        first = block.channelwise[0]
        w = first.weight[:, first.in_features - len(m) :]  # the condition comes last
        factors.append((w @ m, torch.addmv(first.bias, w, bias)))
    return FactoredCondition(positions, (m, bias), factors)


def is_plain(block: nn.Module, x: Tensor) -> bool:
    """Whether a block can be fused: original layers with biases, on ``x``'s device and in its dtype, in eval
    mode, and without hooks."""
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
    """``block.keys_values`` as one product, if its weights are adjacent in memory."""
    attention = block.attention
    joined = _joined((attention.to_k, attention.to_v)) if is_plain(block, tokens) else None
    if joined is None:
        return block.keys_values(tokens, mask)
    keys, values = F.linear(block.kv_mapper(tokens), *joined).chunk(2, dim=-1)
    return KeysValues(attention.split_heads(keys), attention.split_heads(values), mask)


def run_fused(
    blocks: Iterable[nn.Module],
    x: Float[Tensor, "b h w c"],
    r_embed: Float[Tensor, "b ... c_r"],
    texts: Iterator[KeysValues | TextTokens],
    skip: Float[Tensor, "b h w c_skip"] | None = None,
    condition: Float[Tensor, "b _ _ c_cond"] | FactoredCondition | None = None,
) -> Float[Tensor, "b _ _ _"]:
    """``models.blocks.run_blocks`` on the current device. May overwrite ``x``."""
    from wuerstchen.models.fused import block_kernels

    factors = iter(condition.factors if isinstance(condition, FactoredCondition) else ())
    sequence = list(blocks)
    timesteps, kernels = _mapped_timesteps(sequence, x, r_embed), _taps(sequence, x)
    x, pending = x.contiguous(), _Pending()
    for number, block in enumerate(sequence):
        skip = skip if number == 0 else None  # only the first block can take it
        takes = traits_of(block).takes
        if takes == "timestep":
            factors_r = next(timesteps)
            if factors_r is not None:
                pending = _Pending(pending.bias, factors_r)
                continue
            x = block(pending.apply(x), r_embed)
        elif takes == "text":
            text = next(texts)
            if isinstance(text, KeysValues) and is_plain(block, x):
                _attend(block.attention, x, pending, text)
                pending = _Pending()
                continue
            x = block(pending.apply(x), text)
        elif takes == "skips":
            x, taps = pending.apply(x), next(kernels)
            if taps is not None:
                inner = block_kernels.depthwise_norm(x, taps, block.depthwise.bias)
                first, _, norm, _, last = block.channelwise
                hidden, bias = _first_layer(first, inner, skip, condition, factors)
                hidden = hidden.flatten(1, 2)
                block_kernels.response_norm_(hidden, bias, norm.gamma.flatten(), norm.beta.flatten())
                _add_product(x, hidden, last.weight)
                pending = _Pending(last.bias)
                continue
            given = condition
            if isinstance(condition, FactoredCondition):
                given, _ = condition.full(), next(factors)
            x = block(x, *(joined for joined in (skip, given) if joined is not None))
        elif isinstance(block, SelfAttnBlock) and is_plain(block, x):
            _attend(block.attention, x, pending, None)
            pending = _Pending()
            continue
        elif isinstance(block, Resampling):  # its convolution returns a new tensor: no copy is needed
            x, pending = block(pending.apply(x)).contiguous(), _Pending()
            continue
        else:
            x = block(pending.apply(x))
        # A copy, because the called block may keep the tensor that it returned.
        x, pending = x.clone(memory_format=torch.contiguous_format), _Pending()
    return pending.apply(x)


@dataclass(frozen=True)
class _Pending:
    """Operations that x still needs: a bias, then a timestep's scale and shift."""

    bias: Float[Tensor, " c"] | None = None
    factors: Float[Tensor, "b ... c2"] | None = None

    def factors_for(
        self, x: Float[Tensor, "b h w c"]
    ) -> tuple[Float[Tensor, " c"], Float[Tensor, "b ... c2"]]:
        """Both, with zeros for None."""
        b, c = len(x), x.shape[-1]
        bias = x.new_zeros(c) if self.bias is None else self.bias
        return bias, x.new_zeros(b, 2 * c) if self.factors is None else self.factors

    def apply(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        """Applies them to ``x`` in place, and returns it."""
        from wuerstchen.models.fused import block_kernels

        if self.bias is not None or self.factors is not None:
            block_kernels.scale_shift_(x, *self.factors_for(x))
        return x


def _attend(
    attention: Attention, x: Float[Tensor, "b h w c"], pending: _Pending, text: KeysValues | None
) -> None:
    """Applies the pending operations and an attention block to ``x``, in place."""
    from wuerstchen.models.fused import block_kernels

    out = attention.to_out[0]
    tokens = block_kernels.scale_shift_norm_(x, *pending.factors_for(x), out.bias)
    _add_product(x, _attended(attention, tokens.flatten(1, 2), text), out.weight)


def _add_product(
    x: Float[Tensor, "b h w c"], y: Float[Tensor, "b n d"], weight: Float[Tensor, "c d"]
) -> None:
    """x ← x + y·Wᵀ, in place."""
    x.flatten(0, 2).addmm_(y.flatten(0, 1), weight.t())


def _first_layer(
    layer: nn.Linear,
    inner: Float[Tensor, "b h w c"],
    skip: Float[Tensor, "b h w c_skip"] | None,
    condition: Float[Tensor, "b h w c_cond"] | FactoredCondition | None,
    factors: Iterator[tuple[Tensor, Tensor]],
) -> tuple[Float[Tensor, "b h w c4"], Float[Tensor, " c4"]]:
    """Applies the linear layer to a block's inputs as if they were concatenated.

    Returns the product and the bias, which the caller adds.
    """
    parts = [part for part in (inner, skip, condition) if isinstance(part, Tensor)]
    widths = [part.shape[-1] for part in parts]
    c_factored = len(condition.mapper[1]) if isinstance(condition, FactoredCondition) else 0
    if sum(widths) + c_factored != layer.in_features:
        raise ValueError(
            f"The inputs must have {layer.in_features} channels together, got {sum(widths) + c_factored}."
        )
    *weights, _ = layer.weight.split([*widths, c_factored], dim=1)
    products, bias = list(zip(parts, weights, strict=True)), layer.bias
    if isinstance(condition, FactoredCondition):
        factor, bias = next(factors)
        products.append((condition.positions, factor))
    first, *others = products
    hidden = F.linear(*first)
    for part, weight in others:
        if part.shape[:-1] != hidden.shape[:-1]:
            raise ValueError(
                f"The inputs must have the same batch and grid, got {tuple(part.shape)} and "
                f"{tuple(hidden.shape)}."
            )
        hidden.flatten(0, 2).addmm_(part.flatten(0, 2), weight.t())
    return hidden, bias


def _attended(
    attention: Attention, tokens: Float[Tensor, "b n c"], text: KeysValues | None
) -> Float[Tensor, "b n c_heads"]:
    """Attention of the grid's tokens to themselves and the text, if any, without the output layer."""
    from wuerstchen.models.fused import attention_kernel

    if text is not None and len(text.keys) != len(tokens):
        raise ValueError(
            f"The text must have the batch size of the latents, {len(tokens)}, got {len(text.keys)}."
        )
    projections = (attention.to_q, attention.to_k, attention.to_v)
    joined = _joined(projections)
    if joined is None:
        queries, keys, values = (projection(tokens) for projection in projections)
    else:
        queries, keys, values = F.linear(tokens, *joined).chunk(3, dim=-1)
    if text is None:
        queries, keys, values = map(attention.split_heads, (queries, keys, values))
        return F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)
    if attention_kernel.supports(queries, attention.heads) and text.keys.dtype == queries.dtype:
        return attention_kernel.attend(queries, keys, values, text.keys, text.values, text.mask)
    n, mask = tokens.shape[1], text.mask
    mask = None if mask is None else F.pad(mask, (n, 0), value=True)[:, None, None, :]
    queries, keys, values = map(attention.split_heads, (queries, keys, values))
    keys, values = torch.cat([keys, text.keys], dim=2), torch.cat([values, text.values], dim=2)
    return F.scaled_dot_product_attention(queries, keys, values, mask).transpose(1, 2).flatten(2)


def _joined(layers: Sequence[nn.Module]) -> tuple[Tensor, Tensor] | None:
    """Views of the weights and the biases of all layers as one, if they are adjacent in memory."""
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
    """Makes weights that are used together adjacent in memory: each attention block's queries, keys and
    values, and in a sequence of blocks the timestep mappers and the depthwise convolutions.

    They become views of one tensor. The ``save_model`` of safetensors and of accelerate takes them for tied
    weights and omits them; ``torch.save``, ``safetensors.torch.save_file`` and this package write them.
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
                _join([block.depthwise for takes, block in fused if takes == "skips"])


_JOINS = threading.Lock()  # for two threads that use one network for the first time


def _join(layers: Sequence[nn.Module]) -> None:
    if not layers or not all(type(layer) in (nn.Linear, nn.Conv2d) for layer in layers):
        return
    if any(layer.bias is None for layer in layers) or len({layer.weight.shape[1:] for layer in layers}) > 1:
        return
    if _joined(layers) is not None:
        return
    # Weights created in inference mode could never be trained again.
    with torch.inference_mode(False), torch.no_grad():
        for name in ("weight", "bias"):
            own = [getattr(layer, name) for layer in layers]
            parts = torch.cat([tensor.data for tensor in own]).split([len(tensor) for tensor in own])
            for tensor, part in zip(own, parts, strict=True):
                tensor.data = part


def _mapped_timesteps(
    blocks: Sequence[nn.Module], x: Tensor, r_embed: Float[Tensor, "b ... c_r"]
) -> Iterator[Float[Tensor, "b ... c2"] | None]:
    """Scale and shift for each timestep block in order. None for a block that cannot be fused.

    They are one product if the mappers are adjacent in memory. If cells have timesteps, each block has its
    own product when it runs: for all blocks together, the published Stage C would need 113 MB per image.
    """
    steps = [block for block in blocks if traits_of(block).takes == "timestep"]
    plain = [is_plain(step, x) for step in steps]
    mappers = [step.mapper if fits else None for step, fits in zip(steps, plain, strict=True)]
    joined = _joined(mappers) if steps and all(plain) and r_embed.ndim == 2 else None
    if joined is not None:
        return iter(F.linear(r_embed, *joined).split([mapper.out_features for mapper in mappers], dim=-1))
    return (None if mapper is None else mapper(r_embed) for mapper in mappers)


def _taps(blocks: Sequence[nn.Module], x: Tensor) -> Iterator[Float[Tensor, "k2 c"] | None]:
    """The depthwise weights of each convolution block in order, channels last. None for a block that cannot
    be fused.

    With channels first, reading one kernel position would touch the memory of all positions. All weights are
    transposed in one pass.
    """
    convolutions = [block for block in blocks if traits_of(block).takes == "skips"]
    # If a skip is concatenated before the convolution, as in v1, groups read more than one channel.
    plain = [is_plain(block, x) and block.depthwise.weight.shape[1] == 1 for block in convolutions]
    layers = [block.depthwise for block, fits in zip(convolutions, plain, strict=True) if fits]
    if not layers:
        return iter([None] * len(plain))
    weights, joined = [layer.weight for layer in layers], _joined(layers)
    rows = (torch.cat(weights) if joined is None else joined[0]).flatten(1)
    turned = iter(rows.t().contiguous().split([len(weight) for weight in weights], dim=1))
    return (next(turned) if fits else None for fits in plain)


MAX_HIDDEN = 2**25
"""Largest number of elements of the hidden layer in Stage A's blocks at a time: 64 MiB in half precision."""


def run_mixing(block: nn.Module, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
    """Stage A's block (``MixingResidualBlock``) on the current device. Overwrites ``x``.

    To bound the memory, the MLP runs on some positions at a time.
    """
    from wuerstchen.models.fused import block_kernels

    x, gammas = x.contiguous(), block.gammas
    first, _, last = block.channelwise
    normed = block_kernels.norm_affine(x, gammas)
    conv = block.depthwise[1]
    taps = conv.weight.flatten(1).t().contiguous()
    inner = block_kernels.edge_mix_(x, normed, taps, conv.bias, gammas, last.bias)
    rows, residual = inner.flatten(0, 2), x.flatten(0, 2)
    part = max(1, MAX_HIDDEN // first.out_features)
    for some, sums in zip(rows.split(part), residual.split(part), strict=True):
        hidden = block_kernels.gelu_(F.linear(some, first.weight, first.bias), gammas)
        sums.addmm_(hidden, last.weight.t())
    return x

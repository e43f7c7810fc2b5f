"""The U-Net that both kinds of Stage B share: levels down, then the same levels up with skip connections."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from wuerstchen.models.blocks import Condition, Context, run_blocks
from wuerstchen.models.layers import (
    AttnBlock,
    Network,
    Resampling,
    TimestepBlock,
    init_blocks,
    init_linear_and_conv,
    layer_norm,
    pointwise,
    timestep_embedding,
    to_channels_last,
)


@runtime_checkable
class Levels(Protocol):
    """The part of a configuration that describes the levels, finest first."""

    @property
    def patch_size(self) -> int: ...
    @property
    def c_hidden(self) -> tuple[int, ...]: ...
    @property
    def nhead(self) -> tuple[int, ...]: ...
    @property
    def blocks(self) -> tuple[int, ...]: ...
    @property
    def level_config(self) -> tuple[str, ...]: ...
    @property
    def c_cond(self) -> int: ...
    @property
    def c_r(self) -> int: ...
    @property
    def dropout(self) -> float | tuple[float, ...]: ...


def level_dropout(config: Levels, level: int) -> float:
    """The dropout of a level's blocks. A configuration has one value for all levels, or one for each."""
    return config.dropout[level] if isinstance(config.dropout, tuple) else config.dropout


def level_embeddings(
    r: Float[Tensor, "b ..."], config: Levels, dtype: torch.dtype
) -> list[Float[Tensor, "b ... c_r"]]:
    """The timestep embedding for the grid of each level, finest first.

    If cells have timesteps, a position gets the highest of the cells that it covers: it is as noisy as the
    noisiest of them, and noise is never taken for a known cell.
    """
    if r.ndim == 1:
        return [timestep_embedding(r, config.c_r).to(dtype)] * len(config.c_hidden)
    sides = [config.patch_size * 2**level for level in range(len(config.c_hidden))]
    grids = [r.unflatten(2, (-1, side)).unflatten(1, (-1, side)).amax((2, 4)) for side in sides]
    return [timestep_embedding(grid, config.c_r).to(dtype) for grid in grids]


class UNet(Network):
    """The base of both kinds of Stage B: patches in, levels down and up, patches out.

    Subclasses call ``_build`` in ``__init__`` at the point that keeps the order of the published keys.
    """

    embedding: nn.Sequential
    down_blocks: nn.ModuleList
    """The blocks of each level on the way down, finest level first."""
    up_blocks: nn.ModuleList
    """The blocks of each level on the way up, coarsest level first."""
    clf: nn.Sequential

    def _convolution(self, level: int, c_skip: int) -> nn.Module:
        """A convolution block. ``c_skip`` is 0 for blocks that take no skip."""
        raise NotImplementedError

    def _attention(self, config: Levels, level: int) -> nn.Module:
        """An attention block."""
        heads, dropout = config.nhead[level], level_dropout(config, level)
        return AttnBlock(config.c_hidden[level], config.c_cond, heads, dropout=dropout)

    def _build(self, config: Levels, c_in: int, c_out: int) -> None:
        """Adds the layers, for ``c_in`` channels before patches are taken and ``c_out`` after.

        A level on the way up takes its skip only if it starts with a convolution block. Levels are joined by
        a layer norm and a convolution of stride 2.
        """
        widths, patch = config.c_hidden, config.patch_size
        self.embedding = nn.Sequential(
            nn.PixelUnshuffle(patch), nn.Conv2d(c_in * patch**2, widths[0], kernel_size=1)
        )
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for level in range(len(widths)):
            blocks = self._level(config, level, c_skip=0)
            if level > 0:
                down = nn.Conv2d(widths[level - 1], widths[level], kernel_size=2, stride=2)
                blocks.insert(0, Resampling(down))
            self.down_blocks.append(nn.ModuleList(blocks))
        for level in reversed(range(len(widths))):
            blocks = self._level(config, level, c_skip=widths[level] if level < len(widths) - 1 else 0)
            if level > 0:
                up = nn.ConvTranspose2d(widths[level], widths[level - 1], kernel_size=2, stride=2)
                blocks.append(Resampling(up))
            self.up_blocks.append(nn.ModuleList(blocks))
        # The published keys count the layer norm before the convolution, which has no weights.
        self.clf = nn.Sequential(
            nn.Identity(), nn.Conv2d(widths[0], c_out * patch**2, kernel_size=1), nn.PixelShuffle(patch)
        )

    def _level(self, config: Levels, level: int, c_skip: int) -> list[nn.Module]:
        width, blocks = config.c_hidden[level], []
        for repeat in range(config.blocks[level]):
            for position, kind in enumerate(config.level_config[level]):
                if kind == "C":
                    blocks.append(self._convolution(level, c_skip if repeat == position == 0 else 0))
                elif kind == "T":
                    blocks.append(TimestepBlock(width, config.c_r))
                else:
                    blocks.append(self._attention(config, level))
        return blocks

    def _init_weights(self, config: Levels, mappers: Iterable[nn.Linear | nn.Conv2d]) -> None:
        """As in the original. The last layer starts at zero; ``mappers`` map the text and the latents."""
        init_linear_and_conv(self)
        for mapper in mappers:
            nn.init.normal_(mapper.weight, std=0.02)
        nn.init.xavier_uniform_(self.embedding[1].weight, gain=0.02)
        nn.init.zeros_(self.clf[1].weight)
        init_blocks(list(self._blocks()), sum(config.blocks))

    def _blocks(self) -> Iterator[nn.Module]:
        """All blocks in the order in which they run."""
        for level in (*self.down_blocks, *self.up_blocks):
            yield from level

    def _run_levels(
        self,
        x: Float[Tensor, "b c h w"],
        r_embeds: Sequence[Float[Tensor, "b ... c_r"]],
        context: Context,
        conditions: Iterable[Condition],
    ) -> Float[Tensor, "b h2 w2 c2"]:
        """Everything from the patches to the layer before ``clf``, channels last.

        ``r_embeds`` has an entry for each level, finest first (``level_embeddings``). ``conditions`` has an
        entry for each level down, then for each level up.
        """
        texts, conditions = iter(context.texts), iter(conditions)
        inner = layer_norm(pointwise(self.embedding[1], to_channels_last(self.embedding[0](x))))
        outputs = []
        for blocks, r_embed in zip(self.down_blocks, r_embeds, strict=True):
            inner = run_blocks(blocks, inner, r_embed, texts, condition=next(conditions))
            outputs.append(inner)
        for number, (blocks, r_embed) in enumerate(zip(self.up_blocks, reversed(r_embeds), strict=True)):
            skip = None if number == 0 else outputs[-1 - number]
            inner = run_blocks(blocks, inner, r_embed, texts, skip, next(conditions))
        return inner

"""The skeleton that the two kinds of Stage B share: levels down, and the same levels up with skips."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import nn

from wuerstchen.models.layers import AttnBlock, Resampling, TimestepBlock


@runtime_checkable
class Levels(Protocol):
    """What a configuration says of the levels, finest first."""

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
    """The dropout of a level's blocks: a configuration may have one for all levels, or one for each."""
    return config.dropout[level] if isinstance(config.dropout, tuple) else config.dropout


def unet_levels(
    config: Levels, convolution: Callable[[int, int], nn.Module]
) -> tuple[nn.ModuleList, nn.ModuleList]:
    """The blocks of the way down, finest level first, and of the way up, coarsest first.

    ``convolution(level, c_skip)`` makes a convolution block; ``c_skip`` is 0 except in a level on the way up
    that starts with one, which takes the skip. A level that starts otherwise has none. Between levels stand a
    layer norm and a convolution of stride 2.
    """
    widths = config.c_hidden

    def level_blocks(level: int, c_skip: int) -> list[nn.Module]:
        blocks: list[nn.Module] = []
        for repeat in range(config.blocks[level]):
            for position, kind in enumerate(config.level_config[level]):
                if kind == "C":
                    blocks.append(convolution(level, c_skip if repeat == position == 0 else 0))
                elif kind == "T":
                    blocks.append(TimestepBlock(widths[level], config.c_r))
                else:
                    heads, dropout = config.nhead[level], level_dropout(config, level)
                    blocks.append(AttnBlock(widths[level], config.c_cond, heads, dropout=dropout))
        return blocks

    down_blocks, up_blocks = nn.ModuleList(), nn.ModuleList()
    for level in range(len(widths)):
        blocks = level_blocks(level, c_skip=0)
        if level > 0:
            down = nn.Conv2d(widths[level - 1], widths[level], kernel_size=2, stride=2)
            blocks.insert(0, Resampling(down))
        down_blocks.append(nn.ModuleList(blocks))
    for level in reversed(range(len(widths))):
        blocks = level_blocks(level, c_skip=widths[level] if level < len(widths) - 1 else 0)
        if level > 0:
            up = nn.ConvTranspose2d(widths[level], widths[level - 1], kernel_size=2, stride=2)
            blocks.append(Resampling(up))
        up_blocks.append(nn.ModuleList(blocks))
    return down_blocks, up_blocks

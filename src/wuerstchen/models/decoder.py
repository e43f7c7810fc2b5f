"""Stage B of v2: a latent diffusion decoder (DiffNeXt), steered by the semantic map at every level."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from wuerstchen.errors import UserError
from wuerstchen.models.blocks import Text, run_blocks, texts_for
from wuerstchen.models.fused.blocks import FactoredMap, factored_map, suits
from wuerstchen.models.layers import (
    MAX_LEVELS,
    ConditionedResBlock,
    Network,
    check_dropout,
    check_levels,
    check_timestep_width,
    exact_output,
    init_blocks,
    init_linear_and_conv,
    layer_norm,
    pointwise,
    timestep_embedding,
    to_channels_last,
)
from wuerstchen.models.traits import BlockTraits
from wuerstchen.models.unet import level_dropout, unet_levels

SCALE_EPS = 1e-3


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shape of Stage B. The defaults are the published v2 model (1,055,365,280 parameters)."""

    c_in: int = 4
    c_out: int = 4
    c_r: int = 64
    """Width of the timestep embedding."""
    patch_size: int = 2
    c_cond: int = 1024
    """Width that text states and semantic map are brought to."""
    c_hidden: tuple[int, ...] = (320, 640, 1280, 1280)
    """Width of each level, finest first."""
    nhead: tuple[int, ...] = (-1, 10, 20, 20)
    """Attention heads of each level; -1 where a level has no attention."""
    blocks: tuple[int, ...] = (4, 4, 14, 4)
    """How often each level repeats its blocks."""
    level_config: tuple[str, ...] = ("CT", "CTA", "CTA", "CTA")
    """Blocks of each level: C convolution, T timestep, A attention. A level takes its skip on the way up only
    if it starts with C."""
    inject_effnet: tuple[bool, ...] = (False, True, True, True)
    """Which levels see the semantic map. diffusers also takes longer lists, which give the levels on the way
    up other mappers."""
    effnet_embd: int = 16
    """Channels of the semantic map."""
    clip_embd: int | None = 1024
    """Width of the text states; None for a decoder without text."""
    kernel_size: int = 3
    dropout: float | tuple[float, ...] = 0.1
    """Of all levels, or one for each."""
    prediction: str = "noise"
    """What the network predicts, by the kind of its objective (``diffusion.objective``). ``noise`` has the
    published output of two parts; all others have a plain one."""

    def __post_init__(self) -> None:
        levels = len(self.c_hidden)
        counts = (self.c_in, self.c_out, self.patch_size, self.c_cond)
        if levels < 1 or min(*counts, *self.c_hidden) < 1:
            raise UserError(
                "a decoder needs a level, and widths and counts of at least 1; give larger numbers"
            )
        if self.c_out not in (self.c_in, 1):
            raise UserError(
                f"c_out={self.c_out} must be c_in={self.c_in}, or 1 for all channels alike: the predicted "
                "noise has the latents' shape; give the same number"
            )
        if self.clip_embd is not None and self.clip_embd < 1:
            raise UserError(f"clip_embd={self.clip_embd} must be at least 1, or None for no text; change it")
        check_timestep_width(self.c_r)
        check_levels(self.c_hidden, self.nhead, self.blocks, self.level_config)
        for dropout in self.dropout if isinstance(self.dropout, tuple) else (self.dropout,):
            check_dropout(dropout)
        if isinstance(self.dropout, tuple) and len(self.dropout) != levels:
            raise UserError(
                f"dropout={self.dropout} must be one number, or one for each of the {levels} levels of "
                f"c_hidden={self.c_hidden}; change either"
            )
        if any(map(self._convolves, range(levels))) and (self.kernel_size < 1 or self.kernel_size % 2 == 0):
            raise UserError(f"kernel_size={self.kernel_size} has no centre; use an odd number")
        if self.clip_embd is None and any("A" in kinds for kinds in self.level_config):
            raise UserError("clip_embd=None leaves attention without text; drop every A from level_config")
        self._check_injection()

    def _check_injection(self) -> None:
        levels = len(self.c_hidden)
        if not levels <= len(self.inject_effnet) <= 2 * MAX_LEVELS:
            raise UserError(
                f"inject_effnet={self.inject_effnet} must have one entry for each of the {levels} levels of "
                f"c_hidden={self.c_hidden}; change either"
            )
        if any(self.inject_effnet) and self.effnet_embd < 1:
            raise UserError(f"effnet_embd={self.effnet_embd} must be at least 1; give a larger number")
        for position, has_mapper in enumerate(self.mappers[: 2 * levels]):
            level = self.level_at(position)
            if has_mapper != self.inject_effnet[level] and self._convolves(level):
                raise UserError(
                    f"inject_effnet={self.inject_effnet} leaves level {level} without the semantic map on "
                    f"one way and not on the other; give one entry for each of the {levels} levels"
                )

    def _convolves(self, level: int) -> bool:
        return self.blocks[level] > 0 and "C" in self.level_config[level]

    def level_at(self, position: int) -> int:
        """The level at a position of the way down and then up."""
        levels = len(self.c_hidden)
        return position if position < levels else 2 * levels - 1 - position

    @property
    def mappers(self) -> tuple[bool, ...]:
        """Where there is a mapper of the semantic map: for each level down, and then up."""
        return (*self.inject_effnet, *reversed(self.inject_effnet))

    @property
    def reads_map(self) -> tuple[bool, ...]:
        """Whether a block reads the semantic map, for each level down and then up."""
        positions = range(2 * len(self.c_hidden))
        return tuple(self.mappers[at] and self._convolves(self.level_at(at)) for at in positions)

    @property
    def size_multiple(self) -> int:
        """Sides of the latents must be a multiple of this."""
        return self.patch_size * 2 ** (len(self.c_hidden) - 1)


@dataclass(frozen=True)
class DecoderContext:
    """What steers the decoder: computed once for a picture, used at every step."""

    maps: list[Float[Tensor, "b _ _ c_cond"] | FactoredMap | None]
    """The semantic map at the grid of each level, down and then up; None where it is not injected."""
    texts: Sequence[Text]
    """The text of each attention block, in order; empty for a decoder without text."""


class Decoder(Network):
    """Predicts the noise in Stage A latents, or what else its objective says, given the semantic map and, by
    choice, the text."""

    allows = BlockTraits(shard="network")

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.c_hidden

        if config.clip_embd is not None:
            self.clip_mapper = nn.Linear(config.clip_embd, config.c_cond)
        self.effnet_mappers = nn.ModuleList(
            [
                nn.Conv2d(config.effnet_embd, config.c_cond, kernel_size=1) if has_mapper else None
                for has_mapper in config.mappers
            ]
        )
        self.embedding = nn.Sequential(
            nn.PixelUnshuffle(config.patch_size),
            nn.Conv2d(config.c_in * config.patch_size**2, widths[0], kernel_size=1),
        )

        self.down_blocks, self.up_blocks = unet_levels(config, self._convolution)

        c_last = config.c_out * (2 if config.prediction == "noise" else 1)
        self.clf = nn.Sequential(
            nn.Identity(),
            nn.Conv2d(widths[0], c_last * config.patch_size**2, kernel_size=1),
            nn.PixelShuffle(config.patch_size),
        )
        self._init_weights()

    def _convolution(self, level: int, c_skip: int) -> nn.Module:
        config = self.config
        c_map = config.c_cond if config.inject_effnet[level] else 0
        kernel, dropout = config.kernel_size, level_dropout(config, level)
        return ConditionedResBlock(
            config.c_hidden[level], c_map + c_skip, kernel_size=kernel, dropout=dropout
        )

    def _init_weights(self) -> None:
        init_linear_and_conv(self)
        if self.config.clip_embd is not None:
            nn.init.normal_(self.clip_mapper.weight, std=0.02)
        for mapper in self.effnet_mappers:
            if isinstance(mapper, nn.Conv2d):
                nn.init.normal_(mapper.weight, std=0.02)
        nn.init.xavier_uniform_(self.embedding[1].weight, gain=0.02)
        nn.init.zeros_(self.clf[1].weight)
        init_blocks(list(self._blocks()), sum(self.config.blocks))

    def _blocks(self) -> Iterator[nn.Module]:
        for level in (*self.down_blocks, *self.up_blocks):
            yield from level

    def context(
        self,
        semantic_map: Float[Tensor, "b c_map mh mw"],
        size: tuple[int, int],
        text: Float[Tensor, "b t clip_embd"] | None = None,
        mask: Bool[Tensor, "b t"] | None = None,
        *,
        cache_kv: bool = True,
    ) -> DecoderContext:
        """Brings the semantic map to the grid of every level, and the text to keys and values.

        ``size`` is the height and width of the latents to denoise; the map may have any size. The published
        model attends to the text's padding: give no ``mask`` for it. With ``cache_kv=False`` each block
        computes keys and values itself, which is faster if ``forward`` runs once per context, as in training.
        """
        if (text is None) != (self.config.clip_embd is None):
            raise ValueError(
                "this decoder needs text states" if text is None else "this decoder takes no text"
            )
        texts: list[Text] = []
        if text is not None:
            texts = texts_for(self._blocks(), layer_norm(self.clip_mapper(text)), mask, cache_kv)

        maps: list[Tensor | FactoredMap | None] = []
        every = (*self.down_blocks, *self.up_blocks)
        for position, is_read in enumerate(self.config.reads_map):
            if not is_read:
                maps.append(None)
                continue
            mapper = self.effnet_mappers[position]
            grid = [side // self.config.patch_size // 2 ** self.config.level_at(position) for side in size]
            # Antialiased bicubic with aligned corners: neither flag can be left out (up to 3 apart).
            resized = F.interpolate(
                semantic_map.to(torch.promote_types(semantic_map.dtype, torch.float32)),
                size=grid,
                mode="bicubic",
                antialias=True,
                align_corners=True,
            )
            positions = to_channels_last(resized.to(mapper.weight.dtype))
            factored = factored_map(every[position], mapper, positions) if suits(positions) else None
            maps.append(pointwise(mapper, positions) if factored is None else factored)
        return DecoderContext(maps=maps, texts=texts)

    def output(
        self, x: Float[Tensor, "b c h w"], r: Float[Tensor, " b"], context: DecoderContext
    ) -> Float[Tensor, "b c_last h w"]:
        """The network's output, in at least fp32: a and b before its sigmoid, or a plain prediction."""
        r_embed = timestep_embedding(r, self.config.c_r).to(x.dtype)
        maps, texts = iter(context.maps), iter(context.texts)
        inner = layer_norm(pointwise(self.embedding[1], to_channels_last(self.embedding[0](x))))

        outputs = []
        for blocks in self.down_blocks:
            inner = run_blocks(blocks, inner, r_embed, texts, level_map=next(maps))
            outputs.append(inner)
        for number, blocks in enumerate(self.up_blocks):
            skip = None if number == 0 else outputs[-1 - number]
            inner = run_blocks(blocks, inner, r_embed, texts, skip, next(maps))

        return self.clf[2](exact_output(self.clf[1], inner, x.dtype))

    def affine(
        self, x: Float[Tensor, "b c h w"], r: Float[Tensor, " b"], context: DecoderContext
    ) -> tuple[Float[Tensor, "b c_out h w"], Float[Tensor, "b c_out h w"]]:
        """``a`` and ``b`` in ε̂ = (x − a) / b of a decoder that predicts noise, with b in (0.001, 0.999)."""
        a, b = self.output(x, r, context).chunk(2, dim=1)
        return a, b.sigmoid() * (1 - 2 * SCALE_EPS) + SCALE_EPS

    def forward(
        self, x: Float[Tensor, "b c h w"], r: Float[Tensor, " b"], context: DecoderContext
    ) -> Float[Tensor, "b c h w"]:
        """The network's own prediction for the noised latents ``x`` at timesteps ``r`` in [0, 1].

        With ``prediction="noise"`` that is ε̂ = (x − a)/b (``affine``), in the precision of ``x``. Otherwise
        it is the output as it is, in at least fp32.
        """
        if self.config.prediction != "noise":
            return self.output(x, r, context)
        a, b = self.affine(x, r, context)
        return ((x.to(a.dtype) - a) / b).to(x.dtype)

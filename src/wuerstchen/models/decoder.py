"""Stage B of v2: a latent diffusion decoder (DiffNeXt), conditioned on the semantic latents at all levels."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from wuerstchen.errors import UserError
from wuerstchen.models.blocks import Condition, Context, TextInput, text_inputs
from wuerstchen.models.fused.blocks import can_fuse, factored_condition
from wuerstchen.models.layers import (
    MAX_LEVELS,
    ConditionedResBlock,
    SelfAttnBlock,
    check_dropout,
    check_levels,
    check_times,
    check_timestep_width,
    exact_output,
    layer_norm,
    pointwise,
    to_channels_last,
)
from wuerstchen.models.traits import BlockTraits
from wuerstchen.models.unet import Levels, UNet, level_dropout, level_embeddings

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
    """Width that the text states and the semantic latents are mapped to."""
    c_hidden: tuple[int, ...] = (320, 640, 1280, 1280)
    """Width of each level, finest first."""
    nhead: tuple[int, ...] = (-1, 10, 20, 20)
    """Attention heads of each level; -1 where a level has no attention."""
    blocks: tuple[int, ...] = (4, 4, 14, 4)
    """Repeats of each level's blocks."""
    level_config: tuple[str, ...] = ("CT", "CTA", "CTA", "CTA")
    """Blocks of each level: C convolution, T timestep, A attention. A level on the way up takes its skip only
    if it starts with C. Attention reads the grid and the text, or the grid alone if ``clip_embd`` is None."""
    inject_effnet: tuple[bool, ...] = (False, True, True, True)
    """Which levels read the semantic latents. As in diffusers, the list may be longer, which gives the levels
    on the way up other mappers."""
    effnet_embd: int = 16
    """Channels of the semantic latents."""
    clip_embd: int | None = 1024
    """Width of the text states; None for a decoder without text."""
    kernel_size: int = 3
    dropout: float | tuple[float, ...] = 0.1
    """One value for all levels, or one for each."""
    prediction: str = "noise"
    """The network's target, by the kind of its objective (``diffusion.objective``). ``noise`` has the
    published two-part output; all others have a plain one."""

    def __post_init__(self) -> None:
        levels = len(self.c_hidden)
        counts = (self.c_in, self.c_out, self.patch_size, self.c_cond)
        if levels < 1 or min(*counts, *self.c_hidden) < 1:
            raise UserError(
                f"A size of the decoder is too small: c_in, c_out, patch_size, c_cond = {counts}, "
                f"c_hidden = {self.c_hidden}. All must be at least 1. Give larger numbers."
            )
        if self.c_out not in (self.c_in, 1):
            raise UserError(
                f"c_out must be c_in={self.c_in}, or 1 for one output for all channels, got {self.c_out}. "
                "Use the same number for both."
            )
        if self.clip_embd is not None and self.clip_embd < 1:
            raise UserError(f"clip_embd must be at least 1, or None for no text, got {self.clip_embd}.")
        check_timestep_width(self.c_r)
        check_levels(self.c_hidden, self.nhead, self.blocks, self.level_config)
        for dropout in self.dropout if isinstance(self.dropout, tuple) else (self.dropout,):
            check_dropout(dropout)
        if isinstance(self.dropout, tuple) and len(self.dropout) != levels:
            raise UserError(
                f"dropout must be one number, or one for each of the {levels} levels of "
                f"c_hidden={self.c_hidden}, got {self.dropout}."
            )
        if any(map(self._convolves, range(levels))) and (self.kernel_size < 1 or self.kernel_size % 2 == 0):
            raise UserError(
                f"kernel_size must be odd and at least 1, got {self.kernel_size}. 3 is published."
            )
        self._check_injection()

    def _check_injection(self) -> None:
        levels = len(self.c_hidden)
        if not levels <= len(self.inject_effnet) <= 2 * MAX_LEVELS:
            raise UserError(
                f"inject_effnet must have one entry for each of the {levels} levels of "
                f"c_hidden={self.c_hidden}, got {self.inject_effnet}."
            )
        if any(self.inject_effnet) and self.effnet_embd < 1:
            raise UserError(f"effnet_embd must be at least 1, got {self.effnet_embd}. 16 is published.")
        for position, has_mapper in enumerate(self.mappers[: 2 * levels]):
            level = self.level_at(position)
            if has_mapper != self.inject_effnet[level] and self._convolves(level):
                raise UserError(
                    f"inject_effnet gives level {level} the semantic latents on one way only, down or up: "
                    f"{self.inject_effnet}. Both must be the same. Use one entry for each of {levels} levels."
                )

    def _convolves(self, level: int) -> bool:
        return self.blocks[level] > 0 and "C" in self.level_config[level]

    def level_at(self, position: int) -> int:
        """The level at a position of the sequence of all levels down, then up."""
        levels = len(self.c_hidden)
        return position if position < levels else 2 * levels - 1 - position

    @property
    def mappers(self) -> tuple[bool, ...]:
        """Whether there is a mapper of the semantic latents, for each level down, then up."""
        return (*self.inject_effnet, *reversed(self.inject_effnet))

    @property
    def conditioned(self) -> tuple[bool, ...]:
        """Whether a block reads the semantic latents, for each level down, then up."""
        positions = range(2 * len(self.c_hidden))
        return tuple(self.mappers[at] and self._convolves(self.level_at(at)) for at in positions)

    @property
    def size_multiple(self) -> int:
        """Sides of the latents must be a multiple of this."""
        return self.patch_size * 2 ** (len(self.c_hidden) - 1)


@dataclass(frozen=True, kw_only=True)
class DecoderContext(Context):
    """The semantic latents and the text, computed once per image."""

    conditions: list[Condition]
    """The semantic latents at each level, down and then up."""


class Decoder(UNet):
    """Predicts the noise in Stage A's latents, or another target of its objective, from the semantic latents
    and optionally the text."""

    allows = BlockTraits(shard="network")

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        if config.clip_embd is not None:
            self.clip_mapper = nn.Linear(config.clip_embd, config.c_cond)
        self.effnet_mappers = nn.ModuleList(
            [
                nn.Conv2d(config.effnet_embd, config.c_cond, kernel_size=1) if has_mapper else None
                for has_mapper in config.mappers
            ]
        )
        self._build(config, config.c_in, config.c_out * (2 if config.prediction == "noise" else 1))
        mappers = [] if config.clip_embd is None else [self.clip_mapper]
        mappers += [mapper for mapper in self.effnet_mappers if isinstance(mapper, nn.Conv2d)]
        self._init_weights(config, mappers)

    def _convolution(self, level: int, c_skip: int) -> nn.Module:
        config = self.config
        c_condition = config.c_cond if config.inject_effnet[level] else 0
        kernel, dropout = config.kernel_size, level_dropout(config, level)
        return ConditionedResBlock(
            config.c_hidden[level], c_condition + c_skip, kernel_size=kernel, dropout=dropout
        )

    def _attention(self, config: Levels, level: int) -> nn.Module:
        if self.config.clip_embd is not None:
            return super()._attention(config, level)
        heads, dropout = config.nhead[level], level_dropout(config, level)
        return SelfAttnBlock(config.c_hidden[level], heads, dropout=dropout)

    def context(
        self,
        semantic_latents: Float[Tensor, "b c_sem sh sw"],
        size: tuple[int, int],
        text: Float[Tensor, "b t clip_embd"] | None = None,
        mask: Bool[Tensor, "b t"] | None = None,
        *,
        cache_kv: bool = True,
    ) -> DecoderContext:
        """Resizes the semantic latents to the grid of every level, and computes keys and values of the text.

        ``size`` is the height and width of the latents to denoise. The semantic latents may have any size.
        The published model attends to the text's padding: pass no ``mask`` for it. With ``cache_kv=False``
        each block computes keys and values itself, which is faster if ``forward`` runs once per context, as
        in training.
        """
        if (text is None) != (self.config.clip_embd is None):
            raise ValueError(
                "This decoder needs text states." if text is None else "This decoder takes no text."
            )
        texts: list[TextInput] = []
        if text is not None:
            texts = text_inputs(self._blocks(), layer_norm(self.clip_mapper(text)), mask, cache_kv)

        conditions: list[Condition] = []
        levels = (*self.down_blocks, *self.up_blocks)
        for position, is_conditioned in enumerate(self.config.conditioned):
            if not is_conditioned:
                conditions.append(None)
                continue
            mapper = self.effnet_mappers[position]
            grid = [side // self.config.patch_size // 2 ** self.config.level_at(position) for side in size]
            # Both flags matter: without antialias or align_corners, results differ by up to 3.
            resized = F.interpolate(
                semantic_latents.to(torch.promote_types(semantic_latents.dtype, torch.float32)),
                size=grid,
                mode="bicubic",
                antialias=True,
                align_corners=True,
            )
            positions = to_channels_last(resized.to(mapper.weight.dtype))
            factored = None
            if can_fuse(positions):
                factored = factored_condition(levels[position], mapper, positions)
            conditions.append(pointwise(mapper, positions) if factored is None else factored)
        return DecoderContext(texts=texts, conditions=conditions)

    def output(
        self, x: Float[Tensor, "b c h w"], r: Float[Tensor, "b ..."], context: DecoderContext
    ) -> Float[Tensor, "b c_last h w"]:
        """The network's output, in at least fp32: a and b before its sigmoid, or a plain prediction."""
        check_times(r, len(x), x.shape[2:])
        r_embeds = level_embeddings(r, self.config, x.dtype)
        inner = self._run_levels(x, r_embeds, context, context.conditions)
        return self.clf[2](exact_output(self.clf[1], inner, x.dtype))

    def affine(
        self, x: Float[Tensor, "b c h w"], r: Float[Tensor, "b ..."], context: DecoderContext
    ) -> tuple[Float[Tensor, "b c_out h w"], Float[Tensor, "b c_out h w"]]:
        """``a`` and ``b`` in ε̂ = (x − a) / b of a decoder that predicts noise, with b in (0.001, 0.999)."""
        a, b = self.output(x, r, context).chunk(2, dim=1)
        return a, b.sigmoid() * (1 - 2 * SCALE_EPS) + SCALE_EPS

    def forward(
        self, x: Float[Tensor, "b c h w"], r: Float[Tensor, "b ..."], context: DecoderContext
    ) -> Float[Tensor, "b c h w"]:
        """The network's own prediction for the noised latents ``x`` at timesteps ``r`` in [0, 1].

        ``r`` has one timestep per image, (b,), or one per cell of the latents, (b, h, w).
        With ``prediction="noise"`` this is ε̂ = (x − a)/b (``affine``), in the precision of ``x``. Otherwise
        it is the plain output, in at least fp32.
        """
        if self.config.prediction != "noise":
            return self.output(x, r, context)
        a, b = self.affine(x, r, context)
        return ((x.to(a.dtype) - a) / b).to(x.dtype)

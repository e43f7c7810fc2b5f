"""Stage C: the text-conditional prior, a diffusion model in the 42× smaller semantic latents."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from wuerstchen.errors import UserError
from wuerstchen.models.blocks import Context, TextInput, run_blocks, text_inputs
from wuerstchen.models.layers import (
    MAX_BLOCKS,
    AttnBlock,
    Network,
    ResBlock,
    TimestepBlock,
    check_dropout,
    check_times,
    check_timestep_width,
    exact_output,
    init_blocks,
    init_linear_and_conv,
    pointwise,
    timestep_embedding,
    to_channels_last,
)
from wuerstchen.models.text_blocks import TextBlock, init_text_block
from wuerstchen.models.traits import BlockTraits

ADDED_FIELDS = ("text_blocks", "registers")
"""Fields of ``PriorConfig`` that the published models do not have. They are 0 there."""


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """The shape of Stage C. The defaults are the published v2 model (993,636,896 parameters)."""

    c_in: int = 16
    """Channels of the semantic latents."""
    c: int = 1536
    """Width."""
    c_cond: int = 1280
    """Width of the text states."""
    c_r: int = 64
    """Width of the timestep embedding."""
    depth: int = 32
    nhead: int = 24
    dropout: float = 0.1
    prediction: str = "noise"
    """The network's target, by the kind of its objective (``diffusion.objective``). ``noise`` has the
    published two-part output; all others have a plain one."""
    text_blocks: int = 0
    """Transformer blocks on the text states, as wide as the network. They run once per prompt, not at every
    step. The published models have none."""
    registers: int = 0
    """Learned tokens that are appended to the text states. Attention always sees them, so that it can attend
    to something other than the text and the image. The published models have none."""

    def __post_init__(self) -> None:
        check_dropout(self.dropout)
        counts = ("depth", *ADDED_FIELDS)
        for name, least in (*((n, 1) for n in ("c_in", "c", "c_cond")), *((n, 0) for n in counts)):
            if getattr(self, name) < least:
                raise UserError(
                    f"{name} must be at least {least}, got {getattr(self, name)}. Give a larger number."
                )
        if 3 * self.depth > MAX_BLOCKS:
            raise UserError(f"depth must be at most {MAX_BLOCKS // 3}, got {self.depth}.")
        for name in ADDED_FIELDS:
            if getattr(self, name) > MAX_BLOCKS:
                raise UserError(f"{name} must be at most {MAX_BLOCKS}, got {getattr(self, name)}.")
        if (self.depth or self.text_blocks) and not 1 <= self.nhead <= self.c:
            raise UserError(f"nhead must be from 1 to c={self.c}, got {self.nhead}. Use a divisor of c.")
        check_timestep_width(self.c_r)


@dataclass(frozen=True, kw_only=True)
class PriorContext(Context):
    """The text, and optionally residuals of a control network, computed once per image."""

    residuals: Sequence[Float[Tensor, "b h w c"]] = ()
    """Added to the features after each of the first groups of three blocks, as a ControlNet does. At most
    ``depth`` of them."""


class Prior(Network):
    """Predicts the noise in semantic latents, or another target of its objective, from the text.

    The text's keys and values do not depend on the step: ``context`` computes them once per prompt and
    ``forward`` takes them.
    """

    allows = BlockTraits(shard="network")

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config
        c, dropout = config.c, config.dropout
        self.projection = nn.Conv2d(config.c_in, c, kernel_size=1)
        self.cond_mapper = nn.Sequential(nn.Linear(config.c_cond, c), nn.LeakyReLU(0.2), nn.Linear(c, c))
        self.text_blocks = nn.ModuleList(
            TextBlock(c, config.nhead, dropout=dropout) for _ in range(config.text_blocks)
        )
        self.registers = nn.Parameter(torch.empty(config.registers, c)) if config.registers else None
        self.blocks = nn.ModuleList()
        for _ in range(config.depth):
            self.blocks.append(ResBlock(c, dropout=dropout))
            self.blocks.append(TimestepBlock(c, config.c_r))
            self.blocks.append(AttnBlock(c, c, config.nhead, dropout=dropout))
        c_last = config.c_in * (2 if config.prediction == "noise" else 1)
        self.out = nn.Sequential(nn.Identity(), nn.Conv2d(c, c_last, kernel_size=1))
        self._init_weights()

    def _init_weights(self) -> None:
        init_linear_and_conv(self)
        for layer in (self.projection, self.cond_mapper[0], self.cond_mapper[2]):
            nn.init.normal_(layer.weight, std=0.02)
        init_blocks(list(self.blocks), self.config.depth)
        for block in self.text_blocks:
            init_text_block(block)
        if self.registers is not None:
            nn.init.normal_(self.registers, std=0.02)
        nn.init.zeros_(self.out[1].weight)

    def context(
        self,
        text: Float[Tensor, "b t c_cond"],
        mask: Bool[Tensor, "b t"] | None = None,
        *residuals: Float[Tensor, "b h w c"],
        cache_kv: bool = True,
    ) -> PriorContext:
        """Keys and values of the text for each attention block, and the residuals of a control network.

        ``mask`` is False at padding. The published models attend to padding: pass None for them. With
        ``cache_kv=False`` each block computes keys and values itself, which is faster if ``forward`` runs
        once per context, as in training.
        """
        tokens = self.cond_mapper(text)
        for block in self.text_blocks:
            tokens = block(tokens, mask)
        if self.registers is not None:
            registers = self.registers.to(tokens.dtype).expand(len(tokens), -1, -1)
            tokens = torch.cat([tokens, registers], dim=1)
            mask = None if mask is None else F.pad(mask, (0, len(self.registers)), value=True)
        texts = text_inputs(self.blocks, tokens, mask, cache_kv)
        return PriorContext(texts=texts, residuals=residuals)

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        r: Float[Tensor, "b ..."],
        context: PriorContext,
    ) -> Float[Tensor, "b c h w"]:
        """The network's own prediction for the noised semantic latents ``x`` at timesteps ``r`` in [0, 1].

        ``r`` has one timestep per image, (b,), or one per cell, (b, h, w).
        With ``prediction="noise"`` this is ε̂ = (x − a)/(|1 − b| + 1e-5) of the output's parts a and b, in the
        precision of ``x``. Otherwise it is the plain output, in at least fp32.
        """
        inner, r_embed = self._start(x, r)
        inner = self._run_blocks(inner, r_embed, iter(context.texts), context.residuals)
        return self._output(inner, x)

    def with_features(
        self,
        x: Float[Tensor, "b c h w"],
        r: Float[Tensor, "b ..."],
        context: PriorContext,
        groups: int,
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b h w c_hidden"]]:
        """The output of ``forward``, and the features after the first ``groups`` groups of three blocks.

        For losses on features in training. Without gradients, later blocks may overwrite the features. Raises
        ``ValueError`` for a context with residuals.
        """
        if context.residuals:
            raise ValueError("with_features does not add residuals. Call forward.")
        inner, r_embed = self._start(x, r)
        texts, blocks = iter(context.texts), list(self.blocks)
        features = run_blocks(blocks[: 3 * groups], inner, r_embed, texts)
        return self._output(run_blocks(blocks[3 * groups :], features, r_embed, texts), x), features

    def _start(
        self, x: Float[Tensor, "b c h w"], r: Float[Tensor, "b ..."]
    ) -> tuple[Float[Tensor, "b h w c_hidden"], Float[Tensor, "b ... c_r"]]:
        """The features before the first block, and the embedded times."""
        check_times(r, len(x), x.shape[2:])
        r_embed = timestep_embedding(r, self.config.c_r).to(x.dtype)
        return pointwise(self.projection, to_channels_last(x)), r_embed

    def _output(
        self, inner: Float[Tensor, "b h w c_hidden"], x: Float[Tensor, "b c h w"]
    ) -> Float[Tensor, "b c h w"]:
        """The network's output from the features after the last block."""
        output = exact_output(self.out[1], inner, x.dtype)
        if self.config.prediction != "noise":
            return output
        a, b = output.chunk(2, dim=1)
        return ((x.to(a.dtype) - a) / ((1 - b).abs() + 1e-5)).to(x.dtype)

    def _run_blocks(
        self,
        x: Float[Tensor, "b h w c"],
        r_embed: Float[Tensor, "b ... c_r"],
        texts: Iterator[TextInput],
        residuals: Sequence[Float[Tensor, "b h w c"]],
    ) -> Float[Tensor, "b h w c"]:
        if len(residuals) > self.config.depth:
            raise ValueError(f"Up to depth={self.config.depth} residuals can be added, got {len(residuals)}.")
        blocks, done = list(self.blocks), 0
        for residual in residuals:
            x = run_blocks(blocks[done : done + 3], x, r_embed, texts) + residual
            done += 3
        return run_blocks(blocks[done:], x, r_embed, texts)

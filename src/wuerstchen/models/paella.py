"""Stage B of v1: a U-Net on discrete tokens (Paella, arXiv 2211.07292), conditioned on semantic latents and
text.

For each position of Stage A's grid it predicts the entry of the codebook. Semantic latents and text enter the
same way, as tokens that every attention block attends to.
"""

import itertools
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from wuerstchen.errors import UserError
from wuerstchen.models.blocks import Context, text_inputs
from wuerstchen.models.layers import (
    ResBlock,
    check_dropout,
    check_levels,
    check_times,
    convolve,
    layer_norm,
    pointwise,
    to_channels_last,
)
from wuerstchen.models.traits import BlockTraits
from wuerstchen.models.unet import UNet, level_embeddings


@dataclass(frozen=True, kw_only=True)
class PaellaConfig:
    """The shape of Stage B in v1. The defaults are the published model (730,814,336 parameters)."""

    num_labels: int = 8192
    """Entries of Stage A's codebook."""
    c_token: int = 256
    """Width of a token's embedding, at the input and before the logits."""
    c_r: int = 64
    """Width of the timestep embedding."""
    patch_size: int = 2
    c_cond: int = 1024
    """Width that the text states and the semantic latents are mapped to."""
    c_hidden: tuple[int, ...] = (640, 1280, 1280)
    """Width of each level, finest first."""
    nhead: tuple[int, ...] = (-1, 16, 16)
    """Attention heads of each level; -1 where a level has no attention."""
    blocks: tuple[int, ...] = (4, 12, 4)
    """Repeats of each level's blocks."""
    level_config: tuple[str, ...] = ("CT", "CTA", "CTA")
    """Blocks of each level: C convolution, T timestep, A attention."""
    effnet_embd: int = 16
    """Channels of the semantic latents."""
    clip_embd: int = 1024
    """Width of the text states."""
    dropout: float = 0.1

    def __post_init__(self) -> None:
        check_dropout(self.dropout)
        counts = (self.num_labels, self.c_token, self.patch_size, self.c_cond)
        inputs = (self.effnet_embd, self.clip_embd)
        if not self.c_hidden or min(*counts, *inputs, *self.c_hidden, *self.blocks) < 1:
            raise UserError(
                f"A size of Paella is too small: num_labels, c_token, patch_size, c_cond = {counts}, "
                f"effnet_embd, clip_embd = {inputs}, c_hidden = {self.c_hidden}, blocks = {self.blocks}. "
                "All must be at least 1. Give larger numbers."
            )
        if self.c_r < 4:
            raise UserError(f"c_r must be at least 4, got {self.c_r}. 64 is published.")
        check_levels(self.c_hidden, self.nhead, self.blocks, self.level_config)
        for width, heads, kinds in zip(self.c_hidden, self.nhead, self.level_config, strict=True):
            if not kinds.startswith("C"):
                raise UserError(
                    f"Each entry of level_config must start with C, got {kinds!r}. 'CT' is common."
                )
            if "A" in kinds and width % heads:
                raise UserError(
                    f"nhead must divide the level's width {width}, got {heads}. Use a divisor, or remove "
                    f"the A from {kinds!r}."
                )

    @property
    def size_multiple(self) -> int:
        """Sides of the grid of tokens must be a multiple of this."""
        return self.patch_size * 2 ** (len(self.c_hidden) - 1)


class Paella(UNet):
    """Predicts the tokens of an image from noised ones, given the semantic latents and the text.

    Parameter names are those of the original's files, except in attention: the original's fused weights
    (``attention.attn.in_proj_*``, ``attention.attn.out_proj``) are split as in the other networks.
    """

    allows = BlockTraits(shard="keep whole")  # the loss reads its last layer

    def __init__(self, config: PaellaConfig) -> None:
        super().__init__()
        self.config = config
        # The name comes from early models, which read ByT5. The published one reads CLIP.
        self.byt5_mapper = nn.Linear(config.clip_embd, config.c_cond)
        self.effnet_mapper = nn.Linear(config.effnet_embd, config.c_cond)
        self.in_mapper = nn.Sequential(nn.Embedding(config.num_labels, config.c_token), nn.Identity())
        self._build(config, config.c_token, config.c_token)
        self.out_mapper = nn.Sequential(
            nn.Identity(), nn.Conv2d(config.c_token, config.num_labels, kernel_size=1, bias=False)
        )
        # As in the original: all logits start at 0, and the last layer as a copy of the embedding.
        self._init_weights(config, [self.byt5_mapper, self.effnet_mapper])
        nn.init.normal_(self.in_mapper[0].weight, std=config.num_labels**-0.5)
        with torch.no_grad():
            self.out_mapper[1].weight.copy_(self.in_mapper[0].weight[:, :, None, None])

    def _convolution(self, level: int, c_skip: int) -> nn.Module:
        return ResBlock(self.config.c_hidden[level], c_skip, dropout=self.config.dropout)

    def context(
        self,
        semantic_latents: Float[Tensor, "b c_sem sh sw"],
        text: Float[Tensor, "b t clip_embd"],
        *,
        cache_kv: bool = True,
    ) -> Context:
        """Keys and values of the semantic latents and the text, for each attention block.

        The semantic latents are the compressor's output, not normalised, and may have any size. The published
        model attends to the text's padding. With ``cache_kv=False`` each block computes keys and values
        itself, which is faster if ``forward`` runs once per context, as in training.
        """
        positions = self.effnet_mapper(to_channels_last(semantic_latents).flatten(1, 2))
        states = layer_norm(torch.cat([positions, self.byt5_mapper(text)], dim=1))
        return Context(texts=text_inputs(self._blocks(), states, None, cache_kv))

    def forward(
        self, tokens: Int[Tensor, "b h w"], r: Float[Tensor, "b ..."], context: Context
    ) -> Float[Tensor, "b labels h w"]:
        """Logits of the true token at each position, from ``tokens`` noised to the time ``r`` in [0, 1].

        They lie in memory with the labels last. At the published size they take 512 MiB per image in fp32.
        """
        return pointwise(self.out_mapper[1], self.features(tokens, r, context)).permute(0, 3, 1, 2)

    def features(
        self, tokens: Int[Tensor, "b h w"], r: Float[Tensor, "b ..."], context: Context
    ) -> Float[Tensor, "b h w c_token"]:
        """The input of the last layer, ``out_mapper[1]``: 32 times smaller than the logits."""
        embedding = self.in_mapper[0]
        check_times(r, len(tokens), tokens.shape[1:])
        r_embeds = level_embeddings(r, self.config, embedding.weight.dtype)
        vectors = layer_norm(embedding(tokens)).permute(0, 3, 1, 2)
        x = self._run_levels(vectors, r_embeds, context, itertools.repeat(None))
        vectors = convolve(self.clf[2], pointwise(self.clf[1], layer_norm(x)))
        return layer_norm(vectors.contiguous())

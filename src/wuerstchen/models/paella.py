"""Stage B of v1: a UNet on discrete tokens (Paella, arXiv 2211.07292), steered by semantic map and text.

It says for each position of Stage A's grid which of the codebook's entries belongs there. Map and text enter
the same way, as tokens that every attention block attends to.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from wuerstchen.errors import UserError
from wuerstchen.models.blocks import Text, run_blocks, texts_for
from wuerstchen.models.layers import (
    ResBlock,
    check_dropout,
    check_levels,
    convolve,
    init_blocks,
    init_linear_and_conv,
    layer_norm,
    pointwise,
    timestep_embedding,
    to_channels_last,
)
from wuerstchen.models.traits import BlockTraits
from wuerstchen.models.unet import unet_levels


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
    """Width that text states and semantic map are brought to."""
    c_hidden: tuple[int, ...] = (640, 1280, 1280)
    """Width of each level, finest first."""
    nhead: tuple[int, ...] = (-1, 16, 16)
    """Attention heads of each level; -1 where a level has no attention."""
    blocks: tuple[int, ...] = (4, 12, 4)
    """How often each level repeats its blocks."""
    level_config: tuple[str, ...] = ("CT", "CTA", "CTA")
    """Blocks of each level: C convolution, T timestep, A attention."""
    effnet_embd: int = 16
    """Channels of the semantic map."""
    clip_embd: int = 1024
    """Width of the text states."""
    dropout: float = 0.1

    def __post_init__(self) -> None:
        check_dropout(self.dropout)
        counts = (self.num_labels, self.c_token, self.patch_size, self.c_cond)
        inputs = (self.effnet_embd, self.clip_embd)
        if not self.c_hidden or min(*counts, *inputs, *self.c_hidden, *self.blocks) < 1:
            raise UserError("Paella needs a level, and widths and counts of at least 1; give larger numbers")
        if self.c_r < 4:
            raise UserError(f"c_r={self.c_r} leaves no frequencies; use at least 4")
        check_levels(self.c_hidden, self.nhead, self.blocks, self.level_config)
        for width, heads, kinds in zip(self.c_hidden, self.nhead, self.level_config, strict=True):
            if not kinds.startswith("C"):
                raise UserError(f"level_config entry {kinds!r} must be C followed by T or A; write 'CT'")
            if "A" in kinds and width % heads:
                raise UserError(
                    f"nhead={heads} does not divide the level's width {width}; choose a divisor, "
                    f"or drop the A from {kinds!r}"
                )

    @property
    def size_multiple(self) -> int:
        """Sides of the grid of tokens must be a multiple of this."""
        return self.patch_size * 2 ** (len(self.c_hidden) - 1)


class Paella(nn.Module):
    """Predicts the tokens of a picture from noised ones, given the semantic map and the text.

    Parameter names are those of the original's files, but for attention: what is fused there
    (``attention.attn.in_proj_*``, ``attention.attn.out_proj``) is split as in the other networks.
    """

    allows = BlockTraits(shard="keep whole")  # the loss reads its last layer

    def __init__(self, config: PaellaConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.c_hidden

        # The name is a relic: first models read ByT5, the published one reads CLIP.
        self.byt5_mapper = nn.Linear(config.clip_embd, config.c_cond)
        self.effnet_mapper = nn.Linear(config.effnet_embd, config.c_cond)
        self.in_mapper = nn.Sequential(nn.Embedding(config.num_labels, config.c_token), nn.Identity())
        self.embedding = nn.Sequential(
            nn.PixelUnshuffle(config.patch_size),
            nn.Conv2d(config.c_token * config.patch_size**2, widths[0], kernel_size=1),
        )

        self.down_blocks, self.up_blocks = unet_levels(config, self._convolution)

        self.clf = nn.Sequential(
            nn.Identity(),
            nn.Conv2d(widths[0], config.c_token * config.patch_size**2, kernel_size=1),
            nn.PixelShuffle(config.patch_size),
        )
        self.out_mapper = nn.Sequential(
            nn.Identity(), nn.Conv2d(config.c_token, config.num_labels, kernel_size=1, bias=False)
        )
        self._init_weights()

    def _convolution(self, level: int, c_skip: int) -> nn.Module:
        return ResBlock(self.config.c_hidden[level], c_skip, dropout=self.config.dropout)

    def _init_weights(self) -> None:
        """As the original: all logits start at 0, and the last layer as a copy of the embedding."""
        config = self.config
        init_linear_and_conv(self)
        for mapper in (self.byt5_mapper, self.effnet_mapper):
            nn.init.normal_(mapper.weight, std=0.02)
        nn.init.xavier_uniform_(self.embedding[1].weight, gain=0.02)
        nn.init.zeros_(self.clf[1].weight)
        nn.init.normal_(self.in_mapper[0].weight, std=config.num_labels**-0.5)
        with torch.no_grad():
            self.out_mapper[1].weight.copy_(self.in_mapper[0].weight[:, :, None, None])
        init_blocks(list(self._blocks()), sum(config.blocks))

    def _blocks(self) -> Iterator[nn.Module]:
        for level in (*self.down_blocks, *self.up_blocks):
            yield from level

    def context(
        self,
        semantic_map: Float[Tensor, "b c_map mh mw"],
        text: Float[Tensor, "b t clip_embd"],
        *,
        cache_kv: bool = True,
    ) -> Sequence[Text]:
        """Keys and values of map and text, one pair for each attention block: the same for every step.

        The map may have any size, and is the compressor's own output, not normalised. The published model
        attends to the text's padding. With ``cache_kv=False`` each block computes keys and values
        itself, which is faster if ``forward`` runs once per context, as in training.
        """
        positions = self.effnet_mapper(to_channels_last(semantic_map).flatten(1, 2))
        states = layer_norm(torch.cat([positions, self.byt5_mapper(text)], dim=1))
        return texts_for(self._blocks(), states, None, cache_kv)

    def forward(
        self, tokens: Int[Tensor, "b h w"], r: Float[Tensor, " b"], context: Sequence[Text]
    ) -> Float[Tensor, "b labels h w"]:
        """Logits of the true token at each position, from ``tokens`` noised to the time ``r`` in [0, 1].

        They lie in memory with the labels last. At the published size those of one picture take 512 MiB
        in fp32.
        """
        return pointwise(self.out_mapper[1], self.features(tokens, r, context)).permute(0, 3, 1, 2)

    def features(
        self, tokens: Int[Tensor, "b h w"], r: Float[Tensor, " b"], context: Sequence[Text]
    ) -> Float[Tensor, "b h w c_token"]:
        """What the last layer, ``out_mapper[1]``, makes the logits of: 32 times smaller than they are."""
        embedding = self.in_mapper[0]
        r_embed = timestep_embedding(r, self.config.c_r).to(embedding.weight.dtype)
        texts = iter(context)
        vectors = layer_norm(embedding(tokens)).permute(0, 3, 1, 2)
        x = layer_norm(pointwise(self.embedding[1], to_channels_last(self.embedding[0](vectors))))

        outputs = []
        for blocks in self.down_blocks:
            x = run_blocks(blocks, x, r_embed, texts)
            outputs.append(x)
        for number, blocks in enumerate(self.up_blocks):
            skip = None if number == 0 else outputs[-1 - number]
            x = run_blocks(blocks, x, r_embed, texts, skip)

        vectors = convolve(self.clf[2], pointwise(self.clf[1], layer_norm(x)))
        return layer_norm(vectors.contiguous())

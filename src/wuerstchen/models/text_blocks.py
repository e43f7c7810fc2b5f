"""Transformer blocks on the text states, trained together with Stage C. The published models have none."""

from jaxtyping import Bool, Float
from torch import Tensor, nn

from wuerstchen.models.layers import Attention, layer_norm
from wuerstchen.models.traits import BlockTraits


class TextBlock(nn.Module):
    """Self-attention over the text, then an MLP. Both have a layer norm before them and a residual.

    A new block is the identity: its output layers start at zero (``init_text_block``).
    """

    allows = BlockTraits(compile=True, recompute=True, shard="block", orthogonalise=True)

    def __init__(self, c: int, heads: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = Attention(c, heads, dropout)
        self.mlp = nn.Sequential(nn.Linear(c, 4 * c), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * c, c))

    def forward(
        self, tokens: Float[Tensor, "b t c"], mask: Bool[Tensor, "b t"] | None = None
    ) -> Float[Tensor, "b t c"]:
        """``mask`` is False at padding, which no position attends to. None attends to all positions."""
        normed = layer_norm(tokens)
        tokens = tokens + self.attention(normed, self.attention.keys_values_at_once(normed, mask))
        return tokens + self.mlp(layer_norm(tokens))


def init_text_block(block: TextBlock) -> None:
    """Zeroes the output layers, so that the block starts as the identity."""
    for layer in (block.attention.to_out[0], block.mlp[-1]):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)

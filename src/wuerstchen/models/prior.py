"""Stage C: the text-conditional prior, a diffusion model in the 42× smaller semantic map."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor, nn

from wuerstchen.errors import UserError
from wuerstchen.models.blocks import Text, run_blocks, texts_for
from wuerstchen.models.layers import (
    MAX_BLOCKS,
    AttnBlock,
    Network,
    ResBlock,
    TimestepBlock,
    check_dropout,
    check_timestep_width,
    exact_output,
    init_blocks,
    init_linear_and_conv,
    pointwise,
    timestep_embedding,
    to_channels_last,
)
from wuerstchen.models.traits import BlockTraits


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """The shape of Stage C. The defaults are the published v2 model (993,636,896 parameters)."""

    c_in: int = 16
    """Channels of the semantic map."""
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
    """What the network predicts, by the kind of its objective (``diffusion.objective``). ``noise`` has the
    published output of two parts; all others have a plain one."""

    def __post_init__(self) -> None:
        check_dropout(self.dropout)
        for name, least in (("c_in", 1), ("c", 1), ("c_cond", 1), ("depth", 0)):
            if getattr(self, name) < least:
                raise UserError(
                    f"{name}={getattr(self, name)} must be at least {least}; give a larger number"
                )
        if 3 * self.depth > MAX_BLOCKS:
            raise UserError(f"depth={self.depth} is over {MAX_BLOCKS // 3}; give a smaller number")
        if self.depth and not 1 <= self.nhead <= self.c:
            raise UserError(f"nhead={self.nhead} must be from 1 to c={self.c}; choose a divisor of c")
        check_timestep_width(self.c_r)


class Prior(Network):
    """Predicts the noise in a semantic map, or what else its objective says, given the text.

    The text's keys and values do not depend on the step: ``context`` computes them once for a prompt and
    ``forward`` takes them.
    """

    allows = BlockTraits(shard="network")

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config
        c, dropout = config.c, config.dropout
        self.projection = nn.Conv2d(config.c_in, c, kernel_size=1)
        self.cond_mapper = nn.Sequential(nn.Linear(config.c_cond, c), nn.LeakyReLU(0.2), nn.Linear(c, c))
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
        nn.init.zeros_(self.out[1].weight)

    def context(
        self,
        text: Float[Tensor, "b t c_cond"],
        mask: Bool[Tensor, "b t"] | None = None,
        *,
        cache_kv: bool = True,
    ) -> Sequence[Text]:
        """Keys and values of the text, one pair for each attention block.

        ``mask`` is False at padding. The published models attend to padding: give None for them. With
        ``cache_kv=False`` each block computes keys and values itself, which is faster if ``forward`` runs
        once per context, as in training.
        """
        return texts_for(self.blocks, self.cond_mapper(text), mask, cache_kv)

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        r: Float[Tensor, " b"],
        context: Sequence[Text],
    ) -> Float[Tensor, "b c h w"]:
        """The network's own prediction for the noised map ``x`` at timesteps ``r`` in [0, 1].

        With ``prediction="noise"`` that is ε̂ = (x − a)/(|1 − b| + 1e-5) of the output's parts a and b, in the
        precision of ``x``; otherwise it is the output as it is, in at least fp32.
        """
        r_embed = timestep_embedding(r, self.config.c_r).to(x.dtype)
        texts = iter(context)
        inner = pointwise(self.projection, to_channels_last(x))
        inner = run_blocks(self.blocks, inner, r_embed, texts)
        output = exact_output(self.out[1], inner, x.dtype)
        if self.config.prediction != "noise":
            return output
        a, b = output.chunk(2, dim=1)
        return ((x.to(a.dtype) - a) / ((1 - b).abs() + 1e-5)).to(x.dtype)

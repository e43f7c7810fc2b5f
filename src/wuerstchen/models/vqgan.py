"""Stage A: a VQGAN between pixels and 4× smaller latents, and the discriminator that trains it."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from wuerstchen.errors import UserError
from wuerstchen.models.fused.blocks import can_fuse, is_plain, run_mixing
from wuerstchen.models.layers import (
    MAX_BLOCKS,
    Network,
    convolve,
    layer_norm,
    pointwise,
    to_channels_last,
)
from wuerstchen.models.traits import BlockTraits

MAX_LEVELS = 16
"""With 16 levels, an image of 65,536 pixels per side is a single latent."""


@dataclass(frozen=True, kw_only=True)
class VQGANConfig:
    """The shape of Stage A. The defaults are the published model (18,406,894 parameters)."""

    in_channels: int = 3
    out_channels: int = 3
    up_down_scale_factor: int = 2
    levels: int = 2
    bottleneck_blocks: int = 12
    embed_dim: int = 384
    latent_channels: int = 4
    num_vq_embeddings: int = 8192
    scale_factor: float = 0.3764
    """Latents are divided by this, which gives the published model's about unit variance."""

    def __post_init__(self) -> None:
        widths = ("in_channels", "out_channels", "up_down_scale_factor", "embed_dim", "latent_channels")
        for name in (*widths, "num_vq_embeddings"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.bottleneck_blocks <= MAX_BLOCKS or self.levels > MAX_LEVELS:
            raise UserError(
                f"bottleneck_blocks must be from 0 to {MAX_BLOCKS}, got {self.bottleneck_blocks}, and levels "
                f"at most {MAX_LEVELS}, got {self.levels}."
            )
        if not (math.isfinite(self.scale_factor) and self.scale_factor != 0):
            raise UserError(
                f"scale_factor must be a finite number other than 0, got {self.scale_factor}. "
                "0.3764 is published."
            )
        if self.levels < 1 or self.embed_dim < 2 ** (self.levels - 1):
            raise UserError(
                f"levels must be at least 1 and embed_dim at least 2^(levels − 1), got levels={self.levels} "
                f"and embed_dim={self.embed_dim}. Use a multiple of {2 ** max(self.levels - 1, 0)}."
            )

    @property
    def factor(self) -> int:
        """How many times smaller the latents are than the image, per side."""
        return self.up_down_scale_factor * 2 ** (self.levels - 1)


class MixingResidualBlock(nn.Module):
    """Depthwise convolution, then MLP, each after a layer norm and scaled by learned scalars.

    The six scalars start at zero, so the block starts as the identity.
    """

    allows = BlockTraits(
        compile=True,
        fuse=(nn.Sequential, nn.ReplicationPad2d, nn.Conv2d, nn.Sequential, nn.Linear, nn.GELU, nn.Linear),
    )

    def __init__(self, c: int) -> None:
        super().__init__()
        # Published keys count the padding (`depthwise.1`). `forward` calls `_repeat_edges` in its place.
        self.depthwise = nn.Sequential(nn.ReplicationPad2d(1), nn.Conv2d(c, c, kernel_size=3, groups=c))
        self.channelwise = nn.Sequential(nn.Linear(c, 4 * c), nn.GELU(), nn.Linear(4 * c, c))
        self.gammas = nn.Parameter(torch.zeros(6))
        for layer in (self.depthwise[1], self.channelwise[0], self.channelwise[2]):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        g = self.gammas
        x = x + convolve(self.depthwise[1], _repeat_edges(layer_norm(x) * (1 + g[0]) + g[1])) * g[2]
        return x + self.channelwise(layer_norm(x) * (1 + g[3]) + g[4]) * g[5]


def _repeat_edges(x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h+2 w+2 c"]:
    """Replication padding by 1. Unlike torch's, it keeps the channels last when compiled."""
    x = torch.cat([x[:, :1], x, x[:, -1:]], dim=1)
    return torch.cat([x[:, :, :1], x, x[:, :, -1:]], dim=2)


@dataclass(frozen=True)
class Quantised:
    """Quantised latents."""

    latents: Float[Tensor, "b c h w"]
    """The nearest code at each position. Gradients pass straight through to the input."""
    indices: Int[Tensor, "b h w"]
    loss: Float[Tensor, ""]
    """Codebook loss plus 0.25 times the commitment loss."""


class VectorQuantizer(nn.Module):
    """Nearest-code quantisation (arXiv 1711.00937) with a codebook learned by gradient descent."""

    COMMITMENT = 0.25
    weight_decay = False
    """The loss pulls codes to the latents. Weight decay would pull unused ones to zero."""

    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, width)
        nn.init.uniform_(self.embedding.weight, -1 / codes, 1 / codes)

    def lookup(self, indices: Int[Tensor, "b h w"]) -> Float[Tensor, "b c h w"]:
        return self.embedding(indices).permute(0, 3, 1, 2)

    @torch.no_grad()
    def nearest(self, z: Float[Tensor, "b c h w"]) -> Int[Tensor, "b h w"]:
        codes = self.embedding.weight
        lengths = codes.square().sum(1)
        # |z|² is the same for every code, so it is omitted. One image at a time bounds the memory.
        rows = (torch.addmm(lengths, p.flatten(1).T, codes.T, alpha=-2).argmin(1) for p in z)
        return torch.stack([row.unflatten(0, z.shape[2:]) for row in rows])

    def forward(self, z: Float[Tensor, "b c h w"]) -> Quantised:
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            indices = self.nearest(z.detach())
            codes = self.lookup(indices)
            loss = F.mse_loss(codes, z.detach()) + self.COMMITMENT * F.mse_loss(z, codes.detach())
            return Quantised(latents=z + (codes - z).detach(), indices=indices, loss=loss)


class VQGAN(Network):
    """Pixels in [0, 1] to latents and back. Sides of images must be multiples of ``config.factor``."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.embed_dim // 2**i for i in reversed(range(config.levels))]
        patch = config.up_down_scale_factor

        self.in_block = nn.Sequential(
            nn.PixelUnshuffle(patch), nn.Conv2d(config.in_channels * patch**2, widths[0], kernel_size=1)
        )
        down: list[nn.Module] = []
        for level, width in enumerate(widths):
            if level > 0:
                down.append(nn.Conv2d(widths[level - 1], width, kernel_size=4, stride=2, padding=1))
            down.append(MixingResidualBlock(width))
        to_latent = nn.Conv2d(widths[-1], config.latent_channels, kernel_size=1, bias=False)
        down.append(nn.Sequential(to_latent, nn.BatchNorm2d(config.latent_channels)))
        self.down_blocks = nn.Sequential(*down)

        self.vquantizer = VectorQuantizer(config.num_vq_embeddings, config.latent_channels)

        up: list[nn.Module] = [
            nn.Sequential(nn.Conv2d(config.latent_channels, widths[-1], kernel_size=1)),
            *(MixingResidualBlock(widths[-1]) for _ in range(config.bottleneck_blocks)),
        ]
        for level in reversed(range(config.levels - 1)):
            up.append(
                nn.ConvTranspose2d(widths[level + 1], widths[level], kernel_size=4, stride=2, padding=1)
            )
            up.append(MixingResidualBlock(widths[level]))
        self.up_blocks = nn.Sequential(*up)
        self.out_block = nn.Sequential(
            nn.Conv2d(widths[0], config.out_channels * patch**2, kernel_size=1), nn.PixelShuffle(patch)
        )

    def decoder_half(self) -> nn.ModuleList:
        """The layers from latents to pixels, which ``unembed`` uses."""
        return nn.ModuleList([self.up_blocks, self.out_block])

    def embed(self, pixels: Float[Tensor, "b c h w"]) -> Float[Tensor, "b z h4 w4"]:
        """The encoder's output before quantisation, in the codebook's units (not divided by the scale
        factor)."""
        x = pointwise(self.in_block[1], to_channels_last(self.in_block[0](pixels)))
        for block in self.down_blocks:
            x = block(x) if isinstance(block, MixingResidualBlock) else convolve(block, x)
        return x.permute(0, 3, 1, 2)

    def unembed(self, z: Float[Tensor, "b z h4 w4"]) -> Float[Tensor, "b c h w"]:
        """Pixels from the output of ``embed`` or codes. Not clamped."""
        x = to_channels_last(z)
        for block in self.up_blocks:
            if not isinstance(block, MixingResidualBlock):
                x = convolve(block, x)
            elif can_fuse(x) and is_plain(block, x):
                with torch.cuda.device_of(x):  # Triton launches kernels on the current device
                    x = run_mixing(block, x)
            else:
                x = block(x)
        return convolve(self.out_block, x).permute(0, 3, 1, 2)

    def encode(self, pixels: Float[Tensor, "b c h w"]) -> Float[Tensor, "b z h4 w4"]:
        """Latents as Stage B models them: unquantised, divided by the scale factor."""
        return self.embed(pixels) / self.config.scale_factor

    def decode(self, latents: Float[Tensor, "b z h4 w4"]) -> Float[Tensor, "b c h w"]:
        """Pixels from Stage B's latents, without quantisation. Not clamped: values exceed [0, 1] slightly."""
        return self.unembed(latents * self.config.scale_factor)

    def forward(
        self, pixels: Float[Tensor, "b c h w"], quantise: Tensor | bool = True
    ) -> tuple[Float[Tensor, "b c2 h w"], Quantised]:
        """Reconstruction and quantised latents. ``quantise`` may be a mask of shape (b,), one per image."""
        z = self.embed(pixels).float()
        quantised = self.vquantizer(z)
        choice = torch.as_tensor(quantise, device=z.device).expand(len(z))[:, None, None, None]
        return self.unembed(torch.where(choice, quantised.latents, z)), quantised


class Discriminator(nn.Module):
    """A patch discriminator: strided 3×3 convolutions with spectral and instance norm.

    The defaults have 6,271,105 parameters, as in the original. One side of the image must be larger than
    2^depth, or the instance norm has a single value. Returns logits, positive for real images.
    """

    def __init__(self, c_in: int = 3, c_hidden: int = 512, depth: int = 6) -> None:
        super().__init__()
        self.min_side = 2**depth + 1
        halvings = [max(max(depth - 3, 3) - i, 0) for i in range(depth)]
        widths = [c_in, *(c_hidden // 2**n for n in halvings)]
        layers: list[nn.Module] = []
        for i in range(depth):
            conv = nn.Conv2d(widths[i], widths[i + 1], kernel_size=3, stride=2, padding=1)
            layers.append(nn.utils.parametrizations.spectral_norm(conv))
            if i > 0:
                layers.append(nn.InstanceNorm2d(widths[i + 1]))
            layers.append(nn.LeakyReLU(0.2))
        self.encoder = nn.Sequential(*layers)
        self.head = nn.Conv2d(widths[-1], 1, kernel_size=1)

    def forward(self, pixels: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h2 w2"]:
        return self.head(self.encoder(pixels))

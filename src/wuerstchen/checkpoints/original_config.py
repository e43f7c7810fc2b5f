"""Derives the configurations of networks in the original's files from names and shapes of their tensors."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from wuerstchen.checkpoints.foreign import check_not_cascade
from wuerstchen.errors import CheckpointError, UserError, shown
from wuerstchen.models.compressor import BackboneName, CompressorConfig
from wuerstchen.models.decoder import DecoderConfig
from wuerstchen.models.paella import PaellaConfig
from wuerstchen.models.prior import PriorConfig
from wuerstchen.models.vqgan import VQGANConfig

HEAD_WIDTH = 64
"""Channels per attention head in all published priors and v2 decoders."""
PAELLA_HEAD_WIDTH = 80
"""Channels per attention head in v1's decoder."""
PATCH = 2
"""Side of the patches at the input and output of Stages A and B."""
BACKBONES: dict[int, BackboneName] = {24: "efficientnet_v2_s", 32: "efficientnet_v2_l"}
"""Image networks by the width of their first convolution."""
Config = VQGANConfig | DecoderConfig | PaellaConfig | CompressorConfig | PriorConfig


@dataclass(frozen=True)
class StateDict:
    """The tensors of one network under the original's names, and their origin."""

    place: str
    """The file and, in brackets, the key in its dictionary, for messages."""
    tensors: Mapping[str, Tensor]

    def error(self, key: str, found: object, wanted: object) -> CheckpointError:
        return CheckpointError(
            f"{self.place}: {shown(key)} is {found}, but must be {wanted}. Download the file again."
        )

    def shape(self, key: str, axes: int) -> tuple[int, ...]:
        """The shape of a tensor. It must have this number of axes, and must not be empty."""
        tensor = self.tensors.get(key)
        if tensor is None:
            raise self.error(key, "missing", f"a tensor of {axes} axes")
        if tensor.ndim != axes or not tensor.numel():
            raise self.error(key, tuple(tensor.shape), f"a tensor of {axes} axes")
        return tuple(tensor.shape)

    def quotient(self, key: str, axis: int, divisor: int) -> int:
        """The size of a convolution's weights along ``axis``, divided by ``divisor``, without a remainder."""
        shape = self.shape(key, 4)
        if shape[axis] % divisor:
            raise self.error(key, shape, f"a multiple of {divisor} along axis {axis}")
        return shape[axis] // divisor

    def count(self, prefix: str) -> int:
        """The number of modules below ``prefix``. They must be numbered from 0 without gaps."""
        children = {key[len(prefix) :].partition(".")[0] for key in self.tensors if key.startswith(prefix)}
        for number in range(len(children)):
            if str(number) not in children:
                raise self.error(f"{prefix}{number}", "missing", f"the next of {len(children)}")
        return len(children)

    def first(self, prefix: str, suffix: str) -> str | None:
        """The first key with this prefix and suffix."""
        found = (key for key in self.tensors if key.startswith(prefix) and key.endswith(suffix))
        return min(found, default=None)


def config_of(state: StateDict) -> Config:
    """The configuration of the network in a state dict, from its keys and shapes."""
    if "vquantizer.codebook.weight" in state.tensors:
        derive = _vqgan_config
    elif "projection.weight" in state.tensors and "cond_mapper.0.weight" in state.tensors:
        derive = _prior_config
    elif "clip_mapper.weight" in state.tensors and state.first("effnet_mappers.", "") is not None:
        derive = _decoder_config
    elif "in_mapper.0.weight" in state.tensors:
        derive = _paella_config
    elif "backbone.0.0.weight" in state.tensors:
        derive = _compressor_config
    else:
        check_not_cascade(Path(state.place), state.tensors)
        raise CheckpointError(
            f"{state.place}: the keys (the first is {next(iter(state.tensors))!r}) are not those "
            "of a Würstchen network. Use one of the original's files."
        )
    try:
        return derive(state)
    except CheckpointError:
        raise
    except UserError as error:
        raise CheckpointError(
            f"{state.place}: the shapes are not those of a network ({error}). Download the file again."
        ) from error


def _vqgan_config(state: StateDict) -> VQGANConfig:
    down, up = state.count("down_blocks."), state.count("up_blocks.")
    levels = down // 2
    latent_channels, embed_dim, _, _ = state.shape(f"down_blocks.{down - 1}.0.weight", 4)
    return VQGANConfig(
        in_channels=state.quotient("in_block.1.weight", 1, PATCH**2),
        out_channels=state.quotient("out_block.0.weight", 0, PATCH**2),
        up_down_scale_factor=PATCH,
        levels=levels,
        bottleneck_blocks=up - 1 - 2 * (levels - 1),
        embed_dim=embed_dim,
        latent_channels=latent_channels,
        num_vq_embeddings=state.shape("vquantizer.codebook.weight", 2)[0],
    )


def _compressor_config(state: StateDict) -> CompressorConfig:
    stem = state.shape("backbone.0.0.weight", 4)
    if stem[0] not in BACKBONES:
        raise state.error("backbone.0.0.weight", stem, f"{' or '.join(map(str, BACKBONES))} along axis 0")
    return CompressorConfig(backbone=BACKBONES[stem[0]], c_latent=state.shape("mapper.0.weight", 4)[0])


def _prior_config(state: StateDict) -> PriorConfig:
    c, c_in, _, _ = state.shape("projection.weight", 4)
    return PriorConfig(
        c_in=c_in,
        c=c,
        c_cond=state.shape("cond_mapper.0.weight", 2)[1],
        c_r=state.shape("blocks.1.mapper.weight", 2)[1],
        depth=state.count("blocks.") // 3,
        nhead=state.quotient("projection.weight", 0, HEAD_WIDTH),
    )


def _decoder_config(state: StateDict) -> DecoderConfig:
    c_cond, clip_embd = state.shape("clip_mapper.weight", 2)
    levels = _levels(state, HEAD_WIDTH)
    mapper = state.first("effnet_mappers.", ".weight") or "effnet_mappers.1.weight"
    return DecoderConfig(
        c_in=state.quotient("embedding.1.weight", 1, PATCH**2),
        c_out=state.quotient("clf.1.weight", 0, 2 * PATCH**2),
        patch_size=PATCH,
        c_cond=c_cond,
        inject_effnet=tuple(
            f"effnet_mappers.{level}.weight" in state.tensors for level in range(len(levels["c_hidden"]))
        ),
        effnet_embd=state.shape(mapper, 4)[1],
        clip_embd=clip_embd,
        kernel_size=state.shape("down_blocks.0.0.depthwise.weight", 4)[3],
        **levels,
    )


def _paella_config(state: StateDict) -> PaellaConfig:
    num_labels, c_token = state.shape("in_mapper.0.weight", 2)
    c_cond, clip_embd = state.shape("byt5_mapper.weight", 2)
    return PaellaConfig(
        num_labels=num_labels,
        c_token=c_token,
        patch_size=math.isqrt(state.quotient("embedding.1.weight", 1, c_token)),
        c_cond=c_cond,
        effnet_embd=state.shape("effnet_mapper.weight", 2)[1],
        clip_embd=clip_embd,
        **_levels(state, PAELLA_HEAD_WIDTH),
    )


def _levels(state: StateDict, head_width: int) -> dict[str, Any]:
    """The fields of a UNet's configuration with one entry per level, and ``c_r``."""
    fields: dict[str, list[Any]] = {"c_hidden": [], "nhead": [], "blocks": [], "level_config": []}
    for level in range(state.count("down_blocks.")):
        entry = "embedding.1.weight" if level == 0 else f"down_blocks.{level}.0.1.weight"
        kinds = _block_kinds(state, level)
        # The shortest pattern whose repetition gives all blocks: the first rotation that changes nothing.
        length = (kinds + kinds).find(kinds, 1)
        fields["c_hidden"].append(state.shape(entry, 4)[0])
        fields["nhead"].append(state.quotient(entry, 0, head_width) if "A" in kinds else -1)
        fields["blocks"].append(len(kinds) // length)
        fields["level_config"].append(kinds[:length])
    timestep = state.first("down_blocks.", ".mapper.weight")
    c_r = DecoderConfig.c_r if timestep is None else state.shape(timestep, 2)[1]
    return {name: tuple(values) for name, values in fields.items()} | {"c_r": c_r}


def _block_kinds(state: StateDict, level: int) -> str:
    """The blocks of a level in the down path, one letter each, without the downsampling convolution."""
    leaves = {"C": "depthwise.weight", "T": "mapper.weight", "A": "attention.attn.in_proj_weight"}
    kinds = ""
    for number in range(min(level, 1), state.count(f"down_blocks.{level}.")):
        block = f"down_blocks.{level}.{number}."
        kind = next((kind for kind, leaf in leaves.items() if block + leaf in state.tensors), None)
        if kind is None:
            known = ", ".join(leaves.values())
            raise state.error(f"{block}*", "of an unknown kind", f"a block with one of {known}")
        kinds += kind
    return kinds

"""Small networks, models and recipes that several test files use.

Everything here is a plain value or function: ``from ..configurations import SMALL_PRIOR``.
"""

import copy
import dataclasses
from pathlib import Path
from typing import Any

from wuerstchen.checkpoints.backbones import lite0_path, load_backbone
from wuerstchen.checkpoints.native import Provenance, write_cascade
from wuerstchen.models.cascade import Cascade, LatentStatistics
from wuerstchen.models.compressor import CompressorConfig
from wuerstchen.models.decoder import DecoderConfig
from wuerstchen.models.efficientnet import EfficientNetConfig
from wuerstchen.models.paella import PaellaConfig
from wuerstchen.models.previewer import PreviewerConfig
from wuerstchen.models.prior import PriorConfig
from wuerstchen.models.vqgan import VQGANConfig
from wuerstchen.pipeline import BUNDLED

# The smallest whole model (the fixture ``small_cascade``). Its texts are those of the bundled encoder.
SMALL_STATISTICS = LatentStatistics(mean=(0.5, -1.0), std=(2.0, 3.0))
SMALL_VQGAN = VQGANConfig(bottleneck_blocks=1, embed_dim=8, num_vq_embeddings=16)
SMALL_COMPRESSOR = CompressorConfig(backbone="efficientnet_lite0", c_latent=2)
SMALL_PREVIEWER = PreviewerConfig(c_in=2)
SMALL_PRIOR = PriorConfig(c_in=2, c=16, c_cond=384, c_r=8, depth=1, nhead=2)
SMALL_DECODER = DecoderConfig(
    c_r=8,
    c_cond=8,
    c_hidden=(8, 8),
    nhead=(-1, -1),
    blocks=(1, 1),
    level_config=("CT", "CT"),
    inject_effnet=(False, True),
    effnet_embd=2,
    clip_embd=None,
)
# Its Stage B of v1 (the fixture ``small_v1``).
SMALL_PAELLA = PaellaConfig(
    num_labels=16,
    c_token=8,
    c_r=8,
    c_cond=8,
    c_hidden=(8, 16),
    nhead=(-1, 2),
    blocks=(1, 1),
    level_config=("CT", "CTA"),
    effnet_embd=2,
    clip_embd=384,
)

# A prior without dropout on texts of width 8, for tests of single updates.
TOY_PRIOR = PriorConfig(c_in=4, c=16, c_cond=8, c_r=8, depth=2, nhead=2, dropout=0.0)

# The smallest decoder with the original's rule for heads: 64 channels each.
ORIGINAL_DECODER = DecoderConfig(
    c_cond=8,
    c_hidden=(8, 64),
    nhead=(-1, 1),
    blocks=(1, 1),
    level_config=("CT", "CTA"),
    inject_effnet=(False, True),
    clip_embd=12,
)

PROVENANCE = Provenance(recipe="test", seed=1, images=2, data="none")


def write_model(cascade: Cascade, folder: Path, provenance: Provenance = PROVENANCE) -> Path:
    """Writes a model with the bundled text encoder; every part has the same provenance."""
    write_cascade(
        cascade, folder, dict.fromkeys(cascade.networks(), provenance), text_encoder=BUNDLED / "text_encoder"
    )
    return folder


def with_student(cascade: Cascade, steps: int = 1, **changes: Any) -> Cascade:
    """The model with a student of Stage C that has learnt nothing yet. ``changes`` are of its settings."""
    student = copy.deepcopy(cascade.prior)
    settings = dataclasses.replace(
        cascade.settings, prior_student_steps=steps, prior_student_guidance=2.5, **changes
    )
    return dataclasses.replace(cascade, prior_student=student, settings=settings)


def with_decoder_student(cascade: Cascade, steps: int = 1) -> Cascade:
    """The model with a student of Stage B that has learnt nothing yet."""
    settings = dataclasses.replace(cascade.settings, decoder_student_steps=steps)
    return dataclasses.replace(cascade, decoder_student=copy.deepcopy(cascade.decoder), settings=settings)


def with_lite0(cascade: Cascade) -> Cascade:
    """The model, its backbone filled with Lite0's weights in place: random ones hardly tell images apart."""
    assert cascade.compressor is not None
    load_backbone(cascade.compressor.backbone, lite0_path())
    return cascade


def narrow(config: EfficientNetConfig) -> EfficientNetConfig:
    """An EfficientNet with one block of 8 channels a stage. Files tell backbones apart by their stem."""
    stages = tuple(dataclasses.replace(stage, channels=8, blocks=1) for stage in config.stages)
    return dataclasses.replace(config, stages=stages, head=32)


def with_optimization(config: Any, **changes: Any) -> Any:
    """A stage's or a phase's configuration with changes of its ``Optimization``: ``images=24``."""
    return dataclasses.replace(config, optimization=dataclasses.replace(config.optimization, **changes))

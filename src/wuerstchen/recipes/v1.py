"""Würstchen v1 at its published size, with the settings of the original training scripts."""

import dataclasses

from wuerstchen.models.compressor import CompressorConfig
from wuerstchen.models.paella import PaellaConfig
from wuerstchen.models.prior import PriorConfig
from wuerstchen.recipes.v2 import CLIP_H, EMA_DECAY, v2
from wuerstchen.train.config import Optimization, Recipe, StageBConfig, StageCConfig


def v1_stage_b() -> Recipe:
    """Stage B of v1: Paella (730.8 M), with the compressor, on the published Stage A, at 512×512 pixels.

    Hardware: GPUs with 80 GB. Time: not published. The authors trained for up to 1.5 million updates. Cost:
    not published. This recipe has not been run. The rehearsal estimates time and cost on your machine.
    Result: a Stage B for ``v1-stage-c``, which takes its model as --start-from. Stage A comes from
    --start-from, by default warp-ai/wuerstchen, because v1 and v2 share it. The compressor needs
    --compressor-init FILE with ImageNet weights of EfficientNetV2-L. Its backbone trains at a tenth of the
    learning rate. The original trains it at the full rate (--stage-b.backbone-rate 1).
    """
    batch_size = 384
    return dataclasses.replace(
        v2(),
        name="v1-stage-b",
        image_size=512,
        stages=("b",),
        start_from=CLIP_H,
        fresh=("b",),
        text_encoder="",
        decoder_text_encoder=CLIP_H,
        text_positions="all",
        compressor=CompressorConfig(backbone="efficientnet_v2_l"),
        decoder=PaellaConfig(),
        prior=PriorConfig(c_cond=1024),
        stage_b=StageBConfig(
            optimization=Optimization(
                images=1_500_000 * batch_size,
                batch_size=batch_size,
                learning_rate=1e-4,
                warmup=10_000 * batch_size,
                betas=(0.9, 0.95),
                weight_decay=0.01,
            )
        ),
        prior_steps=60,
        prior_guidance=6.0,
        decoder_steps=8,
        decoder_guidance=2.0,
    )


def v1_stage_c() -> Recipe:
    """Stage C of v1, the prior: 512×512 pixels, semantic latents of 12×12 from v1's EfficientNetV2-L.

    Hardware: 64 A100 with 80 GB. Time: 9,200 A100-hours (model card), 6 days on 64. Cost: 1,311 kg of CO2
    (model card). Result: a v1 model. --start-from is a folder with the original's vqgan_f4_v1_500k.pt and
    model_stage_b.pt, by default data/models/wuerstchen-v1. The semantic latents are normalised by their
    statistics. The original uses them unnormalised.
    """
    batch_size = 1280
    return dataclasses.replace(
        v2(),
        name="v1-stage-c",
        image_size=512,
        stages=("c",),
        start_from="data/models/wuerstchen-v1",
        fresh=("c",),
        text_encoder=CLIP_H,
        decoder_text_encoder="",
        text_positions="all",
        compressor=CompressorConfig(backbone="efficientnet_v2_l"),
        decoder=PaellaConfig(),
        prior=PriorConfig(c_cond=1024),
        stage_c=StageCConfig(
            optimization=Optimization(
                images=800_000 * batch_size,
                batch_size=batch_size,
                learning_rate=1e-4,
                warmup=10_000 * batch_size,
                weight_decay=0.01,
                ema_decay=EMA_DECAY,
                ema_every=100,
            )
        ),
        prior_steps=60,
        prior_guidance=6.0,
        decoder_steps=8,
        decoder_guidance=2.0,
    )

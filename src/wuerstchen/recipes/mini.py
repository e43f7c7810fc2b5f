"""The bundled model."""

import dataclasses

from wuerstchen.models.compressor import CompressorConfig
from wuerstchen.models.decoder import DecoderConfig
from wuerstchen.models.prior import PriorConfig
from wuerstchen.models.vqgan import VQGANConfig
from wuerstchen.train.config import (
    Optimization,
    Recipe,
    StageAConfig,
    StageBConfig,
    StageCConfig,
    StageFewConfig,
)


def mini() -> Recipe:
    """The bundled model: 256×256 pixels, 6×6×16 semantic latents, all three stages on the emoji set.

    Hardware: one H100 and 16 CPU cores. Time: 45 minutes.
    Cost: 0.36 kWh of the GPU.
    Result: see the model card. Build the data first: wuerstchen data emoji data/emoji.
    """
    return Recipe(
        name="mini",
        data="data/emoji",
        image_size=256,
        vqgan=VQGANConfig(bottleneck_blocks=4, embed_dim=128, num_vq_embeddings=1024),
        compressor=CompressorConfig(backbone="efficientnet_lite0", c_latent=16),
        decoder=DecoderConfig(
            patch_size=2,
            c_hidden=(96, 192, 320),
            nhead=(-1, -1, -1),
            blocks=(2, 3, 3),
            level_config=("CT", "CT", "CT"),
            inject_effnet=(True, True, True),
            c_cond=64,
            clip_embd=None,
            dropout=0.0,
            prediction="velocity",
        ),
        prior=PriorConfig(c=256, c_cond=384, depth=8, nhead=4, dropout=0.0, prediction="velocity"),
        stage_a=StageAConfig(
            optimization=Optimization(
                images=64 * 2_400, batch_size=64, learning_rate=1.5e-3, warmup=64 * 300, decay="cosine"
            ),
            crop=128,
            discriminator_width=128,
            discriminator_depth=4,
            adversarial_from=64 * 600,
            codebook_init="normal",
            l1_weight=1.0,
            quantise_dropout=0.5,
            refine_images=64 * 14_000,
            refine_redrawn=0.75,
        ),
        stage_b=StageBConfig(
            optimization=Optimization(
                images=256 * 22_000,
                batch_size=256,
                learning_rate=1e-3,
                warmup=256 * 500,
                decay="cosine",
                betas=(0.9, 0.99),
                ema_decay=0.999,
            ),
            backbone_rate=0.2,
            frozen_stride=2,
            loss_weight="velocity",
            time_shift=2.0,
            refine_images=256 * 20_000,
        ),
        stage_c=StageCConfig(
            optimization=Optimization(
                images=512 * 20_000,
                batch_size=512,
                learning_rate=1e-3,
                warmup=512 * 200,
                decay="cosine",
                betas=(0.9, 0.99),
                ema_decay=0.9995,
            ),
            loss_weight="velocity",
            caption_dropout=0.1,
        ),
        prepared_images=65_536,
        statistics_images=2048,
        prior_guidance=2.0,
        decoder_steps=10,
        decoder_shift=0.5,
        preview_prompts=PROMPTS,
        workers=16,
        log_every=50,
        checkpoint_seconds=300.0,
    )


def mini_few() -> Recipe:
    """Students of the bundled model's Stages C and B, which sample in one step each without guidance.

    Hardware: one H200. Time: not measured. A trial of Stage C of the same length took 5 minutes.
    Cost: not measured.
    Result: not measured. In the trial, one step of Stage C's student had the R@1 and KID of 29 guided ones.
    """
    return dataclasses.replace(
        mini(),
        name="mini-few",
        stages=("few", "few_b"),
        start_from="runs/mini/model",
        stage_few=StageFewConfig(trajectories=614_400),
    )


PROMPTS = (
    "a 3D render of a purple camel on a blue background",
    "a flat illustration of a red apple",
    "a black glyph of a tree on a yellow background",
    "a noto emoji of a cat",
    "a twemoji of a rocket on a black background",
    "a 3D render of a green car",
    "a flat illustration of a pizza on a pink background",
    "a noto emoji of a smiling face",
    "a 3D render of an umbrella on an orange background",
)
"""The nine prompts of the preview grid and of the demo, chosen before the first training run."""

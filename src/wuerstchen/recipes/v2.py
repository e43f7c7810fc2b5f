"""Würstchen v2 at its published size (arXiv 2306.00637, appendix E), stage by stage or in one run."""

import dataclasses

from wuerstchen.models.compressor import CompressorConfig
from wuerstchen.models.decoder import DecoderConfig
from wuerstchen.models.prior import PriorConfig
from wuerstchen.models.vqgan import VQGANConfig
from wuerstchen.train.config import Optimization, Phase, Recipe, StageAConfig, StageBConfig, StageCConfig

CLIP_BIGG = "warp-ai/wuerstchen-prior"
"""The published text encoder of Stage C."""
CLIP_H = "warp-ai/wuerstchen"
"""The published text encoder of Stage B, and of both stages in v1."""


def _rate(updates: int, batch_size: int, warmup: int = 0, ema_decay: float = 0.999) -> Optimization:
    """AdamW at 1e-4 with torch's weight decay. Lengths are in updates, as in the paper."""
    return Optimization(
        images=updates * batch_size,
        batch_size=batch_size,
        learning_rate=1e-4,
        warmup=warmup * batch_size,
        weight_decay=0.01,
        ema_decay=ema_decay,
        ema_every=100,
    )


STAGE_A = StageAConfig(
    optimization=_rate(500_000, 256),
    image_size=256,
    crop=128,
    perceptual_weight=0.1,
    adversarial_weight=0.01,
    adversarial_from=10_000 * 256,
    quantise_dropout=0.1,
)

STAGE_B = StageBConfig(
    optimization=_rate(457_000, 512, warmup=10_000),
    image_size=512,
    phases=(Phase(optimization=_rate(300_000, 128, warmup=10_000)),),
    backbone_rate=1.0,
)

EMA_DECAY = 0.99895  # with ema_every=100, equals the original's decay of 0.9 every 100 updates

STAGE_C = StageCConfig(
    optimization=_rate(500_000, 1536, warmup=10_000, ema_decay=EMA_DECAY),
    image_size=512,
    phases=(
        Phase(optimization=_rate(364_000, 1536, ema_decay=EMA_DECAY)),
        Phase(optimization=_rate(4_000, 768, ema_decay=EMA_DECAY), max_ratio=5 / 3),
        Phase(optimization=_rate(50_000, 384, ema_decay=EMA_DECAY)),
    ),
    blend=0.5,
)


def v2() -> Recipe:
    """Würstchen v2, 1024×1024 pixels: all three stages as published, from random weights, in one run.

    Hardware: 64 A100 or more, on several nodes with torchrun. Time: over 35,600 A100-hours (paper: Stage B
    11,000, Stage C 24,602, Stage A not published), 23 days on 64. Cost: 80,000 to 100,000 dollars according
    to the authors. Stage C emitted 2,276 kg of CO2. This recipe has not been run; the rehearsal estimates
    time and cost on your machine. Result: the published model has FID 23.6 on COCO30k at 256 pixels. Stage
    A's perceptual loss uses EfficientNet-Lite0, because the network of the original is not published.
    Attention ignores padding. Use --text-positions all for the published behaviour. The compressor needs
    --compressor-init FILE. --stage-c.phases.2.data FOLDER has the images of the last phase, a selection of
    high-quality ones. Its weights are averaged with those before it.
    """
    return Recipe(
        name="v2",
        data="data/photos",
        image_size=1024,
        text_encoder=CLIP_BIGG,
        decoder_text_encoder=CLIP_H,
        vqgan=VQGANConfig(),
        compressor=CompressorConfig(),
        decoder=DecoderConfig(),
        prior=PriorConfig(),
        stage_a=STAGE_A,
        stage_b=STAGE_B,
        stage_c=STAGE_C,
        preview_every=5_000_000,
        log_every=50,
        checkpoint_seconds=1200.0,
        workers=16,
    )


def v2_stage_a() -> Recipe:
    """Stage A of v2: the VQGAN, on crops of 128 pixels from images of 256 pixels.

    Hardware: one GPU or more. Time: not published, for 500,000 updates of 256 crops. Cost: see the rehearsal.
    Result: latents that are 4× smaller per side, for v2-stage-b. Loss weights as published: squared error 1,
    perceptual 0.1, adversarial 0.01 after 10,000 updates. The perceptual loss uses EfficientNet-Lite0,
    because the network of the original is not published. The codebook is initialised normally. With the
    published ±1/8192 (--stage-a.codebook-init uniform), only few codes would ever be used.
    """
    return dataclasses.replace(
        v2(), name="v2-stage-a", stages=("a",), text_encoder="", decoder_text_encoder=""
    )


def v2_stage_b() -> Recipe:
    """Stage B of v2 with the compressor: 457,000 updates at 512 pixels, then 300,000 at 1024.

    Hardware: 8 A100 with 80 GB or more. Time: 11,000 A100-hours (paper), 57 days on 8. Cost: 4,400 kWh at 0.4
    kW per GPU. Result: the decoder, and the compressor whose semantic latents v2-stage-c models.
    --compressor-init FILE is the EfficientNetV2-S of torchvision or timm. --start-from is a model with a
    Stage A, by default runs/v2-stage-a/model.
    """
    return dataclasses.replace(
        v2(),
        name="v2-stage-b",
        stages=("b",),
        start_from="runs/v2-stage-a/model",
        fresh=("b",),
        text_encoder="",
    )


def v2_stage_c() -> Recipe:
    """Stage C of v2, the prior: 12×12, then 24×24 latents, mixed aspect ratios, selected images.

    Hardware: 64 A100 with 40 GB or more. Time: 24,602 A100-hours (paper), 16 days on 64. Cost: 2,276 kg of
    CO2 (paper). Result: a model. The published one has FID 23.6 on COCO30k at 256 pixels. --start-from is a
    model with Stages A and B, by default runs/v2-stage-b/model. If its Stage B attends to padding, as the
    published one does, use --text-positions all. --stage-c.phases.2.data FOLDER has the images of the last
    phase, a selection of high-quality ones. Its weights are averaged with those before it.
    """
    return dataclasses.replace(
        v2(),
        name="v2-stage-c",
        stages=("c",),
        start_from="runs/v2-stage-b/model",
        fresh=("c",),
        decoder_text_encoder="",
    )


def v2_finetune() -> Recipe:
    """Fine-tunes the published prior on your own images at 1024×1024 pixels.

    Hardware: one GPU with 80 GB. Time: 2 hours for 200,000 images at 28 per second, the speed of diffusers'
    modules on one H100. Cost: about 1.4 kWh of an H100 at 0.7 kW. Result: a complete model with your Stage C.
    The published folders have no compressor. It comes from the original's file of Stage B (--compressor-init,
    by default from the hub; a local model_v2_stage_b.pt works too). The prior takes 18.5 GiB of GPU memory
    (weights, average, AdamW, bf16 copies and gradients) plus activations. The frozen compressor and text
    encoder take 1.5 GiB in bf16, or nothing with a prepared set and --stored-texts states. The networks that
    only previews need (5.3 GiB) stay on the CPU and are moved to the GPU one at a time.
    """
    return dataclasses.replace(
        v2(),
        name="v2-finetune",
        stages=("c",),
        start_from="warp-ai/wuerstchen",
        text_encoder="",
        decoder_text_encoder="",
        text_positions="all",
        stage_b=dataclasses.replace(STAGE_B, compressor_init="dome272/wuerstchen"),
        stage_c=_finetuning(images=200_000, batch_size=64),
        preview_every=20_000,
        checkpoint_seconds=600.0,
    )


def v2_finetune_2048() -> Recipe:
    """Fine-tunes the published prior at 2048×2048 pixels, with semantic latents of 48×48.

    Hardware: one GPU with 80 GB. Time: about a day on one H100 (estimated) for 100,000 images with four
    times as many latent positions as in v2-finetune. Cost: about 17 kWh at 0.7 kW. Result: a model for 2048
    pixels. Stages A and B work at any size. Models and data as in v2-finetune.
    """
    return dataclasses.replace(
        v2_finetune(),
        name="v2-finetune-2048",
        image_size=2048,
        stage_c=_finetuning(images=100_000, batch_size=16),
    )


def _finetuning(images: int, batch_size: int) -> StageCConfig:
    return StageCConfig(
        optimization=Optimization(
            images=images,
            batch_size=batch_size,
            learning_rate=1e-5,
            warmup=100 * batch_size,
            weight_decay=0.01,
        )
    )

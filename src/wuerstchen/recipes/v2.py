"""Würstchen v2 at its published size, as in arXiv 2306.00637 (appendix E), stage by stage or in one run."""

import dataclasses

from wuerstchen.models.compressor import CompressorConfig
from wuerstchen.models.decoder import DecoderConfig
from wuerstchen.models.prior import PriorConfig
from wuerstchen.models.vqgan import VQGANConfig
from wuerstchen.train.config import Optimization, Phase, Recipe, StageAConfig, StageBConfig, StageCConfig

CLIP_BIGG = "warp-ai/wuerstchen-prior"
"""Where Stage C's text encoder is published."""
CLIP_H = "warp-ai/wuerstchen"
"""Stage B's, and that of both stages in v1."""


def _rate(updates: int, batch_size: int, warmup: int = 0, ema_decay: float = 0.999) -> Optimization:
    """AdamW at 1e-4 with torch's weight decay; lengths in updates, as the paper gives them."""
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

EMA_DECAY = 0.99895  # with ema_every 100 the original's 0.9 once in a hundred updates

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
    """Würstchen v2, 1024×1024 pixels: all three stages as published, from nothing, in one run.

    Hardware: 64 A100 or more; several nodes by torchrun. Time: over 35,600 A100-hours (the paper: Stage B
    11,000, Stage C 24,602, Stage A not told), 23 days on 64. Cost: the authors tell of 80,000 to 100,000
    dollars; Stage C emitted 2,276 kg of CO2. Nobody has run it here: the rehearsal says what your machine
    takes. Result: the published model has FID 23.6 on COCO30k at 256 pixels.
    Stage A compares the features of EfficientNet-Lite0, as the network that the original used is not told.
    New models have padding hidden from attention; --text-positions all is as published. The compressor needs
    --compressor-init FILE. --stage-c.phases.2.data FOLDER names the pictures of the last phase, a choice of
    fine ones; its weights and those before it are averaged.
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
    """Stage A of v2 alone: the VQGAN, on crops of 128 out of pictures of 256 pixels.

    Hardware: one GPU or more. Time: not told by the paper; 500,000 updates of 256 crops. Cost: the rehearsal
    says. Result: latents four times smaller a side, for v2-stage-b. Losses as published: squared error 1,
    features 0.1, adversarial 0.01 after 10,000 updates. The features are those of EfficientNet-Lite0: the
    network that the original used is not told. Codes start normal: as published, ±1/8192, few of them would
    ever be used (--stage-a.codebook-init uniform).
    """
    return dataclasses.replace(
        v2(), name="v2-stage-a", stages=("a",), text_encoder="", decoder_text_encoder=""
    )


def v2_stage_b() -> Recipe:
    """Stage B of v2 with the compressor: 457,000 updates at 512 pixels, then 300,000 at 1024.

    Hardware: 8 A100 of 80 GB or more. Time: 11,000 A100-hours (the paper), 57 days on 8. Cost: 4,400 kWh at
    0.4 kW a GPU. Result: the decoder and the map that v2-stage-c works in. --compressor-init FILE names the
    EfficientNetV2-S of torchvision or timm; --start-from a model with a Stage A, runs/v2-stage-a/model unless
    told.
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
    """Stage C of v2, the prior: maps of 12×12, then 24×24, mixed aspects, fine pictures, an average.

    Hardware: 64 A100 of 40 GB or more. Time: 24,602 A100-hours (the paper), 16 days on 64. Cost: 2,276 kg of
    CO2 (the paper). Result: a model; the published one has FID 23.6 on COCO30k at 256 pixels. --start-from
    names a model with Stages A and B, runs/v2-stage-b/model unless told; one whose Stage B attends to
    padding, as the published one, wants --text-positions all. --stage-c.phases.2.data FOLDER names the fine
    pictures.
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
    """The published prior, trained on with your own pictures at 1024×1024 pixels.

    Hardware: one GPU of 80 GB. Time: 200,000 pictures; at 28 a second, the pace of diffusers' modules on one
    H100 as they stand, 2 hours. Cost: about 1.4 kWh of an H100 at 0.7 kW. Result: a whole model with your
    Stage C. The published folders hold no compressor: it comes with the original's file of Stage B, which
    --compressor-init names (from the hub unless told; the file model_v2_stage_b.pt will do). Beside the
    prior's 18.5 GiB (weights, average, AdamW, bf16 copies and gradients) and what updates compute, the GPU
    holds 1.5 GiB of frozen networks: the compressor and the text encoder, in bf16; none with a prepared set
    and --stored-texts states. The 5.3 GiB that only previews need stay on the CPU and visit it one network at
    a time.
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
    """The published prior, trained on at 2048×2048 pixels: maps of 48×48.

    Hardware: one GPU of 80 GB. Time: 100,000 pictures of four times as many positions as in v2-finetune; a
    day on one H100 by estimate. Cost: about 17 kWh at 0.7 kW. Result: a model for 2048 pixels;
    Stages A and B take any size. Sources as in v2-finetune.
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

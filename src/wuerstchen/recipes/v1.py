"""Würstchen v1 (arXiv 2306.00637 v1): Stage B finds tokens, on maps of 12×12 of pictures of 512 pixels."""

from wuerstchen.models.compressor import CompressorConfig
from wuerstchen.models.paella import PaellaConfig
from wuerstchen.models.prior import PriorConfig
from wuerstchen.models.vqgan import VQGANConfig
from wuerstchen.recipes.mini import PROMPTS
from wuerstchen.train.config import Optimization, Recipe, StageAConfig, StageBConfig, StageCConfig

_CLIP_H = "warp-ai/wuerstchen"
"""Holds the text encoder that v1 reads in both stages, and Stage A, which v1 and v2 share."""


def v1_stage_b() -> Recipe:
    """v1's Stage B and compressor from nothing, on the published Stage A: Paella, 730.8 million parameters.

    As the original's trainer has it: 384 pictures of 512 pixels an update, 1.5 million updates at most. It
    has no weight average and drops text and map of whole batches; here there is one, and they are dropped a
    picture at a time. Give --data and --compressor-init, ImageNet weights of EfficientNetV2-L.

    Hardware: GPUs of 80 GB. Time and cost: not measured; a run says them before it begins.
    Result: none yet.
    """
    return _v1(
        name="v1_stage_b",
        stages=("b",),
        fresh=("b",),
        start=_CLIP_H,
        decoder_text_encoder=_CLIP_H,
    )


def v1_stage_c() -> Recipe:
    """v1's prior from nothing, 993.2 million parameters, on a Stage B of v1.

    As the original's trainer has it: 1280 pictures an update, 800,000 updates. It learns on the map as it is;
    here the map is normalised by what is measured. Give --data, and as --start the model of ``v1_stage_b`` or
    a folder with the original's vqgan_f4_v1_500k.pt and model_stage_b.pt.

    Hardware: GPUs of 80 GB; the original took 9,200 hours of an A100.
    Time and cost: not measured; a run says them before it begins. Result: none yet.
    """
    return _v1(
        name="v1_stage_c",
        stages=("c",),
        fresh=("c",),
        start="runs/v1_stage_b/model",
        text_encoder=_CLIP_H,
        decoder_text_encoder=_CLIP_H,
    )


def _v1(**fields: object) -> Recipe:
    batch_b, batch_c = 384, 1280
    return Recipe(
        data="data",
        image_size=512,
        text_positions="all",
        vqgan=VQGANConfig(),
        compressor=CompressorConfig(backbone="efficientnet_v2_l"),
        decoder=PaellaConfig(),
        prior=PriorConfig(c_cond=1024),
        stage_a=StageAConfig(optimization=Optimization(images=256 * 500_000, batch_size=256)),
        stage_b=StageBConfig(
            optimization=Optimization(
                images=batch_b * 1_500_000,
                batch_size=batch_b,
                warmup=batch_b * 10_000,
                betas=(0.9, 0.95),
                weight_decay=0.01,
            ),
        ),
        stage_c=StageCConfig(
            optimization=Optimization(
                images=batch_c * 800_000,
                batch_size=batch_c,
                warmup=batch_c * 10_000,
                weight_decay=0.01,
                ema_decay=0.99895,  # the original's 0.9, every hundredth update
            ),
        ),
        prior_steps=60,
        prior_guidance=6.0,
        decoder_steps=8,
        decoder_guidance=2.0,
        acceleration="compile",
        preview_prompts=PROMPTS,
        workers=8,
        **fields,  # type: ignore[arg-type]
    )

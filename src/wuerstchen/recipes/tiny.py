"""All stages in miniature, for trying out and for tests."""

from wuerstchen.models.compressor import CompressorConfig
from wuerstchen.models.decoder import DecoderConfig
from wuerstchen.models.prior import PriorConfig
from wuerstchen.models.vqgan import VQGANConfig
from wuerstchen.train.config import Optimization, Recipe, StageAConfig, StageBConfig, StageCConfig


def tiny() -> Recipe:
    """All three stages on the bundled sample, 128×128 pixels.

    Hardware: two CPU cores. Time: 80 seconds. Cost: negligible.
    Result: images that show that everything works. Their objects cannot be recognised.
    """
    return Recipe(
        name="tiny",
        data="sample",
        image_size=128,
        vqgan=VQGANConfig(bottleneck_blocks=1, embed_dim=48, num_vq_embeddings=256),
        compressor=CompressorConfig(backbone="efficientnet_lite0", c_latent=16),
        decoder=DecoderConfig(
            patch_size=2,
            c_hidden=(48, 96),
            nhead=(-1, -1),
            blocks=(1, 2),
            level_config=("CT", "CT"),
            inject_effnet=(True, True),
            c_cond=32,
            clip_embd=None,
            dropout=0.0,
        ),
        prior=PriorConfig(c=128, c_cond=384, depth=3, nhead=4),
        stage_a=StageAConfig(
            optimization=Optimization(
                images=2400, batch_size=8, learning_rate=2e-3, warmup=160, decay="cosine"
            ),
            crop=64,
            discriminator_width=64,
            discriminator_depth=4,
            adversarial_from=1200,
            codebook_init="normal",
            l1_weight=1.0,
        ),
        stage_b=StageBConfig(
            optimization=Optimization(
                images=1600, batch_size=8, learning_rate=1e-3, warmup=160, decay="cosine"
            )
        ),
        stage_c=StageCConfig(
            optimization=Optimization(
                images=2400, batch_size=16, learning_rate=1e-3, warmup=160, decay="cosine"
            ),
        ),
        statistics_images=96,
        acceleration="none",
        preview_prompts=(
            "a 3D render of a cat",
            "a flat drawing of a red car",
            "a black glyph of a tree",
            "an emoji of an apple on a blue background",
        ),
    )

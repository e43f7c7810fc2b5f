"""The model in the package."""

from wuerstchen.models.compressor import CompressorConfig
from wuerstchen.models.decoder import DecoderConfig
from wuerstchen.models.prior import PriorConfig
from wuerstchen.models.vqgan import VQGANConfig
from wuerstchen.train.config import Optimization, Recipe, StageAConfig, StageBConfig, StageCConfig


def mini() -> Recipe:
    """The model in the package: 256×256 pixels, a 6×6×16 map, all three stages on the emoji set.

    Hardware: two CPU cores with bf16 arithmetic. Time: 48 minutes. Cost: not metered.
    Result: see the model's card. Build the data first: wuerstchen data emoji data/emoji.
    """
    return Recipe(
        name="mini",
        data="data/emoji",
        image_size=256,
        precision="bf16",
        vqgan=VQGANConfig(bottleneck_blocks=2, embed_dim=96, num_vq_embeddings=1024),
        compressor=CompressorConfig(backbone="efficientnet_lite0", c_latent=16),
        decoder=DecoderConfig(
            patch_size=4,
            c_hidden=(128, 256),
            nhead=(-1, -1),
            blocks=(2, 3),
            level_config=("CT", "CT"),
            inject_effnet=(True, True),
            c_cond=64,
            clip_embd=None,
            dropout=0.0,
        ),
        prior=PriorConfig(c=256, c_cond=384, depth=8, nhead=4, dropout=0.0),
        stage_a=StageAConfig(
            optimization=Optimization(
                images=16_000, batch_size=16, learning_rate=2e-3, warmup=1600, decay="cosine"
            ),
            crop=96,
            discriminator_width=128,
            discriminator_depth=4,
            adversarial_from=8_000,
            codebook_init="normal",
            l1_weight=1.0,
        ),
        stage_b=StageBConfig(
            optimization=Optimization(
                images=44_000, batch_size=16, learning_rate=6e-4, warmup=3200, decay="cosine"
            ),
            frozen_stride=16,
        ),
        stage_c=StageCConfig(
            optimization=Optimization(
                images=40_000, batch_size=32, learning_rate=1e-3, warmup=3200, decay="cosine"
            ),
            caption_dropout=0.1,
        ),
        decoder_guidance=1.5,
        preview_prompts=PROMPTS,
        preview_every=12_000,
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
"""The nine prompts of the preview grid and of the demo, fixed before the first training."""

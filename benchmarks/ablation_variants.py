"""The variants of the recipe `mini` that ablation.py trains, with the predictions from before the runs."""

from dataclasses import dataclass
from typing import Any

from recipe_changes import BEST_C, C32, DEPTHS, MUON_B, MUON_C

BEST_B = DEPTHS | MUON_B | C32
ONLY_B2 = {"only": ("b2",), "fresh": ()}
"""Trains the decoder alone, from the model at --start."""
EMA_C = "stage_c.optimization.ema_decay"
RATE_B, RATE_C = "stage_b.optimization.learning_rate", "stage_c.optimization.learning_rate"


@dataclass(frozen=True)
class Variant:
    """The changes to the recipe, and the prediction from before the run."""

    changed: dict[str, Any]
    predicted: str = "nothing was predicted."
    length: int = 1
    """Its number of images, as a multiple of the others'."""
    averages: tuple[str, ...] = ()
    """Variants with another ``ema_decay`` that get rows from the same training."""


VARIANTS: dict[str, Variant] = {
    "b-base": Variant({}),
    "b-muon": Variant(MUON_B),
    "b-muon-half": Variant(MUON_B | {RATE_B: 5e-4}),
    "b-muon-double": Variant(MUON_B | {RATE_B: 2e-3}),
    "b-adamw-double": Variant({RATE_B: 2e-3}),
    "b-depths": Variant(DEPTHS),
    "b-depths-muon": Variant(DEPTHS | MUON_B),
    "b-depths-muon-half": Variant(
        DEPTHS | MUON_B | {RATE_B: 5e-4}, "error 2 % higher than at 1e-3: the rate is near its best."
    ),
    "b-depths-muon-double": Variant(
        DEPTHS | MUON_B | {RATE_B: 2e-3}, "error within 1 % of that at 1e-3, R@1 within its noise."
    ),
    "b-depths-muon-32x6x6": Variant(
        DEPTHS | MUON_B | C32,
        "PSNR +1 dB, R@1 +0.03, KID -2: with features of two depths there is more to store.",
    ),
    "b-depths-muon-8x8": Variant(
        DEPTHS | MUON_B | {"view_scale": 1.0},
        "PSNR +1 dB and R@1 +0.03, as with 32 channels; a fifth fewer images a second.",
    ),
    "b-depths-muon-shift1": Variant(
        DEPTHS | MUON_B | {"stage_b.time_shift": 1.0}, "KID -1, R@1 -0.02: more texture, less layout."
    ),
    "b-best-features": Variant(
        BEST_B | {"stage_b.feature_weight": 0.5},
        "KID -1.5 on both lists, style +0.03, R@1 +0.01, PSNR -0.3 dB: sharper, not nearer. Half the speed.",
    ),
    "b-best-previewer": Variant(
        BEST_B | {"stage_b.previewer_weight": 2.0},
        "R@1, KID and PSNR within their noise: with two depths the latents already hold colours and shapes. "
        "Stage C on these latents may gain, which this row does not show.",
    ),
    "b-best-attention": Variant(
        BEST_B | {"decoder.level_config": ("CT", "CT", "CTA"), "decoder.nhead": (-1, -1, 5)},
        "error -1 %, R@1 +0.01, KID -0.5: at 8×8 positions the convolutions already see the whole image.",
    ),
    "b-best-8x8": Variant(
        BEST_B | {"view_scale": 1.0},
        "PSNR +1 dB, KID -1, R@1 +0.02: 1.8 times the numbers. A fifth fewer images a second.",
    ),
    "b-best-noise": Variant(
        BEST_B | {"stage_b.map_noise": 0.7},
        "A+B: PSNR -0.5 dB, KID +1. Stage C on these latents: R@1 +0.03 (a), KID -3, since coarse features "
        "are stored with more energy and Stage B forgives more.",
    ),
    "b-best-wide": Variant(
        BEST_B | {"decoder.c_hidden": (112, 240, 320)},
        "error -2 %, KID -1, style +0.02, R@1 +0.01: the two fine levels draw the details.",
    ),
    "b-best-lr-double": Variant(BEST_B | {RATE_B: 2e-3}, "error within 1 % of that at 1e-3, KID +0.5."),
    "b-best-lr-half": Variant(BEST_B | {RATE_B: 5e-4}, "error 2 % higher than at 1e-3, KID +1."),
    "b-best-long": Variant(
        BEST_B | {"stage_b.optimization.images": 256 * 16_000, "stage_b.refine_images": 256 * 9_000},
        "error -6 %, R@1 +0.03 and +0.02, KID -2.5, style +0.06, PSNR +0.7 dB: style grows with images.",
    ),
    "b2-base": Variant(
        BEST_B | ONLY_B2,
        "error -6 %, R@1 +0.03 and +0.02, KID -2.5, style +0.06 against the first phase alone.",
    ),
    "b2-features": Variant(
        BEST_B | ONLY_B2 | {"stage_b.refine_feature_weight": 0.5},
        "KID -1.5 on both lists, style +0.03, R@1 +0.01, PSNR -0.3 dB against the same phase without.",
    ),
    "b-8x8": Variant({"view_scale": 1.0}),
    "b-32x6x6": Variant(C32),
    "b-shift1": Variant({"stage_b.time_shift": 1.0}),
    "b-shift4": Variant({"stage_b.time_shift": 4.0}),
    "c-base": Variant({}, "error 1 to 2 % higher than with Muon, R@1 and KID within their noise of it."),
    "c-muon": Variant(MUON_C),
    "c-muon-half": Variant(MUON_C | {RATE_C: 5e-4}, "error 1 % higher than at 1e-3."),
    "c-muon-double": Variant(MUON_C | {RATE_C: 2e-3}, "error within 1 % of that at 1e-3."),
    "c-adamw-double": Variant({RATE_C: 2e-3}, "error within 1 % of that at 1e-3."),
    "c-adamw-half": Variant({RATE_C: 5e-4}, "error 1 % higher than at 1e-3."),
    "c-dropout-0.1": Variant(
        {"prior.dropout": 0.1},
        "error -2 %, R@1 +0.03 (a), 0 (b), KID -1, and a higher training loss: less overfitting.",
    ),
    "c-dropout-0.2": Variant(
        {"prior.dropout": 0.2}, "error within 1 % of that at 0.1, KID +1: too much for 7 million parameters."
    ),
    "c-decay": Variant(
        {"stage_c.optimization.weight_decay": 0.1}, "error -1 %, R@1 +0.01 (a): weaker than dropout."
    ),
    "c-compositions": Variant(
        {"prepared_images": 262_144},
        "error -1 %, R@1 within its noise: other colours and places, but the same 6,035 emoji.",
    ),
    "c-dropout-muon": Variant(
        MUON_C | {RATE_C: 2e-3, "prior.dropout": 0.1},
        "error -2 % and KID -2 against c-base: dropout prevents Muon's overfitting.",
    ),
    "c-mirrored": Variant(
        {"prepared_images": 262_144, "mirrored": 0.5},
        "R@1 +0.01 (a) against c-compositions, KID -0.5: twice as many shapes, named in the captions.",
    ),
    "c-text-noise": Variant(
        {"stage_c.text_noise": 0.3},
        "R@1 +0.02 (a), error -1 %: held-out pairs of subject and style look more like those of training.",
    ),
    "c-double-text2": Variant(
        MUON_C | {RATE_C: 2e-3, "prior.text_blocks": 2, "prior.dropout": 0.1},
        "R@1 +0.04 (a) and KID -2 against c-base: more capacity pays once it is regularised.",
    ),
    "c-best": Variant(BEST_C, "KID -0.5 (a) against c-double-text2, R@1 within its noise."),
    "c-best-mirrored": Variant(
        BEST_C | {"prepared_images": 131_072, "mirrored": 0.5},
        "error -2 %, R@1 and KID within their noise after 5 million images, better after 40 million.",
    ),
    "c-best-known": Variant(
        BEST_C | {"stage_c.known_fraction": 0.15},
        "R@1 within 0.01 of c-best, error 0.5 % higher; around a known rectangle 10 % lower.",
    ),
    "c-best-text1": Variant(
        BEST_C | {"prior.text_blocks": 1}, "R@1 -0.01, KID +0.3: the first block gives most of the gain."
    ),
    "c-best-adamw": Variant(
        BEST_C | {"stage_c.optimization.optimizer": "adamw", RATE_C: 1e-3},
        "error +2 %, R@1 -0.05 (a), KID +1: as without text blocks.",
    ),
    "c-best-adamw-double": Variant(
        BEST_C | {"stage_c.optimization.optimizer": "adamw"}, "error within 1 % of that at 1e-3."
    ),
    "c-best-rate-half": Variant(BEST_C | {RATE_C: 1e-3}, "error +1 %, R@1 -0.02, KID +0.5."),
    "c-best-rate-double": Variant(
        BEST_C | {RATE_C: 4e-3}, "error within 1 %, KID -0.5: the last doubling helped too."
    ),
    "c-best-dropout-0.2": Variant(
        BEST_C | {"prior.dropout": 0.2}, "error +1 %, R@1 -0.02 after 5 million images."
    ),
    "c-best-logit-normal": Variant(
        BEST_C | {"stage_c.time_density": "logit_normal"}, "KID -0.5, R@1 within its noise."
    ),
    "c-best-shift-0.5": Variant(BEST_C | {"stage_c.time_shift": 0.5}, "style +0.02, R@1 the same."),
    "c-best-shift-1.5": Variant(BEST_C | {"stage_c.time_shift": 1.5}, "R@1 +0.01, style -0.02."),
    "c-best-registers": Variant(
        BEST_C | {"prior.registers": 4}, "error within 0.5 %, R@1 and KID within their noise."
    ),
    "c-best-dispersive": Variant(
        BEST_C | {"stage_c.dispersive_weight": 0.25}, "error within 0.5 %, KID -3 %, R@1 within its noise."
    ),
    "c-best-flow": Variant(
        BEST_C | {"prior.prediction": "flow"}, "R@1 and KID as with velocity, within their noise."
    ),
    "c-best-averages": Variant(
        BEST_C, "as c-best, whose training it repeats.", averages=("c-best-ema-long", "c-best-ema-short")
    ),
    "c-best-ema-long": Variant(BEST_C | {EMA_C: 0.9998}, "error +1 %: half of the run is remembered."),
    "c-best-ema-short": Variant(BEST_C | {EMA_C: 0.999}, "error within 0.3 % of that at 0.9995."),
    "c-text1": Variant(
        {"prior.text_blocks": 1},
        "error -2 %, R@1 (a) +0.02, object colour +0.03, KID within its noise: captions are read better.",
    ),
    "c-text2": Variant({"prior.text_blocks": 2}, "error within 0.5 % of that with one block."),
    "c-deeper": Variant(
        {"prior.depth": 9},
        "error -1 %, R@1 and colour within their noise: the same weights are worth more on the text.",
    ),
    "c-registers": Variant({"prior.registers": 4}, "error within 0.5 %, R@1 and KID within their noise."),
    "c-dispersive": Variant(
        {"stage_c.dispersive_weight": 0.25}, "error within 0.5 %, KID -3 %, R@1 within its noise."
    ),
    "c-logit-normal": Variant(
        {"stage_c.time_density": "logit_normal"},
        "error 1 % lower at the four middle levels and 1 % higher at the two ends, KID -5 %.",
    ),
    "c-long": Variant({}, "error -3 %, KID -1, R@1 +0.01.", length=2),
    "c-averages": Variant(
        {}, "as c-base, whose training it repeats.", averages=("c-ema-long", "c-ema-short")
    ),
    "c-ema-long": Variant({EMA_C: 0.9998}, "error within 0.5 % of that at 0.9995, KID the same."),
    "c-ema-short": Variant({EMA_C: 0.999}, "error up to 0.3 % higher than at 0.9995, KID the same."),
    "c-flow": Variant({"prior.prediction": "flow"}, "R@1 and KID as with velocity, within their noise."),
    "c-shift-0.5": Variant({"stage_c.time_shift": 0.5}, "style +0.02, R@1 the same."),
    "c-known": Variant(
        {"stage_c.known_fraction": 0.15},
        "R@1 within 0.01 of c-base, error 0.5 % higher; around a known rectangle 20 % lower than c-base's.",
    ),
    "c-shift-0.7": Variant({"stage_c.time_shift": 0.7}, "style +0.01, R@1 the same."),
    "c-shift-1.5": Variant({"stage_c.time_shift": 1.5}, "R@1 +0.01, style -0.02."),
}
"""By name. The first letter is the trained stage. ``b2`` trains the decoder alone."""

"""Trains variants of the recipe `mini`, one stage at a time, and scores each on val, with a row per variant.

    python benchmarks/ablation.py b-base b-muon --data data/emoji --run-dir runs/ablation --rows rows.jsonl

All other stages come from the bundled model, or from that of ``--start``. Rows are written to a JSON-lines
file, from which scripts/experiments_table.py makes docs/experiments.md. Training never sees held-out images,
and the test lists are never read.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import json
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from held_out import IMAGES as HELD_OUT_IMAGES
from held_out import errors_on, held_out_images
from recipe_changes import C32, DEPTHS, MUON_B, MUON_C, parse_change, with_changes
from scoring import scores
from timed_training import OneProcess, machine, share_images, timed_training
from torch import nn

from wuerstchen.checkpoints.native import read_network, read_parts, write_network
from wuerstchen.data.open import open_source
from wuerstchen.evaluate.references import References
from wuerstchen.models.cascade import Cascade
from wuerstchen.pipeline import BUNDLED, Sampling, Wuerstchen
from wuerstchen.recipes.mini import mini
from wuerstchen.train.config import Recipe
from wuerstchen.train.engine.ema import decay_at, update_average
from wuerstchen.train.engine.update import TrainStep
from wuerstchen.train.engine.validation import Validation, held_out
from wuerstchen.train.stage_table import trained_phases
from wuerstchen.train.stages.prior import StageC

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


def recipe_of(
    name: str, data: str, images: int, seed: int, workers: int, start: str, others: dict[str, Any]
) -> Recipe:
    """The recipe `mini` with one stage trained from scratch, and the changes of the variant.

    Stage B has no refinement unless a variant sets ``stage_b.refine_images``. A variant's own number of
    images replaces ``images``. A Stage C gets everything else from the model ``start``: the shapes of the
    other networks, the channels of the semantic latents, the width of the text states, and how Stage B
    samples.
    """
    stage = name[0]
    recipe = dataclasses.replace(
        mini(),
        data=data,
        seed=seed,
        workers=workers,
        stages=(stage,),
        fresh=(stage,),
        start_from=start,
    )
    first = f"stage_{stage}.optimization.images"
    changes = (
        {"stage_b.refine_images": images}
        if name.startswith("b2")
        else {first: images, "stage_b.refine_images": 0}
    )
    if stage == "c":
        changes |= _of_start(Path(start))
    return with_changes(recipe, changes | VARIANTS[name].changed | others)


@functools.lru_cache(maxsize=1)
def _of_start(start: Path) -> dict[str, Any]:
    """The fields of a recipe for Stage C that follow from the model that it starts from."""
    settings, parts, _ = read_parts(start)
    channels, text = parts["compressor"].config.c_latent, parts.get("text_encoder")
    frozen = ("vqgan", "decoder", "compressor", "previewer")
    same = ("image_size", "view_scale", "decoder_steps", "decoder_guidance", "decoder_shift")
    return {
        **{name: parts[name].config for name in frozen if name in parts},
        **{name: getattr(settings, name) for name in same},
        "text_positions": "real" if settings.text_mask else "all",
        "prior.c_in": channels,
        **({} if "previewer" in parts else {"previewer.c_in": channels}),
        **({} if text is None else {"prior.c_cond": text.width}),
    }


def _recipe(name: str, options: argparse.Namespace) -> Recipe:
    images = (options.images_b if name[0] == "b" else options.images_c) * VARIANTS[name].length
    others = dict(map(parse_change, options.set))
    return recipe_of(name, str(options.data), images, options.seed, options.workers, options.start, others)


def errors_around_known_cells(
    cascade: Cascade, recipe: Recipe, device: torch.device
) -> dict[str, list[float | None]]:
    """Stage C's error around a known rectangle of held-out latents, see ``Validation.around_known_cells``."""
    images = held_out(open_source(recipe.data, "heldout"), recipe.image_size)
    assert images is not None
    stage = StageC(recipe.stage_c, recipe, cascade)
    return Validation(stage, images, None, device).around_known_cells({"prior": stage.prior})


def train(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Trains a variant. Returns the part of its row about the training, and those of its other averages."""
    recipe, folder = _recipe(name, options), options.run_dir / name
    decays = {other: VARIANTS[other].changed[EMA_C] for other in VARIANTS[name].averages}
    with averaging(decays) as averages:
        # The speed is that of the first phase: a refinement does not train the compressor.
        trained = timed_training(recipe, folder, trained_phases(recipe)[0].name)
    for other, average in averages.items():
        _with_prior(folder / "model", average, options.run_dir / other / "model")
    return [
        {
            "name": row,
            "seed": options.seed,
            "start": Path(options.start).name,
            "changed": VARIANTS[row].changed | dict(map(parse_change, options.set)),
            "predicted": VARIANTS[row].predicted,
            "images": _images(recipe),
            **trained,
        }
        for row in (name, *averages)
    ]


@contextlib.contextmanager
def averaging(decays: Mapping[str, float]) -> Iterator[dict[str, nn.Module]]:
    """Keeps more averages of Stage C's weights while it trains, with these decays by name.

    They are only in memory: a run that is resumed would lose its beginning.
    """
    averages: dict[str, nn.Module] = {}
    own, updates = TrainStep.average, 0

    def average(step: TrainStep) -> None:
        nonlocal updates
        own(step)
        updates += 1
        for name, decay in decays.items():
            if name in averages:
                update_average(averages[name], step.stage.networks["prior"], decay_at(updates, decay))
            else:  # averages with any decay are the same after the first update
                averages[name] = copy.deepcopy(step.state.averages["prior"])

    TrainStep.average = average if decays else own  # type: ignore[method-assign]
    try:
        yield averages
    finally:
        TrainStep.average = own  # type: ignore[method-assign]


def _with_prior(model: Path, prior: nn.Module, target: Path) -> None:
    """Writes a copy of a model with another prior."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(model, target)
    provenance = read_network(model / "prior.safetensors")[1]
    (target / "prior.safetensors").unlink()
    write_network(prior, target / "prior.safetensors", provenance)


def _images(recipe: Recipe) -> int:
    """Images of all phases."""
    return sum(named.phase.optimization.images for named in trained_phases(recipe))


def score(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Scores a trained variant. Returns the part of its row about the model."""
    settings, parts, _ = read_parts(options.run_dir / name / "model")
    model = Wuerstchen(Cascade(settings=settings, **parts), torch.device(options.device))
    row = "a_b" if name[0] == "b" else "c_b_a"
    began = time.monotonic()
    references = References(options.data, model.device)
    found = scores(model, references, row, options.first_seeds, Sampling(), limit=options.limit)
    recipe, known = _recipe(name, options), {}
    images = held_out_images(options.data, settings.image_size, options.held_out)
    errors = errors_on(images, model.cascade, name[0], recipe)
    if name[0] == "c":
        known = {"around_known_cells": errors_around_known_cells(model.cascade, recipe, model.device)}
    return {
        "row": row,
        "decoder_parameters": sum(p.numel() for p in parts["decoder"].parameters()),
        "first_seeds": options.first_seeds,
        "scores": found,
        "validation": {"images": len(images), "bins": errors},
        **known,
        "scoring_minutes": round((time.monotonic() - began) / 60, 2),
        "machine": machine(),
    }


def keep(name: str, trained: dict[str, Any], scored: dict[str, Any], options: argparse.Namespace) -> None:
    """Adds the row of a variant, and copies its last preview next to the rows."""
    row = json.dumps(trained | scored)
    with open(options.rows, "a", encoding="utf-8") as file:
        file.write(row + "\n")
    print(row, flush=True)
    for image in sorted((options.run_dir / name).glob("stage_*/previews/*.png"))[-1:]:
        shutil.copy(image, options.rows.parent / f"{name}.png")


def run_all(options: argparse.Namespace) -> list[str]:
    """Trains the variants in order, and scores each in another process while the next one trains.

    So the speed of a variant is reduced by the scoring of the previous one. A failure does not stop the
    others. Returns the names of the failed variants.
    """
    began, longest, failed = time.monotonic(), 0.0, []
    waiting: list[tuple[str, dict[str, Any], Future[dict[str, Any]]]] = []

    def collect(all_of_them: bool) -> None:
        while waiting and (all_of_them or waiting[0][2].done()):
            name, trained, scoring = waiting.pop(0)
            try:
                keep(name, trained, scoring.result(), options)
            except Exception:
                traceback.print_exc()
                failed.append(name)

    with OneProcess() as process:
        for name in options.variants:
            left = options.minutes - (time.monotonic() - began) / 60
            if longest > left:
                print(
                    f"{name}: skipped, it needs up to {longest:.1f} minutes and {left:.1f} are left",
                    flush=True,
                )
                continue
            started = time.monotonic()
            try:
                rows = train(name, options)
            except Exception:
                traceback.print_exc()
                failed.append(name)
                continue
            longest = max(longest, (time.monotonic() - started) / 60)
            torch.cuda.empty_cache()
            for trained in rows:
                print(json.dumps(trained), flush=True)
                scoring = process.submit(score, trained["name"], options)
                waiting.append((trained["name"], trained, scoring))
            collect(False)
        collect(True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variants", nargs="+", choices=VARIANTS, metavar="VARIANT", help=", ".join(VARIANTS))
    parser.add_argument("--data", type=Path, required=True, help="built emoji set")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True, help="JSON-lines file to append to")
    parser.add_argument("--images-b", type=int, default=256 * 9_000)
    parser.add_argument("--images-c", type=int, default=512 * 20_000)
    parser.add_argument("--start", default=str(BUNDLED), help="model with all other stages")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="FIELD=JSON", help="change fields of all variants"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first-seeds", type=int, nargs="+", default=[0, 1000])
    parser.add_argument("--limit", type=int, help="score only the first N entries of each list")
    parser.add_argument(
        "--held-out", type=int, default=HELD_OUT_IMAGES, help="held-out images for the validation error"
    )
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument(
        "--minutes",
        type=float,
        default=1e9,
        help="do not start a training that would end later",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    # Variants train on the same images, so the image cache is filled once.
    share_images()
    failed = run_all(options)
    sys.exit(f"failed: {' '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()

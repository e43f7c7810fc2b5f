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
from pathlib import Path
from typing import Any

import torch
from ablation_variants import EMA_C, VARIANTS
from held_out import IMAGES as HELD_OUT_IMAGES
from held_out import errors_on, held_out_images
from recipe_changes import parse_change, with_changes
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

"""Checks at a larger size what won on the small model: trains Stage C of `v2`, 512 wide, on 12×12 latents.

    python benchmarks/transfer.py --data data/emoji --run-dir runs/transfer --rows rows.jsonl \\
        --set 'prior.text_blocks=2' 'stage_c.time_density="logit_normal"'

Trains `t-base`, the recipe's own settings, and `t-winner`, with the options of --set in addition to Muon, one
after the other on the same images. The compressor and the text encoder are those of --start, by default the
bundled model: 512 pixels with a view of 384 give 12×12 latents. Everything else is `v2`: 32 blocks, noise
prediction, a learning rate of 1e-4. Compared is the validation error, on the same latents. Rows have the
form of docs/experiments.jsonl.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from recipe_changes import MUON_C, parse_change, with_changes
from timed_training import machine, share_images, timed_training

from wuerstchen.checkpoints.hub import local_folder
from wuerstchen.checkpoints.layouts import read_incomplete
from wuerstchen.pipeline import BUNDLED
from wuerstchen.recipes.mini import PROMPTS
from wuerstchen.recipes.scale import scaled
from wuerstchen.recipes.v2 import v2
from wuerstchen.train.config import Recipe

PIXELS = 512
POSITIONS = 12
"""Side of the semantic latents. Each position is 32 pixels of the compressor's view."""
VARIANTS = {"t-base": {}, "t-winner": MUON_C}
"""The changes by name. --set applies to the winner alone."""


def recipe_of(name: str, options: argparse.Namespace) -> Recipe:
    """Stage C of `v2` on the latents of the model in ``options.start``, with the changes of a variant."""
    _, parts, _ = read_incomplete(local_folder(options.start))
    channels = parts["compressor"].config.c_latent
    whole, side = v2(), 32 * POSITIONS
    prior = dataclasses.replace(whole.prior, c_in=channels, c_cond=parts["text_encoder"].width)
    optimization = dataclasses.replace(
        whole.stage_c.optimization,
        images=options.images,
        batch_size=options.batch_size,
        warmup=options.images // 20,
    )
    recipe = dataclasses.replace(
        whole,
        name="transfer",
        data=str(options.data),
        image_size=PIXELS,
        view_scale=side / PIXELS,
        stages=("c",),
        fresh=("c",),
        start_from=str(options.start),
        text_encoder="",
        decoder_text_encoder="",
        compressor=dataclasses.replace(whole.compressor, c_latent=channels),
        decoder=dataclasses.replace(whole.decoder, effnet_embd=channels),
        previewer=dataclasses.replace(whole.previewer, c_in=channels),
        prior=prior,
        stage_c=dataclasses.replace(whole.stage_c, optimization=optimization, phases=(), blend=1.0),
        preview_prompts=PROMPTS[:4],
        preview_every=0,
        prepared_images=options.prepared,
        seed=options.seed,
        workers=options.workers,
    )
    small = scaled(recipe, options.width / whole.prior.c, options.depth)
    return with_changes(small, changes_of(name, options))


def changes_of(name: str, options: argparse.Namespace) -> dict[str, Any]:
    others = dict(map(parse_change, options.set)) if name == "t-winner" else {}
    return VARIANTS[name] | others


def train(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Trains a variant, and returns its row."""
    recipe = recipe_of(name, options)
    trained = timed_training(recipe, options.run_dir / name, "c", options.device)
    return {
        "name": name,
        "seed": options.seed,
        "changed": changes_of(name, options),
        "predicted": options.predicted if name == "t-winner" else "nothing was predicted.",
        "images": options.images,
        **trained,
        "width": recipe.prior.c,
        "latents": [recipe.prior.c_in, POSITIONS, POSITIONS],
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
    }


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("variants", nargs="*", help="t-base, t-winner (default: both)")
    found.add_argument("--data", type=Path, required=True, help="built emoji set")
    found.add_argument("--run-dir", type=Path, required=True)
    found.add_argument("--rows", type=Path, required=True, help="JSON-lines file to append to")
    found.add_argument("--start", default=str(BUNDLED), help="model with the compressor and the text encoder")
    found.add_argument("--set", nargs="*", default=[], metavar="FIELD=JSON", help="options of the winner")
    found.add_argument("--predicted", default="nothing was predicted.", help="for the winner's row")
    found.add_argument("--images", type=int, default=256 * 4_000)
    found.add_argument("--batch-size", type=int, default=256)
    found.add_argument("--width", type=int, default=512)
    found.add_argument("--depth", type=float, default=1.0, help="multiplier for the number of blocks")
    found.add_argument("--prepared", type=int, default=16_384, help="images that are composed once")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--workers", type=int, default=16)
    found.add_argument("--minutes", type=float, default=1e9, help="start no training that would end later")
    found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return found


def main() -> None:
    parsing = parser()
    options = parsing.parse_args()
    names = options.variants or list(VARIANTS)
    if unknown := [name for name in names if name not in VARIANTS]:
        parsing.error(f"unknown variant {unknown[0]}. Use {' or '.join(VARIANTS)}.")
    share_images()
    began, longest = time.monotonic(), 0.0
    for name in names:
        started = time.monotonic()
        left = options.minutes - (started - began) / 60
        if longest > left:
            print(f"{name}: skipped, it needs up to {longest:.1f} minutes and {left:.1f} are left")
            continue
        row = json.dumps(train(name, options))
        longest = max(longest, (time.monotonic() - started) / 60)
        with open(options.rows, "a", encoding="utf-8") as file:
            file.write(row + "\n")
        print(row, flush=True)


if __name__ == "__main__":
    main()

"""Compares sampling settings of a model by their scores on val. The test split is never used.

    python scripts/sweep.py runs/mini/model data/emoji --guidance 2 3 4 --decoder-guidance 1 1.5

Prints a line per combination with the scores of C+B+A or A+B on both lists. The defaults are the model's own
settings. With several --first-seeds, there is a line per combination and seed.
"""

import argparse
import itertools
from pathlib import Path

import wuerstchen
from wuerstchen.diffusion.sampler_table import SAMPLERS
from wuerstchen.evaluate.report import evaluate
from wuerstchen.evaluate.scoring import Column
from wuerstchen.pipeline import Sampling

COLUMNS: dict[str, tuple[Column, ...]] = {
    "a": ("recall_1", "recall_5", "style", "kid_e3"),
    "b": ("recall_1", "style", "background", "object", "kid_e3"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path, help="built emoji set")
    parser.add_argument("--guidance", type=float, nargs="+", default=[None])
    parser.add_argument("--prior-steps", type=int, nargs="+", default=[None])
    parser.add_argument("--prior-sampler", nargs="+", default=[None], choices=list(SAMPLERS))
    parser.add_argument("--decoder-guidance", type=float, nargs="+", default=[None])
    parser.add_argument("--decoder-steps", type=int, nargs="+", default=[None])
    parser.add_argument("--decoder-shift", type=float, nargs="+", default=[None])
    parser.add_argument("--first-seeds", type=int, nargs="+", default=[0], help="for example 0 1000")
    parser.add_argument("--row", choices=("a_b", "c_b_a"), default="c_b_a", help="which row to score")
    parser.add_argument("--limit", type=int, help="use only the first N entries of each list")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--device")
    options = parser.parse_args()
    model = wuerstchen.load(options.model, options.device, precision="float32")
    names = ("guidance", "prior_sampler", "prior_steps", "decoder_guidance", "decoder_steps", "decoder_shift")
    head = [f"{name:>18}" for name in names]
    head += [f"{f'({name}) {column}':>14}" for name, columns in COLUMNS.items() for column in columns]
    print("".join(head), flush=True)
    choices = [getattr(options, name) for name in names]
    for first_seed, *values in itertools.product(options.first_seeds, *choices):
        sampling = Sampling(**dict(zip(names, values, strict=True)))
        report = evaluate(
            model,
            options.data,
            splits=("val",),
            rows=(options.row,),
            sampling=sampling,
            limit=options.limit,
            batch_size=options.batch_size,
            shown=0,
            first_seed=first_seed,
        )
        settings = model.settings_of(sampling)
        line = [f"{settings[name]!s:>18}" for name in names]
        for name, columns in COLUMNS.items():
            scores = report.lists[name].scores["val"][options.row]
            line += [f"{scores[c].value if c in scores else float('nan'):>14.3f}" for c in columns]
        print("".join(line), flush=True)


if __name__ == "__main__":
    main()

"""``wuerstchen train`` and ``wuerstchen report``."""

import argparse
import contextlib
import dataclasses
import io
import os
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from wuerstchen.cli.options import Parser, add_tariff_options, tariff_of
from wuerstchen.errors import DataError, UserError
from wuerstchen.terminal import unfiltered

if TYPE_CHECKING:
    from collections.abc import Callable

    from wuerstchen.train.config import Recipe


def add_train(commands: "argparse._SubParsersAction[Parser]") -> None:
    train = commands.add_parser(
        "train", help="train a model; the same command goes on after any stop", add_help=False
    )
    train.set_defaults(run=_train, parser=train, takes_overrides=True, goes_on=True)
    train.add_argument("recipe", nargs="?", metavar="RECIPE")
    train.add_argument("--run-dir", type=Path, help="folder of the run (runs/RECIPE)")
    train.add_argument("--data", help="folder of the data; 'sample' is in the package")
    train.add_argument("--seed", type=int, help="of everything random in the run (0)")
    train.add_argument(
        "--compressor-init", help="weights that the compressor starts from: a backbone's, or a whole one's"
    )
    train.add_argument(
        "--width", type=float, default=1.0, help="share of the recipe's widths, of every stage trained (1)"
    )
    train.add_argument("--depth", type=float, default=1.0, help="likewise of its depths (1)")
    train.add_argument(
        "--add-phase",
        action="append",
        choices=("b", "c"),
        default=[],
        help="another phase of Stage B or C, at first a copy of its last; --stage-c.phases.N.image-size and "
        "so on change it, N from 0",
    )
    train.add_argument("--device", help="cpu, cuda or mps (a GPU if there is one)")
    train.add_argument("--accept-changed-data", action="store_true", help="go on although the data changed")
    train.add_argument(
        "--change",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change a run that has begun from its newest checkpoint on, as learning_rate=1e-5, "
        "images=400000, precision=fp32 or skip+=NAME; it is recorded, and may be given again",
    )
    train.add_argument(
        "--end-now", action="store_true", help="end the run at its newest checkpoint, with a model of it"
    )
    train.add_argument("--tensorboard", action="store_true", help="event files too, in RUN/tensorboard")
    train.add_argument(
        "--no-rehearsal", action="store_true", help="begin at once, without measuring what all will cost"
    )
    add_tariff_options(train)


def add_report(commands: "argparse._SubParsersAction[Parser]") -> None:
    report = commands.add_parser(
        "report", help="one page of a run, finished or not: curves, previews, cost, what was skipped"
    )
    report.set_defaults(run=_report)
    report.add_argument("folder", type=Path, metavar="RUN", help="folder of the run")
    report.add_argument("--out", type=Path, metavar="FILE", help="the page (RUN/report.html)")
    add_tariff_options(report)


def add_export(commands: "argparse._SubParsersAction[Parser]") -> None:
    export = commands.add_parser(
        "export", help="write a model of a checkpoint of a run, while it trains or after"
    )
    export.set_defaults(run=_export)
    export.add_argument("folder", type=Path, metavar="RUN", help="folder of the run")
    export.add_argument("target", type=Path, metavar="OUT", help="new folder, in the native layout")
    export.add_argument(
        "--checkpoint",
        default="newest",
        metavar="WHICH",
        help="newest, best (the lowest validation loss), or its number of images (newest)",
    )
    export.add_argument("--stage", metavar="S", help="stage of the checkpoint, as in RUN/stage_S (the last)")
    export.add_argument(
        "--weights",
        choices=("average", "raw"),
        default="average",
        help="the averaged weights, as at the end of a run, or those being trained (average)",
    )


def _export(options: argparse.Namespace) -> int:
    from wuerstchen.train.export import export

    said = export(
        options.folder,
        options.target,
        checkpoint=options.checkpoint,
        stage=options.stage,
        weights=options.weights,
    )
    print(said)
    return 0


def _train(options: argparse.Namespace) -> int:
    asked_for_help = bool({"-h", "--help"} & set(options.overrides))
    from wuerstchen.recipes import RECIPES
    from wuerstchen.recipes.scale import scaled
    from wuerstchen.train.config import with_phase

    # python -OO leaves out docstrings.
    about = {name: (make.__doc__ or "").partition("\n")[0] for name, make in RECIPES.items()}
    recipes = "; ".join(f"{name}: {line}" if line else name for name, line in about.items())
    if asked_for_help:
        print(options.parser.format_help())
        print(f"recipes: {recipes}")
        if options.recipe not in RECIPES:
            print("wuerstchen train RECIPE --help lists all fields of a recipe, which are options too.")
            return 0
    if options.recipe is None:
        raise UserError(f"no recipe was named; use one of {recipes}")
    if options.recipe not in RECIPES:
        raise UserError(
            f"'{options.recipe}' is no recipe; name one of {', '.join(RECIPES)} before the options"
        )
    full = RECIPES[options.recipe]()
    for stage in options.add_phase:
        full = with_phase(full, stage)
    recipe = overridden(full, options)
    if (options.width, options.depth) != (1, 1):
        # Options say which stages begin afresh; where they name a width too, theirs holds.
        recipe = dataclasses.replace(recipe, vqgan=full.vqgan, decoder=full.decoder, prior=full.prior)
        smaller = scaled(recipe, options.width, options.depth)
        shapes = {"vqgan": smaller.vqgan, "decoder": smaller.decoder, "prior": smaller.prior}
        recipe = overridden(dataclasses.replace(full, **shapes), options)

    from wuerstchen.train.engine.loop import Interrupted
    from wuerstchen.train.report.announce import Watch
    from wuerstchen.train.report.cost import Tariff
    from wuerstchen.train.run import train

    tariff = tariff_of(options) or Tariff()
    watch = Watch(tariff=tariff, tensorboard=options.tensorboard, rehearses=not options.no_rehearsal)
    run_dir = options.run_dir or Path("runs") / recipe.name
    leads = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started
    if leads:
        print(f"Recipe {recipe.name} in {run_dir}. {_about(RECIPES[options.recipe], recipe)}")
    try:
        model = train(
            recipe,
            run_dir,
            device=options.device,
            accept_changed_data=options.accept_changed_data,
            watch=watch,
            changes=options.change,
            end_now=options.end_now,
        )
    except Interrupted as stopped:
        state = "a checkpoint is saved" if stopped.images else "this stage has no checkpoint yet"
        print(f"{stopped}; {state}: start the same command again to go on", file=sys.stderr)
        return 130
    if leads:
        print(f"{model}: draw with wuerstchen generate --model {shlex.quote(str(model))} ...")
    return 0


def _about(make: "Callable[[], Recipe]", recipe: "Recipe") -> str:
    """What is said of a recipe at the start: its docstring, or that it has other data than that is about."""
    if recipe.data == make().data:
        return " ".join((make.__doc__ or "").split())
    return (
        f"It is run on {recipe.data} instead of its own data, {make().data}, so the time, cost and result "
        "that it states do not apply"
    )


def _is_emoji(data: str) -> bool:
    """Whether data are the sample or a built emoji set, which the recipes' own prompts are about."""
    from wuerstchen.data.open import kind_of

    try:
        return kind_of(data).name in ("sample", "emoji")
    except DataError:  # the run says it, when the other processes have met this one
        return False


def overridden(recipe: "Recipe", options: argparse.Namespace) -> "Recipe":
    """The recipe with what the command line changes: any field, as ``--stage-b.optimization.images 1000``."""
    import tyro

    said, prompts = io.StringIO(), recipe.preview_prompts
    try:
        # Help has colours on a terminal.
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(unfiltered(sys.stdout)):
            recipe = tyro.cli(
                type(recipe),
                default=recipe,
                args=options.overrides,
                prog=f"wuerstchen train {recipe.name}",
                config=(tyro.conf.AvoidSubcommands,),  # the kind of Stage B is the recipe's
            )
    except SystemExit as stopped:
        if not stopped.code:
            raise
        # tyro frames its message; within the frame it is the user's one line.
        lines = (re.sub(r"^[│ ]+|[│ ]+$", "", line) for line in said.getvalue().splitlines())
        body = " ".join(line for line in lines if line and not re.match(r"[╭╰─]", line))
        raise UserError(re.sub(r"^Error parsing [\w.-]+: | *For full helptext.*$", "", body)) from None
    changes = {name: value for name in ("data", "seed") if (value := getattr(options, name)) is not None}
    own = recipe.preview_prompts == prompts
    if own and options.data not in (None, recipe.data) and not _is_emoji(options.data):
        changes["preview_prompts"] = ()  # captions of the data in place of prompts about other things
    if options.compressor_init is not None:
        changes["stage_b"] = dataclasses.replace(recipe.stage_b, compressor_init=options.compressor_init)
    return dataclasses.replace(recipe, **changes)


def _report(options: argparse.Namespace) -> int:
    from wuerstchen.train.report.page import write_report

    print(write_report(options.folder, options.out, tariff_of(options)))
    return 0

"""``wuerstchen train``, ``report`` and ``export``."""

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

from wuerstchen.checkpoints.hub import is_bundled
from wuerstchen.cli.options import JoinedData, Parser, add_device_option, add_tariff_options, tariff_of
from wuerstchen.errors import DataError, UserError
from wuerstchen.terminal import unfiltered

if TYPE_CHECKING:
    from collections.abc import Callable

    from wuerstchen.train.config import Recipe


def add_train(commands: "argparse._SubParsersAction[Parser]") -> None:
    train = commands.add_parser(
        "train", help="train a model; the same command resumes an interrupted run", add_help=False
    )
    train.set_defaults(run=_train, parser=train, takes_overrides=True, resumes=True)
    train.add_argument("recipe", nargs="?", metavar="RECIPE", help="name of a recipe, listed below")
    train.add_argument("--run-dir", type=Path, help="folder of the run (default: runs/RECIPE)")
    train.add_argument(
        "--data",
        action=JoinedData,
        help="data set: any source that 'data prepare' takes, a prepared one, or 'sample', the bundled one "
        "(default: the recipe's own); repeat it to mix several, with weights as in --data A=3 --data B=1",
    )
    train.add_argument("--seed", type=int, help="random seed of the run (default: 0)")
    train.add_argument(
        "--compressor-init",
        "--compressor",
        help="the compressor if --start-from has none, or its initial weights, or those of its backbone",
    )
    train.add_argument(
        "--width",
        type=float,
        default=1.0,
        help="multiplier for the width of all trained networks, at most 1 (default: 1)",
    )
    train.add_argument(
        "--depth",
        type=float,
        default=1.0,
        help="multiplier for the depth of all trained networks, at most 1 (default: 1)",
    )
    train.add_argument(
        "--add-phase",
        action="append",
        choices=("b", "c"),
        default=[],
        help="add a phase to Stage B or C, a copy of its last one; change it with options such as "
        "--stage-c.phases.0.image-size; repeatable",
    )
    add_device_option(train)
    train.add_argument(
        "--accept-changed-data", action="store_true", help="resume even though the data set has changed"
    )
    train.add_argument(
        "--change",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change a setting of a run from its newest checkpoint on, such as learning_rate=1e-5, "
        "images=400000, precision=fp32 or skip+=NAME; the change is recorded in the run folder; repeatable",
    )
    train.add_argument(
        "--end-now", action="store_true", help="end the run at its newest checkpoint and write the model"
    )
    train.add_argument(
        "--tensorboard", action="store_true", help="also write TensorBoard event files, to RUN/tensorboard"
    )
    train.add_argument(
        "--no-rehearsal",
        action="store_true",
        help="start at once, without first measuring how long the run will take",
    )
    add_tariff_options(train)


def add_report(commands: "argparse._SubParsersAction[Parser]") -> None:
    report = commands.add_parser(
        "report", help="write a page about a run: loss curves, previews, cost, skipped images"
    )
    report.set_defaults(run=_report)
    report.add_argument("folder", type=Path, metavar="RUN", help="folder of the run")
    report.add_argument("--out", type=Path, metavar="FILE", help="page to write (default: RUN/report.html)")
    add_tariff_options(report)


def add_export(commands: "argparse._SubParsersAction[Parser]") -> None:
    export = commands.add_parser(
        "export", help="write a checkpoint of a run as a model, during training or after it"
    )
    export.set_defaults(run=_export)
    export.add_argument("folder", type=Path, metavar="RUN", help="folder of the run")
    export.add_argument("target", type=Path, metavar="OUT", help="folder to create, in the native layout")
    export.add_argument(
        "--checkpoint",
        default="newest",
        metavar="WHICH",
        help="newest, best (lowest validation loss), or a number of images (default: newest)",
    )
    export.add_argument(
        "--stage", metavar="S", help="stage of the checkpoint, as in RUN/stage_S (default: the last)"
    )
    export.add_argument(
        "--weights",
        choices=("average", "raw"),
        default="average",
        help="averaged weights (EMA), or the raw weights being trained (default: average)",
    )
    export.add_argument(
        "--storage",
        choices=("float32", "float16", "int8"),
        help="data type of the stored weights (default: the recipe's)",
    )
    export.add_argument(
        "--max-shard-size",
        default="",
        metavar="SIZE",
        help="split larger weight files into shards of at most this size, such as 16MB or 16MiB",
    )


def _export(options: argparse.Namespace) -> int:
    from wuerstchen.train.export import export

    said = export(
        options.folder,
        options.target,
        checkpoint=options.checkpoint,
        stage=options.stage,
        weights=options.weights,
        storage=options.storage,
        max_shard_size=options.max_shard_size,
    )
    print(said)
    return 0


def _train(options: argparse.Namespace) -> int:
    asked_for_help = bool({"-h", "--help"} & set(options.overrides))
    from wuerstchen.recipes import RECIPES
    from wuerstchen.recipes.scale import scaled
    from wuerstchen.train.config import with_phase
    from wuerstchen.train.stage_table import result_of

    # python -OO removes docstrings.
    about = {name: (make.__doc__ or "").partition("\n")[0] for name, make in RECIPES.items()}
    if asked_for_help:
        print(options.parser.format_help())
        print("recipes:")
        for name, line in about.items():
            print(f"  {name}: {line}" if line else f"  {name}")
        print()
        if options.recipe not in RECIPES:
            print("All fields of a recipe are options too. wuerstchen train RECIPE --help lists them.")
            return 0
    if options.recipe is None:
        raise UserError(f"no recipe was given. Use one of {', '.join(RECIPES)}. See wuerstchen train --help")
    if options.recipe not in RECIPES:
        raise UserError(
            f"unknown recipe '{options.recipe}'. Give one of {', '.join(RECIPES)} before the options."
        )
    full = RECIPES[options.recipe]()
    options.overrides = _with_prefixes(full, options.overrides)
    if asked_for_help and result_of(full):
        print("Options of stage-lora and stage-lora.optimization work without this prefix, as in --rank 8.\n")
    for stage in options.add_phase:
        full = with_phase(full, stage)
    recipe = overridden(full, options)
    if (options.width, options.depth) != (1, 1):
        # The options decide which stages start from new weights. A width given as an option takes precedence.
        recipe = dataclasses.replace(recipe, vqgan=full.vqgan, decoder=full.decoder, prior=full.prior)
        smaller = scaled(recipe, options.width, options.depth)
        shapes = {"vqgan": smaller.vqgan, "decoder": smaller.decoder, "prior": smaller.prior}
        recipe = overridden(dataclasses.replace(full, **shapes), options)

    from wuerstchen.train.engine.loop import Interrupted
    from wuerstchen.train.report.announce import RunMonitor
    from wuerstchen.train.report.cost import Tariff
    from wuerstchen.train.run import train

    tariff = tariff_of(options) or Tariff()
    monitor = RunMonitor(tariff=tariff, tensorboard=options.tensorboard, rehearse=not options.no_rehearsal)
    run_dir = options.run_dir or Path("runs") / recipe.name
    is_main = os.environ.get("RANK", "0") == "0"  # torchrun sets it
    if is_main:
        print(f"Recipe {recipe.name} in {run_dir}. {_about(RECIPES[options.recipe], recipe)}")
    try:
        model = train(
            recipe,
            run_dir,
            device=options.device,
            accept_changed_data=options.accept_changed_data,
            monitor=monitor,
            changes=options.change,
            end_now=options.end_now,
        )
    except Interrupted as stopped:
        state = "A checkpoint is saved" if stopped.images else "This stage has no checkpoint yet"
        print(f"{stopped}. {state}. Start the same command again to resume", file=sys.stderr)
        return 130
    if is_main:
        use = _use_of(recipe, shlex.quote(str(model)))
        print(f"{model}: generate images with wuerstchen generate {use} ...")
    return 0


def _with_prefixes(recipe: "Recipe", overrides: list[str]) -> list[str]:
    """The options of a recipe for an adapter, with the prefixes that they may lack: ``--rank`` becomes
    ``--stage-lora.rank``."""
    from wuerstchen.train.config import Optimization, StageLoraConfig
    from wuerstchen.train.stage_table import result_of

    if not result_of(recipe):
        return overrides
    prefixes = {field.name: "stage-lora.optimization" for field in dataclasses.fields(Optimization)}
    prefixes |= {field.name: "stage-lora" for field in dataclasses.fields(StageLoraConfig)}
    found = []
    for text in overrides:
        option, equals, value = text.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        prefix = prefixes.get(name) or prefixes.get(name.removeprefix("no_"))
        is_option = option.startswith("--") and prefix is not None
        found.append(f"--{prefix}.{option[2:]}{equals}{value}" if is_option else text)
    return found


def _use_of(recipe: "Recipe", result: str) -> str:
    """The options of ``generate`` that use what a run has made."""
    from wuerstchen.train.stage_table import result_of

    if not result_of(recipe):
        return f"--model {result}"
    model = "" if is_bundled(recipe.start_from) else f"--model {shlex.quote(recipe.start_from)} "
    return f"{model}--lora {result}"


def _about(make: "Callable[[], Recipe]", recipe: "Recipe") -> str:
    """The recipe's docstring, or a note that the docstring does not apply because the data set differs."""
    from wuerstchen.train.stage_table import result_of

    if recipe.data == make().data or result_of(recipe):  # adapters have no data of their own
        return " ".join((make.__doc__ or "").split())
    return (
        f"It is trained on {recipe.data} instead of its own data, {make().data}, so the time, cost and "
        "result that it states do not apply"
    )


def _is_emoji(data: str) -> bool:
    """Whether the data are emoji, which the recipes' own prompts describe."""
    from wuerstchen.data.open import kind_of

    try:
        return kind_of(data).name in ("sample", "emoji")
    except DataError:  # the run reports it, once all ranks have started
        return False


def overridden(recipe: "Recipe", options: argparse.Namespace) -> "Recipe":
    """The recipe with the fields that the command line sets, as ``--stage-b.optimization.images 1000``."""
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
                config=(tyro.conf.AvoidSubcommands,),  # the recipe decides the kind of Stage B
            )
    except SystemExit as stopped:
        if not stopped.code:
            raise
        # tyro draws a frame around its message. Keep only the text in it.
        lines = (re.sub(r"^[│ ]+|[│ ]+$", "", line) for line in said.getvalue().splitlines())
        body = " ".join(line for line in lines if line and not re.match(r"[╭╰─]", line))
        raise UserError(re.sub(r"^Error parsing [\w.-]+: | *For full helptext.*$", "", body)) from None
    changes = {name: value for name in ("data", "seed") if (value := getattr(options, name)) is not None}
    own = recipe.preview_prompts == prompts
    if own and options.data not in (None, recipe.data) and not _is_emoji(options.data):
        changes["preview_prompts"] = ()  # use captions of the data: the prompts describe other things
    if options.compressor_init is not None:
        changes["stage_b"] = dataclasses.replace(recipe.stage_b, compressor_init=options.compressor_init)
    recipe = dataclasses.replace(recipe, **changes)
    return _of_adapter(recipe, options.overrides) if recipe.trains("lora") else recipe


def _of_adapter(recipe: "Recipe", overrides: list[str]) -> "Recipe":
    """The recipe of an adapter with its length as ``overrides`` set it, and intervals that fit. Refuses
    options that have no effect."""
    from wuerstchen.recipes.lora import with_batches

    given = {text.partition("=")[0].replace("_", "-") for text in overrides if text.startswith("--")}
    for option in sorted(given - {"--stage-b.compressor-init"}):
        stage = option.partition(".")[0]
        if stage in ("--stage-a", "--stage-b", "--stage-c", "--stage-few", "--stage-few-b"):
            raise UserError(
                f"{option} has no effect on an adapter. Leave it out, or use one of --stage-lora."
            )
    if "--stage-lora.optimization.images" in given:
        if "--stage-lora.updates" in given:
            raise UserError(
                "--updates and --optimization.images both set the length of the training. Use one of them."
            )
        recipe = dataclasses.replace(recipe, stage_lora=dataclasses.replace(recipe.stage_lora, updates=None))
    return with_batches(recipe, {option.rpartition(".")[2].lstrip("-").replace("-", "_") for option in given})


def _report(options: argparse.Namespace) -> int:
    from wuerstchen.train.report.page import write_report

    print(write_report(options.folder, options.out, tariff_of(options)))
    return 0

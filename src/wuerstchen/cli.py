"""The command line: parse, call, print. What it does is done elsewhere.

Nothing heavy is imported until a command needs it, so ``wuerstchen --help`` answers at once.
"""

import argparse
import contextlib
import dataclasses
import io
import math
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import wuerstchen
from wuerstchen.errors import UserError, UserNotice

if TYPE_CHECKING:
    from wuerstchen.checkpoints.layouts import Sources
    from wuerstchen.pipeline import Progress, Sampling, Wuerstchen
    from wuerstchen.train.config import Recipe
    from wuerstchen.train.cost import Tariff

BATCH_SIZE = 8  # pictures drawn at a time
MAX_GRID = 400  # pictures that a grid may hold

EXAMPLES = """examples:
  wuerstchen generate "a 3D render of a purple camel on a blue background"
  wuerstchen generate "a cat" "a red car" --count 3 --grid --out grid.png
  wuerstchen generate "a red car" --init photo.jpg --strength 0.7
  wuerstchen reconstruct photo.jpg
  wuerstchen data emoji data/emoji
  wuerstchen data prepare photos prepared/photos --size 512
  wuerstchen train tiny --run-dir runs/tiny
  wuerstchen report runs/tiny
  wuerstchen evaluate runs/mini/model --data data/emoji --out evaluation
  wuerstchen generate "a cat" --model warp-ai/wuerstchen --precision float16
  wuerstchen convert warp-ai/wuerstchen models/wuerstchen --layout native
  wuerstchen average runs/a/model runs/b/model models/average
  wuerstchen doctor --model warp-ai/wuerstchen
  wuerstchen serve --port 8042
"""


class _Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0, or 2 for what the user can mend, 130 after Ctrl-C, 143
    after SIGTERM."""
    if isinstance(
        sys.stdout, io.TextIOWrapper
    ):  # a prompt in a file name may be more than the terminal can show
        sys.stdout.reconfigure(errors="backslashreplace")
    # Threads that wait by spinning take the cores from each other as soon as anything else runs: drawing then
    # takes several times as long. OpenMP reads this when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Warnings of torch's C++ part, with a trace each, for one where a process of a run has ended; likewise.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with warnings.catch_warnings():
        # Only what is meant for the user is shown, and never as a traceback.
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserNotice)
        warnings.showwarning = _WarningPrinter()
        return _run(arguments)


class _WarningPrinter:
    """Prints each warning once, beside a progress bar and not into it."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def __call__(self, message: Warning | str, *_: object, **__: object) -> None:
        from tqdm import tqdm

        if str(message) not in self.seen:
            self.seen.add(str(message))
            tqdm.write(f"Warning: {message}", file=sys.stderr)


def _run(arguments: Sequence[str] | None) -> int:
    try:
        known, others = _parser().parse_known_args(arguments)
        if others and known.run is not _train:
            raise UserError(
                f"{' '.join(others)} is no option of this command; see wuerstchen {known.command} --help"
            )
        known.overrides = others
        with _raising_on_sigterm():
            return known.run(known)
    except _Terminated:
        goes_on = known.run in (_train, _data_prepare)
        print(f"stopped by SIGTERM{'; start the same command again to go on' * goes_on}", file=sys.stderr)
        return 128 + signal.SIGTERM
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Whoever read our output has gone, as ``| head`` does; what is left of it goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a locked folder, say, wherever it was met
        print(f"Error: {error}; check its name, your rights to it, and the space there", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


class _Terminated(KeyboardInterrupt):
    """SIGTERM came."""


@contextlib.contextmanager
def _raising_on_sigterm() -> "Iterator[None]":
    """Ends a command on SIGTERM as Ctrl-C does. The training loop answers it by itself, with a checkpoint."""

    def stop(number: int, frame: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield  # signals can only be caught there
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="wuerstchen",
        description="Text to image in a latent map shrunk 42 times.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"wuerstchen {wuerstchen.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    generate = commands.add_parser("generate", help="draw pictures of prompts")
    generate.set_defaults(run=_generate)
    generate.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to draw, one picture a prompt")
    generate.add_argument("--negative", default="", help="what to steer away from")
    generate.add_argument("--count", type=int, default=1, help="pictures of each prompt (1)")
    generate.add_argument("--size", type=_size, help="N or WIDTHxHEIGHT in pixels (the model's own)")
    _add_guidance_options(generate)
    generate.add_argument(
        "--init", type=Path, metavar="IMAGE", help="begin with this picture; without a prompt, vary it"
    )
    generate.add_argument(
        "--strength", type=float, default=0.7, help="how much of it may change, above 0 to 1 (0.7)"
    )
    generate.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:SCALE]", help="adapter for Stage C; repeatable"
    )
    generate.add_argument("--grid", action="store_true", help="one picture with all of them, a row a prompt")
    _add_drawing_options(generate)

    reconstruct = commands.add_parser("reconstruct", help="squeeze a picture through the map and back")
    reconstruct.set_defaults(run=_reconstruct)
    reconstruct.add_argument("image", type=Path, metavar="IMAGE", help="picture to squeeze, cut to a square")
    reconstruct.add_argument("--size", type=int, help="side of the square in pixels (the model's own)")
    _add_drawing_options(reconstruct)

    convert = commands.add_parser("convert", help="write a model in another layout")
    convert.set_defaults(run=_convert)
    convert.add_argument("source", metavar="SRC", help="model in any layout: a path, or a name on the hub")
    convert.add_argument("target", type=Path, metavar="DST", help="new folder")
    convert.add_argument("--layout", choices=("native", "diffusers", "original", "paddle"), required=True)
    convert.add_argument(
        "--storage",
        choices=("float32", "float16", "int8"),
        default="float32",
        help="how weights are stored (float32); int8 is for native",
    )
    convert.add_argument(
        "--leave-out", nargs="+", default=[], metavar="PART", help="parts that may be left behind"
    )
    _add_source_options(convert)

    average = commands.add_parser(
        "average", help="average the weights of two models, as the published Stage C is an average"
    )
    average.set_defaults(run=_average)
    average.add_argument("first", metavar="A", help="model in any layout: a path, or a name on the hub")
    average.add_argument("second", metavar="B", help="another of the same shape")
    average.add_argument("target", type=Path, metavar="OUT", help="new folder, in the native layout")
    average.add_argument("--share", type=float, default=0.5, help="of B, from 0 to 1 (0.5)")

    doctor = commands.add_parser(
        "doctor", help="check a model: files, versions, three pictures and how long they took"
    )
    doctor.set_defaults(run=_doctor)
    doctor.add_argument(
        "--model", help="model in any layout, or a name on the hub (the model in the package)"
    )
    doctor.add_argument("--out", type=Path, default=Path("doctor"), help="folder of the pictures (doctor)")
    doctor.add_argument("--device", help="cpu, cuda or mps (a GPU if there is one)")
    _add_source_options(doctor)
    _add_precision_options(doctor)

    _add_serve(commands)

    data = commands.add_parser("data", help="build data sets")
    kinds = data.add_subparsers(dest="kind", required=True, metavar="KIND", parser_class=_Parser)
    emoji = kinds.add_parser("emoji", help="6,685 captioned pictures in five styles, from their npm packages")
    emoji.set_defaults(run=_data_emoji)
    emoji.add_argument("out", type=Path, metavar="OUT")

    _add_prepare(kinds)

    evaluate = commands.add_parser(
        "evaluate",
        help="score a model on held-out pictures and composed prompts",
        description="Scores a model on two fixed lists; writes report.json and report.html.",
    )
    evaluate.set_defaults(run=_evaluate)
    evaluate.add_argument(
        "model", nargs="?", type=Path, metavar="MODEL", help="model folder (the model in the package)"
    )
    evaluate.add_argument(
        "--data", type=Path, help="built emoji set (data/emoji, or none where --photos is given alone)"
    )
    evaluate.add_argument(
        "--split", choices=("val", "test", "all"), default="all", help="choose on val; test is for the report"
    )
    evaluate.add_argument(
        "--lists", type=_lists, default=("a", "b"), help="a: held-out pairs, b: composed prompts (a,b)"
    )
    evaluate.add_argument(
        "--limit", type=int, help="the first N of each list and split only, for a quick look"
    )
    evaluate.add_argument(
        "--before",
        type=Path,
        metavar="FOLDER",
        help="the model before it was stored small, to see what that cost",
    )
    evaluate.add_argument(
        "--photos", type=Path, metavar="DIR", help="also take the photographs in DIR through Stages A and B"
    )
    evaluate.add_argument(
        "--out", type=Path, default=Path("evaluation"), help="folder of the report (evaluation)"
    )
    evaluate.add_argument("--batch-size", type=int, help="pictures drawn at a time (8 on a CPU, 64 on a GPU)")
    _add_guidance_options(evaluate)
    _add_sampling_options(evaluate)

    train = commands.add_parser(
        "train", help="train a model; the same command goes on after any stop", add_help=False
    )
    train.set_defaults(run=_train, parser=train)
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
    train.add_argument("--device", help="cpu, cuda or mps (a GPU if there is one)")
    train.add_argument("--accept-changed-data", action="store_true", help="go on although the data changed")
    train.add_argument("--tensorboard", action="store_true", help="event files too, in RUN/tensorboard")
    train.add_argument(
        "--no-rehearsal", action="store_true", help="begin at once, without measuring what all will cost"
    )
    _add_tariff_options(train)

    report = commands.add_parser(
        "report", help="one page of a run, finished or not: curves, previews, cost, what was skipped"
    )
    report.set_defaults(run=_report)
    report.add_argument("folder", type=Path, metavar="RUN", help="folder of the run")
    report.add_argument("--out", type=Path, metavar="FILE", help="the page (RUN/report.html)")
    _add_tariff_options(report)
    return parser


def _add_serve(commands: "argparse._SubParsersAction[_Parser]") -> None:
    serve = commands.add_parser(
        "serve",
        help="a page to draw on and an HTTP service, OpenAI's clients' form included",
        description="Serves a model until Ctrl-C or SIGTERM. docs/serving.md describes the service.",
        argument_default=argparse.SUPPRESS,  # what is not given is as in ServeConfig
    )
    serve.set_defaults(run=_serve)
    serve.add_argument("--host", help="address; any but loopback needs tokens (127.0.0.1)")
    serve.add_argument("--port", type=int, help="0 takes one that is free (8042)")
    serve.add_argument("--model", help="model in any layout, or a name on the hub (the model in the package)")
    serve.add_argument(
        "--device", action="append", default=[], help="cpu, cuda, cuda:1 ...; repeatable, a worker for each"
    )
    serve.add_argument(
        "--precision",
        choices=("float32", "bfloat16", "float16"),
        help="(float16 on NVIDIA GPUs, float32 elsewhere)",
    )
    serve.add_argument(
        "--token-file", type=Path, default=None, metavar="FILE", help="tokens of clients, one a line"
    )
    serve.add_argument(
        "--allowed-host", action="append", default=[], metavar="NAME", help="name it is called by; repeatable"
    )
    serve.add_argument(
        "--proxy", action="append", default=[], metavar="ADDRESS", help="whose X-Forwarded-For is believed"
    )
    serve.add_argument("--results-dir", type=Path, metavar="DIR", help="of finished pictures (temporary)")
    serve.add_argument("--result-bytes", type=int, metavar="N", help="most that pictures take (1 GiB)")
    serve.add_argument(
        "--deterministic", action="store_true", help="the same bits whoever shares a batch; slower"
    )
    serve.add_argument("--max-batch", type=int, metavar="N", help="pictures drawn together (8)")
    serve.add_argument("--max-waiting", type=int, metavar="N", help="pictures in the queue (256)")
    serve.add_argument("--max-jobs-per-client", type=int, metavar="N", help="waiting or being drawn (16)")
    serve.add_argument("--max-steps", type=int, metavar="N", help="of a stage (100)")
    serve.add_argument(
        "--max-pixels", type=int, metavar="N", help="of a picture (four times the model's own size)"
    )
    serve.add_argument("--upload-bytes", type=int, metavar="N", help="(8 MiB)")
    serve.add_argument("--queue-timeout", type=float, metavar="S", help="of a job (600)")
    serve.add_argument("--run-timeout", type=float, metavar="S", help="of a batch (600)")
    serve.add_argument("--grace", type=float, metavar="S", help="to finish what is drawn when stopped (30)")
    serve.add_argument(
        "--filter", metavar="MODULE:FUNCTION", help="safety filter, asked about prompts and pictures"
    )
    serve.add_argument(
        "--log-prompts", action="store_true", help="prompts in the log, where none are otherwise"
    )
    serve.add_argument(
        "--c2pa-certificate", type=Path, metavar="FILE", help="chain to sign pictures with, PEM"
    )
    serve.add_argument("--c2pa-key", type=Path, metavar="FILE", help="its private key, ES256, PEM")


def _add_prepare(kinds: "argparse._SubParsersAction[_Parser]") -> None:
    prepare = kinds.add_parser(
        "prepare",
        help="maps and texts of your pictures, made once for Stage C; goes on after any stop",
        description="Stores the compressor's map of every picture, and its caption, in the new folder OUT. "
        "Several processes share the work: torchrun --nproc-per-node 8 -m wuerstchen data prepare SRC OUT",
    )
    prepare.set_defaults(run=_data_prepare)
    prepare.add_argument(
        "source",
        metavar="SRC",
        help="folder of images, of .tar shards or of .parquet files, a pattern of them in quotes, "
        "a built emoji set, sample for the one in the package, or a name on the hub",
    )
    prepare.add_argument("out", type=Path, metavar="OUT", help="new folder")
    prepare.add_argument(
        "--format", choices=("folder", "emoji", "webdataset", "parquet", "hub"), help="of SRC, if unclear"
    )
    prepare.add_argument("--split", default="train", help="of a data set on the hub (train)")
    prepare.add_argument("--image-column", metavar="NAME", help="of parquet files and the hub")
    prepare.add_argument("--text-column", metavar="NAME", help="likewise")
    prepare.add_argument(
        "--model", help="whose compressor and text encoder are used (the model in the package)"
    )
    prepare.add_argument("--text-encoder", metavar="SRC", help="for .pt files, which hold none")
    prepare.add_argument("--revision", help="of a model on the hub")
    prepare.add_argument("--size", type=int, help="a picture gets about SIZE x SIZE pixels (the model's own)")
    prepare.add_argument(
        "--max-ratio",
        type=float,
        default=2.0,
        help="longest to shortest side of a bucket (2); 1 makes all pictures square",
    )
    prepare.add_argument(
        "--crop", choices=("centre", "random", "saliency"), default="centre", help="(centre)"
    )
    prepare.add_argument("--crops", type=int, default=1, help="stored of each picture (1)")
    prepare.add_argument("--min-size", type=int, help="least shorter side of the original, in pixels")
    prepare.add_argument("--max-size", type=int, help="greatest longer side")
    prepare.add_argument("--max-aspect", type=float, help="greatest longer over shorter side")
    prepare.add_argument("--max-watermark", type=float, help="greatest pwatermark; the original took 0.5")
    prepare.add_argument("--min-aesthetic", type=float, help="least aesthetic score; the original took 5")
    prepare.add_argument("--max-unsafe", type=float, help="greatest punsafe; the original took 0.99")
    prepare.add_argument("--strict", action="store_true", help="drop what lacks a score that is asked for")
    prepare.add_argument(
        "--text-states", choices=("none", "fp16", "int8"), default="none", help="stored (none)"
    )
    prepare.add_argument(
        "--text-positions",
        choices=("all", "real"),
        help="whether states of padding are stored; "
        "all for models that attend to it, as the published ones (as the model does)",
    )
    prepare.add_argument("--seed", type=int, default=0, help="of the crops (0)")
    prepare.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="(float32)")
    prepare.add_argument("--batch-size", type=int, default=32, help="pictures at a time (32)")
    prepare.add_argument("--shard-size", type=int, default=1024, help="images in a file (1024)")
    prepare.add_argument("--workers", type=int, default=8, help="threads that decode pictures (8)")
    prepare.add_argument(
        "--device", help="cpu, cuda or mps (a GPU if there is one; its own for each process)"
    )


def _add_tariff_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--region", metavar="CC", help="country whose electricity is used, as in DE, for CO2")
    parser.add_argument("--co2-per-kwh", type=float, metavar="KG", help="kg of CO2 a kWh (0.48, the world's)")
    parser.add_argument("--price-per-hour", type=float, metavar="P", help="money an hour of the machine")
    parser.add_argument("--price-per-kwh", type=float, metavar="P", help="money a kWh")


def _tariff(options: argparse.Namespace) -> "Tariff | None":
    """None where no option says anything."""
    from wuerstchen.train.cost import make_tariff

    given = (options.region, options.co2_per_kwh, options.price_per_hour, options.price_per_kwh)
    return None if given == (None,) * 4 else make_tariff(*given)


def _add_drawing_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", help="model in any layout, or a name on the hub (the model in the package)"
    )
    _add_source_options(parser)
    _add_precision_options(parser)
    parser.add_argument("--out", type=Path, default=Path(), help="folder, or file name ending in .png (here)")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; the next has the next (0)")
    _add_sampling_options(parser)


def _add_source_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prior", metavar="SRC", help="Stage C from elsewhere: a folder, or a name on the hub"
    )
    parser.add_argument("--text-encoder", metavar="SRC", help="for .pt files, which hold none")
    parser.add_argument("--decoder-text-encoder", metavar="SRC", help="likewise, Stage B's")
    parser.add_argument("--revision", help="of a model on the hub")


def _add_precision_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16", "float16"),
        help="(float16 on NVIDIA GPUs, float32 elsewhere)",
    )
    parser.add_argument(
        "--low-memory",
        nargs="?",
        const="stage",
        choices=("stage", "layer"),
        help="keep one network at a time on the GPU, or one layer",
    )


def _sources(options: argparse.Namespace) -> "Sources":
    from wuerstchen.checkpoints.layouts import Sources

    return Sources(
        prior=options.prior,
        text_encoder=options.text_encoder,
        decoder_text_encoder=options.decoder_text_encoder,
        revision=options.revision,
    )


def _load(options: argparse.Namespace) -> "Wuerstchen":
    from wuerstchen.pipeline import load

    return load(
        options.model,
        options.device,
        precision=options.precision,
        low_memory=options.low_memory,
        sources=_sources(options),
    )


def _add_guidance_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--guidance", type=float, help="guidance scale of Stage C: above 1 follows the prompt more strictly"
    )
    parser.add_argument("--prior-steps", type=int, help="steps of Stage C")
    parser.add_argument(
        "--prior-sampler",
        choices=["ddpm", "dpm"],
        help="of Stage C: ddpm, as published, or dpm, of second order, for fewer steps",
    )


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--decoder-steps", type=int, help="steps of Stage B")
    parser.add_argument("--decoder-guidance", type=float, help="guidance of Stage B by the map; 1 is none")
    parser.add_argument("--decoder-shift", type=float, help="how far Stage B's steps lean towards noise")
    parser.add_argument("--device", help="cpu, cuda or mps (a GPU if there is one)")


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"'{text}' is neither N nor WIDTHxHEIGHT; write 256 or 256x384")
    return int(match[1]), int(match[2] or match[1])


def _lists(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    if not set(names) <= {"a", "b"}:
        raise argparse.ArgumentTypeError(f"'{text}' names no lists; write a, b or a,b")
    return names


def _sampling(options: argparse.Namespace) -> "Sampling":
    from wuerstchen.pipeline import Sampling

    return Sampling(
        guidance=getattr(options, "guidance", None),
        prior_steps=getattr(options, "prior_steps", None),
        prior_sampler=getattr(options, "prior_sampler", None),
        decoder_steps=options.decoder_steps,
        decoder_guidance=options.decoder_guidance,
        decoder_shift=options.decoder_shift,
    )


def _generate(options: argparse.Namespace) -> int:
    from wuerstchen.images import grid, open_image, save_png

    began = time.monotonic()
    if options.init is not None and not options.prompts:
        options.prompts = [""]
    if not options.prompts:
        raise UserError('no prompt was given, so there is nothing to draw; try: wuerstchen generate "a cat"')
    if options.count < 1:
        raise UserError(f"count {options.count} draws nothing; use at least 1")
    total = len(options.prompts) * options.count
    if options.grid and total > MAX_GRID:
        raise UserError(
            f"a grid of {total} pictures is too large; draw at most {MAX_GRID}, or leave out --grid"
        )
    one_file = _is_file(options.out)
    if one_file and not options.grid and total > 1:
        raise UserError(f"{options.out} is one file for {total} pictures; add --grid, or name a folder")
    sampling = _sampling(options)
    adapters = [_adapter(text) for text in options.lora]
    init = None if options.init is None else open_image(options.init)

    from wuerstchen.pipeline import check_seed

    check_seed(options.seed, total)
    model = _load(options)
    for path, scale in adapters:
        model.load_lora(path, scale)
    settings = {"model": options.model or "bundled", "negative": options.negative}
    if init is not None:
        settings |= {"init": options.init.name, "strength": options.strength}
    if adapters:
        settings["lora"] = " ".join(options.lora)
    settings |= model.settings_of(sampling)
    images = []
    with _progress() as progress:
        # Drawn a few at a time, so that each is on disk before the next are begun.
        for start in range(0, total, BATCH_SIZE):
            numbers = range(start, min(start + BATCH_SIZE, total))
            few: list[str] = [options.prompts[number // options.count] for number in numbers]
            drawn = model.generate(
                few,
                negative=options.negative,
                seed=options.seed + start,
                size=options.size,
                init=init,
                strength=options.strength,
                sampling=sampling,
                batch_size=BATCH_SIZE,
                progress=progress,
            )
            images += drawn if options.grid else []
            for number, (image, text) in enumerate(zip(drawn, few, strict=True), start=options.seed + start):
                if not options.grid:
                    name = _slug(text) if text or init is None else _slug(options.init.stem)
                    path = options.out if one_file else _free_name(options.out, f"{name}-{number}")
                    save_png(image, path, {"prompt": text, "seed": number, **settings}, drawn_by_a_model=True)
                    print(path)
    if options.grid:
        columns = options.count if options.count > 1 else math.isqrt(len(images) - 1) + 1
        path = options.out if one_file else _free_name(options.out, "grid")
        prompts = "\n".join(options.prompts)
        shown = {"prompt": prompts, "count": options.count, "seed": options.seed, **settings}
        save_png(grid(images, columns=columns), path, shown, drawn_by_a_model=True)
        print(path)
    print(f"{total} pictures in {time.monotonic() - began:.1f} s", file=sys.stderr)
    return 0


def _reconstruct(options: argparse.Namespace) -> int:
    from wuerstchen.images import grid, open_image, save_png

    one_file = _is_file(options.out)
    image = open_image(options.image)
    sampling = _sampling(options)

    model = _load(options)
    with _progress() as progress:
        result = model.reconstruct(
            image, seed=options.seed, size=options.size, sampling=sampling, progress=progress
        )
    path = options.out if one_file else _free_name(options.out, f"{_slug(options.image.stem)}-reconstructed")
    settings = {"image": options.image.name, "seed": options.seed, "model": options.model or "bundled"}
    settings |= {"size": result.image.width, **model.settings_of(sampling)}
    save_png(grid([result.original, result.image], columns=2), path, settings)
    channels, height, width = result.map_size
    print(path)
    print(
        f"map {channels}x{height}x{width}: {result.spatial_compression:.2f} times smaller a side, "
        f"{result.element_compression:.0f} times fewer numbers",
        file=sys.stderr,
    )
    return 0


def _adapter(text: str) -> tuple[Path, float]:
    """``FILE`` or ``FILE:SCALE``."""
    path, colon, scale = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        return Path(path), float(scale)
    except ValueError:
        raise UserError(f"adapter {text!r} ends in no number; write FILE, or FILE:0.8") from None


def _convert(options: argparse.Namespace) -> int:
    from wuerstchen.checkpoints.layouts import convert

    convert(
        options.source,
        options.target,
        options.layout,
        _sources(options),
        storage=options.storage,
        leave_out=options.leave_out,
    )
    print(options.target)
    return 0


def _average(options: argparse.Namespace) -> int:
    from wuerstchen.checkpoints.average import average

    changed = average(options.first, options.second, options.target, options.share)
    print(f"{options.target}: averaged {', '.join(changed)}")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from wuerstchen.doctor import examine
    from wuerstchen.images import check_writable

    check_writable(options.out)
    for line in examine(
        options.model,
        options.out,
        device=options.device,
        precision=options.precision,
        low_memory=options.low_memory,
        sources=_sources(options),
    ):
        print(line, flush=True)
    return 0


def _data_emoji(options: argparse.Namespace) -> int:
    from wuerstchen.data.emoji_build import build

    build(options.out)
    print(options.out)
    return 0


def _data_prepare(options: argparse.Namespace) -> int:
    from wuerstchen.data.filters import Filters
    from wuerstchen.data.prepare import Rank, prepare, summary
    from wuerstchen.data.prepare_networks import read_networks
    from wuerstchen.data.prepare_plan import PrepareConfig
    from wuerstchen.data.readers import open_reader
    from wuerstchen.pipeline import BUNDLED, default_device

    def chosen(kind: type) -> dict[str, object]:
        names = {field.name for field in dataclasses.fields(kind)}
        return {name: value for name, value in vars(options).items() if name in names}

    config = PrepareConfig(**{**chosen(PrepareConfig), "filters": Filters(**chosen(Filters))})
    rank = Rank.from_environment()
    device = default_device(options.device)
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        device = default_device(f"cuda:{os.environ['LOCAL_RANK']}")
    reader = open_reader(
        options.source,
        format=options.format,
        split=options.split,
        image_column=options.image_column,
        text_column=options.text_column,
    )
    networks = read_networks(
        options.model or BUNDLED, text_encoder=options.text_encoder, revision=options.revision
    )
    description = prepare(
        reader,
        options.out,
        networks,
        config,
        source=options.source,
        device=device,
        workers=options.workers,
        rank=rank,
        announce=lambda line: print(line, file=sys.stderr),
    )
    if description is not None:
        for line in summary(description):
            print(line)
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from wuerstchen.images import check_writable

    check_writable(options.out)
    sampling = _sampling(options)

    from wuerstchen.evaluate.page import write_report
    from wuerstchen.evaluate.report import evaluate, summary
    from wuerstchen.pipeline import BUNDLED, load

    data = options.data
    if data is None and options.photos is None:
        data = Path("data/emoji")
    report = evaluate(
        load(options.model, options.device, precision="float32"),
        data,
        lists=options.lists,
        splits=("val", "test") if options.split == "all" else (options.split,),
        limit=options.limit,
        sampling=sampling,
        before=None if options.before is None else load(options.before, options.device, precision="float32"),
        photos=options.photos,
        batch_size=options.batch_size,
        announce=lambda line: print(line, file=sys.stderr),
    )
    written = write_report(
        report,
        options.out,
        model=options.model or BUNDLED,
        before=options.before,
        name=str(options.model or "the model in the package"),
    )
    print(summary(report))
    for path in written:
        print(path)
    return 0


def _train(options: argparse.Namespace) -> int:
    asked_for_help = bool({"-h", "--help"} & set(options.overrides))
    from wuerstchen.recipes import RECIPES
    from wuerstchen.recipes.scale import scaled

    recipes = "; ".join(f"{name}: {(make.__doc__ or '').splitlines()[0]}" for name, make in RECIPES.items())
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
    recipe = _overridden(RECIPES[options.recipe](), options)
    if (options.width, options.depth) != (1, 1):
        # Options say which stages begin afresh; where they name a width too, theirs holds.
        full = RECIPES[options.recipe]()
        recipe = dataclasses.replace(recipe, vqgan=full.vqgan, decoder=full.decoder, prior=full.prior)
        smaller = scaled(recipe, options.width, options.depth)
        shapes = {"vqgan": smaller.vqgan, "decoder": smaller.decoder, "prior": smaller.prior}
        recipe = _overridden(dataclasses.replace(full, **shapes), options)

    from wuerstchen.train.cost import Tariff
    from wuerstchen.train.loop import Interrupted
    from wuerstchen.train.run import train
    from wuerstchen.train.watch import Watch

    tariff = _tariff(options) or Tariff()
    watch = Watch(tariff=tariff, tensorboard=options.tensorboard, rehearses=not options.no_rehearsal)
    run_dir = options.run_dir or Path("runs") / recipe.name
    leads = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started
    if leads:
        said = " ".join((RECIPES[options.recipe].__doc__ or "").split())
        print(f"Recipe {recipe.name} in {run_dir}. {said}")
    try:
        model = train(
            recipe,
            run_dir,
            device=options.device,
            accept_changed_data=options.accept_changed_data,
            watch=watch,
        )
    except Interrupted as stopped:
        print(f"{stopped}; a checkpoint is saved: start the same command again to go on", file=sys.stderr)
        return 130
    if leads:
        print(f"{model}: draw with wuerstchen generate --model {model} ...")
    return 0


def _report(options: argparse.Namespace) -> int:
    from wuerstchen.train.report import write_report

    print(write_report(options.folder, options.out, _tariff(options)))
    return 0


def _overridden(recipe: "Recipe", options: argparse.Namespace) -> "Recipe":
    """The recipe with what the command line changes: any field, as ``--stage-b.optimization.images 1000``."""
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
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
    if options.compressor_init is not None:
        changes["stage_b"] = dataclasses.replace(recipe.stage_b, compressor_init=options.compressor_init)
    return dataclasses.replace(recipe, **changes)


def _serve(options: argparse.Namespace) -> int:
    try:
        from wuerstchen.serve.server import run
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("wuerstchen"):
            raise
        raise UserError(
            f'serving needs the package {error.name}, which is not installed; pip install "wuerstchen[serve]"'
        ) from error
    from wuerstchen.serve.limits import ServeConfig, read_tokens

    names = {field.name for field in dataclasses.fields(ServeConfig)}
    config = ServeConfig(
        **{name: value for name, value in vars(options).items() if name in names},
        devices=tuple(options.device),
        tokens=() if options.token_file is None else read_tokens(options.token_file),
        allowed_hosts=tuple(options.allowed_host),
        proxies=tuple(options.proxy),
    )
    run(config, lambda text: print(text, flush=True))
    return 0


def _is_file(out: Path) -> bool:
    """Whether ``--out`` names a file; makes its folder and checks now that it can be written."""
    from wuerstchen.images import check_writable

    suffix = out.suffix.lower()
    if suffix in {".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff", ".bmp"}:
        raise UserError(f"{out} is no name for a PNG, which is what is written; end it in .png")
    if suffix == ".png" and out.is_dir():
        raise UserError(f"{out} is a folder; name a file in it, or a folder that does not end in .png")
    check_writable(out.parent if suffix == ".png" else out)
    return suffix == ".png"


@contextlib.contextmanager
def _progress() -> "Iterator[Progress]":
    """A bar over the steps of all stages."""
    from tqdm import tqdm

    with tqdm(unit="step", leave=False, dynamic_ncols=True, disable=None) as bar:

        def report(stage: str, step: int, steps: int) -> None:
            if step == 1:
                bar.set_description(stage, refresh=False)
                bar.reset(total=steps)
            bar.update()

        yield report


def _slug(text: str) -> str:
    """A file name's worth of a prompt, in letters, digits and dashes; names are limited in bytes."""
    name = re.sub(r"[^\w]+", "-", text.lower()).strip("-")[:60]
    return name.encode()[:150].decode(errors="ignore").strip("-") or "picture"


def _free_name(folder: Path, stem: str) -> Path:
    """``stem.png`` in the folder, numbered where that name is taken."""
    path = folder / f"{stem}.png"
    number = 2
    while path.exists():
        path = folder / f"{stem}-{number}.png"
        number += 1
    return path

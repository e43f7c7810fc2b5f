"""``wuerstchen data emoji`` and ``wuerstchen data prepare``."""

import argparse
import dataclasses
import os
import sys
from pathlib import Path

from wuerstchen.cli.options import Parser, precision_named


def add_data(commands: "argparse._SubParsersAction[Parser]") -> None:
    data = commands.add_parser("data", help="build data sets")
    kinds = data.add_subparsers(dest="kind", required=True, metavar="KIND", parser_class=Parser)
    emoji = kinds.add_parser("emoji", help="6,685 captioned pictures in five styles, from their npm packages")
    emoji.set_defaults(run=_data_emoji)
    emoji.add_argument("out", type=Path, metavar="OUT")
    _add_prepare(kinds)


def _add_prepare(kinds: "argparse._SubParsersAction[Parser]") -> None:
    prepare = kinds.add_parser(
        "prepare",
        help="maps and texts of your pictures, made once for Stage C; goes on after any stop",
        description="Stores the compressor's map of every picture, and its caption, in the new folder OUT. "
        "Several processes share the work: torchrun --nproc-per-node 8 -m wuerstchen data prepare SRC OUT",
    )
    prepare.set_defaults(run=_data_prepare, goes_on=True)
    prepare.add_argument(
        "source",
        metavar="SRC",
        help="folder of images, of .tar shards or of .parquet files, a pattern of them in quotes, "
        "what img2dataset or save_to_disk wrote, a built emoji set, sample for the one in the package, "
        "or a name on the hub",
    )
    prepare.add_argument("out", type=Path, metavar="OUT", help="new folder")
    prepare.add_argument(
        "--format",
        metavar="KIND",
        help="of SRC, if unclear: folder, emoji, webdataset, parquet, saved or hub",
    )
    prepare.add_argument("--split", help="of a data set on the hub, or saved (train)")
    prepare.add_argument(
        "--image-column",
        metavar="NAME",
        help="of parquet files and the hub; the extension of the images in tars; of a folder's metadata file",
    )
    prepare.add_argument(
        "--text-column",
        metavar="NAME",
        help="likewise; for tars and img2dataset's files also a field of the .json, "
        "for folders also the ending of the text files",
    )
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
    _add_filters(prepare)
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
    prepare.add_argument(
        "--precision",
        type=precision_named,
        choices=("float32", "bfloat16"),
        default="float32",
        help="of text states; maps are always made in float32 (float32)",
    )
    prepare.add_argument("--batch-size", type=int, default=32, help="pictures at a time (32)")
    prepare.add_argument("--shard-size", type=int, default=1024, help="images in a file (1024)")
    prepare.add_argument("--workers", type=int, default=8, help="threads that decode pictures (8)")
    prepare.add_argument(
        "--device", help="cpu, cuda or mps (a GPU if there is one; its own for each process)"
    )


def _add_filters(prepare: Parser) -> None:
    """Which images are kept."""
    prepare.add_argument("--min-size", type=int, help="least shorter side of the original, in pixels")
    prepare.add_argument("--max-size", type=int, help="greatest longer side")
    prepare.add_argument("--max-aspect", type=float, help="greatest longer over shorter side")
    prepare.add_argument(
        "--max-watermark", type=float, help="greatest watermark score; the original took 0.5"
    )
    prepare.add_argument("--min-aesthetic", type=float, help="least aesthetic score; the original took 5")
    prepare.add_argument(
        "--max-unsafe", type=float, help="greatest score of unsafe content; the original took 0.99"
    )
    prepare.add_argument(
        "--strict",
        action="store_true",
        help="drop images without a score that is filtered by; they are kept and counted otherwise",
    )


def _data_emoji(options: argparse.Namespace) -> int:
    from wuerstchen.data.emoji_build import build

    build(options.out)
    print(options.out)
    return 0


def _data_prepare(options: argparse.Namespace) -> int:
    from wuerstchen.checkpoints.hub import BUNDLED
    from wuerstchen.data.filters import Filters
    from wuerstchen.data.open import open_reader
    from wuerstchen.data.prepare import Rank, prepare, summary
    from wuerstchen.data.prepare_networks import read_networks
    from wuerstchen.data.prepare_plan import PrepareConfig
    from wuerstchen.device import default_device

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

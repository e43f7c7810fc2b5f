"""``wuerstchen data emoji`` and ``wuerstchen data prepare``."""

import argparse
import dataclasses
import os
import sys
from pathlib import Path

from wuerstchen.cli.options import Parser, add_device_option, precision_named

SOURCE_HELP = (
    "folder of images, .tar shards or .parquet files, or a quoted glob pattern; the output of img2dataset or "
    "save_to_disk; an emoji data set; 'sample', the bundled one; or a data set on the Hub"
)


def add_data(commands: "argparse._SubParsersAction[Parser]") -> None:
    data = commands.add_parser("data", help="build data sets")
    kinds = data.add_subparsers(dest="kind", required=True, metavar="KIND", parser_class=Parser)
    emoji = kinds.add_parser(
        "emoji", help="build the emoji data set: 6,685 captioned images in five styles, downloaded from npm"
    )
    emoji.set_defaults(run=_data_emoji)
    emoji.add_argument("out", type=Path, metavar="OUT", help="folder to create")
    _add_prepare(kinds)


def _add_prepare(kinds: "argparse._SubParsersAction[Parser]") -> None:
    prepare = kinds.add_parser(
        "prepare",
        help="encode images and captions once, to train Stage C on them; resumes after an interruption",
        description="Encodes each image into semantic latents and writes them with the caption to the new "
        "folder OUT. Several processes can share the work: "
        "torchrun --nproc-per-node 8 -m wuerstchen data prepare SRC OUT",
    )
    prepare.set_defaults(run=_data_prepare, resumes=True)
    prepare.add_argument("source", metavar="SRC", help=SOURCE_HELP)
    prepare.add_argument("out", type=Path, metavar="OUT", help="folder to create")
    _add_reading(prepare)
    _add_encoding(prepare)
    _add_filters(prepare)
    prepare.add_argument("--batch-size", type=int, default=32, help="images per batch (default: 32)")
    prepare.add_argument("--shard-size", type=int, default=1024, help="images per file (default: 1024)")
    prepare.add_argument(
        "--workers", type=int, default=8, help="number of threads that decode images (default: 8)"
    )
    add_device_option(prepare)


def _add_reading(prepare: Parser) -> None:
    """How SRC is read."""
    prepare.add_argument(
        "--format",
        metavar="KIND",
        help="format of SRC, if it is ambiguous: folder, emoji, webdataset, parquet, saved or hub",
    )
    prepare.add_argument(
        "--split", help="split of a data set from the Hub or from save_to_disk (default: train)"
    )
    prepare.add_argument(
        "--image-column",
        metavar="NAME",
        help="column of the images in parquet files, Hub data sets and a folder's metadata file; in tars, "
        "the file extension of the images",
    )
    prepare.add_argument(
        "--text-column",
        metavar="NAME",
        help="column of the captions; in tars and img2dataset output, a file extension or a field of the "
        ".json; in folders also the extension of the text files",
    )


def _add_encoding(prepare: Parser) -> None:
    """What is stored of each image."""
    prepare.add_argument(
        "--model", help="model whose compressor and text encoder are used (default: the bundled model)"
    )
    prepare.add_argument("--text-encoder", metavar="SRC", help="text encoder, which .pt files do not contain")
    prepare.add_argument(
        "--compressor", metavar="SRC", help="compressor, which published diffusers folders do not contain"
    )
    prepare.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    prepare.add_argument(
        "--size", type=int, help="images get about SIZE x SIZE pixels (default: the model's own size)"
    )
    prepare.add_argument(
        "--max-ratio",
        type=float,
        default=2.0,
        help="largest aspect ratio of a bucket; 1 makes all images square (default: 2)",
    )
    prepare.add_argument(
        "--crop",
        choices=("centre", "random", "saliency"),
        default="centre",
        help="where images are cropped to fit their bucket (default: centre)",
    )
    prepare.add_argument("--crops", type=int, default=1, help="crops per image (default: 1)")
    prepare.add_argument(
        "--text-states",
        choices=("none", "fp16", "int8"),
        default="none",
        help="also store the text encoder's states of the captions, in this format (default: none)",
    )
    prepare.add_argument(
        "--text-positions",
        choices=("all", "real"),
        help="store text states of all positions, or of real tokens only. Models that attend to padding, "
        "such as the published ones, need all (default: what the model needs)",
    )
    prepare.add_argument("--seed", type=int, default=0, help="seed of the crops (default: 0)")
    prepare.add_argument(
        "--precision",
        type=precision_named,
        choices=("float32", "bfloat16"),
        default="float32",
        help="precision of the text encoder; images are always encoded in float32 (default: float32)",
    )


def _add_filters(prepare: Parser) -> None:
    """Which images are kept."""
    prepare.add_argument("--min-size", type=int, help="smallest shorter side of an original image, in pixels")
    prepare.add_argument("--max-size", type=int, help="largest longer side of an original image, in pixels")
    prepare.add_argument("--max-aspect", type=float, help="largest aspect ratio, longer side by shorter side")
    prepare.add_argument(
        "--max-watermark", type=float, help="largest watermark score; the original Würstchen used 0.5"
    )
    prepare.add_argument(
        "--min-aesthetic", type=float, help="smallest aesthetic score; the original Würstchen used 5"
    )
    prepare.add_argument(
        "--max-unsafe", type=float, help="largest score of unsafe content; the original Würstchen used 0.99"
    )
    prepare.add_argument(
        "--strict",
        action="store_true",
        help="drop images that lack a score used by a filter; by default they are kept and counted",
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
    from wuerstchen.data.prepare import prepare
    from wuerstchen.data.prepare_finish import summary
    from wuerstchen.data.prepare_job import Execution, Rank
    from wuerstchen.data.prepare_networks import read_networks
    from wuerstchen.data.prepare_plan import PrepareConfig
    from wuerstchen.device import default_device

    def options_of(kind: type) -> dict[str, object]:
        names = {field.name for field in dataclasses.fields(kind)}
        return {name: value for name, value in vars(options).items() if name in names}

    config = PrepareConfig(**{**options_of(PrepareConfig), "filters": Filters(**options_of(Filters))})
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
        options.model or BUNDLED,
        text_encoder=options.text_encoder,
        compressor=options.compressor,
        revision=options.revision,
    )
    description = prepare(
        reader,
        options.out,
        networks,
        config,
        Execution(
            device=device,
            workers=options.workers,
            rank=rank,
            announce=lambda line: print(line, file=sys.stderr),
        ),
        source=options.source,
    )
    if description is not None:
        for line in summary(description):
            print(line)
    return 0

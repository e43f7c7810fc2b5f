"""``wuerstchen convert``, ``average`` and ``doctor``: what is done with models but drawing."""

import argparse
from pathlib import Path

from wuerstchen.cli.options import Parser, add_memory_options, add_source_options, sources_of


def add_convert(commands: "argparse._SubParsersAction[Parser]") -> None:
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
        "--leave-out",
        nargs="+",
        default=[],
        metavar="PART",
        help="parts that may be left behind; write it last",
    )
    add_source_options(convert)


def add_average(commands: "argparse._SubParsersAction[Parser]") -> None:
    average = commands.add_parser(
        "average", help="average the weights of two models, as the published Stage C is an average"
    )
    average.set_defaults(run=_average)
    average.add_argument("first", metavar="A", help="model in any layout: a path, or a name on the hub")
    average.add_argument("second", metavar="B", help="another of the same shape")
    average.add_argument("target", type=Path, metavar="OUT", help="new folder, in the native layout")
    average.add_argument("--share", type=float, default=0.5, help="of B, from 0 to 1 (0.5)")


def add_doctor(commands: "argparse._SubParsersAction[Parser]") -> None:
    doctor = commands.add_parser(
        "doctor", help="check a model: files, versions, three pictures and how long they took"
    )
    doctor.set_defaults(run=_doctor)
    doctor.add_argument(
        "--model", help="model in any layout, or a name on the hub (the model in the package)"
    )
    doctor.add_argument("--out", type=Path, default=Path("doctor"), help="folder of the pictures (doctor)")
    doctor.add_argument("--device", help="cpu, cuda or mps (a GPU if there is one)")
    add_source_options(doctor)
    add_memory_options(doctor)


def _convert(options: argparse.Namespace) -> int:
    from wuerstchen.checkpoints.layouts import convert

    convert(
        options.source,
        options.target,
        options.layout,
        sources_of(options),
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
    from wuerstchen.image_files import check_writable

    check_writable(options.out)
    for line in examine(
        options.model,
        options.out,
        device=options.device,
        precision=options.precision,
        low_memory=options.low_memory,
        sources=sources_of(options),
    ):
        print(line, flush=True)
    return 0

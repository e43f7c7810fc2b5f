"""``wuerstchen convert``, ``average`` and ``doctor``."""

import argparse
from pathlib import Path

from wuerstchen.checkpoints.layout_table import LAYOUTS
from wuerstchen.cli.options import (
    Parser,
    add_device_option,
    add_memory_options,
    add_source_options,
    sources_of,
)
from wuerstchen.errors import UserError

_ADAPTER_LAYOUTS = ("lora-diffusers", "lora-kohya", "lora-peft")


def add_convert(commands: "argparse._SubParsersAction[Parser]") -> None:
    convert = commands.add_parser("convert", help="convert a model or an adapter to another layout")
    convert.set_defaults(run=_convert)
    convert.add_argument(
        "source", metavar="SRC", help="model in any layout: a path or a Hub name; or an adapter's path"
    )
    convert.add_argument(
        "target", type=Path, metavar="DST", help="folder to create; for an adapter, a .safetensors file"
    )
    convert.add_argument(
        "--layout",
        choices=(*LAYOUTS, *_ADAPTER_LAYOUTS),
        required=True,
        help="layout to write; lora-... converts an adapter (LoRA or DoRA)",
    )
    convert.add_argument(
        "--storage",
        choices=("float32", "float16", "int8"),
        default="float32",
        help="data type of the stored weights (default: float32); int8 needs the native layout",
    )
    convert.add_argument(
        "--max-shard-size",
        default="",
        metavar="SIZE",
        help="split larger weight files into shards of at most this size, such as 16MB or 16MiB",
    )
    convert.add_argument(
        "--leave-out",
        nargs="+",
        default=[],
        metavar="PART",
        help="parts to leave out; put this option last",
    )
    add_source_options(convert)


def add_average(commands: "argparse._SubParsersAction[Parser]") -> None:
    average = commands.add_parser(
        "average", help="average the weights of two models, as was done for the published Stage C"
    )
    average.set_defaults(run=_average)
    average.add_argument("first", metavar="A", help="model in any layout: a path or a Hub name")
    average.add_argument("second", metavar="B", help="model with the same architecture as A")
    average.add_argument("target", type=Path, metavar="OUT", help="folder to create, in the native layout")
    average.add_argument("--weight", type=float, default=0.5, help="weight of B, from 0 to 1 (default: 0.5)")
    # The old name of --weight.
    average.add_argument(
        "--share", type=float, dest="weight", default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )


def add_doctor(commands: "argparse._SubParsersAction[Parser]") -> None:
    doctor = commands.add_parser(
        "doctor", help="check a model: its files and versions, and three test images with timings"
    )
    doctor.set_defaults(run=_doctor)
    doctor.add_argument(
        "--model", help="model in any layout: a path or a Hub name (default: the bundled model)"
    )
    doctor.add_argument(
        "--out", type=Path, default=Path("doctor"), help="folder for the images (default: doctor)"
    )
    add_device_option(doctor)
    add_source_options(doctor)
    add_memory_options(doctor)


def _convert(options: argparse.Namespace) -> int:
    from wuerstchen.checkpoints.layouts import convert

    if options.layout in _ADAPTER_LAYOUTS:
        return _convert_adapter(options)

    convert(
        options.source,
        options.target,
        options.layout,
        sources_of(options),
        storage=options.storage,
        max_shard_size=options.max_shard_size,
        leave_out=options.leave_out,
    )
    print(options.target)
    return 0


def _convert_adapter(options: argparse.Namespace) -> int:
    import torch

    from wuerstchen.adapters import found_adapter
    from wuerstchen.checkpoints.adapter_write import write_adapter
    from wuerstchen.checkpoints.adapters import read_adapter
    from wuerstchen.checkpoints.layouts import Sources

    if (
        options.storage == "int8"
        or options.leave_out
        or options.max_shard_size
        or sources_of(options) != Sources()
    ):
        raise UserError(
            f"--layout {options.layout} converts an adapter, which is stored whole as float32 or float16. "
            "Omit the other options."
        )
    if options.target.exists():
        raise UserError(f"{options.target} already exists. Choose another file, or remove it.")
    form = options.layout.removeprefix("lora-")
    adapter = read_adapter(found_adapter(options.source))
    write_adapter(options.target, adapter, form=form, dtype=getattr(torch, options.storage))
    print(options.target)
    return 0


def _average(options: argparse.Namespace) -> int:
    from wuerstchen.checkpoints.average import average

    changed = average(options.first, options.second, options.target, options.weight)
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

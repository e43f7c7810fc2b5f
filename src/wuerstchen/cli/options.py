"""Options that several commands share, and what they say."""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from wuerstchen.diffusion.sampler_table import SAMPLERS, sampler_help
from wuerstchen.errors import UserError

if TYPE_CHECKING:
    from wuerstchen.checkpoints.layouts import Sources
    from wuerstchen.pipeline import Sampling, Wuerstchen
    from wuerstchen.train.report.cost import Tariff

LOW_MEMORY = ("stage", "layer")


def with_values(arguments: Sequence[str]) -> list[str]:
    """The arguments with the value of ``--low-memory`` spelled out.

    It may stand without one, and argparse would take the next argument for it, as in
    ``generate --low-memory "a cat"``.
    """
    spelled: list[str] = []
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        if argument == "--":
            return spelled + list(arguments[len(spelled) :])
        bare = len(argument) >= len("--low") and "--low-memory".startswith(argument)
        spelled.append("--low-memory=stage" if bare and following not in LOW_MEMORY else argument)
    return spelled


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.color = (
            False  # Python 3.14 has it; escape sequences are spelled out by ``terminal.safe_streams``
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def add_drawing_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", help="model in any layout, or a name on the hub (the model in the package)"
    )
    add_source_options(parser)
    add_memory_options(parser)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(),
        help="folder, where images get free names, or a file ending in .png, which is replaced (here)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the first picture, up to 4294967295; the next has the next (0)",
    )
    add_sampling_options(parser)


def add_source_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prior", metavar="SRC", help="Stage C from elsewhere: a folder, or a name on the hub"
    )
    parser.add_argument("--text-encoder", metavar="SRC", help="for .pt files, which hold none")
    parser.add_argument("--decoder-text-encoder", metavar="SRC", help="likewise, Stage B's")
    parser.add_argument("--revision", help="of a model on the hub")


PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Short names of precisions, as training has them."""


def precision_named(text: str) -> str:
    """A precision by its long name."""
    return PRECISIONS.get(text, text)


def add_precision_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision",
        type=precision_named,
        choices=("float32", "bfloat16", "float16"),
        help="fp32, bf16 and fp16 are the same (float16 on NVIDIA GPUs, float32 elsewhere)",
    )


def add_memory_options(parser: argparse.ArgumentParser) -> None:
    add_precision_option(parser)
    parser.add_argument(
        "--low-memory",
        nargs="?",
        const="stage",
        choices=LOW_MEMORY,
        help="keep one network at a time on the GPU, or one layer",
    )


def add_guidance_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--guidance", type=float, help="guidance scale of Stage C: above 1 follows the prompt more strictly"
    )
    parser.add_argument("--prior-steps", type=int, help="steps of Stage C")
    parser.add_argument(
        "--prior-sampler",
        choices=list(SAMPLERS),
        help=f"of Stage C, fitting the model's objective (the model's own): {sampler_help()}",
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--decoder-steps", type=int, help="steps of Stage B")
    parser.add_argument("--decoder-guidance", type=float, help="guidance of Stage B by the map; 1 is none")
    parser.add_argument("--decoder-shift", type=float, help="how far Stage B's steps lean towards noise")
    parser.add_argument("--device", help="cpu, cuda or mps (a GPU if there is one)")


def add_tariff_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--region", metavar="CC", help="country whose electricity is used, as in DE, for CO2")
    parser.add_argument("--co2-per-kwh", type=float, metavar="KG", help="kg of CO2 a kWh (0.48, the world's)")
    parser.add_argument("--price-per-hour", type=float, metavar="P", help="money an hour of the machine")
    parser.add_argument("--price-per-kwh", type=float, metavar="P", help="money a kWh")


def sources_of(options: argparse.Namespace) -> "Sources":
    from wuerstchen.checkpoints.layouts import Sources

    return Sources(
        prior=options.prior,
        text_encoder=options.text_encoder,
        decoder_text_encoder=options.decoder_text_encoder,
        revision=options.revision,
    )


def loaded(options: argparse.Namespace) -> "Wuerstchen":
    from wuerstchen.pipeline import load

    return load(
        options.model,
        options.device,
        precision=options.precision,
        low_memory=options.low_memory,
        sources=sources_of(options),
    )


def sampling_of(options: argparse.Namespace) -> "Sampling":
    from wuerstchen.sampling import Sampling

    return Sampling(
        guidance=getattr(options, "guidance", None),
        prior_steps=getattr(options, "prior_steps", None),
        prior_sampler=getattr(options, "prior_sampler", None),
        decoder_steps=options.decoder_steps,
        decoder_guidance=options.decoder_guidance,
        decoder_shift=options.decoder_shift,
    )


def tariff_of(options: argparse.Namespace) -> "Tariff | None":
    """None where no option says anything."""
    from wuerstchen.train.report.cost import make_tariff

    given = (options.region, options.co2_per_kwh, options.price_per_hour, options.price_per_kwh)
    return None if given == (None,) * 4 else make_tariff(*given)

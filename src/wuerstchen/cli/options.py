"""Options that several commands share, and how they are read."""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from wuerstchen.diffusion.sampler_table import SAMPLERS, sampler_help
from wuerstchen.edit_options import CROP_PADDING
from wuerstchen.errors import UserError

if TYPE_CHECKING:
    from wuerstchen.checkpoints.layouts import Sources
    from wuerstchen.pipeline import Sampling, Wuerstchen
    from wuerstchen.train.report.cost import Tariff

LOW_MEMORY = ("stage", "layer")


def with_values(arguments: Sequence[str]) -> list[str]:
    """Adds the default value to a ``--low-memory`` and a ``--crop-to-mask`` that have none.

    Otherwise argparse would take the next argument as its value, as in ``generate --low-memory "a cat"``.
    """
    edits = list(arguments[:1]) == ["generate"]  # `data prepare` has an option --crop
    spelled: list[str] = []
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        if argument == "--":
            return spelled + list(arguments[len(spelled) :])
        if _abbreviates(argument, "--low-memory", "--low") and following not in LOW_MEMORY:
            spelled.append("--low-memory=stage")
        elif edits and _abbreviates(argument, "--crop-to-mask", "--cr") and not following.isdecimal():
            spelled.append(f"--crop-to-mask={CROP_PADDING}")
        else:
            spelled.append(argument)
    return spelled


def _abbreviates(argument: str, option: str, shortest: str) -> bool:
    return len(argument) >= len(shortest) and option.startswith(argument)


class JoinedData(argparse.Action):
    """Joins the values of a repeated ``--data`` into one mixture: ``A=3 + B=1``."""

    def __call__(self, parser: object, namespace: argparse.Namespace, values: Any, *_: object) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if before is None else f"{before} + {values}")


class Parser(argparse.ArgumentParser):
    """An argparse parser with one-line errors."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Python 3.14 colours help texts, but ``terminal.safe_streams`` prints escape sequences as text.
        self.color = False

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See {self.prog} --help")


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        help="model in any layout: a path, or a name on the Hugging Face Hub (default: the bundled model)",
    )
    add_source_options(parser)
    add_memory_options(parser)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(),
        help="folder to write images to under new names, or a .png file to overwrite "
        "(default: the current folder)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the first image, up to 4294967295; later images count up (default: 0)",
    )
    add_sampling_options(parser)


def add_source_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prior", metavar="SRC", help="load Stage C from this path or Hub name instead")
    parser.add_argument("--text-encoder", metavar="SRC", help="text encoder, which .pt files do not contain")
    parser.add_argument(
        "--decoder-text-encoder", metavar="SRC", help="Stage B's text encoder, which .pt files do not contain"
    )
    parser.add_argument(
        "--compressor",
        metavar="SRC",
        help="encoder of images, which published diffusers folders do not contain: a path or Hub name",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub")


PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""The short names of precisions, which training uses."""


def precision_named(text: str) -> str:
    """The long name of a precision."""
    return PRECISIONS.get(text, text)


def add_precision_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision",
        type=precision_named,
        choices=("float32", "bfloat16", "float16"),
        help="fp32, bf16 and fp16 work too (default: float16 on NVIDIA GPUs, float32 elsewhere)",
    )


def add_memory_options(parser: argparse.ArgumentParser) -> None:
    add_precision_option(parser)
    parser.add_argument(
        "--low-memory",
        nargs="?",
        const="stage",
        choices=LOW_MEMORY,
        help="keep one network (stage, the default value) or one layer (layer) on the GPU at a time",
    )


def add_guidance_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--guidance",
        type=float,
        help="guidance scale of Stage C; values above 1 follow the prompt more closely",
    )
    parser.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="guide Stage C only at times from LOW to HIGH, where 0 is clean and 1 is noise; 0 1 guides all "
        "steps (default: the model's own)",
    )
    parser.add_argument(
        "--prior-steps", type=int, help="sampling steps of Stage C (default: the model's own)"
    )
    parser.add_argument(
        "--prior-sampler",
        choices=list(SAMPLERS),
        help=f"sampler of Stage C, one that fits its objective (default: the model's own): {sampler_help()}",
    )


def add_prompt_weights_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt-weights",
        action="store_true",
        help="read weights in prompts: (word:1.3) more, (word:0.7) less, (word) 1.1 times, [word] 1/1.1 "
        "times, and \\( for a bracket that is text",
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--decoder-steps", type=int, help="sampling steps of Stage B (default: the model's own)"
    )
    parser.add_argument(
        "--decoder-sampler",
        choices=list(SAMPLERS),
        help="sampler of Stage B, one that fits its objective (default: the model's own)",
    )
    parser.add_argument(
        "--decoder-guidance",
        type=float,
        help="guidance scale of Stage B on the semantic latents; 1 turns it off",
    )
    parser.add_argument(
        "--decoder-shift",
        type=float,
        help="timestep shift of Stage B; higher values spend more steps at high noise levels",
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="sample with the full networks, also if the model has students for few steps",
    )
    add_device_option(parser)


def add_device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda or mps (default: a GPU if there is one)")


def add_tariff_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--region", metavar="CC", help="country code for the carbon intensity of electricity, such as DE"
    )
    parser.add_argument(
        "--co2-per-kwh", type=float, metavar="KG", help="kg of CO2 per kWh (default: 0.48, the world average)"
    )
    parser.add_argument("--price-per-hour", type=float, metavar="P", help="price of the machine per hour")
    parser.add_argument("--price-per-kwh", type=float, metavar="P", help="price of electricity per kWh")


def sources_of(options: argparse.Namespace) -> "Sources":
    from wuerstchen.checkpoints.layouts import Sources

    return Sources(
        prior=options.prior,
        text_encoder=options.text_encoder,
        decoder_text_encoder=options.decoder_text_encoder,
        compressor=options.compressor,
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

    interval = getattr(options, "guidance_interval", None)
    return Sampling(
        guidance=getattr(options, "guidance", None),
        guidance_interval=None if interval is None else tuple(interval),
        prior_steps=getattr(options, "prior_steps", None),
        prior_sampler=getattr(options, "prior_sampler", None),
        decoder_steps=options.decoder_steps,
        decoder_sampler=options.decoder_sampler,
        decoder_guidance=options.decoder_guidance,
        decoder_shift=options.decoder_shift,
        full=options.full,
    )


def tariff_of(options: argparse.Namespace) -> "Tariff | None":
    """The tariff of the options, or None if none of them was given."""
    from wuerstchen.train.report.cost import make_tariff

    given = (options.region, options.co2_per_kwh, options.price_per_hour, options.price_per_kwh)
    return None if given == (None,) * 4 else make_tariff(*given)

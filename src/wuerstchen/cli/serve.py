"""``wuerstchen serve``."""

import argparse
import dataclasses
from pathlib import Path

from wuerstchen.cli.options import LOW_MEMORY, Parser, add_precision_option
from wuerstchen.errors import UserError


def add_serve(commands: "argparse._SubParsersAction[Parser]") -> None:
    serve = commands.add_parser(
        "serve",
        help="serve a web page and an HTTP API, which OpenAI's clients can use",
        description="Serves a model until Ctrl-C or SIGTERM. See docs/serving.md.",
        argument_default=argparse.SUPPRESS,  # ServeConfig has the defaults
    )
    serve.set_defaults(run=_serve)
    serve.add_argument(
        "--host",
        help="address to listen on; anything but a loopback address requires --token-file (default: "
        "127.0.0.1)",
    )
    serve.add_argument("--port", type=int, help="port to listen on; 0 picks a free port (default: 8042)")
    serve.add_argument(
        "--model",
        help="model in any layout: a path, or a name on the Hugging Face Hub (default: the bundled model)",
    )
    serve.add_argument(
        "--device",
        action="append",
        default=[],
        help="cpu, cuda, cuda:1 ...; repeat it to start one worker per device",
    )
    add_precision_option(serve)
    serve.add_argument(
        "--low-memory",
        nargs="?",
        const="stage",
        choices=LOW_MEMORY,
        help="keep one network (stage, the default value) or one layer (layer) on the GPU at a time; "
        "without previews",
    )
    for name, text in (
        ("--prior", "load Stage C from this path or Hub name instead"),
        ("--text-encoder", "text encoder, which .pt files do not contain"),
        ("--decoder-text-encoder", "Stage B's text encoder, which .pt files do not contain"),
        ("--compressor", "encoder of images, which published diffusers folders do not contain"),
    ):
        serve.add_argument(name, metavar="SRC", help=text)
    serve.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:SCALE]",
        help="adapter for all images, a file or a folder; repeatable",
    )
    serve.add_argument(
        "--lora-dir",
        type=Path,
        metavar="DIR",
        help="folder of adapters (.safetensors), from which each request can choose one",
    )
    serve.add_argument("--max-batch", type=int, metavar="N", help="maximum images per batch (default: 8)")
    serve.add_argument(
        "--deterministic",
        action="store_true",
        help="make images bit-identical regardless of what else is in the batch; slower",
    )
    _add_access(serve.add_argument_group("access"))
    _add_output(serve.add_argument_group("images"))
    _add_load_limits(serve.add_argument_group("client limits"))
    _add_request_limits(serve.add_argument_group("request limits"))
    _add_timeouts(serve.add_argument_group("time limits, in seconds"))


def _add_access(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--token-file", type=Path, default=None, metavar="FILE", help="file with one client token per line"
    )
    group.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="host name that requests may use for this service; repeatable",
    )
    group.add_argument(
        "--proxy",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="address or network of a trusted proxy; its X-Forwarded headers are used; repeatable",
    )
    group.add_argument("--log-prompts", action="store_true", help="write prompts to the log (default: never)")


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--results-dir",
        type=Path,
        metavar="DIR",
        help="folder for finished images (default: a temporary folder)",
    )
    group.add_argument(
        "--result-bytes",
        type=int,
        metavar="N",
        help="maximum total size of the images that are kept, in bytes (default: 1 GiB)",
    )
    group.add_argument(
        "--filter", metavar="MODULE:FUNCTION", help="safety filter that checks prompts and images"
    )
    group.add_argument(
        "--c2pa-certificate", type=Path, metavar="FILE", help="certificate chain to sign images with (PEM)"
    )
    group.add_argument("--c2pa-key", type=Path, metavar="FILE", help="its private key (ES256, PEM)")


def _add_load_limits(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max-waiting",
        type=int,
        metavar="N",
        help="maximum number of queued images over all clients (default: 256)",
    )
    group.add_argument(
        "--max-jobs-per-client",
        type=int,
        metavar="N",
        help="maximum number of open jobs per client (default: 16)",
    )
    group.add_argument(
        "--max-connections",
        type=int,
        metavar="N",
        help="maximum number of open connections (default: 4096, or fewer if the file descriptor limit is "
        "too low)",
    )
    group.add_argument(
        "--max-connections-per-address",
        type=int,
        metavar="N",
        help="maximum number of open connections per address, except from trusted proxies (default: 512, "
        "but at most half of --max-connections)",
    )
    group.add_argument(
        "--max-requests-per-second",
        type=float,
        metavar="N",
        help="requests per second per client, with bursts of up to four times that; 0 for no limit "
        "(default: 50)",
    )


def _add_request_limits(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max-steps", type=int, metavar="N", help="maximum sampling steps per stage (default: 100)"
    )
    group.add_argument(
        "--max-pixels",
        type=int,
        metavar="N",
        help="maximum pixels per image (default: four times the pixels of the model's default size)",
    )
    group.add_argument(
        "--upload-bytes",
        type=int,
        metavar="N",
        help="maximum size of an uploaded image in bytes (default: 8 MiB)",
    )


def _add_timeouts(group: argparse._ArgumentGroup) -> None:
    for name, text in (
        ("--upload-timeout", "to decode an uploaded image (default: 20)"),
        ("--load-timeout", "to load the model, including its download (default: 1800)"),
        ("--queue-timeout", "to wait in the queue, after which a job fails (default: 600)"),
        ("--run-timeout", "to generate a batch (default: 600)"),
        ("--grace", "to finish running jobs after Ctrl-C or SIGTERM (default: 30)"),
    ):
        group.add_argument(name, type=float, metavar="S", help=text)


def _serve(options: argparse.Namespace) -> int:
    try:
        from wuerstchen.serve.server import run
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("wuerstchen"):
            raise
        raise UserError(
            f'serving needs the package {error.name}, which is missing. Run pip install "wuerstchen[serve]"'
        ) from error
    from wuerstchen.serve.limits import ServeConfig, read_tokens

    names = {field.name for field in dataclasses.fields(ServeConfig)}
    config = ServeConfig(
        **{name: value for name, value in vars(options).items() if name in names},
        devices=tuple(options.device),
        loras=tuple(options.lora),
        tokens=() if options.token_file is None else read_tokens(options.token_file),
        allowed_hosts=tuple(options.allowed_host),
        proxies=tuple(options.proxy),
    )
    run(config, lambda text: print(text, flush=True))
    return 0

"""``wuerstchen serve``."""

import argparse
import dataclasses
from pathlib import Path

from wuerstchen.cli.options import Parser, add_precision_option
from wuerstchen.errors import UserError


def add_serve(commands: "argparse._SubParsersAction[Parser]") -> None:
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
    add_precision_option(serve)
    serve.add_argument(
        "--token-file", type=Path, default=None, metavar="FILE", help="tokens of clients, one a line"
    )
    serve.add_argument(
        "--allowed-host", action="append", default=[], metavar="NAME", help="name it is called by; repeatable"
    )
    serve.add_argument(
        "--proxy",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="address or network of a trusted proxy, whose X-Forwarded headers are believed; repeatable",
    )
    serve.add_argument("--results-dir", type=Path, metavar="DIR", help="of finished pictures (temporary)")
    serve.add_argument("--result-bytes", type=int, metavar="N", help="most that pictures take (1 GiB)")
    serve.add_argument(
        "--deterministic", action="store_true", help="the same bits whoever shares a batch; slower"
    )
    serve.add_argument("--max-batch", type=int, metavar="N", help="pictures drawn together (8)")
    serve.add_argument("--max-waiting", type=int, metavar="N", help="pictures in the queue (256)")
    serve.add_argument("--max-jobs-per-client", type=int, metavar="N", help="waiting or being drawn (16)")
    serve.add_argument(
        "--max-connections",
        type=int,
        metavar="N",
        help="open connections (4096, or what the limit of file descriptors leaves room for)",
    )
    serve.add_argument(
        "--max-connections-per-address",
        type=int,
        metavar="N",
        help="open connections from one address, trusted proxies excepted (512, at most half of all)",
    )
    serve.add_argument(
        "--max-requests-per-second",
        type=float,
        metavar="N",
        help="of one client, and four times as many at once after a pause; 0 is no limit (50)",
    )
    serve.add_argument("--max-steps", type=int, metavar="N", help="of a stage (100)")
    serve.add_argument(
        "--max-pixels", type=int, metavar="N", help="of a picture (four times the model's own size)"
    )
    serve.add_argument("--upload-bytes", type=int, metavar="N", help="(8 MiB)")
    serve.add_argument("--upload-timeout", type=float, metavar="S", help="to decode an upload (20)")
    serve.add_argument(
        "--load-timeout", type=float, metavar="S", help="to load the model, its download included (1800)"
    )
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

"""The command line: parses arguments, calls the package and prints results.

Nothing heavy is imported until a command needs it, so ``wuerstchen --help`` answers at once.
"""

import argparse
import contextlib
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence

from wuerstchen.cli.data import add_data
from wuerstchen.cli.evaluate import add_evaluate
from wuerstchen.cli.generate import add_generate, add_reconstruct
from wuerstchen.cli.models import add_average, add_convert, add_doctor
from wuerstchen.cli.morph import add_morph
from wuerstchen.cli.options import Parser, with_values
from wuerstchen.cli.serve import add_serve
from wuerstchen.cli.train import add_export, add_report, add_train
from wuerstchen.errors import UserError, UserNotice
from wuerstchen.terminal import safe_streams
from wuerstchen.version import __version__

EXAMPLES = """examples:
  wuerstchen generate "a 3D render of a purple camel on a blue background"
  wuerstchen generate "a cat" "a red car" --count 3 --grid --out grid.png
  wuerstchen generate "a red car" --init drawing.png --strength 0.7
  wuerstchen generate "a hat" --init drawing.png --mask mask.png
  wuerstchen morph "a cat" "a dog" --frames 16
  wuerstchen reconstruct drawing.png
  wuerstchen data emoji data/emoji
  wuerstchen data prepare photos prepared/photos --size 512
  wuerstchen train tiny --run-dir runs/tiny
  wuerstchen report runs/tiny
  wuerstchen export runs/tiny models/now
  wuerstchen evaluate runs/mini/model --data data/emoji --out evaluation
  wuerstchen generate "a cat" --model warp-ai/wuerstchen --precision float16
  wuerstchen convert warp-ai/wuerstchen models/wuerstchen --layout native
  wuerstchen average runs/a/model runs/b/model models/average
  wuerstchen doctor --model warp-ai/wuerstchen
  wuerstchen serve --port 8042
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0, 2 for an error that the user can fix, 130 after Ctrl-C, 143
    after SIGTERM."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # File names contain prompts, which the terminal's encoding may not support.
        sys.stdout.reconfigure(errors="backslashreplace")
    # Hides warnings of torch's C++ code, which come with a stack trace, such as when a rank has ended. torch
    # reads the variable when it is imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with safe_streams(), warnings.catch_warnings():
        # Shows only the warnings that are meant for the user.
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserNotice)
        warnings.showwarning = _WarningPrinter()
        return _run(arguments)


class _WarningPrinter:
    """Prints each warning once, without breaking a progress bar."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def __call__(self, message: Warning | str, *_: object, **__: object) -> None:
        from tqdm import tqdm

        if str(message) not in self.seen:
            self.seen.add(str(message))
            tqdm.write(f"Warning: {message}", file=sys.stderr)


def _run(arguments: Sequence[str] | None) -> int:
    try:
        given = sys.argv[1:] if arguments is None else arguments
        known, others = make_parser().parse_known_args(with_values(given))
        if others and not known.takes_overrides:
            command = " ".join([known.command, *([known.kind] if "kind" in known else [])])
            raise UserError(f"unknown option: {' '.join(others)}. See wuerstchen {command} --help")
        known.overrides = others
        with _raising_on_sigterm():
            return known.run(known)
    except _Terminated:
        more = ". Start the same command again to resume" if known.resumes else ""
        print(f"stopped by SIGTERM{more}", file=sys.stderr)
        return 128 + signal.SIGTERM
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of our output has gone, as with ``| head``. Discard the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # such as a locked folder
        print(f"Error: {error}. Check the name, the permissions and the free disk space", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


class _Terminated(KeyboardInterrupt):
    """The process received SIGTERM."""


@contextlib.contextmanager
def _raising_on_sigterm() -> "Iterator[None]":
    """Makes SIGTERM end a command as Ctrl-C does. The training loop has a handler of its own, which saves a
    checkpoint."""

    def stop(number: int, frame: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can handle signals
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="wuerstchen",
        description="Text-to-image generation in semantic latents that are 42x smaller per side.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"wuerstchen {__version__}")
    parser.set_defaults(takes_overrides=False, resumes=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    add_generate(commands)
    add_reconstruct(commands)
    add_morph(commands)
    add_convert(commands)
    add_average(commands)
    add_doctor(commands)
    add_serve(commands)
    add_data(commands)
    add_evaluate(commands)
    add_train(commands)
    add_report(commands)
    add_export(commands)
    return parser

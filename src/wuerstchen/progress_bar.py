"""Progress bars: a bar on a terminal, one line per minute in a file."""

import sys
from typing import Any

from tqdm import tqdm

SECONDS = 60.0
"""Time between lines if the output is not a terminal."""


class _Lines:
    """Writes each update of a bar as a separate line."""

    def write(self, text: str) -> None:
        text = text.strip()
        if text:
            sys.stderr.write(text + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def bar(*arguments: Any, **options: Any) -> "tqdm[Any]":
    """A ``tqdm`` bar on standard error, or one line per minute if that is not a terminal."""
    if not sys.stderr.isatty():
        options |= {"file": _Lines(), "mininterval": SECONDS, "maxinterval": SECONDS, "dynamic_ncols": False}
        options |= {"ascii": True}
    return tqdm(*arguments, **options)

"""Progress bars that suit where they are written to: a bar on a terminal, a line a minute in a file."""

import sys
from typing import Any

from tqdm import tqdm

SECONDS = 60.0
"""Between lines where the output is no terminal."""


class _Lines:
    """Writes what a bar redraws in place as lines of their own."""

    def write(self, text: str) -> None:
        text = text.strip()
        if text:
            sys.stderr.write(text + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def bar(*arguments: Any, **options: Any) -> "tqdm[Any]":
    """A ``tqdm`` bar on standard error. Where that is no terminal, a line a minute: logs are not flooded."""
    if not sys.stderr.isatty():
        options |= {"file": _Lines(), "mininterval": SECONDS, "maxinterval": SECONDS, "dynamic_ncols": False}
        options |= {"ascii": True}
    return tqdm(*arguments, **options)

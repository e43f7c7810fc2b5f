"""Text that other people chose, shown on a terminal: names of files and tensors, captions, reasons of errors.

A name may hold control characters. Printed raw, they could clear the screen, hide lines, or set the window's
title. ``printable`` spells them out; ``safe_streams`` does so for everything that a command prints.
"""

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import Any

# C0, DEL and C1, Unicode's line breaks, and what turns the direction of writing. Other invisible characters
# stay: emoji are joined by them.
_CONTROLS = "\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069"
_CONTROL = re.compile(f"[{_CONTROLS}]")
_CONTROL_IN_STREAM = re.compile(rf"(?![\t\n])[{_CONTROLS}]")
# A progress bar goes back to the start of its line, and from a lower bar up to its own.
_BAR = re.compile(r"(?:\x1b\[A)+")


def printable(text: str) -> str:
    r"""``text`` on one line, with control characters spelled out: an escape character becomes ``\x1b``."""
    return _CONTROL.sub(_spelled, text)


def _spelled(match: "re.Match[str]") -> str:
    return match[0].encode("unicode_escape").decode("ascii")


class _SafeStream:
    """A text stream that spells out control characters, but for line breaks, tabs, and those of a bar."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if not _BAR.fullmatch(text):
            start = text[:1] if text[:1] == "\r" else ""
            text = start + _CONTROL_IN_STREAM.sub(_spelled, text[len(start) :])
        self._stream.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def unfiltered(stream: Any) -> Any:
    """The stream below a safe one: for text of our own that has colours, and nothing of others in it."""
    return stream._stream if isinstance(stream, _SafeStream) else stream


@contextlib.contextmanager
def safe_streams() -> Iterator[None]:
    """Puts a safe stream in place of ``sys.stdout`` and ``sys.stderr``, and takes it away again."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (stream if stream is None else _SafeStream(stream) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before

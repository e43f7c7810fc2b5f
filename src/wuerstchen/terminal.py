"""Escapes untrusted text for a terminal: names of files and tensors, captions, messages of errors.

A name may contain control characters. If they are printed, they can clear the screen, hide lines, or set the
window's title. ``printable`` escapes them, ``safe_streams`` does so for everything that a command prints.
"""

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import Any

# C0, DEL and C1, Unicode's line breaks, and changes of the writing direction. Other invisible characters are
# kept because they join emoji.
_CONTROLS = "\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069"
_CONTROL = re.compile(f"[{_CONTROLS}]")
_CONTROL_IN_STREAM = re.compile(rf"(?![\t\n])[{_CONTROLS}]")
# What tqdm writes to move from a lower progress bar up to its own.
_BAR = re.compile(r"(?:\x1b\[A)+")


def printable(text: str) -> str:
    r"""``text`` on one line with escaped control characters. An escape character becomes ``\x1b``."""
    return _CONTROL.sub(_spelled, text)


def _spelled(match: "re.Match[str]") -> str:
    return match[0].encode("unicode_escape").decode("ascii")


class _SafeStream:
    """A text stream that escapes control characters, except line breaks, tabs, and those of a bar."""

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
    """The unfiltered stream inside a safe one. Only for our own coloured text, never for untrusted text."""
    return stream._stream if isinstance(stream, _SafeStream) else stream


@contextlib.contextmanager
def safe_streams() -> Iterator[None]:
    """Replaces ``sys.stdout`` and ``sys.stderr`` with safe streams inside the block."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (stream if stream is None else _SafeStream(stream) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before

"""Errors that a user can cause. Each says what is wrong, the rule, and what to do."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from wuerstchen.terminal import printable

MAX_MESSAGE = 4000
"""Length limit of a message in characters. Longer ones contain a long name or value."""


class UserError(ValueError):
    """An input by the user is invalid.

    The message is one line with the value, the rule and the fix. The command line prints it as ``Error: ...``
    without a traceback and exits with code 2. Control characters, for example in file names, are escaped.
    """

    def __str__(self) -> str:
        return _message(super().__str__())


class CheckpointError(UserError):
    """A file with weights or training state is damaged, in an unknown format, or incompatible."""


class DataError(UserError):
    """A dataset, an image or a caption cannot be used."""


class RunFolderError(UserError):
    """A run folder is in use, belongs to another run, or cannot be written."""


class UserNotice(UserWarning):
    """Something differs from what was asked for. The command line prints it in one line."""

    def __str__(self) -> str:
        return _message(super().__str__())


def _message(text: str) -> str:
    """A message without control characters, shortened to ``MAX_MESSAGE``."""
    if len(text) > MAX_MESSAGE:
        half = MAX_MESSAGE // 2
        text = f"{text[:half]} … ({len(text) - 2 * half} characters are left out) … {text[-half:]}"
    return printable(text)


def shown(value: object, length: int = 80) -> str:
    """Describes an untrusted value of any type and size for a message, in constant time."""
    if isinstance(value, str):
        return repr(value) if len(value) <= length else f"{value[:length]!r}…"
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}"


@contextmanager
def docstrings_needed() -> Iterator[None]:
    """Explains why transformers cannot be imported under ``python -OO``, which removes its docstrings."""
    try:
        yield
    except Exception as error:
        if sys.flags.optimize < 2:
            raise
        raise UserError(
            "text encoders cannot be loaded under python -OO, because transformers needs its docstrings. "
            "Start Python without -OO. -O works."
        ) from error


@contextmanager
def out_of_memory_named(what: str) -> Iterator[None]:
    """Turns out-of-memory errors, on GPU and CPU, into a ``UserError`` that names what did not fit."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"{what} does not fit into memory. Use a smaller batch_size or size.") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means out of memory, on GPU or CPU."""
    # torch raises a subclass of RuntimeError on a GPU, and RuntimeError itself on a CPU.
    phrases = ("out of memory", "not enough memory", "can't allocate memory")
    of_torch = isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in phrases)
    return isinstance(error, MemoryError) or of_torch

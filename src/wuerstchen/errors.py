"""The errors a user can meet. Each says what is wrong, by which rule, and what to do."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from wuerstchen.terminal import printable

MAX_MESSAGE = 4000
"""Characters of a message: a page. What is left out was somebody's long name or value."""


class UserError(ValueError):
    """Something the user gave cannot be used.

    The message is one line: the value, the rule it breaks, and the fix. The command line prints it as
    ``Error: ...`` and exits with code 2; no traceback is shown. Control characters in it, from the name of a
    file for one, are spelled out.
    """

    def __str__(self) -> str:
        return _message(super().__str__())


class CheckpointError(UserError):
    """A file of weights or of training state is damaged, foreign, or does not fit."""


class DataError(UserError):
    """A data set, an image or a caption cannot be used."""


class RunFolderError(UserError):
    """A run folder is in use, belongs to another run, or cannot be written."""


class UserNotice(UserWarning):
    """Something went on, but not quite as asked. The command line prints it in one line."""

    def __str__(self) -> str:
        return _message(super().__str__())


def _message(text: str) -> str:
    """A message as it leaves the program: without control characters, and never longer than a page."""
    if len(text) > MAX_MESSAGE:
        half = MAX_MESSAGE // 2
        text = f"{text[:half]} … ({len(text) - 2 * half} characters are left out) … {text[-half:]}"
    return printable(text)


def shown(value: object, length: int = 80) -> str:
    """A value of any kind and size, from a file that anybody may have written, for a message.

    It takes no longer for a large value than for a small one.
    """
    if isinstance(value, str):
        return repr(value) if len(value) <= length else f"{value[:length]!r}…"
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a whole number of {value.bit_length()} bits"
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}"


@contextmanager
def docstrings_needed() -> Iterator[None]:
    """Says plainly that transformers cannot be imported where ``python -OO`` has left out its docstrings."""
    try:
        yield
    except Exception as error:
        if sys.flags.optimize < 2:
            raise
        raise UserError(
            "text encoders cannot be read under python -OO: transformers needs its docstrings. Start Python "
            "without -OO; -O works."
        ) from error


@contextmanager
def out_of_memory_named(what: str) -> Iterator[None]:
    """Turns a lack of memory, on a GPU or not, into a ``UserError`` that names what did not fit."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"{what} does not fit into memory. Use a smaller batch_size or size.") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is lacking, on a GPU or not."""
    # torch raises a RuntimeError of its own on a GPU and a plain one on a CPU.
    lack = ("out of memory", "not enough memory", "can't allocate memory")
    of_torch = isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in lack)
    return isinstance(error, MemoryError) or of_torch

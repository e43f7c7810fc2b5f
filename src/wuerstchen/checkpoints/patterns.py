"""Matches names of layers with untrusted regular expressions, as peft does, in bounded time."""

import re
import time
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from wuerstchen.errors import CheckpointError, shown

MAX_PATTERNS = 10_000
MAX_LENGTH = 1_000
SECONDS = 10.0
"""Time limit for all matches of one adapter. Usually they take milliseconds."""

# ``regex`` expands every repetition of a group, also inside other repeated groups.
_REPEATED_GROUP = re.compile(r"\)[*+{]")


class Patterns:
    """The keys of a ``rank_pattern`` or ``alpha_pattern``: each matches the end of layer names.

    Messages start with ``where``. Raises ``CheckpointError`` for too many or too long patterns.
    """

    def __init__(self, patterns: Sequence[str], where: str) -> None:
        if len(patterns) > MAX_PATTERNS or any(len(pattern) > MAX_LENGTH for pattern in patterns):
            raise CheckpointError(
                f"{where} has more than {MAX_PATTERNS} patterns, or one with more than "
                f"{MAX_LENGTH} characters. Download it again."
            )
        self.where = where
        self._patterns = {pattern: self._compiled(pattern) for pattern in patterns}
        self._deadline = time.monotonic() + SECONDS

    def first(self, names: Iterable[str]) -> str | None:
        """The first pattern that matches one of the names of a layer.

        Raises ``CheckpointError`` if matching takes too long.
        """
        names = list(names)
        for pattern, compiled in self._patterns.items():
            try:
                left = self._deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                if any(compiled.match(name, timeout=left) for name in names):
                    return pattern
            except TimeoutError:
                raise CheckpointError(
                    f"{self.where}: matching its patterns, such as {shown(pattern)}, takes more than "
                    f"{SECONDS:g} s. Use plain names."
                ) from None
        return None

    def _compiled(self, pattern: str) -> Any:
        import regex  # supports a time limit; transformers needs it too

        if _REPEATED_GROUP.search(pattern):
            raise CheckpointError(
                f"{self.where}: the pattern {shown(pattern)} repeats a group, which could take forever. "
                "Write it without a repeated group."
            )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about syntax that may change
                re.compile(pattern)  # peft's engine, which supports less
                # As in ``peft.utils.other.get_pattern_key``.
                return regex.compile(rf"(.*\.)?({pattern})$", regex.V0)
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise CheckpointError(
                f"{self.where}: the pattern {shown(pattern)} is not a regular "
                f"expression ({error}). Download it again."
            ) from None

"""Names of layers by regular expressions from a file, as peft compares them, in bounded time."""

import re
import time
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from wuerstchen.errors import CheckpointError, shown

MAX_PATTERNS = 10_000
MAX_LENGTH = 1_000
SECONDS = 10.0
"""For all comparisons of one adapter. Ordinary ones take milliseconds."""

# Of a group that is repeated, ``regex`` writes out every copy, each with the copies inside it.
_REPEATED_GROUP = re.compile(r"\)[*+{]")


class Patterns:
    """The keys of a ``rank_pattern`` or ``alpha_pattern``: each stands for layers whose name ends as it says.

    ``where`` begins messages. Raises ``CheckpointError`` for too many patterns or too long ones.
    """

    def __init__(self, patterns: Sequence[str], where: str) -> None:
        if len(patterns) > MAX_PATTERNS or any(len(pattern) > MAX_LENGTH for pattern in patterns):
            raise CheckpointError(
                f"{where} is wrong because it has more than {MAX_PATTERNS} patterns, or one of more than "
                f"{MAX_LENGTH} characters; get it again"
            )
        self.where = where
        self._patterns = {pattern: self._compiled(pattern) for pattern in patterns}
        self._deadline = time.monotonic() + SECONDS

    def first(self, names: Iterable[str]) -> str | None:
        """The first pattern, in their order, that fits one of the names of a layer.

        Raises ``CheckpointError`` when the comparisons take too long.
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
                    f"{self.where} is wrong because comparing its patterns takes more than {SECONDS:g} s, "
                    f"{shown(pattern)} for one; write plain names there"
                ) from None
        return None

    def _compiled(self, pattern: str) -> Any:
        import regex  # the one engine that can be given a time limit; transformers needs it too

        if _REPEATED_GROUP.search(pattern):
            raise CheckpointError(
                f"{self.where} is wrong because its pattern {shown(pattern)} repeats a group, which could "
                "take for ever; write it without"
            )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about what may come to mean another thing
                re.compile(pattern)  # peft's engine, which knows less
                # As in ``peft.utils.other.get_pattern_key``.
                return regex.compile(rf"(.*\.)?({pattern})$", regex.V0)
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise CheckpointError(
                f"{self.where} is wrong because its pattern {shown(pattern)} is no regular expression "
                f"({error}); get it again"
            ) from None

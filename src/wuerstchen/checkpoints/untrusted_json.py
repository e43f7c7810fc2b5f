"""Reads untrusted JSON and the headers of safetensors files within limits. Imports no torch."""

import json
from pathlib import Path
from typing import Any

MAX_DEPTH = 100
"""Nesting limit of JSON."""
MAX_DIGITS = 40
"""Length limit of integers in JSON. transformers writes 10³⁰ if there is no limit."""
MAX_HEADER = 16 << 20
"""Size limit of a safetensors header in bytes, enough for 100,000 tensors."""


def parse_json(text: str | bytes) -> Any:
    """Parses JSON. Raises ``ValueError`` if it is invalid, nested too deep, or has an integer that is too
    long.

    All numbers can be converted to float, and recursive functions can process the result.
    """
    try:
        content = json.loads(text, parse_int=_parse_int)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    level: list[Any] = [content]
    for _ in range(MAX_DEPTH + 1):
        containers = [value for value in level if isinstance(value, dict | list)]
        if not containers:
            return content
        level = [v for c in containers for v in (c.values() if isinstance(c, dict) else c)]
    raise ValueError(f"it is nested more than {MAX_DEPTH} deep")


def _parse_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"it has an integer of {len(digits)} digits")
    return int(digits)


def read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: an entry for each tensor, and ``__metadata__``.

    Raises ``ValueError`` if it is damaged or too long, ``OSError`` if the file cannot be read.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= MAX_HEADER:
            raise ValueError(f"its header has {length} bytes")
        content = parse_json(file.read(length))
    if not isinstance(content, dict):
        raise ValueError("its header is not an object")
    return content

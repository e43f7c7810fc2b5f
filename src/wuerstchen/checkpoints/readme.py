"""Reads the front matter of a model's README: the YAML between its first two lines of dashes."""

import re
from pathlib import Path
from typing import Any

import yaml

from wuerstchen.errors import CheckpointError

MAX_FRONT_MATTER = 64 << 10
"""Length limit in characters. YAML takes a second to parse that many."""

_BLOCK = re.compile(r"\s*---\n(?P<yaml>.*?)(?P<end>\n---[ \t]*(\n|\Z)|\Z)", re.DOTALL)


def read_front_matter(path: Path) -> dict[str, Any]:
    """The front matter of a README, empty if there is none.

    Raises ``CheckpointError`` if it is damaged, too long, or contains aliases, because ten lines of aliases
    can expand to ten billion words.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            start = file.read(MAX_FRONT_MATTER + 100)
        match = _BLOCK.match(start)
        if match is None or not (match["end"] or len(start) > MAX_FRONT_MATTER):
            return {}
        if not match["end"]:
            raise CheckpointError(
                f"{path}: the front matter has more than {MAX_FRONT_MATTER >> 10} kB. Shorten it."
            )
        content = yaml.load(match["yaml"], _WithoutAliases)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = " ".join(str(error).split())[:100]
        raise CheckpointError(f"the front matter of {path} cannot be read ({reason}). Correct it.") from error
    if not isinstance(content, dict | None):
        raise CheckpointError(f"the front matter of {path} has no fields. Correct it.")
    return content or {}


class _WithoutAliases(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it contains aliases")
        return super().compose_node(parent, index)

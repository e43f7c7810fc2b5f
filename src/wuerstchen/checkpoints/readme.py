"""What the README of a model says to machines: the YAML between its first two lines of dashes."""

import re
from pathlib import Path
from typing import Any

import yaml

from wuerstchen.errors import CheckpointError

MAX_FRONT_MATTER = 64 << 10
"""Characters. YAML takes a second for so many."""

_BLOCK = re.compile(r"\s*---\n(?P<yaml>.*?)(?P<end>\n---[ \t]*(\n|\Z)|\Z)", re.DOTALL)


def read_front_matter(path: Path) -> dict[str, Any]:
    """The front matter of a README, empty if there is none.

    Raises ``CheckpointError`` if it is damaged, long, or has aliases, of which ten lines can stand for ten
    thousand million words.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            start = file.read(MAX_FRONT_MATTER + 100)
        match = _BLOCK.match(start)
        if match is None or not (match["end"] or len(start) > MAX_FRONT_MATTER):
            return {}
        if not match["end"]:
            raise CheckpointError(
                f"{path} is wrong because its front matter has more than {MAX_FRONT_MATTER >> 10} kB; "
                "shorten it"
            )
        content = yaml.load(match["yaml"], _WithoutAliases)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = " ".join(str(error).split())[:100]
        raise CheckpointError(f"{path} cannot be read ({reason}); mend its front matter") from error
    if not isinstance(content, dict | None):
        raise CheckpointError(f"{path} cannot be read (it holds no fields); mend its front matter")
    return content or {}


class _WithoutAliases(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases")
        return super().compose_node(parent, index)

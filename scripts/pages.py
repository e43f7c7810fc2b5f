"""What the scripts share that make a page of docs/ from a file of rows."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"


def shown(value: object) -> str:
    """A changed setting as it appears on a page."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def write_page(name: str, page: Callable[[list[dict[str, Any]]], str], description: str | None) -> None:
    """Writes docs/NAME.md from the rows of docs/NAME.jsonl, or only compares with ``--check``."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    lines = (DOCS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    made, path = page([json.loads(line) for line in lines]), DOCS / f"{name}.md"
    if not options.check:
        path.write_text(made, encoding="utf-8")
    elif not path.exists() or path.read_text(encoding="utf-8") != made:
        sys.exit(f"docs/{name}.md is not up to date. Run python {sys.argv[0]}.")

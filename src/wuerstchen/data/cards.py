"""Limits on the YAML in data set cards, checked before Hugging Face's library parses it.

The library takes a second for 30 KB, and a few lines of nested aliases can expand to gigabytes.
"""

import os
import re
from pathlib import Path
from typing import Any

from wuerstchen.data.files import open_file
from wuerstchen.errors import DataError

_CARDS = ("README.md", ".huggingface.yaml")
_BLOCK = re.compile(rb"\s*---[\r\n]([\s\S]*?)[\r\n]---[ \t]*(?:[\r\n]|$)")  # the YAML at the top of a README
_MAX_YAML = 1 << 18  # bytes
_MAX_README = 1 << 24  # bytes
_MAX_NODES = 100_000  # values after expanding aliases
_MAX_DEPTH = 100


def check_regular(folder: Path) -> None:
    """Raises ``DataError`` if a folder contains FIFOs or devices, on which a library would block."""
    for place, _, files in os.walk(folder):
        for name in files:
            path = Path(place) / name
            if path.exists() and not path.is_file():
                raise DataError(f"File {str(path)!r} is not a regular file. Remove it, or replace it.")


def check_card(name: str) -> None:
    """Raises ``DataError`` if a data set, a folder or a name on the hub, has too much YAML to parse in a few
    seconds."""
    if os.path.isdir(name):
        check_regular(Path(name))
        cards = [Path(name) / file for file in _CARDS]
    else:
        cards = _from_hub(name)
    for card in cards:
        if card.exists():
            _check(card)


def unavailable_reason(name: str) -> str | None:
    """Why a data set is neither on the hub nor in the cache, or None if it is.

    This is faster than the library, which tries for half a minute.
    """
    from huggingface_hub import HfApi, constants

    if (
        os.path.isdir(name)
        or (Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}").is_dir()
    ):
        return None
    try:
        HfApi().dataset_info(name, timeout=10.0)
    except Exception as error:  # the hub's client has its own exceptions
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None


def _from_hub(name: str) -> list[Path]:
    """The cards of a data set on the hub, or those in its cache without a network."""
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    try:
        # One request fails fast. Without a network, downloads retry for half a minute.
        info = HfApi().dataset_info(name, timeout=10.0)
        there = {sibling.rfilename for sibling in info.siblings or ()}
        return [
            Path(hf_hub_download(name, file, repo_type="dataset", revision=info.sha))
            for file in _CARDS
            if file in there
        ]
    except Exception:  # the library reports it if it matters
        try:
            cached = [try_to_load_from_cache(name, file, repo_type="dataset") for file in _CARDS]
        except ValueError:  # not a valid name
            return []
        return [Path(path) for path in cached if isinstance(path, str)]


def _check(card: Path) -> None:
    with open_file(card) as stream:
        text = stream.read(_MAX_YAML)
        size = os.fstat(stream.fileno()).st_size
    if card.suffix == ".md":
        block = _BLOCK.match(text)
        fits = size <= _MAX_YAML or block is not None or text.lstrip()[:3] not in (b"---", b"")
        yaml = b"" if block is None else block[1]
    else:
        fits, yaml = size <= _MAX_YAML, text
    if not fits or size > _MAX_README or not _is_small(yaml):
        raise DataError(
            f"File {str(card)!r} is too large: its YAML may have at most {_MAX_YAML >> 10} KiB and"
            f" {_MAX_NODES} values, and the file {_MAX_README >> 20} MiB. Shorten it, or move it away."
        )


def _is_small(text: bytes) -> bool:
    """Whether YAML has few values without deep nesting. Invalid YAML passes, and the library reports it."""
    import yaml

    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    sizes: dict[str, int] = {}  # by anchor
    open_nodes: list[tuple[str | None, int]] = [(None, 0)]

    def add(count: int) -> None:
        anchor, so_far = open_nodes[-1]
        open_nodes[-1] = (anchor, so_far + count)

    try:
        for event in yaml.parse(text, Loader=loader):
            if isinstance(event, yaml.CollectionStartEvent):
                open_nodes.append((event.anchor, 1))
                if event.anchor is not None:
                    sizes[event.anchor] = (
                        _MAX_NODES + 1
                    )  # until it ends: a collection that contains itself is infinite
            elif isinstance(event, yaml.CollectionEndEvent):
                anchor, count = open_nodes.pop()
                if anchor is not None:
                    sizes[anchor] = count
                add(count)
            elif isinstance(event, yaml.AliasEvent):
                add(sizes.get(event.anchor or "", 1))
            elif isinstance(event, yaml.ScalarEvent):
                if event.anchor is not None:
                    sizes[event.anchor] = 1
                add(1)
            if len(open_nodes) > _MAX_DEPTH or open_nodes[-1][1] > _MAX_NODES:
                return False
    except (yaml.YAMLError, UnicodeError, ValueError):
        return True
    return open_nodes[0][1] <= _MAX_NODES

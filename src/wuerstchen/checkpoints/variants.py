"""Finds the files with a network's weights: whole or in shards, full or a variant such as fp16."""

import re
from collections.abc import Sequence
from pathlib import Path

from wuerstchen.checkpoints.files import read_json
from wuerstchen.errors import CheckpointError, shown

_ENDINGS = (".safetensors", ".bin")
_VARIANT = r"(?P<variant>\w+(?:-\w+)*)"
_PREFERRED = ("fp16", "bf16")
_MAX_NAME = 255
"""Length limit of a file name in bytes. File systems raise ``OSError`` for longer ones."""


def has_variant(folder: Path, variant: str) -> bool:
    """Whether ``folder`` or one of its subfolders has weights of that variant."""
    endings = (".safetensors", ".bin", ".json", ".index.json", ".*.index.json", ".index.*.json")
    patterns = [f"{place}*.{variant}{ending}" for place in ("", "*/") for ending in endings]
    return any(True for pattern in patterns for _ in folder.glob(pattern))


def is_spare_variant(path: Path) -> bool:
    """Whether a file is a variant of default weights in the same folder, which are read instead."""
    shard = r"-\d{5}-of-\d{5}"
    match = re.fullmatch(
        rf"(?P<stem>\w+)(?:{shard})?\.{_VARIANT}(?:{shard})?\.(?:safetensors|bin)", path.name
    )
    return match is not None and bool(files_of(path.parent, [match["stem"]], None))


def files_of(folder: Path, stems: Sequence[str], variant: str | None) -> list[Path]:
    """The files with default weights, or with those of a variant, in ``folder``. Empty if there are none."""
    for ending in _ENDINGS:
        for stem in stems:
            whole = folder / (f"{stem}{ending}" if variant is None else f"{stem}.{variant}{ending}")
            if whole.is_file():
                return [whole]
            for name in _index_names(stem, ending, variant):
                if (folder / name).is_file():
                    return _shards(folder / name)
    return []


def _index_names(stem: str, ending: str, variant: str | None) -> list[str]:
    """Possible names for the index of shards: that of current diffusers first, then older ones."""
    if variant is None:
        return [f"{stem}{ending}.index.json"]
    return [
        f"{stem}{ending}.index.{variant}.json",
        f"{stem}{ending}.{variant}.index.json",
        f"{stem}.{variant}{ending}.index.json",
        f"{stem}.{variant}.index{ending}.json",
    ]


def only_variant(folder: Path, stems: Sequence[str]) -> str | None:
    """The variant in a folder without default weights. None if there is none.

    Half precision is preferred. Raises ``CheckpointError`` if there are several other variants.
    """
    if not folder.is_dir():
        return None
    found: set[str] = set()
    for stem in stems:
        for ending in _ENDINGS:
            before, after = re.escape(stem), re.escape(ending)
            names = [rf"{before}\.{_VARIANT}{after}"]
            names += [
                re.escape(name).replace("VARIANT", _VARIANT) for name in _index_names(stem, ending, "VARIANT")
            ]
            for path in folder.iterdir():
                matches = (re.fullmatch(name, path.name) for name in names)
                found |= {match["variant"] for match in matches if match}
    found = {name for name in found if not re.fullmatch(r".*-\d{5}-of-\d{5}", name)}
    for preferred in _PREFERRED:
        if preferred in found:
            return preferred
    if len(found) > 1:
        raise CheckpointError(
            f"{folder} has no default weights, but several variants: {', '.join(sorted(found))[:200]}. "
            "Remove all but one, or choose one with variant= in wuerstchen.diffusers."
        )
    return next(iter(found), None)


def _shards(index: Path) -> list[Path]:
    """The files that an index names. They must be in the same folder."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index} has no weight_map. Download the model again.")
    names = sorted({str(place) for place in places.values()})
    for name in names:
        if (
            not name.isprintable()
            or len(name.encode()) > _MAX_NAME
            or Path(name).name != name
            or Path(name).suffix not in (".safetensors", ".bin")
        ):
            raise CheckpointError(
                f"{index}: {shown(name)} is not a weight file in the same folder. Download the model again."
            )
    return [index.parent / name for name in names]

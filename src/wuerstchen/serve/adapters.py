"""The adapters (LoRA) that requests can choose: those in a folder that the operator names.

Imports no torch: the service reads only the headers of files. Workers load the weights.
"""

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from wuerstchen.checkpoints.adapter_metadata import AdapterMetadata
from wuerstchen.checkpoints.untrusted_json import read_header
from wuerstchen.errors import UserError

MAX_LISTED = 500
"""Adapters of a folder that are listed, in alphabetical order."""
_MAX_NAME = 100
_IN_FOLDERS = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""Files by which a subfolder is an adapter."""


@dataclass(frozen=True)
class ListedAdapter:
    """An adapter that requests can name."""

    name: str
    path: Path
    """The file, or the folder of an adapter by diffusers or peft."""
    metadata: AdapterMetadata


class AdapterFolder:
    """The adapters in a folder. Files that are added or removed while the service runs are noticed."""

    def __init__(self, folder: Path, always: Collection[Path] = ()) -> None:
        """Adapters in ``always``, which all images have, are left out, so that no request applies them twice.

        Raises ``UserError`` if there is no such folder.
        """
        if not folder.is_dir():
            raise UserError(f"--lora-dir {folder} is not a folder. Give a folder with .safetensors files.")
        self.folder = folder
        self._always = {(_weights_of(path) or path).resolve() for path in always}
        self._known: dict[Path, tuple[object, ListedAdapter | None]] = {}

    def find(self, name: str) -> Path:
        """The path of an adapter. Raises ``UserError`` if there is none of this name any more."""
        for listed in self.scan():
            if listed.name == name:
                return listed.path
        raise UserError(f"lora {name!a} does not exist any more. Choose another adapter.")

    def scan(self) -> list[ListedAdapter]:
        """The adapters that are there now, by name. Only new and changed files are read.

        A name is that of a ``.safetensors`` file without its ending, or of a subfolder by diffusers or peft.
        Anything else is left out.
        """
        found: dict[str, ListedAdapter] = {}
        known: dict[Path, tuple[object, ListedAdapter | None]] = {}
        try:
            entries = sorted(os.scandir(self.folder), key=lambda entry: entry.name)
        except OSError:
            entries = []
        for entry in entries:
            path = Path(entry.path)
            try:
                file = _weights_of(path)
                status = None if file is None or file.resolve() in self._always else file.stat()
            except OSError:  # removed just now, or a folder that cannot be entered
                continue
            name = path.name if file is not path else path.stem
            if (
                file is None
                or status is None
                or not name.isprintable()
                or not 0 < len(name) <= _MAX_NAME
                or name[0] == "."
            ):
                continue
            state = (status.st_mtime_ns, status.st_size, status.st_ino)
            before = self._known.get(path)
            listed = before[1] if before is not None and before[0] == state else _read(name, path, file)
            known[path] = state, listed
            if listed is not None and len(found) < MAX_LISTED:
                found.setdefault(name, listed)
        self._known = known
        return list(found.values())


def _weights_of(path: Path) -> Path | None:
    """The file with the weights of an entry of the folder. None if it is no adapter by its name."""
    if path.is_dir():
        return next((path / name for name in _IN_FOLDERS if (path / name).is_file()), None)
    return path if path.suffix == ".safetensors" and path.is_file() else None


def _read(name: str, path: Path, file: Path) -> ListedAdapter | None:
    """None for a file that cannot be read, or that has no tensors of a LoRA."""
    try:
        header = read_header(file)
    except (OSError, ValueError):
        return None
    if not any("lora_" in key or ".lora" in key for key in header if key != "__metadata__"):
        return None
    metadata = header.get("__metadata__")
    texts = metadata if isinstance(metadata, dict) else {}
    texts = {key: value for key, value in texts.items() if isinstance(value, str)}
    return ListedAdapter(name, path, AdapterMetadata.of_header(texts))

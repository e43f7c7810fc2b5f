"""Files of tensors and of JSON: safetensors or torch's own, whole or in shards, from any program.

Nothing in a file is ever run: torch files are opened with ``weights_only=True``. No file takes more time or
memory than its size explains: descriptions, headers and pickles are bounded, as is their depth. What is
written appears when it is whole.
"""

import functools
import json
import os
import pickle
import re
import tempfile
import warnings
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from wuerstchen.checkpoints.pickles import check_pickle
from wuerstchen.errors import CheckpointError, UserNotice, shown

MAX_JSON = 64 << 20
"""Bytes of the largest JSON that is read, of a prepared data set."""
MAX_DESCRIPTION = 8 << 20
"""Bytes of a model's description or index: far more than any has."""
MAX_DEPTH = 100
"""How deep JSON may be nested."""
MAX_DIGITS = 40
"""Of a whole number in JSON. transformers writes 10³⁰ where there is no limit."""
MAX_HEADER = 16 << 20
"""Bytes of the header of a safetensors file: that of 100,000 tensors."""
MAX_PICKLE = 64 << 20
"""Bytes of a torch file that are not values of tensors: names, shapes, and what else was saved."""

N = TypeVar("N")
_COMPILED = re.compile(r"(^|\.)_orig_mod\.")


def read_tensors_of(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file or of a torch file that holds a state dict and nothing else.

    Raises ``CheckpointError`` if the file is missing, damaged, or holds anything but tensors.
    """
    if path.suffix == ".safetensors":
        return StoredTensors.of([path]).read()
    state = read_torch_file(path)
    if not isinstance(state, Mapping):
        raise CheckpointError(
            f"{path} is wrong because it holds a {type(state).__name__}, not a state dict; "
            "give a file with nothing but a state dict of tensors"
        )
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path} is wrong because its entry {shown(name)} is no tensor; "
                "give a file with nothing but a state dict of tensors"
            )
        check_whole(value, f"{path} is wrong because its entry {shown(name)}")
    check_apart(state.values(), str(path))
    return plain_names(state, path)


def plain_names(tensors: Mapping[str, N], where: Path | str) -> dict[str, N]:
    """The same without ``_orig_mod.``, which stands wherever a compiled module was saved.

    Raises ``CheckpointError`` if a name is then there twice.
    """
    plain = {_COMPILED.sub(r"\1", name): tensor for name, tensor in tensors.items()}
    if len(plain) < len(tensors):
        raise CheckpointError(
            f"{where} is wrong because it holds a network both compiled, under _orig_mod, and as it is; "
            "save one of them"
        )
    return plain


def check_whole(tensor: Tensor, subject: str) -> None:
    """Refuses what ``torch.save`` can store but no weight is: sparse, quantised, or without all its values.

    A tensor of stride 0 would be small in the file and of any size in memory. Raises ``CheckpointError``,
    which begins with ``subject``.
    """
    whole = (
        tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_nested
        and not tensor.is_quantized
        and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()
    )
    if not whole:
        raise CheckpointError(
            f"{subject} is not stored as a plain tensor with all its values; save it as one (.clone()) again"
        )


def check_apart(tensors: Iterable[Tensor], where: str) -> None:
    """Refuses many tensors that are views of the same few values, which would be of any size when converted.

    A few may share: tied weights do. Raises ``CheckpointError``, which begins with ``where``.
    """
    sizes: dict[int, int] = {}
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        total += tensor.nbytes
    if total > 4 * sum(sizes.values()) + (1 << 20):
        raise CheckpointError(
            f"{where} is wrong because its tensors have {total:,} bytes and share "
            f"{sum(sizes.values()):,} stored ones; save each as a tensor of its own (.clone()) again"
        )


def read_torch_file(path: Path) -> object:
    """What a file of ``torch.save`` holds: tensors, numbers, text, and containers of them.

    Raises ``CheckpointError`` if the file is missing, damaged, or holds pickled objects of other kinds.
    """
    _check_is_file(path)
    with _damage_named(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about unusual files; what cannot be read is refused
        # Mapped, so that a file is not held twice; the legacy format, which is no archive, cannot be.
        mapped = zipfile.is_zipfile(path)
        if mapped:
            _check_archive(path)
        else:
            _check_legacy(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def _check_archive(path: Path) -> None:
    """Raises ``CheckpointError`` for what torch would read wrongly, or for ever."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            # torch would map compressed bytes as if they were numbers.
            if entry.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(
                    f"{path} is wrong because it was compressed after torch.save wrote it; "
                    "get the file as it was"
                )
            if entry.filename.lower().endswith("data.pkl"):  # torch finds it in any case
                if entry.file_size > MAX_PICKLE:
                    raise ValueError(f"it has {entry.file_size:,} bytes beside its tensors")
                with archive.open(entry) as stream:
                    check_pickle(stream)


def _check_legacy(path: Path) -> None:
    """The same for the format before torch 1.6: pickles, then the values."""
    with open(path, "rb") as file:
        if file.read(2) == b"PK":
            raise ValueError("it is an archive without its end")
        file.seek(0)
        # A magic number, a version, the machine, the object, and the names of its values.
        for flat in (True, True, False, False, True):
            check_pickle(file, flat=flat)
            if file.tell() > MAX_PICKLE:
                raise ValueError(f"it has more than {MAX_PICKLE:,} bytes beside its tensors")


@dataclass(frozen=True)
class StoredTensors:
    """The tensors of one network, in one file or several: their shapes at once, their values when asked."""

    shapes: dict[str, tuple[int, ...]]
    files: tuple[Path, ...]
    metadata: dict[str, str]
    """What a safetensors file says about itself, ``format`` for one."""

    @classmethod
    def of(cls, files: Sequence[Path]) -> "StoredTensors":
        shapes: dict[str, tuple[int, ...]] = {}
        metadata: dict[str, str] = {}
        for path in files:
            _check_is_file(path)
            if path.suffix != ".safetensors":
                found = {name: tuple(tensor.shape) for name, tensor in read_tensors_of(path).items()}
            else:
                with open_safetensors(path) as file:
                    metadata |= file.metadata() or {}
                    found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
                found = plain_names(found, path)
            twice = sorted(shapes.keys() & found.keys())
            if twice:
                raise CheckpointError(
                    f"{path} is wrong because {twice[0]!r} is in another shard too; get the model again"
                )
            shapes |= found
        return cls(shapes=shapes, files=tuple(files), metadata=metadata)

    @classmethod
    def in_folder(cls, folder: Path, stems: Sequence[str], variant: str | None = None) -> "StoredTensors":
        """The tensors in ``folder`` under the first of the names ``stems`` that is there.

        safetensors comes before ``.bin``, a whole file before shards (``STEM.safetensors.index.json``). Those
        of ``variant`` (``STEM.fp16.safetensors``) come first. Where there are neither these nor full weights,
        the variant that is there is read, and a ``UserNotice`` says so.
        """
        for tried in dict.fromkeys((variant, None)):
            if files := _files_of(folder, stems, tried):
                return cls.of(files)
        if found := _only_variant(folder, stems):
            warnings.warn(
                f"{folder.parent} has weights of which only the variant {found!r} is there. It is read in "
                "place of the full weights.",
                UserNotice,
                stacklevel=2,
            )
            return cls.of(_files_of(folder, stems, found))
        if any(folder.glob("*.pdparams")):
            raise CheckpointError(
                f"{folder} holds Paddle's pickles (.pdparams), which are never opened; load the model in "
                "ppdiffusers and save it again with save_pretrained(FOLDER, safe_serialization=True)"
            )
        raise CheckpointError(
            f"{folder} holds no weights: there is no {stems[0]}.safetensors nor .bin; get the model again"
        )

    def dtype(self) -> torch.dtype:
        """The widest dtype among the floating tensors; float32 if they are of other kinds."""
        kinds: set[torch.dtype] = set()
        for path in self.files:
            if path.suffix != ".safetensors":
                kinds |= {tensor.dtype for tensor in read_tensors_of(path).values()}
                continue
            with open_safetensors(path) as file:
                stored = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (no mapping)
                kinds |= {_DTYPES[name] for name in stored if name in _DTYPES}
        kinds &= set(_DTYPES.values())
        return functools.reduce(torch.promote_types, kinds) if kinds else torch.float32

    def read(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """All tensors, floating ones in ``dtype`` if it is given."""
        tensors: dict[str, Tensor] = {}
        for path in self.files:
            if path.suffix != ".safetensors":
                tensors |= read_tensors_of(path)
                continue
            with open_safetensors(path) as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            tensors |= plain_names(found, path)
        if dtype is None:
            return tensors
        return {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}


def fill(
    network: nn.Module,
    stored: StoredTensors,
    names: Mapping[str, str],
    dtype: torch.dtype = torch.float32,
    *,
    ignored: Collection[str] = (),
) -> None:
    """Gives ``network``, built on ``meta``, the stored tensors, where ``names`` says how a key is called.

    Names and shapes are compared before anything is read; stored names in ``ignored`` may be there or not.
    Raises ``CheckpointError`` with the first that does not fit; the network is then as it was.
    """
    where = stored.files[0]
    expected = {names.get(key, key): (key, tuple(t.shape)) for key, t in network.state_dict().items()}
    for name in sorted(expected.keys() | stored.shapes.keys() - set(ignored)):
        wanted = expected[name][1] if name in expected else "unknown"
        found = stored.shapes.get(name, "missing")
        if wanted != found:
            raise CheckpointError(
                f"{where} is wrong because {name!r} is {found} there and {wanted} by its configuration; "
                "get both again"
            )
    tensors = stored.read(dtype)
    state = network.state_dict()
    for name, (key, _) in expected.items():
        if tensors[name].is_floating_point() != state[key].is_floating_point():
            raise CheckpointError(
                f"{where} is wrong because {name!r} is {tensors[name].dtype} there, which {state[key].dtype} "
                "cannot be read from; get it again"
            )
    network.load_state_dict({key: tensors[name] for name, (key, _) in expected.items()}, assign=True)
    network.eval().requires_grad_(False)


def read_json(path: Path, most: int = MAX_DESCRIPTION) -> dict[str, Any]:
    """The object in a JSON file of at most so many bytes.

    Raises ``CheckpointError`` if it is missing, no object, or larger, and as ``parse_json`` does.
    """
    _check_is_file(path)
    with _damage_named(path):
        if path.stat().st_size > most:
            raise CheckpointError(
                f"{path} is wrong because it has more than {most >> 20} MB; get the model again"
            )
        content = parse_json(path.read_bytes())
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is wrong because it holds no JSON object; get the model again")
    return content


def parse_json(text: str | bytes) -> Any:
    """What JSON holds. Raises ``ValueError`` if it is none, too deep, or has a whole number that is too long.

    Numbers that pass can be made a float, and containers can be gone through by functions that call
    themselves.
    """
    try:
        content = json.loads(text, parse_int=_whole_number)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    level: list[Any] = [content]
    for _ in range(MAX_DEPTH + 1):
        containers = [one for one in level if isinstance(one, dict | list)]
        if not containers:
            return content
        level = [v for one in containers for v in (one.values() if isinstance(one, dict) else one)]
    raise ValueError(f"it is nested more than {MAX_DEPTH} deep")


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"it has a whole number of {len(digits)} digits")
    return int(digits)


def check_header(path: Path) -> None:
    """Raises ``ValueError`` for a safetensors file whose header alone would take minutes."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if MAX_HEADER < length < path.stat().st_size:  # a length beyond the file is refused by safetensors
        raise ValueError(f"its header has {length} bytes, more than {MAX_HEADER >> 20} MB")


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """``safetensors.safe_open`` for a file that anybody may have written.

    Raises ``CheckpointError`` if it is missing or damaged or has an absurd header, and turns whatever is
    raised while it is open into one.
    """
    _check_is_file(path)
    with _damage_named(path):
        check_header(path)
        with safe_open(path, framework="pt") as opened:
            yield opened


def write_safetensors(
    tensors: Mapping[str, Tensor],
    path: Path,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a safetensors file whole: to a temporary name first, flushed to disk, then renamed.

    Floating tensors are stored in ``dtype`` if it is given.
    """
    partial = path.with_name(f".{path.name}.partial")
    if dtype is not None:
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    try:
        save_file(contiguous, partial, metadata=dict(metadata))
        partial.chmod(0o644)  # safetensors leaves files that nobody else can read
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path} cannot be written ({error}); free some space or choose another folder"
        ) from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON whole: to a temporary name first, flushed to disk, then renamed. Raises ``OSError``."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``folder`` when all in it is written, and vanishes otherwise.

    Raises ``CheckpointError`` if ``folder`` exists or cannot be made.
    """
    if os.path.lexists(folder):
        raise CheckpointError(f"{folder} exists already; choose another folder or remove it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as name:
            partial = Path(name) / folder.name
            partial.mkdir()
            yield partial
            os.rename(partial, folder)
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written ({error.strerror or error}); free some space, or choose another"
        ) from error


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What safetensors calls them."""
_ENDINGS = (".safetensors", ".bin")
_VARIANT = r"(?P<variant>\w+(?:-\w+)*)"
_PREFERRED = ("fp16", "bf16")


def has_variant(folder: Path, variant: str) -> bool:
    """Whether a file of weights in ``folder``, or in a folder inside it, is of that variant."""
    endings = (".safetensors", ".bin", ".json", ".index.json", ".*.index.json", ".index.*.json")
    patterns = [f"{place}*.{variant}{ending}" for place in ("", "*/") for ending in endings]
    return any(True for pattern in patterns for _ in folder.glob(pattern))


def is_spare_variant(path: Path) -> bool:
    """Whether a file is of a variant of weights that lie beside it in full, which are read in its place."""
    shard = r"-\d{5}-of-\d{5}"
    match = re.fullmatch(
        rf"(?P<stem>\w+)(?:{shard})?\.{_VARIANT}(?:{shard})?\.(?:safetensors|bin)", path.name
    )
    return match is not None and bool(_files_of(path.parent, [match["stem"]], None))


def _files_of(folder: Path, stems: Sequence[str], variant: str | None) -> list[Path]:
    """The files of full weights, or of those of a variant, in ``folder``; empty if there are none."""
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
    """What the index of shards may be called: by diffusers of today first, then by older ones."""
    if variant is None:
        return [f"{stem}{ending}.index.json"]
    return [
        f"{stem}{ending}.index.{variant}.json",
        f"{stem}{ending}.{variant}.index.json",
        f"{stem}.{variant}{ending}.index.json",
        f"{stem}.{variant}.index{ending}.json",
    ]


def _only_variant(folder: Path, stems: Sequence[str]) -> str | None:
    """The variant in a folder without full weights, None if there is none.

    Half precision comes before others. Raises ``CheckpointError`` where several others are there.
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
            f"{folder} has no full weights and several variants: {', '.join(sorted(found))[:200]}. One of "
            "them can be read. Leave only that one there, or name it with variant= in wuerstchen.diffusers."
        )
    return next(iter(found), None)


def _shards(index: Path) -> list[Path]:
    """The files that an index names, which lie beside it."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index} is wrong because it has no weight_map; get the model again")
    names = sorted({str(place) for place in places.values()})
    for name in names:
        if (
            not name.isprintable()
            or Path(name).name != name
            or Path(name).suffix not in (".safetensors", ".bin")
        ):
            raise CheckpointError(
                f"{index} is wrong because {name!r} is no file of weights beside it; get the model again"
            )
    return [index.parent / name for name in names]


def _check_is_file(path: Path) -> None:
    if not os.path.isfile(path):  # Path.is_file raises for names that are too long, and for locked folders
        raise CheckpointError(f"{path} is wrong because there is no such file; check the name")


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turns whatever a reader raises into a ``CheckpointError``: damage can surface as almost anything."""
    try:
        yield
    except CheckpointError:
        raise
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} is wrong because it is not a torch file, or holds pickled objects, which are never run; "
            "give a file with nothing but tensors"
        ) from None
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{path} is wrong because it cannot be read ({reason}); download it again"
        ) from None

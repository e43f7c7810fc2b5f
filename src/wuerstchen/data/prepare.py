"""``wuerstchen data prepare``: captioned pictures to a prepared set, on any number of processes.

The work is cut into shards of images and of texts, each a function of the plan alone, which rank 0 makes by
reading names, captions and metadata once. Processes talk through files in ``OUT/work`` and nothing else:

    plan.json               settings and numbers of shards; items.arrow and texts.arrow were written before it
    images-00007.json       shard 7 of the images is whole, with its SHA-256 and what was dropped from it
    rank-1.lock             held for as long as that process lives

Process r of n makes the shards r, r + n, ... that are not there yet; rank 0 waits for all of them and writes
``prepared.json`` last. So a kill costs the shards that were being made, and neither it nor the number of
processes changes a byte of what comes out (the processes being alike: same device, same number of threads).
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from filelock import FileLock, Timeout
from jaxtyping import Float16, UInt8
from PIL import Image
from tqdm import tqdm

from wuerstchen.checkpoints.hub import local_folder
from wuerstchen.checkpoints.layouts import Sources, layout_of, read_model
from wuerstchen.checkpoints.native import read_network, read_settings
from wuerstchen.checkpoints.text_encoder import read_text_encoder
from wuerstchen.checkpoints.weights import write_json
from wuerstchen.data.buckets import Crop, bucket_of, bucket_sizes, crop_boxes
from wuerstchen.data.filters import Filters, Tally, size_in
from wuerstchen.data.prepared import (
    DESCRIPTION,
    FORMAT,
    Positions,
    States,
    bytes_per_image,
    check_shard,
    features,
    fingerprint,
    quantize_states,
    read_description,
    sha256,
    text_fingerprint,
)
from wuerstchen.data.readers import Reader, import_datasets
from wuerstchen.errors import DataError, RunFolderError, UserError, out_of_memory_named
from wuerstchen.images import decode_image
from wuerstchen.models.cascade import CascadeSettings
from wuerstchen.models.compressor import Compressor, compressor_input, latent_side
from wuerstchen.models.text import PromptTooLongWarning, TextEncoder

Precision = Literal["float32", "bfloat16"]
GRACE = 60.0
"""Seconds after which a process that others wait for is taken for dead, if it holds no lock."""
LOCK_WAIT = 5.0
"""Seconds to wait for one's own lock, which others hold for a moment to see whether it is held."""
_POLL = 0.2
_ROWS = 64  # rows in a batch of the Arrow files
_NAMED = 10  # damaged pictures that are named at the end; the rest is in prepared.json


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What is to be stored. ``None`` stands for what suits the model."""

    size: int | None = None
    """A picture has about size × size pixels; a multiple of 128."""
    max_ratio: float = 2.0
    """Of a bucket's longer side over its shorter; 1 makes all pictures square."""
    crop: Crop = "centre"
    crops: int = 1
    """Of each picture; training chooses among them."""
    filters: Filters = field(default_factory=Filters)
    text_states: States = "none"
    text_positions: Positions | None = None
    seed: int = 0
    precision: Precision = "float32"
    batch_size: int = 32
    """Pictures, or texts, that the networks see at a time."""
    shard_size: int = 1024
    """Images, or texts, in a file: what a kill can cost."""

    def __post_init__(self) -> None:
        for name, kind in (
            ("crop", Crop),
            ("text_states", States),
            ("text_positions", Positions),
            ("precision", Precision),
        ):
            value = getattr(self, name)
            if value not in get_args(kind) and not (name == "text_positions" and value is None):
                raise UserError(f"{name} {value!r} is unknown; use one of {', '.join(get_args(kind))}")
        for name, most in (("crops", 64), ("batch_size", 4096), ("shard_size", 65536)):
            value = getattr(self, name)
            if not 1 <= value <= most:
                raise UserError(f"{name} {value} is wrong because it must be from 1 to {most}; change it")
        if self.crop == "centre" and self.crops > 1:
            raise UserError(
                f"crops {self.crops} is wrong because all centre crops of a picture are the same;"
                " use --crop random or saliency, or one crop"
            )


@dataclass(frozen=True, kw_only=True)
class Networks:
    """What pictures and captions are prepared with."""

    compressor: Compressor
    text_encoder: TextEncoder
    settings: CascadeSettings


def read_networks(
    model: str | Path, *, text_encoder: str | None = None, revision: str | None = None
) -> Networks:
    """The compressor and the text encoder of a model, in any layout that has them, onto the CPU.

    Raises ``CheckpointError`` for what is damaged, ``UserError`` for a model without one of the two.
    """
    path = local_folder(model, revision=revision)
    if text_encoder is None and path.is_dir() and layout_of(path) == "native":
        settings, parts = read_settings(path / "model.json")
        found: dict[str, Any] = {}
        if "compressor" in parts:
            found["compressor"], _ = read_network(path / "compressor.safetensors")
        if "text_encoder" in parts:
            found["text_encoder"] = read_text_encoder(path / "text_encoder")
    else:
        cascade = read_model(path, Sources(text_encoder=text_encoder, revision=revision))
        settings = cascade.settings
        found = {name: getattr(cascade, name) for name in ("compressor", "text_encoder")}
    for part in ("compressor", "text_encoder"):
        if found.get(part) is None:
            raise UserError(
                f"model {str(model)!r} is wrong because it has no {part.replace('_', ' ')}, which data is"
                " prepared with; give one that has, such as the original's .pt files or a native folder"
            )
    return Networks(
        compressor=found["compressor"].eval(), text_encoder=found["text_encoder"], settings=settings
    )


@dataclass(frozen=True)
class Rank:
    """Which of how many processes this is."""

    number: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls) -> "Rank":
        """As torchrun says it in RANK and WORLD_SIZE; alone without them."""
        names = ("RANK", "WORLD_SIZE")
        values = [os.environ.get(name, default) for name, default in zip(names, ("0", "1"), strict=True)]
        if not all(value.isdecimal() for value in values) or int(values[0]) >= int(values[1]):
            raise UserError(
                f"RANK={values[0]} WORLD_SIZE={values[1]} is wrong because a rank is a number below the world"
                " size; start the processes with torchrun, or unset both"
            )
        return cls(*map(int, values))


def prepare(
    reader: Reader,
    out: Path | str,
    networks: Networks,
    config: PrepareConfig,
    *,
    source: str = "",
    device: torch.device | None = None,
    workers: int = 0,
    rank: Rank | None = None,
    announce: Callable[[str], None] = lambda line: None,
) -> dict[str, Any] | None:
    """Makes or finishes the prepared set ``out``, or this process' share of it.

    ``source`` is how the set names where it came from, ``workers`` threads decode pictures. Returns the
    content of ``prepared.json``, None for other ranks than 0. Pictures that cannot be read are skipped,
    counted and named. Raises ``RunFolderError`` for an ``out`` with other settings, of another source, in
    use, or not writable, and ``DataError`` if no picture is left.
    """
    out = Path(out)
    rank = rank or Rank.from_environment()
    device = device or torch.device("cpu")
    run = _Run(
        reader=reader,
        out=out,
        networks=networks,
        config=config,
        settings=_settings(reader, networks, config, rank),
        device=device,
        workers=workers,
        rank=rank,
        announce=announce,
    )
    try:
        if run.finished():
            return run.done_already()
        with _present(out, rank):
            networks.compressor.to(device)
            networks.text_encoder.to(device)
            plan = run.plan(source)
            if plan is None:
                return run.done_already()
            run.make_shards(plan)
            return None if rank.number else run.finish(plan)
    except OSError as error:
        raise RunFolderError(
            f"folder {str(out)!r} cannot be written ({error.strerror or error}); free some space or mend its"
            " permissions, and start the same command again: what is there is kept"
        ) from error


def summary(description: dict[str, Any]) -> list[str]:
    """What came of it, in lines to print."""
    images, texts = description["images"], description["texts"]
    lines = [f"{images['rows']} images of {description['items']} with a caption, {texts['rows']} texts"]
    lines += [f"  dropped {count}: {reason}" for reason, count in description["dropped"].items()]
    damaged = description["damaged"]
    lines += [f"  damaged: {name} ({reason})" for name, reason in damaged[:_NAMED]]
    if len(damaged) > _NAMED:
        lines.append(f"  and {len(damaged) - _NAMED} more, which {DESCRIPTION} names")
    lines += [f"  {width}x{height}: {count}" for width, height, count in description["buckets"]]
    if description["enlarged"]:
        lines.append(
            f"  {description['enlarged']} crops were enlarged: their pictures are smaller than the bucket"
        )
    if description["cut_texts"]:
        lines.append(
            f"  {description['cut_texts']} texts were cut because they are longer than the text model reads"
        )
    size = description["bytes_per_image"]
    states = f", {size['with_states']:.0f} with states" if texts["state_bytes"] else ""
    lines.append(f"  {size['without_states']:.0f} bytes an image{states}")
    return lines


def _settings(reader: Reader, networks: Networks, config: PrepareConfig, rank: Rank) -> dict[str, Any]:
    """All that the bytes of the set depend on, as JSON gives it back."""
    model, encoder = networks.settings, networks.text_encoder
    size = config.size if config.size is not None else model.image_size
    buckets = bucket_sizes(size, config.max_ratio)
    channels = networks.compressor.config.c_latent
    positions = config.text_positions or ("real" if model.text_mask else "all")
    settings = {
        # Only rank 0 reads through the source; the others find its plan.
        "source": reader.fingerprint() if rank.number == 0 else None,
        **dataclasses.asdict(config),
        "size": size,
        "text_positions": positions,
        "buckets": buckets,
        "maps": [
            (channels, *(latent_side(round(side * model.view_scale)) for side in (height, width)))
            for width, height in buckets
        ],
        "view_scale": model.view_scale,
        "compressor": fingerprint(networks.compressor),
        "text_encoder": text_fingerprint(encoder),
        "text_width": encoder.width,
        "text_length": encoder.text_positions,
        "pad_id": encoder.pad_id,
        "vocabulary": encoder.tokenizer.get_vocab_size(),
    }
    return json.loads(json.dumps(settings))


@contextlib.contextmanager
def _present(out: Path, rank: Rank) -> Iterator[None]:
    """Holds this rank's lock, which goes with the process, however it ends."""
    allowed = {"work", "images", "texts", DESCRIPTION}
    if out.exists() and not out.is_dir():
        raise RunFolderError(f"{str(out)!r} is wrong because it is no folder; give a new one")
    others = {path.name for path in out.iterdir()} - allowed if out.exists() else set()
    if others:
        raise RunFolderError(
            f"folder {str(out)!r} is wrong because it holds other things ({min(others)}); give a new folder"
        )
    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(_lock_path(work, rank.number))
    try:
        lock.acquire(timeout=LOCK_WAIT)
    except Timeout as error:
        raise RunFolderError(
            f"folder {str(out)!r} is in use by another process of rank {rank.number}; wait for it to end"
        ) from error
    with lock:
        yield


def _lock_path(work: Path, rank: int) -> Path:
    return work / f"rank-{rank}.lock"


@dataclass(frozen=True)
class _Picture:
    name: str
    item: int
    texts: list[int]
    size: tuple[int, int]
    bucket: int
    boxes: list[tuple[float, float, float, float]]
    crops: UInt8[np.ndarray, "crops h w 3"]


@dataclass(frozen=True)
class _Dropped:
    kind: str
    name: str = ""
    reason: str = ""  # of damage


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One process at work."""

    reader: Reader
    out: Path
    networks: Networks
    config: PrepareConfig
    settings: dict[str, Any]
    device: torch.device
    workers: int
    rank: Rank
    announce: Callable[[str], None]

    @property
    def work(self) -> Path:
        return self.out / "work"

    def check_same(self, found: dict[str, Any]) -> None:
        """Raises ``RunFolderError`` if the folder was begun with other settings."""
        for name, ours in self.settings.items():
            if name == "source" and ours is None:
                continue
            if found.get(name) != ours:
                what = (
                    f"another {name.replace('_', ' ')}"
                    if name in ("source", "compressor", "text_encoder")
                    else f"{name} {found.get(name)!r} and not {ours!r}"
                )
                raise RunFolderError(
                    f"folder {str(self.out)!r} is wrong because it was begun with {what};"
                    " start the command as it was, or choose another folder"
                )

    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return (self.out / DESCRIPTION).exists()

    def done_already(self) -> dict[str, Any] | None:
        """What is there, with what a kill at the very end may have left removed."""
        description = read_description(self.out)
        self.check_same(description["settings"])
        shutil.rmtree(self.work, ignore_errors=True)
        if self.rank.number:
            return None
        self.announce(f"{self.out} is finished already")
        return description

    # The plan

    def plan(self, source: str) -> dict[str, Any] | None:
        """The plan that is there, or a new one of rank 0; None if the set has been finished meanwhile."""
        path = self.work / "plan.json"
        if self.rank.number:
            self._wait(path, 0)
        elif not path.exists() and not self.finished():
            self._make_plan(path, source)
        try:
            plan = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            if self.finished():
                return None
            raise
        self.check_same(plan["settings"])
        return plan

    def _make_plan(self, path: Path, source: str) -> None:
        if any((self.out / table).exists() for table in ("images", "texts")):
            raise RunFolderError(
                f"folder {str(self.out)!r} is wrong because it holds shards and no plan; give a new folder"
            )
        import_datasets()
        import pyarrow as pa

        tally, numbers = Tally(), dict[str, int]()
        kept = found = 0
        schema = pa.schema(
            {
                "item": pa.int64(),
                "name": pa.string(),
                "texts": pa.list_(pa.int32()),
                "place": pa.list_(pa.int64()),
                "sized": pa.bool_(),
            }
        )

        def rows() -> Iterator[dict[str, Any]]:
            nonlocal kept, found
            filters = self.config.filters
            for item in tqdm(self.reader.items(tally), desc="reading captions", unit="img", disable=None):
                number, found = found, found + 1
                size = size_in(item.fields)
                verdict = filters.verdict(item.fields)
                if verdict is None and size is not None:
                    verdict = filters.verdict_on_size(size)
                if verdict is not None:
                    tally.drop(verdict)
                    continue
                kept += 1
                texts = [numbers.setdefault(caption, len(numbers)) for caption in item.captions]
                yield {
                    "item": number,
                    "name": item.name,
                    "texts": texts,
                    "place": list(item.place),
                    "sized": size is not None,
                }

        shard_size = self.config.shard_size
        _write_plan_table(self.work / "items.arrow", schema, rows(), shard_size)
        texts = ({"text": text} for text in numbers)
        _write_plan_table(self.work / "texts.arrow", pa.schema({"text": pa.string()}), texts, shard_size)
        if not kept:
            raise self._nothing_left(found, tally)
        plan = {
            "settings": self.settings,
            "source": source,
            "items": found,
            "images": kept,
            "texts": len(numbers),
            "shards": {"images": -(-kept // shard_size), "texts": -(-len(numbers) // shard_size)},
            **tally.to_json(),
        }
        write_json(path, plan)

    def _nothing_left(self, found: int, tally: Tally) -> DataError:
        reasons = ", ".join(f"{count} {reason}" for reason, count in tally.dropped.most_common(5))
        return DataError(
            f"data is wrong because of {found} captioned images none is left ({reasons or 'there are none'});"
            " loosen the filters or give other data"
        )

    # The shards

    def make_shards(self, plan: dict[str, Any]) -> None:
        """This process' share of those that are missing."""
        mine = [
            (table, number)
            for table in ("images", "texts")
            for number in range(plan["shards"][table])
            if number % self.rank.world_size == self.rank.number
        ]
        missing = [(table, number) for table, number in mine if not self._done(table, number).exists()]
        self._announce_start(plan, len(missing), len(mine))
        for table in ("images", "texts"):
            (self.out / table).mkdir(exist_ok=True)
        with (
            ThreadPoolExecutor(max(1, self.workers)) as pool,
            tqdm(total=len(missing) * self.config.shard_size, unit="row", disable=None) as bar,
            torch.inference_mode(),
            out_of_memory_named(f"batch_size={self.config.batch_size}"),
        ):
            for table, number in missing:
                bar.set_description(f"{table}, shard {number}", refresh=False)
                if table == "images":
                    self._make_images(number, pool, bar)
                else:
                    self._make_texts(number, bar)

    def _announce_start(self, plan: dict[str, Any], missing: int, mine: int) -> None:
        if self.rank.number:
            return
        settings = self.settings
        positions = settings["text_length"]
        share = min(1.0, plan["texts"] / plan["images"])
        size = bytes_per_image(
            map_numbers=max(int(np.prod(shape)) for shape in settings["maps"]),
            crops=self.config.crops,
            tokens=positions * share,
            positions=positions * share,
            width=settings["text_width"],
            states=self.config.text_states,
        )
        self.announce(
            f"{plan['images']} of {plan['items']} captioned images pass the filters, with {plan['texts']}"
            f" texts; at most about {plan['images'] * size / 1e9:.3g} GB; {missing} of this process' {mine}"
            " shards are to be made"
        )

    def _done(self, table: str, number: int) -> Path:
        return self.work / f"{table}-{number:05d}.json"

    def _make_images(self, number: int, pool: ThreadPoolExecutor, bar: "tqdm[Any]") -> None:
        tally = Tally()
        pictures: list[_Picture] = []
        maps: list[Float16[np.ndarray, "crops c h w"]] = []
        waiting: dict[int, list[tuple[int, int, np.ndarray]]] = {}

        def compress(bucket: int) -> None:
            batch = waiting.pop(bucket)
            made = self._compressed(np.stack([pixels for _, _, pixels in batch]))
            for (row, crop, _), values in zip(batch, made, strict=True):
                maps[row][crop] = values

        rows = _plan_rows(self.work / "items.arrow", number)
        ahead = 2 * max(1, self.workers)
        for made in _in_order(pool, self._picture, rows, ahead):
            bar.update()
            if isinstance(made, _Dropped):
                if made.reason:
                    tally.damage(made.kind, made.name, made.reason)
                else:
                    tally.drop(made.kind)
                continue
            # The pixels are not kept beyond their turn: a shard of them would be gigabytes.
            pictures.append(dataclasses.replace(made, crops=made.crops[:0]))
            maps.append(np.empty((len(made.crops), *self.settings["maps"][made.bucket]), np.float16))
            for crop, pixels in enumerate(made.crops):
                queue = waiting.setdefault(made.bucket, [])
                queue.append((len(maps) - 1, crop, pixels))
                if len(queue) == self.config.batch_size:
                    compress(made.bucket)
        for bucket in sorted(waiting):
            compress(bucket)
        whole = [bool(np.isfinite(values).all()) for values in maps]
        for picture, fine in zip(pictures, whole, strict=True):
            if not fine:
                tally.damage("map not finite", picture.name, "the compressor's map holds NaN or infinity")
        kept = [(p, m) for p, m, fine in zip(pictures, maps, whole, strict=True) if fine]
        columns = {
            "name": [p.name for p, _ in kept],
            "item": [p.item for p, _ in kept],
            "texts": [np.array(p.texts) for p, _ in kept],
            "width": [p.size[0] for p, _ in kept],
            "height": [p.size[1] for p, _ in kept],
            "bucket": [p.bucket for p, _ in kept],
            "boxes": [np.array(p.boxes).ravel() for p, _ in kept],
            "maps": [m.ravel() for _, m in kept],
        }
        buckets = [tuple(bucket) for bucket in self.settings["buckets"]]
        enlarged = sum(box[2] - box[0] < buckets[p.bucket][0] for p, _ in kept for box in p.boxes)
        counts = Counter(p.bucket for p, _ in kept)
        more = {"buckets": [counts[bucket] for bucket in range(len(buckets))], "enlarged": enlarged}
        self._write_shard("images", number, columns, {**more, **tally.to_json()})

    def _picture(self, row: dict[str, Any]) -> _Picture | _Dropped:
        """Reads, decodes and crops one picture."""
        name = row["name"]
        try:
            image = decode_image(self.reader.read(name, tuple(row["place"])), name)
        except DataError as error:
            return _Dropped("damaged image", name, str(error))
        if not row["sized"]:
            verdict = self.config.filters.verdict_on_size(image.size)
            if verdict is not None:
                return _Dropped(verdict)
        buckets = [tuple(bucket) for bucket in self.settings["buckets"]]
        bucket = bucket_of(image.size, buckets)
        size = buckets[bucket]
        config = self.config
        boxes = crop_boxes(image, size, config.crop, config.crops, config.seed, row["item"])
        crops = [np.asarray(image.resize(size, Image.Resampling.LANCZOS, box=box)) for box in boxes]
        return _Picture(name, row["item"], row["texts"], image.size, bucket, boxes, np.stack(crops))

    def _compressed(self, images: UInt8[np.ndarray, "b h w 3"]) -> Float16[np.ndarray, "b c h2 w2"]:
        pixels = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float().div(255).contiguous()
        view = compressor_input(pixels, self.networks.settings.view_scale)
        with self._autocast():
            return self.networks.compressor(view).float().half().cpu().numpy()

    def _make_texts(self, number: int, bar: "tqdm[Any]") -> None:
        encoder = self.networks.text_encoder
        texts = [row["text"] for row in _plan_rows(self.work / "texts.arrow", number)]
        with warnings.catch_warnings(record=True) as cut:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", PromptTooLongWarning)
            tokens = [encoder.tokens(text) for text in texts]
        columns: dict[str, list[Any]] = {"text": texts, "tokens": [np.array(ids) for ids in tokens]}
        if self.config.text_states == "none":
            bar.update(len(texts))
        else:
            columns |= {"states": [], "scales": []}
            for start in range(0, len(texts), self.config.batch_size):
                batch = tokens[start : start + self.config.batch_size]
                with self._autocast():
                    made = encoder.encode_tokens(batch).states.float().cpu().numpy()
                for text, ids, states in zip(texts[start:], batch, made, strict=False):
                    self._add_states(columns, text, states[: self._positions(ids)])
                bar.update(len(batch))
            if self.config.text_states == "fp16":
                del columns["scales"]
        state_bytes = sum(values.nbytes for name in ("states", "scales") for values in columns.get(name, []))
        self._write_shard("texts", number, columns, {"state_bytes": state_bytes, "cut_texts": len(cut)})

    def _positions(self, tokens: Sequence[int]) -> int:
        return len(tokens) if self.settings["text_positions"] == "real" else self.settings["text_length"]

    def _add_states(self, columns: dict[str, list[Any]], text: str, states: np.ndarray) -> None:
        if self.config.text_states == "fp16":
            limit = np.finfo(np.float16).max
            fits = bool(np.isfinite(states).all() and np.abs(states).max() <= limit)
            columns["states"].append(states.astype(np.float16) if fits else states)
        else:
            fits = bool(np.isfinite(states).all())
            if fits:
                values, scales = quantize_states(states)
                columns["states"].append(values.ravel())
                columns["scales"].append(scales)
        if not fits:
            raise DataError(
                f"text {text[:100]!r} is wrong because its states hold NaN, infinity or more than they are"
                " stored in; use --precision float32 and --text-states int8, or another text encoder"
            )
        columns["states"][-1] = columns["states"][-1].ravel()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def _write_shard(
        self, table: str, number: int, columns: dict[str, list[Any]], more: dict[str, Any]
    ) -> None:
        """Writes the Arrow file whole, and after it the note that it is there."""
        import pyarrow as pa

        schema = features(self.config.text_states, self.settings["vocabulary"])[table].arrow_schema
        path = self.out / table / f"{number:05d}.arrow"
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        count = len(columns[schema.names[0]])
        try:
            with open(partial, "wb") as file:
                with pa.ipc.new_stream(file, schema) as writer:
                    for start in range(0, count, _ROWS):
                        rows = slice(start, min(start + _ROWS, count))
                        arrays = [_arrow_array(columns[f.name][rows], f.type) for f in schema]
                        writer.write_batch(pa.record_batch(arrays, schema=schema))
                file.flush()
                os.fsync(file.fileno())
            digest, size = sha256(partial), partial.stat().st_size
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        shard = {"file": path.name, "rows": count, "bytes": size, "sha256": digest}
        write_json(self._done(table, number), {**shard, **more})

    # The end

    def finish(self, plan: dict[str, Any]) -> dict[str, Any]:
        """Waits for all shards and writes what makes them a set."""
        datasets = import_datasets()
        notes: dict[str, list[dict[str, Any]]] = {}
        for table in ("images", "texts"):
            notes[table] = []
            for number in range(plan["shards"][table]):
                self._wait(self._done(table, number), number % self.rank.world_size)
                note = json.loads(self._done(table, number).read_text(encoding="utf-8"))
                check_shard(self.out / table / note["file"], note, verify=False)
                notes[table].append(note)
        tally = Tally.from_json(plan)
        for note in notes["images"]:
            tally.add(Tally.from_json(note))
        rows = {table: sum(note["rows"] for note in notes[table]) for table in notes}
        if not rows["images"]:
            raise self._nothing_left(plan["items"], tally)
        sizes = {table: sum(note["bytes"] for note in notes[table]) for table in notes}
        state_bytes = sum(note["state_bytes"] for note in notes["texts"])
        total = sizes["images"] + sizes["texts"]
        keys = ("file", "rows", "bytes", "sha256")
        tables = {
            table: {
                "rows": rows[table],
                "bytes": sizes[table],
                "shards": [{key: note[key] for key in keys} for note in notes[table]],
            }
            for table in notes
        }
        tables["texts"]["state_bytes"] = state_bytes
        counts = np.sum([note["buckets"] for note in notes["images"]], axis=0).tolist()
        description = {
            "format": FORMAT,
            "settings": self.settings,
            "source": plan["source"],
            "items": plan["items"],
            **tally.to_json(),
            "buckets": [[*b, n] for b, n in zip(self.settings["buckets"], counts, strict=True)],
            "enlarged": sum(note["enlarged"] for note in notes["images"]),
            "cut_texts": sum(note["cut_texts"] for note in notes["texts"]),
            "bytes_per_image": {
                "without_states": (total - state_bytes) / rows["images"],
                "with_states": total / rows["images"],
            },
            **tables,
        }
        columns = features(self.config.text_states, self.settings["vocabulary"])
        for table, content in tables.items():
            folder = self.out / table
            for partial in folder.glob(".*.partial"):  # of processes that were killed
                partial.unlink(missing_ok=True)
            # What datasets.load_from_disk looks for.
            datasets.DatasetInfo(features=columns[table]).write_to_directory(str(folder))
            digest = hashlib.sha256("".join(shard["sha256"] for shard in content["shards"]).encode())
            state = {
                "_data_files": [{"filename": shard["file"]} for shard in content["shards"]],
                "_fingerprint": digest.hexdigest()[:16],
                "_format_columns": None,
                "_format_kwargs": {},
                "_format_type": None,
                "_output_all_columns": False,
                "_split": None,
            }
            write_json(folder / "state.json", state)
        write_json(self.out / DESCRIPTION, description)
        shutil.rmtree(self.work, ignore_errors=True)
        return description

    def _wait(self, path: Path, author: int) -> None:
        """Until ``author`` has written ``path``, or all is finished.

        Raises ``RunFolderError`` if it has died before that.
        """
        last_seen = time.monotonic()
        while not path.exists() and not self.finished():
            if self._is_alive(author):
                last_seen = time.monotonic()
            elif time.monotonic() - last_seen > GRACE and not path.exists():
                raise RunFolderError(
                    f"process {author} of {self.rank.world_size} has ended, or never began, before its"
                    f" part of {str(self.out)!r} was made; start the same command again, it goes on"
                )
            time.sleep(_POLL)

    def _is_alive(self, rank: int) -> bool:
        if rank == self.rank.number:
            return True
        try:
            with FileLock(_lock_path(self.work, rank)).acquire(timeout=0):
                return False
        except Timeout:
            return True


_Row = TypeVar("_Row")
_Made = TypeVar("_Made")


def _in_order(
    pool: ThreadPoolExecutor, make: Callable[[_Row], _Made], rows: Iterable[_Row], ahead: int
) -> Iterator[_Made]:
    """``make`` of each row in their order, of which no more than ``ahead`` are made in advance."""
    futures: deque[Future[_Made]] = deque()
    try:
        for row in rows:
            futures.append(pool.submit(make, row))
            if len(futures) > ahead:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        for future in futures:
            future.cancel()


def _arrow_array(values: Sequence[Any], kind: Any) -> Any:
    import pyarrow as pa

    if not pa.types.is_list(kind):
        return pa.array(values, type=kind)
    ends = np.cumsum([0, *(len(row) for row in values)])
    assert ends[-1] < 2**31  # _ROWS times the largest row
    flat = np.concatenate(values).astype(kind.value_type.to_pandas_dtype(), copy=False)
    return pa.ListArray.from_arrays(
        pa.array(ends, type=pa.int32()), pa.array(flat, type=kind.value_type), type=kind
    )


def _write_plan_table(path: Path, schema: Any, rows: Iterable[dict[str, Any]], shard_size: int) -> None:
    """Writes rows so that batch number i holds those of shard i."""
    import pyarrow as pa

    def write(writer: Any, chunk: list[dict[str, Any]]) -> None:
        writer.write_batch(pa.RecordBatch.from_pylist(chunk, schema=schema))

    with open(path, "wb") as file:
        with pa.ipc.new_file(file, schema) as writer:
            chunk: list[dict[str, Any]] = []
            for row in rows:
                chunk.append(row)
                if len(chunk) == shard_size:
                    write(writer, chunk)
                    chunk = []
            if chunk:
                write(writer, chunk)
        file.flush()
        os.fsync(file.fileno())


def _plan_rows(path: Path, shard: int) -> list[dict[str, Any]]:
    import pyarrow as pa

    with pa.memory_map(str(path)) as file, pa.ipc.open_file(file) as reader:
        return reader.get_batch(shard).to_pylist()

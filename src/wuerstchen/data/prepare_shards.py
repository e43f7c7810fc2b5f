"""Shards of a prepared set: pictures through the compressor to maps, captions to tokens and states.

A shard is a function of the plan and of the networks alone. Its Arrow file is written whole, and after it a
note that it is there, with its SHA-256 and what was dropped.
"""

import dataclasses
import os
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float16, UInt8
from PIL import Image
from tqdm import tqdm

from wuerstchen.checkpoints.files import write_json
from wuerstchen.data.buckets import bucket_of, crop_boxes
from wuerstchen.data.filters import Tally
from wuerstchen.data.items import NotDownloaded, Reader
from wuerstchen.data.prepare_networks import Networks
from wuerstchen.data.prepare_plan import PrepareConfig, plan_rows
from wuerstchen.data.prepared import features, quantize_states
from wuerstchen.data.prepared_check import sha256
from wuerstchen.errors import DataError, out_of_memory_named
from wuerstchen.images import decode_image
from wuerstchen.models.compressor import compressor_input
from wuerstchen.models.text import PromptTooLongWarning

_ROWS = 64  # rows in a batch of the Arrow files


def note_of(work: Path, table: str, number: int) -> Path:
    """The note that a shard is there."""
    return work / f"{table}-{number:05d}.json"


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
class ShardMaker:
    """Makes shards in ``out``, of the plan in ``out/work``; ``workers`` threads decode pictures."""

    reader: Reader
    out: Path
    networks: Networks
    config: PrepareConfig
    settings: dict[str, Any]
    device: torch.device
    workers: int

    @property
    def work(self) -> Path:
        return self.out / "work"

    def make(self, missing: list[tuple[str, int]]) -> None:
        """The shards of these tables and numbers."""
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

        rows = plan_rows(self.work / "items.arrow", number)
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
        except NotDownloaded:  # lists have many of them: they are counted, not named
            return _Dropped("not downloaded")
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
        return self.networks.compressor(view).float().half().cpu().numpy()

    def _make_texts(self, number: int, bar: "tqdm[Any]") -> None:
        encoder = self.networks.text_encoder
        texts = [row["text"] for row in plan_rows(self.work / "texts.arrow", number)]
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
        write_json(note_of(self.work, table, number), {**shard, **more})


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

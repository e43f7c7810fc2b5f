"""Shards of a prepared set: images to semantic latents, captions to tokens and text states.

The contents of a shard depend on the plan and the networks only. Its Arrow file is written whole, and after
it a note that the shard is complete, with its SHA-256 and what was dropped.
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
from wuerstchen.data.items import NotDownloaded
from wuerstchen.data.prepare_job import PrepareJob
from wuerstchen.data.prepare_plan import plan_rows
from wuerstchen.data.prepared import features, quantize_states
from wuerstchen.data.prepared_check import TABLES, sha256
from wuerstchen.errors import DataError, out_of_memory_named
from wuerstchen.images import decode_image
from wuerstchen.models.compressor import compressor_input
from wuerstchen.models.text import PromptTooLongWarning

_ROWS = 64  # rows in a batch of the Arrow files


@dataclass(frozen=True)
class _CroppedImage:
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
    reason: str = ""  # only for damaged images


@dataclass(frozen=True)
class ShardMaker:
    """Makes the shards of a job."""

    job: PrepareJob

    def make(self, missing: list[tuple[str, int]]) -> None:
        """Makes the shards with these tables and numbers."""
        job = self.job
        for table in TABLES:
            (job.out / table).mkdir(exist_ok=True)
        with (
            ThreadPoolExecutor(max(1, job.execution.workers)) as pool,
            tqdm(total=len(missing) * job.config.shard_size, unit="row", disable=None) as bar,
            torch.inference_mode(),
            out_of_memory_named(f"batch_size={job.config.batch_size}"),
        ):
            for table, number in missing:
                bar.set_description(f"{table}, shard {number}", refresh=False)
                if table == "images":
                    self._make_images(number, pool, bar)
                else:
                    self._make_texts(number, bar)

    def _make_images(self, number: int, pool: ThreadPoolExecutor, bar: "tqdm[Any]") -> None:
        job, tally = self.job, Tally()
        compressor = _BatchCompressor(job)
        rows = plan_rows(job.work / "items.arrow", number)
        for found in _map_in_order(pool, self._cropped, rows, ahead=2 * max(1, job.execution.workers)):
            bar.update()
            if isinstance(found, _CroppedImage):
                compressor.add(found)
            elif found.reason:
                tally.damage(found.kind, found.name, found.reason)
            else:
                tally.drop(found.kind)
        kept: list[tuple[_CroppedImage, np.ndarray]] = []
        for image, latents in compressor.finish():
            if np.isfinite(latents).all():
                kept.append((image, latents))
            else:
                reason = "the compressor's semantic latents contain NaN or infinity"
                tally.damage("map not finite", image.name, reason)  # the key in prepared.json
        columns = {
            "name": [image.name for image, _ in kept],
            "item": [image.item for image, _ in kept],
            "texts": [np.array(image.texts) for image, _ in kept],
            "width": [image.size[0] for image, _ in kept],
            "height": [image.size[1] for image, _ in kept],
            "bucket": [image.bucket for image, _ in kept],
            "boxes": [np.array(image.boxes).ravel() for image, _ in kept],
            "maps": [latents.ravel() for _, latents in kept],
        }
        counts = Counter(image.bucket for image, _ in kept)
        widths = [width for width, _ in job.buckets]
        note = {
            "buckets": [counts[bucket] for bucket in range(len(widths))],
            "enlarged": sum(
                box[2] - box[0] < widths[image.bucket] for image, _ in kept for box in image.boxes
            ),
            **tally.to_json(),
        }
        self._write_shard("images", number, columns, note)

    def _cropped(self, row: dict[str, Any]) -> _CroppedImage | _Dropped:
        """Reads, decodes and crops one image."""
        name, config, buckets = row["name"], self.job.config, self.job.buckets
        try:
            image = decode_image(self.job.reader.read(name, tuple(row["place"])), name)
        except NotDownloaded:  # lists can contain many of these, so they are counted but not named
            return _Dropped("not downloaded")
        except DataError as error:
            return _Dropped("damaged image", name, str(error))
        if not row["sized"]:
            reason = config.filters.drop_reason_for_size(image.size)
            if reason is not None:
                return _Dropped(reason)
        bucket = bucket_of(image.size, buckets)
        size = buckets[bucket]
        boxes = crop_boxes(image, size, config.crop, config.crops, config.seed, row["item"])
        crops = [np.asarray(image.resize(size, Image.Resampling.LANCZOS, box=box)) for box in boxes]
        return _CroppedImage(name, row["item"], row["texts"], image.size, bucket, boxes, np.stack(crops))

    def _make_texts(self, number: int, bar: "tqdm[Any]") -> None:
        job = self.job
        encoder, config = job.networks.text_encoder, job.config
        texts = [row["text"] for row in plan_rows(job.work / "texts.arrow", number)]
        with warnings.catch_warnings(record=True) as cut:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", PromptTooLongWarning)
            tokens = [encoder.tokens(text) for text in texts]
        columns: dict[str, list[Any]] = {"text": texts, "tokens": [np.array(ids) for ids in tokens]}
        if config.text_states == "none":
            bar.update(len(texts))
        else:
            columns |= {"states": [], "scales": []}
            for start in range(0, len(texts), config.batch_size):
                batch = tokens[start : start + config.batch_size]
                with self._autocast():
                    encoded = encoder.encode_tokens(batch).states.float().cpu().numpy()
                for text, ids, states in zip(texts[start:], batch, encoded, strict=False):
                    self._add_states(columns, text, states[: self._positions(ids)])
                bar.update(len(batch))
            if config.text_states == "fp16":
                del columns["scales"]
        state_bytes = sum(values.nbytes for name in ("states", "scales") for values in columns.get(name, []))
        self._write_shard("texts", number, columns, {"state_bytes": state_bytes, "cut_texts": len(cut)})

    def _positions(self, tokens: Sequence[int]) -> int:
        settings = self.job.settings
        return len(tokens) if settings["text_positions"] == "real" else settings["text_length"]

    def _add_states(self, columns: dict[str, list[Any]], text: str, states: np.ndarray) -> None:
        if self.job.config.text_states == "fp16":
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
                f"The text states of {text[:100]!r} contain NaN, infinity, or values beyond the range of"
                f" {self.job.config.text_states}. Use --precision float32 and --text-states int8, or another"
                " text encoder."
            )
        columns["states"][-1] = columns["states"][-1].ravel()

    def _autocast(self) -> torch.autocast:
        enabled = self.job.config.precision == "bfloat16"
        return torch.autocast(self.job.execution.device.type, torch.bfloat16, enabled=enabled)

    def _write_shard(
        self, table: str, number: int, columns: dict[str, list[Any]], note: dict[str, Any]
    ) -> None:
        """Writes the whole Arrow file, and after it the note that the shard is complete."""
        schema = features(self.job.config.text_states, self.job.settings["vocabulary"])[table].arrow_schema
        path = self.job.out / table / f"{number:05d}.arrow"
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        count = len(columns[schema.names[0]])
        try:
            _write_stream(partial, schema, columns, count)
            digest, size = sha256(partial), partial.stat().st_size
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        shard = {"file": path.name, "rows": count, "bytes": size, "sha256": digest}
        write_json(self.job.note(table, number), {**shard, **note})


class _BatchCompressor:
    """Compresses the crops of a shard in batches, each of crops of one size."""

    def __init__(self, job: PrepareJob) -> None:
        self.job = job
        self.images: list[_CroppedImage] = []
        self.latents: list[Float16[np.ndarray, "crops c h w"]] = []
        self._waiting: dict[int, list[tuple[int, int, np.ndarray]]] = {}
        """By bucket the crops of the next batch: index of the image, number of the crop, pixels."""

    def add(self, image: _CroppedImage) -> None:
        # Pixels are dropped once they are compressed: those of a whole shard would take gigabytes.
        self.images.append(dataclasses.replace(image, crops=image.crops[:0]))
        shape = self.job.settings["maps"][image.bucket]
        self.latents.append(np.empty((len(image.crops), *shape), np.float16))
        for crop, pixels in enumerate(image.crops):
            queue = self._waiting.setdefault(image.bucket, [])
            queue.append((len(self.latents) - 1, crop, pixels))
            if len(queue) == self.job.config.batch_size:
                self._compress_batch(image.bucket)

    def finish(self) -> Iterator[tuple[_CroppedImage, Float16[np.ndarray, "crops c h w"]]]:
        """Compresses the remaining crops. Yields all images, without pixels, and their semantic latents."""
        for bucket in sorted(self._waiting):
            self._compress_batch(bucket)
        yield from zip(self.images, self.latents, strict=True)

    def _compress_batch(self, bucket: int) -> None:
        batch = self._waiting.pop(bucket)
        compressed = self._compressed(np.stack([pixels for _, _, pixels in batch]))
        for (index, crop, _), latents in zip(batch, compressed, strict=True):
            self.latents[index][crop] = latents

    def _compressed(self, images: UInt8[np.ndarray, "b h w 3"]) -> Float16[np.ndarray, "b c h2 w2"]:
        device, networks = self.job.execution.device, self.job.networks
        pixels = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float().div(255).contiguous()
        view = compressor_input(pixels, networks.settings.view_scale)
        return networks.compressor(view).float().half().cpu().numpy()


_Row = TypeVar("_Row")
_Result = TypeVar("_Result")


def _map_in_order(
    pool: ThreadPoolExecutor, function: Callable[[_Row], _Result], rows: Iterable[_Row], ahead: int
) -> Iterator[_Result]:
    """``function`` of each row, in order, with at most ``ahead`` results computed in advance."""
    futures: deque[Future[_Result]] = deque()
    try:
        for row in rows:
            futures.append(pool.submit(function, row))
            if len(futures) > ahead:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        for future in futures:
            future.cancel()


def _write_stream(path: Path, schema: Any, columns: dict[str, list[Any]], count: int) -> None:
    """Writes ``count`` rows as an Arrow stream, and waits until they are on the disk."""
    import pyarrow as pa

    with open(path, "wb") as file:
        with pa.ipc.new_stream(file, schema) as writer:
            for start in range(0, count, _ROWS):
                rows = slice(start, min(start + _ROWS, count))
                arrays = [_arrow_array(columns[field.name][rows], field.type) for field in schema]
                writer.write_batch(pa.record_batch(arrays, schema=schema))
        file.flush()
        os.fsync(file.fileno())


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

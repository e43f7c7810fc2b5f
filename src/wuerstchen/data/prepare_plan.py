"""What is to be made of a source: the settings, and the first pass over names, captions and metadata.

The plan is three files: ``items.arrow`` and ``texts.arrow`` with a batch of rows for every shard, and
``plan.json``, which is written last.
"""

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from tqdm import tqdm

from wuerstchen.checkpoints.files import write_json
from wuerstchen.data.buckets import Crop, bucket_sizes
from wuerstchen.data.filters import SCORES, Filters, Tally, size_in
from wuerstchen.data.items import Reader
from wuerstchen.data.prepare_networks import Networks
from wuerstchen.data.prepared import BYTES_PER_SHARD, fingerprint, text_fingerprint
from wuerstchen.data.prepared_check import DESCRIPTION, MAX_DESCRIPTION, Positions, States
from wuerstchen.data.tables import import_datasets
from wuerstchen.errors import DataError, UserError
from wuerstchen.models.compressor import latent_side

Precision = Literal["float32", "bfloat16"]

COLOURS = "sRGB"
"""What pictures are converted to. Plans without it were made when colour profiles were ignored."""


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
    """Of the text encoder. Maps are what is learnt from and are always made in float32, as in training."""
    batch_size: int = 32
    """Pictures, or texts, that the networks see at a time."""
    shard_size: int = 1024
    """Images, or texts, in a file: what a kill can cost."""
    image_column: str | None = None
    """What the reader was opened with, so that a set is of one column from beginning to end."""
    text_column: str | None = None

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


def settings_of(reader: Reader | None, networks: Networks, config: PrepareConfig) -> dict[str, Any]:
    """All that the bytes of the set depend on, as JSON gives it back; the source where a reader is given."""
    model, encoder = networks.settings, networks.text_encoder
    size = config.size if config.size is not None else model.image_size
    buckets = bucket_sizes(size, config.max_ratio)
    channels = networks.compressor.config.c_latent
    positions = config.text_positions or ("real" if model.text_mask else "all")
    settings = {
        "source": reader.fingerprint() if reader is not None else None,
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
    if config.precision == "bfloat16":  # sets of earlier versions have maps in it too
        settings["maps_precision"] = "float32"
    return json.loads(json.dumps(settings))


def make_plan(
    work: Path, reader: Reader, config: PrepareConfig, settings: dict[str, Any], source: str
) -> None:
    """Reads names, captions and metadata once, and writes the tables of what passes and then ``plan.json``.

    Raises ``DataError`` if nothing passes, or if no image has a score that is filtered by, and ``UserError``
    for more shards than can be described.
    """
    import_datasets()
    import pyarrow as pa

    tally, numbers = Tally(), dict[str, int]()
    kept = found = 0
    without: Counter[str] = Counter()
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
        filters = config.filters
        for item in tqdm(reader.items(tally), desc="reading captions", unit="img", disable=None):
            number, found = found, found + 1
            without.update(filters.lacking(item.fields))
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

    shard_size = config.shard_size
    _write_table(work / "items.arrow", schema, rows(), shard_size)
    texts = ({"text": text} for text in numbers)
    _write_table(work / "texts.arrow", pa.schema({"text": pa.string()}), texts, shard_size)
    useless = [score for score, count in without.items() if count == found]
    if useless and not config.filters.strict:
        raise _no_scores(found, useless[0])
    if not kept:
        raise nothing_left(found, tally)
    shards = {"images": -(-kept // shard_size), "texts": -(-len(numbers) // shard_size)}
    if sum(shards.values()) * BYTES_PER_SHARD > MAX_DESCRIPTION // 2:
        raise UserError(
            f"shard_size {shard_size} makes {sum(shards.values())} shards, more than {DESCRIPTION} can"
            " describe. Use a larger --shard-size"
        )
    plan = {
        "settings": settings,
        "source": source,
        "colours": COLOURS,
        "items": found,
        "images": kept,
        "texts": len(numbers),
        "shards": shards,
        "without_score": {} if config.filters.strict else dict(without),
        **tally.to_json(),
    }
    write_json(work / "plan.json", plan)


def _no_scores(found: int, score: str) -> DataError:
    """What to raise for a filter that does nothing, because no image has its score."""
    option = {"watermark": "--max-watermark", "aesthetic": "--min-aesthetic", "unsafe": "--max-unsafe"}[score]
    return DataError(
        f"{option} would filter nothing: none of the {found} images has a score for it. It is read from"
        f" {', '.join(SCORES[score])}. Rename the column to one of these, or leave {option} out"
    )


def nothing_left(found: int, tally: Tally) -> DataError:
    """What to raise if of ``found`` pictures with a caption none is left."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in tally.dropped.most_common(5))
    return DataError(
        f"data is wrong because of {found} captioned images none is left ({reasons or 'there are none'});"
        " loosen the filters or give other data"
    )


def plan_rows(path: Path, shard: int) -> list[dict[str, Any]]:
    """The rows of shard number ``shard``, of ``items.arrow`` or ``texts.arrow``."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as file, pa.ipc.open_file(file) as reader:
        return reader.get_batch(shard).to_pylist()


def _write_table(path: Path, schema: Any, rows: Iterable[dict[str, Any]], shard_size: int) -> None:
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

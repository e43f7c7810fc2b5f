"""The settings of a prepared set, and the plan: one pass over names, captions and metadata.

The plan consists of three files: ``items.arrow`` and ``texts.arrow``, which have a batch of rows for each
shard, and ``plan.json``, which is written last.
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

TextPrecision = Literal["float32", "bfloat16"]

COLOUR_SPACE = "sRGB"
"""What images are converted to. Plans without it come from versions that ignored colour profiles."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What to store. ``None`` means the model's own value."""

    size: int | None = None
    """Images are stored with about size × size pixels. A multiple of 128."""
    max_ratio: float = 2.0
    """Largest ratio of a bucket's longer side to its shorter side. 1 makes all images square."""
    crop: Crop = "centre"
    crops: int = 1
    """Crops stored of each image. Training picks one of them at random."""
    filters: Filters = field(default_factory=Filters)
    text_states: States = "none"
    text_positions: Positions | None = None
    seed: int = 0
    precision: TextPrecision = "float32"
    """Precision of the text encoder. Semantic latents are always computed in float32, as in training."""
    batch_size: int = 32
    """Images, or texts, per forward pass."""
    shard_size: int = 1024
    """Images, or texts, in a file. If the process is killed, only the shards in progress are lost."""
    image_column: str | None = None
    """The column that the reader was opened with, recorded so that a set never mixes two columns."""
    text_column: str | None = None

    def __post_init__(self) -> None:
        for name, kind in (
            ("crop", Crop),
            ("text_states", States),
            ("text_positions", Positions),
            ("precision", TextPrecision),
        ):
            value = getattr(self, name)
            if value not in get_args(kind) and not (name == "text_positions" and value is None):
                raise UserError(f"{name} must be one of {', '.join(get_args(kind))}, got {value!r}.")
        for name, most in (("crops", 64), ("batch_size", 4096), ("shard_size", 65536)):
            value = getattr(self, name)
            if not 1 <= value <= most:
                raise UserError(f"{name} must be between 1 and {most}, got {value}.")
        if self.crop == "centre" and self.crops > 1:
            raise UserError(
                f"crops must be 1 with crop centre, got {self.crops}. All centre crops of an image are the"
                " same. Use --crop random or --crop saliency, or one crop."
            )


def settings_of(reader: Reader | None, networks: Networks, config: PrepareConfig) -> dict[str, Any]:
    """Everything that the contents of the set depend on, as read back from JSON.

    ``source`` is None without a reader.
    """
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
    if config.precision == "bfloat16":  # earlier versions computed the latents in bfloat16 too
        settings["maps_precision"] = "float32"
    return json.loads(json.dumps(settings))


def make_plan(
    work: Path, reader: Reader, config: PrepareConfig, settings: dict[str, Any], source: str
) -> None:
    """Reads names, captions and metadata once, writes the tables of what passes the filters, and then
    ``plan.json``.

    Raises ``DataError`` if nothing passes, or if no image has a score that a filter needs, and ``UserError``
    for more shards than ``prepared.json`` can describe.
    """
    import_datasets()
    import pyarrow as pa

    selection = _Selection(config.filters)
    item_schema = pa.schema(
        {
            "item": pa.int64(),
            "name": pa.string(),
            "texts": pa.list_(pa.int32()),
            "place": pa.list_(pa.int64()),
            "sized": pa.bool_(),
        }
    )
    text_schema = pa.schema({"text": pa.string()})
    _write_table(work / "items.arrow", item_schema, selection.rows(reader), config.shard_size)
    texts = ({"text": text} for text in selection.texts)
    _write_table(work / "texts.arrow", text_schema, texts, config.shard_size)
    selection.check()
    counts = {"images": selection.kept, "texts": len(selection.texts)}
    plan = {
        "settings": settings,
        "source": source,
        "colours": COLOUR_SPACE,
        "items": selection.found,
        **counts,
        "shards": _shards(counts, config.shard_size),
        "without_score": {} if config.filters.strict else dict(selection.without_score),
        **selection.tally.to_json(),
    }
    write_json(work / "plan.json", plan)


class _Selection:
    """Counts what a reader offers, and yields a row for each image that passes the filters."""

    def __init__(self, filters: Filters) -> None:
        self.filters = filters
        self.tally = Tally()
        self.found = self.kept = 0
        self.texts: dict[str, int] = {}
        """Each different caption, and its row in the table of texts."""
        self.without_score: Counter[str] = Counter()

    def rows(self, reader: Reader) -> Iterator[dict[str, Any]]:
        for item in tqdm(reader.items(self.tally), desc="reading captions", unit="img", disable=None):
            number, self.found = self.found, self.found + 1
            self.without_score.update(self.filters.missing_scores(item.fields))
            size = size_in(item.fields)
            reason = self.filters.drop_reason(item.fields)
            if reason is None and size is not None:
                reason = self.filters.drop_reason_for_size(size)
            if reason is not None:
                self.tally.drop(reason)
                continue
            self.kept += 1
            yield {
                "item": number,
                "name": item.name,
                "texts": [self.texts.setdefault(caption, len(self.texts)) for caption in item.captions],
                "place": list(item.place),
                "sized": size is not None,
            }

    def check(self) -> None:
        """Raises ``DataError`` if nothing passed, or if a filter has no score to read."""
        useless = [score for score, count in self.without_score.items() if count == self.found]
        if useless and not self.filters.strict:
            raise _no_scores(self.found, useless[0])
        if not self.kept:
            raise nothing_left(self.found, self.tally)


def _shards(counts: dict[str, int], shard_size: int) -> dict[str, int]:
    """The number of shards of each table. Raises ``UserError`` if ``prepared.json`` cannot describe them."""
    shards = {table: -(-count // shard_size) for table, count in counts.items()}
    number = sum(shards.values())
    if number * BYTES_PER_SHARD > MAX_DESCRIPTION // 2:
        raise UserError(
            f"shard_size {shard_size} makes {number} shards, more than {DESCRIPTION} can describe. Use a"
            " larger --shard-size."
        )
    return shards


def _no_scores(found: int, score: str) -> DataError:
    """The error for a filter that has no effect because no image has its score."""
    option = {"watermark": "--max-watermark", "aesthetic": "--min-aesthetic", "unsafe": "--max-unsafe"}[score]
    return DataError(
        f"{option} has no effect: none of the {found} images has the score, which is read from the columns"
        f" {', '.join(SCORES[score])}. Rename your column to one of these, or omit {option}."
    )


def nothing_left(found: int, tally: Tally) -> DataError:
    """The error if none of ``found`` captioned images is left."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in tally.dropped.most_common(5))
    return DataError(
        f"No images are left of {found} captioned images ({reasons or 'there are none'}). Loosen the filters,"
        " or use other data."
    )


def plan_rows(path: Path, shard: int) -> list[dict[str, Any]]:
    """The rows of one shard in ``items.arrow`` or ``texts.arrow``."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as file, pa.ipc.open_file(file) as reader:
        return reader.get_batch(shard).to_pylist()


def _write_table(path: Path, schema: Any, rows: Iterable[dict[str, Any]], shard_size: int) -> None:
    """Writes rows, with the rows of shard i in batch i."""
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

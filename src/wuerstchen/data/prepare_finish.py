"""The end of preparing: the files that make shards a set, and the summary to print."""

import hashlib
from typing import Any

import numpy as np

from wuerstchen.checkpoints.files import write_json
from wuerstchen.data.filters import Tally
from wuerstchen.data.prepare_job import PrepareJob
from wuerstchen.data.prepare_plan import nothing_left
from wuerstchen.data.prepared import features
from wuerstchen.data.prepared_check import DESCRIPTION, FORMAT, SHARD_KEYS
from wuerstchen.data.tables import import_datasets

Notes = dict[str, list[dict[str, Any]]]
"""What each process noted about its shards, by table and in the order of their numbers."""

_LISTED = 10  # damaged images that the summary lists; prepared.json lists more


def finish_set(job: PrepareJob, plan: dict[str, Any], notes: Notes) -> dict[str, Any]:
    """Writes what ``datasets.load_from_disk`` needs, and ``prepared.json`` last. Returns its content.

    Raises ``DataError`` if no image is left.
    """
    tally = Tally.from_json(plan)
    for note in notes["images"]:
        tally.add(Tally.from_json(note))
    if not sum(note["rows"] for note in notes["images"]):
        raise nothing_left(plan["items"], tally)
    description = _description(job, plan, notes, tally)
    _write_dataset_files(job, description)
    write_json(job.out / DESCRIPTION, description)
    return description


def _description(job: PrepareJob, plan: dict[str, Any], notes: Notes, tally: Tally) -> dict[str, Any]:
    """The content of ``prepared.json``."""
    tables: dict[str, dict[str, Any]] = {
        table: {
            "rows": sum(note["rows"] for note in shards),
            "bytes": sum(note["bytes"] for note in shards),
            "shards": [{key: note[key] for key in SHARD_KEYS} for note in shards],
        }
        for table, shards in notes.items()
    }
    rows = tables["images"]["rows"]
    size = sum(table["bytes"] for table in tables.values())
    state_bytes = sum(note["state_bytes"] for note in notes["texts"])
    tables["texts"]["state_bytes"] = state_bytes
    counts = np.sum([note["buckets"] for note in notes["images"]], axis=0).tolist()
    return {
        "format": FORMAT,
        "settings": job.settings,
        "source": plan["source"],
        "items": plan["items"],
        "without_score": plan.get("without_score", {}),
        **tally.to_json(),
        "buckets": [[*bucket, count] for bucket, count in zip(job.buckets, counts, strict=True)],
        "enlarged": sum(note["enlarged"] for note in notes["images"]),
        "cut_texts": sum(note["cut_texts"] for note in notes["texts"]),
        "bytes_per_image": {"without_states": (size - state_bytes) / rows, "with_states": size / rows},
        **tables,
    }


def _write_dataset_files(job: PrepareJob, description: dict[str, Any]) -> None:
    """Writes the files that ``datasets.load_from_disk`` looks for next to the shards."""
    datasets = import_datasets()
    columns = features(job.config.text_states, job.settings["vocabulary"])
    for table in columns:
        folder = job.out / table
        for partial in folder.glob(".*.partial"):  # left by killed processes
            partial.unlink(missing_ok=True)
        datasets.DatasetInfo(features=columns[table]).write_to_directory(str(folder))
        shards = description[table]["shards"]
        digest = hashlib.sha256("".join(shard["sha256"] for shard in shards).encode())
        state = {
            "_data_files": [{"filename": shard["file"]} for shard in shards],
            "_fingerprint": digest.hexdigest()[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        write_json(folder / "state.json", state)


def summary(description: dict[str, Any]) -> list[str]:
    """The lines to print about a finished set."""
    images, texts = description["images"], description["texts"]
    lines = [f"{images['rows']} of {description['items']} captioned images, {texts['rows']} texts"]
    lines += [f"  dropped {count}: {reason}" for reason, count in description["dropped"].items()]
    lines += [
        f"  {count} had no {score} score and were kept (--strict drops them)"
        for score, count in description.get("without_score", {}).items()
    ]
    damaged, unnamed = description["damaged"], description.get("unnamed", 0)
    lines += [f"  damaged: {name} ({reason})" for name, reason in damaged[:_LISTED]]
    if len(damaged) > _LISTED:
        lines.append(f"  and {len(damaged) - _LISTED} more, listed in {DESCRIPTION}")
    if unnamed:
        lines.append(f"  and {unnamed} more, counted above but not listed")
    lines += [f"  {width}x{height}: {count}" for width, height, count in description["buckets"]]
    if description["enlarged"]:
        lines.append(f"  {description['enlarged']} crops were enlarged: the image is smaller than its bucket")
    if description["cut_texts"]:
        lines.append(
            f"  {description['cut_texts']} texts were truncated to the text encoder's maximum length"
        )
    size = description["bytes_per_image"]
    states = f", {size['with_states']:.0f} with states" if texts["state_bytes"] else ""
    lines.append(f"  {size['without_states']:.0f} bytes per image{states}")
    return lines

"""What the data of a run cost by number of images: memory, start-up, drawing a batch, and files.

    python benchmarks/scale.py [--images 1000000 10000000] [--extrapolate 100000000] [--ranks 1 64 512]

The data are synthetic: names, captions and sizes of images, but no images. Each measurement runs in a process
of its own, with what a rank of a training run does:

- folder: ``FolderSource`` on a list of names, without the time for listing the files on disk
- indexed: the index of tars, parquet files and hub data. It is built once and then opened by each process
- mixture: two indexed data sets of half the images with weights, as one source
- plan: ``BucketPlan``, the order of a prepared set with 10 sizes of images
- rows: ``PreparedSet.rows``, which splits a prepared set into images for training and for validation

Times are CPU times, of one process. Memory is private memory: what processes of a host do not share, without
that of the imported packages. Larger numbers of images than ``--most`` of a
kind are not measured, but extrapolated linearly from its largest measured one, and marked with "≈". A host is
8 ranks with 8 workers each. Prints a table for each kind, and a line of JSON.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from wuerstchen.data import folder
from wuerstchen.data.folder_files import Found
from wuerstchen.data.index import CACHE, IndexedSource
from wuerstchen.data.items import Item
from wuerstchen.data.mixture import MixedSource, item_of
from wuerstchen.data.plan import BucketPlan
from wuerstchen.data.prepared import PreparedSet

LIMITS = {
    "folder": 1_000_000,
    "indexed": 10_000_000,
    "mixture": 10_000_000,
    "plan": 10_000_000,
    "rows": 1_000_000,
}
"""The most images of each kind that fit into 3 GB of memory."""
PER_RANK = 8
RANKS_OF_HOST = 8
PROCESSES_OF_HOST = RANKS_OF_HOST * (1 + 8)
BATCHES = 20


def name_of(number: int) -> str:
    return f"{number // 10_000:05d}.tar:{number % 10_000:09d}"


class SyntheticReader:
    """A reader of images that are not there."""

    def __init__(self, count: int, first: int = 0) -> None:
        self.count, self.first = count, first

    def items(self, tally: object) -> Iterator[Item]:
        for number in range(self.first, self.first + self.count):
            caption = f"a photo of thing number {number}, as a caption of the usual length has it"
            yield Item(name_of(number), (caption,), {}, (number // 10_000, number % 10_000 * 1536, 150_000))

    def read(self, name: str, place: tuple[int, int, int]) -> bytes:
        raise NotImplementedError

    def fingerprint(self) -> str:
        return f"synthetic {self.first} {self.count}"


def private_bytes() -> int:
    """Private memory of this process. Pages of mapped files are shared."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) * 1024


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def opened(kind: str, count: int) -> object:
    """The data as a rank opens them."""
    if kind == "folder":
        names = [f"{number // 10_000:05d}/{number % 10_000:09d}.jpg" for number in range(count)]
        folder.find_files = lambda root, endings: Found(names, set(), set(), [])
        return folder.FolderSource(Path.cwd(), "train", caption="a photo of a thing")
    if kind == "indexed":
        return IndexedSource(SyntheticReader(count), "train", "synthetic")
    if kind == "mixture":
        half = count // 2
        readers = SyntheticReader(half), SyntheticReader(half, half)
        parts = [IndexedSource(reader, "train", f"synthetic {n}") for n, reader in enumerate(readers)]
        return MixedSource(parts, ["a", "b"], (3.0, 1.0))
    if kind == "plan":
        buckets = np.random.default_rng(0).integers(0, 10, count)
        return lambda batch_size: BucketPlan(buckets, batch_size, 0)
    import pyarrow as pa

    shards = [
        pa.array([name_of(n) for n in range(start, min(start + 100_000, count))])
        for start in range(0, count, 100_000)
    ]
    prepared = PreparedSet.__new__(PreparedSet)
    table = pa.table({"name": pa.chunked_array(shards)})
    prepared._tables = {"images": SimpleNamespace(data=table)}
    return prepared


def measure(kind: str, count: int, ranks: list[int]) -> dict[str, object]:
    """Seconds and bytes of one kind of data."""
    before, peak, began = private_bytes(), peak_bytes(), time.process_time()
    source = opened(kind, count)
    found: dict[str, object] = {"open_seconds": time.process_time() - began}
    found["open_bytes"] = private_bytes() - before
    if kind == "rows":
        began = time.process_time()
        rows = [source.rows(subset) for subset in ("train", "heldout")]
        found |= {"open_seconds": time.process_time() - began, "open_bytes": sum(row.nbytes for row in rows)}
    else:
        for number in ranks:
            first, later, private = batches_of(source, number)
            found[f"epoch_seconds_{number}"], found[f"batch_seconds_{number}"] = first, later
            found.setdefault("drawing_bytes", private - before)
    found["peak_bytes"] = peak_bytes() - peak
    return found


def batches_of(source: object, ranks: int) -> tuple[float, float, int]:
    """Seconds that a worker of one rank needs for its first batch, which includes the epoch's order, and for
    a later one in the middle of the epoch, and its private memory then. Names and
    captions are read, and no images."""
    whole, seed = (
        PER_RANK * ranks,
        ranks,
    )  # another seed, so that no order is kept from other numbers of ranks
    if callable(source):
        plan = source(whole)
        middle = len(plan.buckets) // whole // 2

        def draw(batch: int) -> None:
            plan.ids(batch)[:PER_RANK]
    else:
        middle = len(source) // whole // 2

        def draw(batch: int) -> None:
            for index in range(batch * whole, batch * whole + PER_RANK):
                item = item_of(source, index, seed)
                source.name(item)
                if not isinstance(source, MixedSource):
                    source.captions(item)

    began = time.process_time()
    draw(middle)
    first = time.process_time() - began
    began = time.process_time()
    for batch in range(middle + 1, middle + 1 + BATCHES):
        draw(batch)
    return first, (time.process_time() - began) / BATCHES, private_bytes()


def in_process(kind: str, count: int, ranks: list[int]) -> dict[str, object]:
    """``measure`` in a new process."""
    command = [sys.executable, __file__, "--one", kind, "--images", str(count)]
    said = subprocess.run([*command, "--ranks", *map(str, ranks)], stdout=subprocess.PIPE, check=True)
    return json.loads(said.stdout.splitlines()[-1])


def measured(kind: str, count: int, ranks: list[int]) -> dict[str, object]:
    """The costs of one kind. The first process builds the index, and a second one opens it."""
    built = in_process(kind, count, ranks) if kind in ("indexed", "mixture") else None
    found = in_process(kind, count, ranks)
    if built is not None:
        found["build_seconds"] = built["open_seconds"]
        files = Path(os.environ[CACHE]).rglob("*.*")
        sizes: dict[str, int] = {}
        for file in files:
            if file.is_file():
                sizes[file.name] = sizes.get(file.name, 0) + file.stat().st_size
        found["files"] = {name: size for name, size in sorted(sizes.items()) if size > 4096}
    return found


def scaled(value: object, factor: float) -> object:
    """The value for ``factor`` times as many images."""
    if isinstance(value, dict):
        return {name: scaled(item, factor) for name, item in value.items()}
    return value * factor


def extrapolated(found: dict[str, object], factor: float) -> dict[str, object]:
    """A linear extrapolation. The time of a later batch does not depend on the number of images."""
    return {
        name: value if name.startswith("batch_seconds") else scaled(value, factor)
        for name, value in found.items()
    }


def rows_of(kind: str, found: dict[str, object], ranks: list[int]) -> list[tuple[str, str]]:
    """The lines of a table."""
    lines = [("start-up of a process", _seconds(found["open_seconds"]))]
    if "build_seconds" in found:
        lines.insert(0, ("building the index, once", _seconds(found["build_seconds"])))
    lines.append(("private memory after it", _bytes(found["open_bytes"])))
    if kind != "rows":
        lines.append(("private memory of a process that draws", _bytes(found["drawing_bytes"])))
        lines.append(
            (f"of {PROCESSES_OF_HOST} such processes", _bytes(found["drawing_bytes"] * PROCESSES_OF_HOST))
        )
    lines.append(("peak memory of a process", _bytes(found["peak_bytes"])))
    for number in ranks if kind != "rows" else ():
        lines.append(
            (
                f"first batch, with an epoch's order, {number} ranks",
                _seconds(found[f"epoch_seconds_{number}"]),
            )
        )
        lines.append((f"a later batch, {number} ranks", _seconds(found[f"batch_seconds_{number}"])))
    lines += [(f"file {name}", _bytes(size)) for name, size in found.get("files", {}).items()]
    return lines


def _seconds(value: float) -> str:
    return (
        f"{1e6 * value:,.0f} µs"
        if value < 1e-3
        else f"{1e3 * value:,.1f} ms"
        if value < 1
        else f"{value:,.1f} s"
    )


def _bytes(value: float) -> str:
    return f"{value / 1e9:,.2f} GB" if value >= 1e8 else f"{value / 1e6:,.1f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--extrapolate", type=int, nargs="*", default=[100_000_000])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 64, 512])
    parser.add_argument("--kinds", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--most", type=int, help="images of all kinds that are measured, in place of LIMITS")
    parser.add_argument("--one", choices=LIMITS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.images[0], options.ranks)))
        return
    every: dict[str, dict[int, dict[str, object]]] = {}
    for kind in options.kinds:
        limit = options.most or LIMITS[kind]
        columns: dict[int, dict[str, object]] = {}
        for count in (count for count in sorted(options.images) if count <= limit):
            with tempfile.TemporaryDirectory() as cache:
                os.environ[CACHE] = cache
                columns[count] = measured(kind, count, options.ranks)
        if not columns:
            continue
        largest = max(columns)
        for count in sorted({*options.images, *options.extrapolate} - columns.keys()):
            columns[count] = {**extrapolated(columns[largest], count / largest), "extrapolated_from": largest}
        every[kind] = columns
        heads = [
            f"{'≈ ' * ('extrapolated_from' in found)}{count:,} images" for count, found in columns.items()
        ]
        print(f"\n| {kind} | {' | '.join(heads)} |\n|---|{'---:|' * len(heads)}")
        for lines in zip(*(rows_of(kind, found, options.ranks) for found in columns.values()), strict=True):
            print(f"| {lines[0][0]} | {' | '.join(value for _, value in lines)} |", flush=True)
    print(json.dumps(every))


if __name__ == "__main__":
    main()

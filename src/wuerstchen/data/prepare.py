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
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from wuerstchen.checkpoints.files import write_json
from wuerstchen.data.files import read_file
from wuerstchen.data.filters import Tally
from wuerstchen.data.items import Reader
from wuerstchen.data.locks import acquired
from wuerstchen.data.prepare_networks import Networks
from wuerstchen.data.prepare_plan import COLOURS, PrepareConfig, make_plan, nothing_left, settings_of
from wuerstchen.data.prepare_shards import ShardMaker, note_of
from wuerstchen.data.prepared import bytes_per_image, features
from wuerstchen.data.prepared_check import DESCRIPTION, FORMAT, MAX_DESCRIPTION, check_shard, read_description
from wuerstchen.data.tables import import_datasets
from wuerstchen.defaults import usual_defaults
from wuerstchen.errors import DataError, RunFolderError, UserError

GRACE = 60.0
"""Seconds after which a process that others wait for is taken for dead, if it holds no lock."""
LOCK_WAIT = 5.0
"""Seconds to wait for one's own lock, which others hold for a moment to see whether it is held."""
_POLL = 0.2
_NAMED = 10  # damaged pictures that are named at the end; the rest is in prepared.json


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


@usual_defaults()
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
        # Only rank 0 reads through the source; the others find its plan.
        settings=settings_of(None if rank.number else reader, networks, config),
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
    lines += [
        f"  {count} had no {score} score and were kept (--strict drops them)"
        for score, count in description.get("without_score", {}).items()
    ]
    damaged, unnamed = description["damaged"], description.get("unnamed", 0)
    lines += [f"  damaged: {name} ({reason})" for name, reason in damaged[:_NAMED]]
    if len(damaged) > _NAMED:
        lines.append(f"  and {len(damaged) - _NAMED} more, which {DESCRIPTION} names")
    if unnamed:
        lines.append(f"  and {unnamed} more, which are counted above and not named")
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
    try:
        lock = acquired(_lock_path(work, rank.number), timeout=LOCK_WAIT)
    except Timeout as error:
        raise RunFolderError(
            f"folder {str(out)!r} is in use by another process of rank {rank.number}; wait for it to end"
        ) from error
    with lock:
        yield


def _lock_path(work: Path, rank: int) -> Path:
    return work / f"rank-{rank}.lock"


def _read_own(path: Path, *keys: str) -> dict[str, Any]:
    """A file that a process of this or another rank wrote whole. Raises ``FileNotFoundError`` if it is not
    there, and ``RunFolderError`` if it has been damaged since."""
    if not path.exists():
        raise FileNotFoundError(path)
    try:
        content = json.loads(read_file(path, MAX_DESCRIPTION))
        lacking = [key for key in keys if key not in content]
        if lacking:
            raise ValueError(f"it has no {lacking[0]}")
    except (DataError, ValueError, TypeError, RecursionError) as error:
        raise RunFolderError(
            f"{path} is damaged ({' '.join(str(error).split())[:200]}). Remove {path.parent.parent} and start"
            " the same command again"
        ) from error
    return content


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
            if name in ("image_column", "text_column") and name not in found:
                continue  # earlier versions did not record them
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
            if any((self.out / table).exists() for table in ("images", "texts")):
                raise RunFolderError(
                    f"folder {str(self.out)!r} is wrong because it holds shards and no plan;"
                    " give a new folder"
                )
            make_plan(self.work, self.reader, self.config, self.settings, source)
        try:
            plan = _read_own(path, "settings", "shards", "dropped", "damaged")
        except FileNotFoundError:
            if self.finished():
                return None
            raise
        self.check_same(plan["settings"])
        if plan.get("colours") != COLOURS:
            raise RunFolderError(
                f"folder {str(self.out)!r} was begun by a version that ignored colour profiles. This version"
                " converts pictures to sRGB, and one set must not hold both. Choose another folder, or finish"
                " this one with the version that began it"
            )
        return plan

    # The shards

    def make_shards(self, plan: dict[str, Any]) -> None:
        """This process' share of those that are missing."""
        mine = [
            (table, number)
            for table in ("images", "texts")
            for number in range(plan["shards"][table])
            if number % self.rank.world_size == self.rank.number
        ]
        missing = [shard for shard in mine if not note_of(self.work, *shard).exists()]
        self._announce_start(plan, len(missing), len(mine))
        maker = ShardMaker(
            reader=self.reader,
            out=self.out,
            networks=self.networks,
            config=self.config,
            settings=self.settings,
            device=self.device,
            workers=self.workers,
        )
        maker.make(missing)

    def _announce_start(self, plan: dict[str, Any], missing: int, mine: int) -> None:
        if self.rank.number:
            return
        settings = self.settings
        positions = settings["text_length"]
        share = min(1.0, plan["texts"] / plan["images"])
        size = bytes_per_image(
            latent_values=max(int(np.prod(shape)) for shape in settings["maps"]),
            crops=self.config.crops,
            tokens=positions * share,
            positions=positions * share,
            width=settings["text_width"],
            states=self.config.text_states,
        )
        for score, count in plan.get("without_score", {}).items():
            self.announce(f"{count} of {plan['items']} images have no {score} score and are kept")
        self.announce(
            f"{plan['images']} of {plan['items']} captioned images pass the filters, with {plan['texts']}"
            f" texts; at most about {plan['images'] * size / 1e9:.3g} GB; {missing} of this process' {mine}"
            " shards are to be made"
        )

    # The end

    def finish(self, plan: dict[str, Any]) -> dict[str, Any]:
        """Waits for all shards and writes what makes them a set."""
        datasets = import_datasets()
        notes: dict[str, list[dict[str, Any]]] = {}
        for table in ("images", "texts"):
            notes[table] = []
            for number in range(plan["shards"][table]):
                self._wait(note_of(self.work, table, number), number % self.rank.world_size)
                note = _read_own(note_of(self.work, table, number), "file", "rows", "bytes", "sha256")
                check_shard(self.out / table / note["file"], note, verify=False)
                notes[table].append(note)
        tally = Tally.from_json(plan)
        for note in notes["images"]:
            tally.add(Tally.from_json(note))
        rows = {table: sum(note["rows"] for note in notes[table]) for table in notes}
        if not rows["images"]:
            raise nothing_left(plan["items"], tally)
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
            "without_score": plan.get("without_score", {}),
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

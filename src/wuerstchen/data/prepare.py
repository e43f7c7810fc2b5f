"""``wuerstchen data prepare``: turns captioned images into a prepared set, with any number of processes.

Rank 0 reads all names, captions and metadata once and writes a plan, which divides the work into shards of
images and shards of texts. The contents of a shard depend on the plan and the networks only. Processes
communicate through files in ``OUT/work``:

    plan.json               settings and number of shards, written after items.arrow and texts.arrow
    images-00007.json       image shard 7 is complete: its SHA-256 and what was dropped from it
    rank-1.lock             held for as long as that process lives

Process r of n makes the missing shards among r, r + n, ... Rank 0 waits for all of them and writes
``prepared.json`` last. If a process is killed, only the shards in progress are lost. Neither kills nor the
number of processes change the output, as long as all processes use the same device and number of threads.
"""

import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from wuerstchen.data.files import read_file
from wuerstchen.data.items import Reader
from wuerstchen.data.locks import acquired
from wuerstchen.data.prepare_finish import Notes, finish_set
from wuerstchen.data.prepare_job import Execution, PrepareJob
from wuerstchen.data.prepare_networks import Networks
from wuerstchen.data.prepare_plan import COLOUR_SPACE, PrepareConfig, make_plan, settings_of
from wuerstchen.data.prepare_shards import ShardMaker
from wuerstchen.data.prepared import bytes_per_image
from wuerstchen.data.prepared_check import (
    DESCRIPTION,
    MAX_DESCRIPTION,
    SHARD_KEYS,
    TABLES,
    check_shard,
    read_description,
)
from wuerstchen.defaults import usual_defaults
from wuerstchen.errors import DataError, RunFolderError

GRACE = 60.0
"""Seconds without its lock after which a process counts as dead."""
LOCK_WAIT = 5.0
"""Seconds to wait for our own lock: other processes hold it for a moment to see whether we are alive."""
_POLL = 0.2


@usual_defaults()
def prepare(
    reader: Reader,
    out: Path | str,
    networks: Networks,
    config: PrepareConfig,
    execution: Execution | None = None,
    *,
    source: str = "",
) -> dict[str, Any] | None:
    """Makes the prepared set ``out``, or finishes it. With several processes, each makes its own shards.

    ``source`` is the name that the set records for its images. Images that cannot be read are skipped,
    counted and named. Returns the content of ``prepared.json`` on rank 0, and None on other ranks.

    Raises ``RunFolderError`` if ``out`` was started with other settings or another source, is in use, or
    cannot be written, and ``DataError`` if no image is left.
    """
    execution = execution or Execution()
    rank = execution.rank.number
    # Only rank 0 reads the whole source. The other ranks read its plan.
    settings = settings_of(None if rank else reader, networks, config)
    job = PrepareJob(
        reader=reader,
        out=Path(out),
        networks=networks,
        config=config,
        settings=settings,
        execution=execution,
    )
    preparation = Preparation(job)
    try:
        if preparation.is_finished():
            return preparation.result()
        with _locked(job):
            networks.compressor.to(execution.device)
            networks.text_encoder.to(execution.device)
            plan = preparation.plan(source)
            if plan is None:
                return preparation.result()
            preparation.make_shards(plan)
            return None if rank else preparation.finish(plan)
    except OSError as error:
        raise RunFolderError(
            f"Folder {str(out)!r} cannot be written ({error.strerror or error}). Free some space or change"
            " its permissions, and start the same command again. It continues where it stopped."
        ) from error


@contextlib.contextmanager
def _locked(job: PrepareJob) -> Iterator[None]:
    """Holds this rank's lock, which is released when the process ends for any reason."""
    out, rank = job.out, job.rank.number
    allowed = {"work", *TABLES, DESCRIPTION}
    if out.exists() and not out.is_dir():
        raise RunFolderError(f"{str(out)!r} is not a folder. Choose a new folder.")
    others = {path.name for path in out.iterdir()} - allowed if out.exists() else set()
    if others:
        raise RunFolderError(
            f"Folder {str(out)!r} already contains other files ({min(others)}). Choose a new folder."
        )
    job.work.mkdir(parents=True, exist_ok=True)
    try:
        lock = acquired(job.lock(rank), timeout=LOCK_WAIT)
    except Timeout as error:
        raise RunFolderError(
            f"Folder {str(out)!r} is in use by another process of rank {rank}. Wait until it ends."
        ) from error
    with lock:
        yield


class Preparation:
    """One process's work on a prepared set, from the plan to ``prepared.json``."""

    def __init__(self, job: PrepareJob) -> None:
        self.job = job
        self.is_main = job.rank.number == 0

    def is_finished(self) -> bool:
        return (self.job.out / DESCRIPTION).exists()

    def result(self) -> dict[str, Any] | None:
        """The description of a finished set on rank 0. Removes what a kill at the very end left behind."""
        description = read_description(self.job.out)
        self._check_settings(description["settings"])
        shutil.rmtree(self.job.work, ignore_errors=True)
        if not self.is_main:
            return None
        self.job.execution.announce(f"{self.job.out} is already finished.")
        return description

    def plan(self, source: str) -> dict[str, Any] | None:
        """The existing plan, or a new one on rank 0. None if another process has finished the set."""
        job, path = self.job, self.job.work / "plan.json"
        if not self.is_main:
            self._wait(path, 0)
        elif not path.exists() and not self.is_finished():
            if any((job.out / table).exists() for table in TABLES):
                raise RunFolderError(
                    f"Folder {str(job.out)!r} contains shards but no plan. Choose a new folder."
                )
            make_plan(job.work, job.reader, job.config, job.settings, source)
        try:
            plan = _read_json(path, "settings", "shards", "dropped", "damaged")
        except FileNotFoundError:
            if self.is_finished():
                return None
            raise
        self._check_settings(plan["settings"])
        if plan.get("colours") != COLOUR_SPACE:
            raise RunFolderError(
                f"Folder {str(job.out)!r} was started by a version that ignored colour profiles. This version"
                " converts images to sRGB, and one set cannot contain both. Choose another folder, or finish"
                " this one with the earlier version."
            )
        return plan

    def _check_settings(self, found: dict[str, Any]) -> None:
        """Raises ``RunFolderError`` if the folder was started with other settings."""
        for name, ours in self.job.settings.items():
            if name == "source" and ours is None:
                continue
            if name in ("image_column", "text_column") and name not in found:
                continue  # earlier versions did not record them
            if found.get(name) != ours:
                theirs = (
                    f"another {name.replace('_', ' ')}"
                    if name in ("source", "compressor", "text_encoder")
                    else f"{name} {found.get(name)!r}, but now {name} is {ours!r}"
                )
                raise RunFolderError(
                    f"Folder {str(self.job.out)!r} was started with {theirs}. Repeat the original command, or"
                    " choose another folder."
                )

    def make_shards(self, plan: dict[str, Any]) -> None:
        """Makes this process's missing shards."""
        own = self.job.own_shards(plan)
        missing = [shard for shard in own if not self.job.note(*shard).exists()]
        if self.is_main:
            self._announce_start(plan, len(missing), len(own))
        ShardMaker(self.job).make(missing)

    def _announce_start(self, plan: dict[str, Any], missing: int, own: int) -> None:
        settings, config, announce = self.job.settings, self.job.config, self.job.execution.announce
        texts_per_image = min(1.0, plan["texts"] / plan["images"])
        positions = settings["text_length"] * texts_per_image
        size = bytes_per_image(
            latent_values=max(int(np.prod(shape)) for shape in settings["maps"]),
            crops=config.crops,
            tokens=positions,
            positions=positions,
            width=settings["text_width"],
            states=config.text_states,
        )
        for score, count in plan.get("without_score", {}).items():
            announce(f"{count} of {plan['items']} images have no {score} score and are kept.")
        announce(
            f"{plan['images']} of {plan['items']} captioned images pass the filters, with {plan['texts']}"
            f" different texts. The set takes at most about {plan['images'] * size / 1e9:.3g} GB. {missing}"
            f" of this process's {own} shards are missing."
        )

    def finish(self, plan: dict[str, Any]) -> dict[str, Any]:
        """Waits for all shards, and writes the files that make them a set. Returns the description."""
        job = self.job
        notes: Notes = {}
        for table in TABLES:
            notes[table] = []
            for number in range(plan["shards"][table]):
                self._wait(job.note(table, number), number % job.rank.world_size)
                note = _read_json(job.note(table, number), *SHARD_KEYS)
                check_shard(job.out / table / note["file"], note, verify=False)
                notes[table].append(note)
        description = finish_set(job, plan, notes)
        shutil.rmtree(job.work, ignore_errors=True)
        return description

    def _wait(self, path: Path, author: int) -> None:
        """Waits until process ``author`` has written ``path``, or until the set is finished.

        Raises ``RunFolderError`` if that process has died first.
        """
        last_seen = time.monotonic()
        while not path.exists() and not self.is_finished():
            if self._is_alive(author):
                last_seen = time.monotonic()
            elif time.monotonic() - last_seen > GRACE and not path.exists():
                raise RunFolderError(
                    f"Process {author} of {self.job.rank.world_size} ended, or never started, before its part"
                    f" of {str(self.job.out)!r} was ready. Start the same command again. It continues where"
                    " it stopped."
                )
            time.sleep(_POLL)

    def _is_alive(self, rank: int) -> bool:
        if rank == self.job.rank.number:
            return True
        try:
            with FileLock(self.job.lock(rank)).acquire(timeout=0):
                return False
        except Timeout:
            return True


def _read_json(path: Path, *keys: str) -> dict[str, Any]:
    """Reads a file that this process or another rank wrote.

    Raises ``FileNotFoundError`` if it does not exist, and ``RunFolderError`` if it has since been damaged.
    """
    if not path.exists():
        raise FileNotFoundError(path)
    try:
        content = json.loads(read_file(path, MAX_DESCRIPTION))
        missing = [key for key in keys if key not in content]
        if missing:
            raise ValueError(f"it has no {missing[0]}")
    except (DataError, ValueError, TypeError, RecursionError) as error:
        raise RunFolderError(
            f"{path} is damaged ({' '.join(str(error).split())[:200]}). Remove {path.parent.parent} and start"
            " the same command again."
        ) from error
    return content

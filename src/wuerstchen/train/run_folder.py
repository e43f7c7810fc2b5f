"""The folder of a run: one process at a time, one recipe, one data set."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import Timeout

from wuerstchen.checkpoints.files import write_json
from wuerstchen.checkpoints.native import FORMAT, migrate
from wuerstchen.data.locks import acquired
from wuerstchen.errors import RunFolderError, UserError
from wuerstchen.train.changes import Plan, check_same, record
from wuerstchen.train.config import Recipe, as_dict
from wuerstchen.train.engine.distributed import Processes
from wuerstchen.train.report.events import DISK_ERRORS, Log


@contextlib.contextmanager
def locked(run_dir: Path, processes: Processes) -> Iterator[None]:
    """Keeps other runs out of the run folder. The lock goes with the process, however it ends."""
    if not processes.is_main:
        processes.barrier()  # for the lock and the cleaning below
        yield
        return
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = acquired(run_dir / "lock", timeout=0.0)
    except Timeout as error:
        raise RunFolderError(
            f"{run_dir} is in use by another process; wait for it, or use another --run-dir"
        ) from error
    except OSError as error:
        raise RunFolderError(
            f"{run_dir} cannot be written ({error.strerror}); use another --run-dir"
        ) from error
    with lock:
        for partial in (
            *run_dir.glob("stage_*/checkpoints/.*.partial"),
            *run_dir.glob(".model.*"),
            run_dir / "model.new",
        ):
            shutil.rmtree(partial, ignore_errors=True)  # what kills left half-written
        processes.barrier()
        yield


def named(error: OSError, run_dir: Path) -> UserError:
    """An error of the system as the user is told it: it is of the file that it names, or else of the disk
    that a run writes to."""
    # One of a process that loads pictures has that process's traceback before it, and no number.
    reason = error.strerror or [type(error).__name__, *str(error).strip().splitlines()][-1]
    path = error.filename
    if isinstance(path, str | bytes):
        path = Path(os.fsdecode(path)).absolute()
        if not path.is_relative_to(run_dir.absolute()):
            return UserError(f"{path} cannot be used ({reason}); mend that and start the same command again")
    elif error.errno not in DISK_ERRORS:
        return UserError(f"a file cannot be used ({reason}); mend that and start the same command again")
    return RunFolderError(
        f"{run_dir} cannot be written ({reason}); free some space and start the same command again"
    )


COLOURS = "sRGB"
"""What images are converted to, kept in run.json. In runs without it, colour profiles were ignored."""
ORDER = 2
"""How images are put into batches and weights decayed, kept in run.json. Runs without it never showed sizes
of a prepared set with fewer images than a batch, could compose and keep more images than they used, and
decayed GRN and the codebook too. Since 2 such sizes have batches that repeat their images, no more images are
kept than are used, and weight decay acts on matrices alone."""


def check_order(run_dir: Path) -> None:
    """Refuses to go on with a run that was begun when sizes with fewer images than a batch were left out."""
    if read_json(run_dir / "run.json").get("order", 1) < ORDER:
        raise RunFolderError(
            f"{run_dir} was begun by a version that never showed the images of sizes with fewer images than "
            "a batch. This version shows them, so the order of the images would change in the middle of the "
            "run. Use another --run-dir, or finish this run with the version that began it"
        )


def check_colours(
    run_dir: Path,
    converted: Callable[[int, int], str | None],
    log: Log,
    accept_changed_data: bool,
    processes: Processes,
) -> None:
    """Raises ``RunFolderError`` for a run begun before colour profiles were read, if images have any.

    ``converted`` names an image whose colours its profile changes, or none, in the part of the images of a
    process: its rank and the number of processes. Without one the run goes on. All ``processes`` call it.
    """
    path = run_dir / "run.json"
    stored = read_json(path) if processes.is_main else {}
    if not processes.any_rank(processes.is_main and "colours" not in stored):
        return
    found = converted(processes.rank, processes.count)
    processes.barrier_without_timeout()
    names = processes.all_gather([] if found is None else [found])
    if names:
        if not accept_changed_data:
            raise RunFolderError(
                f"{run_dir} was begun by a version that ignored colour profiles, and image {min(names)!r} "
                "has one. This version converts such images to sRGB, so they would change in the middle of "
                "the run. Give --accept-changed-data to go on with the right colours, or use another "
                "--run-dir"
            )
        log.event("accepted changed data", before="colour profiles ignored", now="colours in sRGB")
    if processes.is_main:
        write_json(path, {**stored, "colours": COLOURS})


_OURS = {"lock", "log.jsonl", "tensorboard"}
_LOGS = {".err", ".log", ".out"}  # of schedulers, which may be told to write into the run folder


def check_new(run_dir: Path) -> None:
    """Raises ``RunFolderError`` for a folder that holds other things: a run would fill it with its own."""
    for path in sorted(run_dir.iterdir()):
        if path.name not in _OURS and not path.name.startswith(".") and path.suffix not in _LOGS:
            raise RunFolderError(
                f"{run_dir} holds other things: {path.name!r}. A run needs a folder of its own. Give a new "
                "or empty folder as --run-dir"
            )


def read_run(run_dir: Path) -> dict[str, Any] | None:
    """What ``run.json`` holds: the recipe that the run was begun with, its changes and fingerprints.

    None for a run that has not begun. Raises ``RunFolderError`` for a file that is no such thing.
    """
    path = run_dir / "run.json"
    if not path.exists():
        return None
    stored = migrate(read_json(path), path)
    changes = stored.get("changes", [])
    whole = isinstance(stored.get("recipe"), dict) and isinstance(stored.get("data"), str)
    if not whole or not isinstance(changes, list) or not all(isinstance(c, dict) for c in changes):
        raise RunFolderError(f"{path} names no recipe and data; use another --run-dir")
    return stored


def check_run(
    recipe: Recipe,
    run_dir: Path,
    data: str,
    start: str,
    log: Log,
    accept_changed_data: bool,
    processes: Processes,
    planned: Plan,
) -> None:
    """Compares what the folder was begun with and what is asked now; begins it if it is new.

    ``data`` and ``start`` are fingerprints: of the data, and of the weights at the start, if there are any.
    ``planned`` is the recipe in force, with changes that are recorded here.
    """
    path = run_dir / "run.json"
    given = as_dict(recipe)
    if not processes.is_main:
        return
    stored = read_run(run_dir)
    if stored is None:
        if any(run_dir.glob("stage_*")):
            raise RunFolderError(f"{run_dir} holds stages but no run.json; use another --run-dir")
        if (run_dir / "model").exists():
            raise RunFolderError(
                f"{run_dir / 'model'} exists already, and the run would end there; use another --run-dir"
            )
        check_new(run_dir)
        content = {"format": FORMAT, "recipe": given, "data": data, "order": ORDER, "colours": COLOURS}
        write_json(path, {**content, "start": start} if start else content)
        return
    if stored.get("changes", []) != planned.recorded:
        raise RunFolderError(f"{run_dir} was changed by another process just now; start the command again")
    check_same(stored, recipe, run_dir, planned.recipe)
    if stored["data"] != data:
        if not accept_changed_data:
            raise RunFolderError(
                f"the data in {recipe.data} have changed since {run_dir} was begun; put them back, or give "
                "--accept-changed-data"
            )
        log.event("accepted changed data", before=stored["data"], now=data)
        stored = {**stored, "data": data}
        write_json(path, stored)
    if stored.get("start", "") != start:
        raise RunFolderError(
            f"the weights in {recipe.start_from} have changed since {run_dir} was begun; put them back, or "
            "use another --run-dir"
        )
    record(planned, run_dir, stored, log)


def move_changes(run_dir: Path, changes: list[dict[str, Any]], stage: str, images: int, log: Log) -> None:
    """Lets ``changes`` of a stage that were made after ``images`` hold from there, in place and in run.json.

    Training goes on from there under the changed recipe: later checkpoints were found damaged.
    """
    moved = [change for change in changes if change["stage"] == stage and change["images"] > images]
    for change in moved:
        log.event("change moved", stage=stage, images=images, field=change["field"], before=change["images"])
        change["images"] = images
    if moved and log.writes:
        path = run_dir / "run.json"
        write_json(path, {**read_json(path), "changes": changes})


def read_json(path: Path, fix: str = "use another --run-dir") -> dict[str, Any]:
    """A file that this run wrote."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
        return content
    except ValueError as error:
        raise RunFolderError(f"{path} cannot be read ({error}); {fix}") from error

"""The folder of a run: one process at a time, one recipe, one data set."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import Timeout

from wuerstchen.checkpoints.files import write_json
from wuerstchen.checkpoints.native import FORMAT, migrate
from wuerstchen.data.locks import acquired
from wuerstchen.diffusion.objective import FlowMatching
from wuerstchen.errors import RunFolderError, UserError
from wuerstchen.train.changes import Plan, check_same, record
from wuerstchen.train.config import Recipe, as_dict
from wuerstchen.train.engine.distributed import Processes
from wuerstchen.train.report.events import DISK_ERRORS, Log
from wuerstchen.train.stage_table import kinds


@contextlib.contextmanager
def locked(run_dir: Path, processes: Processes) -> Iterator[None]:
    """Locks the run folder against other runs. The lock is released however the process ends."""
    if not processes.is_main:
        processes.barrier()  # rank 0 takes the lock and cleans up first
        yield
        return
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = acquired(run_dir / "lock", timeout=0.0)
    except Timeout as error:
        raise RunFolderError(
            f"{run_dir} is in use by another process. Wait for it, or use another --run-dir."
        ) from error
    except OSError as error:
        raise RunFolderError(
            f"{run_dir} cannot be written: {error.strerror}. Use another --run-dir."
        ) from error
    with lock:
        for partial in (
            *run_dir.glob("stage_*/checkpoints/.*.partial"),
            *(path for name in _results() for path in run_dir.glob(f".{name}.*")),
            *(run_dir / f"{name}.new" for name in _results()),
        ):
            shutil.rmtree(partial, ignore_errors=True)  # left incomplete by a kill
        processes.barrier()
        yield


def _results() -> list[str]:
    """The names of the folders that runs write their results to."""
    return ["model", *(kind.result for kind in kinds() if kind.result)]


def as_user_error(error: OSError, run_dir: Path) -> UserError:
    """A system error as a message for the user. It is about the file that it names, or about the disk of the
    run folder."""
    # An error in a process that loads images comes with that process's traceback and without errno.
    reason = error.strerror or [type(error).__name__, *str(error).strip().splitlines()][-1]
    path = error.filename
    if isinstance(path, str | bytes):
        path = Path(os.fsdecode(path)).absolute()
        if not path.is_relative_to(run_dir.absolute()):
            return UserError(f"{path} cannot be used: {reason}. Fix that and start the same command again.")
    elif error.errno not in DISK_ERRORS:
        return UserError(f"a file cannot be used: {reason}. Fix that and start the same command again.")
    return RunFolderError(
        f"{run_dir} cannot be written: {reason}. Free some disk space and start the same command again."
    )


COLOURS = "sRGB"
"""The colour space that images are converted to, stored in run.json. Runs without it ignored profiles."""
ORDER = 2
"""Version of the order of images and of weight decay, stored in run.json; 1 if it is missing. Version 1 skips
sizes of a prepared set with fewer images than a batch, may cache more images than it uses, and decays GRN and
the codebook. In version 2 such sizes repeat their images to fill a batch, only images that are used are
cached, and only matrices are decayed."""


TIME_DENSITY = "every objective"
"""Where the recorded ``time_density`` applies, stored in run.json. Runs without it used the recorded value
only with flow matching, and trained all other objectives at uniform times."""


def _with_densities(stored: dict[str, Any]) -> dict[str, Any]:
    """The content of a ``run.json`` with the densities that are in use."""
    recipe, unused, is_older = dict(stored["recipe"]), set(), "time_density" not in stored
    for stage, network in (("stage_b", "decoder"), ("stage_c", "prior")):
        if isinstance(recipe.get(stage), dict) and isinstance(recipe.get(network), dict):
            flow = recipe[network].get("prediction") == FlowMatching.kind
            default = "logit_normal" if flow else "uniform"
            recorded = None if is_older and not flow else recipe[stage].get("time_density")
            recipe[stage] = {**recipe[stage], "time_density": recorded or default}
            unused |= {f"{stage}.time_density"} if is_older and not flow else set()
    content = {**stored, "recipe": recipe, "time_density": TIME_DENSITY}
    if "changes" in stored:
        content["changes"] = [
            {**change, "before": "uniform", "after": "uniform"} if change.get("field") in unused else change
            for change in stored["changes"]
        ]
    return content


def check_order(run_dir: Path) -> None:
    """Raises ``RunFolderError`` for a run of order 1 that would now get images of small sizes."""
    if read_json(run_dir / "run.json").get("order", 1) < ORDER:
        raise RunFolderError(
            f"{run_dir} was started by a version that skips sizes with fewer images than a batch. This "
            "version uses them, so the order of the images would change in the middle of the run. Use "
            "another --run-dir, or finish this run with the version that started it."
        )


def check_colours(
    run_dir: Path,
    converted: Callable[[int, int], str | None],
    log: Log,
    accept_changed_data: bool,
    processes: Processes,
) -> None:
    """Raises ``RunFolderError`` for a run from before colour profiles were read, if its images have any.

    ``converted(rank, count)`` names an image in this rank's part of the data whose profile changes its
    colours, or returns None. Then the run continues. All ranks call it.
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
                f"{run_dir} was started by a version that ignored colour profiles, and image {min(names)!r} "
                "has one that changes its colours. This version converts such images to sRGB, so they would "
                "change in the middle of the run. Use --accept-changed-data to continue with the right "
                "colours, or use another --run-dir."
            )
        log.event("accepted changed data", before="colour profiles ignored", now="colours in sRGB")
    if processes.is_main:
        write_json(path, {**stored, "colours": COLOURS})


_OURS = {"lock", "log.jsonl", "tensorboard"}
_LOGS = {".err", ".log", ".out"}  # of schedulers, which may write into the run folder


def check_new(run_dir: Path) -> None:
    """Raises ``RunFolderError`` for a folder that contains other files."""
    for path in sorted(run_dir.iterdir()):
        if path.name not in _OURS and not path.name.startswith(".") and path.suffix not in _LOGS:
            raise RunFolderError(
                f"{run_dir} contains other files: {path.name!r}. A run needs a folder of its own. Give a new "
                "or empty folder as --run-dir."
            )


def read_run(run_dir: Path) -> dict[str, Any] | None:
    """The content of ``run.json``: the recipe that the run was started with, its changes and fingerprints.

    None for a run that has not started. Raises ``RunFolderError`` for a file with other content.
    """
    path = run_dir / "run.json"
    if not path.exists():
        return None
    stored = migrate(read_json(path), path)
    changes = stored.get("changes", [])
    whole = isinstance(stored.get("recipe"), dict) and isinstance(stored.get("data"), str)
    if not whole or not isinstance(changes, list) or not all(isinstance(c, dict) for c in changes):
        raise RunFolderError(
            f"{path} is not a run description: it lacks recipe or data. Use another --run-dir."
        )
    return _with_densities(stored)


@dataclass(frozen=True, kw_only=True)
class Fingerprints:
    """Fingerprints of what a run reads."""

    data: str
    start: str
    """Fingerprint of the weights that the run starts from. Empty if there are none."""
    sets: list[dict[str, str | int]] = field(default_factory=list)
    """Name and number of images of each data set, and its fingerprint if it is part of a mixture."""


def check_run(
    recipe: Recipe, run_dir: Path, now: Fingerprints, log: Log, accept_changed_data: bool, planned: Plan
) -> None:
    """Compares a run folder with what is asked for now, or starts it if it is new. Only rank 0 calls it.

    ``planned`` is the recipe in force. Its changes are recorded here.
    """
    path = run_dir / "run.json"
    given = as_dict(recipe)
    stored = read_run(run_dir)
    if stored is None:
        if any(run_dir.glob("stage_*")):
            raise RunFolderError(f"{run_dir} contains stages but no run.json. Use another --run-dir.")
        for name in _results():
            if (run_dir / name).exists():
                raise RunFolderError(
                    f"{run_dir / name} already exists, and the run would write its result there. Use another "
                    "--run-dir."
                )
        check_new(run_dir)
        versions = {"order": ORDER, "colours": COLOURS, "time_density": TIME_DENSITY}
        content = {"format": FORMAT, "recipe": given, "data": now.data, "sets": now.sets, **versions}
        write_json(path, {**content, "start": now.start} if now.start else content)
        return
    if stored.get("changes", []) != planned.recorded:
        raise RunFolderError(f"{run_dir} was changed by another process just now. Start the command again.")
    check_same(stored, recipe, run_dir, planned.recipe)
    if stored["data"] != now.data:
        if not accept_changed_data:
            raise RunFolderError(
                f"the data in {recipe.data} have changed since {run_dir} was started"
                f"{_changed(stored.get('sets'), now.sets)}. Restore them, or give --accept-changed-data."
            )
        log.event("accepted changed data", before=stored["data"], now=now.data)
        stored = {**stored, "data": now.data, "sets": now.sets}
        write_json(path, stored)
    if stored.get("start", "") != now.start:
        raise RunFolderError(
            f"the weights in {recipe.start_from} have changed since {run_dir} was started. Restore them, or "
            "use another --run-dir."
        )
    record(planned, run_dir, stored, log)


def _changed(stored: object, now: list[dict[str, str | int]]) -> str:
    """Which data sets have changed, as far as it is known. Their places may have changed too."""
    if not isinstance(stored, list) or not all(isinstance(one, dict) for one in stored):
        return ""  # of a version that did not store it
    if len(stored) != len(now):
        return f": they were {len(stored)} data sets, and are {len(now)}"
    changed = []
    for old, new in zip(stored, now, strict=True):
        if old.get("images") != new["images"]:
            changed.append(f"{new['data']!r} had {old.get('images')} images, and has {new['images']}")
        elif old.get("hash") != new.get("hash"):
            changed.append(f"files or captions of {new['data']!r} are others")
    return f": {', '.join(changed)}" if changed else ""


def move_changes(run_dir: Path, changes: list[dict[str, Any]], stage: str, images: int, log: Log) -> None:
    """Moves ``changes`` of a stage that were made after ``images`` to that point, in place and in run.json.

    Later checkpoints are damaged, so training resumes there, with the changed recipe.
    """
    moved = [change for change in changes if change["stage"] == stage and change["images"] > images]
    for change in moved:
        log.event("change moved", stage=stage, images=images, field=change["field"], before=change["images"])
        change["images"] = images
    if moved and log.writes:
        path = run_dir / "run.json"
        write_json(path, {**read_json(path), "changes": changes})


def read_json(path: Path, fix: str = "Use another --run-dir.") -> dict[str, Any]:
    """Reads a JSON file of the run. Raises ``RunFolderError`` with the ``fix`` if it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it contains no object")
        return content
    except ValueError as error:
        raise RunFolderError(f"{path} cannot be read: {error}. {fix}") from error

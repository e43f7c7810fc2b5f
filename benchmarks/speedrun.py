"""Minutes from nothing to the quality of the first bundled model: pooled R@1 of 0.73 on val, by C+B+A.

    python benchmarks/speedrun.py today --data data/emoji --run-dir runs/speedrun

Trains a configuration twice, with two seeds. The time of a training is that of its whole process, from an
empty run folder to the model: starting Python, composing images, compiling, training all stages, previews,
validation and checkpoints. Scoring is not counted. Each training has empty caches of compiled code. Every
process that continues a stopped training adds its time.

Scores each model on the val lists (a) and (b), from the captions, with four first seeds, pools the entries of
both lists, and adds a row to docs/speedrun.jsonl with the mean of both trainings. scripts/speedrun_table.py
makes docs/speedrun.md of it.

Two trainings on two GPUs, side by side, joined afterwards:

    CUDA_VISIBLE_DEVICES=0 python benchmarks/speedrun.py fast --seeds 0 ... &
    CUDA_VISIBLE_DEVICES=1 python benchmarks/speedrun.py fast --seeds 1 ...
    python benchmarks/speedrun.py fast --join --run-dir runs/speedrun
"""

import argparse
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from recipe_changes import BEST_C, C32, DEPTHS, MUON_B, parse_change, with_changes
from scoring import Scores, scores

import wuerstchen
from wuerstchen.checkpoints.files import write_json
from wuerstchen.evaluate.lists import select
from wuerstchen.evaluate.references import References
from wuerstchen.pipeline import Sampling
from wuerstchen.recipes.mini import mini
from wuerstchen.recipes.tiny import tiny
from wuerstchen.train.config import Recipe, as_dict, differing_fields
from wuerstchen.train.engine.loop import Interrupted
from wuerstchen.train.recorded_recipe import get
from wuerstchen.train.report.announce import RunMonitor
from wuerstchen.train.report.events import read_events
from wuerstchen.train.run import train

GOAL = 0.73
"""The pooled R@1 to reach."""
ROWS = Path(__file__).parents[1] / "docs" / "speedrun.jsonl"

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "today": {},
    "fast": DEPTHS
    | MUON_B
    | C32
    | BEST_C
    | {
        "stage_a.optimization.images": 64 * 2_400,
        "stage_a.refine_images": 0,
        "stage_b.optimization.images": 256 * 6_000,
        "stage_b.refine_images": 0,
        "stage_c.optimization.images": 512 * 10_000,
    },
}
"""Changes to the recipe `mini`, by name."""
TINY = {
    f"stage_{stage}.optimization.{name}": value
    for stage in "abc"
    for name, value in (("images", 8), ("batch_size", 4), ("warmup", 0))
}
TINY |= {"statistics_images": 8, "prior_steps": 1, "decoder_steps": 1, "preview_prompts": ("cat",)}
"""For a rehearsal with the networks of the recipe `tiny`."""
FREE = ("data", "seed", "workers")
"""Fields that do not count as changes of the recipe."""


def recipe_of(options: argparse.Namespace, seed: int) -> Recipe:
    """The recipe of a configuration, with the changes of the command line."""
    changes = dict(CONFIGURATIONS[options.configuration])
    if options.tiny:
        changes |= TINY
    changes |= dict(map(parse_change, options.set))
    base = tiny() if options.tiny else mini()
    return with_changes(base, changes | {"data": str(options.data), "seed": seed, "workers": options.workers})


def changed_fields(recipe: Recipe, base: Recipe) -> dict[str, Any]:
    """The fields in which a recipe differs from another, with its values."""
    same = dataclasses.replace(base, **{name: getattr(recipe, name) for name in FREE})
    fields = as_dict(recipe)
    names = (text.partition(" ")[0] for text in differing_fields(as_dict(same), fields))
    return {name: get(fields, name) for name in names}


def pooled(found: Scores, counts: Mapping[str, int]) -> float:
    """R@1 over the entries of both lists, averaged over the first seeds."""
    hits = sum(statistics.mean(found[name]["recall_1"]) * count for name, count in counts.items())
    return hits / sum(counts.values())


def stage_minutes(events: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Minutes of each phase by the times in the log of a run, with its preview and validation.

    What comes before a phase, such as composing images, counts for that phase. The time between two processes
    does not count: the second one says again which phases have started.
    """
    phases = {event["stage"] for event in events if event["event"] == "start"}
    found: dict[str, float] = {}
    started: set[str] = set()
    waiting, last = 0.0, None
    for event in events:
        stage = event.get("stage")
        again = event["event"] == "start" and stage in started
        if last is not None and not again:
            waiting += event["time"] - last
        last = event["time"]
        if stage in phases:
            started.add(stage)
            found[stage] = found.get(stage, 0.0) + waiting / 60
            waiting = 0.0
    return {stage: round(minutes, 2) for stage, minutes in found.items()}


def train_here(options: argparse.Namespace) -> None:
    """Trains in this process. Ends with exit code 130 after a signal, as ``wuerstchen train`` does."""
    (seed,) = options.seeds
    try:
        train(
            recipe_of(options, seed),
            _folder(options, seed),
            device=options.device,
            monitor=RunMonitor(rehearse=False),
        )
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(130)


def _folder(options: argparse.Namespace, seed: int) -> Path:
    return options.run_dir / f"{options.configuration}-{seed}"


def time_training(options: argparse.Namespace, seed: int) -> float:
    """Trains in a new process, and returns the minutes of all processes that have trained in this run folder.

    Ends this process if the training fails, or if it is stopped after ``--minutes``.
    """
    folder = _folder(options, seed)
    record = options.run_dir / f"{folder.name}.seconds.json"
    before = json.loads(record.read_text())["seconds"] if record.exists() else 0.0
    if not record.exists() and folder.exists():
        sys.exit(f"{folder} exists, and nobody has measured its time. Use another --run-dir.")
    if (folder / "model" / "model.json").exists():  # only scoring has failed
        return before / 60
    command = [sys.executable, __file__, options.configuration, "--train-here", "--seeds", str(seed)]
    command += ["--data", str(options.data), "--run-dir", str(options.run_dir), "--device", options.device]
    command += ["--workers", str(options.workers), "--set", *options.set]
    command += ["--tiny"] if options.tiny else []
    with tempfile.TemporaryDirectory() as caches:
        own = {"TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor", "TRITON_CACHE_DIR": f"{caches}/triton"}
        began = time.monotonic()
        process = subprocess.Popen(command, env={**os.environ, **own})
        stopping = False
        while True:
            try:
                code = process.wait(timeout=1)
            except subprocess.TimeoutExpired:
                code = None
            seconds = time.monotonic() - began
            options.run_dir.mkdir(parents=True, exist_ok=True)
            write_json(record, {"seconds": before + seconds})  # a kill of this process loses a second
            if code is not None:
                break
            if not stopping and seconds > 60 * options.minutes:
                process.send_signal(signal.SIGTERM)
                stopping = True
    if code:
        sys.exit(f"{folder}: not finished, exit code {code}. Start the same command again to resume.")
    return (before + seconds) / 60


def result_of(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Trains with one seed, scores the model, and stores the result beside the run folder."""
    folder = _folder(options, seed)
    path = options.run_dir / f"{folder.name}.json"
    recipe = recipe_of(options, seed)
    changed = changed_fields(recipe, tiny() if options.tiny else mini())
    if path.exists():
        known = json.loads(path.read_text())
        if known["changed"] != changed:
            sys.exit(f"{path} is the result of another recipe. Use another --run-dir.")
        return known
    minutes = time_training(options, seed)
    events = read_events(folder / "log.jsonl")
    device = torch.device(options.device)
    model = wuerstchen.load(folder / "model", options.device, precision="float32")
    references = References(options.data, device, batch_size=8 if device.type == "cpu" else 64)
    found = scores(model, references, "c_b_a", options.first_seeds, Sampling(), limit=options.limit)
    counts = {name: len(select(name, ("val",), options.limit)) for name in ("a", "b")}  # type: ignore[arg-type]
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "commit": options.commit,
        "configuration": options.configuration,
        "changed": changed,
        "first_seeds": options.first_seeds,
        "limit": options.limit,
        "seed": seed,
        "minutes": round(minutes, 2),
        "stages": stage_minutes(events),
        "recall_1": round(pooled(found, counts), 4),
        "scores": found,
    }
    write_json(path, result)
    print(json.dumps(result), flush=True)
    return result


SHARED = ("machine", "torch", "commit", "configuration", "changed", "first_seeds", "limit")
"""What the trainings of a row must have in common."""


def joined(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row of two or more trainings. Raises ``ValueError`` if they are not of the same kind."""
    first = results[0]
    for name in SHARED:
        if any(result[name] != first[name] for result in results):
            raise ValueError(f"{name} differs: {', '.join(str(result[name]) for result in results)}")
    if len({result["seed"] for result in results}) < max(2, len(results)):
        raise ValueError(f"a row needs trainings with different seeds, got {[r['seed'] for r in results]}")
    recall = statistics.mean(result["recall_1"] for result in results)
    own = ("seed", "minutes", "stages", "recall_1", "scores")
    return {
        "date": max(result["date"] for result in results),
        **{name: first[name] for name in SHARED},
        "minutes": round(statistics.mean(result["minutes"] for result in results), 2),
        "recall_1": round(recall, 4),
        "goal": GOAL,
        "reached": recall >= GOAL,
        "trainings": [{name: result[name] for name in own} for result in results],
    }


def add_row(results: Sequence[dict[str, Any]], rows: Path) -> None:
    """Appends the row of these trainings to a JSON-lines file."""
    try:
        row = joined(results)
    except ValueError as error:
        sys.exit(f"the trainings cannot be joined: {error}")
    with open(rows, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row))


def commit_here() -> str:
    """The commit of this checkout, with a plus sign if files were changed. Empty without git."""
    where = Path(__file__).parent
    git = ["git", "-C", str(where)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return ""
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout
    return head.stdout.strip() + ("+" if changed else "")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("configuration", choices=CONFIGURATIONS)
    found.add_argument("--data", type=Path, default=Path("data/emoji"), help="built emoji set")
    found.add_argument("--run-dir", type=Path, default=Path("runs/speedrun"))
    found.add_argument("--rows", type=Path, default=ROWS, help="JSON-lines file to append to")
    found.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="one training each")
    found.add_argument("--set", nargs="*", default=[], metavar="FIELD=JSON", help="change fields")
    found.add_argument("--join", action="store_true", help="make the row of all results in --run-dir")
    found.add_argument("--minutes", type=float, default=1e9, help="stop a training after this; it can resume")
    found.add_argument("--first-seeds", type=int, nargs="+", default=[0, 1000, 2000, 3000])
    found.add_argument("--limit", type=int, help="score only the first N entries of each list")
    found.add_argument("--workers", type=int, default=16)
    found.add_argument("--commit", default="", help="commit of this code, if this is not a checkout")
    found.add_argument("--tiny", action="store_true", help="rehearse with the networks of tiny")
    found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument("--train-here", action="store_true", help=argparse.SUPPRESS)
    return found


def main() -> None:
    options = parser().parse_args()
    if options.train_here:
        train_here(options)
        return
    options.commit = options.commit or commit_here()
    if not options.commit:
        sys.exit("this is not a git checkout. Give --commit, so that the row says what was measured.")
    if options.join:
        files = sorted(options.run_dir.glob(f"{options.configuration}-*.json"))
        found = [json.loads(file.read_text()) for file in files if file.suffixes == [".json"]]
        if not found:
            sys.exit(f"{options.run_dir} has no results to join.")
        add_row(found, options.rows)
        return
    results = [result_of(options, seed) for seed in options.seeds]
    if len(results) > 1:
        add_row(results, options.rows)
    else:
        print(f"A row needs two seeds. Join the results with --join --run-dir {options.run_dir}")


if __name__ == "__main__":
    main()

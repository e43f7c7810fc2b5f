"""Trainings for the benchmarks that write rows of docs/experiments.jsonl: their minutes, speed and errors."""

import json
import time
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Self

import torch

from wuerstchen.train import run, run_phase
from wuerstchen.train.config import Recipe
from wuerstchen.train.report.announce import RunMonitor
from wuerstchen.train.report.events import read_events


def timed_training(recipe: Recipe, folder: Path, stage: str, device: str | None = None) -> dict[str, Any]:
    """Trains a recipe. Returns the part of a row about the training. The speed is that of ``stage``.

    It is also stored in the run folder, and for a finished training the stored part is returned, with the
    minutes that the training took.
    """
    kept = folder / "training.json"
    began = time.monotonic()
    run.train(recipe, folder, device=device, monitor=RunMonitor(rehearse=False))
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))
    minutes = (time.monotonic() - began) / 60
    events = read_events(folder / "log.jsonl")
    progress = [event for event in events if event["event"] == "progress"]
    rates = sorted(event["images_per_second"] for event in progress if event["stage"] == stage)
    validation = [event for event in events if event["event"] == "validation"]
    found = {
        "minutes": round(minutes, 2),
        "images_per_second": rates[len(rates) // 2],
        "loss": progress[-1]["loss"],
        "validation": validation[-1] if validation else None,
    }
    kept.write_text(json.dumps(found), encoding="utf-8")
    return found


class OneProcess:
    """Another process that calls functions in turn. If it was killed, a new one takes the later calls."""

    def __enter__(self) -> Self:
        self._pool = self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def submit(self, function: Any, *inputs: Any) -> Future[Any]:
        """The result of ``function(*inputs)``, which has to be importable, as a future."""
        try:
            return self._pool.submit(function, *inputs)
        except BrokenProcessPool:
            self._pool = self._start()
            return self._pool.submit(function, *inputs)

    def _start(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


def once(fill_image_cache: Any) -> Any:
    """Makes ``fill_image_cache`` remember its last result, which most variants share."""
    kept: dict[tuple[int, int, int, float], Any] = {}

    def filled(feed: Any, count: int, workers: int, device: torch.device) -> Any:
        key = (feed.seed, feed.size, count, feed.mirrored)
        if key not in kept:
            kept.clear()
            kept[key] = fill_image_cache(feed, count, workers, device)
        return kept[key]

    return filled


def share_images() -> None:
    """Fills the image cache once for all trainings of this process."""
    run_phase.fill_image_cache = once(run_phase.fill_image_cache)


def machine() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"

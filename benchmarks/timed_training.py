"""Trainings for the benchmarks that write rows of docs/experiments.jsonl: their minutes, speed and errors."""

import time
from pathlib import Path
from typing import Any

import torch

from wuerstchen.train import run, run_phase
from wuerstchen.train.config import Recipe
from wuerstchen.train.report.announce import RunMonitor
from wuerstchen.train.report.events import read_events


def timed_training(recipe: Recipe, folder: Path, stage: str, device: str | None = None) -> dict[str, Any]:
    """Trains a recipe. Returns the part of a row about the training. The speed is that of ``stage``."""
    began = time.monotonic()
    run.train(recipe, folder, device=device, monitor=RunMonitor(rehearse=False))
    minutes = (time.monotonic() - began) / 60
    events = read_events(folder / "log.jsonl")
    progress = [event for event in events if event["event"] == "progress"]
    rates = sorted(event["images_per_second"] for event in progress if event["stage"] == stage)
    validation = [event for event in events if event["event"] == "validation"]
    return {
        "minutes": round(minutes, 2),
        "images_per_second": rates[len(rates) // 2],
        "loss": progress[-1]["loss"],
        "validation": validation[-1] if validation else None,
    }


def once(fill_image_cache: Any) -> Any:
    """Makes ``fill_image_cache`` remember its last result: all variants have the same seed, data and size."""
    kept: dict[tuple[int, int, int], Any] = {}

    def filled(feed: Any, count: int, workers: int, device: torch.device) -> Any:
        key = (feed.seed, feed.size, count)
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

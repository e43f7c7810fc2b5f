"""Previews and validation: what is looked at while a stage trains. Neither ever ends a run.

Both are drawn at images where a checkpoint is whole, so nothing is lost whatever happens in them. What a stop
prevents is made up for at the next start from that checkpoint.
"""

import contextlib
import gc
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from wuerstchen.checkpoints.files import write_json
from wuerstchen.errors import UserError, UserNotice, is_out_of_memory
from wuerstchen.image_files import save_png
from wuerstchen.images import grid
from wuerstchen.train.engine.checkpoint import BEST, TrainingState, best_of
from wuerstchen.train.engine.distributed import Processes
from wuerstchen.train.engine.sharding import gather
from wuerstchen.train.engine.validation import Validation
from wuerstchen.train.feed.images import Feed
from wuerstchen.train.feed.prepared import PreparedFeed
from wuerstchen.train.report.events import Log
from wuerstchen.train.stages.base import Stage


class SkippedWarning(UserNotice):
    """A preview or a validation could not be made, and training went on."""


def looked_at(log: Log, stage: str, images: int, folder: Path) -> tuple[bool, bool]:
    """Whether a preview and a validation of a stage at this number of images were made, or tried."""
    done = {e["event"] for e in log.events() if e.get("stage") == stage and e.get("images") == images}
    preview = preview_path(folder, images).is_file() or bool(done & {"preview", "preview skipped"})
    return preview, bool(done & {"validation", "validation skipped"})


def preview_path(folder: Path, images: int) -> Path:
    return folder / "previews" / f"{images:012d}.png"


class LessMemoryWarning(UserNotice):
    """A preview lacked memory, so it and those after it are drawn with less."""


class Observer:
    """Draws previews and validates, by the first process of a run."""

    def __init__(
        self,
        stage: Stage,
        feed: Feed | PreparedFeed,
        folder: Path,
        log: Log,
        processes: Processes,
        validation: Validation | None,
        *,
        every: int,
        columns: int,
        size: int,
    ) -> None:
        """``every`` images a preview, 0 for the end alone; ``columns`` pictures of ``size`` are in a row."""
        self.stage, self.feed, self.folder = stage, feed, folder
        self.log, self.processes, self.validation = log, processes, validation
        self.every, self.columns, self.size = every, columns, size
        self.total = stage.optimization.images
        self.next_preview = 0
        self.low_memory = False
        """Whether previews are drawn with the least memory, because one has lacked it."""

    def begin(self, images: int) -> tuple[bool, bool]:
        """Which of preview and validation a stop at this number of images has prevented. All processes say
        the same."""
        self.next_preview = self._next_multiple(images)
        batch = self.stage.optimization.batch_size
        due = images >= self.total or self._next_multiple(max(images - batch, 0)) <= images
        if not images or not due:
            return False, False
        preview, validation = looked_at(self.log, self.stage.name, images, self.folder)
        wants = self.validation is not None and not validation
        is_main = self.processes.is_main
        preview, wants = self.processes.any_rank_each(is_main and not preview, is_main and wants)
        return preview, wants

    def due(self, images: int) -> bool:
        """Whether it is time for a preview."""
        return images >= self.next_preview

    def look(self, state: TrainingState, whole: bool, *, preview: bool = True, validate: bool = True) -> None:
        """A preview and a validation of this moment. All processes call it.

        ``whole`` says that a checkpoint of this moment is on disk: it may then be the best one.
        """
        images = state.images
        averages: dict[str, nn.Module] = {}
        with self._never_ends_the_run("preview" if preview else "validation", images):
            averages = _gathered(state, self.processes)
        if averages and self.processes.is_main:
            if preview:
                with self._never_ends_the_run("preview", images):
                    self._preview(averages, images)
                    self.log.event("preview", stage=self.stage.name, images=images)
            if validate and self.validation is not None:
                with self._never_ends_the_run("validation", images):
                    found = self.validation(averages)
                    with self._never_ends_the_run("note of the best checkpoint", images):
                        self._note_best(images, found, whole)
                    self.log.event("validation", stage=self.stage.name, images=images, **found)
        if preview:
            self.next_preview = self._next_multiple(images)

    def _preview(self, averages: dict[str, nn.Module], images: int) -> None:
        """Draws a preview; once more and with less memory where that was lacking."""
        try:
            return _draw(self, averages, images)
        except Exception as error:
            if self.low_memory or not _lacks_memory(error):
                raise
        self._free()
        self.low_memory = True
        self.log.event("preview with less memory", stage=self.stage.name, images=images)
        warnings.warn(
            f"the preview at image {images:,} of stage {self.stage.name.upper()} lacked memory. It and those "
            "after it are drawn one image and one layer at a time, which takes longer",
            LessMemoryWarning,
            stacklevel=2,
        )
        return _draw(self, averages, images)

    def _free(self) -> None:
        """Gives back what an error has held, whose frames have gone by now."""
        gc.collect()
        if self.processes.device.type == "cuda":
            torch.cuda.empty_cache()

    def _next_multiple(self, images: int) -> int:
        if self.every == 0:
            return self.total
        return min((images // self.every + 1) * self.every, self.total)

    def _note_best(self, images: int, found: dict[str, Any], whole: bool) -> None:
        """Keeps the number of the checkpoint with the lowest validation loss, which is then not removed."""
        best, loss = best_of(self.folder / "checkpoints"), found["loss"]
        if whole and loss is not None and (best is None or loss < best["loss"]):
            write_json(self.folder / "checkpoints" / BEST, {"images": images, "loss": loss})

    @contextlib.contextmanager
    def _never_ends_the_run(self, what: str, images: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever it is: days of training are worth more than a preview
            lacks = _lacks_memory(error)
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            reason = "out of memory" if lacks else (reason.splitlines() or [type(error).__name__])[0]
        else:
            return
        if lacks:
            self._free()
        if not self.processes.is_main:
            return
        advice = (
            ". It needs memory beside the training: use a larger --preview-every, fewer --preview-prompts, "
            "or --recompute blocks"
            if lacks
            else ""
        )
        self.log.event(f"{what} skipped", stage=self.stage.name, images=images, reason=reason)
        warnings.warn(
            f"the {what} at image {images:,} of stage {self.stage.name.upper()} was skipped ({reason}); "
            f"training goes on{advice}",
            SkippedWarning,
            stacklevel=2,
        )


def _lacks_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that memory is lacking."""
    while error is not None and not is_out_of_memory(error):
        error = error.__cause__
    return error is not None


def _gathered(state: TrainingState, processes: Processes) -> dict[str, nn.Module]:
    """The averages to be used by the first process, those that are sharded as whole copies.

    All processes take part; the first has the memory for them until they are dropped.
    """
    return {
        name: gather(average, state.whole[name], processes) if name in state.whole else average
        for name, average in state.averages.items()
    }


@torch.no_grad()
def _draw(observer: Observer, averages: dict[str, nn.Module], seen: int) -> None:
    """Draws the preview grid with the averaged weights. Leaves no trace in the random state of training."""
    stage, count = observer.stage, observer.columns
    pixels: Tensor = observer.feed.shown(count, observer.size).to(observer.processes.device)
    images: list[Image.Image] = stage.preview(
        averages, pixels, observer.processes.device, low_memory=observer.low_memory
    )
    if not images:
        return
    path = preview_path(observer.folder, seen)
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = count if len(images) % count == 0 else math.isqrt(len(images) - 1) + 1
    settings = {"stage": stage.name, "images": seen, **stage.preview_labels, "columns": columns}
    save_png(grid(images, columns=columns), path, settings)

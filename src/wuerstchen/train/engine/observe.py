"""Previews and validation of a stage while it trains. Neither ever ends a run.

Both run when a complete checkpoint is on disk, so a failure in them loses nothing. If a stop prevents one,
the next start from that checkpoint does it first.
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
from wuerstchen.train.engine.ema import on_device
from wuerstchen.train.engine.job import StageJob
from wuerstchen.train.engine.sharding import gather
from wuerstchen.train.report.events import Log


class SkippedWarning(UserNotice):
    """A preview or a validation could not be made, and training went on."""


class LessMemoryWarning(UserNotice):
    """A preview ran out of memory, so it and the following ones are drawn in a slower way that needs less."""


def observed(log: Log, stage: str, images: int, folder: Path) -> tuple[bool, bool]:
    """Whether a preview and a validation of a stage at this number of images were made or tried."""
    done = {e["event"] for e in log.events() if e.get("stage") == stage and e.get("images") == images}
    preview = preview_path(folder, images).is_file() or bool(done & {"preview", "preview skipped"})
    return preview, bool(done & {"validation", "validation skipped"})


def preview_path(folder: Path, images: int) -> Path:
    return folder / "previews" / f"{images:012d}.png"


class Observer:
    """Draws previews and validates, on rank 0. All ranks call its public methods together."""

    def __init__(self, job: StageJob) -> None:
        self.job = job
        self.next_preview = 0
        self.next_validation = 0
        self.low_memory = False
        """Whether previews use the low-memory path, because an earlier one ran out of memory."""

    def resume(self, images: int) -> tuple[bool, bool]:
        """Resumes at this number of images. Returns whether a stop there prevented the preview, and whether
        it prevented the validation."""
        job, settings = self.job, self.job.settings
        self.next_preview = self._next_multiple(images, settings.preview_every)
        self.next_validation = self._next_multiple(images, settings.validate_every)
        before = max(images - job.stage.optimization.batch_size, 0)
        draws = self._next_multiple(before, settings.preview_every) <= images
        validates = self._next_multiple(before, settings.validate_every) <= images
        if not settings.validate_every:
            validates = draws
        if not images or not (draws or validates):
            return False, False
        preview, validation = observed(job.log, job.stage.name, images, job.folder)
        owed = draws and not preview, validates and job.validation is not None and not validation
        preview, validation = job.processes.any_rank_each(*(job.processes.is_main and each for each in owed))
        return preview, validation

    def due(self, images: int) -> tuple[bool, bool]:
        """Whether it is time for a preview, and whether it is time for a validation."""
        preview = images >= self.next_preview
        validation = images >= self.next_validation if self.job.settings.validate_every else preview
        return preview, validation

    def observe(
        self, state: TrainingState, saved: bool, *, preview: bool = True, validate: bool = True
    ) -> None:
        """Draws a preview and validates.

        ``saved`` says that the current checkpoint is on disk. Only then can it become the best one.
        """
        job, images = self.job, state.images
        averages: dict[str, nn.Module] = {}
        with self._warn_on_error("preview" if preview else "validation", images):
            averages = _gathered(state, job.processes)
        if averages and job.processes.is_main:
            if preview:
                with self._warn_on_error("preview", images):
                    self._preview(averages, images)
                    job.log.event("preview", stage=job.stage.name, images=images)
            if validate and job.validation is not None:
                with self._warn_on_error("validation", images):
                    with on_device(averages.values(), job.device):
                        found = job.validation(averages)
                    with self._warn_on_error("note of the best checkpoint", images):
                        self._note_best(images, found, saved)
                    job.log.event("validation", stage=job.stage.name, images=images, **found)
        if preview:
            self.next_preview = self._next_multiple(images, job.settings.preview_every)
        if validate:
            self.next_validation = self._next_multiple(images, job.settings.validate_every)

    def _preview(self, averages: dict[str, nn.Module], images: int) -> None:
        """Draws a preview. If memory does not suffice, draws it again in a way that needs less."""
        try:
            return self._draw(averages, images)
        except Exception as error:
            if self.low_memory or not _is_lack_of_memory(error):
                raise
        self._free()
        self.low_memory = True
        self.job.log.event("preview with less memory", stage=self.job.stage.name, images=images)
        warnings.warn(
            f"the preview at image {images:,} of stage {self.job.stage.name.upper()} ran out of memory. It "
            "and the following ones are drawn one image and one layer at a time, which takes longer.",
            LessMemoryWarning,
            stacklevel=2,
        )
        return self._draw(averages, images)

    @torch.no_grad()
    def _draw(self, averages: dict[str, nn.Module], images: int) -> None:
        """Draws the preview grid with the averaged weights."""
        job, columns = self.job, self.job.settings.previews
        pixels: Tensor = job.feed.shown(columns, job.settings.preview_size).to(job.device)
        # With low memory, the stage moves the layers itself.
        moved = () if self.low_memory else averages.values()
        with on_device(moved, job.device):
            drawn: list[Image.Image] = job.stage.preview(
                averages, pixels, job.device, low_memory=self.low_memory
            )
        if not drawn:
            return
        path = preview_path(job.folder, images)
        path.parent.mkdir(parents=True, exist_ok=True)
        if len(drawn) % columns:
            columns = math.isqrt(len(drawn) - 1) + 1
        settings = {"stage": job.stage.name, "images": images, **job.stage.preview_labels, "columns": columns}
        save_png(grid(drawn, columns=columns), path, settings)

    def _free(self) -> None:
        """Frees what the frames of a past error have held."""
        gc.collect()
        if self.job.device.type == "cuda":
            torch.cuda.empty_cache()

    def _next_multiple(self, images: int, every: int) -> int:
        if every == 0:
            return self.job.total
        return min((images // every + 1) * every, self.job.total)

    def _note_best(self, images: int, found: dict[str, Any], saved: bool) -> None:
        """Stores which checkpoint has the lowest validation loss. That one is never removed."""
        best, loss = best_of(self.job.checkpoints), found["loss"]
        if saved and loss is not None and (best is None or loss < best["loss"]):
            write_json(self.job.checkpoints / BEST, {"images": images, "loss": loss})

    @contextlib.contextmanager
    def _warn_on_error(self, what: str, images: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any kind: days of training are worth more than a preview
            out_of_memory = _is_lack_of_memory(error)
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            reason = "out of memory" if out_of_memory else (reason.splitlines() or [type(error).__name__])[0]
        else:
            return
        if out_of_memory:
            self._free()
        job = self.job
        if not job.processes.is_main:
            return
        advice = (
            " Previews and validation need memory in addition to training. Use a larger --preview-every, "
            "fewer --preview-prompts, or --recompute blocks."
            if out_of_memory
            else ""
        )
        job.log.event(f"{what} skipped", stage=job.stage.name, images=images, reason=reason)
        warnings.warn(
            f"the {what} at image {images:,} of stage {job.stage.name.upper()} was skipped: {reason}. "
            f"Training goes on.{advice}",
            SkippedWarning,
            stacklevel=2,
        )


def _is_lack_of_memory(error: BaseException | None) -> bool:
    """Whether an error or one of its causes says that memory does not suffice."""
    while error is not None and not is_out_of_memory(error):
        error = error.__cause__
    return error is not None


def _gathered(state: TrainingState, processes: Processes) -> dict[str, nn.Module]:
    """The averages for use on rank 0, with whole copies of those that are sharded.

    All ranks take part. Rank 0 holds the memory of the copies until they are dropped.
    """
    return {
        name: gather(average, state.whole[name], processes) if name in state.whole else average
        for name, average in state.averages.items()
    }

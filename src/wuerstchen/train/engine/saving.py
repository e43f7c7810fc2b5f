"""When checkpoints of a stage are written, and what happens if one cannot be."""

import warnings
from pathlib import Path
from typing import Any

from wuerstchen.errors import CheckpointError, UserNotice
from wuerstchen.train.engine.checkpoint import TrainingState
from wuerstchen.train.engine.checkpoint_writer import Writer
from wuerstchen.train.engine.faults import Faults
from wuerstchen.train.engine.job import StageJob
from wuerstchen.train.report.cost import CostMeter


class CheckpointNotWrittenWarning(UserNotice):
    """A checkpoint could not be written. Training goes on because there is an older one."""


class CheckpointSaver:
    """Starts checkpoints, waits for them, and logs them when they are complete.

    If a checkpoint cannot be written, the run only ends if the checkpoint is required (``required=True``) or
    if the stage has no complete checkpoint yet. Otherwise training goes on until the next checkpoint.
    """

    def __init__(
        self, writer: Writer, job: StageJob, state: TrainingState, faults: Faults, cost: CostMeter
    ) -> None:
        """``state`` is new or restored from a complete checkpoint. Nothing is saved after a fault."""
        self._writer, self._job, self._state = writer, job, state
        self._faults, self._cost = faults, cost
        self._header = {**job.header, "stage": job.stage.name}
        self._next_milestone = self._milestone_after(state.images)
        self._started: dict[str, Any] = {}
        """The log event of the checkpoint that is being written."""
        self._owed = False
        """Whether a milestone could not be written. The next checkpoint takes its place."""
        self._complete_at: int | None = state.images or None
        """Images of the newest complete checkpoint of the stage."""

    @property
    def failed(self) -> bool:
        return self._writer.failed

    def milestone_due(self, images: int) -> bool:
        return self._next_milestone is not None and images >= self._next_milestone

    def is_complete(self, images: int) -> bool:
        """Whether the checkpoint at this number of images is on disk."""
        return self._complete_at == images

    def start(self, *, required: bool = False) -> None:
        """Waits for the previous checkpoint, then starts one of this moment."""
        images = self._state.images
        self.wait()
        if self.is_complete(images):
            return
        self._faults.check()
        milestone = self.milestone_due(images) or self._owed
        header = {**self._header, "milestone": True} if milestone else self._header
        spent = self._cost.spent()
        kwh = None if spent.kwh is None else self._writer.processes.all_reduce_sum(spent.kwh)
        self._started = {"stage": self._header["stage"], "images": images}
        self._started |= {"seconds": spent.seconds, "kwh": kwh}
        if milestone:  # no longer due, or it would be tried at every update while the disk is full
            self._next_milestone, self._owed = self._milestone_after(images), True
        try:
            self._writer.start(self._state, header)
        except CheckpointError as error:
            self._give_up(error, required)

    def wait(self, *, required: bool = False) -> Path | None:
        """Waits for the last checkpoint that was started. Returns None if it could not be written."""
        try:
            path = self._writer.wait()
        except CheckpointError as error:
            self._give_up(error, required)
            return None
        self._log_complete()
        return path

    def poll(self) -> None:
        """Logs a checkpoint as soon as it is complete, without waiting for it.

        Only rank 0 knows, because it finishes the checkpoint. The other ranks are told by ``wait``.
        """
        if self._writer.processes.is_main and not self._writer.busy and not self._writer.failed:
            self._log_complete()

    def _log_complete(self) -> None:
        if self._started:
            self._complete_at = self._started["images"]
            self._job.log.event("checkpoint", **self._started)
            self._started, self._owed = {}, False

    def _give_up(self, error: CheckpointError, required: bool) -> None:
        failed, self._started = self._started, {}
        if required or self._complete_at is None:
            raise error
        reason = getattr(error, "reason", str(error))
        self._job.log.event(
            "checkpoint failed", stage=self._header["stage"], images=failed["images"], reason=reason
        )
        if self._writer.processes.is_main:
            warnings.warn(
                f"the checkpoint at image {failed['images']:,} of stage {self._header['stage'].upper()} "
                f"cannot be written: {reason}. Training goes on and will try again at the next checkpoint. "
                f"If it stops before, everything after image {self._complete_at:,} is lost. Free some disk "
                "space.",
                CheckpointNotWrittenWarning,
                stacklevel=2,
            )

    def _milestone_after(self, images: int) -> int | None:
        every = self._job.settings.keep_every
        return (images // every + 1) * every if every else None

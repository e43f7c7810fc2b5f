"""When the checkpoints of a stage are written, and what a disk that cannot take one means for the run."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wuerstchen.errors import CheckpointError, UserNotice
from wuerstchen.train.engine.checkpoint import TrainingState
from wuerstchen.train.engine.checkpoint_writer import Writer
from wuerstchen.train.report.cost import CostMeter
from wuerstchen.train.report.events import Log


class CheckpointNotWrittenWarning(UserNotice):
    """A checkpoint could not be written, and training goes on because an older one is whole."""


class Saving:
    """Begins checkpoints, waits for them, and notes them in the log when they are whole.

    A checkpoint that cannot be written ends the run only where it must not be missing (``must``), or where
    none is whole: else the next one is tried, and what was there stays.
    """

    def __init__(
        self,
        writer: Writer,
        state: TrainingState,
        header: dict[str, Any],
        log: Log,
        cost: CostMeter,
        check: Callable[[], None],
        *,
        resumed: bool,
        milestones: int = 0,
    ) -> None:
        """``check`` raises where the state must not be stored. ``milestones`` is the number of images from
        one checkpoint that is never removed to the next, 0 for none."""
        self._writer, self._state, self._header = writer, state, header
        self._log, self._cost, self._check = log, cost, check
        self._milestones = milestones
        self._next_milestone = self._milestone_after(state.images)
        self._begun: dict[str, Any] = {}
        self._owed = False
        """Whether a milestone could not be written: the next checkpoint that can be takes its place."""
        self._whole_at: int | None = state.images if resumed else None
        """Images of the newest whole checkpoint of the stage."""

    @property
    def failed(self) -> bool:
        return self._writer.failed

    def milestone_due(self, images: int) -> bool:
        return self._next_milestone is not None and images >= self._next_milestone

    def is_whole(self, images: int) -> bool:
        """Whether the checkpoint at this number of images is on disk."""
        return self._whole_at == images

    def begin(self, *, must: bool = False) -> None:
        """Begins a checkpoint of this moment, when the one before is whole."""
        images = self._state.images
        self.wait()
        if self.is_whole(images):
            return
        self._check()
        milestone = self.milestone_due(images) or self._owed
        header = {**self._header, "milestone": True} if milestone else self._header
        spent = self._cost.spent()
        processes = self._writer.processes
        kwh = None if spent.kwh is None else processes.all_reduce_sum(spent.kwh)
        self._begun = {"stage": self._header["stage"], "images": images}
        self._begun |= {"seconds": spent.seconds, "kwh": kwh}
        if milestone:  # due no more, or a disk that is full would be tried at every update
            self._next_milestone, self._owed = self._milestone_after(images), True
        try:
            self._writer.begin(self._state, header)
        except CheckpointError as error:
            self._give_up(error, must)
            return

    def wait(self, *, must: bool = False) -> Path | None:
        """The last checkpoint that was begun, when it is whole; None where it could not be written."""
        try:
            path = self._writer.wait()
        except CheckpointError as error:
            self._give_up(error, must)
            return None
        self._note_whole()
        return path

    def note(self) -> None:
        """Notes a checkpoint in the log as soon as it is whole, without waiting for it.

        The first process alone knows that: it ends the checkpoint. Others are told by ``wait``.
        """
        if self._writer.processes.is_main and not self._writer.busy and not self._writer.failed:
            self._note_whole()

    def _note_whole(self) -> None:
        if self._begun:
            self._whole_at = self._begun["images"]
            self._log.event("checkpoint", **self._begun)
            self._begun, self._owed = {}, False

    def _give_up(self, error: CheckpointError, must: bool) -> None:
        failed, self._begun = self._begun, {}
        if must or self._whole_at is None:
            raise error
        reason = getattr(error, "reason", str(error))
        self._log.event(
            "checkpoint failed", stage=self._header["stage"], images=failed["images"], reason=reason
        )
        if self._writer.processes.is_main:
            warnings.warn(
                f"the checkpoint at image {failed['images']:,} of stage {self._header['stage'].upper()} "
                f"cannot be written ({reason}). Training goes on and tries again at the next one. Until then "
                f"a stop loses what came after image {self._whole_at:,}. Free some space",
                CheckpointNotWrittenWarning,
                stacklevel=2,
            )

    def _milestone_after(self, images: int) -> int | None:
        every = self._milestones
        return (images // every + 1) * every if every else None

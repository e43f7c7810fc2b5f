"""Updates that went wrong: losses or gradients that are not finite, and what the user is told."""

import math

import torch

from wuerstchen.errors import UserError
from wuerstchen.train.engine.batches import Batches
from wuerstchen.train.engine.update import TrainStep, Values

_NAMED = 3  # images of a batch in a message


class NotFinite(UserError):
    """A loss or gradient of an update was not finite."""

    def __init__(self, message: str, image: int, names: list[str]) -> None:
        """``image`` is the first of the batch, ``names`` those of its images as far as they are known."""
        super().__init__(message)
        self.image, self.names = image, names


class Faults:
    """Checks the updates of a stage."""

    def __init__(self, step: TrainStep, batches: Batches) -> None:
        self.step = step
        self.batches = batches

    def read(self, values: Values) -> dict[str, float]:
        """The values of an update on the host, averaged over all ranks.

        Raises ``UserError`` if one was not finite, or if the stage says that training has failed.
        """
        stacked = torch.stack([v.float() for v in values.values()])
        self.step.processes.all_reduce_mean_([stacked])
        read = dict(zip(values, stacked.tolist(), strict=True))
        self.check(read)
        self.step.stage.check(read)
        return read

    def check(self, values: dict[str, float] | None = None) -> None:
        """Raises ``NotFinite`` if a loss or gradient of any update so far was not finite.

        The networks' batch statistics may then be damaged, so the state must not be stored. ``values`` are
        those of the last update.
        """
        image = int(self.step.fault)
        if image < 0:
            return
        stage = self.step.stage
        what = "a loss or gradient was not finite"
        for name, value in (values or {}).items():
            if name.startswith(("loss", "gradient")) and not math.isfinite(value):
                named = f"loss_{stage.averaged[0]}" if name == "loss" else name
                what = f"the {named.replace('_', ' of ', 1)} is {value}"
                break
        names = self.batches.names(image)
        raise NotFinite(
            f"{what} at image {image:,} of stage {stage.name.upper()}. The weights were not updated."
            f"{_listed(names)} To resume from the last checkpoint, add --change "
            f"learning_rate={stage.optimization.learning_rate / 2:.3g}, --change precision=fp32, --change "
            "seed=N for another order, or --change skip+=NAME to leave out an image.",
            image,
            names,
        )


def _listed(names: list[str]) -> str:
    """The first names of a batch, as a sentence."""
    if not names:
        return ""
    more = f" and {len(names) - _NAMED} more, listed in log.jsonl" if len(names) > _NAMED else ""
    return f" The batch contains {', '.join(names[:_NAMED])}{more}."

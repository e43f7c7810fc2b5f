"""Updates that went wrong: losses or gradients that are not finite, and how they are told to the user."""

import math

import torch

from wuerstchen.data.plan import items_at
from wuerstchen.errors import UserError
from wuerstchen.train.engine.image_cache import ImageCache
from wuerstchen.train.engine.update import (
    TrainStep,
    Values,
)
from wuerstchen.train.feed.images import Feed
from wuerstchen.train.feed.prepared import PreparedFeed

_NAMED = 3  # images of a batch in a message


def read_values(values: Values, step: TrainStep) -> dict[str, float]:
    """The values of an update on the host. Raises ``UserError`` where one was not finite, or says to stop."""
    stacked = torch.stack([v.float() for v in values.values()])
    step.processes.all_reduce_mean_([stacked])
    read = dict(zip(values, stacked.tolist(), strict=True))
    refuse_fault(step, read)
    step.stage.check(read)
    return read


def names_of_batch(
    step: TrainStep, feed: Feed | PreparedFeed, cache: ImageCache | None, first: int
) -> list[str]:
    """The names of the images of the batch that begins at number ``first`` of the run."""
    optimization = step.stage.optimization
    numbers = range(first, min(first + optimization.batch_size, optimization.images))
    if cache is None:
        return feed.names(numbers)
    return [cache.names[row] for row in items_at(numbers, len(cache), step.seed)] if cache.names else []


def refuse_fault(step: TrainStep, values: dict[str, float] | None = None) -> None:
    """Raises ``UserError`` if a loss or gradient was not finite in an update until now; ``values`` are those
    of the last. What passed through networks then may be in their statistics, so it must not be stored."""
    image = int(step.fault)
    if image < 0:
        return
    what = "a loss or gradient was not finite"
    for name, value in (values or {}).items():
        if name.startswith(("loss", "gradient")) and not math.isfinite(value):
            named = f"loss_{step.stage.averaged[0]}" if name == "loss" else name
            what = f"the {named.replace('_', ' of ', 1)} is {value}"
            break
    names = [] if step.names is None else step.names(image)
    held = ""
    if names:
        held = f". The batch holds {', '.join(names[:_NAMED])}"
        held += f" and {len(names) - _NAMED} more, which log.jsonl names" if len(names) > _NAMED else ""
    rate = step.stage.optimization.learning_rate / 2
    raise NotFinite(
        f"{what} at image {image:,} of stage {step.stage.name.upper()}, so the weights were left as they "
        f"were{held}. To go on from the last checkpoint add --change learning_rate={rate:.3g}, --change "
        "precision=fp32, --change seed=N for another order, or --change skip+=NAME to leave out an image",
        image,
        names,
    )


class NotFinite(UserError):
    """A loss or gradient of an update was not finite."""

    def __init__(self, message: str, image: int, names: list[str]) -> None:
        """``image`` is the first of the batch, whose images have these ``names`` where they are known."""
        super().__init__(message)
        self.image, self.names = image, names

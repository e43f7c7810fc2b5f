"""What one is told of a drawing while it is made, and small pictures of what it is going to be."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from wuerstchen.diffusion.objective import Objective
from wuerstchen.diffusion.samplers import OnStep, Predict
from wuerstchen.images import to_images
from wuerstchen.models.cascade import Cascade


@dataclass(frozen=True)
class Step:
    """A step that has just been made, of a batch that is being drawn."""

    stage: str
    step: int
    """From 1."""
    steps: int
    preview: Callable[[Sequence[int]], list[Image.Image]]
    """Small pictures of what is being drawn, for these numbers within the batch: Stage C's through the
    previewer, Stage B's at half the size. They are made of an estimate of the end, and cost time. None come
    from a model without a previewer during Stage C, or where networks do not all stay on the device."""


Watch = Callable[[Step], None]
"""Called after each step. What it raises ends the drawing and reaches the caller."""


class Watching:
    """Tells a ``watch`` of each step, and makes previews of what the networks last predicted."""

    def __init__(
        self, cascade: Cascade, watch: Watch, size: tuple[int, int], canvas: tuple[int, int], *, shows: bool
    ) -> None:
        """``size`` and ``canvas`` are (width, height); ``shows`` is whether previews can be made."""
        self.cascade = cascade
        self.watch = watch
        self.size, self.canvas = size, canvas
        self.shows = shows
        self._last_step: torch.cuda.Event | None = None

    def over_map(self, predict: Predict, report: OnStep | None, steps: int) -> tuple[Predict, OnStep]:
        cascade, previewer = self.cascade, self.cascade.previewer

        def picture(clean: Tensor) -> Tensor:
            assert previewer is not None
            z = cascade.settings.latent_statistics.restore(clean)
            return previewer(z.to(next(previewer.parameters()).dtype))

        sampled = cascade.settings.prior_objective.for_sampling()
        return self._over("Stage C", predict, report, steps, sampled, None if previewer is None else picture)

    def over_latents(self, predict: Predict, report: OnStep | None, steps: int) -> tuple[Predict, OnStep]:
        sampled = self.cascade.settings.decoder_objective.for_sampling()
        return self._over("Stage B", predict, report, steps, sampled, self._half_size)

    def over_tokens(self, report: OnStep | None, steps: int) -> OnStep:
        vqgan = self.cascade.vqgan

        def picture(tokens: Tensor) -> Tensor:
            return self._half_size(vqgan.vquantizer.lookup(tokens) / vqgan.config.scale_factor)

        return self._after_each("Stage B", report, steps, lambda rows, tokens: picture(tokens[rows]))

    def _half_size(self, latents: Tensor) -> Tensor:
        """A quarter of the pixels for about a quarter of the time."""
        vqgan = self.cascade.vqgan
        return vqgan.decode(F.avg_pool2d(latents, 2).to(vqgan.dtype))

    def _over(
        self,
        stage: str,
        predict: Predict,
        report: OnStep | None,
        steps: int,
        sampled: Objective,
        picture: Callable[[Tensor], Tensor] | None,
    ) -> tuple[Predict, OnStep]:
        last: list[Tensor] = []

        def remembering(x: Tensor, t: Tensor) -> Tensor:
            last[:] = predict(x, t), x, t
            return last[0]

        def estimate(rows: list[int], _: Tensor) -> Tensor:
            assert picture is not None
            return picture(sampled.to_clean(*(value[rows] for value in last)))

        return remembering, self._after_each(stage, report, steps, picture and estimate)

    def _after_each(
        self,
        stage: str,
        report: OnStep | None,
        steps: int,
        estimate: Callable[[list[int], Tensor], Tensor] | None,
    ) -> OnStep:
        def on_step(step: int, sample: Tensor) -> None:
            def preview(rows: Sequence[int]) -> list[Image.Image]:
                if estimate is None or not rows or not self.shows:
                    return []
                return [self._cut(image) for image in to_images(estimate(list(rows), sample).float())]

            if report is not None:
                report(step, sample)
            self._keep_pace(sample)
            self.watch(Step(stage, step + 1, steps, preview))

        return on_step

    def _keep_pace(self, sample: Tensor) -> None:
        """Waits on a GPU until the step before this one is made.

        It would take orders for a whole stage at once, which could then be neither told of nor stopped.
        """
        if sample.is_cuda:
            before, self._last_step = self._last_step, torch.cuda.Event(blocking=True)
            self._last_step.record(torch.cuda.current_stream(sample.device))
            if before is not None:
                before.synchronize()

    def _cut(self, image: Image.Image) -> Image.Image:
        """The part of a preview of the canvas that is in the picture."""
        scale = image.width / self.canvas[0]
        width, height = (max(1, round(side * scale)) for side in self.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))

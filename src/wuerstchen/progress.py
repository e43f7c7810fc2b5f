"""Step callbacks during sampling, and the preview images that they can ask for."""

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
    """A completed sampling step of a batch."""

    stage: str
    step: int
    """From 1."""
    steps: int
    preview: Callable[[Sequence[int]], list[Image.Image]]
    """Returns small previews of the images with these indices in the batch, decoded from the current estimate
    of the final result: by the previewer during Stage C, at half the size during Stage B. This costs time.
    The list is empty during Stage C if the model has no previewer, and always with offloading."""


StepCallback = Callable[[Step], None]
"""Called after each step. An exception that it raises ends the sampling and reaches the caller."""
Watch = StepCallback
"""The former name of ``StepCallback``."""


class StepReporter:
    """Calls a step callback after each step, and makes previews from the networks' last predictions."""

    def __init__(
        self,
        cascade: Cascade,
        callback: StepCallback,
        size: tuple[int, int],
        canvas: tuple[int, int],
        *,
        can_preview: bool,
    ) -> None:
        """``size`` and ``canvas`` are (width, height) in pixels."""
        self.cascade = cascade
        self.callback = callback
        self.size, self.canvas = size, canvas
        self.can_preview = can_preview
        self._last_step: torch.cuda.Event | None = None

    def on_semantic_latents(
        self, predict: Predict, report: OnStep | None, steps: int, objective: Objective
    ) -> tuple[Predict, OnStep]:
        """``predict`` and ``report`` of Stage C, extended to call the step callback. ``predict`` is in terms
        of the ``objective``."""
        cascade, previewer = self.cascade, self.cascade.previewer

        def decode(clean: Tensor) -> Tensor:
            assert previewer is not None
            z = cascade.settings.latent_statistics.restore(clean)
            return previewer(z.to(next(previewer.parameters()).dtype))

        return self._extended("Stage C", predict, report, steps, objective, previewer and decode)

    def on_latents(
        self, predict: Predict, report: OnStep | None, steps: int, objective: Objective
    ) -> tuple[Predict, OnStep]:
        """``predict`` and ``report`` of Stage B, extended to call the step callback. ``predict`` is in terms
        of the ``objective``."""
        return self._extended("Stage B", predict, report, steps, objective, self._decode_half_size)

    def on_tokens(self, report: OnStep | None, steps: int) -> OnStep:
        """``report`` of v1's Stage B, which samples tokens, extended to call the step callback."""
        vqgan = self.cascade.vqgan

        def estimate(rows: list[int], tokens: Tensor) -> Tensor:
            return self._decode_half_size(vqgan.vquantizer.lookup(tokens[rows]) / vqgan.config.scale_factor)

        return self._after_each_step("Stage B", report, steps, estimate)

    def _decode_half_size(self, latents: Tensor) -> Tensor:
        """Decodes a quarter of the pixels, in about a quarter of the time."""
        vqgan = self.cascade.vqgan
        return vqgan.decode(F.avg_pool2d(latents, 2).to(vqgan.dtype))

    def _extended(
        self,
        stage: str,
        predict: Predict,
        report: OnStep | None,
        steps: int,
        objective: Objective,
        decode: Callable[[Tensor], Tensor] | None,
    ) -> tuple[Predict, OnStep]:
        last: list[Tensor] = []

        def remembered(x: Tensor, t: Tensor) -> Tensor:
            last[:] = predict(x, t), x, t
            return last[0]

        def estimate(rows: list[int], _: Tensor) -> Tensor:
            assert decode is not None
            return decode(objective.to_clean(*(value[rows] for value in last)))

        return remembered, self._after_each_step(stage, report, steps, decode and estimate)

    def _after_each_step(
        self,
        stage: str,
        report: OnStep | None,
        steps: int,
        estimate: Callable[[list[int], Tensor], Tensor] | None,
    ) -> OnStep:
        def on_step(step: int, sample: Tensor) -> None:
            def preview(rows: Sequence[int]) -> list[Image.Image]:
                if estimate is None or not rows or not self.can_preview:
                    return []
                return [self._crop(image) for image in to_images(estimate(list(rows), sample).float())]

            if report is not None:
                report(step, sample)
            self._wait_for_previous_step(sample)
            self.callback(Step(stage, step + 1, steps, preview))

        return on_step

    def _wait_for_previous_step(self, sample: Tensor) -> None:
        """On a GPU, waits until the step before this one has finished.

        Otherwise all steps of a stage would be queued at once, and the callback could neither report progress
        nor stop the sampling in time.
        """
        if sample.is_cuda:
            before, self._last_step = self._last_step, torch.cuda.Event(blocking=True)
            self._last_step.record(torch.cuda.current_stream(sample.device))
            if before is not None:
                before.synchronize()

    def _crop(self, image: Image.Image) -> Image.Image:
        """The part of a preview of the canvas that is in the image."""
        scale = image.width / self.canvas[0]
        width, height = (max(1, round(side * scale)) for side in self.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))

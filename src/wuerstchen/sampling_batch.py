"""A batch of images that are sampled together: everything that the stages need to know about it."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from wuerstchen.diffusion.samplers import OnStep
from wuerstchen.progress import StepReporter
from wuerstchen.sampling import Sampling

Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, the number of completed steps, and the number of steps in total."""


@dataclass(frozen=True, kw_only=True)
class SamplingBatch:
    """The prompts, seeds, sizes, settings and callbacks of a batch."""

    prompts: list[str]
    negatives: list[str] = dataclasses.field(default_factory=list)
    """Only Stage C reads them."""
    seeds: Sequence[int]
    """One for each image."""
    size: tuple[int, int]
    """Width and height of the images in pixels."""
    canvas: tuple[int, int]
    """Width and height of the sampled canvas in pixels. The images are its center crop."""
    sampling: Sampling
    """With all settings filled in."""
    init_latents: Float[Tensor, "b c lh lw"] | None = None
    """Normalized semantic latents that Stage C starts from, instead of pure noise."""
    strength: float = 1.0
    """The time in (0, 1] that ``init_latents`` are noised to."""
    progress: Progress | None = None
    reporter: StepReporter | None = None
    generators: list[torch.Generator] = dataclasses.field(init=False)
    """One for each image, on the CPU. All stages draw from them in turn."""

    def __post_init__(self) -> None:
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in self.seeds]
        object.__setattr__(self, "generators", generators)

    def describe(self) -> str:
        return f"batch_size={len(self.prompts)} at {self.size[0]}x{self.size[1]} pixels"

    def on_step(self, stage: str, steps: int) -> OnStep | None:
        """A sampler's ``on_step`` that calls ``progress``."""
        progress = self.progress
        return None if progress is None else lambda step, _: progress(stage, step + 1, steps)

"""A batch of images that are sampled together: everything that the stages need to know about it."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from wuerstchen.diffusion.known_cells import Known, KnownTokens
from wuerstchen.diffusion.morphs import slerp
from wuerstchen.diffusion.samplers import OnStep, draw_noise
from wuerstchen.edits import Edit
from wuerstchen.progress import StepReporter
from wuerstchen.sampling import Sampling

Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, the number of completed steps, and the number of steps in total."""


@dataclass(frozen=True)
class KnownParts:
    """What the stages keep of images that are edited."""

    semantic_latents: Known
    """Of normalized semantic latents."""
    latents: Known | KnownTokens | None = None

    @staticmethod
    def joined(parts: "Sequence[KnownParts]") -> "KnownParts":
        """A batch of the images in ``parts``."""
        return KnownParts(
            _joined([part.semantic_latents for part in parts]), _joined([part.latents for part in parts])
        )


@dataclass(frozen=True, kw_only=True)
class Begin:
    """What the sampling of an image begins with."""

    size: tuple[int, int]
    """Width and height in pixels."""
    canvas: tuple[int, int]
    init_latents: Float[Tensor, "1 c lh lw"] | None = None
    known: KnownParts | None = None
    edit: Edit | None = None

    def finished(self, image: Image.Image) -> Image.Image:
        """The sampled image, or the edited image with it."""
        return image if self.edit is None else self.edit.paste(image)


def same_size_rows(begins: Sequence[Begin], batch_size: int) -> Iterator[slice]:
    """Splits images into batches of the same size, in their order."""
    start = 0
    for _, group in itertools.groupby(begins, key=lambda begin: begin.size):
        stop = start + len(list(group))
        for first in range(start, stop, batch_size):
            yield slice(first, min(first + batch_size, stop))
        start = stop


def joined_begins(begins: Sequence[Begin]) -> dict[str, Any]:
    """The fields of a ``SamplingBatch`` that come from its begins, which have the same size."""
    latents = [begin.init_latents for begin in begins if begin.init_latents is not None]
    known = [begin.known for begin in begins if begin.known is not None]
    return {
        "size": begins[0].size,
        "canvas": begins[0].canvas,
        "init_latents": torch.cat(latents) if latents else None,
        "known": KnownParts.joined(known) if known else None,
    }


def _joined(known: Sequence[Any]) -> Any:
    if known[0] is None:
        return None
    return type(known[0])(
        torch.cat([each.clean for each in known]), torch.cat([each.strength for each in known])
    )


@dataclass(frozen=True, kw_only=True)
class Morph:
    """The other end of images between two prompts or two seeds."""

    prompts: list[str]
    seeds: Sequence[int]
    weights: Float[Tensor, " b"]
    """0 is the first end, 1 this one."""

    def noise(self, start: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Stage C's noise between ``start`` and that of the other end, on the CPU."""
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in self.seeds]
        end = draw_noise(start.shape[1:], generators)
        same = (start == end).flatten(1).all(1).view(-1, 1, 1, 1)
        return torch.where(same, start, slerp(start, end, self.weights))


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
    """The time that ``init_latents`` are noised to, or the highest strength of ``known``. At 0 Stage C does
    not change ``init_latents``."""
    known: KnownParts | None = None
    """What is kept of the images that are edited."""
    morph: Morph | None = None
    detail_seeds: Sequence[int] | None = None
    """Seeds of Stage B's noise, instead of the noise that follows that of Stage C."""
    progress: Progress | None = None
    reporter: StepReporter | None = None
    generators: list[torch.Generator] = dataclasses.field(init=False)
    """One for each image, on the CPU. All stages draw from them in turn."""

    def __post_init__(self) -> None:
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in self.seeds]
        object.__setattr__(self, "generators", generators)

    def decoder_generators(self) -> list[torch.Generator]:
        """The generators of Stage B."""
        if self.detail_seeds is None:
            return self.generators
        return [torch.Generator("cpu").manual_seed(seed) for seed in self.detail_seeds]

    def describe(self) -> str:
        return f"batch_size={len(self.prompts)} at {self.size[0]}x{self.size[1]} pixels"

    def on_step(self, stage: str, steps: int) -> OnStep | None:
        """A sampler's ``on_step`` that calls ``progress``."""
        progress = self.progress
        return None if progress is None else lambda step, _: progress(stage, step + 1, steps)

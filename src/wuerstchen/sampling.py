"""What can be asked of a model: the sampling settings, prompts, seeds and sizes. Imports no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from PIL import Image

from wuerstchen.diffusion.sampler_table import check_sampler
from wuerstchen.errors import UserError

MAX_SEED = 2**32 - 1  # a CPU generator keeps 32 bits: larger seeds would repeat the noise of smaller ones
MAX_STEPS = 1000


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sample. ``None`` stands for the model's own setting."""

    guidance: float | None = None
    """Guidance scale of Stage C; 1 is none."""
    prior_steps: int | None = None
    prior_sampler: str | None = None
    """Of Stage C, by its name in ``diffusion.sampler_table``. It must suit the model's objective: ``ddpm``,
    as published, ``dpm``, for fewer steps, or ``ddim``; of flow matching, ``euler``."""
    decoder_steps: int | None = None
    decoder_guidance: float | None = None
    decoder_shift: float | None = None
    """How far Stage B's steps lean towards noise; 1 is equal steps."""

    def __post_init__(self) -> None:
        for name in ("guidance", "decoder_guidance"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, Real) and 0 <= value <= 100):
                raise UserError(
                    f"{name} {value!r} must be a number from 0 to 100; 1 is no guidance, 4 is common"
                )
        shift = self.decoder_shift
        if shift is not None and not (isinstance(shift, Real) and 0 < shift <= 100):
            raise UserError(f"decoder_shift {shift!r} must be above 0 and at most 100; 1 is none")
        for name in ("prior_steps", "decoder_steps"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, Integral) and 1 <= value <= MAX_STEPS):
                raise UserError(
                    f"{name} {value!r} must be a whole number from 1 to {MAX_STEPS}; 29 and 12 are common"
                )
        if self.prior_sampler is not None:
            check_sampler(self.prior_sampler)


@dataclass(frozen=True)
class Reconstruction:
    """A picture, what Stages A and B make of its map, and how small that map is."""

    original: Image.Image
    image: Image.Image
    map_size: tuple[int, int, int]
    """Channels, height and width."""

    @property
    def spatial_compression(self) -> float:
        """How many times smaller a side of the map is than the picture's."""
        return self.original.height / self.map_size[1]

    @property
    def element_compression(self) -> float:
        """Numbers in the picture over numbers in the map."""
        return 3 * self.original.height * self.original.width / math.prod(self.map_size)


def checked_texts(prompts: Any, name: str = "prompt") -> list[str]:
    """Prompts as a list. Raises ``UserError`` for anything that is no text."""
    one = isinstance(prompts, str) or not isinstance(prompts, Sequence)
    texts = [prompts] if one else list(prompts)
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"{name} {text!r} is no text; give a string or a list of them, '' for none")
    return texts


def check_seed(seed: Any, pictures: int) -> None:
    """Raises ``UserError`` unless ``seed`` and those of the pictures after it can be used."""
    if not isinstance(seed, Integral):
        raise UserError(f"seed {seed!r} is no whole number; use one, or a list with one for each picture")
    if not 0 <= seed <= MAX_SEED - pictures + 1:
        raise UserError(
            f"seed {seed} must be from 0 to {MAX_SEED}, and so must those of the pictures after it; "
            "use another"
        )


def checked_request(prompts: list[str], seed: Any, count: Any, batch_size: Any) -> Sequence[int]:
    """The seed of each picture. Raises ``UserError`` for what asks for no picture or an impossible one."""
    if not prompts:
        raise UserError("no prompt was given, so there is nothing to draw; give at least one")
    for name, value in (("count", count), ("batch_size", batch_size)):
        if not isinstance(value, Integral) or value < 1:
            raise UserError(f"{name} {value} draws nothing; use a whole number of at least 1")
    pictures = int(count) * len(prompts)
    if not isinstance(seed, Sequence):
        check_seed(seed, pictures)
        return range(seed, seed + pictures)
    if len(seed) != pictures:
        raise UserError(f"{len(seed)} seeds do not fit {pictures} pictures; give one for each, or one number")
    for one in seed:
        check_seed(one, 1)
    return [int(one) for one in seed]


def one_for_each(name: str, values: list[Any], prompts: int, count: int) -> list[Any]:
    """One value a picture, of one for all or one for each prompt."""
    if len(values) not in (1, prompts):
        raise UserError(
            f"{len(values)} values of {name} do not fit {prompts} prompts; give one for each, or one for all"
        )
    return [value for value in (values if len(values) == prompts else values * prompts) for _ in range(count)]


def checked_size(size: Any, default: int) -> tuple[int, int]:
    """Width and height in pixels of a ``size``, which may be one number for both, or None for the default.

    Raises ``UserError`` for anything else.
    """
    if size is None:
        size = default
    sides = [size, size] if isinstance(size, Integral) else size
    if (
        not isinstance(sides, list | tuple)
        or len(sides) != 2
        or not all(isinstance(side, Integral) for side in sides)
    ):
        raise UserError(f"size {size!r} is no size; give (width, height) in pixels, or one whole number")
    return int(sides[0]), int(sides[1])

"""What a caller of a model can choose: sampling settings, prompts, seeds and sizes. Imports no torch."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from PIL import Image

from wuerstchen.diffusion.sampler_table import check_sampler
from wuerstchen.errors import UserError

MAX_SEED = 2**32 - 1  # a CPU generator uses 32 bits: larger seeds would repeat the noise of smaller ones
MAX_STEPS = 1000
ALL_TIMES = (0.0, 1.0)
"""The guidance interval that contains every time."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling settings. ``None`` means the model's own setting."""

    guidance: float | None = None
    """Guidance scale of Stage C. 1 is no guidance."""
    guidance_interval: tuple[float, float] | None = None
    """Lowest and highest time at which Stage C is guided, from 0 (clean) to 1 (noise). At other times it
    follows the prompt alone, which takes about half as long. (0, 1) guides all steps."""
    prior_steps: int | None = None
    prior_sampler: str | None = None
    """Stage C's sampler, by its name in ``diffusion.sampler_table``. It must support the model's objective:
    ``ddpm`` (as published), ``dpm`` (for fewer steps) or ``ddim``. Flow matching uses ``euler``."""
    decoder_steps: int | None = None
    decoder_sampler: str | None = None
    """Stage B's sampler, by its name in the same table. Not for a Stage B on tokens (v1)."""
    decoder_guidance: float | None = None
    decoder_shift: float | None = None
    """Timestep shift of Stage B. Values above 1 spend more steps at high noise, 1 gives equal steps."""
    full: bool = False
    """Whether the full networks sample, also in a model with students for few steps."""

    def __post_init__(self) -> None:
        for name in ("guidance", "decoder_guidance"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, Real) and 0 <= value <= 100):
                raise UserError(
                    f"{name} must be a number from 0 to 100, got {value!r}. 1 is no guidance, 4 is common."
                )
        if self.guidance_interval is not None:
            interval = checked_interval("guidance_interval", self.guidance_interval)
            object.__setattr__(self, "guidance_interval", interval)
        shift = self.decoder_shift
        if shift is not None and not (isinstance(shift, Real) and 0 < shift <= 100):
            raise UserError(f"decoder_shift must be above 0 and at most 100, got {shift!r}. 1 is no shift.")
        for name in ("prior_steps", "decoder_steps"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, Integral) and 1 <= value <= MAX_STEPS):
                raise UserError(
                    f"{name} must be an integer from 1 to {MAX_STEPS}, got {value!r}. Common values are 29 "
                    "for prior_steps and 12 for decoder_steps."
                )
        for name in ("prior_sampler", "decoder_sampler"):
            if getattr(self, name) is not None:
                check_sampler(getattr(self, name), name)


EDIT = "an image to start from"
MORPH = "a morph"
"""``EDIT`` and ``MORPH`` are what students of neither stage can do."""
NO_STUDENTS = Sampling()
"""The settings of the students of a model without students."""
OF_PRIOR = ("guidance", "guidance_interval", "prior_steps", "prior_sampler")
"""The settings of Stage C."""
OF_DECODER = ("decoder_guidance", "decoder_shift", "decoder_steps", "decoder_sampler")
"""The settings of Stage B."""


def completed(sampling: Sampling, full: Sampling, students: Sampling, beyond: Sequence[str] = ()) -> Sampling:
    """The settings ``sampling``, with a model's own settings where they are None.

    ``full`` are the complete settings of the full networks. ``students`` are those of students for few steps,
    None without a student. A student samples its stage if ``sampling`` names its sampler, or if it sets
    nothing of this stage and is not ``full``. ``beyond`` names what the request wants that students cannot
    do: ``EDIT`` or ``MORPH``, and for Stage C more, as "a negative prompt". Then the full network samples.
    Raises ``UserError`` if both it and the student are asked for.
    """
    own = {name: value for name, value in vars(sampling).items() if value is not None}
    known = vars(full) | own
    edits = [name for name in beyond if name in (EDIT, MORPH)]
    for stage, names, limits in (("prior", OF_PRIOR, beyond), ("decoder", OF_DECODER, edits)):
        if _uses_student(sampling, students, stage, names, limits):
            of_student = {name: getattr(students, name) for name in names if name not in own}
            known |= {name: value for name, value in of_student.items() if value is not None}
    return Sampling(**known)


def _uses_student(
    sampling: Sampling, students: Sampling, stage: str, names: Sequence[str], limits: Sequence[str]
) -> bool:
    """Whether a student samples a stage. Raises ``UserError`` if it is asked for what it does not support."""
    setting, guidance = f"{stage}_sampler", names[0]
    student = getattr(students, setting)
    if student is None:
        return False
    if getattr(sampling, setting) != student:
        return not (sampling.full or limits) and all(getattr(sampling, name) is None for name in names)
    asked = list(limits)
    if getattr(sampling, guidance) not in (None, 1):
        asked.insert(0, f"{guidance} {getattr(sampling, guidance):g}")
    if sampling.full:
        asked.insert(0, "full")
    if asked:
        raise UserError(
            f"{setting} {student} does not support {asked[0]}. It samples with a student for few steps, "
            f"which has learnt its guidance and starts from noise. Leave out {setting}, and the full network "
            "samples."
        )
    return True


def checked_interval(name: str, value: Any) -> tuple[float, float]:
    """An interval of times from a pair of numbers. Raises ``UserError`` for anything else."""
    if (
        not isinstance(value, list | tuple)
        or len(value) != 2
        or not all(isinstance(time, Real) for time in value)
        or not 0 <= value[0] < value[1] <= 1
    ):
        raise UserError(
            f"{name} must be two times with 0 <= LOW < HIGH <= 1, got {value!r:.80}. (0, 1) guides all steps."
        )
    return float(value[0]), float(value[1])


@dataclass(frozen=True)
class Reconstruction:
    """An image, and what Stages A and B reconstruct from its semantic latents."""

    original: Image.Image
    image: Image.Image
    latent_size: tuple[int, int, int]
    """Channels, height and width of the semantic latents."""

    @property
    def map_size(self) -> tuple[int, int, int]:
        """The former name of ``latent_size``."""
        return self.latent_size

    @property
    def spatial_compression(self) -> float:
        """Height of the image over height of the semantic latents."""
        return self.original.height / self.latent_size[1]

    @property
    def element_compression(self) -> float:
        """Number of values in the image over number of values in the semantic latents."""
        return 3 * self.original.height * self.original.width / math.prod(self.latent_size)


def checked_texts(prompts: Any, name: str = "prompt") -> list[str]:
    """Prompts as a list. Raises ``UserError`` for anything but strings."""
    single = isinstance(prompts, str) or not isinstance(prompts, Sequence)
    texts = [prompts] if single else list(prompts)
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"{name} must be a string or a list of strings, got {text!r}. Use '' for none.")
    return texts


def checked_strength(strength: Any, is_edit: bool) -> float:
    """The strength of an edit or of a variation, which may be 0. Raises ``UserError``."""
    if strength is None:
        return 1.0 if is_edit else 0.7
    if not isinstance(strength, Real) or not 0 <= strength <= 1 or (is_edit and strength == 0):
        least, hint = ("above 0", "1 is the default") if is_edit else ("at least 0", "0.7 is common")
        raise UserError(f"strength must be {least} and at most 1, got {strength}. {hint}.")
    return float(strength)


def check_seed(seed: Any, images: int, name: str = "seed") -> None:
    """Raises ``UserError`` unless ``seed`` and the following seeds of so many images are valid."""
    if not isinstance(seed, Integral):
        raise UserError(f"{name} must be an integer, or a list with one for each image, got {seed!r}.")
    if not 0 <= seed <= MAX_SEED - images + 1:
        raise UserError(
            f"{name} must be from 0 to {MAX_SEED}, also for later images, which count up from it, got {seed}."
        )


def checked_request(
    prompts: list[str], seed: Any, count: Any, batch_size: Any, name: str = "seed"
) -> Sequence[int]:
    """Returns the seed of each image. Raises ``UserError`` for an empty or invalid request."""
    if not prompts:
        raise UserError("prompts must not be empty, got []. Pass at least one prompt.")
    for option, value in (("count", count), ("batch_size", batch_size)):
        if not isinstance(value, Integral) or value < 1:
            raise UserError(f"{option} must be an integer of at least 1, got {value}.")
    images = int(count) * len(prompts)
    if not isinstance(seed, Sequence):
        check_seed(seed, images, name)
        return range(seed, seed + images)
    if len(seed) != images:
        raise UserError(
            f"{len(seed)} {name}s do not match {images} images. Pass one per image, or a single number."
        )
    for each in seed:
        check_seed(each, 1, name)
    return [int(each) for each in seed]


def one_for_each(name: str, values: list[Any], prompts: int, count: int) -> list[Any]:
    """One value for each image, from one value for all prompts or one for each."""
    if len(values) not in (1, prompts):
        raise UserError(
            f"{name} has {len(values)} values for {prompts} prompts. Pass one value, or one per prompt."
        )
    return [value for value in (values if len(values) == prompts else values * prompts) for _ in range(count)]


def checked_size(size: Any, default: int) -> tuple[int, int]:
    """Width and height in pixels from ``size``: a pair, one number for both, or None for the default.

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
        raise UserError(f"size must be (width, height) in pixels, or one integer for both, got {size!r}.")
    return int(sides[0]), int(sides[1])


def adapters_named(texts: Iterable[str]) -> list[tuple[Path, float]]:
    """The paths and scales of several adapters. Raises ``UserError`` if one is named twice."""
    found: dict[Path, tuple[Path, float]] = {}
    for text in texts:
        path, scale = adapter_named(text)
        place = path.resolve() if path.exists() else path
        if place in found:
            raise UserError(
                f"adapter {str(path)!r} is given twice. Give it once, with the sum of the scales."
            )
        found[place] = path, scale
    return list(found.values())


def adapter_named(text: str) -> tuple[Path, float]:
    """The path and the scale in ``FILE`` or ``FILE:SCALE``. Raises ``UserError`` for another ending."""
    path, colon, scale = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        return Path(path), float(scale)
    except ValueError:
        raise UserError(f"adapter {text!r} does not end in a number. Write FILE or FILE:0.8.") from None

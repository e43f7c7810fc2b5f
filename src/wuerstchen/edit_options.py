"""What a caller can choose about an edit. Imports neither torch nor Pillow, so that ``--help`` answers at
once."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from wuerstchen.errors import UserError, shown

SIDES = ("left", "top", "right", "bottom")
CROP_PADDING = 32
"""Default number of pixels around a mask that ``crop_to_mask`` keeps in view."""
MAX_FEATHER = 1024
FEATHERS = 32
"""The default feather is the side of the training images divided by this: 32 pixels for 1024."""


@dataclass(frozen=True, kw_only=True)
class EditOptions:
    """What a caller can choose about an edit, besides the image and the mask."""

    extend: Any = None
    """Pixels to add on each side (``checked_extend``)."""
    crop_to_mask: Any = False
    """Whether to sample only the region of the mask, enlarged to the size of the model. A number is the
    padding around the mask in pixels."""
    feather: Any = None
    """Over how many pixels outside the mask the result fades into the image."""

    def given(self) -> list[str]:
        """The names of the options that differ from their defaults."""
        values = {
            "extend": self.extend is not None,
            "crop_to_mask": self.crop_to_mask is not False,
            "feather": self.feather is not None,
        }
        return [name for name, is_given in values.items() if is_given]

    def padding(self) -> int | None:
        """The padding of ``crop_to_mask``, or None without it. Raises ``UserError``."""
        value = self.crop_to_mask
        if value is False or value is None:
            return None
        if value is True:
            return CROP_PADDING
        if not isinstance(value, Integral) or not 0 <= value <= 2**16:
            raise UserError(
                f"crop_to_mask must be True or a padding from 0 to 65536 pixels, got {value!r}. "
                f"{CROP_PADDING} is the default."
            )
        return int(value)

    def feather_of(self, image_size: int) -> int:
        """The feather in pixels, of a model with this ``image_size``. Raises ``UserError``."""
        if self.feather is None:
            return image_size // FEATHERS
        is_number = isinstance(self.feather, Integral) and not isinstance(self.feather, bool)
        if not is_number or not 0 <= self.feather <= MAX_FEATHER:
            raise UserError(
                f"feather must be from 0 to {MAX_FEATHER} pixels, got {self.feather!r}. 0 is a hard edge."
            )
        return int(self.feather)


def checked_extend(extend: Any) -> tuple[int, int, int, int]:
    """How many pixels to add on the left, at the top, on the right and at the bottom.

    ``extend`` is a mapping such as ``{"left": 256}``, or the same as text: ``left=256,top=64``. Raises
    ``UserError`` for anything else.
    """
    given = _sides_in(extend) if isinstance(extend, str) else extend
    rule = f"Use {', '.join(SIDES)} with numbers of pixels, such as left=256,right=256."
    if not isinstance(given, Mapping):
        raise UserError(f"extend must name sides of the image, got {shown(extend)}. {rule}")
    for side, pixels in given.items():
        if side not in SIDES:
            raise UserError(f"extend has an unknown side: {shown(side)}. {rule}")
        if isinstance(pixels, bool) or not isinstance(pixels, Integral) or not 0 <= pixels <= 2**16:
            raise UserError(f"extend must be a number of pixels from 0 to 65536, got {side}={pixels}. {rule}")
    left, top, right, bottom = (int(given.get(side, 0)) for side in SIDES)
    if not any((left, top, right, bottom)):
        raise UserError(f"extend adds no pixels: {shown(str(extend))}. {rule}")
    return left, top, right, bottom


def _sides_in(text: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(\d{1,6})\s*", part)
        if match is None or match[1] in found:
            raise UserError(
                f"extend cannot be read: {shown(text)}. Write each side once, with a number of pixels, such "
                "as left=256,right=256."
            )
        found[match[1]] = int(match[2])
    return found

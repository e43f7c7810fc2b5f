"""Edits of a part of an image: inpainting and outpainting.

An edit cuts out what is sampled, tells Stages B and C how far each position may change, and pastes the result
back. Pixels outside the mask and its feather are those of the image as 8-bit sRGB on white, bit for bit.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from wuerstchen.edit_options import EditOptions, checked_extend
from wuerstchen.errors import UserError, UserNotice
from wuerstchen.images import note_conversion, resize_crop, to_tensor, upright_rgb
from wuerstchen.masks import (
    check_mask,
    extended,
    extended_mask,
    mask_of,
    opacity_of,
    region_of,
    scaled_mask,
    strengths_of,
)
from wuerstchen.models.cascade import MAX_SIDES, MIN_SIDE, SIDE_STEP, CascadeSettings

MANY_PIXELS = 4
"""Edits of more pixels than this many training images come with a notice."""
POSITIONS_PER_GROWTH = 24
"""The mask grows by one position of the semantic latents for every so many on a side of a training image:
by one for the published 24×24, on canvases of any size. Its neighbours have seen what is repainted. For the
6×6 of the bundled model it does not grow: one position made no measurable difference to R@1 and the seam
(benchmarks/editing.py)."""


@dataclass(frozen=True, kw_only=True)
class Edit:
    """An image with the part of it to repaint."""

    image: Image.Image
    """RGB, of the size of the result."""
    strength: Float[np.ndarray, "h w"]
    """How far each pixel may change: 0 keeps it, 1 keeps nothing."""
    opacity: Float[np.ndarray, "h w"]
    """The opacity of the result over the image. It is 0 outside the mask and its feather."""
    box: tuple[int, int, int, int]
    """Left, top, right and bottom of what is sampled."""
    size: tuple[int, int]
    """Width and height in pixels at which the box is sampled."""
    grown: int
    """By how many positions of the semantic latents the mask grows."""

    def pixels(self) -> Float[Tensor, "3 h w"]:
        """The box at ``size``. What keeps nothing is filled smoothly from around, so that the compressor does
        not see it."""
        box = self.image.crop(self.box)
        if box.size != self.size:
            box = box.resize(self.size, Image.Resampling.LANCZOS)
        return filled(to_tensor(box), self._at_size(self.strength) < 1)

    def cell_strengths(self, canvas: tuple[int, int], grid: tuple[int, int]) -> Float[Tensor, "h w"]:
        """How far each position of the semantic latents may change, on a ``grid`` of (height, width).

        The strongest pixel of a position counts, and those of its neighbours within ``grown`` positions.
        """
        cells = F.adaptive_max_pool2d(self._on_canvas(self.strength, canvas), grid)
        return F.max_pool2d(cells, 2 * self.grown + 1, stride=1, padding=self.grown)[0, 0]

    def latent_strengths(self, canvas: tuple[int, int], grid: tuple[int, int]) -> Float[Tensor, "h w"]:
        """How far each of Stage B's latents may change, on a ``grid`` of (height, width): 1 in the mask, less
        in its feather."""
        return F.adaptive_max_pool2d(self._on_canvas(self.opacity, canvas), grid)[0, 0]

    def paste(self, result: Image.Image) -> Image.Image:
        """The image with ``result``, which has ``size``, in its box."""
        left, top, right, bottom = self.box
        shape = (right - left, bottom - top)
        if result.size != shape:
            result = result.resize(shape, Image.Resampling.LANCZOS)
        whole = np.array(self.image)
        part = whole[top:bottom, left:right]
        opacity = self.opacity[top:bottom, left:right, None]
        mixed = opacity * np.asarray(result, np.float32) + (1 - opacity) * part
        part[...] = np.where(opacity > 0, np.rint(mixed).astype(np.uint8), part)
        return Image.fromarray(whole)

    def _at_size(self, values: Float[np.ndarray, "h w"]) -> Float[Tensor, "h2 w2"]:
        """Values of pixels in the box at ``size``. The largest one counts where pixels are joined."""
        left, top, right, bottom = self.box
        part = torch.from_numpy(np.ascontiguousarray(values[top:bottom, left:right]))
        return F.adaptive_max_pool2d(part[None, None], (self.size[1], self.size[0]))[0, 0]

    def _on_canvas(self, values: Float[np.ndarray, "h w"], canvas: tuple[int, int]) -> Tensor:
        """Values of pixels on the canvas, (1, 1, h, w), as ``images.pad_to_canvas`` places them."""
        (across, down) = (whole - own for whole, own in zip(canvas, self.size, strict=True))
        padding = (across // 2, across - across // 2, down // 2, down - down // 2)
        return F.pad(self._at_size(values)[None, None], padding, mode="replicate")


def filled(pixels: Float[Tensor, "c h w"], known: Tensor) -> Float[Tensor, "c h w"]:
    """Fills the pixels that are not ``known`` (h, w) smoothly from those around.

    Push-pull: unknown pixels come from the image at half the size, which is filled in the same way.
    """
    if bool(known.all()):
        return pixels
    weight = known[None].to(pixels.dtype)
    if not bool(known.any()):
        return torch.full_like(pixels, 0.5)
    small = _halved(pixels * weight)
    small_weight = _halved(weight)
    small = filled(small / small_weight.clamp(min=1e-6), small_weight[0] > 0)
    large = F.interpolate(small[None], size=pixels.shape[1:], mode="bilinear")[0]
    return torch.where(known, pixels, large)


def _halved(values: Float[Tensor, "c h w"]) -> Float[Tensor, "c h2 w2"]:
    return F.avg_pool2d(values[None], 2, ceil_mode=True)[0]


def checked_inits(init: Any, mask: Any, options: EditOptions) -> list[Image.Image]:
    """The init images as a list of RGB images. Raises ``UserError``, also for options that need one."""
    edits = [*([] if mask is None else ["mask"]), *options.given()]
    if init is None:
        if edits:
            raise UserError(f"{edits[0]} needs an image to edit, but init is missing. Pass init.")
        return []
    if edits and mask is None and options.extend is None:
        raise UserError(f"{edits[0]} needs a mask or extend. Pass one of them, or omit {edits[0]}.")
    given = init if isinstance(init, list | tuple) else [init]
    if not given:
        raise UserError(f"init is empty: {init}. Pass an image, or one per prompt.")
    if mask is not None or options.extend is not None:
        for image in given:
            if isinstance(image, Image.Image):
                note_conversion(image, "init")
    return [upright_rgb(image, "init") for image in given]


def make_edits(
    inits: Sequence[Image.Image],
    masks: Any,
    options: EditOptions,
    strength: float,
    size: tuple[int, int] | None,
    settings: CascadeSettings,
) -> list[Edit]:
    """The edits of RGB images, each with its mask or all with the same.

    ``masks`` is None if images are only extended. ``size`` scales and crops the image and the mask, or, with
    ``crop_to_mask``, says how many pixels to sample. Raises ``UserError``.
    """
    given = list(masks) if isinstance(masks, list | tuple) else [masks]
    if len(given) not in (1, len(inits)):
        raise UserError(
            f"mask has {len(given)} values for {len(inits)} init images. Pass one mask, or one per image."
        )
    given = given if len(given) == len(inits) else given * len(inits)
    return [
        _make_edit(init, mask, options, strength, size, settings)
        for init, mask in zip(inits, given, strict=True)
    ]


def _make_edit(
    init: Image.Image,
    mask: Any,
    options: EditOptions,
    strength: float,
    size: tuple[int, int] | None,
    settings: CascadeSettings,
) -> Edit:
    image = init
    grey = Image.new("L", image.size, 0) if mask is None else mask_of(mask)
    if grey.size != image.size:
        raise UserError(
            f"mask has {grey.width}x{grey.height} pixels, but init has {image.width}x{image.height}. Both "
            "must have the same size. Resize the mask."
        )
    padding = options.padding()
    may_be_black = options.extend is not None
    check_mask(grey, may_be_black=may_be_black)
    if size is not None and padding is None:
        grey = scaled_mask(grey, size)
        check_mask(grey, given=image.size, may_be_black=may_be_black)
        image = resize_crop(image, *size)
    if options.extend is not None:
        sides = checked_extend(options.extend)
        image, grey = extended(image, sides), extended_mask(grey, sides)
    limit = MAX_SIDES * settings.image_size
    if padding is None and max(image.size) > limit:
        what = "init is too large: it" if options.extend is None else "extend makes the image too large: it"
        raise UserError(
            f"{what} has {image.width}x{image.height} pixels. Sides may have at most {limit} pixels with "
            "this model. Use a smaller image, or crop_to_mask."
        )
    values = strengths_of(grey)
    opacity = opacity_of(values, options.feather_of(settings.image_size))
    box, sampled = (0, 0, *image.size), image.size
    if padding is not None:
        side = settings.image_size
        width, height = size or (side, side)
        box = region_of(opacity, padding, width / height)
        sampled = _size_at(box, width * height, limit)
    factor = sampled[0] * sampled[1] / settings.image_size**2
    if factor > MANY_PIXELS:
        warnings.warn(
            f"the edit is sampled at {sampled[0]}x{sampled[1]} pixels, {factor:.0f} times as many as the "
            "model was trained on. It takes long and may repeat objects. Use crop_to_mask or a smaller size.",
            UserNotice,
            stacklevel=2,
        )
    return Edit(
        image=image,
        strength=values * strength,
        opacity=opacity,
        box=box,
        size=sampled,
        grown=min(settings.latent_size(settings.image_size, settings.image_size)) // POSITIONS_PER_GROWTH,
    )


def _size_at(box: tuple[int, int, int, int], pixels: int, limit: int) -> tuple[int, int]:
    """The size with about so many ``pixels`` and the aspect ratio of a box. Sides have at most ``limit``
    pixels."""
    sides = box[2] - box[0], box[3] - box[1]
    scale = (pixels / (sides[0] * sides[1])) ** 0.5
    width, height = (round(side * scale / SIDE_STEP) * SIDE_STEP for side in sides)
    return min(max(MIN_SIDE, width), limit), min(max(MIN_SIDE, height), limit)


def canvas_of(size: tuple[int, int], settings: CascadeSettings) -> tuple[int, int]:
    """The smallest canvas for an edit of any size."""
    multiple = settings.size_multiple
    width, height = (-(-side // multiple) * multiple for side in size)
    return width, height

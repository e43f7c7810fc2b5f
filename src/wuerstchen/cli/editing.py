"""Options of ``wuerstchen generate`` that start from an image or edit a part of it."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wuerstchen.edit_options import CROP_PADDING, checked_extend
from wuerstchen.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image


def add_edit_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--init",
        type=Path,
        metavar="IMAGE",
        help="image to start from, with or without a prompt. The bundled model, trained on emoji, turns "
        "photographs into blobs",
    )
    parser.add_argument(
        "--strength",
        type=float,
        help="how far the result may depart from the --init image, from 0, which changes details only, to 1 "
        "(default: 0.7). Above 0 with --mask or --extend (default: 1)",
    )
    parser.add_argument(
        "--mask",
        type=Path,
        metavar="IMAGE",
        help="repaint only where this image is white. Grey repaints with a part of the strength, black keeps "
        "the --init image exactly, as 8-bit sRGB on white. In an image with transparent pixels, these are "
        "repainted",
    )
    parser.add_argument(
        "--extend",
        metavar="SIDE=PIXELS,...",
        help="paint more of the --init image at its sides: left=256,right=256,top=64,bottom=64",
    )
    parser.add_argument(
        "--crop-to-mask",
        nargs="?",
        type=int,
        const=CROP_PADDING,
        metavar="PADDING",
        help="sample only the masked region, enlarged to the size of the model, and paste it back: more "
        f"detail in small regions. PADDING is in pixels around the mask (default: {CROP_PADDING})",
    )
    parser.add_argument(
        "--feather",
        type=int,
        metavar="PIXELS",
        help="fade the result into the image over so many pixels outside the mask (default: 1/32 of the "
        "model's image size)",
    )


def check_edit_options(options: argparse.Namespace) -> None:
    """Raises ``UserError`` for options that do not fit together."""
    if options.extend is not None:
        checked_extend(options.extend)
    if options.init is None:
        for name in ("strength", "mask", "extend", "crop_to_mask", "feather"):
            value = getattr(options, name)
            if value is not None:
                raise UserError(f"{name.replace('_', '-')} {value} needs an image to start from. Add --init.")
    elif options.mask is None and options.extend is None:
        for name in ("crop_to_mask", "feather"):
            if getattr(options, name) is not None:
                raise UserError(
                    f"{name.replace('_', '-')} {getattr(options, name)} needs a region to repaint. Add "
                    "--mask or --extend."
                )


def edit_of(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of ``Wuerstchen.generate`` for these options. Reads the images."""
    from wuerstchen.masks import open_mask

    return {
        "init": None if options.init is None else _opened(options),
        "strength": options.strength,
        "mask": None if options.mask is None else open_mask(options.mask),
        "extend": options.extend,
        "crop_to_mask": False if options.crop_to_mask is None else options.crop_to_mask,
        "feather": options.feather,
    }


def _opened(options: argparse.Namespace) -> "Image":
    """The ``--init`` image. Prints a notice if an edit would keep other pixels than the file has."""
    from wuerstchen.images import note_conversion, open_image, opened_image, to_rgb

    if options.mask is None and options.extend is None:
        return open_image(options.init)

    def converted(image: "Image") -> "Image":
        note_conversion(image, "init")
        rgb = to_rgb(image, f"image {str(options.init)!r}")
        rgb.info = {}
        return rgb

    return opened_image(options.init, options.init, converted)


def settings_of_edit(options: argparse.Namespace) -> dict[str, Any]:
    """What is stored about the edit in the image's file."""
    if options.init is None:
        return {}
    is_edit = options.mask is not None or options.extend is not None
    strength = options.strength
    if strength is None:
        strength = 1.0 if is_edit else 0.7
    settings: dict[str, Any] = {"init": options.init.name, "strength": strength}
    if options.mask is not None:
        settings["mask"] = options.mask.name
    for name in ("extend", "crop_to_mask", "feather"):
        if getattr(options, name) is not None:
            settings[name] = getattr(options, name)
    return settings

"""``wuerstchen morph``: an animation between two prompts, two images or two seeds."""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wuerstchen.cli.generate import progress_bar, save_image, size_of, slug
from wuerstchen.cli.options import (
    Parser,
    add_generation_options,
    add_guidance_options,
    loaded,
    sampling_of,
)
from wuerstchen.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("webp", "gif", "frames")


def add_morph(commands: "argparse._SubParsersAction[Parser]") -> None:
    morph = commands.add_parser("morph", help="animate from one prompt, image or seed to another")
    morph.set_defaults(run=_morph)
    morph.add_argument("start", metavar="START", help="prompt, or the path of an image file")
    morph.add_argument(
        "end", nargs="?", metavar="END", help="prompt or image to end with (default: START, for --end-seed)"
    )
    morph.add_argument("--frames", type=int, default=16, help="number of images (default: 16)")
    morph.add_argument("--end-seed", type=int, help="seed of the last image (default: the first one's)")
    morph.add_argument("--fps", type=float, default=8.0, help="images per second (default: 8)")
    morph.add_argument(
        "--format",
        choices=FORMATS,
        help="of the file in the --out folder: an animation, or frames as PNG (default: webp)",
    )
    morph.add_argument("--negative", default="", help="negative prompt: what the images should not show")
    morph.add_argument(
        "--strength",
        type=float,
        default=0.6,
        help="how far images between two image files may depart from them, from 0 to 1 (default: 0.6)",
    )
    morph.add_argument(
        "--size", type=size_of, help="N or WIDTHxHEIGHT in pixels, multiples of 8 (default: the model's own)"
    )
    add_guidance_options(morph)
    add_generation_options(morph)


def _morph(options: argparse.Namespace) -> int:
    started = time.monotonic()
    ends = [_end(options.start), _end(options.start if options.end is None else options.end)]
    path = _path(options, ends)
    if not 0.1 <= options.fps <= 100:
        raise UserError(f"fps must be from 0.1 to 100, got {options.fps}. 8 is the default.")
    sampling = sampling_of(options)
    model = loaded(options)
    with progress_bar() as progress:
        frames = model.morph(
            ends[0],
            ends[1],
            frames=options.frames,
            negative=options.negative,
            seed=options.seed,
            end_seed=options.end_seed,
            size=options.size,
            strength=options.strength,
            sampling=sampling,
            progress=progress,
        )
    settings: dict[str, Any] = {"start": options.start, "end": options.end or options.start}
    settings |= {"frames": len(frames), "seed": options.seed, "negative": options.negative}
    if options.end_seed is not None:
        settings["end_seed"] = options.end_seed
    settings["model"] = options.model or "bundled"
    _write(frames, path, settings, options)
    print(f"{len(frames)} images in {time.monotonic() - started:.1f} s", file=sys.stderr)
    return 0


def _end(text: str) -> "str | Image":
    """The image if ``text`` is the path of a file, else the prompt."""
    from wuerstchen.images import open_image

    try:
        is_file = Path(text).is_file()
    except (OSError, ValueError):  # too long for a path
        is_file = False
    return open_image(text) if is_file else text


def _path(options: argparse.Namespace, ends: "list[Any]") -> Path | None:
    """The file to write, or None for frames. Checks that it can be written."""
    from wuerstchen.image_files import ANIMATIONS, check_writable

    suffix = options.out.suffix.lower()
    if suffix in ANIMATIONS:
        if options.format not in (None, suffix[1:]):
            raise UserError(
                f"format {options.format} does not fit {options.out}. Give --out another suffix, or omit "
                "--format."
            )
        if options.out.is_dir():
            raise UserError(f"{options.out} is a folder. Give a file in it, or another folder.")
        for text, end in zip((options.start, options.end or options.start), ends, strict=True):
            if not isinstance(end, str) and options.out.exists() and options.out.samefile(text):
                raise UserError(
                    f"out is the input image: {options.out}. It would be overwritten. Give --out another "
                    "name."
                )
        check_writable(options.out.parent)
        return options.out
    if suffix in (".png", ".jpg", ".jpeg", ".mp4", ".avi", ".webm", ".tif", ".tiff", ".bmp"):
        raise UserError(
            f"out must be a folder, a .webp or a .gif file, got {options.out}. Use --format frames with a "
            "folder for PNG images."
        )
    check_writable(options.out)
    if options.format == "frames":
        return None
    name, number = _name(options), 1
    path = options.out / f"{name}.{options.format or 'webp'}"
    while path.exists():
        number += 1
        path = path.with_stem(f"{name}-{number}")
    return path


def _name(options: argparse.Namespace) -> str:
    names = [Path(text).stem if Path(text).suffix else text for text in (options.start, options.end) if text]
    return "-to-".join(slug(name)[:60] for name in names) + f"-{options.seed}"


def _write(
    frames: "list[Image]", path: Path | None, settings: dict[str, Any], options: argparse.Namespace
) -> None:
    from wuerstchen.image_files import save_animation

    if path is None:
        for number, frame in enumerate(frames):
            name = f"{_name(options)}-{number:03d}"
            print(save_image(frame, options.out, name, {**settings, "frame": number}, is_generated=True))
        return
    save_animation(frames, path, settings, seconds_per_frame=1 / options.fps)
    print(path)

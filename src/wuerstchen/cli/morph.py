"""``wuerstchen morph``: an animation between two prompts, two images or two seeds."""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wuerstchen.cli.generate import (
    note_photographs,
    progress_bar,
    save_image,
    size_of,
    slug,
    warn_of_unknown_words,
)
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

    from wuerstchen.pipeline import Wuerstchen
    from wuerstchen.sampling import Sampling

FORMATS = ("webp", "gif", "frames")
MAX_FPS, MAX_GIF_FPS = 100, 50
"""Browsers play a GIF with less than 20 ms per image at 10 images per second."""
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


def add_morph(commands: "argparse._SubParsersAction[Parser]") -> None:
    morph = commands.add_parser("morph", help="animate from one prompt, image or seed to another")
    morph.set_defaults(run=_morph)
    morph.add_argument("start", metavar="START", help="prompt, or the path of an image file")
    morph.add_argument(
        "end", nargs="?", metavar="END", help="prompt or image to end with (default: START, for --end-seed)"
    )
    morph.add_argument("--frames", type=int, default=16, help="number of images (default: 16)")
    morph.add_argument("--end-seed", type=int, help="seed of the last image (default: the first one's)")
    morph.add_argument(
        "--fps", type=float, default=8.0, help="images per second, up to 100, or 50 in a GIF (default: 8)"
    )
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
    from wuerstchen.morphs import calm_sampling

    started = time.monotonic()
    if options.end is None:
        options.end = options.start
    ends = [_end("start", options.start), _end("end", options.end)]
    path = _path(options, ends)
    most = MAX_GIF_FPS if path is not None and path.suffix.lower() == ".gif" else MAX_FPS
    if not 0.1 <= options.fps <= most:
        raise UserError(
            f"fps must be from 0.1 to {most}, got {options.fps:g}. 8 is the default. Faster than 50, "
            "browsers slow a GIF down."
        )
    prompts = [end for end in ends if isinstance(end, str)]
    if len(prompts) < 2:
        note_photographs(options.model)
    model = loaded(options)
    warn_of_unknown_words(model, prompts, False)
    sampling = calm_sampling(model.cascade, sampling_of(options))
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
    _write(frames, path, _settings(model, sampling, ends, frames, options), options)
    print(f"{len(frames)} images in {time.monotonic() - started:.1f} s", file=sys.stderr)
    return 0


def _settings(
    model: "Wuerstchen",
    sampling: "Sampling",
    ends: "list[Any]",
    frames: "list[Image]",
    options: argparse.Namespace,
) -> dict[str, Any]:
    """What is stored about the morph. Images are named without their folders."""
    are_prompts = [isinstance(end, str) for end in ends]
    start, end = (
        text if is_prompt else Path(text).name
        for text, is_prompt in zip((options.start, options.end), are_prompts, strict=True)
    )
    settings: dict[str, Any] = {"start": start, "end": end, "frames": len(frames), "fps": options.fps}
    settings |= {"seed": options.seed, "negative": options.negative, "model": options.model or "bundled"}
    settings["size"] = f"{frames[0].width}x{frames[0].height}"
    if options.end_seed is not None:
        settings["end_seed"] = options.end_seed
    if not all(are_prompts):
        settings["strength"] = options.strength
    return settings | model.settings_of(sampling, negative=options.negative, edits=True)


def _end(name: str, text: str) -> "str | Image":
    """The image if ``text`` is the path of a file, else the prompt. Raises ``UserError`` for the path of an
    image that does not exist."""
    from wuerstchen.images import open_image

    try:
        is_file = Path(text).is_file()
    except (OSError, ValueError):  # too long for a path
        is_file = False
    if not is_file and text.lower().endswith(_IMAGES):
        raise UserError(
            f"{name} is not a file: {text!r}. A text with the ending of an image must be its path. Check the "
            "path."
        )
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
        for text, end in zip((options.start, options.end), ends, strict=True):
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
    texts = dict.fromkeys((options.start, options.end))
    names = [Path(text).stem if Path(text).suffix else text for text in texts if text]
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

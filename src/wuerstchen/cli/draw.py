"""``wuerstchen generate`` and ``wuerstchen reconstruct``."""

import argparse
import contextlib
import itertools
import math
import operator
import re
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wuerstchen.cli.options import (
    Parser,
    add_drawing_options,
    add_guidance_options,
    loaded,
    sampling_of,
)
from wuerstchen.errors import UserError, UserNotice

if TYPE_CHECKING:
    from PIL.Image import Image

    from wuerstchen.pipeline import Progress, Wuerstchen

_SHORT = 20  # characters of a word; longer ones are no part of a sentence
BATCH_SIZE = 8  # pictures drawn at a time
MAX_GRID = 400  # pictures that a grid may hold


def add_generate(commands: "argparse._SubParsersAction[Parser]") -> None:
    generate = commands.add_parser("generate", help="draw pictures of prompts")
    generate.set_defaults(run=_generate)
    generate.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to draw, one picture a prompt")
    generate.add_argument("--negative", default="", help="what to steer away from")
    generate.add_argument("--count", type=int, default=1, help="pictures of each prompt (1)")
    generate.add_argument(
        "--size", type=_size, help="N or WIDTHxHEIGHT in pixels, in steps of 8 (the model's own)"
    )
    add_guidance_options(generate)
    generate.add_argument(
        "--init",
        type=Path,
        metavar="IMAGE",
        help="begin with this picture; without a prompt, vary it. The bundled model, trained on emoji, makes "
        "blobs of photographs",
    )
    generate.add_argument("--strength", type=float, help="how much of it may change, above 0 to 1 (0.7)")
    generate.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:SCALE]",
        help="adapter (LoRA) for Stage C: a file, or a folder that diffusers or peft wrote; repeatable",
    )
    generate.add_argument("--grid", action="store_true", help="one picture with all of them, a row a prompt")
    add_drawing_options(generate)


def add_reconstruct(commands: "argparse._SubParsersAction[Parser]") -> None:
    reconstruct = commands.add_parser("reconstruct", help="squeeze a picture through the map and back")
    reconstruct.set_defaults(run=_reconstruct)
    reconstruct.add_argument(
        "image",
        type=Path,
        metavar="IMAGE",
        help="picture to squeeze, cut to a square. The bundled model, trained on emoji, makes blobs of "
        "photographs",
    )
    reconstruct.add_argument("--size", type=int, help="side of the square in pixels (the model's own)")
    add_drawing_options(reconstruct)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"'{text}' is neither N nor WIDTHxHEIGHT; write 256 or 256x384")
    return int(match[1]), int(match[2] or match[1])


def _generate(options: argparse.Namespace) -> int:
    from wuerstchen.images import grid, open_image

    began = time.monotonic()
    if options.init is not None and not options.prompts:
        options.prompts = [""]
    if not options.prompts:
        raise UserError('no prompt was given, so there is nothing to draw; try: wuerstchen generate "a cat"')
    if options.count < 1:
        raise UserError(f"count {options.count} draws nothing; use at least 1")
    total = len(options.prompts) * options.count
    if options.grid and total > MAX_GRID:
        raise UserError(
            f"a grid of {total} pictures is too large; draw at most {MAX_GRID}, or leave out --grid"
        )
    if options.strength is not None and options.init is None:
        raise UserError(
            f"strength {options.strength} is wrong because there is no picture to vary; add --init"
        )
    one_file = _check_out(options.out, options.init)
    if one_file and not options.grid and total > 1:
        raise UserError(f"{options.out} is one file for {total} pictures; add --grid, or name a folder")
    sampling = sampling_of(options)
    adapters = [_adapter(text) for text in options.lora]
    init = None if options.init is None else open_image(options.init)

    from wuerstchen.sampling import check_seed

    check_seed(options.seed, total)
    if init is not None:
        _note_photographs(options)
    _warn_of_words(options.prompts, options.count)
    model = loaded(options)
    _warn_of_meaning(model, options.prompts, init is not None)
    for path, scale in adapters:
        model.load_lora(path, scale)
    settings = {"model": options.model or "bundled", "negative": options.negative}
    strength = 0.7 if options.strength is None else options.strength
    if init is not None:
        settings |= {"init": options.init.name, "strength": strength}
    if adapters:
        settings["lora"] = " ".join(options.lora)
    settings |= model.settings_of(sampling)
    images = []
    with _progress() as progress:
        # Drawn a few at a time, so that each is on disk before the next are begun.
        for start in range(0, total, BATCH_SIZE):
            numbers = range(start, min(start + BATCH_SIZE, total))
            few: list[str] = [options.prompts[number // options.count] for number in numbers]
            drawn = model.generate(
                few,
                negative=options.negative,
                seed=options.seed + start,
                size=options.size,
                init=init,
                strength=strength,
                sampling=sampling,
                batch_size=BATCH_SIZE,
                progress=progress,
            )
            images += drawn if options.grid else []
            for number, (image, text) in enumerate(zip(drawn, few, strict=True), start=options.seed + start):
                if not options.grid:
                    name = _slug(text) if text or init is None else _slug(options.init.stem)
                    kept = {"prompt": text, "seed": number, **settings}
                    print(_save(image, options.out, f"{name}-{number}", kept, drawn_by_a_model=True))
    if options.grid:
        columns = options.count if options.count > 1 else math.isqrt(len(images) - 1) + 1
        prompts = "\n".join(options.prompts)
        shown = {"prompt": prompts, "count": options.count, "seed": options.seed, **settings}
        print(_save(grid(images, columns=columns), options.out, "grid", shown, drawn_by_a_model=True))
    print(f"{total} picture{'s' * (total != 1)} in {time.monotonic() - began:.1f} s", file=sys.stderr)
    return 0


def _warn_of_words(prompts: list[str], count: int) -> None:
    """Says that several prompts of one word each may be one that was not quoted."""
    single = [bool(text.strip()) and len(text.split()) == 1 and len(text) <= _SHORT for text in prompts]
    if any(itertools.starmap(operator.and_, itertools.pairwise(single))):
        total = len(prompts) * count
        warnings.warn(
            f"{len(prompts)} prompts were given, several of one word: {' '.join(prompts)[:100]!r}. Each "
            f"prompt is drawn by itself, {total} images in all. Put a prompt of several words in quotes: "
            'wuerstchen generate "a cat"',
            UserNotice,
            stacklevel=2,
        )


def _warn_of_meaning(model: "Wuerstchen", prompts: list[str], varies: bool) -> None:
    """Says which prompts tell the model nothing."""
    encoder = model.cascade.text_encoder
    for text in dict.fromkeys(prompts) if encoder is not None else ():
        if text.strip():
            if not encoder.is_understood(text):
                warnings.warn(
                    "no word of the prompt is in the vocabulary of this model's text encoder: "
                    f"{text[:100]!r}. The image may have nothing to do with it. Use other words, "
                    "in the model's language",
                    UserNotice,
                    stacklevel=2,
                )
        elif not varies:
            warnings.warn(
                "the prompt is empty, so the model draws anything. Say what to draw",
                UserNotice,
                stacklevel=2,
            )


def _note_photographs(options: argparse.Namespace) -> None:
    """Says what to expect of an image that is given to the bundled model."""
    from wuerstchen.checkpoints.hub import PHOTO_NOTE, is_bundled

    if is_bundled(options.model):
        print(f"Note: {PHOTO_NOTE}", file=sys.stderr)


def _adapter(text: str) -> tuple[Path, float]:
    """``FILE`` or ``FILE:SCALE``."""
    path, colon, scale = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        return Path(path), float(scale)
    except ValueError:
        raise UserError(f"adapter {text!r} ends in no number; write FILE, or FILE:0.8") from None


def _reconstruct(options: argparse.Namespace) -> int:
    from wuerstchen.images import grid, open_image

    _check_out(options.out, options.image)
    image = open_image(options.image)
    sampling = sampling_of(options)
    _note_photographs(options)

    model = loaded(options)
    with _progress() as progress:
        result = model.reconstruct(
            image, seed=options.seed, size=options.size, sampling=sampling, progress=progress
        )
    settings = {"image": options.image.name, "seed": options.seed, "model": options.model or "bundled"}
    settings |= {"size": result.image.width, **model.settings_of(sampling)}
    both = grid([result.original, result.image], columns=2)
    path = _save(both, options.out, f"{_slug(options.image.stem)}-reconstructed", settings)
    channels, height, width = result.map_size
    print(path)
    print(
        f"map {channels}x{height}x{width}: {result.spatial_compression:.2f} times smaller a side, "
        f"{result.element_compression:.0f} times fewer numbers",
        file=sys.stderr,
    )
    return 0


def _check_out(out: Path, read: Path | None) -> bool:
    """Whether ``--out`` names a file; makes its folder and checks now that it can be written.

    Raises ``UserError`` where it names the image that is ``read``.
    """
    from wuerstchen.image_files import check_writable

    suffix = out.suffix.lower()
    if suffix in {".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff", ".bmp"}:
        raise UserError(f"{out} is no name for a PNG, which is what is written; end it in .png")
    if suffix == ".png" and out.is_dir():
        raise UserError(f"{out} is a folder; name a file in it, or a folder that does not end in .png")
    if read is not None and out.is_file() and read.exists() and out.samefile(read):
        raise UserError(
            f"out names the image that is read: {out}. It would be replaced."
            " Give --out another name, or a folder"
        )
    check_writable(out.parent if suffix == ".png" else out)
    return suffix == ".png"


@contextlib.contextmanager
def _progress() -> "Iterator[Progress]":
    """A bar over the steps of all stages."""
    from tqdm import tqdm

    with tqdm(unit="step", leave=False, dynamic_ncols=True, disable=None) as bar:

        def report(stage: str, step: int, steps: int) -> None:
            if step == 1:
                bar.set_description(stage, refresh=False)
                bar.reset(total=steps)
            bar.update()

        yield report


def _slug(text: str) -> str:
    """A file name's worth of a prompt, in letters, digits and dashes; names are limited in bytes."""
    name = re.sub(r"[^\w]+", "-", text.lower()).strip("-")[:60]
    return name.encode()[:150].decode(errors="ignore").strip("-") or "picture"


def _save(
    image: "Image", out: Path, stem: str, settings: dict[str, Any], *, drawn_by_a_model: bool = False
) -> Path:
    """Writes to ``out`` if that is a file, or into it under a free name. Returns the path."""
    from wuerstchen.image_files import save_new_png, save_png

    if out.suffix.lower() != ".png":
        return save_new_png(image, out, stem, settings, drawn_by_a_model=drawn_by_a_model)
    save_png(image, out, settings, drawn_by_a_model=drawn_by_a_model)
    return out

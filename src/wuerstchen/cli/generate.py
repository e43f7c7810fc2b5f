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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wuerstchen.cli.editing import add_edit_options, check_edit_options, edit_of, settings_of_edit
from wuerstchen.cli.options import (
    Parser,
    add_generation_options,
    add_guidance_options,
    add_prompt_weights_option,
    loaded,
    sampling_of,
)
from wuerstchen.errors import UserError, UserNotice

if TYPE_CHECKING:
    from PIL.Image import Image

    from wuerstchen.pipeline import Progress, Wuerstchen

_SHORT = 20  # characters; a longer word is hardly part of an unquoted sentence
BATCH_SIZE = 8
MAX_GRID = 400  # images


def add_generate(commands: "argparse._SubParsersAction[Parser]") -> None:
    generate = commands.add_parser("generate", help="generate images from prompts")
    generate.set_defaults(run=_generate)
    generate.add_argument(
        "prompts", nargs="*", metavar="PROMPT", help="text to generate an image from; repeatable"
    )
    generate.add_argument("--negative", default="", help="negative prompt: what the images should not show")
    generate.add_argument("--count", type=int, default=1, help="images per prompt (default: 1)")
    generate.add_argument(
        "--size",
        type=size_of,
        help="image size: N or WIDTHxHEIGHT in pixels, multiples of 8 (default: the model's own, or with "
        "--mask and --extend that of the image). Scales and crops --init and --mask first. With "
        "--crop-to-mask, size of the sampled region",
    )
    add_guidance_options(generate)
    add_edit_options(generate)
    generate.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:SCALE]",
        help="adapter (LoRA) for Stage C: a file, a folder by diffusers or peft, or a Hub name; repeatable",
    )
    generate.add_argument(
        "--detail-seed",
        type=int,
        help="seed of Stage B's noise for the first image: other details of the same content; later images "
        "count up",
    )
    add_prompt_weights_option(generate)
    generate.add_argument(
        "--grid", action="store_true", help="save all images as one grid, with a row per prompt"
    )
    add_generation_options(generate)


def add_reconstruct(commands: "argparse._SubParsersAction[Parser]") -> None:
    reconstruct = commands.add_parser(
        "reconstruct", help="encode an image into semantic latents and decode it again"
    )
    reconstruct.set_defaults(run=_reconstruct)
    reconstruct.add_argument(
        "image",
        type=Path,
        metavar="IMAGE",
        help="image to reconstruct, cropped to a square. The bundled model, trained on emoji, turns "
        "photographs into blobs",
    )
    reconstruct.add_argument(
        "--size", type=int, help="side of the square in pixels (default: the model's own)"
    )
    add_generation_options(reconstruct)


def size_of(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"'{text}' is neither N nor WIDTHxHEIGHT. Write 256 or 256x384.")
    return int(match[1]), int(match[2] or match[1])


def _generate(options: argparse.Namespace) -> int:
    from wuerstchen.sampling import adapters_named, check_seed

    start = time.monotonic()
    if options.init is not None and not options.prompts:
        options.prompts = [""]
    total = len(options.prompts) * options.count
    _check_generate(options, total)
    sampling = sampling_of(options)
    adapters = adapters_named(options.lora)
    edit = edit_of(options)
    check_seed(options.seed, total)
    if options.detail_seed is not None:
        check_seed(options.detail_seed, total, "detail-seed")
    if options.init is not None:
        note_photographs(options.model)
    _warn_of_missing_quotes(options.prompts, options.count)
    model = loaded(options)
    for path, scale in adapters:
        _note_trigger_words(path, model.load_lora(path, scale).trigger_words, options.prompts)
    warn_of_unknown_words(model, _plain(options), options.init is not None)

    settings = {"model": options.model or "bundled", "negative": options.negative}
    settings |= settings_of_edit(options)
    if options.prompt_weights:
        settings["prompt_weights"] = True
    if adapters:
        settings["lora"] = " ".join(options.lora)
    settings |= model.settings_of(sampling, negative=options.negative, edits=options.init is not None)
    with progress_bar() as progress:
        images = _images(
            model,
            options,
            negative=options.negative,
            prompt_weights=options.prompt_weights,
            size=options.size,
            sampling=sampling,
            progress=progress,
            **edit,
        )
        if options.grid:
            _save_grid([image for image, _, _ in images], options, settings)
        else:
            for image, prompt, seed in images:
                _save_one(image, prompt, seed, options, settings)
    print(f"{total} image{'s' * (total != 1)} in {time.monotonic() - start:.1f} s", file=sys.stderr)
    return 0


def _check_generate(options: argparse.Namespace, total: int) -> None:
    """Raises ``UserError`` for options that do not fit together. ``total``: number of images."""
    if not options.prompts:
        raise UserError('no prompt was given. Give at least one: wuerstchen generate "a cat"')
    if options.count < 1:
        raise UserError(f"count must be at least 1, got {options.count}.")
    if options.grid and total > MAX_GRID:
        raise UserError(
            f"the grid is too large: {total} images. A grid has at most {MAX_GRID}. Generate fewer, or omit "
            "--grid."
        )
    check_edit_options(options)
    one_file = check_out(options.out, options.init, options.mask)
    if one_file and not options.grid and total > 1:
        raise UserError(f"{options.out} is one file for {total} images. Add --grid, or give a folder.")


def _images(
    model: "Wuerstchen", options: argparse.Namespace, **arguments: Any
) -> "Iterator[tuple[Image, str, int]]":
    """Yields (image, prompt, seed). Each batch is saved before the next one starts."""
    total = len(options.prompts) * options.count
    for start in range(0, total, BATCH_SIZE):
        numbers = range(start, min(start + BATCH_SIZE, total))
        prompts: list[str] = [options.prompts[number // options.count] for number in numbers]
        first_seed = options.seed + start
        if options.detail_seed is not None:
            arguments["detail_seed"] = options.detail_seed + start
        batch = model.generate(prompts, seed=first_seed, batch_size=BATCH_SIZE, **arguments)
        yield from zip(batch, prompts, range(first_seed, first_seed + len(prompts)), strict=True)


def _save_one(
    image: "Image", prompt: str, seed: int, options: argparse.Namespace, settings: dict[str, Any]
) -> None:
    name = slug(prompt) if prompt or options.init is None else slug(options.init.stem)
    own = {"prompt": prompt, "seed": seed, **settings}
    if options.detail_seed is not None:
        own["detail_seed"] = options.detail_seed + seed - options.seed
    print(save_image(image, options.out, f"{name}-{seed}", own, is_generated=True))


def _save_grid(images: "list[Image]", options: argparse.Namespace, settings: dict[str, Any]) -> None:
    from wuerstchen.images import grid

    columns = options.count if options.count > 1 else math.isqrt(len(images) - 1) + 1
    prompts = "\n".join(options.prompts)
    if options.detail_seed is not None:
        settings = {"detail_seed": options.detail_seed, **settings}
    shown = {"prompt": prompts, "count": options.count, "seed": options.seed, **settings}
    print(save_image(grid(images, columns=columns), options.out, "grid", shown, is_generated=True))


def _warn_of_missing_quotes(prompts: list[str], count: int) -> None:
    """Warns that several one-word prompts may be one prompt without quotes."""
    single = [bool(text.strip()) and len(text.split()) == 1 and len(text) <= _SHORT for text in prompts]
    if any(itertools.starmap(operator.and_, itertools.pairwise(single))):
        total = len(prompts) * count
        warnings.warn(
            f"{len(prompts)} prompts were given, several of one word: {' '.join(prompts)[:100]!r}. Each "
            f"prompt gets its own images, {total} images in total. Put a prompt of several words in quotes: "
            'wuerstchen generate "a cat"',
            UserNotice,
            stacklevel=2,
        )


def warn_of_unknown_words(model: "Wuerstchen", prompts: list[str], has_init: bool) -> None:
    """Warns of prompts without a known word, and of empty ones."""
    encoder = model.cascade.text_encoder
    for text in dict.fromkeys(prompts) if encoder is not None else ():
        if text.strip():
            if not encoder.is_understood(text):
                warnings.warn(
                    "no word of the prompt is in the vocabulary of this model's text encoder: "
                    f"{text[:100]!r}. The image may have nothing to do with it. Use other words, in the "
                    "model's language",
                    UserNotice,
                    stacklevel=2,
                )
        elif not has_init:
            warnings.warn(
                "the prompt is empty, so the image can show anything. Describe an image",
                UserNotice,
                stacklevel=2,
            )


def _plain(options: argparse.Namespace) -> list[str]:
    """The prompts without weights. Raises ``UserError`` for brackets that do not match."""
    if not options.prompt_weights:
        return options.prompts
    from wuerstchen.prompt_weights import parsed

    return [str(parsed(prompt)) for prompt in options.prompts]


def note_photographs(model: str | None) -> None:
    """Prints what to expect of photographs if the model is the bundled one."""
    from wuerstchen.checkpoints.hub import PHOTO_NOTE, is_bundled

    if is_bundled(model):
        print(f"Note: {PHOTO_NOTE}", file=sys.stderr)


def _note_trigger_words(path: Path, words: Sequence[str], prompts: Sequence[str]) -> None:
    """Says which words an adapter was trained with, if no prompt contains one of them."""
    if words and not any(word.lower() in prompt.lower() for word in words for prompt in prompts):
        warnings.warn(
            f"no prompt has a trigger word of the adapter {path.name}: {', '.join(map(repr, words))}. Add "
            "one for its full effect",
            UserNotice,
            stacklevel=2,
        )


def _reconstruct(options: argparse.Namespace) -> int:
    from wuerstchen.images import grid, open_image

    check_out(options.out, options.image)
    image = open_image(options.image)
    sampling = sampling_of(options)
    note_photographs(options.model)

    model = loaded(options)
    with progress_bar() as progress:
        result = model.reconstruct(
            image, seed=options.seed, size=options.size, sampling=sampling, progress=progress
        )
    settings = {"image": options.image.name, "seed": options.seed, "model": options.model or "bundled"}
    settings |= {"size": result.image.width, **model.settings_of(sampling)}
    both = grid([result.original, result.image], columns=2)
    path = save_image(both, options.out, f"{slug(options.image.stem)}-reconstructed", settings)
    channels, height, width = result.latent_size
    print(path)
    print(
        f"semantic latents {channels}x{height}x{width}: {result.spatial_compression:.2f}x smaller per side, "
        f"{result.element_compression:.0f}x fewer values",
        file=sys.stderr,
    )
    return 0


def check_out(out: Path, *inputs: Path | None) -> bool:
    """Whether ``--out`` is a file. Creates the folder and checks that it is writable.

    Raises ``UserError`` if it is not, and if ``--out`` is one of the images that are read.
    """
    from wuerstchen.image_files import check_writable

    suffix = out.suffix.lower()
    if suffix in {".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff", ".bmp"}:
        raise UserError(f"out must be a folder or a .png file, got {out}. Images are saved as PNG.")
    if suffix == ".png" and out.is_dir():
        raise UserError(f"{out} is a folder. Give a file in it, or a folder that does not end in .png.")
    for read in inputs:
        if read is not None and out.is_file() and read.exists() and out.samefile(read):
            raise UserError(
                f"out is the input image: {out}. It would be overwritten. Give --out another name, or a "
                "folder."
            )
    check_writable(out.parent if suffix == ".png" else out)
    return suffix == ".png"


@contextlib.contextmanager
def progress_bar() -> "Iterator[Progress]":
    """A progress bar for the steps of each stage."""
    from tqdm import tqdm

    with tqdm(unit="step", leave=False, dynamic_ncols=True, disable=None) as bar:

        def report(stage: str, step: int, steps: int) -> None:
            if step == 1:
                bar.set_description(stage, refresh=False)
                bar.reset(total=steps)
            bar.update()

        yield report


def slug(text: str) -> str:
    """A file name from a prompt: letters, digits and dashes, of at most 150 bytes."""
    name = re.sub(r"[^\w]+", "-", text.lower()).strip("-")[:60]
    return name.encode()[:150].decode(errors="ignore").strip("-") or "picture"


def save_image(
    image: "Image", out: Path, stem: str, settings: dict[str, Any], *, is_generated: bool = False
) -> Path:
    """Writes to ``out`` if it is a file, else to a new file in it. Returns the path."""
    from wuerstchen.image_files import save_new_png, save_png

    if out.suffix.lower() != ".png":
        return save_new_png(image, out, stem, settings, is_generated=is_generated)
    save_png(image, out, settings, is_generated=is_generated)
    return out

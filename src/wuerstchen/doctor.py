"""Checks whether a model works on this machine: files, versions, three timed images, and a verdict."""

import hashlib
import platform
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from wuerstchen.checkpoints.hub import BUNDLED, local_folder
from wuerstchen.checkpoints.layouts import Sources, layout_of, weight_files
from wuerstchen.device import Precision, default_precision
from wuerstchen.errors import UserError
from wuerstchen.image_files import save_new_png
from wuerstchen.pipeline import load
from wuerstchen.runtime.offload import LowMemory
from wuerstchen.sampling import Sampling
from wuerstchen.version import __version__

PROMPTS = (
    "a portrait of an old sailor with a beard, photograph",
    "an astronaut riding a horse, oil painting",
    "a bowl of fruit on a wooden table, photograph",
)
"""Drawn with seeds 0, 1 and 2, at the model's own size and steps."""
BUNDLED_PROMPTS = (
    "a 3D render of a purple camel on a blue background",
    "a flat illustration of a red apple",
    "a noto emoji of a cat",
)
"""The same for the bundled model, which was trained on emoji only."""
BUNDLED_IMAGES = (
    "62626362626262626267706f646a62626378877977977e626363857f7e909562"
    "6363777f787d83626362657970657c63626264776f6774636262626262626362",
    "fffffefeffffffffffeca1b6fbfdffffffe3766f8385e6fefe91656565659"
    "6fefd806565656586fdfe9e65656666a9fefff0988d8b9ef5fffffffefefefeffff",
    "fffffefefeffffffffffd9dae0fffffffee7a7a2c5efe5fefed5939ebde6cefe"
    "ffffdca29fa6f5ffffffdea6bdadfdffffffdabcedc8fefffffffffefffefffe",
)
"""Its images for these prompts in float32, as 8×8 greyscale pixels in hexadecimal."""
MAX_DIFFERENCE = 8
"""Largest mean difference from these images, out of 255. bfloat16 differs by 0.2."""


def examine(
    model: str | Path | None,
    out: Path,
    *,
    device: str | None = None,
    precision: Precision | None = None,
    low_memory: LowMemory | None = None,
    sources: Sources | None = None,
) -> Iterator[str]:
    """Yields the lines of a report as soon as they are known. The last line is the verdict.

    Writes the images into the folder ``out`` and overwrites no file. Raises ``UserError`` if a check fails.
    """
    sources = sources or Sources()
    yield f"wuerstchen {__version__}, Python {platform.python_version()}, {platform.platform()}"
    yield ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "safetensors", "numpy"))
    name = BUNDLED if model is None else model
    path = local_folder(name, revision=sources.revision, local_files_only=sources.local_files_only)
    yield f"{model or 'the bundled model'}: layout {layout_of(path)}"
    for file in weight_files(path, sources):
        with open(file, "rb") as opened:
            checksum = hashlib.file_digest(opened, "sha256").hexdigest()
        yield f"  {checksum}  {file.stat().st_size:>13,}  {file}"

    started = time.perf_counter()
    pipeline = load(path, device, precision=precision, low_memory=low_memory, sources=sources)
    precision = precision or default_precision(pipeline.device)
    yield f"loaded in {time.perf_counter() - started:.1f} s, {precision}, on {_device_name(pipeline.device)}"
    for part, network in pipeline.cascade.networks().items():
        yield f"  {part}: {sum(p.numel() for p in network.parameters()):,} parameters"
    if pipeline.cascade.prior is None:
        raise UserError(
            f"{path} has no Stage C (prior), so it cannot generate images. Use a model that has one."
        )
    is_bundled = path.resolve() == BUNDLED.resolve()
    drawn = []
    for seed, prompt in enumerate(BUNDLED_PROMPTS if is_bundled else PROMPTS):
        started = time.perf_counter()
        (image,) = pipeline.generate(prompt, seed=seed)
        seconds = time.perf_counter() - started
        settings = {"prompt": prompt, "seed": seed, "model": str(model or BUNDLED.name)}
        settings |= pipeline.settings_of(Sampling())
        file = save_new_png(image, out, f"doctor-{seed}", settings, is_generated=True)
        yield f"{file}: {image.width}x{image.height} in {seconds:.1f} s, {prompt!r}"
        drawn.append((file, image))
    if pipeline.device.type == "cuda":
        yield f"peak GPU memory: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
    yield _verdict(drawn, is_bundled)


def _verdict(drawn: Sequence[tuple[Path, Image.Image]], is_bundled: bool) -> str:
    """The verdict in words. Raises ``UserError`` for an image that shows that something is wrong."""
    for number, (path, image) in enumerate(drawn):
        darkest, brightest = (f(band[i] for band in image.getextrema()) for i, f in enumerate((min, max)))
        if brightest - darkest < 8:
            raise UserError(
                f"{path} has a single colour: the model overflowed, or its weights are wrong. Try "
                "--precision float32, and compare the checksums with the publisher's."
            )
        if is_bundled and (away := _difference(image, BUNDLED_IMAGES[number])) > MAX_DIFFERENCE:
            raise UserError(
                f"{path} differs from the reference image by {away:.0f} of 255 on average. Rounding explains "
                f"at most {MAX_DIFFERENCE}. Try --precision float32 or --device cpu, or install the package "
                "again."
            )
    if is_bundled:
        return "verdict: the bundled model works, and its images match the reference images"
    return (
        "verdict: the model loads and generates images with more than one colour. "
        "Look at the images to see whether they match their prompts"
    )


def _difference(image: Image.Image, reference: str) -> float:
    """The mean difference of an image from one of ``BUNDLED_IMAGES``, out of 255."""
    return float(np.abs(_thumbnail(image).astype(int) - list(bytes.fromhex(reference))).mean())


def _thumbnail(image: Image.Image) -> UInt8[np.ndarray, " 64"]:
    return np.asarray(image.convert("L").resize((8, 8), Image.Resampling.HAMMING)).ravel()


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"

"""Says whether a model works here: its files, the versions, three pictures and how long they took."""

import hashlib
import platform
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch

import wuerstchen
from wuerstchen.checkpoints.hub import local_folder
from wuerstchen.checkpoints.layouts import Sources, layout_of, weight_files
from wuerstchen.errors import UserError
from wuerstchen.images import save_png
from wuerstchen.pipeline import (
    BUNDLED,
    LowMemory,
    Precision,
    Sampling,
    Wuerstchen,
    default_precision,
    load,
)

PROMPTS = (
    "a 3D render of a purple camel on a blue background",
    "an astronaut riding a horse, oil painting",
    "a bowl of fruit on a wooden table, photograph",
)
"""Drawn with seeds 0, 1 and 2 in the model's own size and steps."""


def examine(
    model: str | Path | None,
    out: Path,
    *,
    device: str | None = None,
    precision: Precision | None = None,
    low_memory: LowMemory | None = None,
    sources: Sources | None = None,
) -> Iterator[str]:
    """Lines of a report, each as soon as it is known; the pictures go into ``out``.

    Raises ``UserError`` where something fails, which is the report's last line.
    """
    sources = sources or Sources()
    yield f"wuerstchen {wuerstchen.__version__}, Python {platform.python_version()}, {platform.platform()}"
    yield ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "safetensors", "numpy"))
    name = BUNDLED if model is None else model
    path = local_folder(name, revision=sources.revision, local_files_only=sources.local_files_only)
    yield f"{model or 'the model in the package'}: layout {layout_of(path)}"
    for file in weight_files(path, sources):
        with open(file, "rb") as opened:
            checksum = hashlib.file_digest(opened, "sha256").hexdigest()
        yield f"  {checksum}  {file.stat().st_size:>13,}  {file}"

    began = time.perf_counter()
    pipeline = load(path, device, precision=precision, low_memory=low_memory, sources=sources)
    precision = precision or default_precision(pipeline.device)
    yield f"loaded in {time.perf_counter() - began:.1f} s, {precision}, on {_device_name(pipeline.device)}"
    for part, network in pipeline.cascade.networks().items():
        yield f"  {part}: {sum(p.numel() for p in network.parameters()):,} parameters"
    if pipeline.cascade.prior is None:
        raise UserError(f"{path} has no Stage C, so it draws nothing; give one with prior")
    for seed, prompt in enumerate(PROMPTS):
        yield _drawn(pipeline, prompt, seed, out)
    if pipeline.device.type == "cuda":
        yield f"at most {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB of GPU memory"


def _drawn(pipeline: Wuerstchen, prompt: str, seed: int, out: Path) -> str:
    began = time.perf_counter()
    (image,) = pipeline.generate(prompt, seed=seed)
    seconds = time.perf_counter() - began
    path = out / f"doctor-{seed}.png"
    save_png(image, path, {"prompt": prompt, "seed": seed, **pipeline.settings_of(Sampling())})
    darkest, brightest = (f(band[i] for band in image.getextrema()) for i, f in enumerate((min, max)))
    if brightest - darkest < 8:
        raise UserError(
            f"{path} is one even colour: the model overflowed or its weights are wrong; try float32, and "
            "compare the checksums with the publisher's"
        )
    return f"{path}: {image.width}x{image.height} in {seconds:.1f} s, {prompt!r}"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"

"""The time of an image at the published v2 sizes on one GPU, compared with peers and with a lower bound.

    python benchmarks/sampling.py [--parts ours diffusers compiled floor] [--dtypes float16]
    python benchmarks/sampling.py --tiny          # tests the script with toy networks, also on a CPU

Weights are random and shared with diffusers' networks. An image takes the text encoders, 29 guided steps of
Stage C, 12 of Stage B, decoding, and the conversion to a PIL image. The parts:

ours            ``Wuerstchen.generate``, with a new model for each case
diffusers       its pipeline without changes
compiled        its pipeline with prior, decoder and vqgan.decode under torch.compile(mode="reduce-overhead",
                fullgraph=True), compiled again for each case, which takes minutes
sizes           ours in one process with many batch sizes and image sizes, for the first image of a new size
floor           the best library call for each matrix product, attention and convolution (``floor.py``)
profile         kernels of one of our images by group, and the time without kernels
sdxl            Stable Diffusion XL in diffusers: 50 guided Euler steps and its VAE in half precision, without
                the text encoders
sdxl-compiled   the same with channels last and compiled UNet and vae.decode

Compiler caches start empty unless --keep-caches is given. Seconds are medians. "First" counts from building
the model with weights on the GPU. The very first case also includes the time that CUDA takes to load kernels.
"Full speed" is the end of the first image within 5 % of the median. GiB are the peak of allocated memory, and
in brackets of reserved memory, which includes CUDA graphs. Failures are reported, and the benchmark
continues.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from floor import measure_floor
from measuring import free, matrix_rate, synchronise
from random_model import PROMPT, diffusers_draw, diffusers_pipeline, random_v2
from sdxl import drawn_by_sdxl, sdxl_networks

from wuerstchen.errors import UserError
from wuerstchen.models.cascade import Cascade
from wuerstchen.pipeline import Wuerstchen

PARTS = ("ours", "diffusers", "compiled", "sizes", "floor", "profile", "sdxl", "sdxl-compiled")
Draw = Callable[[int, Callable[[str], None] | None], object]
"""Draws with a seed. The second argument is called with the stage of each step."""


@dataclass(frozen=True)
class Case:
    dtype: str
    batch: int
    size: tuple[int, int]
    """Width and height."""

    def __str__(self) -> str:
        return f"{self.dtype}, {self.size[0]}×{self.size[1]}, batch {self.batch}"


def drawn_by_us(model: Wuerstchen, case: Case) -> Draw:
    def draw(seed: int, on_step: Callable[[str], None] | None = None) -> object:
        return model.generate(
            PROMPT,
            seed=seed * case.batch,
            count=case.batch,
            batch_size=case.batch,
            size=case.size,
            progress=None if on_step is None else lambda stage, *_: on_step(stage),
        )

    return draw


def drawn_by_diffusers(cascade: Cascade, case: Case, compiled: dict[str, Any] | None) -> Draw:
    """``compiled`` are the arguments of ``torch.compile``."""
    pipe = diffusers_pipeline(cascade)
    if compiled is not None:
        # Compile in place: the pipeline and its sub-pipelines share modules.
        pipe.prior_pipe.prior.compile(**compiled)
        pipe.decoder_pipe.decoder.compile(**compiled)
        vqgan = pipe.decoder_pipe.vqgan
        vqgan.decode = torch.compile(vqgan.decode, **compiled)
    return lambda seed, on_step=None: diffusers_draw(pipe, seed, case.size, case.batch, on_step)


def measure(make: Callable[[], Draw], device: torch.device, options: argparse.Namespace) -> dict | None:
    """Times drawing. Returns None if it does not fit into memory."""
    free()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    synchronise(device)
    ends = [time.perf_counter()]
    try:
        draw = make()
        timed = 0
        while timed < options.images or (timed < 20 and ends[-1] - ends[-1 - timed] < options.seconds):
            draw(len(ends), None)
            synchronise(device)
            ends.append(time.perf_counter())
            timed = max(len(ends) - 1 - options.warm, 0)
        stages = stage_milliseconds(draw, device)
    except torch.OutOfMemoryError:
        return None
    except UserError as error:
        if isinstance(error.__cause__, torch.OutOfMemoryError):
            return None
        raise
    took = [end - begin for begin, end in itertools.pairwise(ends)]
    median = statistics.median(took[-timed:])
    full = next(i for i, seconds in enumerate(took) if seconds <= 1.05 * median)
    row = {
        "seconds": median,
        "fastest": min(took[-timed:]),
        "slowest": max(took[-timed:]),
        "first": took[0],
        "full_speed": ends[full + 1] - ends[0],
        "stages_ms": stages,
    }
    if device.type == "cuda":
        row["gib"] = torch.cuda.max_memory_allocated() / 2**30
        row["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    return row


def stage_milliseconds(draw: Draw, device: torch.device) -> dict[str, float]:
    """Times of one more image with a synchronisation at each step: a step of each stage, before, and after.

    The time before a stage includes its text encoder. A step is the median of all but the first.
    """
    marks: list[tuple[str, float]] = []

    def mark(stage: str) -> None:
        synchronise(device)
        marks.append((stage, time.perf_counter()))

    synchronise(device)
    last = began = time.perf_counter()
    draw(0, mark)
    mark("end")
    result: dict[str, float] = {}
    for name in dict.fromkeys(stage for stage, _ in marks[:-1]):
        ends = [end for stage, end in marks if stage == name]
        steps = [b - a for a, b in itertools.pairwise(ends)]
        step = statistics.median(steps) if steps else ends[0] - last
        result[f"before {name}"] = 1000 * (ends[0] - last - step)
        result[f"step of {name}"] = 1000 * step
        last = ends[-1]
    result["after"] = 1000 * (marks[-1][1] - last)
    result["all"] = 1000 * (marks[-1][1] - began)
    return result


ATTENTION = re.compile(r"flash|fmha|attention|sdpa|^_attend$", re.IGNORECASE)
CONVOLUTION = re.compile(r"conv|fprop|dgrad|implicit|nchwToNhwc|nhwcToNchw", re.IGNORECASE)
PRODUCT = re.compile(r"gemm|gemv|nvjet|cutlass|cublas|splitk|addmm|aten::mm\b|aten::bmm\b", re.IGNORECASE)
COPY = re.compile(r"memcpy|memset|copy|cat(array|_)|aten::(cat|_to_copy|clone)", re.IGNORECASE)


def kernel_group(name: str) -> str:
    """The group of a kernel by its name. Matrix products inside convolutions count as convolutions."""
    if name.startswith("triton_"):  # from torch.compile, named after all the operations fused into them
        return "matrix products" if name.startswith("triton_tem") else "norms and elementwise"
    for group, pattern in (
        ("attention", ATTENTION),
        ("convolutions", CONVOLUTION),
        ("matrix products", PRODUCT),
        ("copies", COPY),
    ):
        if pattern.search(name):
            return group
    return "norms and elementwise"


def profile(draw: Draw, device: torch.device, warm: int) -> dict[str, Any]:
    """Milliseconds of kernels by group. ``gaps`` is the rest of the time of an image without the profiler."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    for seed in range(warm):
        draw(seed, None)
    walls = []
    for seed in range(3):
        synchronise(device)
        began = time.perf_counter()
        draw(seed, None)
        synchronise(device)
        walls.append(1000 * (time.perf_counter() - began))
    on_gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], acc_events=True) as profiler:
        draw(0, None)
        synchronise(device)
    kernels: dict[str, tuple[float, int]] = {}
    for event in profiler.key_averages():
        if event.device_type == (DeviceType.CUDA if on_gpu else DeviceType.CPU):
            took = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            before = kernels.get(event.key, (0.0, 0))
            kernels[event.key] = before[0] + took / 1000, before[1] + event.count
    groups: dict[str, float] = {}
    for name, (took, _) in kernels.items():
        groups[kernel_group(name)] = groups.get(kernel_group(name), 0.0) + took
    wall, busy = statistics.median(walls), sum(groups.values())
    print(f"  wall {wall:.1f} ms, kernels {busy:.1f} ms ({sum(n for _, n in kernels.values())} of them)")
    for name, took in sorted(groups.items(), key=lambda item: -item[1]):
        print(f"  {name:<24} {took:9.2f} ms")
    print(f"  {'gaps':<24} {wall - busy:9.2f} ms")
    for name, (took, count) in sorted(kernels.items(), key=lambda item: -item[1][0])[:30]:
        print(f"    {took:9.2f} ms {count:6} × {kernel_group(name):<22} {name[:110]}", flush=True)
    return {"wall_ms": wall, "kernels_ms": busy, "gaps_ms": wall - busy, **groups}


def print_row(name: str, case: Case, row: dict[str, Any]) -> None:
    memory = f" {row['gib']:6.2f} ({row['reserved_gib']:.2f}) GiB" if "gib" in row else ""
    print(
        f"{name:<66} {row['seconds']:8.4f} s ({row['fastest']:.4f} to {row['slowest']:.4f}) "
        f"{case.batch / row['seconds']:7.2f} img/s{memory}, first {row['first']:.2f} s, "
        f"full speed {row['full_speed']:.2f} s"
    )
    stages = ", ".join(f"{stage} {ms:.2f}" for stage, ms in row["stages_ms"].items())
    print(f"  stopping at each step, ms: {stages}", flush=True)


def print_floor(case: Case, floor: dict[str, dict[str, float]]) -> None:
    print(f"floor, {case} (the sum excludes depthwise convolutions)")
    for name, part in floor.items():
        kinds = ", ".join(f"{kind} {part[kind]:.2f}" for kind in part if kind not in ("tflop", "ms"))
        rate = part["tflop"] / max(part["ms"], 1e-9) * 1000
        print(f"  {name:<24} {part['ms']:9.2f} ms {part['tflop']:8.3f} TFLOP, {rate:4.0f} TFLOP/s ({kinds})")


def ratios(rows: dict[str, Any], floors: dict[str, Any], cases: list[Case]) -> dict[str, float]:
    """The time of each peer divided by ours, and ours divided by the floor."""
    found = {}
    for case in cases:
        ours = rows.get(f"wuerstchen, {case}")
        if ours is None:
            continue
        for name, row in rows.items():
            if name.endswith(f", {case}") and not name.startswith("wuerstchen"):
                found[f"{name} / wuerstchen"] = row["seconds"] / ours["seconds"]
        if str(case) in floors:
            floor = floors[str(case)]["image"]["ms"] / 1000
            found[f"wuerstchen / floor, {case}"] = ours["seconds"] / floor
    return found


def parsed_size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return int(width), int(height or width)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--dtypes", nargs="+", choices=["float16", "bfloat16"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="for the part sizes")
    parser.add_argument("--sizes", type=parsed_size, nargs="+", help="for the part sizes: WIDTHxHEIGHT")
    parser.add_argument("--peer-batches", type=int, nargs="+", default=[1], help="for all other parts")
    parser.add_argument("--peer-sizes", type=parsed_size, nargs="+", help="for all other parts")
    parser.add_argument("--images", "--pictures", type=int, default=3, help="images to time, at least")
    parser.add_argument("--seconds", type=float, default=4.0, help="seconds of timing, at least")
    parser.add_argument(
        "--warm", type=int, default=3, help="images before timing, in which compiled peers record"
    )
    parser.add_argument("--keep-caches", action="store_true", help="keep compiler caches of earlier runs")
    parser.add_argument("--json", type=Path, help="output file, updated after each row")
    parser.add_argument("--tiny", action="store_true", help="use toy networks, to test the script")
    options = parser.parse_args()
    if options.sizes is None:
        options.sizes = (
            [(128, 128), (128, 256)] if options.tiny else [(1024, 1024), (1024, 1536), (1536, 1536)]
        )
    # CPUs are slow in float16.
    options.dtypes = options.dtypes or (["bfloat16"] if options.tiny else ["float16", "bfloat16"])
    options.peer_sizes = options.peer_sizes or options.sizes[:1]
    if options.tiny:
        options.batches, options.seconds, options.warm = options.batches[:2], 0.0, 1
    return options


class Findings:
    """All results. They are written to the file after each row, in case the rest takes too long."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.options, self.device = options, device
        self.rows: dict[str, Any] = {}
        self.floors: dict[str, Any] = {}
        self.profiles: dict[str, Any] = {}
        self.rates: dict[str, float] = {}
        self.failed: list[str] = []
        self.cases: list[Case] = []
        gpu = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        versions = {name: version(name) for name in ("torch", "diffusers", "transformers")}
        self.machine = {"gpu": gpu, **versions}
        print(f"{gpu}, {versions}", flush=True)

    def keep(self) -> dict[str, Any]:
        found = {
            **self.machine,
            "matrix_rate": self.rates,
            "rows": self.rows,
            "ratios": ratios(self.rows, self.floors, self.cases),
            "floors": self.floors,
            "profiles": self.profiles,
            "failed": self.failed,
        }
        if self.options.json is not None:
            self.options.json.write_text(json.dumps(found) + "\n", encoding="utf-8")
        return found

    @contextlib.contextmanager
    def surviving(self, name: str) -> Iterator[None]:
        """Reports a failure and continues."""
        try:
            yield
        except Exception:
            traceback.print_exc()
            print(f"{name:<66} failed", flush=True)
            self.failed.append(name)

    def row(self, who: str, case: Case, make: Callable[[], Draw]) -> None:
        name = f"{who}, {case}"
        with self.surviving(name):
            found = measure(make, self.device, self.options)
            if found is None:
                print(f"{name:<66} does not fit", flush=True)
                return
            self.rows[name] = found
            print_row(name, case, found)
            self.keep()
        if who.endswith("compiled"):
            torch._dynamo.reset()  # releases its graphs and their memory


def measure_wuerstchen(
    findings: Findings, cascade: Cascade, dtype: str, cases: list[Case], compiled: dict[str, Any]
) -> None:
    """Measures all parts that use Würstchen, in one precision."""
    options, device = findings.options, findings.device
    torch_dtype = getattr(torch, dtype)
    for network in cascade.networks().values():
        network.to(torch_dtype)
    for case in cases:
        if "ours" in options.parts:
            findings.row("wuerstchen", case, lambda c=case: drawn_by_us(Wuerstchen(cascade, device), c))
        if "diffusers" in options.parts:
            findings.row("diffusers", case, lambda c=case: drawn_by_diffusers(cascade, c, None))
        if "floor" in options.parts:
            with findings.surviving(f"floor, {case}"):
                floor = measure_floor(cascade, device, torch_dtype, case.batch, case.size)
                findings.floors[str(case)] = floor
                print_floor(case, floor)
    if "sizes" in options.parts:
        model = Wuerstchen(cascade, device)
        small = [Case(dtype, batch, options.sizes[0]) for batch in options.batches]
        for case in (*small, *(Case(dtype, 1, size) for size in options.sizes[1:])):
            findings.row("wuerstchen, one process", case, lambda c=case, m=model: drawn_by_us(m, c))
        model = None
    if "profile" in options.parts:
        print(f"profile, {cases[0]}", flush=True)
        with findings.surviving(f"profile, {cases[0]}"):
            draw = drawn_by_us(Wuerstchen(cascade, device), cases[0])
            findings.profiles[str(cases[0])] = profile(draw, device, options.warm)
        draw = None
    if "compiled" in options.parts:
        for case in cases:
            findings.row("diffusers, compiled", case, lambda c=case: drawn_by_diffusers(cascade, c, compiled))


def measure_sdxl(findings: Findings, compiled: dict[str, Any]) -> None:
    options = findings.options
    for part, name, how in (("sdxl", "SDXL", None), ("sdxl-compiled", "SDXL, compiled", compiled)):
        for case in findings.cases if part in options.parts else []:
            networks = sdxl_networks(findings.device, getattr(torch, case.dtype), options.tiny)
            findings.row(name, case, lambda c=case, n=networks, h=how: drawn_by_sdxl(n, c.size, c.batch, h))
            networks = None
            free()


def main() -> None:
    options = arguments()
    if not options.keep_caches:
        folder = tempfile.TemporaryDirectory()
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder.name}/inductor"
        os.environ["TRITON_CACHE_DIR"] = f"{folder.name}/triton"
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    compiled: dict[str, Any] = {"fullgraph": True}
    compiled |= {"mode": "reduce-overhead"} if on_gpu else {"backend": "eager"}
    findings = Findings(options, device)
    cascade: Cascade | None = None
    if set(options.parts) - {"sdxl", "sdxl-compiled"}:
        cascade = random_v2(device, tiny=options.tiny)
    side = 128 if options.tiny else 8192
    for dtype in options.dtypes:
        rate = findings.rates[dtype] = matrix_rate(device, getattr(torch, dtype), side)
        print(f"matrix product of {side}³ in {dtype}: {rate / 1e12:.0f} TFLOP/s", flush=True)
        cases = [Case(dtype, b, s) for s in options.peer_sizes for b in options.peer_batches]
        findings.cases += cases
        if cascade is not None:
            measure_wuerstchen(findings, cascade, dtype, cases, compiled)
    cascade = None
    measure_sdxl(findings, compiled)

    found = findings.keep()
    for name, ratio in found["ratios"].items():
        print(f"{ratio:6.2f} = {name}")
    print(json.dumps(found))
    sys.exit(1 if findings.failed else 0)


if __name__ == "__main__":
    main()

"""GPU memory and speed of fine-tuning the published Stage C at 1024 pixels, fully or with an adapter.

    python benchmarks/finetune_memory.py --table [--kinds full lora]
    python benchmarks/finetune_memory.py --kinds full --memory low lowest --batches 4 8 --card-gb 24

Weights and images are random. Stages and their updates are those of a run of the recipes `v2-finetune` and
`v2-lora`, with everything that such a run keeps on the GPU. The process is limited to the memory of a card of
--card-gb, less 0.7 GB for the CUDA context. --table measures the rows of the guide, each with its own card.

Prints a JSON line per row: memory in GiB before the first image (`before`), at the peak of updates, and at
the peak including a preview of two prompts, drawn with less memory if needed; milliseconds of an update on
given inputs, of computing the inputs, and of a step of the average; and images per second of all three, with
a step of the average every --ema-every updates.
"""

import argparse
import contextlib
import copy
import dataclasses
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from measuring import free, synchronise
from random_model import random_v2

from wuerstchen.errors import UserError
from wuerstchen.models.cascade import PUBLISHED_STATISTICS, Cascade
from wuerstchen.models.compressor import Compressor, CompressorConfig
from wuerstchen.recipes.lora import v2_lora
from wuerstchen.recipes.v2 import v2_finetune
from wuerstchen.train.config import Recipe
from wuerstchen.train.engine.distributed import Processes
from wuerstchen.train.engine.ema import on_device
from wuerstchen.train.engine.job import Settings, StageJob
from wuerstchen.train.engine.state import make_state, make_step
from wuerstchen.train.engine.update import StepRunner
from wuerstchen.train.feed.images import Batch
from wuerstchen.train.initial_weights import InitialWeights, Parts
from wuerstchen.train.report.events import Log
from wuerstchen.train.stages.base import Stage, autocast, inputs_of
from wuerstchen.train.stages.lora import LORA_STAGE
from wuerstchen.train.stages.prior import PRIOR_STAGE

CONTEXT = 0.7e9  # bytes of the CUDA context, which torch does not count
WARM = 5  # updates before measuring: three eager, one recorded, one replayed


@dataclass(frozen=True)
class Row:
    """What to measure."""

    kind: str
    memory: str
    batch: int
    recompute: bool
    card_gb: float


TABLE = (
    Row("full", "normal", 4, False, 80),
    Row("full", "low", 4, False, 24),
    Row("full", "lowest", 4, False, 24),
    Row("full", "low", 4, True, 24),
    Row("full", "low", 4, True, 16),
    Row("full", "lowest", 4, False, 16),
    Row("full", "lowest", 4, True, 16),
    Row("full", "lowest", 4, True, 12),
    Row("lora", "normal", 4, False, 8),
    Row("lora", "normal", 2, True, 6),
    Row("lora int8", "normal", 2, True, 4),
    Row("lora int8", "normal", 1, True, 4),
)


class _Ready(Exception):
    """The stage is about to be trained."""


class StageOnly:
    """A run that only sets up a stage."""

    makes_updates = True
    statistics = PUBLISHED_STATISTICS
    ended_at: ClassVar[dict[str, int]] = {}

    def __init__(self, recipe: Recipe, cascade: Cascade, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.start = InitialWeights(settings=cascade.settings, parts=Parts(**cascade.networks()))
        self.parts = Parts(**cascade.networks())
        self.results: dict[str, Any] = {}
        self.stage: Stage | None = None

    def seed_weights(self, name: str) -> None:
        torch.manual_seed(0)

    def source(self, phase: object) -> Any:
        return SimpleNamespace()

    def is_new(self, name: str) -> bool:
        return True

    def measured_source(self) -> Any:
        raise NotImplementedError

    def some_images(self, purpose: str, size: int) -> Iterator[Batch]:
        raise NotImplementedError

    def tensors_once(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    def measured_once(self, folder: str, measure: object, known: dict[str, Any]) -> dict[str, Any]:
        return known

    def settings_of_model(self, image_size: int | None = None) -> Any:
        return self.start.settings

    def train_phase(self, stage: Stage, phase: object, *, multiple: int = 1) -> Any:
        self.stage = stage
        raise _Ready


def stage_of(recipe: Recipe, cascade: Cascade, device: torch.device) -> Stage:
    """The stage as a run sets it up."""
    run = StageOnly(recipe, cascade, device)
    kind = LORA_STAGE if recipe.trains("lora") else PRIOR_STAGE
    with contextlib.suppress(_Ready):
        kind.train(run)
    assert run.stage is not None
    return run.stage


def recipe_of(row: Row, cascade: Cascade, device: torch.device, ema_every: int) -> Recipe:
    base = v2_finetune() if row.kind == "full" else v2_lora()
    name = "stage_c" if row.kind == "full" else "stage_lora"
    config = getattr(base, name)
    lengths = {"batch_size": row.batch, "ema_every": ema_every if row.memory != "normal" else 1}
    changes: dict[str, Any] = {"optimization": dataclasses.replace(config.optimization, **lengths)}
    if row.kind == "lora int8":
        changes["base_weights"] = "int8"
    recorded = "compile" if row.memory == "lowest" or row.recompute else "graph"
    assert cascade.prior is not None
    return dataclasses.replace(
        base,
        **{name: dataclasses.replace(config, **changes)},
        prior=cascade.prior.config,
        precision="bf16",
        memory=row.memory,
        recompute="blocks" if row.recompute else "none",
        acceleration=recorded if device.type == "cuda" else "none",
        preview_prompts=("a cat", "a tree"),
        # An adapter computes its inputs once, at the start, and the encoders leave the GPU.
        prepared_images=0 if row.kind == "full" else 20,
        prior_steps=3,
        decoder_steps=2,
    )


def job_of(recipe: Recipe, stage: Stage, device: torch.device, folder: Path) -> StageJob:
    settings = Settings(
        seed=0,
        autocast=torch.bfloat16,
        compiles=recipe.acceleration != "none",
        records=recipe.acceleration == "graph",
        recomputes=recipe.recompute == "blocks",
        memory=recipe.memory,
        workers=0,
        checkpoint_seconds=1e9,
        log_every=1,
        preview_every=0,
        preview_size=recipe.image_size,
        previews=2,
    )
    feed: Any = None
    return StageJob(
        stage=stage,
        feed=feed,
        folder=folder,
        settings=settings,
        processes=Processes(device),
        log=Log(folder / "log.jsonl", writes=False),
    )


def measure(row: Row, cascade: Cascade, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Memory and speed of a row."""
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    recipe = recipe_of(row, cascade, device, options.ema_every)
    size = cascade.settings.image_size
    with tempfile.TemporaryDirectory() as folder:
        # Adapters convert the frozen networks to half precision.
        own = cascade if row.kind == "full" else copy.deepcopy(cascade)
        stage = stage_of(recipe, own, device)
        job = job_of(recipe, stage, device, Path(folder))
        state = make_state(job)
        step = make_step(job, state)
    found: dict[str, Any] = dataclasses.asdict(row) | {"acceleration": recipe.acceleration}
    found["before"] = _allocated()
    optimizers = state.optimizers.values()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"].fill_(1e-5)
    numbers = itertools.count()

    def inputs() -> Any:
        indices = torch.arange(row.batch) + row.batch * next(numbers)
        images = torch.randint(0, 256, (row.batch, size, size, 3), dtype=torch.uint8)
        batch = Batch(indices, images, [f"image {i}" for i in indices.tolist()], [])
        with torch.no_grad(), autocast(device, torch.bfloat16):
            return inputs_of(stage, batch, device), indices.to(device)

    update = StepRunner(step, job.settings.records)
    step.decay = None
    given = inputs()
    for _ in range(WARM):
        given = inputs() if row.kind == "full" else given
        update(*given)
    found["peak of updates"], found["reserved"] = _peak(), _peak(reserved=True)
    times = {"update": _milliseconds(lambda: update(*given), device, options.updates)}
    times["inputs"] = _milliseconds(inputs, device, 3) if row.kind == "full" else 0.0
    step.decay = 0.999
    times["average"] = _milliseconds(step.average, device, 3)
    found["ms"] = times
    every = options.ema_every if row.memory != "normal" else 1
    total = times["update"] + times["inputs"] + times["average"] / every
    found["images_per_second"] = round(1000 * row.batch / total, 2)
    with on_device(state.averages.values(), device):
        pass  # what validation moves there
    _draw(stage, state.averages, device, found)
    found["peak with a preview"], found["reserved with a preview"] = _peak(), _peak(reserved=True)
    update.close()
    return found


def _draw(stage: Stage, averages: Any, device: torch.device, found: dict[str, Any]) -> None:
    """A preview, as a run draws it (``train/engine/observe.py``)."""
    found["preview"] = "as usual"
    try:
        with on_device(averages.values(), device), torch.no_grad():
            stage.preview(averages, torch.empty(0), device)
    except (torch.OutOfMemoryError, UserError):
        found["preview"] = "with less memory"
    if found["preview"] != "as usual":
        free()
        with torch.no_grad():
            stage.preview(averages, torch.empty(0), device, low_memory=True)


def _milliseconds(call: Callable[[], object], device: torch.device, times: int) -> float:
    """The median duration of a call."""
    found = []
    for _ in range(times):
        synchronise(device)
        began = time.perf_counter()
        call()
        synchronise(device)
        found.append(1000 * (time.perf_counter() - began))
    return round(statistics.median(found), 1)


def _allocated() -> float | None:
    return round(torch.cuda.memory_allocated() / 2**30, 2) if torch.cuda.is_available() else None


def _peak(reserved: bool = False) -> float | None:
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    most = torch.cuda.max_memory_reserved() if reserved else torch.cuda.max_memory_allocated()
    return round(most / 2**30, 2)


def rows_of(options: argparse.Namespace) -> Iterator[Row]:
    if options.table:
        yield from (row for row in TABLE if row.kind in options.kinds)
        return
    for kind, memory, batch in itertools.product(options.kinds, options.memory, options.batches):
        if kind == "full" or memory == "normal":  # adapters have no other choice
            yield Row(kind, memory, batch, options.recompute, options.card_gb)


def make_cascade(device: torch.device, *, tiny: bool) -> Cascade:
    """The published model with random weights and a compressor, in host memory."""
    cascade = random_v2(device, tiny=tiny)  # a GPU draws three billion numbers faster
    backbone = "efficientnet_lite0" if tiny else "efficientnet_v2_s"
    compressor = Compressor(CompressorConfig(backbone=backbone)).eval()
    settings = dataclasses.replace(
        cascade.settings,
        prior_steps=3,
        decoder_steps=2,
        image_size=128 if tiny else 1024,
        latent_statistics=PUBLISHED_STATISTICS,
    )
    cascade = dataclasses.replace(cascade, compressor=compressor, settings=settings)
    for network in cascade.networks().values():
        network.to("cpu")
    free()
    return cascade


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", action="store_true", help="measure the rows of the guide")
    kinds = ["full", "lora", "lora int8"]
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--memory", nargs="+", choices=["normal", "low", "lowest"], default=["normal"])
    parser.add_argument("--batches", type=int, nargs="+", default=[64])
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--card-gb", type=float, default=80.0)
    parser.add_argument("--updates", type=int, default=10, help="updates to time")
    parser.add_argument("--ema-every", type=int, default=10, help="with less memory than normal")
    parser.add_argument(
        "--tiny", action="store_true", help="use small networks and images, to test this script"
    )
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cascade = make_cascade(device, tiny=options.tiny)
    for row in rows_of(options):
        if device.type == "cuda":
            whole = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, (row.card_gb * 1e9 - CONTEXT) / whole))
        try:
            found = measure(row, cascade, device, options)
        except (torch.OutOfMemoryError, UserError) as error:
            found = {**dataclasses.asdict(row), "failed": str(error)[:200]}
        print(json.dumps(found), flush=True)
        free()


if __name__ == "__main__":
    main()

"""The process that owns a device: it loads the model, generates batches, and reports their progress.

Messages go through a pipe, as tuples that start with a word. To the worker: ``generate`` with an
``ImageBatch``; ``unwanted`` with a batch's number and the positions of images in it. From the worker:
``ready`` with the model's capabilities, or ``load_error`` with the reason; for a batch, with its number:
``notice``, ``step``, ``preview`` and ``image``, then ``done``, ``stopped`` or ``failed``; and ``heartbeat``
at all times. When the pipe closes, the worker exits.

The service imports this module for its messages, so it must not import torch.
"""

import base64
import io
import math
import os
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from wuerstchen.checkpoints.layout_table import Sources
from wuerstchen.errors import UserError
from wuerstchen.serve.heartbeat import HeartbeatConnection
from wuerstchen.serve.jobs import Shape
from wuerstchen.serve.worker_adapters import WorkerAdapters

if TYPE_CHECKING:
    from wuerstchen.diffusion.objective import Objective
    from wuerstchen.models.cascade import Cascade
    from wuerstchen.pipeline import Wuerstchen
    from wuerstchen.progress import Step
    from wuerstchen.sampling import Sampling

PREVIEW_FRACTION = 0.08
"""Largest fraction of a batch's time that previews may take."""
PREVIEW_SECONDS = 0.15
"""Shortest time between two previews."""
STEP_SECONDS = 0.03
"""Shortest time between two reported steps. Each report sends an event to all jobs of a batch."""
STAGE_C_FRACTION = 0.6
"""Stage C's part of the progress bar. Stage B has nearly all of the rest."""


@dataclass(frozen=True)
class WorkerSettings:
    """The options of a worker."""

    model: str | None
    device: str | None
    precision: str | None
    sources: Sources = field(default_factory=Sources)
    low_memory: str | None = None
    loras: tuple[str, ...] = ()
    """Adapters of all images, as ``FILE`` or ``FILE:SCALE``."""
    lora_dir: Path | None = None
    """The folder of the adapters that batches name."""


@dataclass(frozen=True)
class ImageBatch:
    """Images of one shape to generate together. ``images``: RGB bytes of the init images, or None. ``masks``:
    grey bytes of their masks, or None."""

    number: int
    shape: Shape
    fill: int | None
    """Pad the batch to this size with images that are thrown away."""
    prompts: list[str]
    negatives: list[str]
    seeds: list[int]
    images: list[bytes] | None
    masks: list[bytes] | None
    previews: list[int]
    """Positions of the images that need previews."""


class _Stopped(Exception):
    """All images of the batch are unwanted."""


def main(settings: WorkerSettings, pipe: Connection) -> None:
    """Runs until the pipe closes, which happens at the latest when the service exits."""
    connection = HeartbeatConnection(pipe)
    # The service decides when to stop. Ctrl-C in a terminal reaches all processes.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        worker = _Worker(settings, connection)
    except UserError as error:
        connection.send(("load_error", str(error)))
        return
    try:
        connection.send(("ready", worker.about()))
        while True:
            message = connection.recv()
            if message[0] == "generate":
                worker.generate(message[1])
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the service is gone


class _Worker:
    def __init__(self, settings: WorkerSettings, connection: HeartbeatConnection) -> None:
        import torch

        from wuerstchen.pipeline import Sampling, load

        if settings.precision == "float32":
            # TF32 would make results depend on the batch size, because each size has its own kernels.
            torch.backends.cudnn.allow_tf32 = False
        precision: Any = settings.precision
        self.settings = settings
        self.connection = connection
        low_memory: Any = settings.low_memory
        self.model: Wuerstchen = load(
            settings.model,
            settings.device,
            precision=precision,
            low_memory=low_memory,
            sources=settings.sources,
        )
        self.adapters = WorkerAdapters(self.model, settings.loras, settings.lora_dir)
        self.adapters.use(None, 1.0)
        self._joules = _energy_counter(self.model)
        self._reading: float | None = None
        self._read_at = -math.inf
        if self.model.cascade.prior is not None and self.model.cascade.text_encoder is not None:
            # Warm up: the first image takes longer.
            self.model.generate("", sampling=Sampling(prior_steps=1, decoder_steps=1))
            if self.model.cascade.students != Sampling():
                self.model.generate("")

    def about(self) -> dict[str, Any]:
        """The worker's part of ``GET /v1/model``."""
        from wuerstchen import doctor
        from wuerstchen.checkpoints.hub import PHOTO_NOTE, is_bundled
        from wuerstchen.models.cascade import MAX_SIDES, MIN_SIDE, SIDE_STEP
        from wuerstchen.recipes.mini import PROMPTS
        from wuerstchen.sampling import OF_PRIOR, Sampling

        cascade = self.model.cascade
        side = cascade.settings.image_size
        generates = cascade.prior is not None and cascade.text_encoder is not None
        encodes = cascade.compressor is not None
        bundled = is_bundled(self.settings.model)
        beyond, students = [], _served(cascade, cascade.students)
        if self.adapters.always:
            beyond = ["a LoRA adapter"]
            students = {name: value for name, value in students.items() if name not in OF_PRIOR}
        decoder_samplers: list[str] = []
        if cascade.decoder_student is not None:
            decoder_samplers = _samplers(cascade.settings.decoder_objective, True)
        return {
            "device": _device_name(self.model),
            "side": side,
            "multiple": SIDE_STEP,
            "min": MIN_SIDE,
            "max_side": min(4, MAX_SIDES) * side,
            "defaults": _served(cascade, cascade.completed(Sampling(), beyond)),
            "full": _served(cascade, cascade.completed(Sampling(full=True))),
            "students": students,
            "samplers": _samplers(cascade.settings.prior_objective, "prior_sampler" in students),
            "decoder_samplers": decoder_samplers,
            "can": {
                "generate": generates,
                "reconstruct": encodes,
                "variation": generates and encodes,
                "preview": cascade.previewer is not None and self.model.low_memory is None,
            },
            "examples": list(PROMPTS if bundled else doctor.PROMPTS),
            "image_note": PHOTO_NOTE if bundled else None,
        }

    def joules(self, max_age: float = 0.0) -> float | None:
        """Energy that the GPU has used so far. Reuses a reading of up to ``max_age`` seconds: one takes
        milliseconds."""
        if time.perf_counter() - self._read_at > max_age:
            self._reading, self._read_at = self._joules(), time.perf_counter()
        return self._reading

    def generate(self, batch: ImageBatch) -> None:
        generation = _Generation(self, batch)
        try:
            images = generation.run()
        except _Stopped:
            self.connection.send(("stopped", batch.number))
        except UserError as error:
            self.connection.send(("failed", batch.number, str(error), "invalid_request_error"))
        except Exception as error:  # whatever it is, the next batch may work
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            self.connection.send(("failed", batch.number, f"Generation failed: {reason}", "server_error"))
        else:
            for place, image in enumerate(images):
                if place not in generation.unwanted:
                    self.connection.send(("image", batch.number, place, *image.size, image.tobytes()))
            self.connection.send(("done", batch.number, generation.measured()))


class _Generation:
    """One batch that is being generated."""

    def __init__(self, worker: _Worker, batch: ImageBatch) -> None:
        self.worker = worker
        self.model = worker.model
        self.connection = worker.connection
        self.batch = batch
        self.unwanted: set[int] = set()
        self.started = self.marked = time.perf_counter()
        self.joules = worker.joules(max_age=0.05)  # the reading after the last batch is recent enough
        self.seconds: dict[str, float] = {}
        self.preview_seconds = 0.0
        self.previewed = self.reported = -PREVIEW_SECONDS
        self.cost: dict[str, float] = {}
        """Seconds that the last preview took, by stage."""

    def run(self) -> list[Image.Image]:
        from wuerstchen.sampling import Sampling

        batch, shape = self.batch, self.batch.shape
        own = len(batch.seeds)
        fill = batch.fill or 0
        if self.model.device.type == "cuda":
            # CUDA graphs are recorded per batch size. Use few sizes, so that there are few recordings.
            fill = max(fill, 1 << (own - 1).bit_length())
        padding = max(0, fill - own)
        seeds = batch.seeds + [0] * padding
        size = (shape.width, shape.height)
        images = None
        if batch.images is not None:
            images = [Image.frombytes("RGB", size, data) for data in batch.images]
            images += [Image.new("RGB", size)] * padding
        masks = None
        if batch.masks is not None:
            masks = [Image.frombytes("L", size, data) for data in batch.masks]
            masks += masks[:1] * padding
        sampling: Sampling = Sampling(
            guidance=shape.guidance,
            guidance_interval=shape.guidance_interval,
            prior_steps=shape.prior_steps,
            prior_sampler=shape.prior_sampler,  # pyrefly: ignore
            decoder_steps=shape.decoder_steps,
            decoder_sampler=shape.decoder_sampler or None,
        )
        if shape.kind == "reconstruct":
            assert images is not None
            results = self.model.reconstruct_batch(
                images, seeds=seeds, size=shape.width, sampling=sampling, on_step=self.on_step
            )
            generated = [result.image for result in results]
        else:
            for notice in self.worker.adapters.use(shape.lora, shape.lora_strength):
                for place in range(own):
                    self.connection.send(("notice", batch.number, place, notice))
            self.report_lost_words()
            generated = self.model.generate(
                batch.prompts + [""] * padding,
                negative=batch.negatives + [""] * padding,
                seed=seeds,
                size=size,
                init=images,
                mask=masks,
                strength=shape.strength or 1.0,
                sampling=sampling,
                batch_size=len(seeds),
                on_step=self.on_step,
            )
        self.mark("Stage A")
        return generated[:own]

    def report_lost_words(self) -> None:
        """Sends a notice for each text that the text encoder truncates."""
        encoder = self.model.cascade.text_encoder
        assert encoder is not None
        for place, texts in enumerate(zip(self.batch.prompts, self.batch.negatives, strict=True)):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for text in texts:
                    encoder.tokens(text)
            for warning in caught:
                self.connection.send(("notice", self.batch.number, place, str(warning.message)))

    def on_step(self, step: "Step") -> None:
        while self.connection.poll():
            message = self.connection.recv()
            if message[0] == "unwanted" and message[1] == self.batch.number:
                self.unwanted.update(message[2])
        if len(self.unwanted) == len(self.batch.seeds):
            raise _Stopped
        if step.step == step.steps:
            self.mark(step.stage)
        now = time.perf_counter()
        if now - self.reported >= STEP_SECONDS:
            self.reported = now
            self.report(step)
        if step.stage == "Stage C" or step.step < step.steps:
            self.preview(step)

    def report(self, step: "Step") -> None:
        stage_c = STAGE_C_FRACTION if self.batch.shape.kind == "generate" else 0.0
        done = step.step / step.steps
        fraction = stage_c * done if step.stage == "Stage C" else stage_c + (0.98 - stage_c) * done
        self.connection.send(("step", self.batch.number, step.stage, step.step, step.steps, fraction))

    def preview(self, step: "Step") -> None:
        """Sends previews if some are wanted and there is time for them. The first one is sent at once."""
        wanted = [place for place in self.batch.previews if place not in self.unwanted]
        now = time.perf_counter()
        expected = self.preview_seconds + self.cost.get(step.stage, 0.0)
        first = step.stage not in self.cost
        if (
            not wanted
            or now - self.previewed < PREVIEW_SECONDS
            or (not first and expected > PREVIEW_FRACTION * (now - self.started))
        ):
            return
        for place, image in zip(wanted, step.preview(wanted), strict=False):
            buffer = io.BytesIO()
            image.save(buffer, "WEBP", quality=75, method=2)
            url = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
            self.connection.send(("preview", self.batch.number, place, *image.size, url))
        self.previewed = time.perf_counter()
        self.cost[step.stage] = self.previewed - now
        self.preview_seconds += self.cost[step.stage]

    def mark(self, stage: str) -> None:
        """Adds the time since the last call to this stage."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.marked
        self.marked = now

    def measured(self) -> dict[str, Any]:
        import torch

        joules = self.worker.joules()
        used = None if joules is None or self.joules is None else joules - self.joules
        on_gpu = self.model.device.type == "cuda"
        return {
            "seconds": self.seconds,
            "preview_seconds": self.preview_seconds,
            "joules": used,
            "memory": resident_bytes(),
            "device_memory": torch.cuda.max_memory_allocated(self.model.device) if on_gpu else None,
        }


def resident_bytes(pid: int | str = "self") -> int | None:
    """Resident memory of a process, or None if the system does not report it."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def _device_name(model: "Wuerstchen") -> str:
    import torch

    if model.device.type == "cuda":
        return torch.cuda.get_device_name(model.device)
    return model.device.type


def _energy_counter(model: "Wuerstchen") -> Callable[[], float | None]:
    """A function that returns the joules the GPU has used so far, or None if it has no counter."""
    from wuerstchen.train.report.cost import energy_counter

    return energy_counter(model.device)


def _served(cascade: "Cascade", sampling: "Sampling") -> dict[str, Any]:
    """The settings that the service has for this model, without those that are None."""
    names = ["guidance", "guidance_interval", "prior_steps", "prior_sampler", "decoder_steps"]
    if cascade.decoder_student is not None:
        names.append("decoder_sampler")
    return {name: value for name in names if (value := getattr(sampling, name)) is not None}


def _samplers(objective: "Objective", has_student: bool) -> list[str]:
    """The samplers of a stage with this objective, its default first: those of a student only with one."""
    from wuerstchen.diffusion.sampler_table import SAMPLERS, samplers_for

    fitting = samplers_for(objective.path)
    own = [name for name in fitting if not SAMPLERS[name].for_students]
    return [*(name for name in fitting if name not in own), *own] if has_student else own

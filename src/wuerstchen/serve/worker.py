"""The process that owns a device: it loads the model, is sent batches, and tells what happens to them.

Messages go through a pipe, as tuples that begin with a word. To the worker: ``draw`` with a ``Batch``,
``unwanted`` with a batch's number and places in it. From it: ``ready`` with what the model can, ``unfit``
with the reason why it cannot be loaded; of a batch, by its number: ``notice``, ``step``, ``preview``,
``image``, and in the end ``done``, ``stopped`` or ``failed``; and at all times ``alive``. The pipe's end is
the worker's end.

Importing this loads no torch: the service does it for the messages.
"""

import base64
import io
import math
import os
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from PIL import Image

from wuerstchen.errors import UserError
from wuerstchen.serve.heartbeat import Beating
from wuerstchen.serve.jobs import Shape

if TYPE_CHECKING:
    from wuerstchen.pipeline import Wuerstchen
    from wuerstchen.progress import Step

PREVIEW_SHARE = 0.08
"""Of a batch's time, at most, for previews."""
PREVIEW_SECONDS = 0.15
"""Between two, at least."""
STEP_SECONDS = 0.03
"""Between two steps that are told of, at least: nobody sees more, and each is news to all jobs of a batch."""
SHARE_OF_STAGE_C = 0.6
"""Of a drawing's time, for the progress bar; Stage B has nearly all the rest."""


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker is started with."""

    model: str | None
    device: str | None
    precision: str | None


@dataclass(frozen=True)
class Batch:
    """Pictures of one shape. ``images`` are RGB of its size, one a picture, or None."""

    number: int
    shape: Shape
    fill: int | None
    """The size to which the batch is filled up with pictures that nobody gets, if any."""
    prompts: list[str]
    negatives: list[str]
    seeds: list[int]
    images: list[bytes] | None
    previews: list[int]
    """Places of the pictures that previews are wanted of."""


class _Stopped(Exception):
    """Nobody wants the batch any more."""


def main(settings: WorkerSettings, pipe: Connection) -> None:
    """Runs until the pipe ends, which it does with the service."""
    connection = Beating(pipe)
    # The service decides when to stop; a terminal's Ctrl-C reaches all processes.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        worker = _Worker(settings, connection)
    except UserError as error:
        connection.send(("unfit", str(error)))
        return
    try:
        connection.send(("ready", worker.about()))
        while True:
            message = connection.recv()
            if message[0] == "draw":
                worker.draw(message[1])
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the service is gone


class _Worker:
    def __init__(self, settings: WorkerSettings, connection: Beating) -> None:
        import torch

        from wuerstchen.pipeline import Sampling, load

        if settings.precision == "float32":
            # Convolutions rounded to TF32 would show who shares a batch: each size has kernels of its own.
            torch.backends.cudnn.allow_tf32 = False
        precision: Any = settings.precision
        self.settings = settings
        self.connection = connection
        self.model: Wuerstchen = load(settings.model, settings.device, precision=precision)
        self._joules = _energy_counter(self.model)
        self._reading: float | None = None
        self._read_at = -math.inf
        if self.model.cascade.prior is not None and self.model.cascade.text_encoder is not None:
            # The first picture takes longer, and nobody should wait for that.
            self.model.generate("", sampling=Sampling(prior_steps=1, decoder_steps=1))

    def about(self) -> dict[str, Any]:
        """The model, as ``GET /v1/model`` tells, without what the service knows by itself."""
        from wuerstchen import doctor
        from wuerstchen.checkpoints.hub import PHOTO_NOTE, is_bundled
        from wuerstchen.diffusion.sampler_table import samplers_for
        from wuerstchen.models.cascade import MAX_SIDES, MIN_SIDE, SIDE_STEP
        from wuerstchen.recipes.mini import PROMPTS
        from wuerstchen.sampling import Sampling

        cascade = self.model.cascade
        side = cascade.settings.image_size
        draws = cascade.prior is not None and cascade.text_encoder is not None
        reads = cascade.compressor is not None
        bundled = is_bundled(self.settings.model)
        return {
            "device": _device_name(self.model),
            "side": side,
            "multiple": SIDE_STEP,
            "min": MIN_SIDE,
            "max_side": min(4, MAX_SIDES) * side,
            "defaults": {
                name: value
                for name, value in self.model.settings_of(Sampling()).items()
                if name in ("guidance", "prior_steps", "prior_sampler", "decoder_steps")
            },
            "samplers": samplers_for(cascade.settings.prior_objective.path),
            "can": {
                "generate": draws,
                "reconstruct": reads,
                "variation": draws and reads,
                "preview": cascade.previewer is not None,
            },
            "examples": list(PROMPTS if bundled else doctor.PROMPTS),
            "image_note": PHOTO_NOTE if bundled else None,
        }

    def joules(self, max_age: float = 0.0) -> float | None:
        """What the GPU has used, as of ``max_age`` seconds ago at most: asking it takes milliseconds."""
        if time.perf_counter() - self._read_at > max_age:
            self._reading, self._read_at = self._joules(), time.perf_counter()
        return self._reading

    def draw(self, batch: Batch) -> None:
        drawing = _Drawing(self, batch)
        try:
            images = drawing.run()
        except _Stopped:
            self.connection.send(("stopped", batch.number))
        except UserError as error:
            self.connection.send(("failed", batch.number, str(error), "invalid_request_error"))
        except Exception as error:  # whatever it is, the next batch may be drawn
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            self.connection.send(("failed", batch.number, f"drawing failed ({reason})", "server_error"))
        else:
            for place, image in enumerate(images):
                if place not in drawing.unwanted:
                    self.connection.send(("image", batch.number, place, *image.size, image.tobytes()))
            self.connection.send(("done", batch.number, drawing.measured()))


class _Drawing:
    """One batch on its way."""

    def __init__(self, worker: _Worker, batch: Batch) -> None:
        self.worker = worker
        self.model = worker.model
        self.connection = worker.connection
        self.batch = batch
        self.unwanted: set[int] = set()
        self.began = self.marked = time.perf_counter()
        self.joules = worker.joules(max_age=0.05)  # of the batch before, if there was one
        self.seconds: dict[str, float] = {}
        self.preview_seconds = 0.0
        self.previewed = self.told = -PREVIEW_SECONDS
        self.cost: dict[str, float] = {}
        """What a preview took, by stage."""

    def run(self) -> list[Image.Image]:
        from wuerstchen.sampling import Sampling

        batch, shape = self.batch, self.batch.shape
        own = len(batch.seeds)
        fill = batch.fill or 0
        if self.model.device.type == "cuda":
            # Passes are recorded for each batch size: few sizes, few recordings.
            fill = max(fill, 1 << (own - 1).bit_length())
        more = max(0, fill - own)
        seeds = batch.seeds + [0] * more
        size = (shape.width, shape.height)
        images = None
        if batch.images is not None:
            images = [Image.frombytes("RGB", size, data) for data in batch.images]
            images += [Image.new("RGB", size)] * more
        sampling: Sampling = Sampling(
            guidance=shape.guidance,
            prior_steps=shape.prior_steps,
            prior_sampler=shape.prior_sampler,  # pyrefly: ignore
            decoder_steps=shape.decoder_steps,
        )
        if shape.kind == "reconstruct":
            assert images is not None
            results = self.model.reconstruct_batch(
                images, seeds=seeds, size=shape.width, sampling=sampling, watch=self.on_step
            )
            drawn = [result.image for result in results]
        else:
            self.tell_what_is_cut()
            drawn = self.model.generate(
                batch.prompts + [""] * more,
                negative=batch.negatives + [""] * more,
                seed=seeds,
                size=size,
                init=images,
                strength=shape.strength or 1.0,
                sampling=sampling,
                batch_size=len(seeds),
                watch=self.on_step,
            )
        self.mark("Stage A")
        return drawn[:own]

    def tell_what_is_cut(self) -> None:
        """A text longer than the model reads is a thing to tell its author."""
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
        if now - self.told >= STEP_SECONDS:
            self.told = now
            self.tell(step)
        if step.stage == "Stage C" or step.step < step.steps:
            self.preview(step)

    def tell(self, step: "Step") -> None:
        share = SHARE_OF_STAGE_C if self.batch.shape.kind == "generate" else 0.0
        done = step.step / step.steps
        fraction = share * done if step.stage == "Stage C" else share + (0.98 - share) * done
        self.connection.send(("step", self.batch.number, step.stage, step.step, step.steps, fraction))

    def preview(self, step: "Step") -> None:
        """Shows what is being drawn, if it is wanted and there is time: the first one at once."""
        wanted = [place for place in self.batch.previews if place not in self.unwanted]
        now = time.perf_counter()
        expected = self.preview_seconds + self.cost.get(step.stage, 0.0)
        first = step.stage not in self.cost
        if (
            not wanted
            or now - self.previewed < PREVIEW_SECONDS
            or (not first and expected > PREVIEW_SHARE * (now - self.began))
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
        """The time since the last mark was this stage's."""
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
    """Memory of a process; None where nobody tells."""
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
    """Joules that the GPU has used so far; None where nothing counts them."""
    from wuerstchen.train.report.cost import energy_counter

    return energy_counter(model.device)

"""Training of a student of Stage C, which samples in a few steps without guidance.

The frozen prior draws a trajectory from noise to a sample for each caption, with guidance. The student learns
to jump from every point of it to its end (arXiv 2509.24526). Of the images only the captions and the size are
used.
"""

import dataclasses
import math
from collections.abc import Collection

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from wuerstchen.device import to_device
from wuerstchen.diffusion.objective import Objective, predictions_for_sampling
from wuerstchen.diffusion.sampler_table import SAMPLERS, samplers_for
from wuerstchen.diffusion.samplers import Predict, guided, guided_within
from wuerstchen.models.cascade import Cascade
from wuerstchen.models.prior import Prior, PriorContext
from wuerstchen.models.text import TextStates
from wuerstchen.sampling import ALL_TIMES, Sampling
from wuerstchen.train.config import Phase, Recipe, StageFewConfig
from wuerstchen.train.feed.images import Batch
from wuerstchen.train.feed.prepared import StoredBatch
from wuerstchen.train.feed.random import ImageRandom
from wuerstchen.train.precision import AUTOCAST_DTYPES, with_autocast_weights
from wuerstchen.train.stages.base import (
    Inputs,
    Losses,
    NamedPhase,
    Run,
    StageKind,
    autocast,
    full_precision,
    text_inputs,
)
from wuerstchen.train.stages.prior import Need, check_sources, needs, previews

HUBER = 0.00054
"""c of the pseudo-Huber loss, per root of the number of values (arXiv 2310.14189, equation 7)."""


def teacher_sampler(objective: Objective) -> str:
    """The deterministic sampler that draws trajectories: ``dpm``, or ``euler`` for flow matching."""
    fitting = samplers_for(objective.path)
    return "dpm" if "dpm" in fitting else fitting[0]


def teacher_times(objective: Objective, steps: int) -> list[float]:
    """The times of a trajectory from noise to 0, in at most ``steps`` steps. The first one is the highest
    time that a student can jump from."""
    times, first = SAMPLERS[teacher_sampler(objective)].timesteps(steps), objective.highest_jump
    return [first, *(t for t in times[1:] if t < first)]


@torch.no_grad()
def trajectories(
    prior: Prior,
    objective: Objective,
    text: TextStates,
    no_text: TextStates,
    noise: Float[Tensor, "b c h w"],
    times: list[float],
    *,
    masks: bool,
    guidance: float,
    interval: tuple[float, float] = ALL_TIMES,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "b n c h w"]:
    """All points of the guided samples of the ``prior`` from ``noise`` on, at the ``times``. The last one is
    the sample.

    ``masks`` is whether attention ignores padding. The prior runs under autocast to ``dtype``. Its output is
    converted, guided and integrated in fp32: near time 1 the error of x̂₀ is 100 times that of ε.
    """
    count = len(noise)

    def output(x: Tensor, t: Tensor, context: PriorContext) -> Tensor:
        with autocast(x.device, dtype):
            return prior(x, t, context).float()

    predictions = predictions_for_sampling(output, objective)

    def network(states: TextStates) -> Predict:
        with autocast(noise.device, dtype):
            context = prior.context(states.states, states.mask if masks else None)
        return lambda x, t: predictions(x, t, context)

    points = [noise]

    def keep(_: int, x: Tensor) -> None:
        points.append(x)

    predict, on_step = network(text), keep
    if guidance != 1:
        both = TextStates(
            states=torch.cat([text.states, no_text.states.expand_as(text.states)]),
            mask=torch.cat([text.mask, no_text.mask.expand(count, -1)]),
        )
        unguided, predict = predict, guided(network(both), guidance)
        if interval != ALL_TIMES:
            predict, on_step = guided_within(predict, unguided, interval, times, keep)
    sampler = SAMPLERS[teacher_sampler(objective)]
    sampler.function(predict, noise, times, (), objective.for_sampling(), on_step)
    return torch.stack(points, dim=1)


class StageFew:
    """Trains the student on the trajectories of the frozen prior."""

    averaged = ("prior_student",)
    captions = True
    reads_images = False
    only_captions = True

    def __init__(
        self,
        config: StageFewConfig,
        recipe: Recipe,
        model: Cascade,
        student: Prior,
        *,
        device: torch.device | None = None,
        needs: Collection[Need] = ("text_encoder",),
    ) -> None:
        """The prior of the ``model`` is the teacher.

        On a ``device`` other than the CPU, only the teacher stays on it, and the text encoder if it is in
        ``needs``. The other networks are moved to it for previews. If ``device`` is None, nothing is moved.
        """
        assert model.prior is not None
        assert model.text_encoder is not None
        self.name = "few"
        self.config = config
        self.recipe = recipe
        self.optimization = config.optimization
        self.teacher = model.prior.eval().requires_grad_(False)
        self.frozen = dataclasses.replace(model, prior_student=None)
        self.objective = model.settings.prior_objective
        self.text_encoder = model.text_encoder
        self.networks: dict[str, nn.Module] = {"prior_student": student}
        self.rates: dict[str, float] = {}
        self.rate_scales: dict[str, float] = {}
        self.preview_labels = {"prompts": list(recipe.preview_prompts)}
        self.times = teacher_times(self.objective, config.teacher_steps)
        if device is not None:
            self.text_encoder.to(device)
        self.no_text = self.text_encoder.encode([""])
        if device is not None and device.type != "cpu":
            self._place(device, needs)
        times = torch.tensor(self.times[:-1], dtype=torch.float32, device="cpu")
        self._times = times if device is None else to_device(times, device)

    def _place(self, device: torch.device, needs: Collection[Need]) -> None:
        """Keeps on ``device`` only what updates need, in the precision that they need."""
        for network in self.frozen.networks().values():
            network.to("cpu")
        if "text_encoder" in needs:
            half = AUTOCAST_DTYPES.get(self.recipe.precision)
            if half is not None:
                self.text_encoder = with_autocast_weights(self.text_encoder, half)
            self.text_encoder.to(device)
        self.teacher.to(device)

    def prepare(self, batch: Batch, device: torch.device) -> Inputs:
        height, width = batch.images.shape[1:3]
        text = self.text_encoder.encode(batch.captions)
        return self._inputs(text, batch.indices.to(device), self.frozen.settings.latent_size(width, height))

    def prepare_stored(self, batch: StoredBatch, device: torch.device) -> Inputs:
        """``prepare`` on stored texts, at the size of the stored latents."""
        text = batch.texts(self.text_encoder, device)
        height, width = batch.semantic_latents.shape[2:]
        return self._inputs(text, batch.indices.to(device), (height, width))

    def _inputs(self, text: TextStates, indices: Tensor, size: tuple[int, int]) -> Inputs:
        """The texts and their trajectories (b, n, c, h, w) in fp16."""
        recipe, shape = self.recipe, (self.teacher.config.c_in, *size)
        noise = ImageRandom(recipe.seed, indices).normal("trajectory", shape)
        with full_precision(noise.device):
            drawn = trajectories(
                self.teacher,
                self.objective,
                TextStates(states=text.states.float(), mask=text.mask),
                TextStates(states=self.no_text.states.float(), mask=self.no_text.mask),
                noise,
                self.times,
                masks=recipe.text_positions == "real",
                guidance=recipe.prior_guidance,
                interval=recipe.prior_guidance_interval,
                dtype=AUTOCAST_DTYPES.get(recipe.precision),
            )
        return {"trajectory": drawn.half(), **text_inputs(text, recipe)}

    def losses(self, inputs: Inputs, random: ImageRandom) -> Losses:
        trajectory, count = inputs["trajectory"], self.config.points
        images, pure, later = len(trajectory), self.config.pure_noise, len(self.times) - 2
        u = random.uniform("point", (count,))
        place = 1 + ((u - pure) / (1 - pure) * later).long().clamp(max=later - 1)
        place = torch.where(u < pure, 0, place)
        rows = torch.arange(images, device=u.device)[:, None]
        x = trajectory[rows, place].flatten(0, 1).float()
        end = _repeated(trajectory[:, -1], count).float()
        mask = None if "mask" not in inputs else _repeated(inputs["mask"], count)
        student = self.networks["prior_student"]
        clean = self._jump(student, x, self._times[place].flatten(), _repeated(inputs["states"], count), mask)
        yield "prior_student", pseudo_huber(clean, end).mean(), {}

    def _jump(self, student: nn.Module, x: Tensor, t: Tensor, states: Tensor, mask: Tensor | None) -> Tensor:
        """The student's x̂₀, in fp32."""
        assert isinstance(student, Prior)
        output = student(x, t, student.context(states, mask, cache_kv=False))
        return self.objective.to_clean(output.float(), x, t)

    def endpoint_errors(
        self, averages: dict[str, nn.Module], inputs: Inputs, k: int
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """For each image at the time ``times[k]``, with the averaged weights: the mean squared error of x̂₀
        against the end of the trajectory, and the loss. The mean loss over times is the training loss."""
        trajectory, pure, jumps = inputs["trajectory"], self.config.pure_noise, len(self.times) - 1
        x, end = trajectory[:, k].float(), trajectory[:, -1].float()
        t = self._times[k].expand(len(x))
        clean = self._jump(averages["prior_student"], x, t, inputs["states"], inputs.get("mask"))
        share = pure if k == 0 else (1 - pure) / (jumps - 1)
        return (clean - end).square().flatten(1).mean(1), pseudo_huber(clean, end) * share * jumps

    def check(self, values: dict[str, float]) -> None:
        pass

    def preview(
        self,
        averages: dict[str, nn.Module],
        pixels: Tensor,
        device: torch.device,
        *,
        low_memory: bool = False,
    ) -> list[Image.Image]:
        """Images of the recipe's prompts by the student and Stages B and A."""
        student = averages["prior_student"]
        assert isinstance(student, Prior)
        cascade = dataclasses.replace(self.frozen, prior_student=student)
        return previews(cascade, self.recipe, device, low_memory, Sampling(prior_sampler="few"))


def pseudo_huber(output: Float[Tensor, "b ..."], target: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    """√(‖output − target‖² + c²) − c with c = ``HUBER``·√d for d values (arXiv 2310.14189, equation 7)."""
    difference = (output - target).flatten(1)
    c = HUBER * math.sqrt(difference.shape[1])
    return (difference.square().sum(1) + c**2).sqrt() - c


def _repeated(tensor: Tensor, count: int) -> Tensor:
    """Each row ``count`` times, one after the other."""
    return tensor[:, None].expand(-1, count, *tensor.shape[1:]).flatten(0, 1)


def _phases(recipe: Recipe) -> list[NamedPhase]:
    config = recipe.stage_few
    phase = Phase(optimization=config.optimization, image_size=config.image_size)
    makes = FEW_STAGE.makes
    return [NamedPhase(name="few", phase=phase, config="stage_few", path="stage_few", trains=makes)]


def train(run: Run) -> None:
    """Trains the student, from the weights of the prior or of a student that the run starts from."""
    recipe, parts = run.recipe, run.parts
    (named,) = _phases(recipe)
    begun = parts.prior_student or parts.prior
    assert begun is not None
    config = dataclasses.replace(begun.config, dropout=0.0)
    run.seed_weights("few")
    student = Prior(config)
    student.load_state_dict(begun.state_dict())
    parts.prior_student = None
    model = parts.cascade(run.settings_of_model(named.phase.image_size))
    used = tuple(need for need in needs(run, named.phase) if need != "compressor")
    stage = StageFew(recipe.stage_few, recipe, model, student, device=run.device, needs=used)
    averages = run.train_phase(stage, named.phase)
    parts.prior_student = averages(Prior(config), "prior_student")


def check(run: Run) -> None:
    """Raises ``UserError`` for prepared sets made with other networks, or that the stage cannot use."""
    check_sources(run, _phases(run.recipe))


FEW_STAGE = StageKind(
    name="prior_student",
    short="few",
    config="stage_few",
    changeable=frozenset({"points", "pure_noise"}),
    makes=("prior_student",),
    optional=("prior_student",),
    builds_on=("prior",),
    reads_captions=True,
    reads_images=False,
    phases=_phases,
    train=train,
    check=check,
)

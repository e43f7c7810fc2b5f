"""Training of a low-rank adapter for Stage C on your own images (LoRA, arXiv 2106.09685).

The whole model is frozen, in half precision on GPUs. Only the adapter is trained, averaged and stored. The
result is a file that is used together with the model.
"""

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from wuerstchen.checkpoints.adapters import save_lora
from wuerstchen.diffusion.objective import Objective
from wuerstchen.models.cascade import Cascade
from wuerstchen.train.config import Phase, Recipe, StageLoraConfig
from wuerstchen.train.feed.images import Batch
from wuerstchen.train.feed.random import ImageRandom
from wuerstchen.train.precision import AUTOCAST_DTYPES
from wuerstchen.train.stages.adapter import AdaptedPrior, AdapterWeights, adapter_config
from wuerstchen.train.stages.base import Inputs, Losses, NamedPhase, Run, StageKind, with_captions_dropped
from wuerstchen.train.stages.prior import Need, StageC, needs


class StageLora(StageC):
    """Trains the adapter as the prior was trained: with the objective of the model."""

    averaged = ("adapter",)

    def __init__(
        self,
        config: StageLoraConfig,
        recipe: Recipe,
        model: Cascade,
        adapted: AdaptedPrior,
        phase: NamedPhase,
        *,
        device: torch.device | None = None,
        needed: Collection[Need] = ("compressor", "text_encoder"),
    ) -> None:
        """``adapted`` is a copy of the prior of the ``model``. Other arguments are as in ``StageC``."""
        super().__init__(recipe.stage_c, recipe, model, phase, device=device, needs=needed)
        self.adapter_config = config
        self.adapted = adapted
        self.prior = adapted.prior if device is None else adapted.prior.to(device)
        self.networks: dict[str, nn.Module] = {"adapter": adapted.weights}
        self.backbones = (self.prior,)
        self.keeps_best = config.keep == "best"

        self.lends = device is not None and device.type != "cpu" and not needed
        self._lent = False

    @contextlib.contextmanager
    def lent_encoders(self, device: torch.device) -> Iterator[None]:
        """Moves the compressor and the text encoder to ``device``, and back at the end, if they are not kept
        there."""
        if not self.lends or self._lent:
            yield
            return
        networks = (self.compressor, self.text_encoder)
        self._lent = True
        try:
            for network in networks:
                network.to(device)
            yield
        finally:
            self._lent = False
            for network in networks:
                network.to("cpu")
            if device.type == "cuda":
                torch.cuda.empty_cache()

    def prepare(self, batch: Batch, device: torch.device) -> Inputs:
        with self.lent_encoders(device):
            return super().prepare(batch, device)

    @property
    def objective(self) -> Objective:
        return self.frozen.settings.prior_objective

    def losses(self, inputs: Inputs, random: ImageRandom) -> Losses:
        x, dropout = inputs["x"], self.adapter_config.caption_dropout
        states, mask = with_captions_dropped(self.no_text, inputs, random, dropout)
        t = self.objective.times(random.uniform("time"))
        noise = random.normal("noise", x.shape[1:])
        self.prior.train()
        context = self.prior.context(states, mask, cache_kv=False)
        output = self.prior(self.objective.noised(x, noise, t), t, context)
        yield "adapter", self.objective.loss(output, x, noise, t).mean(), {}

    def predict(self, averages: dict[str, nn.Module], inputs: Inputs, x: Tensor, t: Tensor) -> Tensor:
        with self.adapted.using(averages["adapter"]) as prior:
            return super().predict({"prior": prior}, inputs, x, t)

    def preview(
        self,
        averages: dict[str, nn.Module],
        pixels: Tensor,
        device: torch.device,
        *,
        low_memory: bool = False,
    ) -> list[Image.Image]:
        """Images of the recipe's prompts by Stages C, B and A."""
        with self.adapted.using(averages["adapter"]) as prior:
            return super().preview({"prior": prior}, pixels, device, low_memory=low_memory)


def _phases(recipe: Recipe) -> list[NamedPhase]:
    config = recipe.stage_lora
    phase = Phase(optimization=config.optimization, image_size=config.image_size)
    return [NamedPhase(name="lora", phase=phase, config="stage_lora", path="stage_lora", trains=())]


def _train(run: Run) -> None:
    recipe, config = run.recipe, run.recipe.stage_lora
    prior, settings = run.parts.prior, run.start.settings
    assert prior is not None
    assert settings is not None
    (named,) = _phases(recipe)
    run.seed_weights("lora")
    half = AUTOCAST_DTYPES.get(recipe.precision) if run.device.type != "cpu" else None
    adapted = AdaptedPrior(prior, config, half)
    model = run.parts.cascade(settings)
    if half is not None:
        for name, network in model.networks().items():
            if name not in ("compressor", "prior"):  # targets must be exact, and the prior is not used
                network.to(half)
    needed = () if recipe.prepared_images else needs(run, named.phase)
    stage = StageLora(config, recipe, model, adapted, named, device=run.device, needed=needed)
    averages = run.train_phase(stage, named.phase)
    run.results["lora"] = averages(adapted.weights, "adapter")


def _write(run: Run, folder: Path) -> None:
    weights, config = run.results["lora"], run.recipe.stage_lora
    assert isinstance(weights, AdapterWeights)
    save_lora(folder, weights.tensors(), config=adapter_config(weights.names, config))


LORA_STAGE = StageKind(
    name="adapter",
    short="lora",
    config="stage_lora",
    changeable=frozenset({"caption_dropout"}),
    makes=(),
    builds_on=("prior",),
    reads_captions=True,
    result="lora",
    phases=_phases,
    train=_train,
    write=_write,
)

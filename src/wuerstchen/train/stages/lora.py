"""Training of a low-rank adapter for Stage C on your own images (LoRA, arXiv 2106.09685).

The whole model is frozen, in half precision on GPUs. Only the adapter is trained, averaged and stored. The
result is a file that is used together with the model.
"""

import contextlib
import dataclasses
import re
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from wuerstchen.checkpoints.adapter_metadata import AdapterMetadata, weights_hash
from wuerstchen.checkpoints.adapter_write import file_name, write_adapter
from wuerstchen.checkpoints.adapters import Adapter
from wuerstchen.data.prepared import PreparedSet
from wuerstchen.data.sources import StoredImages
from wuerstchen.diffusion.objective import Objective
from wuerstchen.errors import UserError
from wuerstchen.models.cascade import Cascade
from wuerstchen.models.text import TextStates
from wuerstchen.train.config import Phase, Recipe, StageLoraConfig
from wuerstchen.train.feed.images import Batch
from wuerstchen.train.feed.random import ImageRandom
from wuerstchen.train.precision import AUTOCAST_DTYPES
from wuerstchen.train.stages.adapter import AdaptedPrior, AdapterWeights
from wuerstchen.train.stages.base import (
    Inputs,
    Losses,
    NamedPhase,
    Run,
    StageKind,
    full_precision,
    in_chunks,
    text_inputs,
    with_captions_dropped,
)
from wuerstchen.train.stages.class_images import ClassImages, class_inputs, draw_class_images
from wuerstchen.train.stages.new_word import NewWord
from wuerstchen.train.stages.prior import Need, StageC, check_sources, needs


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
        class_images: ClassImages | None = None,
        device: torch.device | None = None,
        needed: Collection[Need] = ("compressor", "text_encoder"),
    ) -> None:
        """``adapted`` is a copy of the prior of the ``model``. Other arguments are as in ``StageC``."""
        if config.class_word and len(recipe.preview_prompts) == 1:  # shows whether the class changes
            prompts = (*recipe.preview_prompts, config.class_prompt)
            recipe = dataclasses.replace(recipe, preview_prompts=prompts)
        super().__init__(recipe.stage_c, recipe, model, phase, device=device, needs=needed)
        self.adapter_config = config
        self.adapted = adapted
        self.class_images = class_images
        self.prior = adapted.prior if device is None else adapted.prior.to(device)
        self.networks: dict[str, nn.Module] = {"adapter": adapted.weights}
        self.backbones = (self.prior,)
        self.keeps_best = config.keep == "best"

        on_gpu = device is not None and device.type != "cpu"
        encoders = {"compressor": self.compressor, "text_encoder": self.text_encoder}
        self.lent = [network for name, network in encoders.items() if on_gpu and name not in needed]
        """The networks that are on the device only while they encode."""
        self._are_lent = False

    @contextlib.contextmanager
    def lent_encoders(self, device: torch.device) -> Iterator[None]:
        """Moves the compressor and the text encoder to ``device``, and back at the end, if they are not kept
        there."""
        if not self.lent or self._are_lent:
            yield
            return
        self._are_lent = True
        try:
            for network in self.lent:
                network.to(device)
            yield
        finally:
            self._are_lent = False
            for network in self.lent:
                network.to("cpu")
            if device.type == "cuda":
                torch.cuda.empty_cache()

    def prepare(self, batch: Batch, device: torch.device) -> Inputs:
        word = self.adapted.word
        with self.lent_encoders(device):
            if word is None:
                return super().prepare(batch, device)
            with full_precision(device):
                z = in_chunks(self._semantic_latents, batch.images.to(device))["z"]
        ids, mask = word.tokens(batch.captions, device)
        return {"x": self.statistics.normalise(z), "ids": ids, "tokens": mask}

    def _with_text(self, inputs: Inputs) -> Inputs:
        """The inputs with the text states of captions that contain the new word, which is being trained."""
        if "ids" not in inputs:
            return inputs
        states = self.text_encoder.last_states(inputs["ids"], inputs["tokens"])
        text = text_inputs(TextStates(states=states, mask=inputs["tokens"]), self.recipe)
        return {"x": inputs["x"], **text}

    @property
    def objective(self) -> Objective:
        return self.frozen.settings.prior_objective

    def losses(self, inputs: Inputs, random: ImageRandom) -> Losses:
        self.prior.train()
        inputs = self._with_text(inputs)
        loss, drawn = self._loss(inputs, random), self.class_images
        if drawn is None:
            yield "adapter", loss, {}
            return
        rows = random.integers("class image", (1,), len(drawn.latents))[:, 0]
        of_class = self._loss(class_inputs(drawn, rows, masks="mask" in inputs), random, "class ")
        yield "adapter", loss + self.adapter_config.class_weight * of_class, {"class": of_class}

    def _loss(self, inputs: Inputs, random: ImageRandom, purpose: str = "") -> Float[Tensor, ""]:
        """The loss of the prior. ``purpose`` begins the names of its random numbers."""
        x, objective = inputs["x"], self.objective
        dropout = self.adapter_config.caption_dropout
        states, mask = with_captions_dropped(self.no_text, inputs, random, dropout, f"{purpose}caption")
        t = objective.times(random.uniform(f"{purpose}time"))
        noise = random.normal(f"{purpose}noise", x.shape[1:])
        context = self.prior.context(states, mask, cache_kv=False)
        output = self.prior(objective.noised(x, noise, t), t, context)
        return objective.loss(output, x, noise, t).mean()

    def predict(self, averages: dict[str, nn.Module], inputs: Inputs, x: Tensor, t: Tensor) -> Tensor:
        with self.adapted.using(averages["adapter"]) as prior:
            return super().predict({"prior": prior}, self._with_text(inputs), x, t)

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
    model = run.parts.cascade(settings)
    word = None
    if config.token:
        assert model.text_encoder is not None
        word = NewWord(model.text_encoder, config.token, like=config.class_word)
        model = dataclasses.replace(model, text_encoder=word.encoder)
    adapted = AdaptedPrior(prior, config, half, word=word)
    if half is not None:
        for name, network in model.networks().items():
            if name not in ("compressor", "prior"):  # targets must be exact, and the prior is not used
                network.to(half)
    needed = needs(run, named.phase)
    if recipe.prepared_images:
        needed = ("text_encoder",) if word is not None else ()
    drawn = None
    if config.class_word and run.makes_updates:
        with adapted.disabled() as untrained:
            drawn = draw_class_images(run, untrained, model, half)
    stage = StageLora(
        config, recipe, model, adapted, named, class_images=drawn, device=run.device, needed=needed
    )
    images = run.measured_once("stage_lora", lambda: {"images": _images(run)}, {"images": 0})["images"]
    averages = run.train_phase(stage, named.phase)
    run.results["lora"] = averages(adapted.weights, "adapter"), images


def _write(run: Run, folder: Path) -> None:
    recipe, config = run.recipe, run.recipe.stage_lora
    weights, images = run.results["lora"]
    assert isinstance(weights, AdapterWeights)
    assert run.parts.prior is not None
    start = Path(recipe.start_from)
    trigger = config.token or recipe.captions.trigger or _trigger(recipe.caption)
    metadata = AdapterMetadata(
        base_model=start.name if start.exists() else recipe.start_from,
        base_hash=weights_hash(run.parts.prior),
        trigger_words=(trigger,) if trigger else (),
        images=images,
        updates=-(-run.ended_at["lora"] // config.optimization.batch_size),
        licence=config.licence,
    )
    words = {} if weights.word is None else {config.token: weights.word.detach()}
    adapter = Adapter(prior=weights.tensors(config.rank * config.scale), tokens=words)
    dtype = getattr(torch, recipe.storage)
    write_adapter(folder / file_name(config.form), adapter, metadata, form=config.form, dtype=dtype)


def _check(run: Run) -> None:
    """Raises ``UserError`` for prepared sets that do not fit, and for a new word that cannot be learnt."""
    check_sources(run, _phases(run.recipe))
    recipe, token = run.recipe, run.recipe.stage_lora.token
    if not token:
        return
    (named,) = _phases(recipe)
    source = run.source(named.phase)
    if isinstance(source, PreparedSet):
        raise UserError(
            f"token={token} needs images with captions, got the prepared set {recipe.data}, whose captions "
            "are tokens of known words. Use the original images."
        )
    if isinstance(source, StoredImages):
        texts = (text for item in range(len(source)) for text in source.captions(item))
        if not any(token in text.split() for text in texts):
            raise UserError(
                f"token={token} is in no caption of {recipe.data}, so nothing would teach it. Use "
                f'--caption "a photo of {token}", or write it in the captions.'
            )


def _images(run: Run) -> int:
    """The number of different images that the adapter was trained on."""
    (named,) = _phases(run.recipe)
    source = run.source(named.phase)
    return len(source.rows("train")) if isinstance(source, PreparedSet) else len(source)


def _trigger(caption: str) -> str:
    """The part of a caption for all images that prompts should repeat."""
    return re.sub(r"^an? (photo|picture|image|drawing) of ", "", caption.strip(), flags=re.IGNORECASE)


LORA_STAGE = StageKind(
    name="adapter",
    short="lora",
    config="stage_lora",
    changeable=frozenset({"caption_dropout"}),
    makes=(),
    builds_on=("prior",),
    reads_captions=True,
    check=_check,
    result="lora",
    phases=_phases,
    train=_train,
    write=_write,
)

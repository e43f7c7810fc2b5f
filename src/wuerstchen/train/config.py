"""The configuration of a training run, in frozen dataclasses. A recipe is a function that returns one."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from wuerstchen.checkpoints.layout_table import Storage
from wuerstchen.checkpoints.shards import size_in_bytes
from wuerstchen.data.caption_options import PLAIN, CaptionOptions
from wuerstchen.diffusion.objective import check_prediction, default_time_density, make_objective
from wuerstchen.diffusion.sampler_table import SAMPLERS, check_compatible
from wuerstchen.errors import UserError
from wuerstchen.models.compressor import CompressorConfig
from wuerstchen.models.decoder import DecoderConfig
from wuerstchen.models.paella import PaellaConfig
from wuerstchen.models.previewer import PreviewerConfig
from wuerstchen.models.prior import PriorConfig
from wuerstchen.models.vqgan import VQGANConfig
from wuerstchen.sampling import ALL_TIMES, Sampling
from wuerstchen.train.config_few import StageFewBConfig, StageFewConfig
from wuerstchen.train.config_fields import FREE_FIELDS, differing_fields
from wuerstchen.train.config_lora import StageLoraConfig
from wuerstchen.train.config_memory import Memory, check_memory
from wuerstchen.train.config_stages import (
    Optimization,
    Phase,
    StageAConfig,
    StageBConfig,
    StageCConfig,
    check_side,
    phases_of,
    refining,
)
from wuerstchen.train.decoder_kinds import decoder_kind
from wuerstchen.train.stage_table import after, kinds, needed_before, selectable, short_name

__all__ = [
    "FREE_FIELDS",
    "Memory",
    "Optimization",
    "Phase",
    "Recipe",
    "StageAConfig",
    "StageBConfig",
    "StageCConfig",
    "StageFewBConfig",
    "StageFewConfig",
    "StageLoraConfig",
    "StoredTexts",
    "as_dict",
    "differing_fields",
    "phases_of",
    "refining",
    "with_phase",
    "with_time_densities",
]
"""Recipes import everything they need from here."""


def _others(order: list[str]) -> str:
    """Stages beyond a, b and c that can be selected, in words."""
    more = [stage for stage in order if stage not in ("a", "b", "c")]
    return f", or one of {', '.join(more)}" if more else ""


def with_phase(recipe: "Recipe", stage: str) -> "Recipe":
    """The recipe with one more phase of Stage ``b`` or ``c``: a copy of the last one."""
    name = f"stage_{stage}"
    config = getattr(recipe, name)
    phases = (*config.phases, phases_of(config)[-1])
    return dataclasses.replace(recipe, **{name: dataclasses.replace(config, phases=phases)})


_SHORT_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
StoredTexts = Literal["tokens", "states"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole training run: the networks, how each stage trains them, the data, and the previews."""

    name: str
    data: str
    """The images and captions: ``sample`` for the bundled sample, a folder of images with captions, tars
    (WebDataset), parquet files, a folder written by ``save_to_disk``, a name on the hub, a built emoji set,
    a text file with a caption a line (for students only), or a prepared set (for Stage C and students).
    Several of them are mixed by weights: ``photos=3 + shards/*.tar=1``. Without weights each image is shown
    equally often."""
    image_column: str = ""
    """The column with the images or with their file names. For tars, the extension of the images. Empty for
    the first common name."""
    text_column: str = ""
    """The column with the captions. For tars and text files, the extension of the captions. Empty for the
    first common name."""
    caption: str = ""
    """One caption for all images of a folder, which replaces those in files. Empty for the captions of the
    data."""
    captions: CaptionOptions = PLAIN
    """Which of the captions of an image is used, and how its tags are shuffled. For images with written
    captions, not for prepared sets and emoji."""
    held_out: float = 0.0
    """Fraction of the images that a folder of fewer than 100 images holds out for validation, at most 0.5. 0
    holds out none. Larger sets always hold out 2 %."""
    image_size: int
    """Side of the images that the model generates, in pixels, a multiple of 128. Stages train at this size
    unless they set their own."""
    seed: int = 0
    stages: tuple[str, ...] = ("a", "b", "c")
    """The stages to train, in order, by their short or full names (``train.stage_table``). The other stages
    come from ``start_from``."""
    start_from: str = ""
    """A model to start from, in any layout: a folder, a file, or a name on the hub. Empty for none."""
    fresh: tuple[str, ...] = ()
    """Stages that start from random weights although ``start_from`` has their networks."""
    only: tuple[str, ...] = ()
    """The phases to train, by the names of their folders in the run (``b2`` for RUN/stage_b2), to train a
    recipe in pieces. Everything before them comes from ``start_from``. The first phase of a stage starts from
    random weights if ``start_from`` does not have its networks. Empty for all phases of ``stages``."""
    text_encoder: str = ""
    """The text encoder of Stage C: a folder, or a name on the hub. Empty for that of ``start_from``, or for
    the small bundled one if there is none."""
    decoder_text_encoder: str = ""
    """The text encoder of Stage B, if Stage B reads text: a folder, or a name on the hub. Empty for that of
    ``start_from``, or for that of Stage C if there is none."""
    text_positions: Literal["real", "all"] = "real"
    """Which text states are attended to: ``real`` hides padding, ``all`` does not, as in the published
    models."""
    stored_texts: StoredTexts = "tokens"
    """What is read from a prepared set: ``tokens``, which the text encoder encodes again, or the stored
    ``states``."""
    vqgan: VQGANConfig
    compressor: CompressorConfig
    previewer: PreviewerConfig = field(default_factory=PreviewerConfig)
    decoder: DecoderConfig | PaellaConfig
    """Stage B: a decoder of latents (v2) or of tokens (v1)."""
    prior: PriorConfig
    stage_a: StageAConfig
    stage_b: StageBConfig
    stage_c: StageCConfig
    stage_few: StageFewConfig = field(default_factory=StageFewConfig)
    stage_few_b: StageFewBConfig = field(default_factory=StageFewBConfig)
    stage_lora: StageLoraConfig = field(default_factory=StageLoraConfig)
    statistics_images: int = 1024
    """Images for measuring the scale of Stage A's latents, and the mean and standard deviation of the
    semantic latents."""
    view_scale: float = 0.75
    """Scale of the images that the compressor sees, 0.75 as published. The semantic latents have one position
    for every 32 × 32 pixels of the scaled image."""
    prior_steps: int = 29
    prior_sampler: str = ""
    """Sampler of Stage C, by its name in ``diffusion.sampler_table``. Empty for that of ``start_from`` if it
    fits, or for the default of the objective."""
    prior_guidance: float = 4.0
    prior_guidance_interval: tuple[float, float] = ALL_TIMES
    """Lowest and highest time at which Stage C is guided when the model samples, from 0 (clean) to 1 (noise).
    0 1 guides all steps."""
    decoder_steps: int = 12
    decoder_guidance: float = 1.0
    """Guidance of Stage B by the semantic latents. 1 is no guidance, as published."""
    decoder_shift: float = 1.0
    """Timestep shift of Stage B's sampling steps towards noise. 1 is no shift, as published."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "float32", "bfloat16", "float16"] = "auto"
    """``bf16`` and ``fp16`` run autocast over fp32 weights, ``fp16`` with loss scaling. ``auto`` is bf16 on a
    GPU, or fp16 if the GPU does not support bf16. ``float32``, ``bfloat16`` and ``float16`` are other names
    for the same."""
    acceleration: Literal["auto", "none", "compile", "graph"] = "auto"
    """``compile`` compiles the blocks of the networks. ``graph`` also records one update, including the
    exchange of gradients between processes, and replays it as a CUDA graph. ``auto`` is graph on GPUs,
    compile with sharded networks, and none on other devices."""
    sharding: Literal["none", "full"] = "none"
    """``full`` shards the weights, averages and optimizer states of Stages B (v2 only) and C across processes
    (FSDP2). Stage A, the discriminator and the previewer are not sharded. They are less than 2 % of the
    parameters. Has no effect with one process."""
    recompute: Literal["none", "blocks"] = "none"
    """``blocks`` keeps only the input of each block and recomputes the rest in the backward pass (activation
    checkpointing). It saves memory, computes a third more, and gives the same gradients."""
    memory: Memory = "normal"
    """GPU memory for training Stage C, per weight: 20 bytes, 6 with ``low`` (weights and moments in bf16 with
    stochastic rounding, the average in host memory), or 4 with ``lowest`` (also updates weights in the
    backward pass). Both change the result and cost time (docs/training.md)."""
    prepared_images: int = 0
    """Size of the image cache: images that are composed once at the start and kept on the device, together
    with the outputs of the frozen networks, for training on them. 0 disables the cache. An image of
    256 pixels takes 0.2 MB, or 0.26 MB with the latents for Stage B."""
    fit_images: int = 0
    """Number of images that batch sizes, lengths and the image cache are reduced to fit, for a data set of
    fewer images than the recipe was made for. 0 changes nothing. The run says what it changed
    (``fit_images.py``)."""
    mirrored: float = 0.0
    """Fraction of the training images that are mirrored from left to right. Their captions end with
    ", mirrored", so the model learns from them without mirroring what it draws."""
    preview_prompts: tuple[str, ...] = ()
    """Prompts of Stage C's previews, the same for the whole run. Empty for captions from the data."""
    preview_every: int = 0
    """Images between previews. 0 for one preview at the end of each stage."""
    validate_every: int = 0
    """Images between validations, which are then at these points only, and at the end. 0 validates at
    previews, and at checkpoints if that takes little time."""
    checkpoint_seconds: float = 120.0
    """Seconds between checkpoints. A kill loses at most this much work."""
    keep_every: int = 0
    """Images between checkpoints that are kept forever. 0 for none. The two newest checkpoints and the one
    with the lowest validation loss are always kept."""
    skip: tuple[str, ...] = ()
    """Names of images to leave out of training, as log.jsonl and messages give them. The next image takes the
    place of each. The order of the others does not change."""
    log_every: int = 10
    """Updates between lines in log.jsonl."""
    workers: int = 1
    """Processes that load images. 0 loads them in the training process."""
    storage: Storage = "float32"
    """How the weights in RUN/model are stored. Training always keeps fp32 weights in its checkpoints."""
    max_shard_size: str = ""
    """Size limit of the weight files in RUN/model, such as 16MB or 16MiB. Larger files are split into shards.
    Empty for no limit."""

    def __post_init__(self) -> None:
        for name in ("stages", "fresh"):
            object.__setattr__(self, name, tuple(map(short_name, getattr(self, name))))
        self._select_phases()
        object.__setattr__(self, "precision", _SHORT_PRECISIONS.get(self.precision, self.precision))
        positive = ("statistics_images", "prior_steps", "decoder_steps", "log_every")
        others = (
            "seed",
            "workers",
            "preview_every",
            "validate_every",
            "keep_every",
            "prepared_images",
            "fit_images",
        )
        for name, least in (*((n, 1) for n in positive), *((n, 0) for n in others)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        Sampling(
            guidance=self.prior_guidance,
            guidance_interval=self.prior_guidance_interval,
            prior_steps=self.prior_steps,
            prior_sampler=self.prior_sampler or None,
            decoder_steps=self.decoder_steps,
            decoder_guidance=self.decoder_guidance,
            decoder_shift=self.decoder_shift,
        )  # refuses invalid sampling settings before anything is trained
        if self.prior_sampler and SAMPLERS[self.prior_sampler].for_students:
            raise UserError(
                f"prior_sampler must be a sampler of the prior itself, got {self.prior_sampler!r}, which is "
                "for its student. Leave it out: a model with a student samples with it by default."
            )
        if not self.checkpoint_seconds >= 0:
            raise UserError(
                f"checkpoint_seconds must be at least 0, got {self.checkpoint_seconds}. 120 is common."
            )
        if not 0 <= self.held_out <= 0.5:
            raise UserError(f"held_out must be between 0 and 0.5, got {self.held_out}. 0.15 is common.")
        if not 0.25 <= self.view_scale <= 4:
            raise UserError(
                f"view_scale must be between 0.25 and 4, got {self.view_scale}. Use 0.75 as published."
            )
        if not 0 <= self.mirrored <= 1:
            raise UserError(f"mirrored must be between 0 and 1, got {self.mirrored}. 0.5 is common.")
        check_side(self.image_size)
        if self.max_shard_size:
            size_in_bytes(self.max_shard_size)
        self._check_stages()
        self._check_optimizers()
        channels = self.compressor.c_latent
        if not channels == self.prior.c_in == self.decoder.effnet_embd == self.previewer.c_in:
            raise UserError(
                f"the semantic latents have {channels} channels in compressor.c_latent, "
                f"{self.prior.c_in} in prior.c_in, {self.decoder.effnet_embd} in decoder.effnet_embd and "
                f"{self.previewer.c_in} in previewer.c_in. All four must be equal."
            )
        self._check_learnable()
        check_prediction(self.prior.prediction)
        if self.prior_sampler and self.trains("c"):
            kind = self.prior.prediction
            check_compatible(self.prior_sampler, kind, make_objective(kind).path)
        decoder_kind(self.decoder).check(self)
        self._check_sizes()

    def _check_learnable(self) -> None:
        """Refuses networks that can sample but not train: no timestep embedding, or a dropout of 1."""
        for part, network in (("prior", self.prior), ("decoder", self.decoder)):
            if network.c_r < 4:
                raise UserError(f"{part}.c_r must be at least 4 to train, got {network.c_r}.")
            rates = network.dropout if isinstance(network.dropout, tuple) else (network.dropout,)
            if max(rates) == 1:
                raise UserError(
                    f"{part}.dropout must be below 1 to train, got {network.dropout}. 0.1 is common."
                )

    def trains(self, stage: str) -> bool:
        """Whether the recipe trains the stage with this short or full name."""
        return short_name(stage) in self.stages

    def selects(self, phase: str) -> bool:
        """Whether ``only`` includes the phase with this name."""
        return not self.only or phase in self.only

    def _select_phases(self) -> None:
        """Reduces ``stages`` and ``fresh`` to those of the phases in ``only``."""
        if not self.only:
            return
        phases = [(p.name, k.short) for k in kinds() if k.short in self.stages for p in k.phases(self)]
        order = [name for name, _ in phases]
        first = order.index(self.only[0]) if self.only[0] in order else 0
        if list(self.only) != order[first : first + len(self.only)]:
            raise UserError(
                f"only must name consecutive phases of the recipe, got {' '.join(self.only)}. Its phases are "
                f"{' '.join(order)}."
            )
        stages = dict.fromkeys(short for name, short in phases if name in self.only)
        firsts = {short: name for name, short in reversed(phases)}
        # What comes after the first phase of a stage continues its weights.
        unused = {stage for stage in self.stages if stage not in stages or firsts[stage] not in self.only}
        object.__setattr__(self, "stages", tuple(s for s in self.stages if s in stages))
        object.__setattr__(self, "fresh", tuple(s for s in self.fresh if s not in unused))

    def _check_stages(self) -> None:
        order = [kind.short for kind in selectable()]
        trained = [stage for stage in order if stage in self.stages]
        known = bool(trained) and list(self.stages) == trained
        ahead = {kind.short for kind in needed_before(self)} if known else set()
        behind = {kind.short for kind in after(trained)} if known and not self.only else set()
        phases = set() if known else {phase.name for kind in kinds() for phase in kind.phases(self)}
        if later := [stage for stage in self.stages if stage in phases - {*order}]:
            raise UserError(
                f"stages must name whole stages, got {later[0]}, a phase of a stage. Use --only "
                f"{' '.join(self.stages)} to train it alone."
            )
        if not known or ahead & behind:
            raise UserError(
                f"stages must be consecutive, got {' '.join(self.stages) or 'none'}. Use a b c, a, a b, b, "
                f"b c or c{_others(order)}."
            )
        left_out = [stage for stage in order if stage in ahead]
        if left_out and not self.start_from:
            raise UserError(
                f"{'only' if self.only else 'stages'}={' '.join(self.only or self.stages)} builds on "
                f"{' and '.join(left_out)}, which this run neither trains nor starts from. Use --start-from "
                "MODEL, or train them too."
            )
        for stage in self.fresh:
            if stage not in self.stages:
                raise UserError(f"fresh must name trained stages, got {stage}. Add it to stages.")
        if "a" in self.stages and self.stage_a.refine_images and "b" not in self.stages and not self.only:
            raise UserError(
                "stage_a.refine_images needs Stage B to be trained in the same run. Train b too, or use 0."
            )

    def _check_optimizers(self) -> None:
        stages = [getattr(self, name) for name in dict.fromkeys(kind.config for kind in kinds())]
        every = [stage.optimization for stage in stages]
        every += [phase.optimization for stage in stages for phase in getattr(stage, "phases", ())]
        if self.sharding == "full" and any(o.optimizer == "muon" for o in every):
            raise UserError(
                "optimizer=muon needs whole matrices, and sharding=full splits them across processes. "
                "Use --sharding none or optimizer=adamw."
            )
        phases = [phase for kind in kinds() if kind.short in self.stages for phase in kind.phases(self)]
        trained = (phase.phase.optimization for phase in phases if self.selects(phase.name))
        check_memory(self.memory, self.stages, self.precision, self.sharding, trained)

    def _check_sizes(self) -> None:
        """Checks the image sizes of the trained stages."""
        if "a" in self.stages:
            self._check_crop()
        multiple = self.vqgan.factor * self.decoder.size_multiple
        if "b" in self.stages:
            for phase in phases_of(self.stage_b):
                size = phase.image_size or self.image_size
                if size % multiple:
                    raise UserError(
                        f"image_size={size} gives latents of side {size // self.vqgan.factor}. The decoder's "
                        f"levels need a multiple of {self.decoder.size_multiple}. Use fewer levels."
                    )
        if self.prepared_images:
            for config in (self.stage_b, self.stage_c):
                if any(phase.max_ratio > 1 for phase in phases_of(config)):
                    raise UserError("prepared_images can only hold square images. Use 0, or max_ratio=1.")

    def _check_crop(self) -> None:
        size = self.stage_a.image_size or self.image_size
        crop = self.stage_a.crop or size
        least = 2**self.stage_a.discriminator_depth + 1
        if self.stage_a.adversarial_weight > 0 and crop < least:
            raise UserError(
                f"stage_a.crop must be at least {least} for a discriminator of depth "
                f"{self.stage_a.discriminator_depth}, got {crop}. Use a larger crop or a smaller depth."
            )
        if crop > size or crop % self.vqgan.factor:
            raise UserError(
                f"stage_a.crop must be a multiple of {self.vqgan.factor} and at most image_size={size}, got "
                f"{crop}. Use {size}."
            )


def with_time_densities(recipe: Recipe) -> Recipe:
    """The recipe with the objective's own ``time_density`` in place of None."""
    changes: dict[str, StageBConfig | StageCConfig] = {}
    for name, network in (("stage_b", recipe.decoder), ("stage_c", recipe.prior)):
        config = getattr(recipe, name)
        if config.time_density is None:
            density = default_time_density(getattr(network, "prediction", "noise"))
            changes[name] = dataclasses.replace(config, time_density=density)
    return dataclasses.replace(recipe, **changes) if changes else recipe


def as_dict(recipe: Recipe) -> dict:
    """The recipe as a dictionary for JSON, with lists in place of tuples."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    result = plain(dataclasses.asdict(recipe))
    assert isinstance(result, dict)
    return result

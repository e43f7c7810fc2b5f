"""What a training run is told: frozen dataclasses, nothing else. A recipe is a function that returns one."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from wuerstchen.diffusion.objective import check_prediction
from wuerstchen.errors import UserError
from wuerstchen.models.compressor import CompressorConfig
from wuerstchen.models.decoder import DecoderConfig
from wuerstchen.models.paella import PaellaConfig
from wuerstchen.models.previewer import PreviewerConfig
from wuerstchen.models.prior import PriorConfig
from wuerstchen.models.vqgan import VQGANConfig
from wuerstchen.pipeline import Sampling
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
from wuerstchen.train.stage_table import after, before, kinds, selectable, short_name

__all__ = [
    "FREE_FIELDS",
    "Optimization",
    "Phase",
    "Recipe",
    "StageAConfig",
    "StageBConfig",
    "StageCConfig",
    "StoredTexts",
    "as_dict",
    "differing_fields",
    "phases_of",
    "refining",
    "with_phase",
]
"""All that recipes are made of comes from here."""


def _others(order: list[str]) -> str:
    """Further stages that can be given, in words."""
    more = [stage for stage in order if stage not in ("a", "b", "c")]
    return f", or one of {', '.join(more)}" if more else ""


def with_phase(recipe: "Recipe", stage: str) -> "Recipe":
    """The recipe with another phase at the end of Stage ``b`` or ``c``, a copy of the last one."""
    name = f"stage_{stage}"
    config = getattr(recipe, name)
    phases = (*config.phases, phases_of(config)[-1])
    return dataclasses.replace(recipe, **{name: dataclasses.replace(config, phases=phases)})


_SHORT_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
StoredTexts = Literal["tokens", "states"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run: three networks, their stages, the data, and what to watch on the way."""

    name: str
    data: str
    """``sample`` for the sample in the package, a folder of images with captions, tars (WebDataset), parquet
    files, a folder that ``save_to_disk`` wrote, a name on the hub, a built emoji set, or for Stage C alone a
    prepared set."""
    image_column: str = ""
    """The column of the images in the data, or of the names of their files; of tars their extension. Empty
    for the first of the usual names."""
    text_column: str = ""
    """The column of the captions in the data; of tars and text files their extension. Empty for the first of
    the usual names."""
    image_size: int
    """Side of the pictures that the model draws, in pixels, a multiple of 128. Stages are trained on this
    size where they name no other."""
    seed: int = 0
    stages: tuple[str, ...] = ("a", "b", "c")
    """The stages that are trained, in order, by their short or full names (``train.stage_table``); the others
    are ``start_from``'s."""
    start_from: str = ""
    """A model to start from: a folder, a file, or a name on the hub, in any layout. Empty for none."""
    fresh: tuple[str, ...] = ()
    """Trained stages that begin with random weights although there is a start."""
    text_encoder: str = ""
    """Where the text encoder of Stage C comes from: a folder, or a name on the hub. Empty for the start's, or
    without one the small one in the package."""
    decoder_text_encoder: str = ""
    """Likewise that of Stage B, if it reads text; empty for the start's, or else that of Stage C."""
    text_positions: Literal["real", "all"] = "real"
    """Which states of a text are attended to: ``all`` are with those of padding, as in the published
    models."""
    stored_texts: StoredTexts = "tokens"
    """What is read of the texts in a prepared set: token ids, which the text encoder reads anew, or the
    states that it has made."""
    vqgan: VQGANConfig
    compressor: CompressorConfig
    previewer: PreviewerConfig = field(default_factory=PreviewerConfig)
    decoder: DecoderConfig | PaellaConfig
    """Stage B: of v2, on latents, or of v1, on tokens."""
    prior: PriorConfig
    stage_a: StageAConfig
    stage_b: StageBConfig
    stage_c: StageCConfig
    statistics_images: int = 1024
    """Images over which the scale of the latents and the map's mean and deviation are measured."""
    view_scale: float = 0.75
    """Side of the compressor's view over the image's; 0.75 as published. The semantic latents have a position
    for every 32 pixels of the view."""
    prior_steps: int = 29
    prior_guidance: float = 4.0
    decoder_steps: int = 12
    decoder_guidance: float = 1.0
    """How strictly Stage B keeps to the map; 1 is no guidance, as published."""
    decoder_shift: float = 1.0
    """How far Stage B's steps lean towards noise when it draws; 1 is equal steps, as published."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "float32", "bfloat16", "float16"] = "auto"
    """bf16 is autocast over fp32 weights, and so is fp16, with scaled losses. auto takes bf16 on a GPU, or
    fp16 where it has no bf16. float32, bfloat16 and float16 are the same by the names that other commands
    use."""
    acceleration: Literal["auto", "none", "compile", "graph"] = "auto"
    """``compile`` compiles the networks' blocks; ``graph`` also records an update once and replays it as a
    CUDA graph, gradients' travel between processes included. auto takes graph on GPUs, compile where networks
    are sharded, and none elsewhere."""
    sharding: Literal["none", "full"] = "none"
    """What several processes share beside the batches. ``full``: weights, averages and optimizer states of
    Stages B (of v2) and C too, each holds its part (FSDP2). Stage A, the discriminator and the previewer,
    less than a fiftieth of that, stay whole. With one process there is nothing to share."""
    recompute: Literal["none", "blocks"] = "none"
    """``blocks`` keeps only what enters each block and computes the rest again for the gradients: less
    memory, a third more computation, the same gradients."""
    prepared_images: int = 0
    """Pictures composed once at the start and held on the device with what the frozen networks make of them,
    to train on; 0 composes every picture anew. One of 256 pixels takes 0.2 MB, with the latents for Stage B
    0.26 MB."""
    preview_prompts: tuple[str, ...] = ()
    """Prompts of the preview grid of Stage C, fixed for the whole run; empty for captions of the data."""
    preview_every: int = 0
    """Images between previews; 0 for one at the end of each stage."""
    checkpoint_seconds: float = 120.0
    """Time between checkpoints: what a kill costs at most."""
    keep_every: int = 0
    """Images between checkpoints that are never removed; 0 for none. Always kept are the two newest and the
    one with the lowest validation loss."""
    skip: tuple[str, ...] = ()
    """Names of images that are left out of training, as log.jsonl and messages name them. Their successors
    take their places; all else stays in its order."""
    log_every: int = 10
    """Updates between lines in log.jsonl."""
    workers: int = 1
    """Processes that load pictures; 0 loads them in the training process."""

    def __post_init__(self) -> None:
        for name in ("stages", "fresh"):
            object.__setattr__(self, name, tuple(map(short_name, getattr(self, name))))
        object.__setattr__(self, "precision", _SHORT_PRECISIONS.get(self.precision, self.precision))
        positive = ("statistics_images", "prior_steps", "decoder_steps", "log_every")
        others = ("seed", "workers", "preview_every", "keep_every", "prepared_images")
        for name, least in (*((n, 1) for n in positive), *((n, 0) for n in others)):
            if getattr(self, name) < least:
                raise UserError(
                    f"{name}={getattr(self, name)} must be at least {least}; give a larger number"
                )
        Sampling(
            guidance=self.prior_guidance,
            prior_steps=self.prior_steps,
            decoder_steps=self.decoder_steps,
            decoder_guidance=self.decoder_guidance,
            decoder_shift=self.decoder_shift,
        )  # refuses what cannot be sampled with, before anything is trained
        if not self.checkpoint_seconds >= 0:
            raise UserError(f"checkpoint_seconds={self.checkpoint_seconds} must be at least 0; 120 is common")
        if not 0.25 <= self.view_scale <= 4:
            raise UserError(
                f"view_scale must be from 0.25 to 4, got {self.view_scale}. Use 0.75 as published."
            )
        check_side(self.image_size)
        self._check_stages()
        self._check_optimizers()
        channels = self.compressor.c_latent
        if not channels == self.prior.c_in == self.decoder.effnet_embd == self.previewer.c_in:
            raise UserError(
                f"the map has {channels} channels in compressor.c_latent, {self.prior.c_in} in prior.c_in, "
                f"{self.decoder.effnet_embd} in decoder.effnet_embd and {self.previewer.c_in} in "
                "previewer.c_in; give all four the same number"
            )
        self._check_learnable()
        check_prediction(self.prior.prediction)
        decoder_kind(self.decoder).check(self)
        self._check_sizes()

    def _check_learnable(self) -> None:
        """Models of others may run without a timestep, or with all of a layer dropped. None can learn so."""
        for part, network in (("prior", self.prior), ("decoder", self.decoder)):
            if network.c_r < 4:
                raise UserError(f"{part}.c_r={network.c_r} leaves no frequencies; use at least 4")
            every = network.dropout if isinstance(network.dropout, tuple) else (network.dropout,)
            if max(every) == 1:
                raise UserError(f"{part}.dropout={network.dropout} must be below 1 to train; 0.1 is common")

    def trains(self, stage: str) -> bool:
        """Whether the stage with this short or full name is trained."""
        return short_name(stage) in self.stages

    def _check_stages(self) -> None:
        order = [kind.short for kind in selectable()]
        trained = [stage for stage in order if stage in self.stages]
        known = bool(trained) and list(self.stages) == trained
        ahead = {kind.short for kind in before(trained)} - {*trained} if known else set()
        behind = {kind.short for kind in after(trained)} if known else set()
        if not known or ahead & behind:
            raise UserError(
                f"stages={' '.join(self.stages) or 'none'} must follow one another; give a b c, a, a b, "
                f"b, b c or c{_others(order)}"
            )
        left_out = [stage for stage in order if stage in ahead]
        if left_out and not self.start_from:
            raise UserError(
                f"stages={' '.join(self.stages)} builds on {' and '.join(left_out)}, which no start gives; "
                "name a model as start, or train them too"
            )
        for stage in self.fresh:
            if stage not in self.stages:
                raise UserError(f"fresh={stage} is no stage that is trained; add it to stages")
        if "a" in self.stages and self.stage_a.refine_images and "b" not in self.stages:
            raise UserError("stage_a.refine_images needs a Stage B of the same run; train b too, or give 0")

    def _check_optimizers(self) -> None:
        stages = [getattr(self, name) for name in dict.fromkeys(kind.config for kind in kinds())]
        every = [stage.optimization for stage in stages]
        every += [phase.optimization for stage in stages for phase in getattr(stage, "phases", ())]
        if self.sharding == "full" and any(o.optimizer == "muon" for o in every):
            raise UserError(
                "optimizer=muon needs whole matrices, and sharding=full splits them between processes. "
                "Use --sharding none or optimizer=adamw."
            )

    def _check_sizes(self) -> None:
        """Of the stages that are trained."""
        if "a" in self.stages:
            self._check_crop()
        multiple = self.vqgan.factor * self.decoder.size_multiple
        if "b" in self.stages:
            for phase in phases_of(self.stage_b):
                size = phase.image_size or self.image_size
                if size % multiple:
                    raise UserError(
                        f"image_size={size} gives latents of {size // self.vqgan.factor}, no multiple of "
                        f"{self.decoder.size_multiple} as the decoder's levels need; use fewer levels"
                    )
        if self.prepared_images:
            for config in (self.stage_b, self.stage_c):
                if any(phase.max_ratio > 1 for phase in phases_of(config)):
                    raise UserError("prepared_images holds squares alone; give 0, or max_ratio=1")

    def _check_crop(self) -> None:
        size = self.stage_a.image_size or self.image_size
        crop = self.stage_a.crop or size
        least = 2**self.stage_a.discriminator_depth + 1
        if self.stage_a.adversarial_weight > 0 and crop < least:
            raise UserError(
                f"stage_a.crop={crop} is too small for a discriminator of depth "
                f"{self.stage_a.discriminator_depth}, which needs {least}; use a larger crop or less depth"
            )
        if crop > size or crop % self.vqgan.factor:
            raise UserError(
                f"stage_a.crop={crop} must be a multiple of {self.vqgan.factor} and at most image_size="
                f"{size}; use {size}"
            )


FREE_FIELDS = frozenset(
    {
        "data",
        "start_from",
        "workers",
        "checkpoint_seconds",
        "log_every",
        "preview_every",
        "preview_prompts",
        "keep_every",
        "acceleration",
        "sharding",
        "recompute",
    }
)
"""What may change between the starts of a run, because the result does not depend on it: bit for bit, or, as
with ``acceleration``, ``sharding`` and the number of processes, to rounding. ``data`` and ``start_from`` are
only places: what is in them has a fingerprint."""


_ADDED = {
    "stage_b.max_ratio": 1.0,
    "stage_c.max_ratio": 1.0,
    "stage_b.time_density": "logit_normal",
    "stage_c.time_density": "logit_normal",
    "image_column": "",
    "text_column": "",
}
"""Fields that runs of earlier versions lack, with what they did."""


def differing_fields(stored: dict, given: dict, prefix: str = "") -> list[str]:
    """The fields in which two resolved recipes differ, with both values if short; not ``FREE_FIELDS``, nor
    those of a Stage A that is not trained."""
    names = []
    for key in sorted(stored.keys() | given.keys()):
        if not prefix and (key in FREE_FIELDS or (key == "stage_a" and "a" not in given.get("stages", "a"))):
            continue
        a, b = stored.get(key, _ADDED.get(f"{prefix}{key}")), given.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            names += differing_fields(a, b, f"{prefix}{key}.")
        elif key == "phases" and isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            for number, (one, other) in enumerate(zip(a, b, strict=True)):
                names += differing_fields(one, other, f"{prefix}{key}.{number}.")
        elif a != b:
            values = f" ({a}, now {b})"
            names.append(f"{prefix}{key}{values if len(values) < 40 else ''}")
    return names


def as_dict(recipe: Recipe) -> dict:
    """The resolved recipe as JSON holds it: tuples are lists."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    result = plain(dataclasses.asdict(recipe))
    assert isinstance(result, dict)
    return result

"""Reads the networks that a run starts from, or that it uses without training them.

The model to start from may be incomplete, and in any layout. Networks that do not fit the recipe are refused
here, before anything is trained.
"""

import dataclasses
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from wuerstchen.checkpoints.adapters import is_adapter
from wuerstchen.checkpoints.backbones import lite0_path, load_backbone
from wuerstchen.checkpoints.compressors import (
    PUBLISHED_COMPRESSOR,
    check_scale,
    fits_published,
    read_compressor,
    read_published_compressor,
)
from wuerstchen.checkpoints.hub import local_folder
from wuerstchen.checkpoints.layouts import read_incomplete
from wuerstchen.checkpoints.native import Provenance, text_encoder_folder
from wuerstchen.checkpoints.original import PUBLISHED_TEXT_ENCODERS
from wuerstchen.checkpoints.text_encoder import read_text_encoder
from wuerstchen.errors import CheckpointError, UserError
from wuerstchen.models.cascade import Cascade, CascadeSettings, OptionalParts
from wuerstchen.models.compressor import Compressor
from wuerstchen.models.decoder import Decoder
from wuerstchen.models.paella import Paella
from wuerstchen.models.text import TextEncoder
from wuerstchen.models.vqgan import VQGAN
from wuerstchen.pipeline import BUNDLED
from wuerstchen.train.config import Recipe
from wuerstchen.train.decoder_kinds import decoder_kind
from wuerstchen.train.stage_table import (
    continued,
    invalidated,
    maker_of,
    needed_before,
    result_of,
    selectable,
    trained_kinds,
)

TEXT_ENCODER = BUNDLED / "text_encoder"
_FREE_CONFIG = {"dropout", "scale_factor"}  # do not change the shapes of weights


@dataclass(kw_only=True)
class Parts(OptionalParts):
    """The networks of a model that may still lack Stages A and B, without which there is no ``Cascade``."""

    vqgan: VQGAN | None = None
    decoder: Decoder | Paella | None = None

    order: ClassVar[tuple[str, ...]] = (
        *("vqgan", "decoder", "compressor", "previewer", "prior", "prior_student"),
        "decoder_student",
        *("text_encoder", "decoder_text_encoder"),
    )
    """The order of ``InitialWeights.fingerprint``, which run folders store."""

    def text_encoder_of_decoder(self) -> TextEncoder | None:
        """The text encoder of Stage B."""
        return self.decoder_text_encoder or self.text_encoder

    def cascade(self, settings: CascadeSettings) -> Cascade:
        """The parts as a model. Stages A and B must exist."""
        return Cascade(settings=settings, **self.networks())  # type: ignore[arg-type]


@dataclass(kw_only=True)
class InitialWeights:
    """What a run starts from."""

    settings: CascadeSettings | None = None
    """The settings of the model to start from. None without a model."""
    parts: Parts = field(default_factory=Parts)
    text_folder: Path | None = None
    """The folder of the text encoder if the model will copy it. None for CLIP, which is written instead."""
    provenance: dict[str, Provenance] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    """Networks of the start model that are not used because they are incompatible with the trained stages."""

    def resolved(self, recipe: Recipe) -> Recipe:
        """The recipe with the shapes of the networks that are not trained, which checks that they fit."""
        parts = self.parts
        shapes: dict[str, Any] = {}
        for kind in selectable():
            for name in kind.makes if kind.short not in recipe.stages else ():
                network = getattr(parts, name)
                if network is not None and hasattr(recipe, name):
                    shapes[name] = network.config
        if not recipe.trains("decoder") and "previewer" not in shapes and parts.compressor is not None:
            channels = parts.compressor.config.c_latent
            shapes["previewer"] = dataclasses.replace(recipe.previewer, c_in=channels)
        if self.settings is not None and not recipe.trains("decoder"):
            shapes["view_scale"] = self.settings.view_scale
        if self.settings is not None and result_of(recipe):
            shapes["image_size"] = self.settings.image_size
            shapes["text_positions"] = _positions(self.settings)
        return dataclasses.replace(recipe, **shapes)

    def fingerprint(self) -> str:
        """A checksum of all weights. Empty if there are none."""
        checksum, found = 0, False
        for network in self.parts.networks().values():
            for tensor in network.state_dict().values():
                plain = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
                found, checksum = True, zlib.crc32(plain.numpy(), checksum)
        return f"{checksum:08x}" if found else ""


def read_start(recipe: Recipe) -> InitialWeights:
    """Reads the networks that a recipe starts from onto the CPU, and checks that they fit.

    Raises ``UserError`` naming the field, and ``CheckpointError`` for files that cannot be read.
    """
    start = InitialWeights()
    given: dict[str, Any] = {}
    if recipe.start_from:
        folder = local_folder(recipe.start_from)
        try:
            start.settings, given, start.provenance = read_incomplete(folder)
        except CheckpointError as error:
            if is_adapter(folder):
                raise UserError(
                    f"start_from={recipe.start_from} is an adapter, not a model. Use --start-from with the "
                    "model that it was trained on."
                ) from error
            raise
        if "text_encoder" in given:
            start.text_folder = text_encoder_folder(folder)
    origin = Provenance(recipe=f"taken from {Path(recipe.start_from).name}", seed=0, images=0, data="")
    unfit = {kind.short for kind in invalidated(recipe)}
    for name, network in given.items():
        maker = maker_of(name)
        if maker is None or maker.short in recipe.fresh:
            continue
        if maker.short in unfit:
            start.left_out += (name,)  # it was trained on other inputs
        else:
            setattr(start.parts, name, network.requires_grad_(False))
            start.provenance.setdefault(name, origin)
    _take_compressor(recipe, start)
    _check_networks(recipe, start)
    _check_view(recipe, start)
    _take_text_encoders(recipe, start, given)
    _check_text(recipe, start)
    return start


def _take_compressor(recipe: Recipe, start: InitialWeights) -> None:
    """Takes the compressor from ``compressor_init``, if that has a complete one and the start has none.

    Without ``compressor_init``, a start like the published v2 takes the published one.
    """
    named, parts = recipe.stage_b.compressor_init, start.parts
    if parts.compressor is not None or "b" in recipe.fresh or not recipe.start_from:
        return
    trained = recipe.trains("decoder")
    if named:
        found = read_compressor(named)
    elif not trained and start.settings is not None and fits_published(parts.decoder, start.settings):
        named, found = PUBLISHED_COMPRESSOR, read_published_compressor()
    else:
        return
    if found is not None:
        if not trained and start.settings is not None:
            check_scale(found, start.settings.latent_statistics, named)
        parts.compressor = found.requires_grad_(False)
        origin = Provenance(recipe=f"taken from {Path(named).name}", seed=0, images=0, data="")
        start.provenance["compressor"] = origin


def fill_compressor(recipe: Recipe, compressor: Compressor) -> None:
    """Loads the initial weights of a compressor: those of a complete compressor, or those of its backbone."""
    named, backbone = recipe.stage_b.compressor_init, recipe.compressor.backbone
    if not named and backbone != "efficientnet_lite0":
        raise UserError(
            f"{backbone} needs pretrained weights to start from. Use --compressor-init FILE with "
            "torchvision's .pth or timm's .safetensors, or with the original's file of Stage B."
        )
    complete = read_compressor(named) if named else None
    if complete is None:
        load_backbone(compressor.backbone, Path(named) if named else lite0_path())
        return
    _check_config("compressor", recipe.compressor, complete.config, named)
    compressor.load_state_dict(complete.state_dict())


def _check_networks(recipe: Recipe, start: InitialWeights) -> None:
    parts = start.parts
    used = {kind.short for kind in needed_before(recipe)} | {*recipe.stages}
    begun = {*recipe.stages} - continued(recipe)
    for kind in selectable():
        stage = kind.short
        if stage not in used or stage in recipe.fresh or not recipe.start_from:
            continue
        if recipe.only and stage in begun and all(getattr(parts, name) is None for name in kind.makes):
            continue  # its first phase starts from random weights, as in a run of the whole recipe
        for name in kind.makes:
            if name in kind.optional or getattr(parts, name) is not None:
                continue
            if name == "compressor":
                fix = f"Use --compressor-init with {PUBLISHED_COMPRESSOR} or the original's file of Stage B"
            elif stage in begun:
                fix = f"Use --fresh {stage} to train it from random weights, or another --start-from"
            elif recipe.only:
                fix = "Use a --start-from that has it"
            else:
                fix = f"Use a --start-from that has it, or train Stage {stage.upper()} too"
            raise UserError(f"start_from={recipe.start_from} has no {name}. {fix}.")
    decoder = parts.decoder
    if recipe.trains("decoder") and decoder is not None:
        has, wants = decoder_kind(decoder.config), decoder_kind(recipe.decoder)
        if has is not wants:
            raise UserError(
                f"start_from={recipe.start_from} has a {has.version} Stage B, which works on "
                f"{has.works_on}, but the recipe trains a {wants.version} Stage B, which works on "
                f"{wants.works_on}. Use --fresh b, or start from a {wants.version} model."
            )
    for name in [name for kind in selectable() if kind.short in recipe.stages for name in kind.makes]:
        network = getattr(parts, name)
        if network is not None and hasattr(recipe, name):  # a student has no configuration of its own
            _check_config(name, getattr(recipe, name), network.config, recipe.start_from)


def _check_view(recipe: Recipe, start: InitialWeights) -> None:
    """Raises ``UserError`` if the compressor was trained at another ``view_scale`` and is trained further."""
    trained = recipe.trains("decoder") and start.parts.compressor is not None and start.settings is not None
    if trained and start.settings.view_scale != recipe.view_scale:
        raise UserError(
            f"view_scale is {recipe.view_scale} in the recipe and {start.settings.view_scale} in "
            f"{recipe.start_from}. Trained weights only work at their own scale. Use --view-scale "
            f"{start.settings.view_scale}, or --fresh b."
        )


def _check_config(name: str, ours: object, theirs: object, source: str) -> None:
    """Raises ``UserError`` if the config does not match the weights, and names the options that would."""
    if type(ours) is not type(theirs):
        raise UserError(
            f"the recipe's {name} is a {type(ours).__name__}, but {source} has a {type(theirs).__name__}. "
            "Use another --start-from."
        )
    assert dataclasses.is_dataclass(theirs)
    fields = (f.name for f in dataclasses.fields(theirs) if f.name not in _FREE_CONFIG)
    differing = [f for f in fields if getattr(ours, f) != getattr(theirs, f)]
    if differing:
        found = ", ".join(f"{name}.{f}={getattr(ours, f)}" for f in differing)
        options = " ".join(f"--{name}.{f.replace('_', '-')} {_option(getattr(theirs, f))}" for f in differing)
        raise UserError(f"{found} of the recipe does not match the weights of {source}. Use {options}.")


def _option(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _positions(settings: CascadeSettings) -> Literal["real", "all"]:
    """The ``text_positions`` that the networks of a model were trained with."""
    return "real" if settings.text_mask else "all"


def _take_text_encoders(recipe: Recipe, start: InitialWeights, given: dict[str, Any]) -> None:
    """Loads only the text encoders that the stages read, and that of a prior that stays in the model."""
    parts = start.parts
    if reads_text(recipe, start):
        if recipe.decoder_text_encoder not in ("", recipe.text_encoder):
            parts.decoder_text_encoder = _read_text(recipe.decoder_text_encoder)[0]
        elif not recipe.decoder_text_encoder:
            parts.decoder_text_encoder = given.get("decoder_text_encoder")
    alone = parts.decoder_text_encoder is not None or not reads_text(recipe, start)
    if not reads_captions(recipe) and alone and parts.prior is None:
        start.text_folder = None
        return
    if recipe.text_encoder:
        parts.text_encoder, start.text_folder = _read_text(recipe.text_encoder)
    elif "text_encoder" in given:
        parts.text_encoder = given["text_encoder"]
    elif parts.prior is not None:
        raise UserError(
            f"start_from={recipe.start_from} has a Stage C, but not the text encoder that it was trained "
            "with. Use --text-encoder with a folder that has it."
        )
    else:
        parts.text_encoder, start.text_folder = _read_text(str(TEXT_ENCODER))


def _read_text(named: str) -> tuple[TextEncoder, Path | None]:
    """A text encoder, and its folder if the model will copy it."""
    folder = local_folder(named, only=("text_encoder/*", "tokenizer/*"))
    if (folder / "text_encoder").is_dir() and not (folder / "tokenizer").is_dir():
        folder = folder / "text_encoder"  # of a native model
    encoder = read_text_encoder(folder)
    return encoder, None if encoder.model.config.model_type == "clip_text_model" else folder


def reads_captions(recipe: Recipe) -> bool:
    """Whether a trained stage reads captions with the text encoder of Stage C."""
    return any(kind.reads_captions for kind in trained_kinds(recipe))


def reads_text(recipe: Recipe, start: InitialWeights) -> bool:
    """Whether Stage B of the model reads text. False if the model will have no Stage B."""
    if recipe.trains("decoder"):
        return recipe.decoder.clip_embd is not None
    return start.parts.decoder is not None and start.parts.decoder.config.clip_embd is not None


def _check_text(recipe: Recipe, start: InitialWeights) -> None:
    parts, text = start.parts, start.parts.text_encoder
    of_decoder = parts.text_encoder_of_decoder()
    width = recipe.decoder.clip_embd
    if parts.decoder is not None:
        width = parts.decoder.config.clip_embd
    wanted = []
    if reads_captions(recipe) and text is not None:
        wanted.append(("prior.c_cond", recipe.prior.c_cond, text.width, "--text-encoder"))
    if reads_text(recipe, start) and of_decoder is not None:
        wanted.append(("decoder.clip_embd", width, of_decoder.width, "--decoder-text-encoder"))
    for name, wants, has, option in wanted:
        if wants != has:
            published = PUBLISHED_TEXT_ENCODERS.get(wants or 0)
            other = f"another {option}" if published is None else f"{option} {published}"
            raise UserError(
                f"{name} must be the width of the text encoder's states, {has}, got {wants}. Use {has}, or "
                f"{other}."
            )
    own = parts.decoder_text_encoder
    if own is not None and own.model.config.model_type != "clip_text_model":
        raise UserError(
            "decoder_text_encoder must be a CLIP text encoder. Remove it to use Stage C's text encoder."
        )
    if start.settings is None:
        return
    learnt = _positions(start.settings)
    if result_of(recipe):
        return
    reads = parts.prior is not None or (parts.decoder is not None and reads_text(recipe, start))
    if reads and learnt != recipe.text_positions:
        does = "attend to padding" if learnt == "all" else "do not attend to padding"
        raise UserError(
            f"text_positions={recipe.text_positions} does not fit start_from={recipe.start_from}, whose "
            f"networks {does}. Use {learnt}."
        )

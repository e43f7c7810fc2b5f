"""Text to image. The base class in ``reconstruction`` has everything that needs no Stage C.

prompt → text states → Stage C: semantic latents (b, 16, h, w) → Stage B: latents (b, 4, H, W) → Stage A:
pixels

Images are sampled on a canvas whose size works for all stages, then center-cropped. Networks compute in their
own precision, the diffusion between them in fp32.
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, no_type_check

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from wuerstchen.adapters import ModelAdapters
from wuerstchen.checkpoints.adapter_metadata import AdapterMetadata
from wuerstchen.checkpoints.hub import BUNDLED
from wuerstchen.checkpoints.layouts import Sources, read_model
from wuerstchen.device import Precision, default_device, default_precision, runs_triton, to_device
from wuerstchen.diffusion.known_cells import predict_around
from wuerstchen.diffusion.morphs import mixed
from wuerstchen.diffusion.objective import Objective, predictions_for_sampling
from wuerstchen.diffusion.sampler_table import SAMPLERS
from wuerstchen.diffusion.samplers import Predict, draw_noise, guided, guided_within
from wuerstchen.diffusion.schedule import uniform_timesteps
from wuerstchen.edit_options import EditOptions
from wuerstchen.edits import canvas_of, checked_inits, make_edits
from wuerstchen.errors import UserError, UserNotice, out_of_memory_named
from wuerstchen.images import (
    center_crop,
    pad_to_canvas,
    resize_crop,
    to_images,
    to_tensor,
)
from wuerstchen.models.cascade import Cascade
from wuerstchen.models.prior import Prior
from wuerstchen.models.text import TextStates
from wuerstchen.morphs import MorphRequest, morph_frames
from wuerstchen.progress import StepCallback
from wuerstchen.prompt_weights import parsed
from wuerstchen.reconstruction import Reconstructor, dtype_of, for_inference
from wuerstchen.runtime.offload import LowMemory
from wuerstchen.sampling import (
    ALL_TIMES,
    EDIT,
    Sampling,
    checked_request,
    checked_size,
    checked_strength,
    checked_texts,
    one_for_each,
)
from wuerstchen.sampling import Reconstruction as Reconstruction  # callers import it from here
from wuerstchen.sampling_batch import Begin, Morph, Progress, SamplingBatch, joined_begins, same_size_rows


def load(
    model: str | Path | None = None,
    device: str | torch.device | None = None,
    *,
    precision: Precision | None = None,
    low_memory: LowMemory | None = None,
    sources: Sources | None = None,
) -> "Wuerstchen":
    """Loads a model onto ``device``: by default the bundled model, onto a GPU if there is one.

    ``model`` is a folder in any layout, or a name on the hub. ``sources`` loads individual networks from
    other places. ``precision`` defaults to float16 on CUDA and to float32 elsewhere. Half precision needs
    half the memory. Images in float16 look like those in float32. bfloat16 rounds eight times as coarsely,
    and occasionally an image changes visibly. The bundled model needs no network. Raises ``CheckpointError``
    if the files are damaged or are not a model.
    """
    for name, value, kind in (("precision", precision, Precision), ("low_memory", low_memory, LowMemory)):
        if value is not None and value not in get_args(kind):
            raise UserError(f"{name} must be one of {', '.join(get_args(kind))}, got {value!r}.")
    device = default_device(device)
    precision = precision or default_precision(device)
    if device.type == "cuda" and not runs_triton(device):
        warnings.warn(
            "this GPU or this build of torch does not support Triton. Sampling is correct, "
            "but several times slower. Triton needs a CUDA build of torch for Linux and a "
            "GPU with compute capability 8.0 or higher.",
            UserNotice,
            stacklevel=2,
        )
    cascade = read_model(BUNDLED if model is None else model, sources, dtype=getattr(torch, precision))
    return Wuerstchen(cascade, device, low_memory=low_memory)


class Wuerstchen(Reconstructor):
    """A model that is ready for sampling. ``cascade`` holds its networks."""

    def __init__(
        self, cascade: Cascade, device: torch.device, *, low_memory: LowMemory | None = None
    ) -> None:
        """With ``low_memory``, networks stay on the CPU and are moved to ``device`` while they are in use."""
        super().__init__(cascade, device, low_memory=low_memory)
        self._adapters = ModelAdapters(cascade)

    @no_type_check  # the checks below raise errors that say what to do
    @for_inference
    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        negative: str | Sequence[str] = "",
        seed: int | Sequence[int] = 0,
        count: int = 1,
        size: int | tuple[int, int] | None = None,
        init: Image.Image | Sequence[Image.Image] | None = None,
        mask: Image.Image | Sequence[Image.Image] | None = None,
        extend: Mapping[str, int] | str | None = None,
        crop_to_mask: bool | int = False,
        feather: int | None = None,
        strength: float | None = None,
        detail_seed: int | Sequence[int] | None = None,
        prompt_weights: bool = False,
        sampling: Sampling | None = None,
        batch_size: int = 8,
        progress: Progress | None = None,
        on_step: StepCallback | None = None,
    ) -> list[Image.Image]:
        """Generates ``count`` images for each prompt, in the order of the prompts.

        Image i uses seed ``seed + i``, or ``seed[i]`` if ``seed`` is a list. Each image has its own noise, so
        the same seed gives the same image in any batch, up to rounding. ``detail_seed``, of the same form,
        seeds Stage B alone: other details of the same content. ``size`` is (width, height) in pixels, or one
        number for both, in steps of 8. ``negative`` is the text to steer away from: one for all prompts, or a
        list. With ``prompt_weights``, ``(word:1.3)`` weights a part of a prompt (``prompt_weights``).

        With ``init``, Stage C starts from the semantic latents of that image, noised to the time ``strength``
        in [0, 1], by default 0.7. 0 keeps the latents, so that only details change, and 1 keeps nothing. With
        an empty prompt, this gives variations of the image. It is scaled and cropped to the size. Pass a list
        to use one image per prompt.

        With ``mask`` too, only its white part is repainted, by default with strength 1. Grey pixels have a
        part of the strength. ``extend``, such as ``{"left": 256}``, paints more of the image at its sides.
        The result has the size of the image. ``EditOptions`` describes ``crop_to_mask`` and ``feather``.

        ``on_step`` is called after each step (``wuerstchen.progress``). Raises ``UserError`` for invalid
        arguments.
        """
        texts = checked_texts(prompts)
        seeds = checked_request(texts, seed, count, batch_size)
        negatives = checked_texts(negative, "negative")
        if detail_seed is not None:
            detail_seed = checked_request(texts, detail_seed, count, batch_size, "detail_seed")
        sampling = self._completed(sampling or Sampling(), negatives, init is not None)
        self._check_stage_c()
        is_edit = mask is not None or extend is not None
        strength = checked_strength(strength, is_edit)
        options = EditOptions(extend=extend, crop_to_mask=crop_to_mask, feather=feather)
        inits = checked_inits(init, mask, options)
        edits = self._edited(inits, mask, options, strength, size) if is_edit else None
        begins = self._from_scratch(inits, size) if edits is None else edits
        if prompt_weights:
            texts, negatives = map(parsed, texts), map(parsed, negatives)
        texts, negatives, begins = (
            one_for_each(name, list(values), len(seeds) // int(count), int(count))
            for name, values in (("prompt", texts), ("negative", negatives), ("init", begins))
        )
        images: list[Image.Image] = []
        for rows in same_size_rows(begins, batch_size):
            batch = SamplingBatch(
                prompts=texts[rows],
                negatives=negatives[rows],
                seeds=seeds[rows],
                detail_seeds=None if detail_seed is None else detail_seed[rows],
                sampling=sampling,
                strength=strength,
                progress=progress,
                reporter=self._step_reporter(on_step, begins[rows][0].size, begins[rows][0].canvas),
                **joined_begins(begins[rows]),
            )
            sampled = self._sampled(batch)
            images += [begin.finished(image) for begin, image in zip(begins[rows], sampled, strict=True)]
        return images

    @no_type_check
    @for_inference
    def morph(
        self,
        start: str | Image.Image,
        end: str | Image.Image,
        *,
        frames: int = 16,
        negative: str = "",
        seed: int = 0,
        end_seed: int | None = None,
        size: int | tuple[int, int] | None = None,
        strength: float = 0.6,
        sampling: Sampling | None = None,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> list[Image.Image]:
        """Generates ``frames`` images from one end to another. An end is a prompt or an image.

        Between prompts, each frame mixes the predictions for both. With ``end_seed``, its noise lies between
        that of ``seed`` and that of ``end_seed``: pass the same prompt twice to morph between seeds. If an
        end is an image, frames have semantic latents between those of both ends, noised and sampled again
        with a strength that grows to ``strength`` in the middle. Stage B's noise is the same in all frames.

        The default sampler of Stage C is one without fresh noise, so that neighbors are alike. Raises
        ``UserError`` for invalid arguments.
        """
        return morph_frames(
            self,
            MorphRequest(
                start=start,
                end=end,
                frames=frames,
                negative=negative,
                seed=seed,
                end_seed=end_seed,
                size=size,
                strength=strength,
                sampling=sampling,
                batch_size=batch_size,
                progress=progress,
            ),
        )

    def load_lora(self, source: str | Path, scale: float = 1.0) -> AdapterMetadata:
        """Adds a LoRA adapter to Stage C, and to its text encoder if the file adapts that too.

        ``source`` is a file, a folder with ``pytorch_lora_weights.safetensors``, or a name on the hub.
        Returns the file's description, with its trigger words. Raises ``CheckpointError`` if the adapter does
        not fit this model. On error, the model is unchanged.
        """
        self.residence.release()
        metadata = self._adapters.load(source, scale)
        self._recorders.invalidate()
        return metadata

    def use_loras(self, wanted: Mapping[Path, float]) -> bool:
        """Makes these adapter files the only ones, each with its scale. Returns whether anything changed.

        Adapters are kept in memory after their use (``adapters.ModelAdapters.use``).
        """
        self.residence.release()
        changed = self._adapters.use(wanted)
        if changed:
            self._recorders.invalidate()
        return changed

    def unload_lora(self) -> None:
        """Removes all adapters. The weights are then bit for bit what they were before."""
        self.residence.release()
        self._adapters.unload()
        self._recorders.invalidate()

    def settings_of(
        self, sampling: Sampling, *, negative: str | Sequence[str] = "", edits: bool = False
    ) -> dict[str, Any]:
        """All sampling settings of a request, as they are stored in an image file.

        ``edits`` is whether it starts from an image. For a model with students, ``stage_c`` and ``stage_b``
        say whether the ``student`` or the ``full`` network samples.
        """
        sampling = self._completed(sampling, checked_texts(negative, "negative"), edits)
        settings = dataclasses.asdict(sampling)
        del settings["full"]
        cascade = self.cascade
        if (
            cascade.decoder_student is None
            and sampling.decoder_sampler == cascade.settings.full.decoder_sampler
        ):
            del settings["decoder_sampler"]  # earlier versions do not know it
        for name, network, student in (
            ("stage_c", cascade.prior_for, cascade.prior_student),
            ("stage_b", cascade.decoder_for, cascade.decoder_student),
        ):
            if student is not None:
                settings[name] = "student" if network(sampling) is student else "full"
        return settings

    def _completed(
        self, sampling: Sampling, negatives: Sequence[str], edits: bool, what: str = EDIT
    ) -> Sampling:
        """Complete settings of a request. Students support no negative prompts, no edits and no adapters.

        ``what`` names the edit in messages: ``EDIT`` or ``MORPH``.
        """
        asks = {"a negative prompt": any(map(str.strip, negatives)), what: edits}
        asks["a LoRA adapter"] = bool(self._adapters.scales)
        return self.cascade.completed(sampling, [name for name, asked in asks.items() if asked])

    def _check_stage_c(self) -> None:
        if self.cascade.prior is None or self.cascade.text_encoder is None:
            raise UserError("this model has no Stage C or no text encoder. It can only reconstruct images.")

    def _sampled(self, batch: SamplingBatch) -> list[Image.Image]:
        """The images of a batch, from text to pixels."""
        with out_of_memory_named(batch.describe()):
            text = self._encode_prompts(batch)
            semantic_latents = self._sample_prior(batch, text)
            latents = self._sample_decoder(batch, semantic_latents)
            pixels = self._decode(latents)
            return to_images(center_crop(pixels, batch.size))

    def _from_scratch(self, inits: Sequence[Image.Image], size: Any) -> list[Begin]:
        """One begin for all images without ``inits``, or one for each of them: its latents."""
        size = checked_size(size, self.cascade.settings.image_size)
        canvas = self.cascade.settings.canvas(*size)
        if not inits:
            return [Begin(size=size, canvas=canvas)]
        begins = []
        for image in inits:
            pixels = pad_to_canvas(to_tensor(resize_crop(image, *size))[None], canvas)
            compressor = self._compressor()
            with out_of_memory_named(f"the image at {size[0]}x{size[1]} pixels"):
                z = self.encode(compressor, pixels)
            normalised = self.cascade.settings.latent_statistics.normalise(z)
            begins.append(Begin(size=size, canvas=canvas, init_latents=normalised))
        return begins

    def _edited(
        self,
        inits: Sequence[Image.Image],
        mask: Any,
        options: EditOptions,
        strength: float,
        size: Any,
    ) -> list[Begin]:
        """One begin for each image that is edited."""
        settings = self.cascade.settings
        self._compressor()  # raises before anything is prepared
        if size is not None:
            size = checked_size(size, settings.image_size)
            settings.canvas(*size)  # raises for sides that are not supported
        begins = []
        for edit in make_edits(inits, mask, options, strength, size, settings):
            canvas = canvas_of(edit.size, settings)
            with out_of_memory_named(f"the edit at {edit.size[0]}x{edit.size[1]} pixels"):
                known = self.known_parts(edit, canvas)
            begins.append(Begin(size=edit.size, canvas=canvas, known=known, edit=edit))
        return begins

    def _encode_prompts(self, batch: SamplingBatch) -> TextStates:
        """Stage C's text states of the prompts, of the other prompts of a morph and, with guidance, of the
        negative prompts."""
        assert self.cascade.text_encoder is not None
        guides = batch.sampling.guidance != 1
        texts = batch.prompts + ([] if batch.morph is None else batch.morph.prompts)
        return self._encode_text(self.cascade.text_encoder, texts + (batch.negatives if guides else []))

    def _sample_prior(self, batch: SamplingBatch, text: TextStates) -> Float[Tensor, "b c lh lw"]:
        """Stage C: samples semantic latents from the text states. They are returned in Stage B's units."""
        settings, sampling = self.cascade.settings, batch.sampling
        prior = self.cascade.prior_for(sampling)
        assert sampling.guidance is not None
        assert sampling.guidance_interval is not None
        assert sampling.prior_steps is not None
        assert sampling.prior_sampler is not None
        objective, sampler = settings.prior_objective, SAMPLERS[sampling.prior_sampler]
        if batch.init_latents is not None and batch.strength == 0:
            return settings.latent_statistics.restore(batch.init_latents)

        spaced = uniform_timesteps if settings.prior_equal_steps else sampler.timesteps
        timesteps = spaced(sampling.prior_steps)
        shape = (prior.config.c_in, *settings.latent_size(*batch.canvas))
        noise = draw_noise(shape, batch.generators)
        noise = to_device(noise if batch.morph is None else batch.morph.noise(noise), self.device)
        x, start, known = noise, batch.strength, batch.known
        if known is not None or batch.init_latents is not None:
            timesteps = [start, *(t for t in timesteps if t < start)]
        if batch.init_latents is not None:
            t = torch.full((len(x),), start, dtype=torch.float32, device=self.device)
            x = objective.noised(batch.init_latents, x, t)
        elif known is not None:
            x = known.semantic_latents.begin(noise, objective, start)

        with self.residence.using(prior):
            sampled = objective if sampler.for_students else objective.for_sampling()
            predict = self._predict_semantic_latents(prior, text, sampled, batch.morph)
            steps = len(timesteps) - 1
            on_step = batch.on_step("Stage C", steps)
            if sampling.guidance != 1:
                predict = guided(predict, sampling.guidance)
                if sampling.guidance_interval != ALL_TIMES:
                    rows = len(text.states) - len(x)
                    prompts = TextStates(states=text.states[:rows], mask=text.mask[:rows])
                    unguided = self._predict_semantic_latents(prior, prompts, sampled, batch.morph)
                    interval = sampling.guidance_interval
                    predict, on_step = guided_within(predict, unguided, interval, timesteps, on_step)
            if batch.reporter is not None:
                predict, on_step = batch.reporter.on_semantic_latents(predict, on_step, steps, sampled)
            if known is not None:
                cells = known.semantic_latents
                if settings.prior_known_cells:
                    predict = predict_around(predict, cells.clean, cells.cells)
                on_step = cells.replaced(noise, timesteps, objective, on_step)
            sample = sampler.function(predict, x, timesteps, batch.generators, sampled, on_step)
        return settings.latent_statistics.restore(sample)

    def _predict_semantic_latents(
        self, prior: Prior, text: TextStates, sampled: Objective, morph: Morph | None = None
    ) -> Predict:
        """Stage C for as many rows as ``text`` has, in terms of the objective ``sampled``. With a morph, the
        rows of both prompts become one."""
        settings = self.cascade.settings
        mask = text.mask if settings.text_mask else None
        predictions = predictions_for_sampling(prior, settings.prior_objective, sampled)
        run = self._recorders.of(prior, predictions, prior.context).bind(text.states, mask)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            return run(x.to(dtype_of(prior)), t).float()

        return predict if morph is None else mixed(predict, to_device(morph.weights, self.device))

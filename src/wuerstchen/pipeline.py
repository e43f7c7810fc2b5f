"""Text to image, and image reconstruction.

prompt → text states → Stage C: semantic latents (b, 16, h, w) → Stage B: latents (b, 4, H, W) → Stage A:
pixels

Images are sampled on a canvas whose size works for all stages, then center-cropped. Networks compute in their
own precision, the diffusion between them in fp32.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, no_type_check

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from wuerstchen.checkpoints.hub import BUNDLED
from wuerstchen.checkpoints.layouts import Sources, read_model
from wuerstchen.device import Precision, default_device, default_precision, runs_triton, to_device
from wuerstchen.diffusion.objective import predictions_for_sampling
from wuerstchen.diffusion.sampler_table import SAMPLERS, samplers_for
from wuerstchen.diffusion.samplers import Predict, draw_noise, guided, guided_within
from wuerstchen.diffusion.schedule import uniform_timesteps
from wuerstchen.diffusion.tokens import draw_tokens, sample_tokens
from wuerstchen.errors import UserError, UserNotice, out_of_memory_named
from wuerstchen.images import (
    center_crop,
    center_crop_resize,
    pad_to_canvas,
    resize_crop,
    to_images,
    to_tensor,
    upright_rgb,
)
from wuerstchen.lora import load_lora, lora_names, set_lora, unload_lora
from wuerstchen.models.cascade import Cascade
from wuerstchen.models.compressor import Compressor, compressor_input
from wuerstchen.models.decoder import Decoder
from wuerstchen.models.paella import Paella
from wuerstchen.models.prior import Prior
from wuerstchen.models.text import TextEncoder, TextStates
from wuerstchen.progress import StepCallback, StepReporter
from wuerstchen.runtime.offload import LowMemory, residence_on, tiled_decode
from wuerstchen.runtime.recorder import Recorders
from wuerstchen.sampling import (
    ALL_TIMES,
    Reconstruction,
    Sampling,
    checked_request,
    checked_size,
    checked_texts,
    one_for_each,
)
from wuerstchen.sampling_batch import Progress, SamplingBatch

_Method = TypeVar("_Method", bound=Callable[..., Any])


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


def _for_inference(method: _Method) -> _Method:
    """Runs without gradients or a caller's autocast. Accepts ``watch``, the former name of ``on_step``."""

    @functools.wraps(method)
    def run(self: "Wuerstchen", *arguments: Any, **options: Any) -> Any:
        watch = options.pop("watch", None)
        if watch is not None:
            options.setdefault("on_step", watch)
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            return method(self, *arguments, **options)

    return cast(_Method, run)


class Wuerstchen:
    """A model that is ready for sampling. ``cascade`` holds its networks."""

    def __init__(
        self, cascade: Cascade, device: torch.device, *, low_memory: LowMemory | None = None
    ) -> None:
        """With ``low_memory``, networks stay on the CPU and are moved to ``device`` while they are in use."""
        self.cascade = cascade
        self.device = device
        self.low_memory = low_memory
        self._loras: dict[str, float] = {}
        self._recorders = Recorders(records=low_memory is None)
        self.residence = residence_on(device, low_memory)
        for network in cascade.networks().values():
            network.eval()
            if low_memory is None:
                network.to(device)

    @no_type_check  # the checks below raise errors that say what to do
    @_for_inference
    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        negative: str | Sequence[str] = "",
        seed: int | Sequence[int] = 0,
        count: int = 1,
        size: int | tuple[int, int] | None = None,
        init: Image.Image | Sequence[Image.Image] | None = None,
        strength: float = 0.7,
        sampling: Sampling | None = None,
        batch_size: int = 8,
        progress: Progress | None = None,
        on_step: StepCallback | None = None,
    ) -> list[Image.Image]:
        """Generates ``count`` images for each prompt, in the order of the prompts.

        Image i uses seed ``seed + i``, or ``seed[i]`` if ``seed`` is a list. Each image has its own noise, so
        the same seed gives the same image in any batch, up to rounding. ``size`` is (width, height) in
        pixels, or one number for both, in steps of 8. ``negative`` is the text to steer away from: one for
        all prompts, or a list with one for each.

        With ``init``, Stage C starts from the semantic latents of that image, noised to the time ``strength``
        in (0, 1]. Small values keep its composition, 1 keeps nothing. With an empty prompt, this gives
        variations of the image. The image is scaled and cropped to the size. Pass a list to use one image
        per prompt. ``on_step`` is called after each step (``wuerstchen.progress``). Raises ``UserError`` for
        invalid arguments.
        """
        prompts = checked_texts(prompts)
        negatives = checked_texts(negative, "negative")
        sampling = self.cascade.settings.completed(sampling or Sampling())
        size = checked_size(size, self.cascade.settings.image_size)
        canvas = self.cascade.settings.canvas(*size)
        seeds = checked_request(prompts, seed, count, batch_size)
        count = int(count)
        negatives = one_for_each("negative", negatives, len(prompts), count)
        if not isinstance(strength, Real) or not 0 < strength <= 1:
            raise UserError(f"strength must be above 0 and at most 1, got {strength}. 0.7 is common.")
        if self.cascade.prior is None or self.cascade.text_encoder is None:
            raise UserError("this model has no Stage C or no text encoder. It can only reconstruct images.")
        inits = None
        if init is not None:
            given = init if isinstance(init, list | tuple) else [init]
            given = [upright_rgb(image, "init") for image in given]
            inits = one_for_each("init", self._init_latents(given, size, canvas), len(prompts), count)

        texts = [prompt for prompt in prompts for _ in range(count)]
        images: list[Image.Image] = []
        for start in range(0, len(texts), batch_size):
            rows = slice(start, start + batch_size)
            batch = SamplingBatch(
                prompts=texts[rows],
                negatives=negatives[rows],
                seeds=seeds[rows],
                size=size,
                canvas=canvas,
                sampling=sampling,
                init_latents=None if inits is None else torch.cat(inits[rows]),
                strength=float(strength),
                progress=progress,
                reporter=self._step_reporter(on_step, size, canvas),
            )
            with out_of_memory_named(batch.describe()):
                text = self._encode_prompts(batch)
                semantic_latents = self._sample_prior(batch, text)
                latents = self._sample_decoder(batch, semantic_latents)
                pixels = self._decode(latents)
                images += to_images(center_crop(pixels, size))
        return images

    @_for_inference
    def reconstruct(
        self,
        image: Image.Image,
        *,
        seed: int = 0,
        size: int | None = None,
        sampling: Sampling | None = None,
        progress: Progress | None = None,
    ) -> Reconstruction:
        """Encodes the square center crop of an image into semantic latents, and decodes them again."""
        (result,) = self.reconstruct_batch(
            [image], seeds=[seed], size=size, sampling=sampling, progress=progress
        )
        return result

    @_for_inference
    def reconstruct_batch(
        self,
        images: Sequence[Image.Image],
        *,
        seeds: Sequence[int],
        size: int | None = None,
        sampling: Sampling | None = None,
        progress: Progress | None = None,
        on_step: StepCallback | None = None,
    ) -> list[Reconstruction]:
        """``reconstruct`` for several images at once, each with its own seed and noise."""
        compressor = self._compressor()
        sampling = self.cascade.settings.completed(sampling or Sampling())
        side, _ = checked_size(size, self.cascade.settings.image_size)
        canvas = self.cascade.settings.canvas(side, side)
        seeds = checked_request([""] * len(images), seeds, 1, len(images))
        originals = [center_crop_resize(upright_rgb(image), side) for image in images]
        batch = SamplingBatch(
            prompts=[""] * len(images),
            seeds=seeds,
            size=(side, side),
            canvas=canvas,
            sampling=sampling,
            progress=progress,
            reporter=self._step_reporter(on_step, (side, side), canvas),
        )
        with out_of_memory_named(batch.describe()):
            pixels = torch.stack([to_tensor(original) for original in originals])
            semantic_latents = self.encode(compressor, pad_to_canvas(pixels, canvas))
            latents = self._sample_decoder(batch, semantic_latents)
            results = to_images(center_crop(self._decode(latents), (side, side)))
        _, channels, height, width = semantic_latents.shape
        return [
            Reconstruction(original=original, image=result, latent_size=(channels, height, width))
            for original, result in zip(originals, results, strict=True)
        ]

    def load_lora(self, source: str | Path, scale: float = 1.0) -> None:
        """Adds a LoRA adapter to Stage C, and to its text encoder if the file adapts that too.

        ``source`` is a file, or a folder with ``pytorch_lora_weights.safetensors``. Raises
        ``CheckpointError`` if the adapter does not fit this model. On error, the model is unchanged.
        """
        if self.cascade.prior is None or self.cascade.text_encoder is None:
            raise UserError("LoRA adapters apply to Stage C, and this model has none. Load one with Stage C.")
        if not math.isfinite(scale):
            raise UserError(f"scale must be a finite number, got {scale}. Use 1 for full strength.")
        self.residence.release()
        prior, text_model = self.cascade.prior, self.cascade.text_encoder.model
        name = f"adapter_{len(self._loras)}"
        load_lora(prior, source, adapter_name=name, text_encoder=text_model)
        self._loras[name] = scale
        for network in (prior, text_model):
            names = lora_names(network)
            set_lora(network, names, [self._loras[name] for name in names])
        self._recorders.invalidate()

    def unload_lora(self) -> None:
        """Removes all adapters. The weights are then bit for bit what they were before."""
        self.residence.release()
        if self._loras:
            assert self.cascade.prior is not None
            assert self.cascade.text_encoder is not None
            unload_lora(self.cascade.prior)
            unload_lora(self.cascade.text_encoder.model)
            self._loras.clear()
            self._recorders.invalidate()

    def settings_of(self, sampling: Sampling) -> dict[str, Any]:
        """All sampling settings, as they are stored in an image file."""
        return dataclasses.asdict(self.cascade.settings.completed(sampling))

    def encode(self, compressor: Compressor, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c lh lw"]:
        """The semantic latents of images with values in [0, 1], in Stage B's units, in fp32."""
        with self.residence.using(compressor):
            view = compressor_input(pixels.to(self.device), self.cascade.settings.view_scale)
            return compressor(view.to(_dtype(compressor))).float()

    def _compressor(self) -> Compressor:
        if self.cascade.compressor is None:
            raise UserError(
                "this model has no compressor, so it cannot encode images. Use one that has "
                "(for the published v2, the original's .pt file of Stage B)."
            )
        return self.cascade.compressor

    def _init_latents(
        self, images: Sequence[Image.Image], size: tuple[int, int], canvas: tuple[int, int]
    ) -> list[Float[Tensor, "1 c lh lw"]]:
        """The normalized semantic latents of each image."""
        pixels = [to_tensor(resize_crop(image, *size)) for image in images]
        encoded = [self.encode(self._compressor(), pad_to_canvas(p[None], canvas)) for p in pixels]
        return [self.cascade.settings.latent_statistics.normalise(z) for z in encoded]

    def _step_reporter(
        self, on_step: StepCallback | None, size: tuple[int, int], canvas: tuple[int, int]
    ) -> StepReporter | None:
        if on_step is None:
            return None
        return StepReporter(self.cascade, on_step, size, canvas, can_preview=self.low_memory is None)

    def _encode_text(self, encoder: TextEncoder, texts: list[str]) -> TextStates:
        with self.residence.using(encoder):
            return encoder.encode(texts, self._recorders.of(encoder, encoder.last_states))

    def _encode_prompts(self, batch: SamplingBatch) -> TextStates:
        """Stage C's text states of the prompts and, with guidance, of the negative prompts after them."""
        assert self.cascade.text_encoder is not None
        guides = batch.sampling.guidance != 1
        texts = batch.prompts + batch.negatives if guides else batch.prompts
        return self._encode_text(self.cascade.text_encoder, texts)

    def _sample_prior(self, batch: SamplingBatch, text: TextStates) -> Float[Tensor, "b c lh lw"]:
        """Stage C: samples semantic latents from the text states. They are returned in Stage B's units."""
        prior, settings, sampling = self.cascade.prior, self.cascade.settings, batch.sampling
        assert prior is not None
        assert sampling.guidance is not None
        assert sampling.guidance_interval is not None
        assert sampling.prior_steps is not None
        assert sampling.prior_sampler is not None
        objective, sampler = settings.prior_objective, SAMPLERS[sampling.prior_sampler]

        spaced = uniform_timesteps if settings.prior_equal_steps else sampler.timesteps
        timesteps = spaced(sampling.prior_steps)
        shape = (prior.config.c_in, *settings.latent_size(*batch.canvas))
        x = to_device(draw_noise(shape, batch.generators), self.device)
        if batch.init_latents is not None:
            start = batch.strength
            timesteps = [start, *(t for t in timesteps if t < start)]
            t = torch.full((len(x),), start, dtype=torch.float32, device=self.device)
            x = objective.noised(batch.init_latents, x, t)

        with self.residence.using(prior):
            predict = self._predict_semantic_latents(prior, text)
            steps = len(timesteps) - 1
            on_step = batch.on_step("Stage C", steps)
            if sampling.guidance != 1:
                predict = guided(predict, sampling.guidance)
                if sampling.guidance_interval != ALL_TIMES:
                    prompts = TextStates(states=text.states[: len(x)], mask=text.mask[: len(x)])
                    unguided = self._predict_semantic_latents(prior, prompts)
                    interval = sampling.guidance_interval
                    predict, on_step = guided_within(predict, unguided, interval, timesteps, on_step)
            if batch.reporter is not None:
                predict, on_step = batch.reporter.on_semantic_latents(predict, on_step, steps)
            sampled = objective.for_sampling()
            sample = sampler.function(predict, x, timesteps, batch.generators, sampled, on_step)
        return settings.latent_statistics.restore(sample)

    def _predict_semantic_latents(self, prior: Prior, text: TextStates) -> Predict:
        """Stage C for as many rows as ``text`` has."""
        settings = self.cascade.settings
        mask = text.mask if settings.text_mask else None
        predictions = predictions_for_sampling(prior, settings.prior_objective)
        run = self._recorders.of(prior, predictions, prior.context).bind(text.states, mask)
        return lambda x, t: run(x.to(_dtype(prior)), t).float()

    def _sample_decoder(self, batch: SamplingBatch, semantic_latents: Float[Tensor, "b c lh lw"]) -> Tensor:
        """Stage B: samples the latents (b, 4, h, w) that Stage A decodes, or v1's tokens (b, h, w)."""
        sampling, decoder, vqgan = batch.sampling, self.cascade.decoder, self.cascade.vqgan
        assert sampling.decoder_guidance is not None
        assert sampling.decoder_steps is not None
        assert sampling.decoder_shift is not None
        grid = (batch.canvas[1] // vqgan.config.factor, batch.canvas[0] // vqgan.config.factor)

        prompts, guidance = batch.prompts, sampling.decoder_guidance
        if guidance != 1:
            semantic_latents = torch.cat([semantic_latents, torch.zeros_like(semantic_latents)])
            prompts = prompts + [""] * len(prompts)
        encoder = self.cascade.text_encoder_of_decoder()
        text = None if encoder is None else self._encode_text(encoder, prompts)

        objective = self.cascade.settings.decoder_objective
        timesteps = objective.timesteps(sampling.decoder_steps, sampling.decoder_shift)
        on_step = batch.on_step("Stage B", sampling.decoder_steps)
        with self.residence.using(decoder):
            if isinstance(decoder, Paella):
                assert text is not None
                noise = draw_tokens(grid, decoder.config.num_labels, batch.generators).to(self.device)
                predict = _predict_tokens(decoder, semantic_latents, text)
                if guidance != 1:
                    predict = guided(predict, guidance)
                if batch.reporter is not None:
                    on_step = batch.reporter.on_tokens(on_step, sampling.decoder_steps)
                temperatures = self.cascade.settings.decoder_temperatures
                return sample_tokens(predict, noise, timesteps, batch.generators, temperatures, on_step)
            noise = to_device(draw_noise((decoder.config.c_in, *grid), batch.generators), self.device)
            predict = self._predict_latents(decoder, semantic_latents, grid, text)
            if guidance != 1:
                predict = guided(predict, guidance)
            if batch.reporter is not None:
                predict, on_step = batch.reporter.on_latents(predict, on_step, sampling.decoder_steps)
            sampler = SAMPLERS[samplers_for(objective.path)[0]]
            sampled = objective.for_sampling()
            return sampler.function(predict, noise, timesteps, batch.generators, sampled, on_step)

    def _predict_latents(
        self,
        decoder: Decoder,
        semantic_latents: Float[Tensor, "b c lh lw"],
        grid: tuple[int, int],
        text: TextStates | None,
    ) -> Predict:
        """Stage B of v2, with everything that is the same in all steps computed once."""
        states = None if text is None else text.states
        mask = text.mask if text is not None and self.cascade.settings.text_mask else None
        predictions = predictions_for_sampling(decoder, self.cascade.settings.decoder_objective)
        recorder = self._recorders.of(decoder, predictions, decoder.context)
        run = recorder.bind(semantic_latents, grid, states, mask)
        return lambda x, t: run(x.to(_dtype(decoder)), t).float()

    def _decode(self, latents: Tensor) -> Float[Tensor, "b 3 h w"]:
        """Stage A: decodes what ``_sample_decoder`` returns into pixels in [0, 1]."""
        vqgan = self.cascade.vqgan
        with self.residence.using(vqgan):
            if isinstance(self.cascade.decoder, Paella):
                latents = vqgan.vquantizer.lookup(latents) / vqgan.config.scale_factor
            latents = latents.to(_dtype(vqgan))
            decode = self._recorders.of(vqgan, vqgan.decode)
            pixels = decode(latents) if self.low_memory is None else tiled_decode(vqgan, latents)
        return pixels.float().clamp(0, 1)


def _dtype(network: nn.Module) -> torch.dtype:
    return next(network.parameters()).dtype


def _predict_tokens(decoder: Paella, semantic_latents: Tensor, text: TextStates) -> Predict:
    """Stage B of v1, which is not recorded as a CUDA graph."""
    context = decoder.context(semantic_latents.to(_dtype(decoder)), text.states)
    return lambda tokens, t: decoder(tokens, t, context)

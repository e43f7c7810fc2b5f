"""From text to pictures, and from pictures through the map and back: pure steps, to be read from the top.

prompt → text states → Stage C: map (b, 16, h, w) → Stage B: latents (b, 4, H, W) → Stage A: pixels

A picture is drawn on a canvas that the grids of all stages fit, and cut out of its middle. Networks compute
in their own precision, diffusion between them in fp32.
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
from wuerstchen.device import Precision, default_device, default_precision, runs_triton, sent
from wuerstchen.diffusion.objective import predictions_for_sampling
from wuerstchen.diffusion.sampler_table import SAMPLERS, samplers_for
from wuerstchen.diffusion.samplers import OnStep, Predict, draw_noise, guided
from wuerstchen.diffusion.schedule import uniform_timesteps
from wuerstchen.diffusion.tokens import draw_tokens, sample_tokens
from wuerstchen.errors import UserError, UserNotice, out_of_memory_named
from wuerstchen.images import (
    center_crop_resize,
    cut,
    on_canvas,
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
from wuerstchen.progress import Watch, Watching
from wuerstchen.runtime.offload import LowMemory, residence_on, tiled_decode
from wuerstchen.runtime.recorder import Recorder, Recorders
from wuerstchen.sampling import (
    Reconstruction,
    Sampling,
    checked_request,
    checked_size,
    checked_texts,
    one_for_each,
)

_Method = TypeVar("_Method", bound=Callable[..., Any])
Progress = Callable[[str, int, int], None]
"""Called with a stage's name, steps done and steps in all."""


def load(
    model: str | Path | None = None,
    device: str | torch.device | None = None,
    *,
    precision: Precision | None = None,
    low_memory: LowMemory | None = None,
    sources: Sources | None = None,
) -> "Wuerstchen":
    """Loads a model, or the bundled one when none is named, onto ``device`` (a GPU if there is one).

    ``model`` is a folder in any layout, or a name on the hub; ``sources`` names parts that come from
    elsewhere. ``precision`` is float16 on CUDA and float32 elsewhere if none is given. Half precision takes
    half the memory. float16 draws what float32 does; bfloat16 rounds eight times as coarsely, and sometimes a
    picture becomes another one. The bundled model needs no network. Raises ``CheckpointError`` for what is
    damaged or no model.
    """
    for value, kind in ((precision, Precision), (low_memory, LowMemory)):
        if value is not None and value not in get_args(kind):
            raise UserError(f"{value!r} is unknown; use one of {', '.join(get_args(kind))}")
    device = default_device(device)
    precision = precision or default_precision(device)
    if device.type == "cuda" and not runs_triton(device):
        warnings.warn(
            "this GPU or this build of torch has no Triton, so blocks run as written: right, but several "
            "times slower; a CUDA build for Linux has it, for GPUs of compute capability 8.0 or more",
            UserNotice,
            stacklevel=2,
        )
    cascade = read_model(BUNDLED if model is None else model, sources, dtype=getattr(torch, precision))
    return Wuerstchen(cascade, device, low_memory=low_memory)


def _by_itself(method: _Method) -> _Method:
    """Draws without gradients, and in the networks' own precision where a caller has switched autocast on."""

    @functools.wraps(method)
    def run(self: "Wuerstchen", *arguments: Any, **options: Any) -> Any:
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            return method(self, *arguments, **options)

    return cast(_Method, run)


class Wuerstchen:
    """A model ready to draw. ``cascade`` holds its networks."""

    def __init__(
        self, cascade: Cascade, device: torch.device, *, low_memory: LowMemory | None = None
    ) -> None:
        """With ``low_memory`` the networks stay on the CPU and visit ``device`` when they are needed."""
        self.cascade = cascade
        self.device = device
        self.low_memory = low_memory
        self._loras: dict[str, float] = {}
        self._recorders = Recorders()
        self.residence = residence_on(device, low_memory)
        for network in cascade.networks().values():
            network.eval()
            if low_memory is None:
                network.to(device)

    @no_type_check  # what is wrong is refused below, in words that say what to do
    @_by_itself
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
        watch: Watch | None = None,
    ) -> list[Image.Image]:
        """Draws ``count`` pictures of each prompt, in order: all of the first prompt, then the next.

        Picture number i of the call has seed ``seed + i``, or ``seed[i]`` of a list, and noise of its own:
        drawn alone with that seed it is the same picture, up to rounding. ``size`` is (width, height) in
        pixels or one number for both, in steps of 8; ``negative`` is the text to steer away from, one for all
        or a list with one for each prompt.

        With ``init`` Stage C begins with that picture's map, noised to the time ``strength`` in (0, 1]: small
        values keep its layout, 1 keeps nothing. The empty prompt then gives variations of it. The picture is
        scaled and cropped to the size; a list has one for each prompt. Raises ``UserError`` for what cannot
        be drawn.
        """
        prompts = checked_texts(prompts)
        negatives = checked_texts(negative, "negative")
        sampling = self.cascade.settings.completed(sampling or Sampling())
        width, height = checked_size(size, self.cascade.settings.image_size)
        canvas = self.cascade.settings.canvas(width, height)
        seeds = checked_request(prompts, seed, count, batch_size)
        count = int(count)
        negatives = one_for_each("negative", negatives, len(prompts), count)
        if not isinstance(strength, Real) or not 0 < strength <= 1:
            raise UserError(f"strength {strength} must be above 0 and at most 1; 0.7 is common")
        prior, text_encoder = self.cascade.prior, self.cascade.text_encoder
        if prior is None or text_encoder is None:
            raise UserError("this model has no Stage C or no text encoder; it reconstructs, but cannot draw")
        begins = None
        if init is not None:
            inits = list(init) if isinstance(init, list | tuple) else [init]
            pixels = [to_tensor(resize_crop(upright_rgb(one, "init"), width, height)) for one in inits]
            maps = [self.encode(self._compressor(), on_canvas(p[None], canvas)) for p in pixels]
            maps = [self.cascade.settings.latent_statistics.normalise(z) for z in maps]
            begins = one_for_each("init", maps, len(prompts), count)

        texts = [prompt for prompt in prompts for _ in range(count)]
        images: list[Image.Image] = []
        for start in range(0, len(texts), batch_size):
            batch = texts[start : start + batch_size]
            generators = _generators(seeds[start : start + batch_size])
            watching = self._watching(watch, (width, height), canvas)
            with out_of_memory_named(f"batch_size={len(batch)} at {width}x{height} pixels"):
                z = self._sample_map(
                    prior,
                    text_encoder,
                    batch,
                    negatives[start : start + batch_size],
                    canvas,
                    sampling,
                    generators,
                    progress,
                    None if begins is None else torch.cat(begins[start : start + batch_size]),
                    float(strength),
                    watching,
                )
                pixels = self._draw(z, batch, canvas, sampling, generators, progress, watching)
                images += to_images(cut(pixels, (width, height)))
        return images

    @_by_itself
    def reconstruct(
        self,
        image: Image.Image,
        *,
        seed: int = 0,
        size: int | None = None,
        sampling: Sampling | None = None,
        progress: Progress | None = None,
    ) -> Reconstruction:
        """Squeezes a picture (centre crop to a square) through the semantic map and back."""
        (result,) = self.reconstruct_batch(
            [image], seeds=[seed], size=size, sampling=sampling, progress=progress
        )
        return result

    @_by_itself
    def reconstruct_batch(
        self,
        images: Sequence[Image.Image],
        *,
        seeds: Sequence[int],
        size: int | None = None,
        sampling: Sampling | None = None,
        progress: Progress | None = None,
        watch: Watch | None = None,
    ) -> list[Reconstruction]:
        """``reconstruct`` for several pictures at once, each with a seed and noise of its own."""
        compressor = self._compressor()
        sampling = self.cascade.settings.completed(sampling or Sampling())
        side, _ = checked_size(size, self.cascade.settings.image_size)
        canvas = self.cascade.settings.canvas(side, side)
        generators = _generators(checked_request([""] * len(images), seeds, 1, len(images)))
        originals = [center_crop_resize(upright_rgb(image), side) for image in images]
        watching = self._watching(watch, (side, side), canvas)
        with out_of_memory_named(f"batch_size={len(images)} at {side}x{side} pixels"):
            pixels = torch.stack([to_tensor(original) for original in originals])
            z = self.encode(compressor, on_canvas(pixels, canvas))
            texts = [""] * len(images)
            drawn = self._draw(z, texts, canvas, sampling, generators, progress, watching)
            results = to_images(cut(drawn, (side, side)))
        map_size = (z.shape[1], z.shape[2], z.shape[3])
        return [
            Reconstruction(original=original, image=result, map_size=map_size)
            for original, result in zip(originals, results, strict=True)
        ]

    def load_lora(self, source: str | Path, scale: float = 1.0) -> None:
        """Puts an adapter of the diffusers kind on Stage C, and on its text encoder if it has one for it.

        ``source`` is a file, or a folder with ``pytorch_lora_weights.safetensors``. Raises
        ``CheckpointError`` if it does not fit this model; nothing is then changed.
        """
        if self.cascade.prior is None or self.cascade.text_encoder is None:
            raise UserError("this model has no Stage C, which an adapter belongs to; use one that has")
        if not math.isfinite(scale):
            raise UserError(f"scale {scale} of an adapter must be a finite number; 1 is as trained")
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
        """Takes all adapters off again: the weights are the same bits as before."""
        self.residence.release()
        if self._loras:
            assert self.cascade.prior is not None
            assert self.cascade.text_encoder is not None
            unload_lora(self.cascade.prior)
            unload_lora(self.cascade.text_encoder.model)
            self._loras.clear()
            self._recorders.invalidate()

    def settings_of(self, sampling: Sampling) -> dict[str, float | str]:
        """The sampling settings in full, as they are recorded with a picture."""
        return dataclasses.asdict(self.cascade.settings.completed(sampling))

    def encode(self, compressor: Compressor, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c mh mw"]:
        """The semantic map of pictures in [0, 1], as Stage B reads it, in fp32."""
        with self.residence.using(compressor):
            view = compressor_input(pixels.to(self.device), self.cascade.settings.view_scale)
            return compressor(view.to(_dtype(compressor))).float()

    def _compressor(self) -> Compressor:
        if self.cascade.compressor is None:
            raise UserError(
                "this model has no compressor, so it cannot encode pictures; use one that has "
                "(of the published v2, the original's .pt file of Stage B)"
            )
        return self.cascade.compressor

    def _watching(
        self, watch: Watch | None, size: tuple[int, int], canvas: tuple[int, int]
    ) -> Watching | None:
        shows = self.low_memory is None
        return None if watch is None else Watching(self.cascade, watch, size, canvas, shows=shows)

    def _encode_text(self, encoder: TextEncoder, texts: list[str]) -> TextStates:
        with self.residence.using(encoder):
            return encoder.encode(texts, self._recorded(encoder, encoder.last_states))

    def _recorded(
        self,
        network: nn.Module,
        function: Callable[..., Tensor] | None = None,
        prepare: Callable[..., Any] | None = None,
    ) -> Recorder:
        """The network, or a ``function`` of it, recorded where all networks stay on a GPU."""
        return self._recorders.of(network, function, prepare, records=self.low_memory is None)

    def _sample_map(
        self,
        prior: Prior,
        text_encoder: TextEncoder,
        prompts: list[str],
        negatives: list[str],
        canvas: tuple[int, int],
        sampling: Sampling,
        generators: list[torch.Generator],
        progress: Progress | None,
        begin: Float[Tensor, "b c mh mw"] | None,
        strength: float,
        watching: Watching | None = None,
    ) -> Float[Tensor, "b c mh mw"]:
        """Stage C: the semantic map that the texts describe, in Stage B's units.

        ``begin`` are normalised maps to start from in place of noise alone.
        """
        assert sampling.guidance is not None
        assert sampling.prior_steps is not None
        assert sampling.prior_sampler is not None
        settings, sampler = self.cascade.settings, SAMPLERS[sampling.prior_sampler]
        objective = settings.prior_objective

        guides = sampling.guidance != 1
        encoded = self._encode_text(text_encoder, prompts + negatives if guides else prompts)
        spaced = uniform_timesteps if settings.prior_equal_steps else sampler.timesteps
        timesteps = spaced(sampling.prior_steps)
        x = sent(draw_noise((prior.config.c_in, *settings.latent_size(*canvas)), generators), self.device)
        if begin is not None:
            timesteps = [strength, *(t for t in timesteps if t < strength)]
            x = objective.noised(
                begin, x, torch.full((len(x),), strength, dtype=torch.float32, device=self.device)
            )

        with self.residence.using(prior):
            mask = encoded.mask if settings.text_mask else None
            predictions = predictions_for_sampling(prior, objective)
            run = self._recorded(prior, predictions, prior.context).given(encoded.states, mask)

            def predict(x: Tensor, t: Tensor) -> Tensor:
                return run(x.to(_dtype(prior)), t).float()

            steered = guided(predict, sampling.guidance) if guides else predict
            report, sampled = _reporter(progress, "Stage C", len(timesteps) - 1), objective.for_sampling()
            if watching is not None:
                steered, report = watching.over_map(steered, report, len(timesteps) - 1)
            sample = sampler.function(steered, x, timesteps, generators, sampled, report)
        return settings.latent_statistics.restore(sample)

    def _draw(
        self,
        z: Float[Tensor, "b c mh mw"],
        prompts: list[str],
        canvas: tuple[int, int],
        sampling: Sampling,
        generators: list[torch.Generator],
        progress: Progress | None,
        watching: Watching | None = None,
    ) -> Float[Tensor, "b 3 h w"]:
        """Stages B and A: the picture that the map describes, in [0, 1]."""
        assert sampling.decoder_guidance is not None
        assert sampling.decoder_steps is not None
        assert sampling.decoder_shift is not None
        decoder, vqgan = self.cascade.decoder, self.cascade.vqgan
        grid = (canvas[1] // vqgan.config.factor, canvas[0] // vqgan.config.factor)

        guides = sampling.decoder_guidance != 1
        if guides:
            z, prompts = torch.cat([z, torch.zeros_like(z)]), prompts + [""] * len(prompts)
        encoder = self.cascade.text_encoder_of_decoder()
        text = None if encoder is None else self._encode_text(encoder, prompts)

        def steered(predict: Predict) -> Predict:
            assert sampling.decoder_guidance is not None
            return guided(predict, sampling.decoder_guidance) if guides else predict

        objective = self.cascade.settings.decoder_objective
        timesteps = objective.timesteps(sampling.decoder_steps, sampling.decoder_shift)
        report = _reporter(progress, "Stage B", sampling.decoder_steps)
        with self.residence.using(decoder):
            if isinstance(decoder, Paella):
                assert text is not None
                noise = draw_tokens(grid, decoder.config.num_labels, generators).to(self.device)
                predict = _predicts_tokens(decoder, z, text)
                temperatures = self.cascade.settings.decoder_temperatures
                if watching is not None:
                    report = watching.over_tokens(report, sampling.decoder_steps)
                drawn = sample_tokens(steered(predict), noise, timesteps, generators, temperatures, report)
            else:
                noise = sent(draw_noise((decoder.config.c_in, *grid), generators), self.device)
                predict = steered(self._predicts_latents(decoder, z, grid, text))
                if watching is not None:
                    predict, report = watching.over_latents(predict, report, sampling.decoder_steps)
                sampler = SAMPLERS[samplers_for(objective.path)[0]]
                sampled = objective.for_sampling()
                drawn = sampler.function(predict, noise, timesteps, generators, sampled, report)
        with self.residence.using(vqgan):
            if isinstance(decoder, Paella):
                drawn = vqgan.vquantizer.lookup(drawn) / vqgan.config.scale_factor
            drawn = drawn.to(_dtype(vqgan))
            decode = self._recorded(vqgan, vqgan.decode)
            pixels = decode(drawn) if self.low_memory is None else tiled_decode(vqgan, drawn)
        return pixels.float().clamp(0, 1)

    def _predicts_latents(
        self, decoder: Decoder, z: Tensor, grid: tuple[int, int], text: TextStates | None
    ) -> Predict:
        """Stage B of v2 with all that does not change from step to step."""
        states = None if text is None else text.states
        mask = text.mask if text is not None and self.cascade.settings.text_mask else None
        predictions = predictions_for_sampling(decoder, self.cascade.settings.decoder_objective)
        run = self._recorded(decoder, predictions, decoder.context).given(z, grid, states, mask)
        return lambda x, t: run(x.to(_dtype(decoder)), t).float()


def _dtype(network: nn.Module) -> torch.dtype:
    return next(network.parameters()).dtype


def _predicts_tokens(decoder: Paella, z: Tensor, text: TextStates) -> Predict:
    """Stage B of v1, likewise; not recorded."""
    context = decoder.context(z.to(_dtype(decoder)), text.states)
    return lambda tokens, t: decoder(tokens, t, context)


def _generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def _reporter(progress: Progress | None, stage: str, steps: int) -> OnStep | None:
    return None if progress is None else lambda step, _: progress(stage, step + 1, steps)

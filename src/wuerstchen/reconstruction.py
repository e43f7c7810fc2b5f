"""Image reconstruction: the compressor, Stage B and Stage A.

pixels → compressor: semantic latents (b, 16, h, w) → Stage B: latents (b, 4, H, W) → Stage A: pixels
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from wuerstchen.checkpoints.compressors import (
    PUBLISHED_COMPRESSOR,
    check_scale,
    fits_published,
    read_published_compressor,
)
from wuerstchen.device import to_device
from wuerstchen.diffusion.known_cells import Known, KnownTokens
from wuerstchen.diffusion.objective import Objective, predictions_for_sampling
from wuerstchen.diffusion.sampler_table import SAMPLERS
from wuerstchen.diffusion.samplers import Predict, draw_noise, guided
from wuerstchen.diffusion.tokens import draw_tokens, sample_tokens
from wuerstchen.edits import Edit
from wuerstchen.errors import UserError, out_of_memory_named
from wuerstchen.images import (
    center_crop,
    center_crop_resize,
    pad_to_canvas,
    to_images,
    to_tensor,
    upright_rgb,
)
from wuerstchen.models.cascade import Cascade
from wuerstchen.models.compressor import Compressor, compressor_input
from wuerstchen.models.decoder import Decoder
from wuerstchen.models.paella import Paella
from wuerstchen.models.text import TextEncoder, TextStates
from wuerstchen.progress import StepCallback, StepReporter
from wuerstchen.prompt_weights import WeightedPrompt, weighted
from wuerstchen.runtime.offload import LowMemory, residence_on, tiled_decode
from wuerstchen.runtime.recorder import Recorders
from wuerstchen.sampling import Reconstruction, Sampling, checked_request, checked_size
from wuerstchen.sampling_batch import KnownParts, Progress, SamplingBatch

_Method = TypeVar("_Method", bound=Callable[..., Any])


def for_inference(method: _Method) -> _Method:
    """Runs without gradients or a caller's autocast. Accepts ``watch``, the former name of ``on_step``."""

    @functools.wraps(method)
    def run(self: "Reconstructor", *arguments: Any, **options: Any) -> Any:
        watch = options.pop("watch", None)
        if watch is not None:
            options.setdefault("on_step", watch)
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            return method(self, *arguments, **options)

    return cast(_Method, run)


class Reconstructor:
    """The networks of a model that encode and reconstruct images, ready to run."""

    def __init__(
        self, cascade: Cascade, device: torch.device, *, low_memory: LowMemory | None = None
    ) -> None:
        """With ``low_memory``, networks stay on the CPU and are moved to ``device`` while they are in use."""
        self.cascade = cascade
        self.device = device
        self.low_memory = low_memory
        self._recorders = Recorders(records=low_memory is None)
        self.residence = residence_on(device, low_memory)
        for network in cascade.networks().values():
            network.eval()
            if low_memory is None:
                network.to(device)

    @for_inference
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

    @for_inference
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
        sampling = self.cascade.completed(sampling or Sampling())
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

    def encode(self, compressor: Compressor, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c lh lw"]:
        """The semantic latents of images with values in [0, 1], in Stage B's units, in fp32."""
        with self.residence.using(compressor):
            view = compressor_input(pixels.to(self.device), self.cascade.settings.view_scale)
            return compressor(view.to(dtype_of(compressor))).float()

    def _compressor(self) -> Compressor:
        """The model's compressor. That of the published v2 is downloaded if the model lacks it."""
        cascade = self.cascade
        if cascade.compressor is None and fits_published(cascade.decoder, cascade.settings):
            found = read_published_compressor(dtype_of(cascade.decoder))
            check_scale(found, cascade.settings.latent_statistics, PUBLISHED_COMPRESSOR)
            cascade.compressor = found if self.low_memory is not None else found.to(self.device)
        if cascade.compressor is None:
            raise UserError(
                "this model has no compressor, so it cannot encode images. Give the one that its Stage B was "
                "trained with: --compressor, or Sources(compressor=...) in Python."
            )
        return cascade.compressor

    def known_parts(self, edit: Edit, canvas: tuple[int, int]) -> KnownParts:
        """What Stages B and C keep of an image that is edited, as a batch of one."""
        settings, vqgan = self.cascade.settings, self.cascade.vqgan
        pixels = pad_to_canvas(edit.pixels()[None], canvas)
        z = settings.latent_statistics.normalise(self.encode(self._compressor(), pixels))
        cells = edit.cell_strengths(canvas, settings.latent_size(*canvas))[None].to(self.device)
        with self.residence.using(vqgan):
            embedded = vqgan.embed(pixels.to(self.device, dtype_of(vqgan))).float()
            grid = (int(embedded.shape[2]), int(embedded.shape[3]))
            strengths = edit.latent_strengths(canvas, grid)[None].to(self.device)
            if isinstance(self.cascade.decoder, Paella):
                tokens = vqgan.vquantizer.nearest(embedded.to(dtype_of(vqgan)))
                return KnownParts(Known(z, cells), KnownTokens(tokens, strengths))
        return KnownParts(Known(z, cells), Known(embedded / vqgan.config.scale_factor, strengths))

    def _step_reporter(
        self, on_step: StepCallback | None, size: tuple[int, int], canvas: tuple[int, int]
    ) -> StepReporter | None:
        if on_step is None:
            return None
        return StepReporter(self.cascade, on_step, size, canvas, can_preview=self.low_memory is None)

    def _encode_text(self, encoder: TextEncoder, texts: list[str]) -> TextStates:
        run = self._recorders.of(encoder, encoder.last_states)
        with self.residence.using(encoder):
            states = encoder.encode(texts, run)
            if any(isinstance(text, WeightedPrompt) for text in texts):
                empty, is_masked = encoder.encode([""], run), self.cascade.settings.text_mask
                states = weighted(states, texts, empty, encoder, is_masked=is_masked)
        return states

    def _sample_decoder(self, batch: SamplingBatch, semantic_latents: Float[Tensor, "b c lh lw"]) -> Tensor:
        """Stage B: samples the latents (b, 4, h, w) that Stage A decodes, or v1's tokens (b, h, w)."""
        sampling, vqgan = batch.sampling, self.cascade.vqgan
        decoder = self.cascade.decoder_for(sampling)
        assert sampling.decoder_guidance is not None
        assert sampling.decoder_sampler is not None
        assert sampling.decoder_steps is not None
        assert sampling.decoder_shift is not None
        grid = (batch.canvas[1] // vqgan.config.factor, batch.canvas[0] // vqgan.config.factor)

        prompts, guidance = batch.prompts, sampling.decoder_guidance
        if guidance != 1:
            semantic_latents = torch.cat([semantic_latents, torch.zeros_like(semantic_latents)])
            prompts = prompts + [""] * len(prompts)
        encoder = self.cascade.text_encoder_of_decoder()
        text = None if encoder is None else self._encode_text(encoder, prompts)

        objective, sampler = self.cascade.settings.decoder_objective, SAMPLERS[sampling.decoder_sampler]
        sampled = objective if sampler.for_students else objective.for_sampling()
        if sampler.for_students:
            timesteps = sampler.timesteps(sampling.decoder_steps)
        else:
            timesteps = objective.timesteps(sampling.decoder_steps, sampling.decoder_shift)
        on_step, generators = batch.on_step("Stage B", sampling.decoder_steps), batch.decoder_generators()
        known = None if batch.known is None else batch.known.latents
        with self.residence.using(decoder):
            if isinstance(decoder, Paella):
                assert text is not None
                noise = draw_tokens(grid, decoder.config.num_labels, generators).to(self.device)
                predict = _predict_tokens(decoder, semantic_latents, text)
                if guidance != 1:
                    predict = guided(predict, guidance)
                if batch.reporter is not None:
                    on_step = batch.reporter.on_tokens(on_step, sampling.decoder_steps)
                if isinstance(known, KnownTokens):
                    on_step = known.replaced(timesteps, on_step)
                temperatures = self.cascade.settings.decoder_temperatures
                return sample_tokens(predict, noise, timesteps, generators, temperatures, on_step)
            noise = to_device(draw_noise((decoder.config.c_in, *grid), generators), self.device)
            predict = self._predict_latents(decoder, semantic_latents, grid, text, sampled)
            if guidance != 1:
                predict = guided(predict, guidance)
            if batch.reporter is not None:
                predict, on_step = batch.reporter.on_latents(
                    predict, on_step, sampling.decoder_steps, sampled
                )
            x = noise
            if isinstance(known, Known):
                x = known.begin(noise, objective, timesteps[0])
                on_step = known.replaced(noise, timesteps, objective, on_step)
            return sampler.function(predict, x, timesteps, generators, sampled, on_step)

    def _predict_latents(
        self,
        decoder: Decoder,
        semantic_latents: Float[Tensor, "b c lh lw"],
        grid: tuple[int, int],
        text: TextStates | None,
        sampled: Objective,
    ) -> Predict:
        """Stage B of v2 in terms of the objective ``sampled``, with everything that is the same in all steps
        computed once."""
        states = None if text is None else text.states
        mask = text.mask if text is not None and self.cascade.settings.text_mask else None
        predictions = predictions_for_sampling(decoder, self.cascade.settings.decoder_objective, sampled)
        recorder = self._recorders.of(decoder, predictions, decoder.context)
        run = recorder.bind(semantic_latents, grid, states, mask)
        return lambda x, t: run(x.to(dtype_of(decoder)), t).float()

    def _decode(self, latents: Tensor) -> Float[Tensor, "b 3 h w"]:
        """Stage A: decodes what ``_sample_decoder`` returns into pixels in [0, 1]."""
        vqgan = self.cascade.vqgan
        with self.residence.using(vqgan):
            if isinstance(self.cascade.decoder, Paella):
                latents = vqgan.vquantizer.lookup(latents) / vqgan.config.scale_factor
            latents = latents.to(dtype_of(vqgan))
            decode = self._recorders.of(vqgan, vqgan.decode)
            pixels = decode(latents) if self.low_memory is None else tiled_decode(vqgan, latents)
        return pixels.float().clamp(0, 1)


def dtype_of(network: nn.Module) -> torch.dtype:
    return next(network.parameters()).dtype


def _predict_tokens(decoder: Paella, semantic_latents: Tensor, text: TextStates) -> Predict:
    """Stage B of v1, which is not recorded as a CUDA graph."""
    context = decoder.context(semantic_latents.to(dtype_of(decoder)), text.states)
    return lambda tokens, t: decoder(tokens, t, context)

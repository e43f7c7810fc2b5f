"""Stage C with diffusers' names: from prompts to semantic latents."""

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, no_type_check

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from wuerstchen.checkpoints.diffusers import PRIOR_PARTS, PriorFolder, read_prior_folder
from wuerstchen.checkpoints.diffusers_write import write_prior_folder
from wuerstchen.diffusers.base import (
    DiffusionPipeline,
    check_network,
    check_positive,
    check_text_width,
    dtype_of,
    plain,
    published,
)
from wuerstchen.diffusers.loading import LoadOptions, write_over
from wuerstchen.diffusers.lora import LoraMethods
from wuerstchen.diffusers.outputs import WuerstchenPriorPipelineOutput
from wuerstchen.diffusers.prompts import check_negative, check_prompt, encode
from wuerstchen.diffusers.sampling import (
    Callbacks,
    LoopArguments,
    State,
    check_count,
    check_scale,
    check_steps,
    sample_latents,
    text_rows,
)
from wuerstchen.diffusers.scheduler import DDPMWuerstchenScheduler, schedule_of
from wuerstchen.diffusion.schedule import stage_c_timesteps
from wuerstchen.errors import UserError
from wuerstchen.lora import lora_names
from wuerstchen.models.prior import Prior

DEFAULT_STAGE_C_TIMESTEPS = stage_c_timesteps(29)
"""The published timesteps of Stage C: 29 steps, most of them at high noise."""

OUTPUT_TYPES = ("pt", "np", "latent", "pil")
PRIOR_NUMBERS = ("latent_mean", "latent_std", "resolution_multiple")


@published
class WuerstchenPriorPipeline(LoraMethods, DiffusionPipeline):
    """From prompts to semantic latents, the ``image_embeddings`` of the decoder's pipeline.

    ``image_embeddings`` are x·latent_mean − latent_std of the network's latents x (the names are historical).
    ``resolution_multiple`` is the number of pixels per semantic latent and side.
    """

    unet_name = "prior"
    text_encoder_name = "text_encoder"
    model_cpu_offload_seq = "text_encoder->prior"
    _callback_tensor_inputs = ("latents", "text_encoder_hidden_states", "negative_prompt_embeds")
    _lora_loadable_modules = ("prior", "text_encoder")
    _component_names = ("tokenizer", "text_encoder", "prior", "scheduler")
    _network_name = "prior"

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        prior: Any,
        scheduler: Any,
        latent_mean: float = 42.0,
        latent_std: float = 1.0,
        resolution_multiple: float = 42.67,
    ) -> None:
        super().__init__(
            latent_mean=latent_mean, latent_std=latent_std, resolution_multiple=resolution_multiple
        )
        check_positive(resolution_multiple=resolution_multiple)
        check_network("prior", prior, Prior)
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.prior = prior
        self.scheduler = scheduler

    @classmethod
    def _arguments(cls, folder: Path, given: dict[str, Any], options: LoadOptions) -> dict[str, Any]:
        return prior_arguments(folder, options, given)

    def _write(self, folder: Path) -> None:
        write_over(folder, lambda new: write_prior_folder(prior_folder_of(self), new))

    def _lora_networks(self) -> dict[str, nn.Module]:
        # Adapters change weights, so offloaded weights must be moved back first.
        self.maybe_free_model_hooks()
        networks = {"prior": plain(self.prior), "text_encoder": plain(self.text_encoder)}
        return {name: network for name, network in networks.items() if network is not None}

    def _encode(self, texts: list[str], device: torch.device) -> Float[Tensor, "b t c"]:
        return encode(self.tokenizer, self.text_encoder, texts, device, self._recorded)

    @torch.no_grad()
    def encode_prompt(
        self,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Float[Tensor, "b t c"] | None = None,
        negative_prompt_embeds: Float[Tensor, "b t c"] | None = None,
    ) -> tuple[Float[Tensor, "bn t c"], Float[Tensor, "bn t c"] | None]:
        """Text states of prompts and, with guidance, of negative prompts, repeated for each image.

        You can pass them to the pipeline as ``prompt_embeds`` and ``negative_prompt_embeds``.
        """
        with self._using(self.text_encoder) as home:
            if prompt_embeds is None:
                prompt_embeds = self._encode(check_prompt("prompt", prompt) or [""], home)
            if not do_classifier_free_guidance:
                negative_prompt_embeds = None
            elif negative_prompt_embeds is None:
                texts = check_negative(negative_prompt, len(prompt_embeds))
                negative_prompt_embeds = self._encode(texts, home)
        device = home if device is None else device
        dtype = self.dtype if self.text_encoder is None else dtype_of(self.text_encoder)

        def repeated(states: Tensor) -> Tensor:
            return states.to(device, dtype).repeat_interleave(num_images_per_prompt, dim=0)

        negative = negative_prompt_embeds
        return repeated(prompt_embeds), None if negative is None else repeated(negative)

    def check_inputs(
        self,
        prompt: Any,
        negative_prompt: Any,
        num_inference_steps: Any,
        do_classifier_free_guidance: bool,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
    ) -> None:
        """Raises ``UserError``, which is a ``ValueError``, or ``TypeError`` for invalid inputs."""
        if prompt is not None and prompt_embeds is not None:
            raise UserError("Cannot forward both `prompt` and `prompt_embeds`. Pass only one of them.")
        if prompt is None and prompt_embeds is None:
            raise UserError("Provide either `prompt` or `prompt_embeds`. Both are missing.")
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise UserError(
                "Cannot forward both `negative_prompt` and `negative_prompt_embeds`. Pass only one of them."
            )
        width = self.prior.config.c_cond
        for name, states in (
            ("prompt_embeds", prompt_embeds),
            ("negative_prompt_embeds", negative_prompt_embeds),
        ):
            if states is None:
                continue
            if not isinstance(states, Tensor):
                raise TypeError(f"'{name}' must be of type 'torch.Tensor', got {type(states)}.")
            if states.ndim != 3 or states.shape[2] != width or len(states) < 1:
                raise UserError(
                    f"{name} must have the shape (batch, positions, {width}), got {tuple(states.shape)}. "
                    "encode_prompt returns such tensors."
                )
        prompts = check_prompt("prompt", prompt)
        batch = len(prompts or prompt_embeds)
        if do_classifier_free_guidance:
            if negative_prompt_embeds is None:
                check_negative(negative_prompt, batch)
            else:
                positions = self._positions() if prompt_embeds is None else prompt_embeds.shape[1]
                expected = (batch, positions, width)
                if tuple(negative_prompt_embeds.shape) != expected:
                    raise UserError(
                        "`prompt_embeds` and `negative_prompt_embeds` must have the same shape, got "
                        f"{expected} and {tuple(negative_prompt_embeds.shape)}."
                    )
        check_steps("", num_inference_steps, None)

    def grid_side(self, pixels: float) -> int:
        """Semantic latents along a side of ``pixels``."""
        return math.ceil(pixels / self.config.resolution_multiple)

    def _positions(self) -> int | None:
        return None if self.tokenizer is None else self.tokenizer.model_max_length

    @no_type_check  # wrong types are refused below, with better messages
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int = 1024,
        width: int = 1024,
        num_inference_steps: int = 60,
        timesteps: Sequence[float] | Tensor | None = None,
        guidance_scale: float = 8.0,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        num_images_per_prompt: int | None = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str | None = "pt",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        callback: Callable[..., Any] | None = None,
        callback_steps: int | None = None,
    ) -> WuerstchenPriorPipelineOutput | tuple[Tensor | np.ndarray]:
        """Generates semantic latents for ``num_images_per_prompt`` images of each prompt, in the prompts'
        order.

        They have ceil(pixels / resolution_multiple) positions per side. ``timesteps`` decrease from 1 to 0
        and override ``num_inference_steps``; n timesteps are n − 1 steps. A ``guidance_scale`` up to 1 turns
        guidance off. ``prompt_embeds`` are text states instead of a prompt, (batch, positions, width).
        ``generator`` is one for the batch, or a list with one per image. ``latents`` are your own noise,
        (batch, 16, h, w). ``output_type`` "np" returns an array in float32, all others a tensor.

        ``callback_on_step_end(pipe, step, timestep, tensors)`` is called after each step with the tensors
        named in ``callback_on_step_end_tensor_inputs``. The next step uses the tensors that it returns.
        """
        callbacks = Callbacks.checked(
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            self._callback_tensor_inputs,
            callback,
            callback_steps,
        )
        self._guidance_scale = check_scale("guidance_scale", guidance_scale)
        uses_guidance = self.do_classifier_free_guidance
        self.check_inputs(
            prompt, negative_prompt, num_inference_steps, uses_guidance, prompt_embeds, negative_prompt_embeds
        )
        arguments = LoopArguments.checked(num_inference_steps, timesteps, latents, generator, callbacks)
        count = 1 if num_images_per_prompt is None else num_images_per_prompt
        count = check_count("num_images_per_prompt", count)
        sides = (check_side("height", height), check_side("width", width))
        self._check_parts(output_type)

        negative = negative_prompt if uses_guidance else None
        states = self.encode_prompt(
            None, count, uses_guidance, prompt, negative, prompt_embeds, negative_prompt_embeds
        )
        shape = (len(states[0]), self.prior.config.c_in, *map(self.grid_side, sides))
        sample = sample_latents(self, self.prior, shape, states, arguments)
        self.maybe_free_model_hooks()
        image_embeddings = sample * self.config.latent_mean - self.config.latent_std
        if output_type == "np":
            image_embeddings = image_embeddings.cpu().float().numpy()
        return WuerstchenPriorPipelineOutput(image_embeddings) if return_dict else (image_embeddings,)

    def _check_parts(self, output_type: Any) -> None:
        """Raises ``UserError`` if the components do not fit together, or for an unknown ``output_type``."""
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}.")
        check_text_width(self, plain(self.prior).config.c_cond, "prior")
        if self._residence is None:
            self._check_lora_devices()

    def _context_arguments(self, state: State, uses_guidance: bool) -> tuple[Any, ...]:
        """The arguments of the network's context."""
        latents = state["latents"]
        assert latents is not None
        return (text_rows(state["text_encoder_hidden_states"], len(latents), uses_guidance),)


def check_side(name: str, side: Any) -> float:
    """A side in pixels. Raises ``TypeError`` or ``UserError``."""
    if not isinstance(side, Real) or isinstance(side, bool):
        raise TypeError(f"'{name}' must be of type 'int', got {type(side)}.")
    if not 1 <= side < math.inf:
        raise UserError(f"{name} must be at least 1 pixel, got {side}. 1024 is common.")
    return float(side)


def prior_arguments(folder: Path, options: LoadOptions, given: Mapping[str, Any]) -> dict[str, Any]:
    """The components and config values of the prior's pipeline: those in ``given``, and the rest from
    ``folder``."""
    read = read_prior_folder(
        folder,
        dtype=options.dtype,
        given=[name for name in PRIOR_PARTS if name in given],
        variant=options.variant,
    )
    parts = {
        "tokenizer": read.tokenizer,
        "text_encoder": read.text_encoder,
        "prior": read.prior,
        "scheduler": DDPMWuerstchenScheduler.from_schedule(read.schedule),
    }
    return {**parts, **{name: getattr(read, name) for name in PRIOR_NUMBERS}, **given}


def prior_folder_of(pipe: Any) -> PriorFolder:
    """The prior's pipeline as a folder to write. Raises ``UserError`` if adapters are loaded."""
    prior = plain(pipe.prior)
    for network in (prior, pipe.text_encoder):
        if isinstance(network, nn.Module) and lora_names(network):
            raise UserError(
                f"Adapters are loaded: {', '.join(lora_names(network))}. A pipeline's folder cannot "
                "hold them. "
                "Call unload_lora_weights, after fuse_lora if you want to keep them in the weights."
            )
    return PriorFolder(
        prior=prior,
        text_encoder=plain(pipe.text_encoder),
        tokenizer=pipe.tokenizer,
        schedule=schedule_of(pipe.scheduler),
        **pipe.config,
    )

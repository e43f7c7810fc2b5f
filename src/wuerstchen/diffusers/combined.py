"""The prior's and the decoder's pipeline as one, with diffusers' name: from prompts to images."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, no_type_check

import torch
from torch import Tensor, nn

from wuerstchen.checkpoints.diffusers import (
    COMBINED_PIPELINE,
    PRIOR_PARTS,
    PRIOR_PIPELINE,
    linked_prior,
    pipeline_class,
    read_prior_network,
)
from wuerstchen.checkpoints.diffusers_write import write_combined_folder
from wuerstchen.diffusers.base import DiffusionPipeline, plain, published
from wuerstchen.diffusers.decoder import (
    Images,
    WuerstchenDecoderPipeline,
    as_output,
    centre_crop,
    check_output_type,
    decoder_arguments,
    decoder_folder_of,
)
from wuerstchen.diffusers.loading import LoadOptions, write_over
from wuerstchen.diffusers.lora import LoraMethods
from wuerstchen.diffusers.outputs import Config, ImagePipelineOutput
from wuerstchen.diffusers.prior import (
    WuerstchenPriorPipeline,
    check_side,
    prior_arguments,
    prior_folder_of,
)
from wuerstchen.diffusers.prompts import check_prompt
from wuerstchen.diffusers.sampling import check_callbacks, check_count, check_scale, check_steps
from wuerstchen.errors import CheckpointError, UserError

MULTIPLE = 8
"""Sides of images must be multiples of this."""


def _part_of(pipe: str, name: str) -> Any:
    """A property for a component of one of the two pipelines. Setting it here sets it there."""

    def get(self: Any) -> Any:
        return getattr(getattr(self, pipe), name)

    def assign(self: Any, value: Any) -> None:
        setattr(getattr(self, pipe), name, value)

    return property(get, assign)


@published
class WuerstchenCombinedPipeline(LoraMethods, DiffusionPipeline):
    """From prompts to images: ``prior_pipe``, then ``decoder_pipe``. Both can be used alone too.

    The config values are those of ``WuerstchenDecoderPipeline`` and, with the prefix ``prior_``, those of
    ``WuerstchenPriorPipeline``.
    """

    _load_connected_pipes = True
    _component_names = (
        "tokenizer",
        "text_encoder",
        "decoder",
        "scheduler",
        "vqgan",
        "prior_tokenizer",
        "prior_text_encoder",
        "prior_prior",
        "prior_scheduler",
    )
    _network_name = "decoder"

    tokenizer = _part_of("decoder_pipe", "tokenizer")
    text_encoder = _part_of("decoder_pipe", "text_encoder")
    decoder = _part_of("decoder_pipe", "decoder")
    scheduler = _part_of("decoder_pipe", "scheduler")
    vqgan = _part_of("decoder_pipe", "vqgan")
    prior_tokenizer = _part_of("prior_pipe", "tokenizer")
    prior_text_encoder = _part_of("prior_pipe", "text_encoder")
    prior_prior = _part_of("prior_pipe", "prior")
    prior_scheduler = _part_of("prior_pipe", "scheduler")

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        decoder: Any,
        scheduler: Any,
        vqgan: Any,
        prior_tokenizer: Any,
        prior_text_encoder: Any,
        prior_prior: Any,
        prior_scheduler: Any,
        latent_dim_scale: float = 10.67,
        prior_latent_mean: float = 42.0,
        prior_latent_std: float = 1.0,
        prior_resolution_multiple: float = 42.67,
    ) -> None:
        self.prior_pipe = WuerstchenPriorPipeline(
            tokenizer=prior_tokenizer,
            text_encoder=prior_text_encoder,
            prior=prior_prior,
            scheduler=prior_scheduler,
            latent_mean=prior_latent_mean,
            latent_std=prior_latent_std,
            resolution_multiple=prior_resolution_multiple,
        )
        self.decoder_pipe = WuerstchenDecoderPipeline(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            decoder=decoder,
            scheduler=scheduler,
            vqgan=vqgan,
            latent_dim_scale=latent_dim_scale,
        )
        super().__init__()

    @classmethod
    def _places(cls, options: LoadOptions, settings: dict[str, Any]) -> tuple[Any, ...]:
        return options, LoadOptions(settings, "prior_", like=options), settings.pop("prior", None)

    @classmethod
    def _arguments(
        cls,
        folder: Path,
        given: dict[str, Any],
        options: LoadOptions,
        prior_options: LoadOptions,
        prior_place: Any,
    ) -> dict[str, Any]:
        return combined_arguments(folder, options, prior_options, given, prior_place)

    def _loaded_from(self, folder: Path) -> None:
        self.decoder_pipe._loaded_from(folder)

    def _write(self, folder: Path) -> None:
        decoder, prior = decoder_folder_of(self.decoder_pipe), prior_folder_of(self.prior_pipe)
        write_over(folder, lambda new: write_combined_folder(decoder, prior, new))

    @property
    def config(self) -> Config:
        """The config values of both pipelines, the prior's with the prefix ``prior_``."""
        prior = {f"prior_{name}": value for name, value in self.prior_pipe.config.items()}
        return Config({**self.decoder_pipe.config, **prior})

    def _pipes(self) -> tuple[DiffusionPipeline, ...]:
        return (self.prior_pipe, self.decoder_pipe)

    def _lora_networks(self) -> dict[str, nn.Module]:
        return self.prior_pipe._lora_networks()

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Sets tqdm's options for later progress bars of both pipelines: ``disable=True`` hides them."""
        for pipe in self._pipes():
            pipe.set_progress_bar_config(**kwargs)
        super().set_progress_bar_config(**kwargs)

    @property
    def guidance_scale(self) -> float:
        """The decoder's guidance scale. ``prior_pipe`` has the prior's."""
        return self.decoder_pipe.guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the decoder uses guidance."""
        return self.decoder_pipe.do_classifier_free_guidance

    @property
    def num_timesteps(self) -> int:
        """Number of the decoder's steps. ``prior_pipe`` has the prior's."""
        return self.decoder_pipe.num_timesteps

    @no_type_check  # wrong types are refused below, with better messages
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int = 512,
        width: int = 512,
        prior_num_inference_steps: int = 60,
        prior_timesteps: Sequence[float] | Tensor | None = None,
        prior_guidance_scale: float = 4.0,
        num_inference_steps: int = 12,
        decoder_timesteps: Sequence[float] | Tensor | None = None,
        decoder_guidance_scale: float = 0.0,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        prior_callback_on_step_end: Callable[..., Any] | None = None,
        prior_callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        prior_callback: Callable[..., Any] | None = None,
        prior_callback_steps: int | None = None,
        callback: Callable[..., Any] | None = None,
        callback_steps: int | None = None,
    ) -> ImagePipelineOutput | tuple[Images]:
        """Generates ``num_images_per_prompt`` images for each prompt, first all of the first prompt.

        ``height`` and ``width`` must be multiples of 8. The networks' larger outputs are cropped, except with
        ``output_type`` "latent". ``prior_...`` arguments, ``latents`` and the embeddings are passed to the
        prior's pipeline, ``decoder_...``, ``callback...`` and ``num_inference_steps`` to the decoder's, which
        document them. With ``prompt_embeds`` the decoder still reads ``prompt``, or the empty prompt if there
        is none. Both use the same ``generator``, the prior first.
        """
        num_images_per_prompt = check_count("num_images_per_prompt", num_images_per_prompt)
        prompts = _checked_prompts(prompt, prompt_embeds)
        prior = {
            "prompt": prompts if prompt_embeds is None else None,
            "height": height,
            "width": width,
            "num_inference_steps": prior_num_inference_steps,
            "timesteps": prior_timesteps,
            "guidance_scale": prior_guidance_scale,
            "negative_prompt": negative_prompt if negative_prompt_embeds is None else None,
            "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
            "num_images_per_prompt": num_images_per_prompt,
            "latents": latents,
            "callback_on_step_end": prior_callback_on_step_end,
            "callback_on_step_end_tensor_inputs": prior_callback_on_step_end_tensor_inputs,
            "callback": prior_callback,
            "callback_steps": prior_callback_steps,
        }
        decoder = {
            "num_inference_steps": num_inference_steps,
            "timesteps": decoder_timesteps,
            "guidance_scale": decoder_guidance_scale,
            "negative_prompt": negative_prompt,
            "callback_on_step_end": callback_on_step_end,
            "callback_on_step_end_tensor_inputs": callback_on_step_end_tensor_inputs,
            "callback": callback,
            "callback_steps": callback_steps,
        }
        images = self._run(prior, decoder, prompts, generator, output_type)
        return ImagePipelineOutput(images) if return_dict else (images,)

    def _run(
        self,
        prior: dict[str, Any],
        decoder: dict[str, Any],
        prompts: list[str] | None,
        generator: Any,
        output_type: Any,
    ) -> Images:
        """Runs both pipelines with their arguments, after checking those of both."""
        check_output_type(output_type)
        self._check_parts(output_type)
        size = self._checked_size(prior["height"], prior["width"])
        for pipe, prefix, given in ((self.prior_pipe, "prior_", prior), (self.decoder_pipe, "", decoder)):
            check_steps(prefix, given["num_inference_steps"], given["timesteps"])
            names = given["callback_on_step_end_tensor_inputs"]
            check_callbacks(given["callback_on_step_end"], names, pipe._callback_tensor_inputs, prefix)
        check_scale("prior_guidance_scale", prior["guidance_scale"])
        if check_scale("decoder_guidance_scale", decoder["guidance_scale"]) > 1:
            check_prompt("negative_prompt", decoder["negative_prompt"])

        (embeddings,) = self.prior_pipe(**prior, generator=generator, output_type="pt", return_dict=False)
        (images,) = self.decoder_pipe(
            image_embeddings=embeddings,
            prompt=[""] * (len(embeddings) // prior["num_images_per_prompt"]) if prompts is None else prompts,
            **decoder,
            generator=generator,
            output_type="latent" if output_type == "latent" else "pt",
            return_dict=False,
        )
        return images if output_type == "latent" else as_output(centre_crop(images, *size), output_type)

    def _check_parts(self, output_type: str | None) -> None:
        """Raises ``UserError`` if the components cannot work together."""
        self.decoder_pipe.check_parts(output_type)
        channels, expected = plain(self.prior_prior).config.c_in, self.decoder_pipe.embedding_channels()
        if expected not in (None, channels):
            raise UserError(
                f"The prior gives image_embeddings of {channels} channels. The decoder reads {expected}. "
                "Load both from the same model."
            )

    def _checked_size(self, height: Any, width: Any) -> tuple[int, int]:
        """The size in pixels. Raises ``TypeError`` or ``UserError`` for an unsupported one."""
        for name, side in (("height", height), ("width", width)):
            pixels = check_side(name, side)
            if pixels % MULTIPLE:
                raise UserError(
                    f"{name} must be a multiple of {MULTIPLE}, got {side}. Use "
                    f"{max(1, round(pixels / MULTIPLE)) * MULTIPLE}."
                )
            grid = self.prior_pipe.grid_side(pixels)
            decoded = self.decoder_pipe.vqgan.config.factor * self.decoder_pipe.latent_side(grid)
            if decoded < pixels:
                raise UserError(
                    f"{name}={side} is too large: with this model's resolution_multiple and "
                    "latent_dim_scale, "
                    f"the decoder gives {decoded} pixels. Correct these numbers."
                )
        return int(height), int(width)


class AutoPipelineForText2Image:
    """Returns the pipeline for text to image, which is the combined one."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, **settings: Any
    ) -> WuerstchenCombinedPipeline:
        """``WuerstchenCombinedPipeline.from_pretrained``."""
        return WuerstchenCombinedPipeline.from_pretrained(pretrained_model_name_or_path, **settings)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **parts: Any) -> WuerstchenCombinedPipeline:
        """A pipeline that shares the components of a combined or a decoder's pipeline, except for
        ``parts``."""
        if isinstance(pipeline, WuerstchenPriorPipeline):
            raise UserError("A prior alone cannot generate images. Pass the decoder's pipeline.")
        return WuerstchenCombinedPipeline.from_pipe(pipeline, **parts)


def _checked_prompts(prompt: Any, prompt_embeds: Any) -> list[str] | None:
    """The prompts as a list. Raises ``UserError`` if there are not as many ``prompt_embeds``."""
    prompts = check_prompt("prompt", prompt)
    if prompts is not None and prompt_embeds is not None and len(prompt_embeds) % len(prompts):
        raise UserError(
            f"There must be as many prompt_embeds as prompts, got {len(prompt_embeds)} and {len(prompts)}."
        )
    return prompts


def combined_arguments(
    folder: Path,
    options: LoadOptions,
    prior_options: LoadOptions,
    given: Mapping[str, Any],
    prior_place: Any = None,
) -> dict[str, Any]:
    """The components and config values of the combined pipeline, from its folder or both pipelines' folders.

    ``prior_place`` is a folder or a name on the hub to load Stage C from: a pipeline or a single network.
    """
    prior_given = {
        name.removeprefix("prior_"): part for name, part in given.items() if name.startswith("prior_")
    }
    decoder_given = {name: part for name, part in given.items() if not name.startswith("prior_")}
    kind = pipeline_class(folder)
    if kind == PRIOR_PIPELINE:
        raise CheckpointError(
            f"{folder} holds only a {kind}. Pass the decoder's folder, which names its prior."
        )
    place = None
    if prior_place is not None:
        if not isinstance(prior_place, str | Path):
            raise UserError(
                f"prior must be a folder or a name on the hub, got a {type(prior_place).__name__}. Pass a "
                "network as prior_prior."
            )
        place = prior_options.folder(prior_place)
        if not (place / "model_index.json").is_file():
            network = read_prior_network(place, dtype=prior_options.dtype, variant=prior_options.variant)
            prior_given, place = {"prior": network, **prior_given}, None
    arguments = decoder_arguments(folder, options, decoder_given)
    if all(name in prior_given for name in PRIOR_PARTS):
        prior = prior_given
    elif place is not None:
        prior = prior_arguments(place, prior_options, prior_given)
    elif kind == COMBINED_PIPELINE:
        prior = prior_arguments(folder, prior_options, prior_given)
    else:
        prior = prior_arguments(prior_options.folder(linked_prior(folder)), prior_options, prior_given)
    return {**arguments, **{f"prior_{name}": value for name, value in prior.items()}}

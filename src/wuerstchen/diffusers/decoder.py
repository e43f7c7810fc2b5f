"""Stages B and A with diffusers' names: from semantic latents to images."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, no_type_check

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from wuerstchen.checkpoints.diffusers import (
    COMBINED_PIPELINE,
    DECODER_PARTS,
    DecoderFolder,
    linked_prior,
    pipeline_class,
    read_decoder_folder,
)
from wuerstchen.checkpoints.diffusers_write import write_decoder_folder
from wuerstchen.checkpoints.hub import HUB_NAME
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
from wuerstchen.diffusers.outputs import ImagePipelineOutput
from wuerstchen.diffusers.prompts import check_negative, check_prompt, encode
from wuerstchen.diffusers.sampling import (
    Callbacks,
    LoopArguments,
    State,
    check_count,
    check_scale,
    sample_latents,
    text_rows,
)
from wuerstchen.diffusers.scheduler import DDPMWuerstchenScheduler, schedule_of
from wuerstchen.errors import CheckpointError, UserError
from wuerstchen.images import to_images
from wuerstchen.models.decoder import Decoder
from wuerstchen.models.vqgan import VQGAN

OUTPUT_TYPES = ("pt", "np", "pil", "latent")
DECODER_NUMBERS = ("latent_dim_scale",)

Images = list[Image.Image] | np.ndarray | Tensor


@published
class WuerstchenDecoderPipeline(DiffusionPipeline):
    """From semantic latents (``image_embeddings``) and prompts to images.

    ``latent_dim_scale`` is the number of Stage A latents per semantic latent and side.
    """

    model_cpu_offload_seq = "text_encoder->decoder->vqgan"
    _callback_tensor_inputs = (
        "latents",
        "text_encoder_hidden_states",
        "negative_prompt_embeds",
        "image_embeddings",
    )
    _component_names = ("tokenizer", "text_encoder", "decoder", "scheduler", "vqgan")
    _network_name = "decoder"

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        decoder: Any,
        scheduler: Any,
        vqgan: Any,
        latent_dim_scale: float = 10.67,
    ) -> None:
        super().__init__(latent_dim_scale=latent_dim_scale)
        check_positive(latent_dim_scale=latent_dim_scale)
        self._prior_name: str | None = None  # on the hub, if the decoder's folder names one
        check_network("decoder", decoder, Decoder)
        check_network("vqgan", vqgan, VQGAN)
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.decoder = decoder
        self.scheduler = scheduler
        self.vqgan = vqgan

    @classmethod
    def _arguments(cls, folder: Path, given: dict[str, Any], options: LoadOptions) -> dict[str, Any]:
        return decoder_arguments(folder, options, given)

    def _loaded_from(self, folder: Path) -> None:
        self._prior_name = prior_name(folder)

    def _write(self, folder: Path) -> None:
        write_over(folder, lambda new: write_decoder_folder(decoder_folder_of(self), new))

    def _encode(self, texts: list[str], device: torch.device) -> Float[Tensor, "b t c"]:
        return encode(self.tokenizer, self.text_encoder, texts, device, self._recorded)

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | list[str],
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = False,
        negative_prompt: str | list[str] | None = None,
    ) -> tuple[Float[Tensor, "bn t c"], Float[Tensor, "bn t c"] | None]:
        """Text states of prompts and, with guidance, of negative prompts, repeated for each image."""
        prompts = check_prompt("prompt", prompt) or [""]
        negative = None
        with self._using(self.text_encoder) as home:
            states = self._encode(prompts, home)
            if do_classifier_free_guidance:
                texts = check_negative(negative_prompt, len(prompts))
                negative = self._encode(texts, home)

        def repeated(states: Tensor) -> Tensor:
            return states.to(home if device is None else device).repeat_interleave(num_images_per_prompt, 0)

        return repeated(states), None if negative is None else repeated(negative)

    @no_type_check  # wrong types are refused below, with better messages
    @torch.no_grad()
    def __call__(
        self,
        image_embeddings: Tensor | np.ndarray | list[Tensor],
        prompt: str | list[str] | None = None,
        num_inference_steps: int = 12,
        timesteps: Sequence[float] | Tensor | None = None,
        guidance_scale: float = 0.0,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        callback: Callable[..., Any] | None = None,
        callback_steps: int | None = None,
    ) -> ImagePipelineOutput | tuple[Images]:
        """Generates ``num_images_per_prompt`` images for each of ``image_embeddings``, (n, 16, h, w).

        Each prompt applies to an equal number of consecutive ``image_embeddings``: pass one prompt, one for
        each, or one for each group. Images have 4·int(h·latent_dim_scale) pixels per side. ``output_type``
        "latent" returns Stage A's latents, with sides rounded up to a multiple that the network needs.
        ``vqgan.decode(latents)`` decodes them, including the scale factor. For the other arguments, see the
        prior's pipeline.
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
        prompts = check_prompt("prompt", prompt)
        if prompts is None:
            raise TypeError("'prompt' must be of type 'list' or 'str', got None. Use '' for no prompt.")
        if uses_guidance:
            check_negative(negative_prompt, len(prompts))
        arguments = LoopArguments.checked(num_inference_steps, timesteps, latents, generator, callbacks)
        num_images_per_prompt = check_count("num_images_per_prompt", num_images_per_prompt)
        check_output_type(output_type)
        self.check_parts(output_type)
        embeddings = self._checked_embeddings(image_embeddings, len(prompts))

        count = len(embeddings) * num_images_per_prompt
        negative = negative_prompt if uses_guidance else None
        states = self.encode_prompt(prompts, None, count // len(prompts), uses_guidance, negative)
        size = [self.latent_side(side) for side in embeddings.shape[2:]]
        multiple = self.decoder.config.size_multiple
        canvas = [-(-side // multiple) * multiple for side in size]
        shape = (count, self.decoder.config.c_in, *canvas)
        images = sample_latents(self, self.decoder, shape, states, arguments, image_embeddings=embeddings)
        if output_type != "latent":
            factor = self.vqgan.config.factor
            pixels = centre_crop(self._pixels(images), factor * size[0], factor * size[1])
            images = as_output(pixels, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images) if return_dict else (images,)

    def latent_side(self, positions: int) -> int:
        """Stage A's latents along a side of ``positions`` semantic latents."""
        return max(int(positions * self.config.latent_dim_scale), 1)

    def check_parts(self, output_type: str | None) -> None:
        """Raises ``UserError`` if the components do not fit together."""
        config, vqgan = plain(self.decoder).config, plain(self.vqgan).config
        check_text_width(self, config.clip_embd, "decoder")
        if output_type != "latent" and config.c_in != vqgan.latent_channels:
            raise UserError(
                f"The decoder samples latents of {config.c_in} channels. The vqgan reads latents of "
                f"{vqgan.latent_channels}. Load both from the same model."
            )
        if output_type == "pil" and vqgan.out_channels not in (1, 3, 4):
            raise UserError(
                f"The vqgan gives images of {vqgan.out_channels} channels. PIL has images of 1, 3 or 4. "
                "Use output_type='pt' or 'np'."
            )

    def embedding_channels(self) -> int | None:
        """Channels of ``image_embeddings``. None for a decoder that does not read them."""
        config = plain(self.decoder).config
        return config.effnet_embd if any(config.conditioned) else None

    def _checked_embeddings(self, given: Any, prompts: int) -> Float[Tensor, "b c h w"]:
        """``image_embeddings`` as one tensor. Raises ``TypeError`` or ``UserError``."""
        parts = given if isinstance(given, list | tuple) else [given]
        for part in parts:
            if not isinstance(part, Tensor | np.ndarray):
                raise TypeError(
                    f"'image_embeddings' must be of type 'torch.Tensor' or 'np.array', got {type(part)}."
                )
        embeddings = [
            part if isinstance(part, Tensor) else torch.as_tensor(part, device="cpu") for part in parts
        ]
        expected = self.embedding_channels()
        if not embeddings or any(
            one.ndim != 4 or expected not in (None, one.shape[1]) or 0 in one.shape for one in embeddings
        ):
            raise UserError(
                f"image_embeddings must have the shape (batch, {expected or 'channels'}, h, w), got "
                f"{[tuple(one.shape) for one in embeddings]}. The prior's pipeline returns such tensors."
            )
        if len({one.shape[1:] for one in embeddings}) > 1:
            raise UserError(
                "image_embeddings differ in size. A batch must have one size. Call the pipeline "
                "once per size."
            )
        joined = torch.cat([one.to(embeddings[0]) for one in embeddings])
        if len(joined) % prompts:
            raise UserError(
                f"The number of prompts must divide that of image_embeddings, got {prompts} and "
                f"{len(joined)}. "
                "Pass one prompt, or one for each."
            )
        return joined

    def _context_arguments(self, state: State, uses_guidance: bool) -> tuple[Any, ...]:
        """The arguments of the network's context."""
        latents, embeddings = state["latents"], state["image_embeddings"]
        assert latents is not None
        assert embeddings is not None
        if len(latents) % len(embeddings):
            raise UserError(
                f"A callback changed the number of image_embeddings to {len(embeddings)}, which "
                "does not divide "
                f"the {len(latents)} latents."
            )
        embeddings = embeddings.repeat_interleave(len(latents) // len(embeddings), dim=0)
        if uses_guidance:
            embeddings = torch.cat([embeddings, torch.zeros_like(embeddings)])
        text = text_rows(state["text_encoder_hidden_states"], len(latents), uses_guidance)
        return embeddings, (latents.shape[2], latents.shape[3]), text

    def _pixels(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c_out height width"]:
        with self._using(self.vqgan) as device:
            decode = self._recorded(self.vqgan, self.vqgan.decode)
            return decode(latents.to(device, dtype_of(self.vqgan))).clamp(0, 1)


def check_output_type(output_type: Any) -> None:
    if output_type not in OUTPUT_TYPES:
        raise UserError(
            "Only the output types `pt`, `np`, `pil` and `latent` are supported not "
            f"output_type={output_type!r}"
        )


def centre_crop(pixels: Float[Tensor, "b c _ _"], height: int, width: int) -> Float[Tensor, "b c _ _"]:
    """The centre of images, starting at an even row and column."""
    top, left = ((have - want) // 4 * 2 for have, want in zip(pixels.shape[2:], (height, width), strict=True))
    return pixels[:, :, top : top + height, left : left + width]


def as_output(pixels: Float[Tensor, "b c height width"], output_type: str) -> Images:
    """Images in [0, 1] as a tensor, an array (b, height, width, c), or PIL images."""
    if output_type == "pt":
        return pixels
    if output_type == "np":
        return pixels.permute(0, 2, 3, 1).cpu().float().numpy()
    return to_images(pixels)


def decoder_arguments(folder: Path, options: LoadOptions, given: Mapping[str, Any]) -> dict[str, Any]:
    """The components and config values of the decoder's pipeline: those in ``given``, and the rest from
    ``folder``."""
    read = read_decoder_folder(
        folder,
        dtype=options.dtype,
        given=[name for name in DECODER_PARTS if name in given],
        variant=options.variant,
    )
    parts = {
        "tokenizer": read.tokenizer,
        "text_encoder": read.text_encoder,
        "decoder": read.decoder,
        "vqgan": read.vqgan,
        "scheduler": DDPMWuerstchenScheduler.from_schedule(read.schedule),
    }
    return {**parts, **{name: getattr(read, name) for name in DECODER_NUMBERS}, **given}


def prior_name(folder: Path) -> str | None:
    """The prior on the hub that a decoder's folder names, if any. It is saved with the decoder."""
    if pipeline_class(folder) == COMBINED_PIPELINE or not (folder / "README.md").is_file():
        return None
    try:
        name = linked_prior(folder)
    except CheckpointError:
        return None
    return name if isinstance(name, str) and HUB_NAME.fullmatch(name) else None


def decoder_folder_of(pipe: Any) -> DecoderFolder:
    """The decoder's pipeline as a folder to write."""
    return DecoderFolder(
        decoder=plain(pipe.decoder),
        vqgan=plain(pipe.vqgan),
        text_encoder=plain(pipe.text_encoder),
        tokenizer=pipe.tokenizer,
        schedule=schedule_of(pipe.scheduler),
        prior=pipe._prior_name,
        **pipe.config,
    )

"""Stages B and A behind diffusers' names: from a semantic map to a picture."""

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
from wuerstchen.diffusers.source import Source, write_over
from wuerstchen.errors import CheckpointError, UserError
from wuerstchen.images import to_images
from wuerstchen.models.decoder import Decoder
from wuerstchen.models.vqgan import VQGAN

OUTPUT_TYPES = ("pt", "np", "pil", "latent")
DECODER_NUMBERS = ("latent_dim_scale",)

Images = list[Image.Image] | np.ndarray | Tensor


@published
class WuerstchenDecoderPipeline(DiffusionPipeline):
    """From semantic maps and prompts to pictures.

    ``latent_dim_scale`` is how many Stage A latents a side has for a position of the map.
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
        self._prior_name: str | None = None  # on the hub, if the decoder came with one
        check_network("decoder", decoder, Decoder)
        check_network("vqgan", vqgan, VQGAN)
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.decoder = decoder
        self.scheduler = scheduler
        self.vqgan = vqgan

    @classmethod
    def _arguments(cls, folder: Path, given: dict[str, Any], source: Source) -> dict[str, Any]:
        return decoder_arguments(folder, source, given)

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
        """Text states of prompts and, with guidance, of negative prompts, each repeated for its images."""
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

    @no_type_check  # what is wrong is refused below, in words that say what to do
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
        """Draws ``num_images_per_prompt`` pictures of each semantic map, (maps, 16, h, w).

        Each prompt serves an equal number of maps that follow one another: give one prompt, or one for each
        map, or one for each group. A picture has 4·int(h·latent_dim_scale) pixels a side; ``output_type``
        "latent" gives Stage A's latents, whose sides are rounded up to what the network can halve;
        ``vqgan.decode(latents)`` gives their pixels, the scale factor is its own. Of the other arguments,
        the prior pipeline tells.
        """
        callbacks = Callbacks.checked(
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            self._callback_tensor_inputs,
            callback,
            callback_steps,
        )
        self._guidance_scale = check_scale("guidance_scale", guidance_scale)
        guides = self.do_classifier_free_guidance
        prompts = check_prompt("prompt", prompt)
        if prompts is None:
            raise TypeError("'prompt' must be of type 'list' or 'str', but is missing; use '' for none")
        if guides:
            check_negative(negative_prompt, len(prompts))
        arguments = LoopArguments.checked(num_inference_steps, timesteps, latents, generator, callbacks)
        num_images_per_prompt = check_count("num_images_per_prompt", num_images_per_prompt)
        check_output_type(output_type)
        self.check_parts(output_type)
        maps = self._checked_maps(image_embeddings, len(prompts))

        count = len(maps) * num_images_per_prompt
        negative = negative_prompt if guides else None
        states = self.encode_prompt(prompts, None, count // len(prompts), guides, negative)
        size = [self.latent_side(side) for side in maps.shape[2:]]
        multiple = self.decoder.config.size_multiple
        canvas = [-(-side // multiple) * multiple for side in size]
        shape = (count, self.decoder.config.c_in, *canvas)
        images = sample_latents(self, self.decoder, shape, states, arguments, image_embeddings=maps)
        if output_type != "latent":
            factor = self.vqgan.config.factor
            pixels = centre_crop(self._pixels(images), factor * size[0], factor * size[1])
            images = as_output(pixels, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images) if return_dict else (images,)

    def latent_side(self, positions: int) -> int:
        """How many of Stage A's latents a side has for ``positions`` of the map."""
        return max(int(positions * self.config.latent_dim_scale), 1)

    def check_parts(self, output_type: str | None) -> None:
        """Raises ``UserError`` if the components cannot work together, before anything is drawn."""
        config, vqgan = plain(self.decoder).config, plain(self.vqgan).config
        check_text_width(self, config.clip_embd, "decoder")
        if output_type != "latent" and config.c_in != vqgan.latent_channels:
            raise UserError(
                f"The decoder draws latents of {config.c_in} channels. The vqgan reads latents of "
                f"{vqgan.latent_channels}. Load both from the same model."
            )
        if output_type == "pil" and vqgan.out_channels not in (1, 3, 4):
            raise UserError(
                f"The vqgan gives images of {vqgan.out_channels} channels. PIL has images of 1, 3 or 4. "
                "Use output_type='pt' or 'np'."
            )

    def map_channels(self) -> int | None:
        """How many channels ``image_embeddings`` have; None for a decoder that does not look at them."""
        config = plain(self.decoder).config
        return config.effnet_embd if any(config.conditioned) else None

    def _checked_maps(self, given: Any, prompts: int) -> Float[Tensor, "b c h w"]:
        """The semantic maps as one tensor. Raises ``TypeError`` or ``UserError``."""
        parts = given if isinstance(given, list | tuple) else [given]
        for part in parts:
            if not isinstance(part, Tensor | np.ndarray):
                raise TypeError(
                    f"'image_embeddings' must be of type 'torch.Tensor' or 'np.array', but got {type(part)}"
                )
        maps = [part if isinstance(part, Tensor) else torch.as_tensor(part, device="cpu") for part in parts]
        wanted = self.map_channels()
        if not maps or any(
            one.ndim != 4 or wanted not in (None, one.shape[1]) or 0 in one.shape for one in maps
        ):
            raise UserError(
                f"image_embeddings have shapes {[tuple(one.shape) for one in maps]}, but must be "
                f"(batch, {wanted or 'channels'}, h, w); the prior pipeline gives such"
            )
        if len({one.shape[1:] for one in maps}) > 1:
            raise UserError("image_embeddings differ in size, so they are no batch; call once for each")
        joined = torch.cat([one.to(maps[0]) for one in maps])
        if len(joined) % prompts:
            raise UserError(
                f"{prompts} prompts do not fit {len(joined)} image_embeddings; "
                "give one prompt, or one for each"
            )
        return joined

    def _steering(self, state: State, guides: bool) -> tuple[Any, ...]:
        """The arguments of the network's context."""
        latents, maps = state["latents"], state["image_embeddings"]
        assert latents is not None
        assert maps is not None
        if len(latents) % len(maps):
            raise UserError(f"a callback left {len(maps)} image_embeddings for {len(latents)} latents")
        maps = maps.repeat_interleave(len(latents) // len(maps), dim=0)
        if guides:
            maps = torch.cat([maps, torch.zeros_like(maps)])
        text = text_rows(state["text_encoder_hidden_states"], len(latents), guides)
        return maps, (latents.shape[2], latents.shape[3]), text

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
    """The middle of pictures, from an even row and column on."""
    top, left = ((have - want) // 4 * 2 for have, want in zip(pixels.shape[2:], (height, width), strict=True))
    return pixels[:, :, top : top + height, left : left + width]


def as_output(pixels: Float[Tensor, "b c height width"], output_type: str) -> Images:
    """Pictures in [0, 1] in the form asked for: a tensor, an array (b, height, width, c), or PIL images."""
    if output_type == "pt":
        return pixels
    if output_type == "np":
        return pixels.permute(0, 2, 3, 1).cpu().float().numpy()
    return to_images(pixels)


def decoder_arguments(folder: Path, source: Source, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the decoder pipeline is made of: parts and numbers ``given``, the rest read."""
    read = read_decoder_folder(
        folder,
        dtype=source.dtype,
        given=[name for name in DECODER_PARTS if name in given],
        variant=source.variant,
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
    """The prior on the hub that a decoder's folder names, if it does: it goes with the decoder when saved."""
    if pipeline_class(folder) == COMBINED_PIPELINE or not (folder / "README.md").is_file():
        return None
    try:
        name = linked_prior(folder)
    except CheckpointError:
        return None
    return name if isinstance(name, str) and HUB_NAME.fullmatch(name) else None


def decoder_folder_of(pipe: Any) -> DecoderFolder:
    """The decoder pipeline as it is written."""
    return DecoderFolder(
        decoder=plain(pipe.decoder),
        vqgan=plain(pipe.vqgan),
        text_encoder=plain(pipe.text_encoder),
        tokenizer=pipe.tokenizer,
        schedule=schedule_of(pipe.scheduler),
        prior=pipe._prior_name,
        **pipe.config,
    )

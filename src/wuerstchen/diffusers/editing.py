"""Image to image and inpainting with diffusers' argument names.

diffusers has no such pipelines for Würstchen. These need a compressor, which its folders do not contain: pass
one as ``compressor``, or load a model in another layout.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, no_type_check

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from wuerstchen.checkpoints.layouts import Sources
from wuerstchen.diffusers.base import device_and_dtype
from wuerstchen.diffusers.decoder import Images, as_output
from wuerstchen.diffusers.options import drop_options
from wuerstchen.diffusers.outputs import ImagePipelineOutput
from wuerstchen.diffusers.prompts import check_negative, check_prompt
from wuerstchen.diffusers.sampling import check_count, check_generator, check_scale
from wuerstchen.errors import UserError
from wuerstchen.images import to_images, to_tensor
from wuerstchen.pipeline import Wuerstchen, load
from wuerstchen.sampling import MAX_SEED, Sampling

_PRECISIONS: dict[Any, Any] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    None: "float32",
}
OUTPUT_TYPES = ("pil", "np", "pt")
CHANNELS = (1, 3, 4)
_ONE_OR_MORE = Image.Image | np.ndarray | Tensor | Sequence[Image.Image]


class _EditingPipeline:
    """What both pipelines share."""

    def __init__(self, model: Wuerstchen) -> None:
        """``model`` has all networks, also the compressor (``wuerstchen.load``)."""
        model._compressor()  # raises
        self.model = model

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        torch_dtype: torch.dtype | None = None,
        compressor: str | Path | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> Any:
        """Loads a model in any layout, from a folder or by its name on the hub, onto the CPU.

        ``compressor`` is a file or folder with one, for models that have none. ``dtype`` is another name of
        ``torch_dtype``. Options of diffusers' loaders that change nothing here are ignored. Raises
        ``CheckpointError`` or ``UserError``, also for all other options.
        """
        drop_options(settings)
        if settings.pop("use_safetensors", None) is False:
            raise UserError("use_safetensors=False is not supported. Omit it: both kinds of files are read.")
        if refused := [name for name, value in settings.items() if value is not None]:
            raise UserError(
                f"{refused[0]} is not supported by pipelines for editing. Load the model with "
                "wuerstchen.load, and pass it to the pipeline."
            )
        torch_dtype = device_and_dtype((), (torch_dtype, dtype))[1]
        if torch_dtype not in _PRECISIONS:
            raise UserError(
                f"torch_dtype must be float32, bfloat16 or float16, got {torch_dtype}. Omit it for float32."
            )
        sources = Sources(compressor=compressor, revision=revision, local_files_only=local_files_only)
        model = load(
            pretrained_model_name_or_path, "cpu", precision=_PRECISIONS[torch_dtype], sources=sources
        )
        return cls(model)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def to(
        self,
        *args: Any,
        device: str | int | torch.device | None = None,
        dtype: torch.dtype | None = None,
        torch_device: str | int | torch.device | None = None,
        torch_dtype: torch.dtype | None = None,
        silence_dtype_warnings: bool = False,
    ) -> Any:
        """Moves or converts all networks: ``to("cuda")``, ``to(torch.float16)``, or both. Returns the
        pipeline.

        A model that was loaded with ``low_memory`` keeps it. Raises ``UserError`` while adapters are loaded.
        """
        target, wanted = device_and_dtype((*args, device, torch_device), (dtype, torch_dtype))
        if self.model._adapters.scales:
            raise UserError("Adapters are loaded. Call model.unload_lora() first, and load them again after.")
        if wanted not in _PRECISIONS:
            raise UserError(f"dtype must be float32, bfloat16 or float16, got {wanted}. Omit it to keep it.")
        if wanted is not None:
            for network in self.model.cascade.networks().values():
                network.to(wanted)
        place = self.model.device if target is None else target
        self.model = Wuerstchen(self.model.cascade, place, low_memory=self.model.low_memory)
        return self

    def _run(
        self,
        prompt: Any,
        negative_prompt: Any,
        image: Any,
        output_type: Any,
        generator: Any,
        num_images_per_prompt: Any,
        sampling: Sampling,
        return_dict: bool,
        **edit: Any,
    ) -> ImagePipelineOutput | tuple[Images]:
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}.")
        prompts = check_prompt("prompt", prompt) or [""]
        count = check_count("num_images_per_prompt", num_images_per_prompt)
        images = as_images("image", image)
        if len(prompts) == 1:
            prompts *= len(images)
        found = self.model.generate(
            prompts,
            negative=check_negative(negative_prompt, len(prompts)),
            init=images,
            count=count,
            seed=_seeds(generator, len(prompts) * count),
            sampling=sampling,
            **edit,
        )
        if output_type != "pil":
            if len({one.size for one in found}) > 1:
                raise UserError(f"output_type {output_type!r} needs images of one size. Use 'pil'.")
            found = as_output(torch.stack([to_tensor(one) for one in found]), output_type)
        return ImagePipelineOutput(found) if return_dict else (found,)


class WuerstchenImg2ImgPipeline(_EditingPipeline):
    """Varies images: Stage C starts from their semantic latents with noise."""

    @no_type_check  # wrong types are refused, with better messages
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: _ONE_OR_MORE | None = None,
        strength: float = 0.7,
        height: int | None = None,
        width: int | None = None,
        prior_num_inference_steps: int | None = None,
        prior_guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        decoder_guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Images]:
        """Generates variations of ``image``: a PIL image, a list of them, an array or a tensor.

        Arrays have the shape (h, w, 3) or (b, h, w, 3), tensors (3, h, w) or (b, 3, h, w), with values in
        [0, 1]. ``height`` and ``width`` default to the model's image size. Numbers of steps and guidance
        scales default to the model's.
        """
        return self._run(
            prompt,
            negative_prompt,
            image,
            output_type,
            generator,
            num_images_per_prompt,
            _sampling(
                prior_num_inference_steps, prior_guidance_scale, num_inference_steps, decoder_guidance_scale
            ),
            return_dict,
            strength=strength,
            size=_size(height, width, self.model.cascade.settings.image_size),
        )


class WuerstchenInpaintPipeline(_EditingPipeline):
    """Repaints the white part of a mask. Pixels outside it are those of the image, as 8-bit sRGB on
    white."""

    @no_type_check
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: _ONE_OR_MORE | None = None,
        mask_image: _ONE_OR_MORE | None = None,
        strength: float = 1.0,
        padding_mask_crop: int | None = None,
        height: int | None = None,
        width: int | None = None,
        prior_num_inference_steps: int | None = None,
        prior_guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        decoder_guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Images]:
        """Repaints ``image`` where ``mask_image`` is white. Grey pixels have a part of the ``strength``.

        Images have the forms of ``WuerstchenImg2ImgPipeline``. Masks are images too, or have the shape
        (h, w), as arrays (b, h, w) and as tensors (b, 1, h, w). Without ``height`` and ``width`` the result
        has the size of the image. With ``padding_mask_crop``, only the masked region and so many pixels
        around it are sampled, enlarged to ``height`` and ``width``, and pasted back.
        """
        if mask_image is None:
            raise UserError("mask_image is missing. Pass an image in which the part to repaint is white.")
        size = None
        if height is not None or width is not None:
            size = _size(height, width, self.model.cascade.settings.image_size)
        return self._run(
            prompt,
            negative_prompt,
            image,
            output_type,
            generator,
            num_images_per_prompt,
            _sampling(
                prior_num_inference_steps, prior_guidance_scale, num_inference_steps, decoder_guidance_scale
            ),
            return_dict,
            strength=strength,
            size=size,
            mask=as_images("mask_image", mask_image),
            crop_to_mask=False if padding_mask_crop is None else padding_mask_crop,
        )


class AutoPipelineForImage2Image:
    """Returns the pipeline for image to image."""

    @classmethod
    def from_pretrained(cls, name: str | Path, **settings: Any) -> WuerstchenImg2ImgPipeline:
        """``WuerstchenImg2ImgPipeline.from_pretrained``."""
        return WuerstchenImg2ImgPipeline.from_pretrained(name, **settings)

    @classmethod
    def from_pipe(cls, pipeline: Any) -> WuerstchenImg2ImgPipeline:
        """A pipeline with the same networks. Raises ``UserError`` for a pipeline without a compressor."""
        return WuerstchenImg2ImgPipeline(_model_of(pipeline))


class AutoPipelineForInpainting:
    """Returns the pipeline for inpainting."""

    @classmethod
    def from_pretrained(cls, name: str | Path, **settings: Any) -> WuerstchenInpaintPipeline:
        """``WuerstchenInpaintPipeline.from_pretrained``."""
        return WuerstchenInpaintPipeline.from_pretrained(name, **settings)

    @classmethod
    def from_pipe(cls, pipeline: Any) -> WuerstchenInpaintPipeline:
        """A pipeline with the same networks. Raises ``UserError`` for a pipeline without a compressor."""
        return WuerstchenInpaintPipeline(_model_of(pipeline))


def _model_of(pipeline: Any) -> Wuerstchen:
    if not isinstance(pipeline, _EditingPipeline):
        raise UserError(
            f"pipeline must be one for editing, got {type(pipeline).__name__}, which has no compressor. "
            "Use from_pretrained, with compressor= if the model has none."
        )
    return pipeline.model


def as_images(name: str, value: Any) -> list[Image.Image]:
    """PIL images from one or more of them, an array or a tensor. Raises ``UserError``.

    Four channels are RGBA. A three-dimensional array or tensor of a mask is a batch, except for an array that
    ends in 1, 3 or 4 channels.
    """
    if value is None:
        raise UserError(f"{name} is missing. Pass a PIL image.")
    if isinstance(value, Image.Image):
        return [value]
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "fiub":
            raise UserError(f"{name} must have numbers, got an array of {value.dtype}. Pass a PIL image.")
        pixels = value / 255 if value.dtype == np.uint8 else value
        is_batch_of_masks = name == "mask_image" and value.ndim == 3 and value.shape[-1] not in CHANNELS
        if value.ndim == 2 or is_batch_of_masks:
            pixels = pixels[..., None]
        if pixels.ndim not in (3, 4) or pixels.shape[-1] not in CHANNELS or 0 in pixels.shape:
            raise _bad_shape(name, value, "An array", ("(h, w, 3)", "(b, h, w, 3)"))
        rows = pixels if pixels.ndim == 4 else pixels[None]
        value = torch.from_numpy(np.ascontiguousarray(rows, np.float32)).movedim(-1, 1)
    if isinstance(value, Tensor):
        is_unclear = name == "mask_image" and value.ndim == 3 and value.shape[0] != 1
        pixels = value[(None,) * max(0, 4 - value.ndim)].float()
        if value.ndim not in (2, 3, 4) or pixels.shape[1] not in CHANNELS or 0 in pixels.shape or is_unclear:
            raise _bad_shape(name, value, "A tensor", ("(3, h, w)", "(b, 3, h, w)"))
        if not (pixels.min() >= 0 and pixels.max() <= 1):
            raise UserError(f"{name} must have values from 0 to 1, got {pixels.min()} to {pixels.max()}.")
        return to_images(pixels)
    if not isinstance(value, list | tuple) or not value:
        raise UserError(f"{name} must be a PIL image, an array or a tensor, got {type(value)}.")
    return [image for one in value for image in as_images(name, one)]


def _bad_shape(name: str, value: Any, kind: str, forms: tuple[str, str]) -> UserError:
    if name == "mask_image":
        forms = ("(h, w)", "(b, 1, h, w)" if kind == "A tensor" else "(b, h, w)")
    return UserError(
        f"{name} has the shape {tuple(value.shape)}. {kind} must have the shape {forms[0]} or {forms[1]}."
    )


def _size(height: Any, width: Any, default: int) -> tuple[Any, Any]:
    return (default if width is None else width, default if height is None else height)


def _sampling(prior_steps: Any, guidance: Any, steps: Any, decoder_guidance: Any) -> Sampling:
    def scale(name: str, value: Any) -> float | None:
        # diffusers turns guidance off up to 1.
        return None if value is None else max(1.0, check_scale(name, value))

    return Sampling(
        prior_steps=prior_steps,
        guidance=scale("prior_guidance_scale", guidance),
        decoder_steps=steps,
        decoder_guidance=scale("decoder_guidance_scale", decoder_guidance),
    )


def _seeds(generator: Any, images: int) -> list[int]:
    """A seed for each image, drawn from one generator, or from a list with one for each image."""
    check_generator(generator)
    given = list(generator) if isinstance(generator, list | tuple) else [generator] * images
    if len(given) != images:
        raise UserError(f"{len(given)} generators do not match {images} images. Pass one, or one per image.")

    def drawn(one: torch.Generator | None) -> int:
        device = torch.device("cpu") if one is None else one.device
        return int(torch.randint(MAX_SEED + 1, (1,), generator=one, device=device, dtype=torch.int64))

    return [drawn(one) for one in given]

"""Stable Diffusion XL in diffusers with random weights, for comparison in ``sampling.py``."""

from collections.abc import Callable
from typing import Any

import torch


def sdxl_networks(device: torch.device, dtype: torch.dtype, tiny: bool) -> tuple[Any, Any]:
    """UNet and VAE of SDXL-base-1.0 with random weights: 2,567,463,684 and 83,653,863 parameters."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    unet: dict[str, Any] = {
        "sample_size": 128,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "use_linear_projection": True,
    }
    vae: dict[str, Any] = {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": 1024,
        "scaling_factor": 0.13025,
        "force_upcast": False,  # as in the faster variant for half precision
    }
    if tiny:
        unet |= {
            "block_out_channels": (8, 16, 16),
            "transformer_layers_per_block": [1, 1, 1],
            "attention_head_dim": [2, 2, 2],
            "cross_attention_dim": 16,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 64,
            "norm_num_groups": 4,
        }
        vae |= {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    torch.manual_seed(0)
    with device:
        networks = UNet2DConditionModel(**unet), AutoencoderKL(**vae)
    for network in networks:
        network.to(dtype).eval().requires_grad_(False)
    return networks


def drawn_by_sdxl(
    networks: tuple[Any, Any], size: tuple[int, int], batch: int, compiled: dict[str, Any] | None
) -> Callable[[int, Callable[[str], None] | None], object]:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    unet, vae = networks
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    )
    pipe = StableDiffusionXLPipeline(vae, None, None, None, None, unet, scheduler, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    draw = torch.Generator().manual_seed(0)
    shapes = {"prompt_embeds": (1, 77, unet.config.cross_attention_dim), "pooled_prompt_embeds": (1, pooled)}
    texts = {
        prefix + name: torch.randn(shape, generator=draw).to(unet.device, unet.dtype)
        for name, shape in shapes.items()
        for prefix in ("", "negative_")
    }
    if compiled is not None:
        unet.to(memory_format=torch.channels_last)
        vae.to(memory_format=torch.channels_last)
        unet.compile(**compiled)
        vae.decode = torch.compile(vae.decode, **compiled)

    def one(seed: int, on_step: Callable[[str], None] | None = None) -> object:
        callback = {} if on_step is None else {"callback_on_step_end": lambda *_: on_step("UNet") or {}}
        return pipe(
            **texts,
            **callback,
            width=size[0],
            height=size[1],
            num_inference_steps=50,
            guidance_scale=5.0,
            num_images_per_prompt=batch,
            generator=torch.Generator(unet.device).manual_seed(seed),
        ).images

    return one

"""The names and signatures of the Würstchen pipelines in diffusers.

Code written for diffusers' Würstchen runs after changing its import. It differs only where diffusers does not
work: several prompts, several images per prompt, sizes of any multiple of 8, and callbacks that change
tensors. Invalid arguments are refused before anything is computed. Image to image and inpainting, which
diffusers does not have for Würstchen, are in ``editing``.
"""

from wuerstchen.diffusers.base import DiffusionPipeline
from wuerstchen.diffusers.combined import AutoPipelineForText2Image, WuerstchenCombinedPipeline
from wuerstchen.diffusers.decoder import WuerstchenDecoderPipeline
from wuerstchen.diffusers.editing import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    WuerstchenImg2ImgPipeline,
    WuerstchenInpaintPipeline,
)
from wuerstchen.diffusers.outputs import (
    DDPMWuerstchenSchedulerOutput,
    ImagePipelineOutput,
    WuerstchenPriorPipelineOutput,
)
from wuerstchen.diffusers.prior import DEFAULT_STAGE_C_TIMESTEPS, WuerstchenPriorPipeline
from wuerstchen.diffusers.register import register
from wuerstchen.diffusers.scheduler import DDPMWuerstchenScheduler

__all__ = [
    "DEFAULT_STAGE_C_TIMESTEPS",
    "AutoPipelineForImage2Image",
    "AutoPipelineForInpainting",
    "AutoPipelineForText2Image",
    "DDPMWuerstchenScheduler",
    "DDPMWuerstchenSchedulerOutput",
    "DiffusionPipeline",
    "ImagePipelineOutput",
    "WuerstchenCombinedPipeline",
    "WuerstchenDecoderPipeline",
    "WuerstchenImg2ImgPipeline",
    "WuerstchenInpaintPipeline",
    "WuerstchenPriorPipeline",
    "WuerstchenPriorPipelineOutput",
    "register",
]

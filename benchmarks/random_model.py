"""The published v2 model with random weights, also in diffusers, for measuring without its files."""

import warnings
from collections.abc import Callable
from typing import Any

import tokenizers
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from wuerstchen.checkpoints.diffusers_config import shared_fields
from wuerstchen.diffusion.schedule import stage_c_timesteps
from wuerstchen.models.cascade import Cascade, CascadeSettings
from wuerstchen.models.decoder import Decoder, DecoderConfig
from wuerstchen.models.prior import Prior, PriorConfig
from wuerstchen.models.text import TextEncoder
from wuerstchen.models.vqgan import VQGAN, VQGANConfig

PROMPT = "a capybara wearing a raincoat, in the style of an old photograph"


def random_v2(device: torch.device, *, tiny: bool = False) -> Cascade:
    """All networks at the published sizes on ``device`` in fp32, with 3.1 billion weights.

    Weights that are initialised to zero are also random, so that every layer has an effect. ``tiny`` networks
    have the same structure but are narrow and shallow, to test a script.
    """
    text = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 20}
    decoder_text = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    configs = PriorConfig(), DecoderConfig(), VQGANConfig()
    if tiny:
        text = decoder_text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        configs = (
            PriorConfig(c=32, c_cond=32, depth=2, nhead=2),
            DecoderConfig(
                c_hidden=(16, 32, 32, 32), nhead=(-1, 2, 2, 2), blocks=(1, 1, 1, 1), c_cond=32, clip_embd=32
            ),
            VQGANConfig(embed_dim=16, bottleneck_blocks=1),
        )
    torch.manual_seed(0)
    with device:
        prior = _randomised(Prior(configs[0]))
        decoder = _randomised(Decoder(configs[1]))
        vqgan = _randomised(VQGAN(configs[2]))
        text, decoder_text = _clip(**text), _clip(**decoder_text)
    tokenizer = letters()
    return Cascade(
        settings=CascadeSettings(),
        vqgan=vqgan,
        decoder=decoder,
        prior=prior,
        text_encoder=TextEncoder.from_transformers(text, tokenizer),
        decoder_text_encoder=TextEncoder.from_transformers(decoder_text, tokenizer),
    )


def letters() -> CLIPTokenizer:
    """CLIP's tokenizer with letters instead of words, and with CLIP's ids of the start and end tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    vocab |= {"<|startoftext|>": 49_406, "<|endoftext|>": 49_407}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def _clip(**sizes: int) -> CLIPTextModel:
    width = sizes["hidden_size"]
    config = CLIPTextConfig(hidden_act="gelu", intermediate_size=4 * width, projection_dim=width, **sizes)
    return CLIPTextModel(config).eval().requires_grad_(False)


def _randomised(network: nn.Module) -> nn.Module:
    """Randomises weights that are zero. The last layers stay close to zero and so predict that all is noise.

    With larger weights they would predict the opposite, and guided sampling would diverge.
    """
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if not parameter.any():
                inputs = parameter[0].numel() if parameter.ndim > 1 and len(parameter) > 1 else 10
                last = name.startswith(("out.", "clf."))
                parameter.normal_(std=(0.02 if last else 0.3) / inputs**0.5)
    return network.eval().requires_grad_(False)


def diffusers_pipeline(cascade: Cascade) -> Any:
    """diffusers' pipeline, sharing the weights of ``cascade``."""
    from diffusers import DDPMWuerstchenScheduler, WuerstchenCombinedPipeline
    from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
    from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext import WuerstchenDiffNeXt
    from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior import WuerstchenPrior

    def same(network_class, ours):
        with torch.device("meta"):
            network = network_class(**shared_fields(ours.config))
        network.load_state_dict(ours.state_dict(), assign=True)
        return network.eval().requires_grad_(False)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = WuerstchenCombinedPipeline(
            letters(),
            cascade.decoder_text_encoder.model,
            same(WuerstchenDiffNeXt, cascade.decoder),
            DDPMWuerstchenScheduler(),
            same(PaellaVQModel, cascade.vqgan),
            letters(),
            cascade.text_encoder.model,
            same(WuerstchenPrior, cascade.prior),
            DDPMWuerstchenScheduler(),
        )
    pipe.prior_pipe.set_progress_bar_config(disable=True)
    pipe.decoder_pipe.set_progress_bar_config(disable=True)
    return pipe


def diffusers_draw(
    pipe: Any,
    seed: int,
    size: tuple[int, int] = (1024, 1024),
    count: int = 1,
    on_step: Callable[[str], None] | None = None,
) -> list:
    """Draws ``count`` images of (width, height) with the published sampling.

    ``on_step`` is called with the stage of each step.
    """

    def listener(stage: str):
        return None if on_step is None else lambda *_: on_step(stage) or {}

    generator = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(seed)
    return pipe(
        PROMPT,
        width=size[0],
        height=size[1],
        prior_timesteps=stage_c_timesteps(29),
        prior_guidance_scale=4.0,
        num_images_per_prompt=count,
        generator=generator,
        prior_callback_on_step_end=listener("Stage C"),
        callback_on_step_end=listener("Stage B"),
    ).images

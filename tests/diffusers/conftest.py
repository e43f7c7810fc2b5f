"""Pipelines of tiny networks, each with the same weights in this package and in diffusers."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMWuerstchenScheduler as TheirScheduler
from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext import WuerstchenDiffNeXt
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior import WuerstchenPrior
from diffusers.pipelines.deprecated.wuerstchen.pipeline_wuerstchen import (
    WuerstchenDecoderPipeline as TheirDecoderPipeline,
)
from diffusers.pipelines.deprecated.wuerstchen.pipeline_wuerstchen_combined import (
    WuerstchenCombinedPipeline as TheirCombinedPipeline,
)
from diffusers.pipelines.deprecated.wuerstchen.pipeline_wuerstchen_prior import (
    WuerstchenPriorPipeline as TheirPriorPipeline,
)
from diffusers.utils import logging
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from wuerstchen.checkpoints.diffusers_config import shared_fields
from wuerstchen.diffusers import (
    DDPMWuerstchenScheduler,
    WuerstchenCombinedPipeline,
    WuerstchenDecoderPipeline,
    WuerstchenPriorPipeline,
)
from wuerstchen.models.decoder import Decoder, DecoderConfig
from wuerstchen.models.prior import Prior, PriorConfig
from wuerstchen.models.vqgan import VQGAN

from ..configurations import SMALL_VQGAN

logging.set_verbosity_error()  # hides diffusers' warnings about its own deprecation

# 16 channels per head, the fewest that the attention kernel supports.
PRIOR = PriorConfig(c_in=3, c=32, c_cond=24, c_r=8, depth=2, nhead=2)
DECODER = DecoderConfig(
    c_r=8,
    c_cond=8,
    c_hidden=(8, 32),
    nhead=(-1, 2),
    blocks=(1, 1),
    level_config=("CT", "CTA"),
    inject_effnet=(False, True),
    effnet_embd=3,
    clip_embd=20,
)
POSITIONS = 16


def make_tokenizer() -> CLIPTokenizer:
    """A tokenizer like CLIP's, with single letters as tokens."""
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=POSITIONS)


def make_text_encoder(width: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=190,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=POSITIONS,
            bos_token_id=188,
            eos_token_id=189,
            pad_token_id=189,
        )
    ).eval()


def quiet(*pipes) -> None:
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)


def tamed(network, last: str):
    """Keeps the last layer's divisor away from 0, where rounding would grow without bound."""
    with torch.no_grad():
        for parameter in getattr(network, last)[1].parameters():
            parameter.mul_(0.1)
    return network


@pytest.fixture
def make_prior(randomise):
    def make(**settings) -> WuerstchenPriorPipeline:
        prior = tamed(randomise(Prior(PRIOR)).eval(), "out")
        pipe = WuerstchenPriorPipeline(
            tokenizer=make_tokenizer(),
            text_encoder=randomise(make_text_encoder(PRIOR.c_cond)),
            prior=prior,
            scheduler=DDPMWuerstchenScheduler(),
            **settings,
        )
        quiet(pipe)
        return pipe

    return make


@pytest.fixture
def make_decoder(randomise):
    def make(shape: dict | None = None, **settings) -> WuerstchenDecoderPipeline:
        config = dataclasses.replace(DECODER, **(shape or {}))
        pipe = WuerstchenDecoderPipeline(
            tokenizer=make_tokenizer(),
            text_encoder=randomise(make_text_encoder(config.clip_embd)),
            decoder=tamed(randomise(Decoder(config)).eval(), "clf"),
            scheduler=DDPMWuerstchenScheduler(),
            vqgan=randomise(VQGAN(SMALL_VQGAN)).eval(),
            **settings,
        )
        quiet(pipe)
        return pipe

    return make


@pytest.fixture
def make_combined(make_prior, make_decoder):
    def make(prior_settings=None, decoder_settings=None) -> WuerstchenCombinedPipeline:
        prior, decoder = make_prior(**(prior_settings or {})), make_decoder(**(decoder_settings or {}))
        pipe = WuerstchenCombinedPipeline(
            **decoder.components,
            **{f"prior_{name}": part for name, part in prior.components.items()},
            **decoder.config,
            **{f"prior_{name}": value for name, value in prior.config.items()},
        )
        quiet(pipe)
        return pipe

    return make


def their_prior(ours: WuerstchenPriorPipeline) -> TheirPriorPipeline:
    prior = WuerstchenPrior(**shared_fields(ours.prior.config)).eval()
    prior.load_state_dict(ours.prior.state_dict())
    return TheirPriorPipeline(
        tokenizer=ours.tokenizer,
        text_encoder=ours.text_encoder,
        prior=prior,
        scheduler=TheirScheduler(),
        **ours.config,
    )


def their_decoder(ours: WuerstchenDecoderPipeline) -> TheirDecoderPipeline:
    decoder = WuerstchenDiffNeXt(**shared_fields(ours.decoder.config)).eval()
    decoder.load_state_dict(ours.decoder.state_dict())
    vqgan = PaellaVQModel(**shared_fields(ours.vqgan.config)).eval()
    vqgan.load_state_dict(ours.vqgan.state_dict())
    return TheirDecoderPipeline(
        tokenizer=ours.tokenizer,
        text_encoder=ours.text_encoder,
        decoder=decoder,
        scheduler=TheirScheduler(),
        vqgan=vqgan,
        **ours.config,
    )


def their_combined(
    prior: WuerstchenPriorPipeline, decoder: WuerstchenDecoderPipeline
) -> TheirCombinedPipeline:
    priors = {f"prior_{name}": part for name, part in their_prior(prior).components.items()}
    return TheirCombinedPipeline(**their_decoder(decoder).components, **priors)


@pytest.fixture
def theirs():
    """Creates diffusers' pipelines with the weights of ours."""

    def muted(make):
        def made(*ours):
            pipe = make(*ours)
            quiet(pipe)
            return pipe

        return made

    return SimpleNamespace(
        prior=muted(their_prior), decoder=muted(their_decoder), combined=muted(their_combined)
    )


class Recorder:
    """A callback that keeps the latents of every step."""

    def __init__(self) -> None:
        self.latents: list[torch.Tensor] = []

    def __call__(self, pipe, step, t, tensors):
        assert step == len(self.latents)
        self.latents.append(tensors["latents"].clone())
        return tensors


@pytest.fixture
def recorder():
    return Recorder


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(name="seeded")
def seeded_fixture():
    return seeded


@pytest.fixture
def assert_same_steps():
    """Calls both pipelines and compares the latents after every step, and then the results."""

    def check(ours, theirs, call, tolerance: float = 1e-4):
        """``call(pipe, recorder)`` calls a pipeline, with new generators each time."""
        mine, reference = Recorder(), Recorder()
        result, expected = call(ours, mine), call(theirs, reference)
        assert len(mine.latents) == len(reference.latents) > 0
        for step, (own, other) in enumerate(zip(mine.latents, reference.latents, strict=True)):
            scale = other.abs().max().clamp(min=1)
            assert (own - other).abs().max() <= tolerance * scale, f"step {step}"
        return result, expected

    return check

"""Images in half precision, ours and diffusers', against diffusers' in fp32."""

import pytest
import torch

from wuerstchen.diffusers import DEFAULT_STAGE_C_TIMESTEPS

SEEDS = range(6)


@pytest.fixture
def same_noise(monkeypatch):
    """Generates noise in fp32 and rounds it: in half precision torch generates other numbers."""
    torch_randn = torch.randn

    def randn(*shape, dtype=None, **settings):
        return torch_randn(*shape, dtype=torch.float32, **settings).to(dtype)

    monkeypatch.setattr(torch, "randn", randn)


def with_rounded_timesteps(pipe, dtype):
    """Timesteps rounded to half precision: they cause most of the error, and would hide the rest."""

    def rounded(network, given, named):
        return given, {**named, "r": named["r"].to(dtype).to(named["r"].dtype)}

    for network in (pipe.prior_pipe.prior, pipe.decoder_pipe.decoder):
        network.register_forward_pre_hook(rounded, with_kwargs=True)
    return pipe


def images(pipe):
    given = {"prior_timesteps": DEFAULT_STAGE_C_TIMESTEPS, "output_type": "pt", "height": 128, "width": 256}
    return torch.cat(
        [
            pipe("a cat", generator=torch.Generator().manual_seed(seed), **given).images.float().cpu()
            for seed in SEEDS
        ]
    )


def distance(found, other):
    return (found - other).square().mean().sqrt()


HALVES = [
    pytest.param("cpu", torch.bfloat16),
    pytest.param("cpu", torch.float16),
    pytest.param("cuda", torch.float16, marks=pytest.mark.gpu),
    pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
]


@pytest.mark.parametrize(("device", "dtype"), HALVES)
def test_images_are_no_further_from_fp32_than_those_of_diffusers(
    device, dtype, make_combined, theirs, same_noise
):
    pipe = make_combined()
    exact = images(with_rounded_timesteps(theirs.combined(pipe.prior_pipe, pipe.decoder_pipe), dtype))
    reference = theirs.combined(pipe.prior_pipe, pipe.decoder_pipe)
    theirs, ours = (images(one.to(device, dtype)) for one in (reference, pipe))
    assert 0 < distance(ours, exact) < 1.1 * distance(theirs, exact)
    # Rounding that both share, of the latents between steps, would hide errors that only we make.
    assert distance(ours, theirs) < 0.5 * distance(theirs, exact)

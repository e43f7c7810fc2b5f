"""Whole pictures in half precision, ours and diffusers' own, against diffusers' in fp32."""

import pytest
import torch

from wuerstchen.diffusers import DEFAULT_STAGE_C_TIMESTEPS

SEEDS = range(6)


@pytest.fixture
def same_noise(monkeypatch):
    """Noise is drawn in fp32 and rounded: in half precision torch would draw other numbers."""
    drawn = torch.randn

    def randn(*shape, dtype=None, **settings):
        return drawn(*shape, dtype=torch.float32, **settings).to(dtype)

    monkeypatch.setattr(torch, "randn", randn)


def pictures(pipe):
    given = {"prior_timesteps": DEFAULT_STAGE_C_TIMESTEPS, "output_type": "pt", "height": 128, "width": 256}
    return torch.cat(
        [
            pipe("a cat", generator=torch.Generator().manual_seed(seed), **given).images.float().cpu()
            for seed in SEEDS
        ]
    )


HALVES = [
    pytest.param("cpu", torch.bfloat16),
    pytest.param("cuda", torch.float16, marks=pytest.mark.gpu),
    pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
]


@pytest.mark.parametrize(("device", "dtype"), HALVES)
def test_a_picture_is_no_further_from_fp32_than_diffusers_own(
    device, dtype, make_combined, theirs, same_noise
):
    pipe = make_combined()
    reference = theirs.combined(pipe.prior_pipe, pipe.decoder_pipe)
    exact = pictures(reference)
    errors = [
        (pictures(one.to(device, dtype)) - exact).square().mean((1, 2, 3)).sqrt() for one in (reference, pipe)
    ]
    theirs, ours = (error.mean() for error in errors)
    assert 1e-4 < ours < 1.1 * theirs < 0.1

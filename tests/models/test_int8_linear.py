"""Frozen linear layers in int8: their error, their gradients, and what they keep for them."""

import pytest
import torch
from torch import nn

from wuerstchen.models.int8_linear import Int8Linear, quantize_linear_layers, quantized
from wuerstchen.models.prior import Prior, PriorConfig


@pytest.fixture
def layer():
    torch.manual_seed(0)
    layer = nn.Linear(96, 64)
    with torch.no_grad():
        layer.weight[3] *= 1000  # a row with a scale of its own
        layer.weight[4] = 0
    return layer.requires_grad_(False)


def test_every_weight_is_within_half_a_level_of_its_row(layer):
    weight, scale = quantized(layer.weight)
    assert weight.dtype is torch.int8
    assert (weight.abs().amax(1) == 127).sum() == 63  # all but the row of zeros
    error = (weight.float() * scale[:, None] - layer.weight).abs()
    assert (error <= 0.501 * layer.weight.abs().amax(1, keepdim=True) / 127).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_the_rounded_weights(layer, dtype):
    """Also for weights that were in half precision before, and under autocast."""
    small = Int8Linear(layer.to(dtype))
    rounded = nn.Linear(96, 64).to(dtype).requires_grad_(False)
    rounded.weight.copy_(small.weight.float() * small.scale[:, None])
    rounded.bias.copy_(layer.bias)
    results = []
    for each in (small, rounded):
        x = torch.randn(2, 3, 96, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        y = each(x)
        (y.float() * torch.arange(64)).sum().backward()
        results.append((y, x.grad))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype is theirs.dtype is dtype
        torch.testing.assert_close(ours, theirs)
    with torch.autocast("cpu", torch.bfloat16):
        assert small(x.detach().float()).dtype is torch.bfloat16


def test_only_int8_weights_are_kept_for_gradients(layer):
    """The dequantized weights of all layers together would take more memory than was saved."""
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append((tensor.dtype, tensor.numel()))
        return tensor

    small, x = Int8Linear(layer), torch.randn(2, 96, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        small(x).sum().backward()
    assert sorted(kept, key=lambda entry: entry[1]) == [(torch.float32, 64), (torch.int8, 96 * 64)]


def test_a_frozen_prior_takes_a_quarter_of_the_memory_and_gives_nearly_the_same():
    torch.manual_seed(0)
    prior = (
        Prior(PriorConfig(c_in=4, c=128, c_cond=64, c_r=16, depth=2, nhead=2)).eval().requires_grad_(False)
    )
    for parameter in prior.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    x, text, t = torch.randn(2, 4, 6, 6), torch.randn(2, 5, 64), torch.tensor([0.3, 0.8])
    expected = prior(x, t, prior.context(text))
    before = _bytes(prior)
    matrices = sum(
        m.weight.numel() for m in prior.modules() if type(m) is nn.Linear and m.weight.numel() >= 4096
    )
    quantize_linear_layers(prior, least=4096)
    assert before - _bytes(prior) == pytest.approx(3 * matrices, rel=0.04)
    found = prior(x, t, prior.context(text))
    assert 0 < (found - expected).square().mean().sqrt() < 0.02 * expected.square().mean().sqrt()
    assert not any(p.requires_grad for p in prior.parameters())


def _bytes(network: nn.Module) -> int:
    tensors = [*network.parameters(), *network.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.slow
def test_it_can_be_compiled(layer):
    small, x = Int8Linear(layer), torch.randn(2, 3, 96, requires_grad=True)
    results = []
    for function in (small, torch.compile(small)):
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            y = function(x)
        y.sum().backward()
        results.append((y, x.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)

"""Stage C against diffusers' WuerstchenPrior with random weights, and the published sizes."""

import dataclasses
import math

import pytest
import torch
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior import WuerstchenPrior

from wuerstchen.checkpoints.diffusers_config import shared_fields
from wuerstchen.errors import UserError
from wuerstchen.models.layers import TimestepBlock, timestep_embedding
from wuerstchen.models.prior import Prior, PriorConfig

SMALL = PriorConfig(c_in=4, c=32, c_cond=24, c_r=16, depth=3, nhead=4, dropout=0.1)
CONFIGS = {
    "small": (SMALL, (6, 6)),
    "odd timestep width": (dataclasses.replace(SMALL, c_r=13), (4, 4)),
    "not square": (dataclasses.replace(SMALL, c_in=3), (3, 7)),
    "one head, one layer": (dataclasses.replace(SMALL, nhead=1, depth=1, c=20), (5, 2)),
    "one position": (SMALL, (1, 1)),
    "heads that do not divide the width": (dataclasses.replace(SMALL, nhead=5), (3, 4)),
}


def make_pair(config: PriorConfig, randomise):
    ours = randomise(Prior(config)).eval()
    with torch.no_grad():  # 1 / |1 − b| amplifies rounding without bound if b is close to 1
        ours.out[1].weight.mul_(0.2)
    assert config.prediction == "noise"  # the only one in diffusers
    theirs = WuerstchenPrior(**shared_fields(config)).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def inputs(config: PriorConfig, size: tuple[int, int], positions: int = 7):
    x = torch.randn(3, config.c_in, *size)
    return x, torch.tensor([1.0, 0.51, 0.003]), torch.randn(3, positions, config.c_cond)


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_equals_diffusers(name, randomise, relative_error):
    config, size = CONFIGS[name]
    ours, theirs = make_pair(config, randomise)
    x, r, text = inputs(config, size)
    with torch.no_grad():
        assert relative_error(ours(x, r, ours.context(text)), theirs(x, r, text)) <= 1e-5
        ours.double(), theirs.double()
        x, r, text = x.double(), r.double(), text.double()
        assert relative_error(ours(x, r, ours.context(text)), theirs(x, r, text)) <= 1e-10


def test_gradients_equal_diffusers(randomise, assert_same_gradients):
    ours, theirs = make_pair(SMALL, randomise)
    x, r, text = inputs(SMALL, (4, 5))
    direction = torch.randn(3, SMALL.c_in, 4, 5)
    (ours(x, r, ours.context(text)) * direction).sum().backward()
    (theirs(x, r, text) * direction).sum().backward()
    assert_same_gradients(ours, theirs)


def test_velocity_is_the_plain_output(randomise):
    """If the last layer's weights are 0, the network returns its bias unchanged."""
    model = randomise(Prior(dataclasses.replace(SMALL, prediction="velocity"))).eval()
    x, r, text = inputs(SMALL, (4, 5))
    with torch.no_grad():
        model.out[1].weight.zero_()
        velocity = model(x, r, model.context(text))
    torch.testing.assert_close(velocity, model.out[1].bias[:, None, None].expand_as(x))


def test_context_serves_every_step(randomise):
    """The keys and values must not depend on the step they were computed at."""
    ours = randomise(Prior(SMALL)).eval()
    x, _, text = inputs(SMALL, (4, 4))
    with torch.no_grad():
        context = ours.context(text)
        first = ours(x, torch.full((3,), 0.9), context)
        ours(x, torch.full((3,), 0.1), context)
        assert torch.equal(first, ours(x, torch.full((3,), 0.9), context))


def test_keys_and_values_that_are_not_cached_give_the_same_gradients(randomise):
    """In training, blocks compute keys and values themselves: masks and gradients must not differ."""
    ours = randomise(Prior(SMALL)).eval().double()
    x, r, text = (tensor.double() for tensor in inputs(SMALL, (4, 4), positions=6))
    mask = torch.tensor([[True] * 4 + [False] * 2] * 3)
    found = []
    for cache_kv in (True, False):
        ours.zero_grad()
        output = ours(x, r, ours.context(text, mask, cache_kv=cache_kv))
        output.square().sum().backward()
        found.append([output.detach(), *(p.grad.clone() for p in ours.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_residuals_are_added_after_each_group_of_blocks(randomise):
    """As a ControlNet does. Zeros change nothing, and gradients reach the residuals."""
    ours = randomise(Prior(SMALL)).double().eval()
    x, r, text = (tensor.double() for tensor in inputs(SMALL, (4, 5)))
    context = ours.context(text)
    expected = ours(x, r, context)
    zeros = [torch.zeros(3, 4, 5, 32, dtype=torch.float64) for _ in range(3)]
    for count in (1, 3):
        assert torch.equal(ours(x, r, dataclasses.replace(context, residuals=zeros[:count])), expected)
    residuals = [torch.randn_like(zero).requires_grad_() for zero in zeros]
    found = ours(x, r, dataclasses.replace(context, residuals=residuals))
    with torch.no_grad():
        seen = []
        for number, residual in enumerate(residuals):
            hook = ours.blocks[3 * number + 2].register_forward_hook(lambda _, __, y, e=residual: y + e)
            seen.append(hook)
        by_hooks = ours(x, r, context)
    for hook in seen:
        hook.remove()
    torch.testing.assert_close(found, by_hooks)
    assert not torch.allclose(found, expected)
    gradients = torch.autograd.grad(found.sum(), residuals)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    with pytest.raises(ValueError, match="depth=3 residuals can be added, got 4"):
        ours(x, r, dataclasses.replace(context, residuals=[*zeros, zeros[0]]))


@pytest.mark.parametrize("groups", [0, 1, 3])
def test_features_are_those_after_the_first_groups(randomise, groups):
    ours = randomise(Prior(SMALL)).eval()
    x, r, text = inputs(SMALL, (4, 5))
    context, seen = ours.context(text), []
    with torch.no_grad():
        expected = ours(x, r, context)
        hooks = [block.register_forward_hook(lambda _, __, y: seen.append(y)) for block in ours.blocks]
        output, features = ours.with_features(x, r, context, groups)
    for hook in hooks:
        hook.remove()
    assert torch.equal(output, expected)
    assert features.shape == (3, 4, 5, 32)
    if groups:
        assert torch.equal(features, seen[3 * groups - 1])
    with pytest.raises(ValueError, match="does not add residuals"):
        ours.with_features(x, r, dataclasses.replace(context, residuals=[features]), groups)


def test_mask_hides_padding_and_only_padding(randomise):
    ours = randomise(Prior(SMALL)).eval()
    x, r, text = inputs(SMALL, (4, 4), positions=6)
    mask = torch.tensor([[True] * 4 + [False] * 2] * 3)
    with torch.no_grad():
        masked = ours(x, r, ours.context(text, mask))
        short = ours(x, r, ours.context(text[:, :4]))
        unmasked = ours(x, r, ours.context(text))
    torch.testing.assert_close(masked, short, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(masked, unmasked, atol=1e-2)


@pytest.mark.parametrize(("c_cond", "parameters"), [(1024, 993_243_680), (1280, 993_636_896)])
def test_published_size(c_cond, parameters):
    with torch.device("meta"):
        ours = Prior(PriorConfig(c_cond=c_cond))
        theirs = WuerstchenPrior(c=1536, c_cond=c_cond, depth=32, nhead=24)
    assert sum(p.numel() for p in ours.parameters()) == parameters
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    # The original fuses query, key and value: it has 520 entries for these 648.
    assert len(shapes) == 648


def test_starts_as_the_identity():
    """At initialisation ε̂ = x / (1 + 1e-5), as observed in the original."""
    ours = Prior(SMALL)
    x, r, text = inputs(SMALL, (4, 4))
    torch.testing.assert_close(ours(x, r, ours.context(text)), x / (1 + 1e-5))


def test_initial_spread_follows_the_original():
    config = PriorConfig(c=64, c_cond=64, depth=4, nhead=4)
    ours = Prior(config)
    bound = (6 / (4 * 64)) ** 0.5
    query = ours.blocks[2].attention.to_q.weight
    assert 0.95 * bound < query.abs().max() <= bound
    last = ours.blocks[0].channelwise[-1].weight
    assert last.abs().max() <= (6 / (5 * 64)) ** 0.5 / 4**0.5
    assert ours.cond_mapper[0].weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nhead": 0}, "nhead must be from 1 to c=1536, got 0"),
        ({"c": 8, "nhead": 9}, "nhead must be from 1 to c=8, got 9"),
        ({"depth": -1}, "depth must be at least 0, got -1"),
        ({"c": 0}, "c must be at least 1, got 0"),
        ({"c_r": 2}, "c_r must be .* at least 4, got 2"),
        ({"dropout": -0.1}, "dropout must be from 0 to 1, got -0.1"),
        ({"dropout": 1.5}, "dropout must be from 0 to 1, got 1.5"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        PriorConfig(**change)


def test_times_of_images_give_the_bits_of_the_plain_formula(randomise):
    """Of the embedding and of the block, written out. Published results must not change by a bit."""
    block, x, r = randomise(TimestepBlock(12, 16)), torch.randn(3, 4, 5, 12), torch.tensor([1.0, 0.51, 0.003])
    frequencies = torch.arange(8).float().mul(-math.log(10_000) / 7).exp()
    angles = (r * 10_000)[:, None] * frequencies[None, :]
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    assert torch.equal(timestep_embedding(r, 16), embedding)
    scale, shift = block.mapper(embedding)[:, None, None, :].chunk(2, dim=-1)
    assert torch.equal(block(x, embedding), torch.addcmul(shift, x, 1 + scale))


def test_times_of_cells_scale_and_shift_each_position_like_an_image_of_its_own(randomise):
    block, x = randomise(TimestepBlock(12, 13)).double(), torch.randn(2, 3, 4, 12).double()
    r = torch.rand(2, 3, 4).double()
    found = block(x, timestep_embedding(r, 13))
    as_images = block(x.reshape(24, 1, 1, 12), timestep_embedding(r.flatten(), 13))
    torch.testing.assert_close(found, as_images.reshape(2, 3, 4, 12))


def test_the_same_time_in_all_cells_is_the_time_of_the_image(randomise):
    ours = randomise(Prior(SMALL)).eval().double()
    x, r, text = (tensor.double() for tensor in inputs(SMALL, (4, 5)))
    context = ours.context(text)
    torch.testing.assert_close(ours(x, r.view(-1, 1, 1).expand(3, 4, 5), context), ours(x, r, context))
    other = r.view(-1, 1, 1).repeat(1, 4, 5)
    other[1, 0, 0] = 0
    changed = (ours(x, other, context) - ours(x, r, context)).flatten(1).abs().amax(1)
    assert changed[1] > 1e-3
    assert changed[[0, 2]].max() < 1e-9  # of the other images nothing


@pytest.mark.parametrize("shape", [(3, 5, 4), (3, 4), (3, 1, 4, 5), (3, 1, 1)])
def test_times_of_another_shape_are_refused(shape):
    ours = Prior(SMALL)
    x, _, text = inputs(SMALL, (4, 5))
    context = ours.context(text)
    with pytest.raises(ValueError, match=r"\(3,\), or one per cell of the latents, \(3, 4, 5\)"):
        ours(x, torch.rand(shape), context)

"""The token sampler against a second implementation in numpy, and the noise on tokens."""

import math

import numpy as np
import pytest
import torch

from wuerstchen.diffusion import tokens
from wuerstchen.diffusion.samplers import guided
from wuerstchen.diffusion.schedule import uniform_timesteps
from wuerstchen.diffusion.tokens import add_noise, draw_labels, draw_tokens, loss_weight, sample_tokens
from wuerstchen.errors import UserError

LABELS = 13


def seeds(*values: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(value) for value in values]


def network(x, t):
    """Logits that depend on every token nearby and on the time, in fp64."""
    table = torch.randn(LABELS, LABELS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    around = table[x] + 0.5 * table[x.roll(1, 1)] - 0.5 * table[x.roll(1, 2)]
    return (around * (2 - t.double())[:, None, None, None]).permute(0, 3, 1, 2)


def reference(predict, size, steps, temperatures, seed):
    """One image, step by step as in the original's loop, on arrays.

    Drawn in this order: the initial noise; then in each step what decides the labels, and but for the last
    step what decides which tokens are noised again.
    """
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(LABELS, size, generator=generator).numpy()
    current = start.copy()
    for i in range(steps):
        t = np.float32(1 - i / steps)
        logits = predict(torch.from_numpy(current)[None], torch.tensor([t]))[0].numpy()
        fraction = i / max(steps - 1, 1)
        scaled = logits / (temperatures[0] + (temperatures[1] - temperatures[0]) * fraction)
        weights = np.exp(scaled - scaled.max(axis=0))
        u = torch.rand(size, generator=generator).numpy()
        current = np.empty(size, dtype=np.int64)
        for y, x in np.ndindex(*size):
            sums = np.cumsum(weights[:, y, x] / weights[:, y, x].sum())
            current[y, x] = np.count_nonzero(sums <= u[y, x])
        if i < steps - 1:
            again = torch.rand(size, generator=generator).numpy() <= np.float32(1 - (i + 1) / steps)
            current = np.where(again, start, current)
    return current


@pytest.mark.parametrize(("steps", "temperatures"), [(8, (1.0, 0.6)), (12, (0.7, 0.3)), (1, (1.0, 0.5))])
def test_sampler_equals_the_reference(steps, temperatures):
    generators = seeds(5, 6)
    noise = draw_tokens((6, 9), LABELS, generators)
    drawn = sample_tokens(network, noise, uniform_timesteps(steps), generators, temperatures)
    expected = [reference(network, (6, 9), steps, temperatures, seed) for seed in (5, 6)]
    np.testing.assert_array_equal(drawn.numpy(), expected)


def test_guidance_mixes_logits():
    """lerp(unconditional, conditional, scale), which the original writes as c·s + u·(1 − s)."""

    def predict(x, t):
        conditional, unconditional = x.chunk(2)
        return torch.cat([network(conditional, t[: len(t) // 2]), -network(unconditional, t[len(t) // 2 :])])

    def mixed(x, t):
        return network(x, t) * 3.0 + -network(x, t) * (1 - 3.0)

    generators = seeds(5)
    noise = draw_tokens((4, 5), LABELS, generators)
    drawn = sample_tokens(guided(predict, 3.0), noise, uniform_timesteps(4), generators)
    np.testing.assert_array_equal(drawn[0].numpy(), reference(mixed, (4, 5), 4, (1.0, 0.6), 5))


@pytest.mark.parametrize("labels_last", [True, False])
def test_labels_follow_the_softmax(labels_last):
    """Over 200,000 positions the frequencies match the probabilities. A probability of 0 never occurs."""
    logits = torch.tensor([0.3, -1.0, 2.0, -math.inf, 0.0, 1.5, -math.inf])
    temperature = 0.8
    u = torch.rand(1, 400, 500)
    if labels_last:
        rows = logits.expand(1, 400, 500, 7).contiguous().permute(0, 3, 1, 2)
    else:
        rows = logits[None, :, None, None].expand(1, 7, 400, 500).contiguous()
    counts = draw_labels(rows, temperature, u).flatten().bincount(minlength=7)
    expected = (logits / temperature).softmax(0) * u.numel()
    assert counts[3] == counts[6] == 0
    possible = expected > 0
    assert (((counts - expected)[possible] / expected[possible].sqrt()).abs() < 4).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_ends_of_the_interval_give_labels(dtype):
    """u = 0 and the largest u below 1 must not fall off either end, whatever the rounding of the sums."""
    u = torch.tensor([0.0, 1 - 2**-24]).expand(1, 50, 2)
    for labels in (1, 2, 1000, 8192):
        logits = (3 * torch.randn(1, labels, 50, 2)).to(dtype)
        logits[:, 0] = -math.inf if labels > 1 else 0.0
        drawn = draw_labels(logits, 1.0, u)
        assert drawn.min() >= min(1, labels - 1)
        assert drawn.max() < labels


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sampling_from_half_precision_logits_is_exact(dtype):
    """Sums over thousands of labels in half precision would skip most of them."""
    logits, u = torch.randn(1, 8192, 20, 20).to(dtype), torch.rand(1, 20, 20)
    assert torch.equal(draw_labels(logits, 0.7, u), draw_labels(logits.float(), 0.7, u))


def test_chunks_change_nothing(monkeypatch):
    logits, u = torch.randn(2, LABELS, 7, 11), torch.rand(2, 7, 11)
    whole = draw_labels(logits, 0.9, u)
    monkeypatch.setattr(tokens, "POSITIONS", 10)
    assert torch.equal(draw_labels(logits, 0.9, u), whole)


def test_an_image_does_not_depend_on_its_batch():
    together, alone = (
        sample_tokens(network, draw_tokens((4, 6), LABELS, g), uniform_timesteps(5), g)
        for g in (seeds(7, 8), seeds(8))
    )
    assert torch.equal(together[1:], alone)
    assert not torch.equal(together[0], together[1])


def test_a_certain_prediction_is_sampled():
    """With any noise, tokens predicted with certainty are sampled. The added noise is always the initial
    one."""
    target = torch.randint(LABELS, (1, 64, 64))
    seen, steps = [], []

    def sure(x, t):
        seen.append((x, float(t)))
        return 100.0 * torch.nn.functional.one_hot(target, LABELS).permute(0, 3, 1, 2).float()

    generators = seeds(3)
    noise = draw_tokens((64, 64), LABELS, generators)
    drawn = sample_tokens(
        sure, noise, uniform_timesteps(8), generators, on_step=lambda step, x: steps.append((step, x))
    )
    assert torch.equal(drawn, target)
    assert [step for step, _ in steps] == list(range(8))
    assert all(torch.equal(x, target) for _, x in steps)
    assert [t for _, t in seen] == [1 - i / 8 for i in range(8)]
    assert torch.equal(seen[0][0], noise)
    differs = noise != target
    for x, t in seen[1:]:
        assert ((x == noise) | (x == target)).all()
        assert (x == noise)[differs].float().mean().item() == pytest.approx(t, abs=0.03)


def test_noise_replaces_a_fraction_t():
    clean = torch.zeros(3, 100, 100, dtype=torch.long)
    noise = torch.ones_like(clean)
    t = torch.tensor([0.0, 0.3, 1.0])
    u = torch.rand(3, 100, 100) * 0.999 + 0.0005
    noised, mask = add_noise(clean, noise, t, u)
    assert torch.equal(noised.bool(), mask)
    assert mask[0].sum() == 0
    assert mask[1].float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert mask[2].all()
    assert add_noise(clean, noise, t, t[:, None, None].expand(3, 100, 100))[1].all()  # u = t counts


def test_initial_tokens_cover_all_labels():
    drawn = draw_tokens((50, 40), LABELS, seeds(1, 2))
    assert drawn.shape == (2, 50, 40)
    assert drawn.unique().tolist() == list(range(LABELS))
    assert torch.equal(drawn[1:], draw_tokens((50, 40), LABELS, seeds(2)))


def test_kept_tokens_weigh_less_the_cleaner_the_image():
    mask = torch.tensor([[[True, False]]]).expand(3, 1, 2)
    weight = loss_weight(torch.tensor([0.0, 0.5, 1.0]), mask)
    torch.testing.assert_close(weight[:, 0], torch.tensor([[1, 0.3], [1, 0.65], [1, 1]]))


@pytest.mark.parametrize("temperatures", [(1.0, 0.0), (-1.0, 0.5), (math.nan, 1.0), (math.inf, 1.0)])
def test_impossible_temperatures_are_refused(temperatures):
    with pytest.raises(UserError, match="must be finite numbers above 0"):
        sample_tokens(network, draw_tokens((2, 2), LABELS, seeds(1)), [1.0, 0.0], seeds(1), temperatures)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(value):
    """An index out of range would crash a GPU without an explanation."""
    logits = torch.zeros(1, LABELS, 3, 3)
    logits[0, 4, 2, 1] = value
    with pytest.raises(UserError, match="logits are not finite"):
        draw_labels(logits, 1.0, torch.rand(1, 3, 3))

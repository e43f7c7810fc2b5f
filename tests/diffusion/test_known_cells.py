"""Known cells in networks' inputs, through samplers, guidance and recorders."""

import pytest
import torch

from wuerstchen.diffusion.known_cells import Known, KnownTokens, predict_around, with_known_cells
from wuerstchen.diffusion.objective import (
    OBJECTIVES,
    FlowMatching,
    NoisePrediction,
    VelocityPrediction,
    predictions_for_sampling,
)
from wuerstchen.diffusion.sampler_table import SAMPLERS, samplers_for
from wuerstchen.diffusion.samplers import draw_noise, guided
from wuerstchen.diffusion.schedule import columns
from wuerstchen.models.prior import Prior, PriorConfig
from wuerstchen.runtime.recorder import Recorder

KNOWN = torch.tensor([[[True, True, False], [False, True, False]], [[False] * 3, [False, False, True]]])


def test_known_cells_are_clean_at_time_0_and_the_others_do_not_change():
    x, clean = torch.randn(2, 2, 4, 2, 3)
    mixed, times = with_known_cells(x, torch.tensor([0.9, 0.2]), clean, KNOWN)
    for image, row, column in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(3)):
        is_known = KNOWN[image, row, column]
        expected = clean if is_known else x
        assert torch.equal(mixed[image, :, row, column], expected[image, :, row, column])
        assert times[image, row, column] == (0.0 if is_known else (0.9, 0.2)[image])


def test_times_of_cells_stay_where_nothing_is_known():
    x, clean = torch.randn(2, 2, 4, 2, 3)
    t = torch.rand(2, 2, 3)
    assert torch.equal(with_known_cells(x, t, clean, KNOWN)[1], torch.where(KNOWN, torch.zeros(()), t))


@pytest.mark.parametrize("objective", [NoisePrediction(), VelocityPrediction(), FlowMatching()])
def test_samplers_continue_the_known_cells(objective):
    """The data: all cells of an image are the same. The exact network reads that from the known cells, and
    converts at the time of each cell."""
    clean = torch.tensor([1.5, -0.5]).view(2, 1, 1, 1).expand(2, 1, 2, 3)

    def network(x, t, context):
        assert torch.equal(t == 0, KNOWN)
        assert torch.equal(x[:, 0][KNOWN], clean[:, 0][KNOWN])
        counts = KNOWN.sum((1, 2))
        found = (x[:, 0] * KNOWN).sum((1, 2)) / counts
        signal, sigma = (columns(factor, x) for factor in objective.scales(t))
        noise = (x - signal * found.view(2, 1, 1, 1)) / sigma.clamp(min=1e-3)
        if objective.kind == "noise":
            return noise
        if objective.kind == "velocity":
            return signal * noise - sigma * found.view(2, 1, 1, 1)
        return noise - found.view(2, 1, 1, 1)

    predictions = predictions_for_sampling(network, objective)
    predict = predict_around(lambda x, t: predictions(x, t, None), clean, KNOWN)
    for name in samplers_for(objective.path):
        sampler, generators = SAMPLERS[name], [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        noise, times = draw_noise((1, 2, 3), generators), sampler.timesteps(20)
        sample = sampler.function(predict, noise, times, generators, objective.for_sampling())
        # ddpm ends with the predicted image of the last step, the others nearly so.
        torch.testing.assert_close(sample[:, 0][~KNOWN], clean[:, 0][~KNOWN], rtol=0, atol=0.02)


@pytest.mark.parametrize("prediction", OBJECTIVES)
def test_a_prior_is_guided_and_recorded_with_known_cells(prediction, randomise):
    """Guidance doubles the times of cells as it doubles the latents."""
    objective = OBJECTIVES[prediction]()
    config = PriorConfig(c_in=4, c=32, c_cond=24, c_r=16, depth=2, nhead=4, prediction=prediction)
    prior = randomise(Prior(config)).eval()
    with torch.no_grad():
        prior.out[1].weight.mul_(0.1)
    text, clean, noise = torch.randn(4, 5, 24), torch.randn(2, 4, 2, 3), torch.randn(2, 4, 2, 3)
    sampler = SAMPLERS["euler" if prediction == "flow" else "ddim"]  # without noise of their own
    recorder = Recorder(prior, predictions_for_sampling(prior, objective), prior.context)

    def sample(clean, known):
        predict = predict_around(guided(recorder.bind(text, None), 3.0), clean, known)
        return sampler.function(predict, noise, sampler.timesteps(3), [], objective.for_sampling())

    with torch.no_grad():
        found, other = sample(clean, KNOWN), sample(clean + 1, KNOWN)
        assert found.isfinite().all()
        assert ((found - other).abs().amax(1)[~KNOWN] > 1e-5).all()
        # Without known cells, it is the usual sample.
        plain = sampler.function(
            guided(recorder.bind(text, None), 3.0), noise, sampler.timesteps(3), [], objective.for_sampling()
        )
        torch.testing.assert_close(sample(clean, KNOWN & False), plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("objective", [NoisePrediction(), FlowMatching()])
def test_replaced_cells_end_as_the_image_and_the_others_are_sampled(objective):
    """With every sampler, on networks that know nothing of known cells."""
    clean = torch.tensor([1.5, -0.5]).view(2, 1, 1, 1).expand(2, 1, 2, 3).contiguous()
    known = Known(clean, torch.where(KNOWN, 0.0, 1.0))

    def predict(x, t):
        assert t.shape == (2,)
        return x / columns(objective.scales(t)[1], x)  # the exact network of data that is always 0

    for name in samplers_for(objective.path):
        if name == "few":
            continue  # edits are sampled without students
        sampler, generators = SAMPLERS[name], [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        noise, times = draw_noise((1, 2, 3), generators), sampler.timesteps(12)
        x, seen = known.begin(noise, objective, times[0]), []
        on_step = known.replaced(noise, times, objective, lambda step, x, seen=seen: seen.append(x.clone()))
        sample = sampler.function(predict, x, times, generators, objective.for_sampling(), on_step)
        assert torch.equal(sample[:, 0][KNOWN], clean[:, 0][KNOWN])
        assert sample[:, 0][~KNOWN].abs().max() < 0.1
        for then, after in zip(times[1:-1], seen, strict=False):
            expected = objective.noised(clean, noise, torch.full((2,), then))
            torch.testing.assert_close(after[:, 0][KNOWN], expected[:, 0][KNOWN])


def test_known_tokens_are_written_after_each_step():
    known = KnownTokens(torch.full((1, 2, 2), 7), torch.tensor([[[0.0, 0.4], [1.0, 0.0]]]))
    seen = []
    on_step = known.replaced([1.0, 0.5, 0.0], lambda step, tokens: seen.append(tokens.tolist()))
    for step in (0, 1):
        on_step(step, torch.ones(1, 2, 2, dtype=torch.long))
    assert seen == [[[[7, 7], [1, 7]]], [[[7, 1], [1, 7]]]]

"""Whole sampling runs against diffusers, and samplers on a target with a known solution."""

import pytest
import torch
from diffusers import DDPMWuerstchenScheduler
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext import WuerstchenDiffNeXt
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior import WuerstchenPrior

from wuerstchen.checkpoints.diffusers_config import shared_fields
from wuerstchen.diffusion.objective import FlowMatching, NoisePrediction, VelocityPrediction
from wuerstchen.diffusion.sampler_table import SAMPLERS
from wuerstchen.diffusion.samplers import (
    ddim,
    ddpm,
    dpm_solver,
    draw_noise,
    euler,
    few,
    guided,
    guided_within,
)
from wuerstchen.diffusion.schedule import CosineSchedule, few_timesteps, stage_c_timesteps, uniform_timesteps
from wuerstchen.models.decoder import Decoder, DecoderConfig
from wuerstchen.models.prior import Prior, PriorConfig

SCHEDULE = CosineSchedule()
NOISE = NoisePrediction()
PRIOR = PriorConfig(c_in=4, c=32, c_cond=24, c_r=16, depth=2, nhead=4)
DECODER = DecoderConfig(
    c_r=16,
    c_cond=12,
    c_hidden=(8, 16),
    nhead=(-1, 2),
    blocks=(1, 1),
    level_config=("CT", "CTA"),
    inject_effnet=(False, True),
    effnet_embd=5,
    clip_embd=10,
)


def seeds(*values: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(value) for value in values]


def diffusers_run(predict, x, timesteps, generator):
    """The loop of diffusers' pipelines around its own scheduler."""
    scheduler = DDPMWuerstchenScheduler()
    scheduler.set_timesteps(timesteps=timesteps)
    for t in scheduler.timesteps[:-1]:
        ratio = t.expand(len(x))
        noise = predict(x, ratio)
        x = scheduler.step(model_output=noise, timestep=ratio, sample=x, generator=generator).prev_sample
    return x


def guided_if(guidance, predict):
    return guided(predict, guidance) if guidance > 1 else predict


def calm(randomise, model, output):
    """Random weights with small outputs: large ones would amplify rounding without bound."""
    randomise(model).eval()
    with torch.no_grad():
        output(model).weight.mul_(0.1)
    return model


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_29_prior_steps_equal_diffusers(guidance, randomise, relative_error):
    ours = calm(randomise, Prior(PRIOR), lambda m: m.out[1])
    theirs = WuerstchenPrior(**shared_fields(PRIOR)).eval()
    theirs.load_state_dict(ours.state_dict())
    text, empty = torch.randn(1, 7, 24), torch.randn(1, 7, 24)
    noise = draw_noise((4, 6, 5), seeds(3))

    def reference(x, r):
        if guidance <= 1:
            return theirs(x, r, text)
        cond, uncond = theirs(torch.cat([x] * 2), torch.cat([r] * 2), torch.cat([text, empty])).chunk(2)
        return torch.lerp(uncond, cond, guidance)

    with torch.no_grad():
        context = ours.context(torch.cat([text, empty]) if guidance > 1 else text)
        predict = guided_if(guidance, lambda x, t: ours(x, t, context))
        sample = ddpm(predict, noise, stage_c_timesteps(), seeds(9), NOISE)
        expected = diffusers_run(reference, noise, stage_c_timesteps(), seeds(9)[0])
    assert len(stage_c_timesteps()) - 1 == 29
    assert relative_error(sample, expected) <= 1e-3


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_29_decoder_steps_equal_diffusers(guidance, randomise, relative_error):
    ours = calm(randomise, Decoder(DECODER), lambda m: m.clf[1])
    theirs = WuerstchenDiffNeXt(**shared_fields(DECODER)).eval()
    theirs.load_state_dict(ours.state_dict())
    semantic_map, text = torch.randn(1, 5, 3, 3), torch.randn(1, 7, 10)
    empty = torch.randn(1, 7, 10)
    noise = draw_noise((4, 16, 16), seeds(3))

    def reference(x, r):
        if guidance <= 1:
            return theirs(x, r, semantic_map, text)
        maps = torch.cat([semantic_map, torch.zeros_like(semantic_map)])
        both = theirs(torch.cat([x] * 2), torch.cat([r] * 2), maps, torch.cat([text, empty]))
        return torch.lerp(both[1:], both[:1], guidance)

    with torch.no_grad():
        maps, texts = semantic_map, text
        if guidance > 1:
            maps, texts = torch.cat([maps, torch.zeros_like(maps)]), torch.cat([texts, empty])
        context = ours.context(maps, (16, 16), texts)
        predict = guided_if(guidance, lambda x, t: ours(x, t, context))
        sample = ddpm(predict, noise, uniform_timesteps(29), seeds(9), NOISE)
        expected = diffusers_run(reference, noise, uniform_timesteps(29), seeds(9)[0])
    assert relative_error(sample, expected) <= 1e-3


def gaussian_predictor(mean: float, std: float):
    """The exact noise prediction for data from N(mean, std²), without a network."""

    def predict(x, t):
        alpha_bar = SCHEDULE.alpha_bar(t).view(-1, 1, 1, 1)
        variance = alpha_bar * std**2 + 1 - alpha_bar
        return (1 - alpha_bar).sqrt() * (x - alpha_bar.sqrt() * mean) / variance

    return predict


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
def test_samplers_reach_a_known_distribution(sampler):
    noise = draw_noise((1, 100, 100), seeds(1))
    times = uniform_timesteps(300)
    predict = gaussian_predictor(2.0, 0.5)
    sample = SAMPLERS[sampler].function(predict, noise, times, seeds(2), NOISE)
    assert sample.mean().item() == pytest.approx(2.0, abs=0.03)
    assert sample.std().item() == pytest.approx(0.5, abs=0.03)


def test_ddim_is_deterministic_and_converges_with_the_step_size():
    noise = draw_noise((1, 8, 8), seeds(1))
    predict = gaussian_predictor(1.0, 0.3)
    coarse, fine, finer = (ddim(predict, noise, uniform_timesteps(n), [], NOISE) for n in (20, 200, 400))
    assert (fine - finer).abs().max() < (coarse - finer).abs().max() / 3


def equal_log_snr(steps: int, first: float, last: float) -> list[float]:
    """Times with ln(ᾱ/(1 − ᾱ)) decreasing in equal steps."""
    times = torch.linspace(last, first, 200_001, dtype=torch.float64)
    logits = SCHEDULE.alpha_bar(times).logit()
    wanted = torch.linspace(float(logits[-1]), float(logits[0]), steps + 1, dtype=torch.float64)
    places = torch.searchsorted(-logits, -wanted).clamp(max=len(times) - 1)
    return times[places].tolist()


def test_dpm_solver_is_of_second_order():
    """Against the solution in closed form: twice the steps leave a quarter of the error, and half of
    DDIM's."""
    mean, std, noise = 1.0, 0.3, torch.randn(1, 1, 50, 50, dtype=torch.float64)
    predict = gaussian_predictor(mean, std)

    def error(sampler, steps: int) -> float:
        times = equal_log_snr(steps, 0.9, 0.1)
        start, end = SCHEDULE.alpha_bar(torch.tensor([times[0], times[-1]], dtype=torch.float64))
        deviations = [(a * std**2 + 1 - a).sqrt() for a in (start, end)]
        exact = end.sqrt() * mean + (noise - start.sqrt() * mean) * deviations[1] / deviations[0]
        return float((sampler(predict, noise, times, [], NOISE) - exact).abs().max())

    for sampler, order in ((ddim, 1), (dpm_solver, 2)):
        assert error(sampler, 20) / error(sampler, 40) == pytest.approx(2**order, rel=0.2)
    assert error(dpm_solver, 20) < error(ddim, 80)


def test_dpm_solver_in_steps_of_unequal_length():
    """Its correction is exact for predictions that are linear in λ = ½·ln(ᾱ/(1 − ᾱ)): here the predicted
    picture at each time is λ itself, so D = λ(t) + h/2 whatever the step before was."""
    times = [0.9, 0.8, 0.5, 0.35, 0.1]
    alpha_bars = SCHEDULE.alpha_bar(torch.tensor(times, dtype=torch.float64))
    logs = alpha_bars.logit() / 2

    def predict(x, t):
        alpha_bar = SCHEDULE.alpha_bar(t.double())[:, None, None, None]
        return (x - alpha_bar.sqrt() * alpha_bar.logit() / 2) / (1 - alpha_bar).sqrt()

    noise, found = torch.randn(1, 1, 2, 2, dtype=torch.float64), []
    dpm_solver(predict, noise, times, [], NOISE, lambda step, x: found.append(x))
    expected = noise
    for step in range(4):
        h = logs[step + 1] - logs[step]
        direction = logs[step] + (h / 2 if step in (1, 2) else 0)
        now, then = alpha_bars[step], alpha_bars[step + 1]
        expected = ((1 - then) / (1 - now)).sqrt() * expected + then.sqrt() * (1 - (-h).exp()) * direction
        torch.testing.assert_close(found[step], expected, rtol=1e-5, atol=1e-6)


def test_an_image_does_not_depend_on_its_batch():
    predict = gaussian_predictor(0.0, 1.0)
    times = uniform_timesteps(5)
    together = ddpm(predict, draw_noise((2, 4, 4), seeds(5, 6)), times, seeds(7, 8), NOISE)
    alone = ddpm(predict, draw_noise((2, 4, 4), seeds(6)), times, seeds(8), NOISE)
    assert torch.equal(together[1:], alone)


def test_guidance_goes_past_the_conditional_prediction():
    """With a scale above 1 the result lies beyond it, away from the unconditional one."""

    def predict(x, t):
        assert len(x) == len(t) == 4
        return x + torch.tensor([1.0, 2.0, 0.0, 0.5])

    x, t = torch.tensor([0.0, 10.0]), torch.zeros(2)
    assert guided(predict, 3.0)(x, t).tolist() == [3.0, 15.0]
    assert guided(predict, 0.0)(x, t).tolist() == [0.0, 10.5]


@pytest.mark.parametrize("name", SAMPLERS)
def test_guidance_applies_at_the_times_of_its_interval(name):
    """Bugs: guided one step early or late, or the reported steps got lost."""
    row, calls, seen = SAMPLERS[name], [], []

    def recorded(kind):
        def predict(x, t):
            calls.append((kind, round(t[0].item(), 6)))
            return torch.zeros_like(x)

        return predict

    times = row.timesteps(8)
    predict, on_step = guided_within(
        recorded("guided"), recorded("plain"), (0.3, times[2]), times, lambda step, _: seen.append(step)
    )
    objective = FlowMatching() if "linear" in row.paths else NOISE
    row.function(predict, torch.zeros(1, 1, 2, 2), times, seeds(0), objective, on_step)
    expected = [("guided" if 0.3 <= t <= times[2] else "plain", round(t, 6)) for t in times[:-1]]
    assert calls == expected
    assert [calls[n][0] for n in (0, 1, 2, -1)] == ["plain", "plain", "guided", "plain"]
    assert seen == list(range(8))


def test_the_limits_of_a_guidance_interval_belong_to_it():
    """Times are float32: 0.8 is stored as 0.80000001."""
    times, drawn = uniform_timesteps(10), []
    predict, on_step = guided_within(
        lambda x, t: drawn.append(round(float(t), 3)) or x, lambda x, t: x, (0.2, 0.8), times
    )
    for step, time in enumerate(times):
        predict(torch.zeros(1), torch.tensor(time))
        on_step(step, torch.zeros(1))
    assert drawn == [0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]


def test_every_step_is_reported():
    seen = []
    ddpm(
        gaussian_predictor(0, 1),
        torch.randn(1, 1, 2, 2),
        uniform_timesteps(4),
        seeds(0),
        NOISE,
        on_step=lambda step, x: seen.append(step),
    )
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize("sampler", [ddpm, ddim, dpm_solver])
def test_a_velocity_gives_the_samples_of_its_noise(sampler):
    """Samplers convert outputs with the objective. Guidance of either is the same, up to rounding."""
    noise, times = torch.randn(1, 1, 8, 8, dtype=torch.float64), uniform_timesteps(6)
    predict = gaussian_predictor(1.0, 0.3)

    def velocity(x, t):
        alpha_bar = SCHEDULE.alpha_bar(t).view(-1, 1, 1, 1)
        return (predict(x, t) - (1 - alpha_bar).sqrt() * x) / alpha_bar.sqrt()

    expected = sampler(predict, noise, times, seeds(1), NOISE)
    found = sampler(velocity, noise, times, seeds(1), VelocityPrediction())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def flow_velocity(mean: float, std: float):
    """The exact E[ε − x₀ | x_t] for data from N(mean, std²)."""

    def predict(x, t):
        t = t.double().view(-1, 1, 1, 1)
        variance = (1 - t) ** 2 * std**2 + t**2
        return -mean + (t - (1 - t) * std**2) / variance * (x - (1 - t) * mean)

    return predict


def test_euler_follows_the_ode_of_a_gaussian():
    """In closed form x_t = (1 − t)·mean + deviation(t)·z: twice the steps leave half of the error."""
    mean, std, noise = 1.5, 0.4, torch.randn(1, 1, 30, 30, dtype=torch.float64)
    objective = FlowMatching()

    def error(steps: int) -> float:
        sample = euler(flow_velocity(mean, std), noise, objective.timesteps(steps), [], objective)
        return float((sample - (mean + std * noise)).abs().max())

    assert error(200) < 0.02
    assert error(100) / error(200) == pytest.approx(2, rel=0.1)
    # Part of the way, from data noised to 0.6.
    t, deviation = 0.6, ((0.4 * std) ** 2 + 0.36) ** 0.5
    begun = 0.4 * mean + deviation * noise
    times = [t * (1 - i / 400) for i in range(401)]
    sample = euler(flow_velocity(mean, std), begun, times, [], objective)
    torch.testing.assert_close(sample, mean + std * noise, rtol=0, atol=0.02)


MEAN, STD = 0.7, 0.4


def gaussian_student(objective):
    """A network that maps every point to the end of its trajectory, for images from N(``MEAN``, ``STD``²).

    x_t is Gaussian too, and the probability flow keeps its quantiles: x̂₀ = μ + s·(x − αμ)/√(α²s² + σ²).
    """

    def predict(x, t):
        signal, sigma = (factor.double().view(-1, 1, 1, 1) for factor in objective.scales(t.double()))
        spread = (signal**2 * STD**2 + sigma**2).sqrt()
        clean = MEAN + STD * (x.double() - signal * MEAN) / spread
        noise = (x.double() - signal * clean) / sigma
        output = {"noise": noise, "velocity": signal * noise - sigma * clean, "flow": noise - clean}
        return output[objective.kind]

    return predict


OF_EACH_KIND = [NoisePrediction(), VelocityPrediction(), FlowMatching()]


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("objective", OF_EACH_KIND, ids=lambda o: o.kind)
def test_few_steps_sample_a_gaussian_exactly(objective, steps):
    x = draw_noise((1, 100, 100), seeds(0, 1)).double()
    found = few(gaussian_student(objective), x, few_timesteps(steps), seeds(5, 6), objective)
    assert found.mean().item() == pytest.approx(MEAN, abs=0.02)  # 20,000 values: standard error 0.003
    assert found.std().item() == pytest.approx(STD, abs=0.02)


@pytest.mark.parametrize("objective", OF_EACH_KIND, ids=lambda o: o.kind)
def test_few_steps_written_out(objective):
    """Two steps: the jump from the highest time, fresh noise of each image's generator, and the last jump."""
    x, student = draw_noise((2, 3, 3), seeds(1, 2)).double(), gaussian_student(objective)
    seen, steps = [], []

    def predict(x, t):
        seen.append(t.tolist())
        return student(x, t)

    found = few(predict, x, [1.0, 0.66, 0.0], seeds(3, 4), objective, lambda step, _: steps.append(step))
    first = 0.98 if objective.kind == "noise" else 1.0
    assert seen == [pytest.approx([first] * 2), pytest.approx([0.66] * 2)]
    assert steps == [0, 1]

    def jump(x, t):
        signal, sigma = objective.scales(torch.tensor(t))
        return MEAN + STD * (x - signal * MEAN) / (signal**2 * STD**2 + sigma**2).sqrt()

    signal, sigma = objective.scales(torch.tensor(0.66))
    between = signal * jump(x, first) + sigma * draw_noise((2, 3, 3), seeds(3, 4))
    torch.testing.assert_close(found, jump(between, 0.66).to(found), rtol=1e-3, atol=1e-3)


def test_one_step_draws_no_noise():
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    few(gaussian_student(NOISE), draw_noise((1, 2, 2), seeds(1)), few_timesteps(1), [generator], NOISE)
    assert torch.equal(generator.get_state(), before)

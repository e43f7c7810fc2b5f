"""Each formula in float64 against an independent one, and objectives as JSON."""

import json
import math

import pytest
import torch

from wuerstchen.diffusion.objective import (
    OBJECTIVES,
    PUBLISHED_OBJECTIVE,
    FlowMatching,
    NoisePrediction,
    VelocityPrediction,
    check_prediction,
    default_time_density,
    make_objective,
    objective_of_json,
    predictions_for_sampling,
)
from wuerstchen.diffusion.schedule import CosineSchedule, training_timesteps
from wuerstchen.errors import UserError

ALL = [NoisePrediction(), VelocityPrediction(loss_weight="velocity"), FlowMatching(time_shift=2.0)]
T = torch.tensor([0.1, 0.4, 0.7, 0.9], dtype=torch.float64)


def images() -> tuple[torch.Tensor, torch.Tensor]:
    """Clean images and noise."""
    x0, noise = torch.randn(2, 4, 3, 5, 2, dtype=torch.float64)
    return x0, noise


def alpha_bar(t: torch.Tensor) -> torch.Tensor:
    """The published cosine, written out, without its limits."""
    start = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    return torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 / start


def target(objective, x0, noise, t):
    """The output of a perfect network."""
    a = alpha_bar(t).view(-1, 1, 1, 1)
    return {
        "noise": noise,
        "velocity": a.sqrt() * noise - (1 - a).sqrt() * x0,
        "flow": noise - x0,
    }[objective.kind]


@pytest.mark.parametrize("objective", ALL, ids=lambda o: o.kind)
def test_the_target_converts_to_image_and_noise_and_has_no_loss(objective):
    x0, noise = images()
    x_t, output = objective.noised(x0, noise, T), target(objective, x0, noise, T)
    torch.testing.assert_close(objective.to_clean(output, x_t, T), x0)
    torch.testing.assert_close(objective.to_noise(output, x_t, T), noise)
    torch.testing.assert_close(objective.to_velocity(output, x_t, T), noise - x0)
    torch.testing.assert_close(objective.loss(output, x0, noise, T), torch.zeros_like(T))
    signal, sigma = objective.scales(T)
    torch.testing.assert_close(x_t, signal.view(-1, 1, 1, 1) * x0 + sigma.view(-1, 1, 1, 1) * noise)


def test_the_velocities_are_derivatives_of_their_paths():
    """By autograd: of the straight path by time, of the cosine path by the angle with cosine √ᾱ."""
    x0, noise = images()
    weights, t = torch.randn_like(x0), T.clone().requires_grad_(True)

    def derivative(values):
        return torch.autograd.grad(values.sum(), t)[0]

    along_line = derivative(weights * FlowMatching().noised(x0, noise, t))
    expected = (weights * target(FlowMatching(), x0, noise, T)).sum((1, 2, 3))
    torch.testing.assert_close(along_line, expected)
    along_arc = derivative(weights * VelocityPrediction().noised(x0, noise, t))
    angle = derivative(VelocityPrediction().scales(t)[0].acos())
    expected = (weights * target(VelocityPrediction(), x0, noise, T)).sum((1, 2, 3))
    torch.testing.assert_close(along_arc / angle, expected)


def test_losses_equal_their_formulas():
    """The weight ``velocity`` makes the noise's error that of the velocity."""
    (x0, noise), output = images(), images()[0]
    a = alpha_bar(T)

    def mean(difference):
        return difference.square().mean((1, 2, 3))

    p2, velocity = (NoisePrediction(loss_weight=weight) for weight in ("p2", "velocity"))
    torch.testing.assert_close(p2.errors(output, x0, noise, T), mean(output - noise))
    torch.testing.assert_close(p2.loss(output, x0, noise, T), (1 - a) * mean(output - noise))
    torch.testing.assert_close(velocity.loss(output, x0, noise, T), mean(output - noise) / a)
    # Of arXiv 2204.00227, (k + ᾱ/(1 − ᾱ))^−γ with k = γ = 1.
    torch.testing.assert_close(p2.weight(T), (1 + a / (1 - a)) ** -1)
    of_velocity = VelocityPrediction(loss_weight="velocity")
    wrong = mean(output - target(of_velocity, x0, noise, T))
    torch.testing.assert_close(of_velocity.loss(output, x0, noise, T), wrong)
    torch.testing.assert_close(VelocityPrediction().loss(output, x0, noise, T), (1 - a) * a * wrong)
    torch.testing.assert_close(FlowMatching().loss(output, x0, noise, T), mean(output - noise + x0))


def conversions(objective, output, x0, noise, t):
    """The results of everything that takes times, by name."""
    x_t = objective.noised(x0, noise, t)
    return {
        "noised": x_t,
        "clean": objective.to_clean(output, x_t, t),
        "noise": objective.to_noise(output, x_t, t),
        "velocity": objective.to_velocity(output, x_t, t),
        "errors": objective.errors(output, x0, noise, t),
        "loss": objective.loss(output, x0, noise, t),
    }


@pytest.mark.parametrize("objective", ALL, ids=lambda o: o.kind)
def test_times_of_images_give_the_bits_of_the_plain_formulas(objective):
    """In fp32: published results must not change by a bit."""
    x0, noise, output = torch.randn(3, 4, 3, 5, 2)
    t = torch.tensor([0.0, 0.3, 0.8, 1.0])
    a, s = (factor.view(-1, 1, 1, 1) for factor in objective.scales(t))
    x_t = a * x0 + s * noise
    expected = {"noised": x_t}
    if objective.kind == "flow":
        expected |= {"clean": x_t - t.view(-1, 1, 1, 1) * output, "velocity": output}
        expected |= {"noise": x_t + (1 - t.view(-1, 1, 1, 1)) * output}
        wrong = output - (noise - x0)
    else:
        expected["noise"] = output if objective.kind == "noise" else a * output + s * x_t
        alpha_bar = objective.schedule.alpha_bar(t).view(-1, 1, 1, 1)
        expected["clean"] = (x_t - (1 - alpha_bar).sqrt() * expected["noise"]) / alpha_bar.sqrt()
        expected["velocity"] = expected["noise"] - expected["clean"]
        wrong = expected["noise"] - noise
    expected["errors"] = wrong.square().flatten(1).mean(1)
    expected["loss"] = expected["errors"] * objective.weight(t)
    for name, found in conversions(objective, output, x0, noise, t).items():
        assert torch.equal(found, expected[name]), name


@pytest.mark.parametrize("objective", ALL, ids=lambda o: o.kind)
def test_times_of_cells_convert_each_cell_like_an_image_of_its_own(objective):
    x0, noise, output = torch.randn(3, 4, 3, 5, 2, dtype=torch.float64)
    t = torch.rand(4, 5, 2, dtype=torch.float64)

    def as_images(x):
        return x.permute(0, 2, 3, 1).reshape(-1, 3, 1, 1)

    found = conversions(objective, output, x0, noise, t)
    expected = conversions(objective, *map(as_images, (output, x0, noise)), t.flatten())
    for name, value in found.items():
        torch.testing.assert_close(value.flatten() if value.ndim == 3 else as_images(value), expected[name])
    assert objective.times(t).shape == t.shape
    for call in (objective.noised, objective.to_clean, objective.to_velocity):
        if (call, objective.kind) != (objective.to_velocity, "flow"):
            with pytest.raises(ValueError, match=r"one per cell, \(4, 5, 2\)"):
                call(x0, noise, t.mT)


def test_times_of_the_published_objective():
    u = torch.rand(100, dtype=torch.float64)
    for objective in (NoisePrediction(time_shift=2.0), VelocityPrediction(time_shift=2.0)):
        assert torch.equal(objective.times(u), training_timesteps(u, 2.0))


def test_a_time_density_counts_for_every_objective():
    u = torch.rand(100, dtype=torch.float64)
    for kind in ("noise", "velocity"):
        moved = make_objective(kind, time_density="logit_normal", time_shift=2.0).times(u)
        assert torch.equal(moved, training_timesteps(u, 2.0, "logit_normal"))
        assert not torch.allclose(moved, training_timesteps(u, 2.0))
    assert {kind: default_time_density(kind) for kind in OBJECTIVES} == {
        "noise": "uniform",
        "velocity": "uniform",
        "flow": "logit_normal",
    }


def test_a_uniform_density_of_the_cosine_path_is_not_written():
    """Older versions refuse settings that they do not know."""
    assert "time_density" not in VelocityPrediction().as_json()
    assert VelocityPrediction(time_density="logit_normal").as_json()["time_density"] == "logit_normal"
    assert FlowMatching(time_density="uniform").as_json()["time_density"] == "uniform"
    assert objective_of_json({"kind": "noise"}).time_density == "uniform"
    assert objective_of_json({"kind": "flow"}).time_density == "logit_normal"


def test_predictions_for_sampling_are_the_noise_of_a_velocity():
    x0, noise = images()
    x_t = VelocityPrediction().noised(x0, noise, T)
    found = predictions_for_sampling(lambda x, t, context: context, VelocityPrediction())
    velocity = target(VelocityPrediction(), x0, noise, T)
    torch.testing.assert_close(found(x_t, T, velocity), noise)
    assert found(x_t.half(), T.half(), velocity.float()).dtype == torch.float16
    assert VelocityPrediction().for_sampling() == NoisePrediction()
    network = torch.nn.Identity()
    assert predictions_for_sampling(network, NoisePrediction()) is network
    assert predictions_for_sampling(network, FlowMatching()) is network
    # Equal functions keep recordings.
    same = [predictions_for_sampling(network, VelocityPrediction()) for _ in range(2)]
    assert same[0] == same[1]


@pytest.mark.parametrize(
    "objective",
    [
        NoisePrediction(schedule=CosineSchedule(s=0.01, scaler=2.0), time_shift=3.0),
        VelocityPrediction(loss_weight="velocity", time_density="logit_normal"),
        FlowMatching(time_density="uniform", time_shift=0.5),
    ],
    ids=lambda o: o.kind,
)
def test_json_is_complete(objective):
    text = json.dumps(objective.as_json())
    again = objective_of_json(json.loads(text))
    assert type(again) is type(objective)
    assert again.as_json() == objective.as_json()
    assert json.dumps(again.as_json()) == text


def test_objectives_are_equal_if_outputs_mean_the_same():
    assert NoisePrediction(loss_weight="velocity", time_shift=2.0) == PUBLISHED_OBJECTIVE
    assert NoisePrediction(schedule=CosineSchedule(s=0.01)) != PUBLISHED_OBJECTIVE
    assert VelocityPrediction() != PUBLISHED_OBJECTIVE
    assert FlowMatching(time_density="uniform") == FlowMatching()


def test_options_that_a_kind_does_not_have_are_ignored():
    options = {"loss_weight": "velocity", "time_shift": 2.0, "time_density": "uniform"}
    assert [make_objective(kind, **options).as_json() for kind in OBJECTIVES] == [
        NoisePrediction(loss_weight="velocity", time_shift=2.0).as_json(),
        VelocityPrediction(loss_weight="velocity", time_shift=2.0).as_json(),
        FlowMatching(time_density="uniform", time_shift=2.0).as_json(),
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: check_prediction("epsilon"), "must be one of noise, velocity, flow, got 'epsilon'"),
        (lambda: make_objective("epsilon"), "must be one of noise, velocity, flow, got 'epsilon'"),
        (lambda: NoisePrediction(time_shift=0.0), "time_shift must be above 0 and at most 100, got 0"),
        (lambda: FlowMatching(time_shift=math.nan), "time_shift must be a finite number, got nan"),
        (lambda: objective_of_json({"kind": "noise", "loss_weight": "p3"}), "one of p2, velocity, got 'p3'"),
        (lambda: objective_of_json({"kind": "noise", "loss_weight": 3}), "loss_weight must be one of p2"),
        (lambda: objective_of_json({"kind": "flow", "time_density": "b"}), "one of logit_normal, uniform"),
        (lambda: objective_of_json("flow"), "The objective is unknown: 'flow'"),
        (
            lambda: objective_of_json({"kind": ["flow"]}),
            "is unknown: .* This version has noise, velocity, flow",
        ),
        (
            lambda: objective_of_json({"kind": "flow", "sigma": 1}),
            "The objective flow has no setting 'sigma'",
        ),
        (
            lambda: objective_of_json({"kind": "noise", "schedule": 3}),
            "must be an object with the numbers s and scaler, got 3",
        ),
        (lambda: objective_of_json({"kind": "noise", "schedule": {"s": "x"}}), "s must be a finite number"),
        (
            lambda: objective_of_json({"kind": "noise", "schedule": {"v": 1}}),
            "must be an object with the numbers s and scaler",
        ),
        (lambda: objective_of_json({"kind": "noise", "time_shift": True}), "time_shift must be a finite"),
    ],
)
def test_invalid_objectives_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()

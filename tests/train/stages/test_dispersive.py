"""The dispersive loss against its sum over pairs, and in an update of Stage C."""

import contextlib
import dataclasses
import itertools
import math

import pytest
import torch

from wuerstchen.errors import UserError
from wuerstchen.models.prior import Prior
from wuerstchen.models.text import TextStates
from wuerstchen.recipes.tiny import tiny
from wuerstchen.train.engine.checkpoint import TrainingState
from wuerstchen.train.engine.distributed import Processes
from wuerstchen.train.engine.optim import make_optimizer
from wuerstchen.train.engine.update import StepRunner, TrainStep
from wuerstchen.train.feed.random import ImageRandom
from wuerstchen.train.stages.dispersive import dispersive_loss
from wuerstchen.train.stages.prior import StageC

from ...configurations import SMALL_PRIOR, SMALL_STATISTICS

CPU = torch.device("cpu")
RECIPE = tiny()


def test_equals_the_sum_over_pairs():
    features = torch.randn(5, 2, 3, 4, dtype=torch.float64) + 7
    pairs = itertools.permutations(features, 2)
    terms = [math.exp(-(a - b).square().mean().item() / 0.5) for a, b in pairs]
    assert dispersive_loss(features).item() == pytest.approx(math.log(sum(terms) / 20))


def test_spread_features_have_a_lower_loss():
    features = torch.randn(4, 6)
    assert dispersive_loss(2 * features) < dispersive_loss(features) < 0
    assert dispersive_loss(features[:1].expand(4, -1)).item() == pytest.approx(0, abs=1e-6)


def test_far_and_equal_features_have_finite_gradients():
    """exp(−distance) underflows for far features, and equal ones have a distance of 0."""
    for features in (1e3 * torch.randn(3, 8), torch.ones(3, 8), torch.randn(1, 8)):
        features.requires_grad_()
        dispersive_loss(features).backward()
        assert features.grad.isfinite().all()


def test_autocast_does_not_round_it():
    features = torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = dispersive_loss(features)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, dispersive_loss(features))
    assert dispersive_loss(features.bfloat16()).dtype == torch.float32


def make_stage(cascade, weight, prior=None):
    settings = dataclasses.replace(cascade.settings, latent_statistics=SMALL_STATISTICS)
    if prior is None:
        prior = Prior(dataclasses.replace(SMALL_PRIOR, depth=2, dropout=0.0))
        prior.load_state_dict(cascade.prior.state_dict(), strict=False)
    cascade = dataclasses.replace(cascade, settings=settings, prior=prior)
    config = dataclasses.replace(RECIPE.stage_c, caption_dropout=0.0, dispersive_weight=weight)
    return StageC(config, RECIPE, cascade)


def make_inputs(cascade):
    text = cascade.text_encoder.encode(["a", "b c", "d", "e"])
    x = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    inputs = {"x": x, "states": text.states.float(), "mask": text.mask}
    return inputs, torch.arange(4)


def test_it_is_added_to_the_loss_of_stage_c(small_cascade):
    """On the features after a quarter of the blocks, which are two groups of three: after the first."""
    inputs, numbers = make_inputs(small_cascade)
    plain, weighted = make_stage(small_cascade, 0.0), make_stage(small_cascade, 0.25)
    weighted.prior.load_state_dict(plain.prior.state_dict())
    seen = []
    weighted.prior.blocks[2].register_forward_hook(lambda _, __, output: seen.append(output))
    (_, expected, _) = next(plain.losses(inputs, ImageRandom(0, numbers)))
    (name, loss, terms) = next(weighted.losses(inputs, ImageRandom(0, numbers)))
    assert name == "prior"
    assert terms.keys() == {"dispersive"}
    torch.testing.assert_close(terms["dispersive"], dispersive_loss(seen[0]))
    torch.testing.assert_close(loss, expected + 0.25 * terms["dispersive"])
    loss.backward()
    assert weighted.prior.blocks[0].channelwise[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_update_logs_it(small_cascade, accumulate):
    stage = make_stage(small_cascade, 0.25)
    stage.optimization = dataclasses.replace(stage.optimization, accumulate=accumulate)
    state = TrainingState(
        networks=stage.networks,
        averages={},
        optimizers={"prior": make_optimizer(stage.prior, stage.optimization)},
    )
    step = TrainStep(stage, state, 0, torch.bfloat16, Processes(CPU, 0, 1))
    values = step(*make_inputs(small_cascade))
    assert values["loss"].isfinite()
    assert values["dispersive"] < 0


def losses_of_updates(cascade, record, device):
    """Losses of eight updates with every option of Stage C at once."""
    network = dataclasses.replace(SMALL_PRIOR, depth=2, dropout=0.1, text_blocks=1, registers=3)
    torch.manual_seed(0)
    stage = make_stage(cascade, 0.25, Prior(network))
    stage.config = dataclasses.replace(stage.config, time_density="logit_normal", caption_dropout=0.1)
    empty = stage.no_text
    stage.no_text = TextStates(states=empty.states.to(device), mask=empty.mask.to(device))
    stage.prior.to(device).eval()
    inputs, numbers = make_inputs(cascade)
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    optimizers = {"prior": make_optimizer(stage.prior, stage.optimization)}
    state = TrainingState(networks=stage.networks, averages={}, optimizers=optimizers)
    step = TrainStep(stage, state, 0, torch.bfloat16, Processes(device, 0, 1))
    found = []
    with contextlib.closing(StepRunner(step, record)) as update:
        for number in range(8):
            values = update(inputs, numbers.to(device) + 4 * number)
            found.append({name: value.item() for name, value in values.items()})
    return found


def test_updates_with_every_option(small_cascade):
    found = losses_of_updates(small_cascade, False, CPU)
    assert all(math.isfinite(value) for values in found for value in values.values())


@pytest.mark.gpu
def test_updates_with_every_option_can_be_recorded(small_cascade):
    """Whatever waits for the device, or reads a number of it on the host, cannot."""
    cuda = torch.device("cuda")
    plain, recorded = (losses_of_updates(small_cascade, record, cuda) for record in (False, True))
    for a, b in zip(plain, recorded, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-2)


def test_invalid_weights_are_refused():
    for weight in (-0.1, math.inf, math.nan):
        with pytest.raises(UserError, match=f"dispersive_weight must be at least 0, got {weight}"):
            dataclasses.replace(RECIPE.stage_c, dispersive_weight=weight)

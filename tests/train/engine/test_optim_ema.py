"""Learning rate, optimizer and weight average against their formulas."""

import copy

import pytest
import torch
from torch import nn

from wuerstchen.errors import UserError
from wuerstchen.models.mlp import GlobalResponseNorm
from wuerstchen.models.vqgan import VectorQuantizer
from wuerstchen.train.config import Optimization
from wuerstchen.train.engine import optim
from wuerstchen.train.engine.ema import decay_at, make_average, update_average
from wuerstchen.train.engine.optim import (
    learning_rate,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    set_rate,
    update,
)


def test_learning_rate_rises_then_stays_or_falls():
    constant = Optimization(images=1000, batch_size=1, learning_rate=1e-3, warmup=100)
    assert [learning_rate(constant, i) for i in (0, 50, 100, 1000)] == [0, 5e-4, 1e-3, 1e-3]
    cosine = Optimization(images=1100, batch_size=1, learning_rate=1e-3, warmup=100, decay="cosine")
    assert learning_rate(cosine, 100) == pytest.approx(1e-3)
    assert learning_rate(cosine, 350) == pytest.approx(1e-3 * (0.05 + 0.95 * (1 + 0.5**0.5) / 2))
    assert learning_rate(cosine, 600) == pytest.approx(1e-3 * (0.05 + 0.95 / 2))
    assert learning_rate(cosine, 1100) == pytest.approx(5e-5)


@pytest.fixture(params=[optim.GRAD_SCALER_DEVICES, ()], ids=["heeded", "by hand"])
def grad_scaler(request, monkeypatch):
    """Whether the optimizer heeds found_inf and grad_scale, or, as on Apple's GPUs, it may not."""
    monkeypatch.setattr(optim, "GRAD_SCALER_DEVICES", request.param)


@pytest.mark.usefixtures("grad_scaler")
def test_update_is_adamw_with_shortened_gradients():
    """Against the update written out (arXiv 1711.05101, algorithm 2), in fp64."""
    network = nn.Linear(3, 2).double()
    config = Optimization(images=1, batch_size=1, betas=(0.8, 0.9), weight_decay=0.1, learning_rate=0.01)
    before = copy.deepcopy(network)
    optimizer = make_optimizer(network, config)
    gradients = {name: 10 * torch.randn_like(p) for name, p in network.named_parameters()}
    total = torch.stack([g.norm() for g in gradients.values()]).norm()
    for name, p in network.named_parameters():
        p.grad = gradients[name].clone()
    set_rate(optimizer, 0.02)
    norm = update(network, optimizer, clip_norm=1.0, loss=torch.tensor(1.0))
    assert norm.item() == pytest.approx(total.item())
    for name, p in network.named_parameters():
        g = gradients[name] / (total + 1e-6)
        start = dict(before.named_parameters())[name]
        decayed = start * (1 - 0.02 * (0.1 if p.ndim > 1 else 0))
        # after one step both bias corrections cancel: m̂ = g, v̂ = g²
        torch.testing.assert_close(p, decayed - 0.02 * g / (g.abs() + 1e-8))
        assert p.grad is None


@pytest.mark.usefixtures("grad_scaler")
def test_short_gradients_are_not_lengthened():
    """Against torch's own clipping and AdamW. One update alone would not tell: AdamW forgets the length."""
    ours = nn.Linear(3, 2).double()
    theirs = copy.deepcopy(ours)
    config = Optimization(images=1, batch_size=1, weight_decay=0.0, learning_rate=0.01)
    mine = make_optimizer(ours, config)
    other = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=config.betas, weight_decay=0)
    for size in (5.0, 0.01, 0.2, 3.0):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            q.grad = size * torch.randn_like(p)
            p.grad = q.grad.clone()
        update(ours, mine, clip_norm=1.0, loss=torch.tensor(1.0))
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        other.step()
        torch.testing.assert_close(
            dict(ours.named_parameters()), dict(theirs.named_parameters()), rtol=1e-5, atol=1e-7
        )


@pytest.mark.usefixtures("grad_scaler")
def test_a_gradient_that_is_not_finite_updates_nothing():
    network = nn.Linear(2, 2)
    before = copy.deepcopy(network.state_dict())
    optimizer = make_optimizer(network, Optimization(images=1, batch_size=1))
    for x, loss in ((torch.inf, 1.0), (1.0, torch.nan)):
        network(torch.full((1, 2), x)).sum().backward()
        norm = update(network, optimizer, 1.0, torch.tensor(loss))
        assert norm.isfinite() == (x == 1.0)
        assert all(torch.equal(before[name], p) for name, p in network.state_dict().items())
    for entry in optimizer.state.values():  # as if nothing had been
        assert not any(tensor.any() for tensor in entry.values())
    network(torch.ones(1, 2)).sum().backward()
    update(network, optimizer, 1.0, torch.tensor(1.0))
    assert not any(torch.equal(before[name], p) for name, p in network.state_dict().items())


def test_parts_can_learn_more_slowly():
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = copy.deepcopy(network)
    optimizer = make_optimizer(network, Optimization(images=1, batch_size=1), {"0.": 0.1})
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    set_rate(optimizer, 0.01)
    update(network, optimizer, 1e9, torch.tensor(1.0))
    moved = [
        (a - b).abs().max().item() for a, b in zip(network.parameters(), before.parameters(), strict=True)
    ]
    assert moved == pytest.approx([0.001, 0.001, 0.01, 0.01], rel=1e-3)


class Block(nn.Module):
    """Everything that weight decay tells apart."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.grn = GlobalResponseNorm(4)
        self.codes = VectorQuantizer(8, 3)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.tokens = nn.Embedding(5, 3)
        self.head = nn.Conv2d(4, 1, 1)


def decayed_by(optimizer) -> set[nn.Parameter]:
    return {p for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}


@pytest.mark.parametrize("earlier", [False, True])
def test_weight_decay_acts_on_matrices_alone(earlier):
    block = Block()
    config = Optimization(images=1, batch_size=1, weight_decay=0.1)
    named = dict(block.named_parameters())
    found = decayed_by(make_optimizer(block, config, {"linear": 0.5}, decays_all_axes=earlier))
    decayed = {name for name, parameter in named.items() if parameter in found}
    matrices = {f"{name}.weight" for name in ("linear", "depthwise", "tokens", "head")}
    of_earlier = {"grn.gamma", "grn.beta", "codes.embedding.weight"}  # by their number of axes
    assert decayed == (matrices | of_earlier if earlier else matrices)


def test_moments_are_stored_where_earlier_versions_stored_them():
    """Parameters are numbered by scale and number of axes, not by what is decayed."""
    torch.manual_seed(0)
    block, scales = Block(), {"linear": 0.5}
    config = Optimization(images=1, batch_size=1, weight_decay=0.1)
    optimizer = make_optimizer(block, config, scales)
    for parameter in block.parameters():
        parameter.grad = torch.randn_like(parameter)
    update(block, optimizer, 1.0, torch.tensor(1.0))
    stored = optimizer_tensors(optimizer)
    numbered = [
        *("linear.weight", "linear.bias"),
        *("grn.gamma", "grn.beta", "codes.embedding.weight", "depthwise.weight", "tokens.weight"),
        *("head.weight", "depthwise.bias", "head.bias"),
    ]
    named = dict(block.named_parameters())
    assert len(stored) == 3 * len(named)
    for number, name in enumerate(numbered):
        assert torch.equal(stored[f"{number}.exp_avg"], optimizer.state[named[name]]["exp_avg"]), name
    earlier = make_optimizer(block, config, scales, decays_all_axes=True)
    load_optimizer_tensors(earlier, stored, lambda key, tensor: tensor.copy_(stored[key]))
    for parameter in named.values():
        assert torch.equal(earlier.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"])


def test_the_average_forgets_its_beginning():
    """The trap of a fixed decay: after a thousand updates a third of it would be random weights."""
    network = nn.Linear(1, 1, bias=False)
    nn.init.constant_(network.weight, 100.0)
    average = make_average(network)
    nn.init.constant_(network.weight, 0.0)
    for step in range(1, 1001):
        update_average(average, network, decay_at(step, 0.999))
    assert average.weight.item() < 1e-2
    assert decay_at(10**6, 0.999) == 0.999


def test_the_average_takes_statistics_and_copies_counts():
    network = nn.BatchNorm1d(2)
    average = make_average(network)
    network(torch.randn(50, 2) + 3)
    update_average(average, network, 0.25)
    torch.testing.assert_close(average.running_mean, 0.75 * network.running_mean)
    assert average.num_batches_tracked == 1
    assert not average.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": 0}, "images must be at least 1, got 0"),
        ({"weight_decay": float("nan")}, "weight_decay must be at least 0, got nan"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be between 0 and 1, got 0.0"),
        ({"ema_decay": 1.0}, "ema_decay must be from 0 to below 1, got 1.0"),
    ],
)
def test_impossible_values_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        Optimization(**{"images": 1, "batch_size": 1, **change})

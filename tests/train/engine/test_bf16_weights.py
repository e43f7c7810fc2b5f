"""bf16 copies of weights: the same updates as autocast over fp32 weights makes."""

import contextlib
import copy
import importlib.util

import pytest
import torch
from torch import nn

from wuerstchen.models.prior import Prior
from wuerstchen.train.config import Optimization
from wuerstchen.train.engine.bf16_weights import Bf16Weights, adamw
from wuerstchen.train.engine.checkpoint import TrainingState
from wuerstchen.train.engine.distributed import Processes
from wuerstchen.train.engine.ema import make_average
from wuerstchen.train.engine.optim import (
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    set_rate,
    update,
)
from wuerstchen.train.engine.update import StepRunner, TrainStep, make_bf16_weights

from ...configurations import TOY_PRIOR

CPU = torch.device("cpu")
CONFIG = Optimization(images=64, batch_size=4, betas=(0.9, 0.95), weight_decay=0.1, clip_norm=0.5)


class PriorStage:
    """Stage C on data that are there."""

    name = "c"
    averaged = ("prior",)
    captions, reads_images = True, False
    rates: dict[str, float] = {}  # noqa: RUF012
    rate_scales: dict[str, float] = {}  # noqa: RUF012
    preview_labels: dict[str, list[str]] = {"rows": ["seen"]}  # noqa: RUF012

    def __init__(self, optimization: Optimization = CONFIG) -> None:
        torch.manual_seed(3)
        self.optimization = optimization
        self.prior = Prior(TOY_PRIOR)
        nn.init.normal_(self.prior.out[1].weight, std=0.02)  # at 0 nothing before it would learn
        for name, parameter in self.prior.named_parameters():
            # What is the same for all keys changes no attention: its gradient is rounding, and Adam makes
            # whole steps of it.
            parameter.requires_grad_("to_k.bias" not in name)
        self.networks = {"prior": self.prior}

    def prepare(self, batch, device):
        raise NotImplementedError

    def check(self, values):
        pass

    def preview(self, averages, pixels, device, *, low_memory=False):
        return []

    def losses(self, inputs, random):
        t = random.uniform("time")
        x = inputs["x"] + random.normal("noise", inputs["x"].shape[1:])
        predicted = self.prior(x, t, self.prior.context(inputs["states"], cache_kv=False))
        yield "prior", (predicted - inputs["x"]).square().mean(), {}


def make_step(with_copies: bool, device: torch.device = CPU) -> TrainStep:
    stage = PriorStage()
    stage.prior.to(device)
    optimizer = make_optimizer(stage.prior, CONFIG, {"blocks.0": 0.5})
    averages = {"prior": make_average(stage.prior)}
    state = TrainingState(networks=stage.networks, averages=averages, optimizers={"prior": optimizer})
    copies = {"prior": Bf16Weights(stage.prior, optimizer, least=1)} if with_copies else {}
    return TrainStep(stage, state, 1, torch.bfloat16, Processes(device), copies)


def make_inputs(device: torch.device = CPU) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, states = (torch.randn(shape, generator=generator) for shape in ((4, 4, 4, 4), (4, 5, 8)))
    return {"x": x.to(device), "states": states.to(device)}, torch.arange(4, device=device)


def test_updates_are_those_of_autocast_over_fp32_weights():
    """A stale copy, a lost gradient, a wrong norm, rate or decay would part them by more than rounding."""
    plain, half = make_step(False), make_step(True)
    keys = [optimizer_tensors(step.state.optimizers["prior"]).keys() for step in (plain, half)]
    for number in range(6):
        for step in (plain, half):
            set_rate(step.state.optimizers["prior"], 0.01 * (number + 1))
        values, others = (step(*make_inputs()) for step in (plain, half))
        assert others["loss"].item() == pytest.approx(values["loss"].item(), rel=1e-4)
        assert others["gradient_prior"].item() == pytest.approx(values["gradient_prior"].item(), rel=1e-3)
    keys = [optimizer_tensors(step.state.optimizers["prior"]).keys() for step in (plain, half)]
    assert keys[0] == keys[1]  # checkpoints of one are those of the other
    (weights, optimizer), (ours, our_optimizer) = (
        (step.stage.networks["prior"].state_dict(), optimizer_tensors(step.state.optimizers["prior"]))
        for step in (plain, half)
    )
    for name, tensor in (weights | optimizer).items():
        found = (ours | our_optimizer)[name]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, tensor, rtol=1e-3, atol=1e-4 * tensor.abs().max().item(), msg=name)
    for _, weight, half_weight in half.copies["prior"].layers:
        assert torch.equal(half_weight, weight.bfloat16())
        assert half_weight.grad is weight.grad is None


def test_copies_are_of_all_large_linear_layers_that_learn():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2), nn.Conv1d(8, 8, 1), nn.Linear(8, 8))
    network[3].requires_grad_(False)
    copies = Bf16Weights(network, make_optimizer(network, CONFIG), least=64)
    assert [module for module, _, _ in copies.layers] == [network[0]]
    weight = network[0].weight
    with copies.in_place():
        assert network[0].weight.dtype == torch.bfloat16
    with pytest.raises(TypeError), copies.in_place():
        network(nothing=True)
    assert network[0].weight is weight
    assert list(network.state_dict()) == ["0.weight", "0.bias", *list(network.state_dict())[2:]]


@pytest.mark.parametrize(("fault", "loss"), [(torch.inf, 1.0), (1.0, torch.nan)])
def test_what_is_not_finite_updates_nothing(fault, loss):
    network = nn.Linear(4, 4)
    optimizer = make_optimizer(network, CONFIG)
    copies = Bf16Weights(network, optimizer, least=1)
    before = copy.deepcopy(network.state_dict())
    with copies.in_place(), torch.autocast("cpu", torch.bfloat16):
        network(torch.full((1, 4), fault)).sum().backward()
    update(network, optimizer, 1.0, torch.tensor(loss), copies)
    for name, tensor in network.state_dict().items():
        assert torch.equal(before[name], tensor)
    assert torch.equal(copies.layers[0][2], before["weight"].bfloat16())
    assert not any(tensor.any() for tensor in optimizer_tensors(optimizer).values())


def test_all_weights_may_have_copies():
    """As those of an adapter with a large rank. Then no weight has a gradient of its own."""
    found = []
    for with_copies in (False, True):
        torch.manual_seed(0)
        network = nn.Linear(8, 8, bias=False)
        optimizer = make_optimizer(network, CONFIG)
        set_rate(optimizer, 0.01)
        copies = Bf16Weights(network, optimizer, least=1) if with_copies else None
        with (
            contextlib.nullcontext() if copies is None else copies.in_place(),
            torch.autocast("cpu", torch.bfloat16),
        ):
            loss = network(torch.ones(1, 8)).square().sum()
            loss.backward()
        norm = update(network, optimizer, 1.0, loss.detach().float(), copies)
        found.append((norm, network.weight.detach()))
    (norm, weight), (our_norm, our_weight) = found
    torch.testing.assert_close(our_norm, norm, rtol=1e-2, atol=0)
    torch.testing.assert_close(our_weight, weight, rtol=1e-3, atol=1e-4)


def test_a_run_that_goes_on_has_the_copies_of_its_weights():
    first = make_step(True)
    first(*make_inputs())
    second = make_step(False)
    second.stage.networks["prior"].load_state_dict(first.stage.networks["prior"].state_dict())
    stored = {k: t.clone() for k, t in optimizer_tensors(first.state.optimizers["prior"]).items()}
    optimizer = second.state.optimizers["prior"]
    load_optimizer_tensors(optimizer, stored, lambda key, tensor: tensor.copy_(stored[key]))
    second.copies = {"prior": Bf16Weights(second.stage.networks["prior"], optimizer, least=1)}
    for step in (first, second):
        step(*make_inputs())
    for a, b in zip(*(s.stage.networks["prior"].parameters() for s in (first, second)), strict=True):
        assert torch.equal(a, b)


def test_gradients_that_are_added_up_stay_in_fp32():
    for accumulate, count in ((1, 1), (2, 0)):
        stage = PriorStage(Optimization(images=64, batch_size=4, accumulate=accumulate))
        optimizers = {"prior": make_optimizer(stage.prior, CONFIG)}
        assert len(make_bf16_weights(stage, TrainingState(stage.networks, {}, optimizers))) == count


@pytest.mark.gpu
def test_they_can_be_recorded():
    """Whatever waits for the device, or reads a number of it on the host, cannot."""
    cuda = torch.device("cuda")
    losses = []
    for record in (False, True):
        step = make_step(True, cuda)
        with contextlib.closing(StepRunner(step, record)) as update:
            losses.append([update(*make_inputs(cuda))["loss"].item() for _ in range(8)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("shape", [(3, 5), (64, 2048), (1000, 77)])
@pytest.mark.parametrize("keeps", [1.0, 0.0])
def test_the_kernel_is_the_plain_update(shape, keeps):
    torch.manual_seed(0)
    weight, gradient, mean = (torch.randn(shape) for _ in range(3))
    given = [weight, weight.bfloat16(), gradient.bfloat16(), mean, torch.rand(shape)]
    factors = torch.tensor([0.99, 0.01, 1.7, 0.3, keeps])
    found = []
    for device in ("cpu", "cuda"):
        tensors = [tensor.to(device, copy=True) for tensor in given]
        adamw(*tensors[:3], tuple(tensors[3:]), factors.to(device), (0.9, 0.999, 1e-8))
        found.append([tensor.cpu() for tensor in tensors])
    for plain, fast in zip(*found, strict=True):
        torch.testing.assert_close(
            fast, plain, rtol=1e-2 if plain.dtype == torch.bfloat16 else 1e-5, atol=1e-6
        )
    assert torch.equal(found[1][1], found[1][0].bfloat16())
    if not keeps:
        assert all(torch.equal(a, b) for a, b in zip(found[1], given, strict=True))

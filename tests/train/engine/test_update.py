"""One update: in parts, with blocks computed again, sharded, and over many processes."""

import pytest
import torch
from torch import nn

from wuerstchen.errors import UserError
from wuerstchen.models.prior import Prior, PriorConfig
from wuerstchen.train.config import Optimization
from wuerstchen.train.engine.checkpoint import TrainingState
from wuerstchen.train.engine.distributed import Processes
from wuerstchen.train.engine.ema import make_average
from wuerstchen.train.engine.optim import make_optimizer
from wuerstchen.train.engine.update import TrainStep, compile_regions, recompute_blocks
from wuerstchen.train.feed.random import ImageRandom

CPU = torch.device("cpu")


def make_prior(dropout: float = 0.0) -> Prior:
    torch.manual_seed(3)
    config = PriorConfig(
        c_in=4, c=16, c_cond=8, c_r=8, depth=2, nhead=2, dropout=dropout, text_blocks=1, registers=3
    )
    prior = Prior(config)
    text_block = prior.text_blocks[0]
    for last in (prior.out[1], text_block.attention.to_out[0], text_block.mlp[-1]):
        nn.init.normal_(last.weight, std=0.02)  # at 0 nothing before it would learn
    return prior


class PriorStage:
    """Stage C without what surrounds it: networks of which the first is large."""

    name = "c"
    averaged = ("prior",)
    captions = True
    reads_images = False
    rates: dict[str, float] = {}  # noqa: RUF012
    rate_scales: dict[str, float] = {}  # noqa: RUF012
    preview_labels: dict[str, list[str]] = {"rows": ["seen"]}  # noqa: RUF012

    def __init__(self, dropout: float = 0.0, **optimization) -> None:
        self.optimization = Optimization(images=64, batch_size=8, **optimization)
        self.prior = make_prior(dropout)
        self.critic = nn.Linear(4, 1)
        self.networks = {"prior": self.prior, "critic": self.critic}

    def prepare(self, batch, device):
        raise NotImplementedError

    def check(self, values):
        pass

    def preview(self, averages, pixels, device, *, low_memory=False):
        return []

    def losses(self, inputs, random):
        t = random.uniform("time")
        x = inputs["x"] + random.normal("noise", inputs["x"].shape[1:])
        context = self.prior.context(inputs["states"], inputs["mask"], cache_kv=False)
        predicted, features = self.prior.with_features(x, t, context, 1)
        loss = (predicted - inputs["x"]).square().mean() + 0.1 * features.square().mean()
        yield "prior", loss, {"spread": predicted.detach().std()}
        means = predicted.detach().mean((2, 3))
        yield "critic", (self.critic(means) - 1).square().mean(), {}


def make_inputs() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 4, 4, 4, generator=generator)
    states = torch.randn(8, 5, 8, generator=generator)
    mask = torch.arange(5) < torch.arange(1, 9)[:, None] % 5 + 1
    return {"x": x, "states": states, "mask": mask}, torch.arange(8)


def make_step(stage: PriorStage, processes: Processes | None = None) -> TrainStep:
    state = TrainingState(
        networks=stage.networks,
        averages={"prior": make_average(stage.prior)},
        optimizers={name: make_optimizer(n, stage.optimization) for name, n in stage.networks.items()},
    )
    step = TrainStep(stage, state, 1, None, processes or Processes(CPU))
    step.decay = 0.5
    return step


def updated(stage: PriorStage, updates: int = 2) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """The values of the last update, and all weights after it."""
    step = make_step(stage)
    for number in range(updates):
        torch.manual_seed(number)  # dropout
        values = step(*make_inputs())
        step.average()
    weights = nn.ModuleDict({**stage.networks, "average": step.state.averages["prior"]}).state_dict()
    return {name: value.item() for name, value in values.items()}, weights


def test_a_batch_in_parts_makes_the_update_of_the_whole():
    whole, weights = updated(PriorStage())
    for accumulate in (2, 4):
        parts, others = updated(PriorStage(accumulate=accumulate))
        assert parts.keys() == whole.keys()
        for name in ("loss", "loss_critic", "gradient_prior", "gradient_critic"):
            assert parts[name] == pytest.approx(whole[name], rel=1e-4), name
        for name, tensor in weights.items():
            torch.testing.assert_close(others[name], tensor, rtol=1e-4, atol=2e-6, msg=name)


def test_parts_of_a_smaller_last_batch_are_weighted():
    whole, parts = PriorStage(), PriorStage(accumulate=4)
    inputs, indices = make_inputs()
    rows = {name: tensor[:5] for name, tensor in inputs.items()}
    for stage in (whole, parts):
        make_step(stage)(rows, indices[:5])
    for a, b in zip(whole.prior.parameters(), parts.prior.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)


def test_the_first_fault_is_the_one_that_is_told():
    step = make_step(PriorStage())
    inputs, indices = make_inputs()
    broken = {**inputs, "x": inputs["x"] * torch.nan}
    for rows, first, told in ((inputs, 8, -1), (broken, 16, 16), (broken, 24, 16), (inputs, 32, 16)):
        step(rows, indices + first)
        assert step.fault.item() == told


@pytest.mark.parametrize("accumulate", [1, 4])
def test_processes_talk_once_an_update_of_a_network(accumulate, monkeypatch):
    reduced: list[int] = []
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor: reduced.append(tensor.numel()))
    stage = PriorStage(accumulate=accumulate)
    make_step(stage, Processes(CPU, 0, 2))(*make_inputs())
    sizes = [sum(p.numel() for p in network.parameters()) for network in stage.networks.values()]
    assert reduced == [number for size in sizes for number in (size, 1)]  # gradients, then the loss


def test_parts_must_be_equal():
    with pytest.raises(UserError, match=r"batch_size must be a multiple of accumulate=3, got 8"):
        PriorStage(accumulate=3)
    with pytest.raises(UserError, match="accumulate must be at least 1, got 0"):
        PriorStage(accumulate=0)
    with pytest.raises(
        UserError, match=r"2 processes in accumulate=3 parts each\. Make batch_size a multiple of 6"
    ):
        Processes(CPU, 0, 2).check_batches("c", 24, 8, 3)


def test_what_is_computed_again_has_the_same_gradients():
    """With dropout, whose masks must come again."""
    plain, again = PriorStage(dropout=0.2), PriorStage(dropout=0.2)
    recompute_blocks(again.prior)
    (values, weights), (others, same) = updated(plain), updated(again)
    assert values == others
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert not torch.equal(weights["prior.out.1.weight"], make_prior().out[1].weight)


def test_what_is_computed_again_is_not_kept():
    kept = []
    for recomputes in (False, True):
        stage, sizes = PriorStage(), []
        if recomputes:
            recompute_blocks(stage.prior)

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks:
            next(stage.losses(make_inputs()[0], ImageRandom(0, make_inputs()[1])))
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 4


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # by the compiler itself, of its own tensors
def test_compiled_blocks_can_compute_again(monkeypatch):
    plain = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **given: plain(self, backend="aot_eager", **given))
    stage = PriorStage()
    recompute_blocks(stage.prior)
    compile_regions(stage.prior)
    (values, weights), (others, same) = updated(PriorStage()), updated(stage)
    assert values == pytest.approx(others, rel=1e-5)
    for name, tensor in weights.items():
        torch.testing.assert_close(same[name], tensor, rtol=1e-4, atol=2e-6, msg=name)

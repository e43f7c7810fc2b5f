"""Training that keeps weights in bf16 and 2 bytes of state for each: rounding, updates, and whole runs."""

import copy
import functools

import pytest
import torch
from torch import nn

from wuerstchen.runtime import offload
from wuerstchen.train.config import Optimization
from wuerstchen.train.engine import factored, state
from wuerstchen.train.engine.checkpoint import TrainingState, newest, read_averages, restore
from wuerstchen.train.engine.checkpoint_writer import save
from wuerstchen.train.engine.distributed import Processes
from wuerstchen.train.engine.ema import make_average, on_device, update_average
from wuerstchen.train.engine.factored import (
    FactoredAdamW,
    apply_update,
    keep_in_bf16,
    random_bits,
    rounded,
)
from wuerstchen.train.engine.optim import make_optimizer, optimizer_tensors, set_rate
from wuerstchen.train.engine.update import StepRunner, TrainStep, make_bf16_weights

from .test_bf16_weights import CONFIG, PriorStage, make_inputs
from .test_loop import StopAt, digests, run

CPU = torch.device("cpu")


def seed(number: int) -> torch.Tensor:
    return torch.tensor(number, dtype=torch.int32)


def low_step(memory: str, optimization: Optimization = CONFIG, device: torch.device = CPU) -> TrainStep:
    """A step of the toy prior, as ``make_state`` and ``make_step`` set it up, with all matrices in bf16."""
    stage = PriorStage(optimization)
    averages = {"prior": make_average(stage.prior)}
    if memory != "normal":
        keep_in_bf16(stage.prior, accumulates=optimization.accumulate > 1, least=1)
    stage.prior.to(device)
    optimizer = make_optimizer(stage.prior, optimization)
    if memory == "lowest":
        optimizer.update_in_backward(Processes(device).all_reduce_mean_)
    trained = TrainingState(networks=stage.networks, averages=averages, optimizers={"prior": optimizer})
    return TrainStep(stage, trained, 1, torch.bfloat16, Processes(device))


def linear(optimization: Optimization = CONFIG, rows: int = 64, columns: int = 96, **more):
    """A linear layer with its weight in bf16, and its optimizer."""
    torch.manual_seed(0)
    layer = nn.Linear(columns, rows)
    keep_in_bf16(layer, least=1)
    return layer, make_optimizer(layer, optimization, **more)


def test_rounding_keeps_the_expected_value():
    """Rounding down, or with the bits of the wrong half, would shift every weight."""
    x = torch.tensor([1.001, -1.001, 3.14159e-5, -2.71828e4, 1.9999])
    bits = random_bits(5 * 40_000, seed(3)).view(40_000, 5) & 0xFFFF
    many = rounded(x.expand(40_000, 5), bits).double()
    ulp = (x.bfloat16().double().abs() / 128).clamp(min=1e-12)
    assert ((many - x).abs() < ulp).all()
    assert ((many.mean(0) - x).abs() < 0.02 * ulp).all()  # four standard deviations are a hundredth
    assert all(len(column.unique()) == 2 for column in many.unbind(1))


def test_what_bf16_represents_is_not_changed():
    exact = torch.randn(1000).bfloat16().float()
    exact[:3] = torch.tensor([0.0, -0.0, 3.3895e38]).bfloat16().float()
    bits = random_bits(1000, seed(1)) & 0xFFFF
    assert torch.equal(rounded(exact, bits).float(), exact)


def test_random_bits_are_uniform_and_independent():
    """Neighbouring weights, the next update and the two halves of the bits."""
    halves = []
    for number in (7, 8):
        bits = random_bits(1 << 18, seed(number))
        halves += [(bits & 0xFFFF).double(), ((bits >> 16) & 0xFFFF).double()]
    for half in halves:
        counts = torch.histc(half, 256, 0, 65536)
        chi_squared = ((counts - 1024).square() / 1024).sum()
        assert 160 < chi_squared < 370  # 255 ± 5 standard deviations
        bitwise = torch.stack([(half.long() >> k & 1).double().mean() for k in range(16)])
        assert (bitwise - 0.5).abs().max() < 0.006
    rows = torch.stack([*halves, *(half.roll(1) for half in halves)])
    correlations = torch.corrcoef(rows) - torch.eye(8, dtype=torch.float64)
    assert correlations.abs().max() < 0.012


def test_it_is_adamw_where_the_second_moment_has_rank_one():
    """Bias corrections, decay, clipping, the rate and both moments, against torch's AdamW."""
    config = Optimization(images=8, batch_size=4, betas=(0.9, 0.95), weight_decay=0.1)
    layer, optimizer = linear(config)
    reference = copy.deepcopy(layer).float()
    theirs = torch.optim.AdamW(reference.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    start = layer.weight.detach().float()
    set_rate(optimizer, 1e-2)
    a, b = torch.rand(64) + 0.1, torch.rand(96) + 0.1
    generator = torch.Generator().manual_seed(1)
    for number in range(40):
        signs = torch.randint(0, 2, (64, 96), generator=generator) * 2 - 1
        gradient = (a[:, None] * b * signs * (1 + number % 3)).bfloat16()
        # The roots of the factors are not exact in bf16, and neither is what the reference reads.
        layer.weight.grad, reference.weight.grad = gradient * 4, gradient.float()
        optimizer.found_inf, optimizer.grad_scale = torch.tensor(0.0), torch.tensor(4.0)
        layer.bias.grad = reference.bias.grad = None
        optimizer.step()
        theirs.step()
    moved = reference.weight - start
    assert moved.abs().mean() > 0.02
    assert (layer.weight.float() - reference.weight).abs().mean() < 0.03 * moved.abs().mean()


def test_no_change_is_larger_than_any_of_adamw():
    """The factored second moment of the small gradient is 10⁻⁸ of its square: a step of 10,000 rates."""
    layer, optimizer = linear(Optimization(images=8, batch_size=4, betas=(0.9, 0.999)))
    with torch.no_grad():
        layer.weight.fill_(1.0)
    set_rate(optimizer, 1e-2)
    for _ in range(3):
        layer.weight.grad = torch.zeros_like(layer.weight)
        layer.weight.grad[0, 0], layer.weight.grad[1, 1] = 1e4, 1.0
        optimizer.step()
    moved = (layer.weight.detach().float() - 1).abs()
    assert 0.02 < moved[0, 0] < 0.04
    assert moved[1, 1] < 3 * 1e-2 * 3.2 + 0.01
    assert moved[2:, 2:].max() == 0


def test_changes_far_below_the_spacing_of_bf16_add_up():
    """A change of 1/100 of a weight's spacing is lost in rounding to nearest, and with it fine-tuning."""
    config = Optimization(images=8, batch_size=4, betas=(0.0, 0.95))
    layer, optimizer = linear(config)
    with torch.no_grad():
        layer.weight.fill_(1.5)
    set_rate(optimizer, 1e-4)  # the spacing is 1/128
    for _ in range(100):
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step()
    assert layer.weight.float().mean().item() == pytest.approx(1.5 - 100 * 1e-4, abs=2e-4)


def test_the_state_takes_two_bytes_per_weight():
    for width, kind, size in ((512, torch.float32, 12), (512, torch.bfloat16, 4)):
        layer = nn.Linear(width, width, bias=False)
        if kind is torch.bfloat16:
            keep_in_bf16(layer)
        optimizer = make_optimizer(layer, CONFIG)
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step()
        assert layer.weight.dtype is kind
        tensors = [layer.weight, *optimizer_tensors(optimizer).values()]
        taken = sum(t.numel() * t.element_size() for t in tensors) / width**2
        assert size <= taken < size + 0.05


def test_small_layers_stay_in_fp32():
    network = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 255), nn.LayerNorm(2**16), nn.Conv2d(4, 4, 1))
    frozen = nn.Linear(256, 256).requires_grad_(False)
    network.append(frozen)
    keep_in_bf16(network)
    assert [m.weight.dtype is torch.bfloat16 for m in network] == [True, False, False, False, False]
    assert network[0].bias.dtype is torch.float32


def test_a_skipped_update_changes_nothing():
    layer, optimizer = linear()
    for bad in (False, True):
        before = [t.clone() for t in (*layer.parameters(), *optimizer_tensors(optimizer).values())]
        layer.weight.grad = torch.full_like(layer.weight, torch.nan if bad else 1.0)
        layer.bias.grad = torch.ones_like(layer.bias)
        optimizer.found_inf = torch.tensor(float(bad))
        optimizer.grad_scale = torch.tensor(torch.nan if bad else 1.0)
        optimizer.step()
        after = [*layer.parameters(), *optimizer_tensors(optimizer).values()]
        same = [torch.equal(a, b) for a, b in zip(before, after, strict=False)]
        assert all(same) if bad else not any(same)
        if bad:
            assert len(before) == len(after)


def test_rounding_differs_between_updates_and_parameters():
    """With the same bits in each update, a weight would always be rounded to the same side."""
    layers = nn.ModuleList([nn.Linear(64, 64, bias=False) for _ in range(2)])
    keep_in_bf16(layers, least=1)
    optimizer = make_optimizer(layers, Optimization(images=8, batch_size=4, betas=(0.0, 0.9)))
    set_rate(optimizer, 1e-3)
    seen = []
    for _ in range(2):
        for layer in layers:
            with torch.no_grad():
                layer.weight.fill_(1.0)
            layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step()
        seen += [layer.weight.detach().clone() for layer in layers]
    assert all((one != other).float().mean() > 0.05 for n, one in enumerate(seen) for other in seen[:n])


def test_the_loss_falls_as_with_adamw():
    """A second moment that is wrong, or gradients that are limited too often, show as a loss that stays
    behind."""
    # Without clipping, which "lowest" does in another way: here it would change every update.
    config = Optimization(images=800, batch_size=4, betas=(0.9, 0.99), weight_decay=0.01, clip_norm=1e9)
    losses: dict[str, list[float]] = {}
    for choice in ("normal", "low", "lowest"):
        step = low_step(choice, config)
        set_rate(step.state.optimizers["prior"], 3e-3)
        inputs, indices = make_inputs()
        losses[choice] = [step(inputs, indices + 4 * number)["loss"].item() for number in range(100)]
    first, last = sum(losses["normal"][:10]), sum(losses["normal"][-20:]) / 2
    assert last < 0.7 * first
    for choice in ("low", "lowest"):
        assert sum(losses[choice][-20:]) / 2 == pytest.approx(last, rel=0.1)


def test_gradients_are_freed_one_after_the_other():
    step = low_step("lowest")
    optimizer = step.state.optimizers["prior"]
    alive = []

    def count(_: nn.Parameter) -> None:
        alive.append(sum(p.grad is not None for p in optimizer.released))

    for parameter in optimizer.released:
        parameter.register_post_accumulate_grad_hook(count)
    step(*make_inputs())
    assert len(alive) == len(optimizer.released) > 10
    assert max(alive) == 0  # the hook before this one has freed its gradient
    assert all(p.grad is None for p in step.stage.prior.parameters())


def test_the_first_update_in_the_backward_pass_is_that_after_it():
    """Nothing is clipped in it. The reported norm is the same, too."""
    config = Optimization(images=64, batch_size=4, clip_norm=1e9)
    steps = [low_step(memory, config) for memory in ("low", "lowest")]
    values = [step(*make_inputs()) for step in steps]
    torch.testing.assert_close(values[0]["gradient_prior"], values[1]["gradient_prior"])
    for one, other in zip(*(step.stage.prior.parameters() for step in steps), strict=True):
        assert torch.equal(one, other)


def test_an_outlier_is_limited_where_the_norm_of_all_gradients_is_unknown():
    moved = {}
    for size in (1.0, 100.0):
        layer, optimizer = linear(Optimization(images=8, batch_size=4, betas=(0.0, 0.999)))
        optimizer.update_in_backward(Processes(CPU).all_reduce_mean_)
        set_rate(optimizer, 1e-2)
        generator = torch.Generator().manual_seed(0)
        for number in range(20):
            before = layer.weight.detach().clone()
            x = torch.randn(1, 96, generator=generator) * (size if number == 19 else 1.0)
            with torch.autocast("cpu", torch.bfloat16):
                y = layer(x)
            (y * torch.randn(64, generator=generator)).sum().backward()
        moved[size] = (layer.weight - before).float().norm()
        assert len(optimizer.released_norms()) == 20
    # Unlimited, Adam's second moment alone would allow 20 ** 0.5 = 4.5 times as much.
    assert moved[1.0] < moved[100.0] < 2.3 * moved[1.0]


@pytest.mark.parametrize("memory", ["low", "lowest"])
def test_a_loss_that_is_not_finite_changes_nothing(memory):
    step = low_step(memory)
    step(*make_inputs())
    before = {k: v.clone() for k, v in step.stage.prior.state_dict().items()}
    moments = {k: v.clone() for k, v in optimizer_tensors(step.state.optimizers["prior"]).items()}
    inputs, indices = make_inputs()
    inputs["x"][0, 0] = torch.nan
    values = step(inputs, indices)
    assert not values["loss"].isfinite()
    assert step.fault.item() == 0
    assert all(torch.equal(v, before[k]) for k, v in step.stage.prior.state_dict().items())
    after = optimizer_tensors(step.state.optimizers["prior"])
    assert all(torch.equal(v, moments[k]) for k, v in after.items())


def test_a_gradient_that_is_not_finite_is_a_fault_and_changes_no_weight():
    """Of a finite loss, in the backward pass, where the norm of all gradients is not known yet."""
    step = low_step("lowest")
    weight = step.stage.prior.blocks[0].channelwise[0].weight
    assert weight in step.state.optimizers["prior"].released
    before = {k: v.clone() for k, v in step.stage.prior.state_dict().items()}
    weight.register_hook(lambda gradient: gradient * torch.inf)
    values = step(*make_inputs())
    assert values["loss"].isfinite()
    assert not values["gradient_prior"].isfinite()
    assert step.fault.item() == 0
    after = step.stage.prior.state_dict()
    assert torch.equal(after["blocks.0.channelwise.0.weight"], before["blocks.0.channelwise.0.weight"])
    assert all(tensor.isfinite().all() for tensor in after.values())


def test_accumulated_gradients_are_summed_in_fp32():
    whole, parts = (
        low_step("low", Optimization(images=64, batch_size=4, accumulate=count)) for count in (1, 4)
    )
    values = [step(*make_inputs()) for step in (whole, parts)]
    torch.testing.assert_close(values[0]["gradient_prior"], values[1]["gradient_prior"], rtol=1e-2, atol=0)
    seen = []
    layer = parts.stage.prior.blocks[0].channelwise[0]
    assert layer.weight.dtype is torch.bfloat16
    layer.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.dtype))
    parts(*make_inputs())
    assert seen == [torch.float32] * 4
    assert not make_bf16_weights(parts.stage, parts.state)


def test_no_second_copies_of_weights_that_are_in_bf16():
    step = low_step("low")
    assert not make_bf16_weights(step.stage, step.state)["prior"].layers


@pytest.mark.parametrize("memory", ["low", "lowest"])
def test_a_restored_state_goes_on_in_the_same_bits(memory, tmp_path):
    step = low_step(memory)

    def updates(step: TrainStep) -> None:
        for number in range(3):
            step(make_inputs()[0], make_inputs()[1] + 4 * number)
            update_average(step.state.averages["prior"], step.stage.prior, 0.9)

    updates(step)
    save(step.state, tmp_path, {})
    updates(step)
    again = low_step(memory)
    restore(again.state, *newest(tmp_path))
    updates(again)
    for name, network in (("prior", step.stage.prior), ("average", step.state.averages["prior"])):
        other = again.stage.prior if name == "prior" else again.state.averages["prior"]
        for key, tensor in network.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[key]), (name, key)
            assert name == "prior" or tensor.dtype is torch.float32


@pytest.mark.parametrize("memory", ["low", "lowest"])
def test_a_killed_run_ends_in_the_same_bits(memory, tmp_path, toy_stage, toy_source, settings, monkeypatch):
    """The one loop, with two networks, dropout and batch statistics."""
    monkeypatch.setattr(state, "keep_in_bf16", functools.partial(keep_in_bf16, least=1))
    changes = {"memory": memory, "autocast": torch.bfloat16}
    whole, _ = run(tmp_path / "whole", toy_stage(), toy_source(), settings, **changes)
    broken = tmp_path / "broken"
    with pytest.raises(SystemExit):
        run(broken, toy_stage(on_batch=StopAt(42)), toy_source(), settings, checkpoint_seconds=0.0, **changes)
    resumed, _ = run(broken, toy_stage(), toy_source(), settings, **changes)
    assert digests(resumed) == digests(whole)
    assert read_averages(whole, "model")["0.weight"].dtype is torch.float32
    assert read_averages(whole, "model", raw=True)["0.weight"].dtype is torch.bfloat16
    normal, _ = run(tmp_path / "normal", toy_stage(), toy_source(), settings, autocast=torch.bfloat16)
    assert digests(normal) != digests(whole)


def test_an_average_in_fp32_follows_weights_in_bf16():
    network = nn.Linear(4, 4)
    average = make_average(network)
    keep_in_bf16(network, least=1)
    with torch.no_grad():
        network.weight.fill_(1.0)
        average.weight.zero_()
        network.bias.fill_(2.0)
        average.bias.zero_()
    update_average(average, network, 0.999)
    assert average.weight.dtype is torch.float32
    torch.testing.assert_close(average.weight, torch.full((4, 4), 1e-3))
    torch.testing.assert_close(average.bias, torch.full((4,), 2e-3))


def test_networks_in_host_memory_visit_the_device(monkeypatch):
    """Where validation needs them, even if it fails."""
    monkeypatch.setattr(offload, "_is_on", lambda tensor, device: False)
    monkeypatch.setattr(offload, "_copied", lambda tensor, device: tensor.clone())
    network = nn.Linear(4, 4)
    home = network.weight.data_ptr()
    with on_device([network], CPU):
        assert network.weight.data_ptr() != home
    assert network.weight.data_ptr() == home
    with pytest.raises(KeyError), on_device([network], CPU):
        raise KeyError
    assert network.weight.data_ptr() == home


@pytest.mark.slow
def test_the_compiled_update_is_the_plain_one(monkeypatch):
    """In bits, and compiled once for all shapes."""
    results = []
    monkeypatch.setattr(factored, "runs_triton", lambda device: True)
    for function in (factored._apply, factored._compiled()):
        torch.manual_seed(0)
        found = []
        for shape in ((64, 96), (32, 48), (7, 300)):
            weight, momentum, gradient = (torch.randn(shape).bfloat16() for _ in range(3))
            rows, columns = torch.rand(shape[0]) + 0.5, torch.rand(shape[1]) + 0.5
            factors = torch.tensor([0.99, 1e-2, 2.0, 0.5, 1.0])
            function(weight, momentum, gradient, rows, columns, factors, seed(5), 0.9, 3.2, 1e-8)
            found += [weight, momentum]
        results.append(found)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["low", "lowest"])
def test_on_a_gpu_updates_are_those_of_a_cpu(memory):
    """Compiled, and recorded unless gradients are freed in the backward pass."""
    gpu = torch.device("cuda")
    steps = {"cpu": low_step(memory), "gpu": low_step(memory, device=gpu)}
    losses = {}
    for name, step in steps.items():
        runner = StepRunner(step, record=name == "gpu" and memory == "low")
        inputs, indices = make_inputs(step.device)
        losses[name] = [runner(inputs, indices + 4 * n)["loss"].item() for n in range(8)]
        runner.close()
    assert losses["gpu"] == pytest.approx(losses["cpu"], rel=0.02)
    taken = [step.state.optimizers["prior"] for step in steps.values()]
    assert all(isinstance(optimizer, FactoredAdamW) for optimizer in taken)


@pytest.mark.gpu
def test_on_a_gpu_an_update_is_one_pass_with_the_same_bits():
    arguments = [torch.randn(640, 960).bfloat16() for _ in range(3)]
    arguments += [torch.rand(640) + 0.5, torch.rand(960) + 0.5]
    arguments += [torch.tensor([0.99, 1e-2, 2.0, 0.5, 1.0]), seed(5)]
    on_gpu = [tensor.cuda() for tensor in arguments]
    apply_update(*arguments, (0.9, 3.2, 1e-8))
    apply_update(*on_gpu, (0.9, 3.2, 1e-8))
    differ = (arguments[0] != on_gpu[0].cpu()).float().mean()
    assert differ < 1e-3  # where rounding in fp32 moves a number across a threshold

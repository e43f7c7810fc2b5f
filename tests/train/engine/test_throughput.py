"""Operations of an update, counted."""

import copy

import pytest
import torch
from torch import nn

from wuerstchen.train.engine.throughput import Gauge, matrix_rate, update_flops

CPU = torch.device("cpu")


def inputs_of(count=4):
    images = torch.randint(0, 256, (count, 4, 4, 3)).to(torch.uint8)
    return {"images": images, "first": torch.zeros(count)}, torch.arange(count)


def test_three_times_the_forward_passes_counted_by_hand(toy_stage):
    stage = toy_stage()
    inputs, indices = inputs_of()
    # The model is two layers, 48 × 8 and 8 × 1; the critic, 1 × 1, looks at it in both losses.
    forward = 2 * 4 * (48 * 8 + 8 * 1 + 1 + 1)
    assert update_flops(stage, inputs, indices, 0, None) == 3 * forward


def test_counting_leaves_training_alone(toy_stage):
    stage = toy_stage()
    model = stage.networks["model"]
    model[2].eval()  # a part that is not in training stays so
    before = copy.deepcopy(model.state_dict())
    given = inputs_of()
    state = torch.random.get_rng_state()
    update_flops(stage, *given, 0, torch.bfloat16)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [m.training for m in model] == [True, True, False, True]
    assert all(p.grad is None for p in model.parameters())


def test_compiled_blocks_are_counted_too(toy_stage):
    stage = toy_stage()
    plain = update_flops(stage, *inputs_of(), 0, None)
    stage.networks["model"][0].compile(backend="eager")
    assert update_flops(stage, *inputs_of(), 0, None) == plain


def test_a_cpu_says_only_what_is_known(toy_stage):
    assert matrix_rate(CPU) is None
    gauge = Gauge(toy_stage(), 0, None, CPU)
    gauge.before_update(*inputs_of())
    assert gauge.read(100.0) == {}


def test_the_share_by_hand(toy_stage, monkeypatch):
    monkeypatch.setattr("wuerstchen.train.engine.throughput.matrix_rate", lambda device, dtype: 1e6)
    gauge = Gauge(toy_stage(), 0, None, CPU)
    gauge.before_update(*inputs_of())
    share = 100 * 3 * 2 * (48 * 8 + 8 + 2) / 1e6
    assert gauge.read(100.0) == {"matrix_share": pytest.approx(share, abs=1e-4)}
    gauge.stage = nn.Identity()  # counted once
    gauge.before_update(*inputs_of(2))


@pytest.mark.gpu
def test_a_gpu_multiplies_matrices_at_a_plausible_rate():
    assert 1e13 < matrix_rate(torch.device("cuda", torch.cuda.current_device())) < 1e16

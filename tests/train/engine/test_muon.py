"""Muon against its definition by singular values, against torch's own, and within an update."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

from wuerstchen.errors import UserError
from wuerstchen.models.decoder import Decoder, DecoderConfig
from wuerstchen.models.prior import Prior
from wuerstchen.recipes.mini import mini
from wuerstchen.train.config import Optimization
from wuerstchen.train.engine.bf16_weights import Bf16Weights
from wuerstchen.train.engine.muon import MuonWithAdamW, hidden_matrices, orthogonalised
from wuerstchen.train.engine.optim import (
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    set_rate,
    update,
)

from ...configurations import TOY_PRIOR

CONFIG = Optimization(images=64, batch_size=4, optimizer="muon", learning_rate=0.02, weight_decay=0.1)


@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (6, 6)])
def test_orthogonalised_changes_singular_values_alone(shape):
    """U p(σ) Vᵀ, with the quintic iterated on the singular values themselves."""
    matrices = torch.randn(3, *shape, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    s = s / matrices.norm(dim=(1, 2))[:, None]
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(orthogonalised(matrices), u * s[:, None, :] @ vh)


@pytest.mark.parametrize("shape", [(32, 64), (64, 32)])
def test_same_updates_as_torch(shape):
    """torch's own iterates in bf16, so updates agree to about a hundredth."""
    ours = nn.Parameter(torch.randn(shape))
    theirs = nn.Parameter(ours.detach().clone())
    group = {"params": [ours], "muon": True, "weight_decay": 0.1}
    mine = MuonWithAdamW([group], lr=torch.tensor(1e-2))
    reference = torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    before = ours.detach().clone()
    for _ in range(4):
        gradient = torch.randn(shape)
        for parameter, optimizer in ((ours, mine), (theirs, reference)):
            parameter.grad = gradient.clone()
            optimizer.step()
    moved = (ours - before).norm()
    assert (ours - theirs).norm() < 0.01 * moved


def test_matrices_inside_blocks_are_muons():
    prior, names = Prior(TOY_PRIOR), set()
    hidden = hidden_matrices(prior)
    names = {name for name, p in prior.named_parameters() if p in hidden}
    ends = ("channelwise.0", "channelwise.4", "to_q", "to_k", "to_v", "to_out.0", "kv_mapper.1")
    assert names == {
        name for name, _ in prior.named_parameters() if name.endswith(tuple(f"{end}.weight" for end in ends))
    }
    assert len(names) == 2 * len(ends)
    decoder = Decoder(
        DecoderConfig(
            c_hidden=(8, 8), nhead=(-1, -1), blocks=(1, 1), level_config=("CT", "CT"),
            inject_effnet=(True, True), c_cond=8, clip_embd=None,
        )
    )  # fmt: skip
    hidden = hidden_matrices(decoder)
    found = {name.rsplit(".", 2)[-2:][0] for name, p in decoder.named_parameters() if p in hidden}
    assert found == {"0", "4"}
    assert all(p.ndim == 2 for p in hidden)
    assert decoder.clf[1].weight not in hidden


def learn(network: nn.Module, optimizer: torch.optim.Optimizer, seed: int, loss: float = 1.0) -> Tensor:
    """One update from made-up gradients."""
    torch.manual_seed(seed)
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    return update(network, optimizer, 1.0, torch.tensor(loss))


def test_clipping_a_nan_and_rates_reach_muon():
    prior = Prior(TOY_PRIOR)
    optimizer = make_optimizer(prior, CONFIG)
    learn(prior, optimizer, 0)
    weight = prior.get_parameter("blocks.0.channelwise.0.weight")
    before = copy.deepcopy(prior.state_dict())
    momentum = optimizer.state[weight]["momentum"].clone()
    learn(prior, optimizer, 1, loss=torch.nan)
    torch.testing.assert_close(prior.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(optimizer.state[weight]["momentum"], momentum)
    set_rate(optimizer, 1e-3)
    norm = learn(prior, optimizer, 2)
    # A step of rate·0.2·√(longer side) in every singular direction, and the weight's decay.
    step = (weight - before["blocks.0.channelwise.0.weight"] * (1 - 1e-3 * 0.1)).norm().item()
    assert step == pytest.approx(1e-3 * 0.2 * 64**0.5 * 16**0.5, rel=0.3)
    torch.manual_seed(2)
    gradients = {name: torch.randn_like(p) for name, p in prior.named_parameters()}
    shortened = gradients["blocks.0.channelwise.0.weight"] / norm
    expected = momentum.lerp(shortened, 0.05)
    torch.testing.assert_close(optimizer.state[weight]["momentum"], expected)


def test_state_is_stored_and_read():
    prior = Prior(TOY_PRIOR)
    optimizer = make_optimizer(prior, CONFIG)
    learn(prior, optimizer, 0)
    stored = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer).items()}
    again = copy.deepcopy(prior)
    other = make_optimizer(again, CONFIG)
    load_optimizer_tensors(other, stored, lambda key, tensor: tensor.copy_(stored[key]))
    learn(prior, optimizer, 1)
    learn(again, other, 1)
    torch.testing.assert_close(again.state_dict(), prior.state_dict(), rtol=0, atol=0)


def test_bf16_copies_leave_muons_matrices_alone():
    prior = Prior(TOY_PRIOR)
    copies = Bf16Weights(prior, make_optimizer(prior, CONFIG), least=1)
    assert not {weight for _, weight, _ in copies.layers} & hidden_matrices(prior)


def test_sharded_networks_are_refused():
    recipe = mini()
    b = dataclasses.replace(recipe.stage_b, optimization=CONFIG)
    with pytest.raises(UserError, match=r"muon.*sharding"):
        dataclasses.replace(recipe, stage_b=b, sharding="full")

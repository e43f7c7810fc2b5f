"""Transformer blocks on the text states and registers: their arithmetic, and what handles such a prior."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from wuerstchen.checkpoints.native import read_network, read_tensors, write_network
from wuerstchen.errors import UserError
from wuerstchen.lora import AssumedScaleWarning, load_lora
from wuerstchen.models.blocks import text_inputs
from wuerstchen.models.prior import ADDED_FIELDS, Prior, PriorConfig, PriorContext
from wuerstchen.models.text_blocks import TextBlock
from wuerstchen.train.engine.muon import hidden_matrices

from ..configurations import PROVENANCE

PLAIN = PriorConfig(c_in=4, c=32, c_cond=24, c_r=16, depth=2, nhead=4, dropout=0.0)
CONFIG = dataclasses.replace(PLAIN, text_blocks=2)
WITH_REGISTERS = dataclasses.replace(CONFIG, registers=3)
MASK = torch.tensor([[True] * 4 + [False] * 2] * 3)


def inputs(positions=6):
    return torch.randn(3, 4, 4, 5), torch.tensor([1.0, 0.51, 0.003]), torch.randn(3, positions, 24)


def run(prior, x, r, text, mask=None):
    with torch.no_grad():
        return prior(x, r, prior.context(text, mask))


@pytest.mark.parametrize("mask", [None, MASK], ids=["without mask", "with mask"])
def test_equals_a_transformer_layer_of_torch(randomise, mask):
    ours = randomise(TextBlock(32, 4)).eval()
    theirs = nn.TransformerEncoderLayer(
        32, 4, 128, 0.0, "gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
    ).eval()
    attention = ours.attention
    with torch.no_grad():
        for kind in ("weight", "bias"):
            projections = (getattr(p, kind) for p in (attention.to_q, attention.to_k, attention.to_v))
            getattr(theirs.self_attn, f"in_proj_{kind}").copy_(torch.cat(list(projections)))
            getattr(theirs.self_attn.out_proj, kind).copy_(getattr(attention.to_out[0], kind))
            getattr(theirs.linear1, kind).copy_(getattr(ours.mlp[0], kind))
            getattr(theirs.linear2, kind).copy_(getattr(ours.mlp[3], kind))
        tokens = torch.randn(3, 6, 32)
        expected = theirs(tokens, src_key_padding_mask=None if mask is None else ~mask)
        found = ours(tokens, mask)
    seen = slice(None) if mask is None else mask
    torch.testing.assert_close(found[seen], expected[seen], rtol=1e-4, atol=1e-5)


def test_new_blocks_change_nothing_and_learn(randomise):
    """The zeroed output layers get gradients at once, so the blocks are not stuck at the identity."""
    plain = randomise(Prior(PLAIN)).eval()
    prior = Prior(CONFIG).eval()
    missing = prior.load_state_dict(plain.state_dict(), strict=False)
    assert missing.unexpected_keys == []
    layers = [f"attention.to_{name}" for name in ("q", "k", "v", "out.0")] + ["mlp.0", "mlp.3"]
    assert {key.rpartition(".")[0] for key in missing.missing_keys} == {
        f"text_blocks.{n}.{layer}" for n in range(2) for layer in layers
    }
    x, r, text = inputs()
    assert torch.equal(run(prior, x, r, text), run(plain, x, r, text))
    prior(x, r, prior.context(text, cache_kv=False)).square().sum().backward()
    for block in prior.text_blocks:
        assert block.attention.to_out[0].weight.grad.abs().sum() > 0
        assert block.mlp[3].weight.grad.abs().sum() > 0


def test_the_mask_hides_padding_from_the_blocks(randomise):
    prior = randomise(Prior(CONFIG)).eval()
    x, r, text = inputs()
    masked = run(prior, x, r, text, MASK)
    torch.testing.assert_close(masked, run(prior, x, r, text[:, :4]), rtol=1e-4, atol=1e-4)
    changed = torch.cat([text[:, :4], torch.randn(3, 2, 24)], dim=1)
    torch.testing.assert_close(masked, run(prior, x, r, changed, MASK), rtol=1e-4, atol=1e-4)
    unmasked = run(prior, x, r, text)
    assert not torch.allclose(unmasked, run(prior, x, r, changed), atol=1e-2)


def test_the_blocks_run_once_per_prompt(randomise):
    prior, calls = randomise(Prior(CONFIG)).eval(), []
    prior.text_blocks[1].register_forward_hook(lambda *_: calls.append(1))
    x, r, text = inputs()
    with torch.no_grad():
        context = prior.context(text)
        for _ in range(3):
            prior(x, r, context)
    assert len(calls) == 1


def test_training_without_cached_keys_gives_the_same_gradients(randomise):
    prior = randomise(Prior(CONFIG)).eval().double()
    x, r, text = (tensor.double() for tensor in inputs())
    found = []
    for cache_kv in (True, False):
        prior.zero_grad()
        prior(x, r, prior.context(text, MASK, cache_kv=cache_kv)).square().sum().backward()
        found.append([p.grad.clone() for p in prior.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mask", [None, MASK], ids=["without mask", "with mask"])
def test_registers_are_tokens_that_are_always_attended_to(randomise, mask):
    """Like more positions of the text whose mapped states are learned."""
    prior = randomise(Prior(dataclasses.replace(WITH_REGISTERS, text_blocks=0))).eval()
    plain = Prior(PLAIN).eval()
    plain.load_state_dict({k: t for k, t in prior.state_dict().items() if k != "registers"})
    x, r, text = inputs()
    with torch.no_grad():
        tokens = torch.cat([plain.cond_mapper(text), prior.registers.expand(3, -1, -1)], dim=1)
        seen = None if mask is None else torch.cat([mask, torch.ones(3, 3, dtype=torch.bool)], dim=1)
        texts = text_inputs(plain.blocks, tokens, seen, cache_kv=True)
        expected = plain(x, r, PriorContext(texts=texts))
    torch.testing.assert_close(run(prior, x, r, text, mask), expected)
    assert not torch.allclose(run(plain, x, r, text, mask), expected, atol=1e-2)


def test_registers_are_learned(randomise):
    prior = Prior(dataclasses.replace(PLAIN, registers=3))
    assert prior.registers.std().item() == pytest.approx(0.02, rel=0.3)
    prior = randomise(prior).eval()
    x, r, text = inputs()
    prior(x, r, prior.context(text, MASK, cache_kv=False)).square().sum().backward()
    assert (prior.registers.grad.abs().sum(1) > 0).all()
    assert prior.registers not in hidden_matrices(prior)


def test_bf16_autocast(randomise, relative_error):
    prior = randomise(Prior(dataclasses.replace(WITH_REGISTERS, prediction="velocity"))).eval()
    x, r, text = inputs()
    exact = run(prior, x, r, text, MASK)
    with torch.autocast("cpu", torch.bfloat16):
        output = prior(x, r, prior.context(text, MASK, cache_kv=False))
        output.square().mean().backward()
    assert relative_error(output, exact) <= 0.05
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in prior.parameters())


def test_muon_trains_their_matrices():
    prior = Prior(CONFIG)
    hidden = hidden_matrices(prior)
    names = {name for name, p in prior.named_parameters() if p in hidden and name.startswith("text_blocks.0")}
    ends = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0", "mlp.0", "mlp.3")
    assert names == {f"text_blocks.0.{end}.weight" for end in ends}


@pytest.mark.parametrize(("storage", "error"), [("float32", 0), ("int8", 2e-2)])
def test_storage(randomise, relative_error, tmp_path, storage, error):
    prior, path = randomise(Prior(WITH_REGISTERS)), tmp_path / "prior.safetensors"
    write_network(prior, path, PROVENANCE, storage)
    again, _ = read_network(path)
    assert again.config == WITH_REGISTERS
    for name, tensor in prior.state_dict().items():
        assert relative_error(again.state_dict()[name], tensor) <= error, name


def test_a_prior_without_them_loads_in_older_versions(tmp_path):
    """They refuse fields that they do not know."""
    prior, path = Prior(PLAIN), tmp_path / "prior.safetensors"
    write_network(prior, path, PROVENANCE)
    assert not any(key.startswith(ADDED_FIELDS) for key in prior.state_dict())
    assert not {*ADDED_FIELDS} & read_tensors(path)[1]["config"].keys()
    assert read_network(path)[0].config == PLAIN


@pytest.mark.parametrize(
    "name", ["prior.text_blocks.0.{}.lora_A.weight", "lora_prior_unet_text_blocks_0_{}.lora_down.weight"]
)
@pytest.mark.parametrize("layer", ["attention.to_q", "mlp.3"])
def test_adapters_reach_them(randomise, name, layer):
    """In diffusers' and in kohya's names."""
    prior = randomise(Prior(CONFIG)).eval().requires_grad_(False)
    x, r, text = inputs()
    before = run(prior, x, r, text)
    key = name.format(layer.replace(".", "_") if "unet" in name else layer)
    width = 128 if layer == "mlp.3" else 32
    other = key.replace("lora_A", "lora_B").replace("lora_down", "lora_up")
    with pytest.warns(AssumedScaleWarning):
        load_lora(prior, {key: torch.randn(4, width), other: torch.randn(32, 4)})
    assert not torch.allclose(run(prior, x, r, text), before, atol=1e-2)


@pytest.mark.parametrize("name", ADDED_FIELDS)
def test_impossible_numbers_are_refused(name):
    for count in (-1, 1001):
        with pytest.raises(UserError, match=f"{name} must be at .*, got {count}"):
            dataclasses.replace(PLAIN, **{name: count})


def test_heads_are_checked_for_the_text_too():
    with pytest.raises(UserError, match="nhead must be from 1 to c=32, got 0"):
        dataclasses.replace(PLAIN, depth=0, nhead=0, text_blocks=1)
    assert Prior(dataclasses.replace(PLAIN, depth=0, nhead=0)).text_blocks._modules == {}


@pytest.mark.gpu
@pytest.mark.parametrize("mask", [None, MASK], ids=["without mask", "with mask"])
def test_recorded_passes(randomise, mask):
    from wuerstchen.runtime.recorder import Recorder

    prior = randomise(Prior(WITH_REGISTERS)).cuda().eval()
    expected_of = copy.deepcopy(prior)
    mask = None if mask is None else mask.cuda()
    for seed in range(2):
        torch.manual_seed(seed)
        x, r, text = (tensor.cuda() for tensor in inputs())
        predict = Recorder(prior, prepare=prior.context).bind(text, mask)
        with torch.no_grad():
            for shift in range(4):
                expected = expected_of(x + shift, r, expected_of.context(text, mask))
                torch.testing.assert_close(predict(x + shift, r), expected, rtol=1e-3, atol=1e-3)

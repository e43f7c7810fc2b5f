"""Recorded passes against the passes that they stand for."""

import contextlib
import copy
import dataclasses
import warnings

import pytest
import torch
from torch import nn

from wuerstchen.fast import NotRecordedWarning, Recorder, _mapped, _tensors
from wuerstchen.models.prior import Prior, PriorConfig

CUDA = torch.device("cuda")
CONFIG = PriorConfig(c_in=4, c=32, c_cond=24, c_r=8, depth=2, nhead=2)


@dataclasses.dataclass(frozen=True)
class Pair:
    one: torch.Tensor
    more: list[torch.Tensor | None]
    name: str = "pair"


def test_every_tensor_of_a_constant_is_found_and_nothing_else_changes():
    pair = Pair(torch.zeros(1), [torch.ones(2), None])
    twice = _mapped(lambda tensor: tensor + 1, (pair, [pair]))
    assert [t.tolist() for t in _tensors(twice)] == [[1.0], [2.0, 2.0]] * 2
    assert twice[0].name == "pair"
    assert twice[0].more[1] is None


def test_on_a_cpu_the_function_is_called(randomise):
    prior = randomise(Prior(CONFIG)).eval()
    x, r, context = inputs(prior, torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(Recorder(prior)(x, r, constant=context), prior(x, r, context))
    Recorder(prior)(x, r, constant=context).sum().backward()
    assert prior.projection.weight.grad is not None


def inputs(prior, device=CUDA, seed=0, grid=(6, 6), batch=2):
    generator = torch.Generator().manual_seed(seed)
    x, text = (torch.randn(*s, generator=generator).to(device) for s in ((batch, 4, *grid), (batch, 5, 24)))
    r = torch.rand(batch, generator=generator).to(device)
    with torch.no_grad():
        return x, r, prior.context(text)


@pytest.mark.gpu
class TestOnCuda:
    @pytest.fixture
    def prior(self, randomise):
        return randomise(Prior(CONFIG)).to(CUDA).eval()

    def check(self, recorder, prior, *, seed=0, grid=(6, 6), batch=2):
        """Several passes, the first of which is not yet recorded, the last of which is replayed."""
        x, r, context = inputs(prior, seed=seed, grid=grid, batch=batch)
        with torch.no_grad():
            for shift in range(4):
                found = recorder(x + shift, r, constant=context)
                torch.testing.assert_close(found, prior(x + shift, r, context), rtol=1e-4, atol=1e-4)

    def test_passes_are_those_of_the_network(self, prior):
        recorder = Recorder(prior)
        for grid, batch in (((6, 6), 2), ((4, 7), 1), ((6, 6), 2)):
            for seed in range(2):
                self.check(recorder, prior, seed=seed, grid=grid, batch=batch)
        assert len(recorder._recordings) == 2

    def test_two_texts_in_turns(self, prior):
        """A constant that is copied at the first pass alone."""
        recorder, (x, r, one) = Recorder(prior), inputs(prior)
        other = inputs(prior, seed=1)[2]
        with torch.no_grad():
            for context in (one, other) * 4:
                torch.testing.assert_close(
                    recorder(x, r, constant=context), prior(x, r, context), rtol=1e-4, atol=1e-4
                )

    def test_results_stay_after_the_next_pass(self, prior):
        recorder, (x, r, context) = Recorder(prior), inputs(prior)
        with torch.no_grad():
            results = [recorder(x * scale, r, constant=context) for scale in range(5)]
            for scale, result in enumerate(results):
                torch.testing.assert_close(result, prior(x * scale, r, context), rtol=1e-4, atol=1e-4)

    def test_new_weights_are_seen(self, prior, randomise):
        """Written into the old ones, put in their place, and moved."""
        recorder = Recorder(prior)
        self.check(recorder, prior)
        other = randomise(Prior(CONFIG)).to(CUDA)
        prior.load_state_dict({key: 0.5 * tensor for key, tensor in other.state_dict().items()})
        self.check(recorder, prior)
        prior.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
        prior.eval().requires_grad_(False)
        self.check(recorder, prior)
        self.check(recorder, prior.to("cpu").to(CUDA))

    def test_layers_that_are_replaced_and_hooks_are_seen(self, prior):
        recorder, called = Recorder(prior), []
        self.check(recorder, prior)
        prior.blocks[0].channelwise[0] = nn.Linear(32, 128).to(CUDA).eval()
        self.check(recorder, prior)
        hook = prior.blocks[1].register_forward_hook(lambda *_: called.append(1))
        self.check(recorder, prior)
        assert len(called) == 8
        hook.remove()
        self.check(recorder, prior)
        assert recorder._recordings

    def test_adapters_and_their_scales_are_seen(self, prior):
        peft = pytest.importorskip("peft")
        recorder = Recorder(prior)
        self.check(recorder, prior)
        config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        peft.inject_adapter_in_model(config, prior)
        prior.to(CUDA).eval()
        self.check(recorder, prior)
        for layer in prior.modules():
            if hasattr(layer, "scaling"):
                layer.set_scale("default", 3.0)
        self.check(recorder, prior)

    def test_what_cannot_be_recorded_says_so_and_runs(self, prior):
        def reads(x, r, context):
            return prior(x, r, context) * (1.0 if x.sum().item() > 0 else 2.0)

        recorder, (x, r, context) = Recorder(prior, reads), inputs(prior)
        with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(4):
                found = recorder(x, r, constant=context)
                torch.testing.assert_close(found, reads(x, r, context), rtol=1e-4, atol=1e-4)
        assert [w.category for w in caught] == [NotRecordedWarning]

    def test_inference_mode_and_no_grad_in_turns(self, prior):
        """Tensors of inference mode may not be written to outside of it."""
        recorder = Recorder(prior)
        for mode in (torch.inference_mode, contextlib.nullcontext, torch.inference_mode):
            with mode():
                self.check(recorder, prior)

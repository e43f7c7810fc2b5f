"""Recorded passes against eager ones."""

import contextlib
import copy
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from wuerstchen.models.decoder import Decoder, DecoderConfig
from wuerstchen.models.fused import blocks as fused
from wuerstchen.models.paella import Paella, PaellaConfig
from wuerstchen.models.prior import Prior, PriorConfig
from wuerstchen.models.traits import fused_layers
from wuerstchen.models.vqgan import VQGAN, VQGANConfig
from wuerstchen.runtime import recorder as recorder_module
from wuerstchen.runtime.recorder import NotRecordedWarning, Recorder, Recorders

CUDA = torch.device("cuda")
CONFIG = PriorConfig(c_in=4, c=32, c_cond=24, c_r=8, depth=2, nhead=2)


def test_on_a_cpu_the_function_runs_eagerly(randomise):
    prior = randomise(Prior(CONFIG)).eval()
    x, r, text = inputs(torch.device("cpu"))
    recorder = Recorder(prior, prepare=prior.context)
    with torch.no_grad():
        assert torch.equal(recorder.bind(text, None)(x, r), prior(x, r, prior.context(text)))
    recorder.bind(text, None)(x, r).sum().backward()
    assert prior.projection.weight.grad is not None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda recorder: pickle.loads(pickle.dumps(recorder))])
def test_a_copy_wraps_the_copied_network(randomise, copied):
    """Pipelines hold recorders: copying a used pipeline failed."""
    prior = randomise(Prior(CONFIG)).eval()
    twin = copied(Recorder(prior, prepare=prior.context, records=False))
    assert twin.function is twin.network is not prior
    assert twin.prepare.__self__ is twin.network
    assert not twin.records
    x, r, text = inputs(torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(twin.bind(text, None)(x, r), prior(x, r, prior.context(text)))


def test_recorders_follow_the_pipelines_setting():
    """Offloading a pipeline that has sampled must stop recordings of its networks."""
    network, recorders = nn.Linear(2, 2), Recorders()
    recorder = recorders.of(network)
    assert recorder.records
    recorders.records = False
    assert recorders.of(network) is recorder
    assert not recorder.records
    assert recorders.of(network, network.forward) is not recorder  # another function
    twin = pickle.loads(pickle.dumps(recorders))
    assert not twin.records
    assert len(twin) == 1


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("made", [torch.compile, torch.jit.script])
def test_networks_that_are_compiled_or_have_compiled_parts_are_checked(made):
    """They do not keep everything in ``__dict__``, which raised a KeyError on GPUs."""
    network = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)).eval()
    plain, _ = Recorder(network)._state(torch.device("cpu"))
    for changed in (made(network), nn.Sequential(*map(made, network)).eval()):
        found, _ = Recorder(changed)._state(torch.device("cpu"))
        assert sorted(weights_of(found)) == sorted(weights_of(plain))


def weights_of(state):
    return [one for one in state[1:-1] if isinstance(one, int)]


def test_merging_adapters_into_weights_is_detected(randomise):
    """Weights change in place: an old recording applied the adapter a second time."""
    peft = pytest.importorskip("peft")
    prior = randomise(Prior(CONFIG)).eval()
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, prior)
    recorder = Recorder(prior.eval())
    before = recorder._state(torch.device("cpu"))
    for layer in prior.modules():
        if hasattr(layer, "merge"):
            layer.merge()
    merged = recorder._state(torch.device("cpu"))
    assert merged != before
    for layer in prior.modules():
        if hasattr(layer, "merge"):
            layer.unmerge()
    assert recorder._state(torch.device("cpu")) == before


@pytest.mark.parametrize("kind", ["LoraConfig", "IA3Config", "OFTConfig"])
def test_switching_adapters_off_is_detected(kind, randomise):
    """Most kinds of adapters have no scale, by which they were detected."""
    peft = pytest.importorskip("peft")
    prior = randomise(Prior(CONFIG)).eval()
    more = {"feedforward_modules": []} if kind == "IA3Config" else {}
    peft.inject_adapter_in_model(getattr(peft, kind)(target_modules=["to_q"], **more), prior)
    recorder = Recorder(prior.eval())
    before = recorder._state(torch.device("cpu"))
    for layer in prior.modules():
        if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
            layer.enable_adapters(False)
    assert recorder._state(torch.device("cpu")) != before


def test_a_replaced_forward_is_detected(randomise):
    """As accelerate does. A recording kept the old method."""
    prior = randomise(Prior(CONFIG)).eval()
    recorder = Recorder(prior)
    before = recorder._state(torch.device("cpu"))
    layer = prior.blocks[0].channelwise[0]
    layer.forward = lambda x: 2 * nn.Linear.forward(layer, x)
    assert recorder._state(torch.device("cpu")) != before


def test_invalidate_computes_the_preparation_again(randomise):
    """Without recordings, the text's keys and values stayed those of weights that were overwritten."""
    prior = randomise(Prior(CONFIG)).eval()
    x, r, text = inputs(torch.device("cpu"))
    recorder = Recorder(prior, prepare=prior.context)
    run = recorder.bind(text, None)
    with torch.no_grad():
        run(x, r)
        prior.load_state_dict({key: 0.5 * tensor for key, tensor in prior.state_dict().items()})
        recorder.invalidate()
        assert torch.equal(run(x, r), prior(x, r, prior.context(text)))


@pytest.mark.parametrize(
    "network",
    [
        lambda: Prior(PriorConfig()),
        lambda: Decoder(DecoderConfig()),
        lambda: Paella(PaellaConfig()),
        lambda: VQGAN(VQGANConfig()),
    ],
    ids=["Stage C", "Stage B", "Stage B of v1", "Stage A"],
)
def test_new_blocks_can_be_fused(network):
    """Another layer in one of them would silently make sampling slower."""
    with torch.device("meta"):
        made = network().eval()
    blocks = [module for module in made.modules() if fused_layers(module)]
    assert blocks
    assert all(fused.is_plain(block, torch.zeros(1, device="meta")) for block in blocks)


def inputs(device=CUDA, seed=0, grid=(6, 6), batch=2):
    generator = torch.Generator().manual_seed(seed)
    x, text = (torch.randn(*s, generator=generator).to(device) for s in ((batch, 4, *grid), (batch, 5, 24)))
    r = torch.rand(batch, generator=generator).to(device)
    return x, r, text


def passes_of(recorder):
    """Number of recorded kinds of passes."""
    return sum(kind in recorder._graphs for kind in recorder._graphs.warmed)


@pytest.mark.gpu
class TestOnCuda:
    @pytest.fixture
    def prior(self, randomise):
        return randomise(Prior(CONFIG)).to(CUDA).eval()

    def check(self, recorder, prior, *, seed=0, grid=(6, 6), batch=2):
        """Several passes: the first is not recorded, the last is replayed."""
        x, r, text = inputs(seed=seed, grid=grid, batch=batch)
        run = recorder.bind(text, None)
        with torch.no_grad():
            for shift in range(4):
                found, expected = run(x + shift, r), prior(x + shift, r, prior.context(text))
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    def test_passes_equal_the_networks(self, prior):
        recorder = Recorder(prior, prepare=prior.context)
        for grid, batch in (((6, 6), 2), ((4, 7), 1), ((6, 6), 2)):
            for seed in range(2):
                self.check(recorder, prior, seed=seed, grid=grid, batch=batch)
        assert passes_of(recorder) == 2

    def test_times_of_cells_have_a_recording_of_their_own(self, prior):
        """A replay with the recording for times of images would read other memory."""
        recorder = Recorder(prior, prepare=prior.context)
        x, r, text = inputs()
        run = recorder.bind(text, None)
        cells = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(2)).to(CUDA)
        with torch.no_grad():
            for _ in range(4):
                for times in (r, cells, cells.flip(1)):
                    expected = prior(x, times, prior.context(text))
                    torch.testing.assert_close(run(x, times), expected, rtol=1e-4, atol=1e-4)
        assert passes_of(recorder) == 2

    def test_two_texts_in_turns(self, prior):
        """With one shape and with two. Each preparation overwrites the other."""
        for batch in (2, 1):
            recorder = Recorder(prior, prepare=prior.context)
            given = [inputs(), inputs(seed=1, batch=batch)]
            runs = [recorder.bind(text, None) for _, _, text in given]
            with torch.no_grad():
                for _ in range(4):
                    for run, (x, r, text) in zip(runs, given, strict=True):
                        expected = prior(x, r, prior.context(text))
                        torch.testing.assert_close(run(x, r), expected, rtol=1e-4, atol=1e-4)

    def test_results_stay_after_the_next_pass(self, prior):
        x, r, text = inputs()
        run = Recorder(prior, prepare=prior.context).bind(text, None)
        with torch.no_grad():
            results = [run(x * scale, r) for scale in range(5)]
            for scale, result in enumerate(results):
                expected = prior(x * scale, r, prior.context(text))
                torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)

    def test_new_weights_are_detected(self, prior, randomise):
        """Copied into the old ones, assigned, and moved."""
        recorder = Recorder(prior, prepare=prior.context)
        self.check(recorder, prior)
        other = randomise(Prior(CONFIG)).to(CUDA)
        prior.load_state_dict({key: 0.5 * tensor for key, tensor in other.state_dict().items()})
        self.check(recorder, prior)
        prior.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
        prior.eval().requires_grad_(False)
        self.check(recorder, prior)
        self.check(recorder, prior.to("cpu").to(CUDA))

    def test_replaced_layers_and_hooks_are_detected(self, prior):
        recorder, called = Recorder(prior, prepare=prior.context), []
        self.check(recorder, prior)
        prior.blocks[0].channelwise[0] = nn.Linear(32, 128).to(CUDA).eval()
        self.check(recorder, prior)
        hook = prior.blocks[1].register_forward_hook(lambda *_: called.append(1))
        self.check(recorder, prior)
        assert len(called) == 8
        hook.remove()
        self.check(recorder, prior)
        assert passes_of(recorder)

    def test_adapters_and_their_scales_are_detected(self, prior):
        peft = pytest.importorskip("peft")
        recorder = Recorder(prior, prepare=prior.context)
        self.check(recorder, prior)
        config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        peft.inject_adapter_in_model(config, prior)
        prior.to(CUDA).eval()
        self.check(recorder, prior)
        adapters = [layer for layer in prior.modules() if hasattr(layer, "scaling")]
        for layer in adapters:
            layer.set_scale("default", 3.0)
        self.check(recorder, prior)
        for layer in adapters:
            layer.enable_adapters(False)
        self.check(recorder, prior)

    @pytest.mark.parametrize("replaces", [True, False])
    def test_invalidate_detects_a_change_between_steps(self, prior, replaces):
        """Including weights that are overwritten. The preparation is computed again too."""
        x, r, text = inputs()
        recorder = Recorder(prior, prepare=prior.context)
        run = recorder.bind(text, None)
        with torch.no_grad():
            for _ in range(3):
                run(x, r)
            state = {key: 0.5 * tensor for key, tensor in prior.state_dict().items()}
            prior.load_state_dict(state, assign=replaces)
            prior.requires_grad_(False)
            recorder.invalidate()
            for _ in range(3):
                expected = prior(x, r, prior.context(text))
                torch.testing.assert_close(run(x, r), expected, rtol=1e-4, atol=1e-4)

    def test_the_number_of_recordings_is_bounded(self, prior, monkeypatch):
        monkeypatch.setattr(recorder_module, "MAX_KINDS", 3)
        recorder = Recorder(prior, prepare=prior.context)
        for side in (3, 4, 5, 6, 7, 3):
            self.check(recorder, prior, grid=(side, 4))
            assert passes_of(recorder) <= 3

    def test_threads_record_one_after_the_other(self, randomise):
        """Work of one thread on the recording stream was recorded by another."""
        networks = [randomise(Prior(CONFIG)).to(CUDA).eval() for _ in range(4)]

        def draw(prior):
            recorder = Recorder(prior, prepare=prior.context)
            for side in (4, 5, 6):
                self.check(recorder, prior, grid=(side, side))
            return passes_of(recorder)

        with ThreadPoolExecutor(len(networks)) as threads:
            assert list(threads.map(draw, networks)) == [3] * len(networks)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    def test_a_network_that_moves_to_another_gpu_is_recorded_there(self, prior):
        """A stream of the first GPU cannot record work on the second."""
        recorder = Recorder(prior, prepare=prior.context)
        self.check(recorder, prior)
        there = torch.device("cuda:1")
        prior.to(there)
        x, r, text = inputs(there)
        run = recorder.bind(text, None)
        with torch.no_grad():
            for shift in range(4):
                expected = prior(x + shift, r, prior.context(text))
                torch.testing.assert_close(run(x + shift, r), expected, rtol=1e-4, atol=1e-4)
        assert passes_of(recorder)

    def test_functions_that_cannot_be_recorded_warn_and_run(self, prior):
        def reads(x, r, context):
            return prior(x, r, context) * (1.0 if x.sum().item() > 0 else 2.0)

        x, r, text = inputs()
        recorder, context = Recorder(prior, reads, prior.context), prior.context(text)
        with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(4):
                found = recorder.bind(text, None)(x, r)
                torch.testing.assert_close(found, reads(x, r, context), rtol=1e-4, atol=1e-4)
        assert [w.category for w in caught] == [NotRecordedWarning]
        assert torch.cuda.current_stream() == torch.cuda.default_stream()

    def test_inference_mode_and_no_grad_in_turns(self, prior):
        """Tensors created in inference mode cannot be written to outside of it."""
        recorder = Recorder(prior, prepare=prior.context)
        for mode in (torch.inference_mode, contextlib.nullcontext, torch.inference_mode):
            with mode():
                self.check(recorder, prior)

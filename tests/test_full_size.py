"""A model of the published v2 size on a GPU, with random weights: sizes, precision and memory."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from wuerstchen.pipeline import Sampling, Wuerstchen
from wuerstchen.sampling_batch import SamplingBatch

pytestmark = pytest.mark.gpu
FEW_STEPS = Sampling(prior_steps=3, decoder_steps=2)


@pytest.fixture(scope="module")
def cascade():
    path = Path(__file__).parent.parent / "benchmarks" / "random_model.py"
    spec = importlib.util.spec_from_file_location("random_model", path)
    module = sys.modules["random_model"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.random_v2(torch.device("cuda"))


def in_dtype(cascade, dtype):
    for network in cascade.networks().values():
        network.to(dtype)
    return Wuerstchen(cascade, torch.device("cuda"))


def test_it_has_the_published_size(cascade):
    counts = {name: sum(p.numel() for p in n.parameters()) for name, n in cascade.networks().items()}
    assert counts["prior"] == 993_636_896
    assert counts["decoder"] == 1_055_365_280
    assert counts["vqgan"] == 18_406_894


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_half_precision_is_finite_and_close_even_for_large_latents(cascade, precision):
    """Semantic latents reach 200 in the published model. Sums of squares over 256×256 overflow fp16."""
    draw = torch.Generator().manual_seed(0)
    z = (60 * torch.randn(1, 16, 24, 24, generator=draw)).clamp(-200, 200).cuda()
    settings = Sampling(guidance=1.0, decoder_steps=4, decoder_guidance=1.0, decoder_shift=1.0)
    pixels = []
    for dtype in (torch.float32, getattr(torch, precision)):
        model = in_dtype(cascade, dtype)
        batch = SamplingBatch(
            prompts=["a cat"], seeds=[1], size=(1024, 1024), canvas=(1024, 1024), sampling=settings
        )
        with torch.inference_mode():
            pixels.append(model._decode(model._sample_decoder(batch, z)))
        in_dtype(cascade, torch.float32)
    exact, near = pixels
    assert near.isfinite().all()
    assert exact.std() > 0.02
    print(precision, float((exact - near).abs().mean()), float(exact.std()))
    assert float((exact - near).abs().mean()) < 0.1 * float(exact.std())


@pytest.mark.parametrize("size", [(1024, 1536), (1024, 2048), (2048, 2048), (1032, 1000), (256, 264)])
def test_sizes_at_full_channel_count(cascade, size):
    model = in_dtype(cascade, torch.bfloat16)
    (image,) = model.generate("a cat", size=size, sampling=FEW_STEPS)
    assert image.size == size
    darkest, brightest = image.convert("L").getextrema()
    assert brightest - darkest > 8


def test_one_network_at_a_time_fits_a_small_gpu_and_generates_the_same(cascade):
    whole = in_dtype(cascade, torch.float16).generate("a cat", sampling=FEW_STEPS)
    for network in cascade.networks().values():
        network.to("cpu")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model = Wuerstchen(cascade, torch.device("cuda"), low_memory="stage")
    small = model.generate("a cat", sampling=FEW_STEPS)
    peak = torch.cuda.max_memory_allocated() / 2**30
    model.residence.release()
    difference = torch.tensor(list(whole[0].tobytes())).sub(torch.tensor(list(small[0].tobytes()))).abs()
    assert float(difference.float().mean()) < 1
    assert peak < 3.5

"""Offloading, on a fake device on the CPU and on a real GPU, and decoding in tiles."""

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextConfig, CLIPTextModel

from wuerstchen.checkpoints.text_encoder import read_text_encoder
from wuerstchen.errors import UserError
from wuerstchen.lora import load_lora
from wuerstchen.models.compressor import Compressor, CompressorConfig
from wuerstchen.models.decoder import Decoder, DecoderConfig
from wuerstchen.models.previewer import Previewer, PreviewerConfig
from wuerstchen.models.prior import Prior, PriorConfig
from wuerstchen.models.vqgan import VQGAN, VQGANConfig
from wuerstchen.pipeline import BUNDLED
from wuerstchen.runtime import offload
from wuerstchen.runtime.offload import (
    AllOnDevice,
    Layerwise,
    OneAtATime,
    decoding_halo,
    tiled_decode,
)

CPU = torch.device("cpu")
VQ = VQGANConfig(bottleneck_blocks=3, embed_dim=8, num_vq_embeddings=16)


class FakeDevice:
    """A device whose memory is the CPU's too, but holds other tensors.

    Weights that are put away are replaced by NaN, so computing with weights that were not moved to the device
    gives NaN. Counts the numbers on the device.
    """

    def __init__(self) -> None:
        self.values: dict[int, Tensor] = {}
        self.addresses: set[int] = set()
        self.modules: list[nn.Module] = []
        self.copies = 0
        self.peak = 0

    def put_away(self, module: nn.Module) -> nn.Module:
        for tensor in offload._tensors(module):
            if tensor.data_ptr() in self.values:
                continue
            away = torch.full_like(tensor.data, float("nan") if tensor.is_floating_point() else 0)
            self.values[away.data_ptr()] = tensor.data
            tensor.data = away
        self.modules.append(module)
        return module

    def copied(self, tensor: Tensor, device: torch.device) -> Tensor:
        copy = self.values[tensor.data_ptr()].clone()
        self.addresses.add(copy.data_ptr())
        self.copies += 1
        self.peak = max(self.peak, copy.numel() + sum(map(self.numbers_of, self.modules)))
        return copy

    def is_on(self, tensor: Tensor, device: torch.device) -> bool:
        return tensor.data_ptr() in self.addresses and tensor.data_ptr() not in self.values

    def numbers_of(self, module: nn.Module) -> int:
        """How many of the module's numbers are on the device."""
        return sum(t.numel() for t in offload._tensors(module) if self.is_on(t, CPU))


@pytest.fixture
def device(monkeypatch) -> FakeDevice:
    fake = FakeDevice()
    monkeypatch.setattr(offload, "_copied", fake.copied)
    monkeypatch.setattr(offload, "_is_on", fake.is_on)
    return fake


def size(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in offload._tensors(module))


def two() -> tuple[nn.Module, nn.Module]:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)), nn.Linear(4, 4)


class TestAllOnDevice:
    def test_checks_and_moves_nothing(self):
        first, second = two()
        residence = AllOnDevice(CPU)
        with residence.using(first, second):
            pass
        second.to("meta")
        with (
            pytest.raises(UserError, match=r"Linear is on the wrong device: meta\. It must be on cpu"),
            residence.using(first, second),
        ):
            raise AssertionError
        residence.release()


class TestOneAtATime:
    def test_one_network_replaces_the_other(self, device):
        first, second = (device.put_away(part) for part in two())
        residence = OneAtATime(CPU)
        with residence.using(first):
            assert first(torch.ones(1, 4)).isfinite().all()
            assert device.numbers_of(first) == size(first)
        assert device.numbers_of(first) == size(first)  # it stays until another one is used
        copies = device.copies
        with residence.using(first):
            assert device.copies == copies
        with residence.using(second):
            assert second(torch.ones(1, 4)).isfinite().all()
            assert device.numbers_of(first) == 0
        residence.release()
        assert device.numbers_of(second) == 0
        assert device.peak == size(first)  # the first had left when the second came

    def test_contexts_can_be_nested(self, device):
        """An inner context must not move away what the outer one still uses."""
        first, second = (device.put_away(part) for part in two())
        residence = OneAtATime(CPU)
        with residence.using(first):
            with residence.using(second):
                assert second(first(torch.ones(1, 4))).isfinite().all()
                residence.release()  # gives back nothing that is in use
                assert second(first(torch.ones(1, 4))).isfinite().all()
            assert first(torch.ones(1, 4)).isfinite().all()
        residence.release()
        assert device.numbers_of(first) == device.numbers_of(second) == 0

    def test_moves_back_to_the_same_memory(self, device):
        first = device.put_away(two()[0])
        before = [tensor.data_ptr() for tensor in offload._tensors(first)]
        residence = OneAtATime(CPU)
        with residence.using(first):
            assert [tensor.data_ptr() for tensor in offload._tensors(first)] != before
        residence.release()
        assert [tensor.data_ptr() for tensor in offload._tensors(first)] == before

    def test_weights_that_were_replaced_meanwhile_are_kept(self, device):
        """As fusing an adapter does while the network is on the device."""
        first = device.put_away(two()[0])
        residence = OneAtATime(CPU)
        with residence.using(first):
            first[0].weight.data = torch.full((6, 4), 7.0)
        residence.release()
        assert first[0].weight.eq(7).all()

    def test_shared_weights_come_once_and_stay_shared(self, device):
        first, second = two()[1], two()[1]
        second.weight = first.weight
        device.put_away(first), device.put_away(second)
        residence = OneAtATime(CPU)
        with residence.using(first, second):
            assert device.copies == 3
            assert second.weight is first.weight
        with residence.using(second):
            assert device.copies == 3  # the shared weight did not leave
            assert second(torch.ones(1, 4)).isfinite().all()
        residence.release()

    @pytest.mark.parametrize("kind", [OneAtATime, Layerwise])
    def test_an_error_moves_everything_back(self, device, kind):
        first = device.put_away(two()[0])
        residence = kind(CPU)
        with pytest.raises(RuntimeError, match="shapes cannot"), residence.using(first):
            first(torch.ones(1, 5))
        assert device.numbers_of(first) == 0
        assert not first[0]._forward_hooks
        assert not first[0]._forward_pre_hooks
        with residence.using(first):
            assert first(torch.ones(1, 4)).isfinite().all()

    @pytest.mark.parametrize("kind", [OneAtATime, Layerwise])
    def test_running_out_of_memory_while_moving_moves_everything_back(self, device, kind, monkeypatch):
        first = device.put_away(nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4)))
        residence = kind(CPU)

        def full(tensor: Tensor, to: torch.device) -> Tensor:
            if device.copies == 2:
                raise torch.OutOfMemoryError("out of memory")
            return device.copied(tensor, to)

        with monkeypatch.context() as patch:
            patch.setattr(offload, "_copied", full)
            with pytest.raises(torch.OutOfMemoryError), residence.using(first):
                raise AssertionError
        assert device.numbers_of(first) == 0
        with residence.using(first):
            assert first(torch.ones(1, 4)).isfinite().all()

    @pytest.mark.parametrize("kind", [OneAtATime, Layerwise])
    def test_what_was_there_already_stays_there(self, device, kind):
        first = two()[0]
        device.addresses |= {tensor.data_ptr() for tensor in offload._tensors(first)}
        residence = kind(CPU)
        with residence.using(first):
            first(torch.ones(1, 4))
        residence.release()
        assert device.copies == 0
        assert device.is_on(first[0].weight, CPU)

    def test_weights_can_be_trained_after_sampling(self, device):
        """Copies made in inference mode would refuse gradients for as long as they stay."""
        first = device.put_away(two()[0])
        residence = OneAtATime(CPU)
        with torch.inference_mode(), residence.using(first):
            first(torch.ones(1, 4))
        first(torch.ones(1, 4)).sum().backward()
        assert first[0].weight.grad.isfinite().all()


def prior_call(randomise) -> tuple[nn.Module, Callable[[], Tensor]]:
    prior = randomise(Prior(PriorConfig(c_in=4, c=16, c_cond=12, c_r=8, depth=3, nhead=2))).eval()
    x, text, r = torch.randn(2, 4, 3, 5), torch.randn(2, 7, 12), torch.tensor([0.9, 0.3])
    return prior, lambda: prior(x, r, prior.context(text))


def prior_with_text_blocks_call(randomise) -> tuple[nn.Module, Callable[[], Tensor]]:
    config = PriorConfig(c_in=4, c=16, c_cond=12, c_r=8, depth=1, nhead=2, text_blocks=2, registers=3)
    prior = randomise(Prior(config)).eval()
    x, text, r = torch.randn(2, 4, 3, 5), torch.randn(2, 7, 12), torch.tensor([0.9, 0.3])
    return prior, lambda: prior(x, r, prior.context(text))


def prior_with_dora_call(randomise) -> tuple[nn.Module, Callable[[], Tensor]]:
    """DoRA reads the weights of layers without calling them."""
    return prior_with_lora_call(randomise, dora=True)


def prior_with_lora_call(randomise, dora: bool = False) -> tuple[nn.Module, Callable[[], Tensor]]:
    prior, call = prior_call(randomise)
    ones = (1, 1)
    shapes = {  # a linear layer, and one convolution of each kind
        "blocks.5.attention.to_k": ((2, 16), (16, 2)),
        "blocks.0.depthwise": ((2, 16, 3, 3), (1, 2, *ones)),
        "projection": ((2, 4, *ones), (16, 2, *ones)),
        "out.1": ((2, 16, *ones), (8, 2, *ones)),
    }
    if dora:
        del shapes["blocks.0.depthwise"]
    tensors = {f"{name}.alpha": torch.tensor(1) for name in shapes}
    for name, (a, b) in shapes.items():
        tensors |= {f"{name}.lora_A.weight": torch.randn(a), f"{name}.lora_B.weight": torch.randn(b)}
        if dora:
            tensors[f"{name}.lora_magnitude_vector"] = torch.rand(b[0])
    load_lora(prior, tensors)
    return prior, call


def decoder_call(randomise) -> tuple[nn.Module, Callable[[], Tensor]]:
    config = DecoderConfig(
        c_r=8,
        c_cond=8,
        c_hidden=(8, 16),
        nhead=(-1, 2),
        blocks=(1, 2),
        level_config=("CT", "CTA"),
        inject_effnet=(False, True),
        effnet_embd=2,
        clip_embd=6,
    )
    decoder = randomise(Decoder(config)).eval()
    x, z, text, r = (
        torch.randn(1, 4, 8, 8),
        torch.randn(1, 2, 3, 3),
        torch.randn(1, 5, 6),
        torch.tensor([0.5]),
    )
    return decoder, lambda: decoder(x, r, decoder.context(z, (8, 8), text))


def decoder_without_text_call(randomise) -> tuple[nn.Module, Callable[[], Tensor]]:
    config = DecoderConfig(
        c_r=8, c_cond=8, c_hidden=(8, 16), nhead=(-1, 2), blocks=(1, 1), level_config=("CT", "CTA"),
        inject_effnet=(False, True), effnet_embd=2, clip_embd=None,
    )  # fmt: skip
    decoder = randomise(Decoder(config)).eval()
    x, z, r = torch.randn(1, 4, 8, 8), torch.randn(1, 2, 3, 3), torch.tensor([0.5])
    return decoder, lambda: decoder(x, r, decoder.context(z, (8, 8)))


def vqgan_call(randomise) -> tuple[nn.Module, Callable[[], Tensor]]:
    vqgan = randomise(VQGAN(VQ)).eval()
    pixels = torch.rand(1, 3, 16, 16)
    return vqgan, lambda: vqgan(pixels)[0]


def compressor_call(randomise) -> tuple[nn.Module, Callable[[], Tensor]]:
    compressor = Compressor(CompressorConfig(backbone="efficientnet_lite0", c_latent=2)).eval()
    pixels = torch.rand(1, 3, 32, 32)
    return compressor, lambda: compressor(pixels)


def previewer_call(randomise) -> tuple[nn.Module, Callable[[], Tensor]]:
    previewer = randomise(Previewer(PreviewerConfig(c_in=2, c_hidden=(8, 8, 8)))).eval()
    z = torch.randn(1, 2, 3, 3)
    return previewer, lambda: previewer(z)


def bert_call(randomise) -> tuple[nn.Module, Callable[[], Tensor]]:
    encoder = read_text_encoder(BUNDLED / "text_encoder")
    return encoder, lambda: encoder.encode(["a camel"]).states


def clip_call(randomise) -> tuple[nn.Module, Callable[[], Tensor]]:
    config = CLIPTextConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        eos_token_id=2,
    )
    model = CLIPTextModel(config).eval()
    return model, lambda: model(input_ids=torch.tensor([[1, 5, 9, 2]])).last_hidden_state


CALLS = {
    "prior": prior_call,
    "prior with LoRA": prior_with_lora_call,
    "prior with DoRA": prior_with_dora_call,
    "prior with blocks on the text": prior_with_text_blocks_call,
    "decoder": decoder_call,
    "decoder with attention but no text": decoder_without_text_call,
    "vqgan": vqgan_call,
    "compressor": compressor_call,
    "previewer": previewer_call,
    "bert": bert_call,
    "clip": clip_call,
}


@pytest.mark.parametrize("kind", [OneAtATime, Layerwise])
@pytest.mark.parametrize("name", CALLS)
def test_every_network_computes_only_with_weights_on_the_device(name, kind, device, randomise):
    network, call = CALLS[name](randomise)
    with torch.inference_mode():
        expected = call()
        device.put_away(network)
        assert not call().isfinite().all()  # the fake works: nothing is on the device
        residence = kind(CPU)
        for _ in range(2):
            with residence.using(network):
                assert torch.equal(call(), expected)
    residence.release()
    assert device.numbers_of(network) == 0


def test_layer_by_layer_needs_little_memory(device, randomise):
    prior, call = prior_call(randomise)
    with torch.no_grad():
        device.put_away(prior)
        with Layerwise(CPU).using(prior):
            stays = device.numbers_of(prior)
            call()
            assert device.numbers_of(prior) == stays
    largest = 64 * 16 + 64
    assert device.peak == stays + largest
    assert stays < size(prior) / 10


class Tied(nn.Module):
    """An output layer that shares its matrix with the embedding, and two layers that share one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.embedding.weight
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, ids: Tensor) -> Tensor:
        tokens = self.second(self.first(self.embedding(ids)))
        return self.out(tokens) @ self.embedding.weight


def test_layer_by_layer_with_tied_weights(device):
    tied, ids = Tied(), torch.tensor([[1, 2]])
    with torch.no_grad():
        expected = tied(ids)
        device.put_away(tied)
        residence = Layerwise(CPU)
        with residence.using(tied):
            assert torch.equal(tied(ids), expected)
            assert torch.equal(tied(ids), expected)
            with residence.using(tied.out):  # must not move the outer context's embedding away
                assert torch.equal(tied(ids), expected)
            assert torch.equal(tied(ids), expected)
    assert tied.out.weight is tied.embedding.weight
    assert device.numbers_of(tied) == 0


def small_vqgan(randomise, **changes: int) -> VQGAN:
    return randomise(VQGAN(dataclasses.replace(VQ, **changes))).eval().requires_grad_(False)


SHAPES = {
    "as published, but narrow": {"bottleneck_blocks": 12},
    "one level": {"levels": 1},
    "three levels": {"levels": 3},
    "no bottleneck": {"bottleneck_blocks": 0},
    "patches of 4": {"up_down_scale_factor": 4},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tile", [1, 5, 32])
def test_tiles_equal_the_whole(shape, tile, randomise):
    """No seams, at the edges either: sizes that tiles do not divide, several images."""
    vqgan = small_vqgan(randomise, **SHAPES[shape])
    height, width = (2, 3) if tile == 1 else (9, 17)
    latents = torch.randn(2, 4, height, width)
    whole = vqgan.decode(latents)
    # Values are of order 1 to 10; on several threads a convolution rounds by the size of its input.
    torch.testing.assert_close(tiled_decode(vqgan, latents, tile=tile), whole, rtol=1e-4, atol=1e-4)
    vqgan.double()
    decoded = tiled_decode(vqgan, latents.double(), tile=tile)
    torch.testing.assert_close(decoded, vqgan.decode(latents.double()), rtol=1e-12, atol=1e-12)


def test_the_published_halo():
    with torch.device("meta"):
        vqgan = VQGAN(VQGANConfig())
    assert decoding_halo(vqgan) == 13


@pytest.mark.parametrize("shape", SHAPES)
def test_the_halo_is_the_decoders_receptive_field(shape, randomise):
    """The pixels of one latent depend on those ``decoding_halo`` away and on none beyond."""
    vqgan = small_vqgan(randomise, **SHAPES[shape]).double()
    halo, factor = decoding_halo(vqgan), vqgan.config.factor
    middle = halo + 2
    latents = torch.randn(1, 4, 2 * middle + 1, 3, dtype=torch.float64, requires_grad=True)
    rows = vqgan.decode(latents)[:, :, middle * factor : (middle + 1) * factor]
    (gradient,) = torch.autograd.grad(rows.square().sum(), latents)
    seen = gradient.abs().amax(dim=(0, 1, 3)) > 0
    assert seen.nonzero().flatten().tolist() == list(range(middle - halo, middle + halo + 1))


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.numbers = max([self.numbers, *(tensor.numel() for tensor in tensors)])
        return result


def test_memory_depends_on_the_tile_not_on_the_image(randomise):
    vqgan = small_vqgan(randomise, embed_dim=64)  # wide, so that the result is not the largest
    halo = decoding_halo(vqgan)

    def largest(decode: Callable[[Tensor], Tensor], images: int, side: int) -> int:
        with Largest() as mode:
            decode(torch.randn(images, 4, side, side))
        return mode.numbers

    whole = largest(vqgan.decode, 2, 32)
    small, large = (largest(lambda z, t=t: tiled_decode(vqgan, z, tile=t), 2, 32) for t in (4, 8))
    ratio = 2 * 32**2 / (8 + 2 * halo) ** 2
    assert whole / large == pytest.approx(ratio, rel=0.15)
    assert small < large
    assert largest(lambda z: tiled_decode(vqgan, z, tile=8), 1, 64) < whole / 2


@pytest.mark.parametrize("tile", [0, -3])
def test_tiles_below_1_are_refused(tile, randomise):
    vqgan = small_vqgan(randomise)
    with pytest.raises(UserError, match=f"tile must be at least 1, got {tile}"):
        tiled_decode(vqgan, torch.randn(1, 4, 4, 4), tile=tile)


@pytest.mark.gpu
class TestOnCuda:
    CUDA = torch.device("cuda")

    def networks(self, randomise) -> list[Prior]:
        config = PriorConfig(c_in=4, c=256, c_cond=64, c_r=8, depth=4, nhead=4)
        return [randomise(Prior(config)).eval().requires_grad_(False) for _ in range(2)]

    def call(self, prior: Prior) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        x, text = torch.randn(1, 4, 6, 6, generator=generator), torch.randn(1, 7, 64, generator=generator)
        text = text.to(self.CUDA)
        with torch.inference_mode():
            return prior(x.to(self.CUDA), torch.tensor([0.5], device=self.CUDA), prior.context(text)).clone()

    def test_the_same_numbers_in_less_memory(self, randomise):
        networks = self.networks(randomise)
        expected = [self.call(copy.deepcopy(network).to(self.CUDA)) for network in networks]
        weights = sum(tensor.numel() * tensor.element_size() for tensor in offload._tensors(networks[0]))
        start = torch.cuda.memory_allocated()
        # Layer by layer the plain MLPs run, not the kernels that fuse three layers.
        for residence, fraction, rtol in (
            (OneAtATime(self.CUDA), 1.05, 0),
            (Layerwise(self.CUDA), 0.1, 1e-4),
        ):
            for _ in range(2):
                for network, wanted in zip(networks, expected, strict=True):
                    with residence.using(network):
                        error = (self.call(network) - wanted).abs().max().item()
                    assert error <= rtol * wanted.abs().max().item()
                    assert torch.cuda.memory_allocated() - start <= fraction * weights
            residence.release()
            assert torch.cuda.memory_allocated() == start
            assert all(t.device.type == "cpu" for n in networks for t in offload._tensors(n))
            assert all(t.is_pinned() for n in networks for t in offload._tensors(n) if t.ndim > 1)

    def test_layer_by_layer_peaks_at_a_layer(self, randomise):
        prior = self.networks(randomise)[0]
        weights = sum(tensor.numel() * tensor.element_size() for tensor in offload._tensors(prior))
        with Layerwise(self.CUDA).using(prior):
            self.call(prior)  # the libraries' own workspaces come with the first call
            torch.cuda.reset_peak_memory_stats()
            start = torch.cuda.memory_allocated()
            self.call(prior)
            assert torch.cuda.max_memory_allocated() - start < weights / 4

    def test_text_encoders(self):
        encoder = read_text_encoder(BUNDLED / "text_encoder")
        expected = encoder.encode(["a camel"]).states
        for residence in (OneAtATime(self.CUDA), Layerwise(self.CUDA)):
            with residence.using(encoder):
                states = encoder.encode(["a camel"]).states
            assert states.is_cuda
            torch.testing.assert_close(states.cpu(), expected, rtol=1e-3, atol=1e-3)
            residence.release()

    def test_tiles_equal_the_whole(self, randomise):
        # In double precision: TF32 would round more than a seam shows.
        vqgan = small_vqgan(randomise, bottleneck_blocks=12).to(self.CUDA, torch.float64)
        latents = torch.randn(1, 4, 96, 80, device=self.CUDA, dtype=torch.float64)
        torch.testing.assert_close(tiled_decode(vqgan, latents, tile=24), vqgan.decode(latents))

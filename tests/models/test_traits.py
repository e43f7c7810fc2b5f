"""Blocks declare their traits beside their definitions, and a block without traits takes the plain path."""

import importlib
import pkgutil

import pytest
import torch
from torch import nn

import wuerstchen.models
from wuerstchen.models.blocks import run_blocks, text_inputs
from wuerstchen.models.compressor import Compressor, CompressorConfig
from wuerstchen.models.decoder import Decoder, DecoderConfig
from wuerstchen.models.fused.blocks import factored_condition, is_plain, join_layers
from wuerstchen.models.int8_linear import Int8Linear
from wuerstchen.models.layers import AttnBlock, ConditionedResBlock, ResBlock, SelfAttnBlock, TimestepBlock
from wuerstchen.models.paella import Paella, PaellaConfig
from wuerstchen.models.previewer import Previewer, PreviewerConfig
from wuerstchen.models.prior import Prior, PriorConfig
from wuerstchen.models.text import TextEncoder
from wuerstchen.models.text_blocks import TextBlock
from wuerstchen.models.traits import PLAIN, BlockTraits, traits_of
from wuerstchen.models.vqgan import VQGAN, Discriminator, VQGANConfig
from wuerstchen.train.engine.distributed import Processes
from wuerstchen.train.engine.muon import hidden_matrices
from wuerstchen.train.engine.sharding import shard
from wuerstchen.train.engine.update import compile_regions, recompute_blocks

NETWORKS = {
    "Stage C": lambda: Prior(PriorConfig()),
    "Stage C with blocks on the text": lambda: Prior(PriorConfig(depth=1, text_blocks=1)),
    "Stage B": lambda: Decoder(DecoderConfig()),
    "Stage B without text": lambda: Decoder(DecoderConfig(clip_embd=None)),
    "Stage B of v1": lambda: Paella(PaellaConfig()),
    "Stage A": lambda: VQGAN(VQGANConfig()),
    "discriminator": Discriminator,
    "previewer": lambda: Previewer(PreviewerConfig()),
    "compressor": lambda: Compressor(CompressorConfig()),
    "compressor with Lite": lambda: Compressor(CompressorConfig(backbone="efficientnet_lite0")),
}


def of_models(kind: type) -> bool:
    return kind.__module__.startswith("wuerstchen.models.")


def undeclared(network: nn.Module) -> set[str]:
    """Blocks, that is elements of lists of layers, that do not declare their traits."""
    found, waiting = set(), [network]
    while waiting:
        module = waiting.pop()
        for child in module.children():
            is_block = type(module) in (nn.Sequential, nn.ModuleList) and of_models(type(child))
            if is_block and "allows" not in vars(type(child)):
                found.add(type(child).__name__)
            if not is_block:  # the layers inside a block need no traits
                waiting.append(child)
    return found


@pytest.fixture(scope="module")
def networks():
    with torch.device("meta"):
        return {name: make() for name, make in NETWORKS.items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_block_declares_its_traits(networks, name):
    """A new block without traits would silently be neither compiled nor sharded nor fused."""
    assert undeclared(networks[name]) == set()


def test_no_network_is_left_out(networks):
    for module in pkgutil.walk_packages(wuerstchen.models.__path__, "wuerstchen.models."):
        if not module.name.endswith("_kernel") and not module.name.endswith("_kernels"):  # need Triton
            importlib.import_module(module.name)
    seen = {type(module) for network in networks.values() for module in network.modules()}
    seen |= {base for kind in seen for base in kind.__mro__} | {TextEncoder}  # its model is from transformers
    seen |= {Int8Linear}  # takes the place of linear layers inside blocks
    assert {kind.__name__ for kind in subclasses(nn.Module) if of_models(kind) and kind not in seen} == set()


def subclasses(kind: type) -> set[type]:
    return {kind}.union(*(subclasses(one) for one in type.__subclasses__(kind)))


class Halves(nn.Module):
    """A block without traits."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x) / 2


def test_a_block_without_traits_is_found():
    Halves.__module__ = "wuerstchen.models.halves"
    try:
        assert undeclared(nn.ModuleList([Halves()])) == {"Halves"}
    finally:
        Halves.__module__ = __name__


def test_a_block_without_traits_takes_the_plain_path_everywhere():
    blocks = nn.ModuleList([Halves().eval()])
    x, r = torch.randn(1, 2, 2, 8), torch.randn(1, 4)
    assert traits_of(blocks[0]) == PLAIN == BlockTraits()
    assert torch.equal(run_blocks(blocks, x, r, iter(())), blocks[0](x))
    assert text_inputs(blocks, torch.randn(1, 3, 8), None, cache_kv=False) == []
    assert not is_plain(blocks[0], x)
    assert not hidden_matrices(blocks)
    assert not shard(blocks, Processes(torch.device("cpu"), 0, 2))
    weights = {name: tensor.data_ptr() for name, tensor in blocks.state_dict().items()}
    compile_regions(blocks)
    recompute_blocks(blocks)
    join_layers(blocks)
    assert blocks[0]._compiled_call_impl is None
    assert "forward" not in vars(blocks[0])
    assert {name: tensor.data_ptr() for name, tensor in blocks.state_dict().items()} == weights
    mapper = nn.Conv2d(2, 8, kernel_size=1)
    mixed = nn.ModuleList([*blocks, ConditionedResBlock(8, 8)]).eval()
    assert len(factored_condition(mixed, mapper, torch.randn(1, 2, 2, 2)).factors) == 1


def test_join_layers_skips_empty_entries():
    """Stage B's list of mappers holds None for a level that does not see the semantic latents."""
    blocks = nn.ModuleList([None, TimestepBlock(8, 4), TimestepBlock(8, 4)])
    join_layers(blocks)
    first, second = blocks[1].mapper.weight, blocks[2].mapper.weight
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


def test_a_subclass_is_not_fused():
    """Its forward pass may differ. The other traits of its base hold."""

    class Twice(ResBlock):
        def forward(self, x, skip=None):
            return 2 * super().forward(x, skip)

    x = torch.randn(1, 2, 2, 8)
    assert is_plain(ResBlock(8).eval(), x)
    assert not is_plain(Twice(8).eval(), x)
    assert traits_of(Twice(8)).compile


def test_traits_of_our_blocks():
    for kind in (ResBlock, ConditionedResBlock, AttnBlock, SelfAttnBlock):
        assert kind.allows.compile
        assert kind.allows.recompute
        assert kind.allows.orthogonalise
        assert kind.allows.shard == "block"
        assert kind.allows.fuse
    of_text = TextBlock.allows
    assert (of_text.compile, of_text.recompute, of_text.shard, of_text.orthogonalise) == (
        True,
        True,
        "block",
        True,
    )
    allows = TimestepBlock.allows
    assert (allows.compile, allows.recompute, allows.shard, allows.orthogonalise) == (True, True, "no", False)
    roots = {kind: kind.allows.shard for kind in (Prior, Decoder, Compressor, Paella)}
    assert roots == {Prior: "network", Decoder: "network", Compressor: "network", Paella: "keep whole"}

"""Fused blocks against the plain blocks.

The kernels need a GPU, or Triton's interpreter: TRITON_INTERPRET=1 runs these tests on a CPU.
"""

import copy
import dataclasses
import importlib.util
import os

import pytest
import torch
import torch.nn.functional as F
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext import WuerstchenDiffNeXt
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior import WuerstchenPrior
from torch import nn

from wuerstchen.checkpoints.diffusers_config import shared_fields
from wuerstchen.models import blocks, decoder, vqgan
from wuerstchen.models.decoder import Decoder, DecoderConfig
from wuerstchen.models.fused import blocks as fused
from wuerstchen.models.layers import Attention, ResBlock
from wuerstchen.models.paella import Paella, PaellaConfig
from wuerstchen.models.prior import Prior, PriorConfig
from wuerstchen.models.vqgan import VQGAN, VQGANConfig

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
pytestmark = [
    *([] if INTERPRETED else [pytest.mark.gpu]),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
]

PRIOR = PriorConfig(c_in=4, c=48, c_cond=24, c_r=8, depth=3, nhead=3)
DECODER = DecoderConfig(
    c_r=8,
    c_cond=24,
    c_hidden=(16, 32, 40),
    nhead=(-1, 2, 4),
    blocks=(2, 2, 1),
    level_config=("CT", "CTA", "CTA"),
    inject_effnet=(False, True, True),
    clip_embd=20,
)


def never(x):
    return False


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch):
    if INTERPRETED:
        fuse(monkeypatch, lambda x: not torch.is_grad_enabled())


def fuse(monkeypatch, can_fuse):
    for module in (fused, blocks, decoder, vqgan):
        monkeypatch.setattr(module, "can_fuse", can_fuse)


@pytest.fixture
def run_plain():
    """Runs a function without fused blocks."""

    def run(function, *inputs):
        with pytest.MonkeyPatch.context() as patch:
            fuse(patch, never)
            return function(*inputs)

    return run


def prior_inputs(grid=(5, 7), batch=2):
    torch.manual_seed(3)
    x, text = torch.randn(batch, 4, *grid), torch.randn(batch, 6, 24)
    return x.to(DEVICE), torch.rand(batch).to(DEVICE), text.to(DEVICE)


def decoder_inputs(batch=2):
    torch.manual_seed(4)
    x, z, text = torch.randn(batch, 4, 24, 16), torch.randn(batch, 16, 5, 4), torch.randn(batch, 6, 20)
    return x.to(DEVICE), torch.rand(batch).to(DEVICE), z.to(DEVICE), text.to(DEVICE)


def run_prior(network, x, r, text, mask=None):
    dtype = network.dtype
    with torch.no_grad():
        return network(x.to(dtype), r, network.context(text.to(dtype), mask))


def run_decoder(network, x, r, z, text):
    dtype = network.dtype
    with torch.no_grad():
        states = None if network.config.clip_embd is None else text.to(dtype)
        context = network.context(z, tuple(x.shape[2:]), states)
        return network(x.to(dtype), r, context)


def error(found, exact):
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.fixture
def prior(randomise):
    network = randomise(Prior(PRIOR))
    with torch.no_grad():  # 1 / |1 - b| would amplify rounding without bound
        network.out[1].weight[4:] *= 0.05
        network.out[1].bias[4:] = 0.0
    return network.to(DEVICE).eval()


@pytest.fixture
def unet(randomise):
    return randomise(Decoder(DECODER)).to(DEVICE).eval()


@pytest.mark.parametrize("joins", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_fused_stage_c_equals_the_plain_one(prior, joins, masked, run_plain):
    """Catches a bias added twice or never, a neighbour beyond the edge, a text row of another image."""
    x, r, text = prior_inputs()
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2], device=DEVICE) if masked else None
    plain = run_plain(run_prior, prior, x, r, text, mask)
    if joins:
        fused.join_layers(prior)
    assert error(run_prior(prior, x, r, text, mask), plain) <= 1e-5


def test_fused_masked_texts_in_half_precision_equal_the_plain_ones(prior, run_plain):
    """The attention kernel must apply the mask."""
    x, r, text = prior_inputs()
    mask = torch.tensor([[True] * 6, [True] * 2 + [False] * 4], device=DEVICE)
    exact, prior = run_plain(run_prior, prior, x, r, text, mask), prior.half()
    found, unmasked = run_prior(prior, x, r, text, mask), run_prior(prior, x, r, text)
    assert error(found, exact) <= 5e-3 < error(unmasked, exact)


def assert_no_further_than_run_plain(network, inputs, run_plain):
    """Compared in fp64: Stage B's output divides by |1 − b|, which amplifies rounding."""
    plain = run_plain(run_decoder, network, *inputs)
    exact = run_plain(run_decoder, copy.deepcopy(network).double(), *inputs)
    fused.join_layers(network)
    assert error(run_decoder(network, *inputs), exact) <= 3 * error(plain, exact) + 1e-6


def test_fused_stage_b_equals_the_plain_one(unet, run_plain):
    """The condition includes its mapper's bias. The skip comes before the condition."""
    assert_no_further_than_run_plain(unet, decoder_inputs(), run_plain)


SHAPES = {
    "levels that do not start with a convolution": {"level_config": ("TC", "ACT", "TA"), "nhead": (-1, 2, 4)},
    "levels without blocks, and without a convolution": {"level_config": ("", "TA", "CTA")},
    "conditioned at every level": {"inject_effnet": (True, True, True), "kernel_size": 5},
    "conditioned at no level": {"inject_effnet": (False, False, False), "patch_size": 1},
    "mappers in another order": {"inject_effnet": (True,) * 5},
    "heads that do not divide the width": {"nhead": (-1, 3, 7), "dropout": (0.0, 0.2, 1.0)},
    "attention without text": {"clip_embd": None, "level_config": ("CTA", "TAC", "AAT"), "nhead": (2, 3, 4)},
    "one channel of noise": {"c_out": 1, "c_r": 1},
}


@pytest.mark.parametrize("name", SHAPES)
def test_fused_stages_b_of_other_shapes_equal_the_plain_ones(name, randomise, run_plain):
    """Catches a skip taken by another block than the first, a mapper of another level."""
    network = randomise(Decoder(dataclasses.replace(DECODER, **SHAPES[name]))).to(DEVICE).eval()
    assert_no_further_than_run_plain(network, decoder_inputs(), run_plain)


@pytest.mark.parametrize("change", [{"nhead": 5}, {"depth": 0}, {"c_r": 1}, {"c": 1, "nhead": 1}])
def test_fused_stages_c_of_other_shapes_equal_the_plain_ones(change, randomise, run_plain):
    network = randomise(Prior(dataclasses.replace(PRIOR, **change))).to(DEVICE).eval()
    with torch.no_grad():
        network.out[1].weight[4:] *= 0.05
        network.out[1].bias[4:] = 0.0
    inputs = prior_inputs()
    plain = run_plain(run_prior, network, *inputs)
    fused.join_layers(network)
    assert error(run_prior(network, *inputs), plain) <= 1e-5


def test_fused_stage_b_of_v1_equals_the_plain_one(randomise, run_plain):
    """Its skips are concatenated before the convolution, which then reads two channels per group."""
    config = PaellaConfig(
        c_r=8,
        num_labels=16,
        c_token=8,
        clip_embd=20,
        effnet_embd=16,
        c_cond=24,
        c_hidden=(16, 32),
        nhead=(-1, 4),
        blocks=(2, 2),
        level_config=("CT", "CTA"),
    )
    network = randomise(Paella(config)).to(DEVICE).eval()
    _, r, z, text = decoder_inputs()
    tokens = torch.randint(16, (2, 12, 8), generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def run():
        with torch.no_grad():
            return network(tokens, r, network.context(z, text))

    assert error(run(), run_plain(run)) <= 1e-5


@pytest.mark.parametrize("most", [fused.MAX_HIDDEN, 7 * 96])
def test_fused_stage_a_equals_the_plain_one(randomise, run_plain, monkeypatch, most):
    """Replication padding. The MLP's parts may end at any position."""
    monkeypatch.setattr(fused, "MAX_HIDDEN", most)
    network = randomise(VQGAN(VQGANConfig(bottleneck_blocks=2, embed_dim=24, num_vq_embeddings=8)))
    network = network.to(DEVICE).eval()
    latents = torch.randn(2, 4, 5, 7, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    calls, run = [], vqgan.run_mixing
    monkeypatch.setattr(vqgan, "run_mixing", lambda block, x: calls.append(1) or run(block, x))
    with torch.no_grad():
        plain = run_plain(network.decode, latents)
        before = latents.clone()
        assert error(network.decode(latents), plain) <= 1e-5
    assert torch.equal(latents, before)
    assert len(calls) == 3


def diffusers_network(kind, network):
    theirs = kind(**shared_fields(network.config)).to(DEVICE).eval()
    theirs.load_state_dict(network.state_dict())
    return theirs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stage", ["b", "c"])
def test_half_precision_is_as_close_to_diffusers_in_fp32_as_diffusers_own(
    stage, dtype, prior, unet, monkeypatch
):
    """Catches a sum in half precision, or a step that is rounded too often."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # exact fp32
    if stage == "c":
        network, theirs, inputs = prior, diffusers_network(WuerstchenPrior, prior), prior_inputs((12, 12), 4)
        run = run_prior
    else:
        network, theirs, inputs = unet, diffusers_network(WuerstchenDiffNeXt, unet), decoder_inputs(4)
        run = run_decoder
    x, r, *steering = inputs[0], inputs[1].bfloat16().float(), *inputs[2:]  # the same times for all
    inputs = (x, r, *steering)
    with torch.no_grad():
        exact = theirs(x, r, *steering)
        assert error(run(network, *inputs), exact) <= 1e-5
        half = theirs.to(dtype)(x.to(dtype), r.to(dtype), *(value.to(dtype) for value in steering))
    found = error(run(network.to(dtype), *inputs), exact)
    assert 0 < found <= 1.1 * error(half, exact)


@pytest.mark.parametrize("joins", [False, True])
def test_times_of_cells_are_those_of_the_plain_blocks(prior, unet, joins, run_plain):
    """Catches the factors of another position, or of the whole image. In Stage B the grid is coarser than the
    times."""
    x, r, text = prior_inputs()
    r = torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    plain = run_plain(run_prior, prior, x, r, text)
    if joins:
        fused.join_layers(prior)
    assert error(run_prior(prior, x, r, text), plain) <= 1e-5
    x, _, *others = decoder_inputs()
    r = torch.rand(2, 24, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    assert_no_further_than_run_plain(unet, (x, r, *others), run_plain)


def test_replaced_timestep_blocks_get_times_of_cells(prior, run_plain):
    """A block that cannot be fused runs between fused ones."""
    x, _, text = prior_inputs()
    r = torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    plain = run_plain(run_prior, prior, x, r, text)
    prior.blocks[4].mapper.register_forward_hook(lambda *_: None)
    assert error(run_prior(prior, x, r, text), plain) <= 1e-5


def test_one_timestep_of_a_cell_applies_to_all_images():
    from wuerstchen.models.fused import block_kernels

    x, factors = torch.randn(3, 2, 5, 48, device=DEVICE), torch.randn(1, 2, 5, 96, device=DEVICE)
    scale, shift = factors.chunk(2, dim=-1)
    expected = x * (1 + scale) + shift
    block_kernels._launch_scale_shift(x, x.new_zeros(48), factors, None, None)
    torch.testing.assert_close(x, expected)


def test_one_timestep_applies_to_all_images():
    """As in the plain blocks. The kernel read beyond the end for all images but the first."""
    from wuerstchen.models.fused import block_kernels

    x, factors = torch.randn(3, 2, 5, 48, device=DEVICE), torch.randn(1, 96, device=DEVICE)
    scale, shift = factors.chunk(2, dim=1)
    expected = x * (1 + scale) + shift
    block_kernels._launch_scale_shift(x, x.new_zeros(48), factors, None, None)
    torch.testing.assert_close(x, expected)


def test_a_text_of_another_batch_size_is_refused(prior):
    """It was read beyond its end."""
    x, r, text = prior_inputs()
    with torch.no_grad(), pytest.raises(ValueError, match=r"batch size of the latents, 2, got 1\."):
        prior(x, r, prior.context(text[:1]))


def test_a_condition_of_another_grid_is_refused(unet):
    """With the same number of positions, it was accepted."""
    x, r, z, text = decoder_inputs()
    with torch.no_grad(), pytest.raises(ValueError, match="must have the same batch and grid"):
        unet(x.mT, r, unet.context(z, tuple(x.shape[2:]), text))


def test_a_missing_condition_is_refused(unet):
    """The weights for it were silently ignored."""
    x, r, z, text = decoder_inputs()
    with torch.no_grad():
        context = unet.context(z, tuple(x.shape[2:]), text)
        context = dataclasses.replace(context, conditions=[None] * len(context.conditions))
        with pytest.raises(ValueError, match="channels together"):
            unet(x, r, context)


def test_a_block_that_changed_after_its_context_gets_the_condition(unet):
    x, r, z, text = decoder_inputs()
    called = []
    with torch.no_grad():
        context = unet.context(z, tuple(x.shape[2:]), text)
        expected = unet(x, r, context)
        unet.up_blocks[0][0].channelwise[0].register_forward_hook(lambda *_: called.append(1))
        assert error(unet(x, r, context), expected) <= 1e-5
    assert called


def test_inputs_and_weights_do_not_change(prior, unet):
    """Many operations are in place."""
    for network, run, inputs in ((prior, run_prior, prior_inputs()), (unet, run_decoder, decoder_inputs())):
        before = [tensor.clone() for tensor in (*inputs, *network.state_dict().values())]
        first = run(network, *inputs)
        assert torch.equal(first, run(network, *inputs))
        after = [*inputs, *network.state_dict().values()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_replaced_layers_are_called(prior, run_plain):
    """By adapters or otherwise, in attention and in the MLP."""

    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    def replaced(layer):
        twice = Twice(layer.in_features, layer.out_features)
        twice.load_state_dict(layer.state_dict())
        return twice.to(DEVICE).eval()

    class Thrice(ResBlock):
        def forward(self, x):
            return 3 * super().forward(x)

    prior.blocks[2].attention.to_v = replaced(prior.blocks[2].attention.to_v)
    prior.blocks[5].attention.to_k = nn.Linear(48, 48, bias=False).to(DEVICE).eval()
    thrice = Thrice(48)
    thrice.load_state_dict(prior.blocks[6].state_dict())
    prior.blocks[6] = thrice.to(DEVICE).eval()
    prior.blocks[3].channelwise[0] = replaced(prior.blocks[3].channelwise[0])
    x, r, text = prior_inputs()
    plain = run_plain(run_prior, prior, x, r, text)
    assert error(run_prior(prior, x, r, text), plain) <= 1e-5


class Doubled(nn.Module):
    """A wrapper without weights."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, *inputs):
        return 2 * self.base(*inputs)


def with_forward(module):
    forward = module.forward
    module.forward = lambda *inputs: 2 * forward(*inputs)


CHANGES = {
    "another activation": lambda blocks: blocks[0].channelwise.__setitem__(1, nn.SiLU()),
    "an approximate activation": lambda blocks: blocks[0].channelwise.__setitem__(1, nn.GELU("tanh")),
    "no activation": lambda blocks: blocks[0].channelwise.__setitem__(1, nn.Identity()),
    "a layer in a sequence": lambda blocks: blocks[0].channelwise.__setitem__(
        0, nn.Sequential(blocks[0].channelwise[0], nn.Tanh())
    ),
    "a projection doubled": lambda blocks: setattr(
        blocks[2].attention, "to_q", Doubled(blocks[2].attention.to_q)
    ),
    "a mapper doubled": lambda blocks: setattr(blocks[1], "mapper", Doubled(blocks[1].mapper)),
    "attention doubled": lambda blocks: setattr(
        blocks[2].attention, "__class__", type("Twice", (Attention,), {"forward": doubled_attention})
    ),
    "a layer's forward": lambda blocks: with_forward(blocks[0].channelwise[0]),
    "a block's forward": lambda blocks: with_forward(blocks[2]),
}


def doubled_attention(self, *inputs):
    return 2 * Attention.forward(self, *inputs)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_without_new_weights_are_detected(change, prior, run_plain):
    """Blocks were fused as if unchanged, or failed because a weight was missing."""
    x, r, text = prior_inputs()
    before = run_plain(run_prior, prior, x, r, text)
    change(prior.blocks)
    plain = run_plain(run_prior, prior.eval(), x, r, text)
    assert error(plain, before) > 5e-5
    assert error(run_prior(prior, x, r, text), plain) <= 1e-5


def test_tensors_that_hooks_keep_do_not_change(prior, run_plain):
    """The next block overwrote them."""
    inputs, kept = prior_inputs(), {}
    for number in range(3):
        prior.blocks[number].register_forward_hook(
            lambda *given, number=number: kept.update({number: given[2]})
        )
    run_plain(run_prior, prior, *inputs)
    plain, kept = dict(kept), {}
    for number, hooked in enumerate(prior.blocks[:3]):
        hooked._forward_hooks.clear()
        hooked.register_forward_hook(lambda *given, number=number: kept.update({number: given[2]}))
        run_prior(prior, *inputs)
        assert error(kept[number], plain[number]) <= 1e-5
        hooked._forward_hooks.clear()


def test_hooks_are_called(prior):
    seen = []
    prior.blocks[0].channelwise[0].register_forward_hook(lambda *_: seen.append(1))
    prior.blocks[1].register_forward_hook(lambda *_: seen.append(2))
    prior.blocks[2].attention.to_q.register_forward_hook(lambda *_: seen.append(3))
    prior.blocks[5].register_forward_hook(lambda *_: seen.append(4))
    run_prior(prior, *prior_inputs())
    assert seen == [1, 2, 3, 4]


def test_joined_projections_are_the_same_weights(prior):
    before = {key: tensor.clone() for key, tensor in prior.state_dict().items()}
    fused.join_layers(prior)
    attentions = [module for module in prior.modules() if isinstance(module, Attention)]
    for attention in attentions:
        weight, bias = fused._joined((attention.to_q, attention.to_k, attention.to_v))
        assert torch.equal(
            weight, torch.cat([attention.to_q.weight, attention.to_k.weight, attention.to_v.weight])
        )
        assert torch.equal(bias, torch.cat([attention.to_q.bias, attention.to_k.bias, attention.to_v.bias]))
    assert all(torch.equal(tensor, before[key]) for key, tensor in prior.state_dict().items())
    attention = attentions[0]
    attention.to_k.weight = nn.Parameter(attention.to_k.weight.clone())
    assert fused._joined((attention.to_q, attention.to_k, attention.to_v)) is None


def test_training_runs_the_plain_blocks(prior):
    x, r, text = prior_inputs()
    prior(x, r, prior.context(text)).sum().backward()
    assert all(p.grad is not None for p in prior.parameters() if p.requires_grad)


def test_a_context_for_sampling_is_refused_in_training(unet):
    x, r, z, text = decoder_inputs()
    with torch.no_grad():
        context = unet.context(z, tuple(x.shape[2:]), text)
    with pytest.raises(ValueError, match="cache_kv=False"):
        unet(x, r, context)


# The interpreter has no products in bfloat16.
@pytest.mark.parametrize("dtype", [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("n", "text", "heads", "d"),
    [(35, 6, 3, 16), (64, 0, 2, 64), (130, 77, 2, 32), (70, 1, 2, 80), (70, 65, 1, 128)],
)
def test_attention_equals_torchs(n, text, heads, d, masked, dtype):
    """A key beyond the end that counts, a head of the neighbour, a scale of another width, a tile's rest, a
    tile of which nothing is attended to."""
    from wuerstchen.models.fused import attention_kernel

    grid, words = drawn(2, n, 3 * heads * d, dtype), drawn(2, text, 2 * heads * d, dtype)
    assert attention_kernel.supports(grid.chunk(3, dim=-1)[0], heads)
    assert not attention_kernel.supports(grid.float(), heads)
    there = torch.arange(text, device=DEVICE) < torch.tensor([[text // 2], [0]], device=DEVICE)
    assert_attention_is_exact(grid, words, heads, there if masked else None)


def drawn(b, n, c, dtype):
    return torch.randn(b, n, c, generator=torch.Generator().manual_seed(n)).to(DEVICE, dtype)


def assert_attention_is_exact(grid, words, heads, mask=None, laid=lambda text: text):
    from wuerstchen.models.fused import attention_kernel

    def split(part):
        return part.unflatten(-1, (heads, -1)).transpose(1, 2)

    own, text = grid.chunk(3, dim=-1), [laid(split(part)) for part in words.chunk(2, dim=-1)]
    found = attention_kernel.attend(*own, *text, mask)
    queries, keys, values = (split(part).double() for part in own)
    keys, values = torch.cat([keys, text[0].double()], dim=2), torch.cat([values, text[1].double()], dim=2)
    there = None if mask is None else F.pad(mask, (grid.shape[1], 0), value=True)[:, None, None, :]
    exact = F.scaled_dot_product_attention(queries, keys, values, there).transpose(1, 2).flatten(2)
    assert error(found, exact) <= 2 * error(exact.to(grid.dtype), exact)


@pytest.mark.parametrize("laid", [torch.Tensor.contiguous, lambda text: text.mT.contiguous().mT])
def test_keys_of_a_text_may_have_any_strides(laid):
    """``torch.cat`` of two texts' keys puts one head after another."""
    grid, words = drawn(2, 35, 3 * 48, torch.float16), drawn(2, 6, 2 * 48, torch.float16)
    assert_attention_is_exact(grid, words, 3, laid=laid)


def test_attention_uses_large_tiles_if_all_of_them_fit(monkeypatch):
    """As with the published Stage C: small inputs never use them."""
    from wuerstchen.models.fused import attention_kernel

    started, kernel = [], attention_kernel._attend

    class Spy:
        def __getitem__(self, grid):
            def start(*inputs, **named):
                started.append(named["rows"])
                return kernel[grid](*inputs, **named)

            return start

    monkeypatch.setattr(attention_kernel, "_processors", lambda device: 2)
    monkeypatch.setattr(attention_kernel, "_attend", Spy())
    assert_attention_is_exact(drawn(1, 200, 3 * 32, torch.float16), drawn(1, 60, 2 * 32, torch.float16), 2)
    assert started == [128]

"""Stage B against diffusers' WuerstchenDiffNeXt with random weights, and the published size."""

import dataclasses

import pytest
import torch
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext import WuerstchenDiffNeXt

from wuerstchen.checkpoints.diffusers_config import shared_fields
from wuerstchen.errors import UserError
from wuerstchen.models.decoder import Decoder, DecoderConfig
from wuerstchen.models.layers import SelfAttnBlock, TimestepBlock, timestep_embedding

SMALL = DecoderConfig(
    c_r=16,
    c_cond=12,
    c_hidden=(8, 16, 24),
    nhead=(-1, 2, 3),
    blocks=(1, 2, 1),
    level_config=("CT", "CTA", "CTA"),
    inject_effnet=(False, True, True),
    effnet_embd=5,
    clip_embd=10,
)
CONFIGS = {
    "small": (SMALL, (16, 16), (3, 3)),
    "not square": (SMALL, (16, 32), (3, 6)),
    "conditioned at every level, odd timestep width": (
        dataclasses.replace(SMALL, inject_effnet=(True, True, True), c_r=9),
        (24, 16),
        (5, 3),
    ),
    "not conditioned": (dataclasses.replace(SMALL, inject_effnet=(False, False, False)), (16, 16), (3, 3)),
    "patch 1, kernel 5": (dataclasses.replace(SMALL, patch_size=1, kernel_size=5), (8, 12), (2, 3)),
    "patch 4, kernel 1, semantic latents larger than the grid": (
        dataclasses.replace(SMALL, patch_size=4, kernel_size=1),
        (16, 32),
        (9, 9),
    ),
    "attention on the finest level, one level": (
        dataclasses.replace(
            SMALL,
            c_hidden=(12,),
            nhead=(3,),
            blocks=(2,),
            level_config=("CTA",),
            inject_effnet=(True,),
        ),
        (6, 4),
        (3, 2),
    ),
    "other channels": (dataclasses.replace(SMALL, c_in=6, c_out=6), (16, 16), (1, 1)),
}


def make_pair(config: DecoderConfig, randomise):
    ours = randomise(Decoder(config)).eval()
    assert config.prediction == "noise"  # the only one in diffusers
    theirs = WuerstchenDiffNeXt(**shared_fields(config)).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def inputs(config: DecoderConfig, size, latent_size):
    return {
        "x": torch.randn(3, config.c_in, *size),
        "r": torch.tensor([1.0, 0.51, 0.003]),
        "semantic_latents": torch.randn(3, config.effnet_embd, *latent_size),
        "text": torch.randn(3, 7, config.clip_embd or 1),
    }


def predict(model: Decoder, x, r, semantic_latents, text):
    return model(x, r, model.context(semantic_latents, x.shape[2:], text))


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_equals_diffusers(name, randomise, relative_error):
    config, size, latent_size = CONFIGS[name]
    ours, theirs = make_pair(config, randomise)
    given = inputs(config, size, latent_size)
    with torch.no_grad():
        reference = theirs(given["x"], given["r"], effnet=given["semantic_latents"], clip=given["text"])
        assert relative_error(predict(ours, **given), reference) <= 1e-5


def test_affine_equals_diffusers(randomise, relative_error):
    ours, theirs = make_pair(SMALL, randomise)
    given = inputs(SMALL, (16, 16), (3, 3))
    with torch.no_grad():
        context = ours.context(given["semantic_latents"], (16, 16), given["text"])
        a, b = ours.affine(given["x"], given["r"], context)
        a_ref, b_ref = theirs(
            given["x"], given["r"], effnet=given["semantic_latents"], clip=given["text"], return_noise=False
        )
    assert relative_error(a, a_ref) <= 1e-5
    assert relative_error(b, b_ref) <= 1e-5


def test_gradients_equal_diffusers(randomise, relative_error, assert_same_gradients):
    """Including the gradient of the semantic latents, which trains the compressor."""
    ours, theirs = make_pair(SMALL, randomise)
    given = inputs(SMALL, (16, 24), (3, 4))
    direction = torch.randn(3, 4, 16, 24)
    latents = [given["semantic_latents"].clone().requires_grad_() for _ in range(2)]
    (predict(ours, **{**given, "semantic_latents": latents[0]}) * direction).sum().backward()
    (theirs(given["x"], given["r"], effnet=latents[1], clip=given["text"]) * direction).sum().backward()
    assert relative_error(latents[0].grad, latents[1].grad) <= 1e-4
    assert_same_gradients(ours, theirs)


def test_without_text():
    config = dataclasses.replace(SMALL, clip_embd=None, level_config=("CT", "CT", "CT"), nhead=(-1, -1, -1))
    model = Decoder(config)
    given = inputs(config, (16, 16), (3, 3))
    assert predict(model, **{**given, "text": None}).shape == given["x"].shape
    assert not any("clip_mapper" in name for name in model.state_dict())
    with pytest.raises(ValueError, match="takes no text"):
        model.context(given["semantic_latents"], (16, 16), given["text"])
    with pytest.raises(ValueError, match="needs text"):
        Decoder(SMALL).context(given["semantic_latents"], (16, 16))


def test_attention_without_text_is_that_of_torch(randomise):
    """Keys and values come from the grid alone. Catches a head split along the wrong axis, a missing norm."""
    block = randomise(SelfAttnBlock(12, 3)).double().eval()
    x = torch.randn(2, 5, 4, 12, dtype=torch.float64)
    attention = block.attention
    theirs = torch.nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64)
    projections = (attention.to_q, attention.to_k, attention.to_v)
    tokens = torch.nn.functional.layer_norm(x, (12,), eps=1e-6).flatten(1, 2)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([layer.weight for layer in projections]))
        theirs.in_proj_bias.copy_(torch.cat([layer.bias for layer in projections]))
        theirs.out_proj.load_state_dict(attention.to_out[0].state_dict())
        expected = x + theirs(tokens, tokens, tokens)[0].view_as(x)
        torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("cache_kv", [False, True])
def test_a_decoder_without_text_may_have_attention(cache_kv, randomise):
    """Each position then depends on all others, and no weight is for a text."""
    config = dataclasses.replace(SMALL, clip_embd=None)
    model = randomise(Decoder(config)).eval()
    names = model.state_dict().keys()
    assert any("attention.to_q" in name for name in names)
    assert not any("kv_mapper" in name or "clip_mapper" in name for name in names)
    given = inputs(config, (32, 32), (3, 3))
    x = given["x"].clone().requires_grad_()
    context = model.context(given["semantic_latents"], (32, 32), cache_kv=cache_kv)
    assert not context.texts
    model(x, given["r"], context)[0, :, 0, 0].sum().backward()
    assert (x.grad[0].abs().sum(0) > 0).all()
    assert (x.grad[1:] == 0).all()


def test_velocity_is_the_plain_output(randomise):
    model = randomise(Decoder(dataclasses.replace(SMALL, prediction="velocity"))).double().eval()
    given = {name: value.double() for name, value in inputs(SMALL, (16, 16), (3, 3)).items()}
    with torch.no_grad():
        found = predict(model, **given)
        context = model.context(given["semantic_latents"], (16, 16), given["text"])
        velocity = model.output(given["x"], given["r"], context)
    assert velocity.shape == given["x"].shape
    assert torch.equal(found, velocity)


def test_published_size(monkeypatch):
    # diffusers scales weights once per parent module, which takes half a minute.
    monkeypatch.setattr(WuerstchenDiffNeXt, "_init_weights", lambda *_: None)
    with torch.device("meta"):
        ours, theirs = Decoder(DecoderConfig()), WuerstchenDiffNeXt()
    assert sum(p.numel() for p in ours.parameters()) == 1_055_365_280
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    # The original fuses query, key and value: it has 814 entries for these 990.
    assert len(shapes) == 990
    assert DecoderConfig().size_multiple == 16


def test_starts_at_twice_the_input():
    """At initialisation a = 0 and b = 0.5, so ε̂ = 2x, as observed in the original."""
    given = inputs(SMALL, (16, 16), (3, 3))
    torch.testing.assert_close(predict(Decoder(SMALL), **given), 2 * given["x"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": (1, 2)}, r"blocks must have one entry for each of the 3 levels .* got \(1, 2\)"),
        ({"kernel_size": 2}, "kernel_size must be odd .*, got 2"),
        ({"blocks": (1, -1, 1)}, r"blocks must be at least 0 .*, got \(1, -1, 1\)"),
        ({"c_hidden": (8, 0, 8)}, r"c_hidden = \(8, 0, 8\). All must be at least 1"),
        ({"nhead": (-1, 0, 3)}, "nhead must be from 1 to the level's width 16, got 0"),
        ({"nhead": (-1, 17, 3)}, "nhead must be from 1 to the level's width 16, got 17"),
        ({"level_config": ("CT", "CTX", "CTA")}, "the letters C, T and A, got 'CTX'"),
        ({"c_out": 3}, "c_out must be c_in=4, or 1 .*, got 3"),
        ({"c_r": 3}, "c_r must be .* at least 4, got 3"),
        (
            {"dropout": (0.1, 0.2)},
            r"dropout must be one number, or one for each of the 3 .* got \(0.1, 0.2\)",
        ),
        ({"dropout": (0.1, 0.2, 1.5)}, "dropout must be from 0 to 1, got 1.5"),
        ({"effnet_embd": 0}, "effnet_embd must be at least 1, got 0"),
        ({"inject_effnet": (True, True)}, "must have one entry for each of the 3 levels"),
        ({"inject_effnet": (True,) * 100}, "must have one entry for each of the 3 levels"),
        ({"inject_effnet": (True, True, True, False)}, "gives level 2 the semantic latents on one way only"),
        ({"c_hidden": (8,) * 17}, "c_hidden must have at most 16 levels, got 17"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SMALL, **change)


def test_the_same_time_in_all_cells_is_the_time_of_the_image(randomise):
    ours = randomise(Decoder(SMALL)).eval().double()
    given = {name: tensor.double() for name, tensor in inputs(SMALL, (16, 32), (3, 6)).items()}
    expected = predict(ours, **given)
    given["r"] = given["r"].view(-1, 1, 1).expand(3, 16, 32)
    torch.testing.assert_close(predict(ours, **given), expected)


def test_a_position_of_a_level_has_the_time_of_its_noisiest_cell(randomise):
    """Known cells beside noised ones must not make these look known."""
    ours, seen = randomise(Decoder(SMALL)).eval(), {}
    given = inputs(SMALL, (16, 32), (3, 6)) | {"r": torch.rand(3, 16, 32)}
    for name, block in ours.named_modules():
        if isinstance(block, TimestepBlock):
            block.register_forward_pre_hook(lambda _, arguments, name=name: seen.update({name: arguments}))
    predict(ours, **given)
    assert len(seen) == 2 * sum(SMALL.blocks)
    for x, r_embed in seen.values():
        side = 16 // x.shape[1]
        noisiest = given["r"].reshape(3, 16 // side, side, 32 // side, side).amax((2, 4))
        assert side == 2 * 2 ** SMALL.c_hidden.index(x.shape[3])
        assert torch.equal(r_embed, timestep_embedding(noisiest, SMALL.c_r))


@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 32, 16), (3, 8, 16), (3, 16)])
def test_times_of_another_shape_are_refused(shape):
    """Those of a level, or of the semantic latents, have other cells."""
    given = inputs(SMALL, (16, 32), (3, 6)) | {"r": torch.rand(shape)}
    with pytest.raises(ValueError, match=r"\(3,\), or one per cell of the latents, \(3, 16, 32\)"):
        predict(Decoder(SMALL), **given)

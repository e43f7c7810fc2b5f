"""Stage B against diffusers' WuerstchenDiffNeXt with random weights, and the published size."""

import dataclasses

import pytest
import torch
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext import WuerstchenDiffNeXt

from wuerstchen.errors import UserError
from wuerstchen.models.decoder import Decoder, DecoderConfig

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
    "map at every level, odd timestep width": (
        dataclasses.replace(SMALL, inject_effnet=(True, True, True), c_r=9),
        (24, 16),
        (5, 3),
    ),
    "no map": (dataclasses.replace(SMALL, inject_effnet=(False, False, False)), (16, 16), (3, 3)),
    "patch 1, kernel 5": (dataclasses.replace(SMALL, patch_size=1, kernel_size=5), (8, 12), (2, 3)),
    "patch 4, kernel 1, map larger than the grid": (
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
    arguments = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
    assert arguments.pop("prediction") == "noise"  # all that diffusers knows
    theirs = WuerstchenDiffNeXt(**arguments).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def inputs(config: DecoderConfig, size, map_size):
    return {
        "x": torch.randn(3, config.c_in, *size),
        "r": torch.tensor([1.0, 0.51, 0.003]),
        "semantic_map": torch.randn(3, config.effnet_embd, *map_size),
        "text": torch.randn(3, 7, config.clip_embd or 1),
    }


def predict(model: Decoder, x, r, semantic_map, text):
    return model(x, r, model.context(semantic_map, x.shape[2:], text))


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_equals_diffusers(name, randomise, relative_error):
    config, size, map_size = CONFIGS[name]
    ours, theirs = make_pair(config, randomise)
    given = inputs(config, size, map_size)
    with torch.no_grad():
        reference = theirs(given["x"], given["r"], effnet=given["semantic_map"], clip=given["text"])
        assert relative_error(predict(ours, **given), reference) <= 1e-5


def test_affine_equals_diffusers(randomise, relative_error):
    ours, theirs = make_pair(SMALL, randomise)
    given = inputs(SMALL, (16, 16), (3, 3))
    with torch.no_grad():
        context = ours.context(given["semantic_map"], (16, 16), given["text"])
        a, b = ours.affine(given["x"], given["r"], context)
        a_ref, b_ref = theirs(
            given["x"], given["r"], effnet=given["semantic_map"], clip=given["text"], return_noise=False
        )
    assert relative_error(a, a_ref) <= 1e-5
    assert relative_error(b, b_ref) <= 1e-5


def test_gradients_equal_diffusers(randomise, relative_error, assert_same_gradients):
    """Also the gradient of the map, through which the compressor is trained."""
    ours, theirs = make_pair(SMALL, randomise)
    given = inputs(SMALL, (16, 24), (3, 4))
    direction = torch.randn(3, 4, 16, 24)
    maps = [given["semantic_map"].clone().requires_grad_() for _ in range(2)]
    (predict(ours, **{**given, "semantic_map": maps[0]}) * direction).sum().backward()
    (theirs(given["x"], given["r"], effnet=maps[1], clip=given["text"]) * direction).sum().backward()
    assert relative_error(maps[0].grad, maps[1].grad) <= 1e-4
    assert_same_gradients(ours, theirs)


def test_without_text():
    config = dataclasses.replace(SMALL, clip_embd=None, level_config=("CT", "CT", "CT"), nhead=(-1, -1, -1))
    model = Decoder(config)
    given = inputs(config, (16, 16), (3, 3))
    assert predict(model, **{**given, "text": None}).shape == given["x"].shape
    assert not any("clip_mapper" in name for name in model.state_dict())
    with pytest.raises(ValueError, match="takes no text"):
        model.context(given["semantic_map"], (16, 16), given["text"])
    with pytest.raises(ValueError, match="needs text"):
        Decoder(SMALL).context(given["semantic_map"], (16, 16))


def test_velocity_is_the_output_as_it_is(randomise):
    model = randomise(Decoder(dataclasses.replace(SMALL, prediction="velocity"))).double().eval()
    given = {name: value.double() for name, value in inputs(SMALL, (16, 16), (3, 3)).items()}
    with torch.no_grad():
        found = predict(model, **given)
        context = model.context(given["semantic_map"], (16, 16), given["text"])
        velocity = model.output(given["x"], given["r"], context)
    assert velocity.shape == given["x"].shape
    assert torch.equal(found, velocity)


def test_published_size():
    with torch.device("meta"):
        ours, theirs = Decoder(DecoderConfig()), WuerstchenDiffNeXt()
    assert sum(p.numel() for p in ours.parameters()) == 1_055_365_280
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    # The original fuses query, key and value: 990 entries here are 814 there.
    assert len(shapes) == 990
    assert DecoderConfig().size_multiple == 16


def test_starts_at_twice_the_input():
    """At initialisation a = 0 and b = 0.5, so ε̂ = 2x: spec of the original, seen by running it."""
    given = inputs(SMALL, (16, 16), (3, 3))
    torch.testing.assert_close(predict(Decoder(SMALL), **given), 2 * given["x"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": (1, 2)}, "blocks=.* must have one entry for each of the 3 levels"),
        ({"kernel_size": 2}, "kernel_size=2 has no centre; use an odd number"),
        ({"blocks": (1, -1, 1)}, r"blocks=\(1, -1, 1\) must be numbers of at least 0"),
        ({"c_hidden": (8, 0, 8)}, "widths and counts of at least 1"),
        ({"nhead": (-1, 0, 3)}, "nhead=0 must be from 1 to the level's width 16"),
        ({"nhead": (-1, 17, 3)}, "nhead=17 must be from 1 to the level's width 16"),
        ({"level_config": ("CT", "CTX", "CTA")}, "'CTX' may only have the letters C, T and A"),
        ({"clip_embd": None}, "clip_embd=None leaves attention without text"),
        ({"c_out": 3}, "c_out=3 must be c_in=4, or 1"),
        ({"c_r": 3}, "c_r=3 leaves no frequencies"),
        ({"dropout": (0.1, 0.2)}, r"dropout=\(0.1, 0.2\) must be one number, or one for each of the 3"),
        ({"dropout": (0.1, 0.2, 1.5)}, "dropout=1.5 must be from 0 to 1"),
        ({"effnet_embd": 0}, "effnet_embd=0 must be at least 1"),
        ({"inject_effnet": (True, True)}, "must have one entry for each of the 3 levels"),
        ({"inject_effnet": (True,) * 100}, "must have one entry for each of the 3 levels"),
        ({"inject_effnet": (True, True, True, False)}, "leaves level 2 without the semantic map on one way"),
        ({"c_hidden": (8,) * 17}, "c_hidden has 17 levels, over 16"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SMALL, **change)

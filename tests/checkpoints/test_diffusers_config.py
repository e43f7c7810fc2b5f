"""Random configurations: those that diffusers' classes accept and can run are read and give the same result.

``RANDOM_CONFIGURATIONS=300`` in the environment draws as many of each network.
"""

import json
import os
import random
import warnings
from collections import Counter

import pytest
import torch
from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext import WuerstchenDiffNeXt
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior import WuerstchenPrior

from wuerstchen.checkpoints.diffusers import read_network
from wuerstchen.errors import CheckpointError, UserNotice

COUNT = int(os.environ.get("RANDOM_CONFIGURATIONS", "20"))
SIZE = (2, 3)
"""Of the coarsest grid."""


def prior(draw: random.Random) -> dict:
    return {
        "c_in": draw.choice([1, 2, 3, 16]),
        "c": draw.choice([1, 7, 8, 12, 24]),
        "c_cond": draw.choice([1, 5, 8, 32]),
        "c_r": draw.choice([0, 1, 2, 3, *[4, 5, 8, 13] * 4]),
        "depth": draw.choice([-1, 0, 1, 1, 2, 3]),
        "nhead": draw.choice([-1, 0, 1, 1, 2, 2, 3, 3, 5, 8]),
        "dropout": draw.choice([0, 0.1, 0.5, 1, 1.0]),
    }


def decoder(draw: random.Random) -> dict:
    levels = draw.choice([1, 2, 2, 3, 4])

    def of_levels(entries: list) -> list:
        # diffusers accepts a list that is too long.
        return [draw.choice(entries) for _ in range(levels + draw.choice([0, 0, 0, 0, 1, 2]))]

    kinds = ["CT", "CTA", "CTA", "C", "CA", "CAT", "CC", "TC", "AC", "T", "A", "TA", "", ["C", "T", "A"]]
    inject = of_levels([True, False, 0, 1])
    if draw.random() < 0.4:
        inject = [draw.choice([True, False])] * len(inject)
    c_in = draw.choice([1, 2, 3, 4, 8])
    config = {
        "c_in": c_in,
        "c_out": draw.choice([c_in] * 10 + [1, 4]),
        "c_r": draw.choice([0, 1, 2, *[4, 5, 8, 13] * 4]),
        "patch_size": draw.choice([1, 2, 2, 3]),
        "c_cond": draw.choice([1, 5, 8, 16]),
        "c_hidden": [draw.choice([1, 4, 8, 12, 20]) for _ in range(levels)],
        "nhead": of_levels([-1, 0, 1, 1, 1, 2, 2, 3, 5, None]),
        "blocks": of_levels([-1, 0, 1, 1, 1, 2]),
        "level_config": of_levels(kinds),
        "inject_effnet": inject,
        "effnet_embd": draw.choice([1, 3, 16]) if any(inject) else draw.choice([0, 16, None]),
        "clip_embd": draw.choice([1, 6, 20]),
        "kernel_size": draw.choice([1, 3, 3, 3, 3, 5, 5, 7, 2]),
        "dropout": draw.choice([0, 0.1, 1.0, of_levels([0.0, 0.2])]),
    }
    # Most configurations that cannot run have attention without heads.
    config["nhead"] = [
        draw.choice([1, 2, 3]) if "A" in kinds and draw.random() < 0.9 else heads
        for heads, kinds in zip(config["nhead"], config["level_config"], strict=False)
    ] + config["nhead"][len(config["level_config"]) :]
    return config


def vqgan(draw: random.Random) -> dict:
    return {
        "in_channels": draw.choice([1, 3, 4]),
        "out_channels": draw.choice([1, 3, 4]),
        "up_down_scale_factor": draw.choice([1, 2, 3]),
        "levels": draw.choice([1, 2, 2, 3, 4]),
        "bottleneck_blocks": draw.choice([-1, 0, 1, 2]),
        "embed_dim": draw.choice([1, 5, 8, 9, 24]),
        "latent_channels": draw.choice([1, 3, 4, 8]),
        "num_vq_embeddings": draw.choice([1, 2, 16]),
        "scale_factor": draw.choice([0.3764, 1, -2.5]),
    }


def latents_of(config: dict, channels: int) -> torch.Tensor:
    factor = config.get("patch_size", 1) * 2 ** (len(config.get("c_hidden", [0])) - 1)
    return torch.randn(2, channels, factor * SIZE[0], factor * SIZE[1], dtype=torch.float64)


def run_prior(network, config):
    x, r, text = latents_of(config, config["c_in"]), torch.tensor([0.9, 0.1]).double(), torch.randn(2, 3, 32)
    text = text[:, :, : config["c_cond"]].double()
    theirs = isinstance(network, WuerstchenPrior)
    return network(x, r, text) if theirs else network(x, r, network.context(text))


def run_decoder(network, config):
    x, r = latents_of(config, config["c_in"]), torch.tensor([0.9, 0.1]).double()
    channels = (config["effnet_embd"] or 0) if any(config["inject_effnet"]) else 5
    semantic, text = torch.randn(2, channels, 3, 2), torch.randn(2, 3, config["clip_embd"])
    semantic, text = semantic.double(), text.double()
    if isinstance(network, WuerstchenDiffNeXt):
        return network(x, r, semantic, text)
    return network(x, r, network.context(semantic, x.shape[2:], text))


def run_vqgan(network, config):
    side = config["up_down_scale_factor"] * 2 ** (config["levels"] - 1) * 2
    z = latents_of(config, config["latent_channels"])
    pixels = torch.randn(2, config["in_channels"], side, side, dtype=torch.float64)
    scale = config["scale_factor"]
    if isinstance(network, PaellaVQModel):
        return torch.cat(
            [network.decode(scale * z).sample.flatten(), network.encode(pixels).latents.flatten()]
        )
    return torch.cat([network.decode(z).flatten(), scale * network.encode(pixels).flatten()])


NETWORKS = {
    "prior": (WuerstchenPrior, prior, run_prior, ("out",)),
    "decoder": (WuerstchenDiffNeXt, decoder, run_decoder, ("clf",)),
    "vqgan": (PaellaVQModel, vqgan, run_vqgan, ()),
}
WELL_KNOWN = {
    # With c_in=1, one channel of noise becomes four by broadcasting, and the second step fails.
    "noise of more channels": lambda config: config.get("c_in") == 1 and config.get("c_out", 1) > 1,
}


def outcome(part: str, seed: int, folder, randomise, relative_error) -> str:
    """Tests a random configuration and returns the outcome. Fails if the results differ."""
    kind, make, run, last = NETWORKS[part]
    config = make(random.Random(seed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensors without elements, which torch initialises in vain
        try:
            network = randomise(kind(**config).double().eval())
        except Exception:
            return "diffusers refuses it"
        with torch.no_grad():
            for name, tensor in network.named_parameters():
                # Keep the divisor away from 0, where rounding errors are unbounded.
                tensor.mul_(0.1 if name.startswith(last) else 1.0)
            network.save_pretrained(folder)
            stored = json.loads((folder / "config.json").read_text())
            assert {name: stored[name] for name in config} == config
            torch.manual_seed(seed)
            try:
                expected = run(network, config)
            except Exception:
                expected = None
        if expected is None or any(known(config) for known in WELL_KNOWN.values()):
            with pytest.raises(CheckpointError) as raised:
                read_network(folder, part)
            assert "is not a valid configuration" not in str(raised.value), config
            return "diffusers cannot run it, and it is refused"
    ours = read_network(folder, part, dtype=torch.float64)
    torch.manual_seed(seed)
    with torch.no_grad():
        result = run(ours, config)
    # diffusers always resizes the semantic latents in fp32.
    if float(expected.norm()) or float(result.norm()):
        assert relative_error(result, expected) < (1e-5 if part == "decoder" else 1e-9), config
    return "equal"


@pytest.mark.parametrize("part", NETWORKS)
def test_reads_what_diffusers_accepts(part, tmp_path, randomise, relative_error):
    outcomes = Counter(
        outcome(part, seed, tmp_path / str(seed), randomise, relative_error) for seed in range(COUNT)
    )
    print(part, dict(outcomes))
    assert outcomes["equal"] > COUNT / 4, outcomes


def test_fields_that_diffusers_does_not_know_are_named_and_ignored(tmp_path, randomise):
    config = {"c_in": 2, "c": 8, "c_cond": 8, "c_r": 8, "depth": 1, "nhead": 2}
    network = randomise(WuerstchenPrior(**config))
    network.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"self_attn": True, "factor": [4]}))
    with pytest.warns(UserNotice, match=r"config\.json has fields .* ignored: 'factor', 'self_attn'$"):
        ours = read_network(tmp_path, "prior")
    assert torch.equal(ours.projection.weight, network.projection.weight)

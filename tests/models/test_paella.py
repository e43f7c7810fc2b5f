"""Stage B of v1 against a second implementation on the original's fused weights, and its published size.

diffusers never had this network, so the reference is here: plain operations on channels-first tensors.
"""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from wuerstchen.diffusion.samplers import guided
from wuerstchen.diffusion.schedule import uniform_timesteps
from wuerstchen.diffusion.tokens import draw_tokens, sample_tokens
from wuerstchen.errors import UserError
from wuerstchen.models.paella import Paella, PaellaConfig

SMALL = PaellaConfig(
    num_labels=11,
    c_token=6,
    c_r=16,
    c_cond=12,
    c_hidden=(8, 16, 24),
    nhead=(-1, 2, 3),
    blocks=(2, 2, 1),
    level_config=("CT", "CTA", "CTA"),
    effnet_embd=5,
    clip_embd=10,
)
CONFIGS = {
    "small": (SMALL, (16, 16), (3, 3)),
    "not square, odd timestep width": (dataclasses.replace(SMALL, c_r=9), (16, 32), (3, 6)),
    "patch 1, two levels": (
        dataclasses.replace(
            SMALL, patch_size=1, c_hidden=(8, 12), nhead=(-1, 3), blocks=(1, 3), level_config=("CT", "CA")
        ),
        (8, 6),
        (2, 3),
    ),
    "attention on the finest level, one level": (
        dataclasses.replace(SMALL, c_hidden=(12,), nhead=(3,), blocks=(2,), level_config=("CTA",)),
        (4, 6),
        (1, 1),
    ),
}


def original_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights as in the original's files: query, key and value in one matrix."""
    named = {}
    for name, tensor in weights.items():
        block, attention, rest = name.partition("attention.to_")
        if not attention:
            named[name] = tensor
        elif rest.startswith("q."):
            kind = rest.removeprefix("q.")
            parts = [weights[f"{block}attention.to_{letter}.{kind}"] for letter in "qkv"]
            named[f"{block}attention.attn.in_proj_{kind}"] = torch.cat(parts)
        elif rest.startswith("out.0."):
            named[f"{block}attention.attn.out_proj.{rest.removeprefix('out.0.')}"] = tensor
    return named


def norm_of_channels(x):
    mean, variance = x.mean(dim=1, keepdim=True), x.var(dim=1, unbiased=False, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt()


def reference_mlp(w, name, x):
    hidden = F.gelu(F.conv2d(x, w[f"{name}.0.weight"][:, :, None, None], w[f"{name}.0.bias"]))
    size = hidden.square().sum(dim=(2, 3), keepdim=True).sqrt()
    relative = size / (size.mean(dim=1, keepdim=True) + 1e-6)
    gamma, beta = (w[f"{name}.2.{part}"].flatten()[:, None, None] for part in ("gamma", "beta"))
    hidden = gamma * (hidden * relative) + beta + hidden
    return F.conv2d(hidden, w[f"{name}.4.weight"][:, :, None, None], w[f"{name}.4.bias"])


def reference_res_block(w, name, x, skip):
    """Output channel g reads channels 2g and 2g + 1 of x and the skip, or without a skip channel g of x."""
    kernel, bias = w[f"{name}.depthwise.weight"], w[f"{name}.depthwise.bias"]
    joined = x if skip is None else torch.cat([x, skip], dim=1)
    per_group = joined.shape[1] // x.shape[1]
    inner = bias[:, None, None]
    for i in range(per_group):
        inner = inner + F.conv2d(joined[:, i::per_group], kernel[:, i : i + 1], padding=1, groups=x.shape[1])
    return x + reference_mlp(w, f"{name}.channelwise", norm_of_channels(inner))


def reference_attention(w, name, x, sequence, heads):
    batch, c, height, width = x.shape
    own = norm_of_channels(x).flatten(2).permute(2, 0, 1)
    other = F.linear(F.silu(sequence), w[f"{name}.kv_mapper.1.weight"], w[f"{name}.kv_mapper.1.bias"])
    both = torch.cat([own, other.transpose(0, 1)])
    attended, _ = F.multi_head_attention_forward(
        own,
        both,
        both,
        c,
        heads,
        w[f"{name}.attention.attn.in_proj_weight"],
        w[f"{name}.attention.attn.in_proj_bias"],
        None,
        None,
        False,
        0.0,
        w[f"{name}.attention.attn.out_proj.weight"],
        w[f"{name}.attention.attn.out_proj.bias"],
        need_weights=False,
    )
    return x + attended.permute(1, 2, 0).reshape(batch, c, height, width)


def reference(w, config, tokens, r, semantic_latents, text):
    """Logits from weights ``w`` under the original's names."""

    def layer(name):
        return w[f"{name}.weight"], w[f"{name}.bias"]

    latent_tokens = semantic_latents.flatten(2).transpose(1, 2)
    sequence = torch.cat(
        [
            F.linear(latent_tokens, *layer("effnet_mapper")),
            F.linear(text, *layer("byt5_mapper")),
        ],
        dim=1,
    )
    sequence = norm_of_channels(sequence.transpose(1, 2)).transpose(1, 2)
    half = config.c_r // 2
    frequencies = (torch.arange(half).float() * (-math.log(10_000) / (half - 1))).exp()
    angles = (r * 10_000)[:, None] * frequencies
    r_embed = F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, config.c_r % 2))

    def level(x, name, i, skip, *, descend, ascend):
        number = 0
        if descend:
            x = F.conv2d(norm_of_channels(x), *layer(f"{name}.0.1"), stride=2)
            number = 1
        for kind in config.level_config[i] * config.blocks[i]:
            block = f"{name}.{number}"
            if kind == "C":
                x = reference_res_block(w, block, x, skip)
                skip = None
            elif kind == "T":
                scale, shift = F.linear(r_embed, *layer(f"{block}.mapper"))[:, :, None, None].chunk(2, dim=1)
                x = x * (1 + scale) + shift
            else:
                x = reference_attention(w, block, x, sequence, config.nhead[i])
            number += 1
        if ascend:
            x = F.conv_transpose2d(norm_of_channels(x), *layer(f"{name}.{number}.1"), stride=2)
        return x

    x = norm_of_channels(w["in_mapper.0.weight"][tokens].permute(0, 3, 1, 2))
    x = F.pixel_unshuffle(x, config.patch_size)
    x = norm_of_channels(F.conv2d(x, *layer("embedding.1")))
    levels = len(config.c_hidden)
    outputs = []
    for i in range(levels):
        x = level(x, f"down_blocks.{i}", i, None, descend=i > 0, ascend=False)
        outputs.append(x)
    for i in reversed(range(levels)):
        skip = outputs[i] if i < levels - 1 else None
        x = level(x, f"up_blocks.{levels - 1 - i}", i, skip, descend=False, ascend=i > 0)
    x = F.conv2d(norm_of_channels(x), *layer("clf.1"))
    x = norm_of_channels(F.pixel_shuffle(x, config.patch_size))
    return F.conv2d(x, w["out_mapper.1.weight"])


def inputs(config: PaellaConfig, size, latent_size, dtype=torch.float32):
    return {
        "tokens": torch.randint(config.num_labels, (3, *size)),
        "r": torch.tensor([1.0, 0.51, 0.003], dtype=dtype),
        "semantic_latents": torch.randn(3, config.effnet_embd, *latent_size, dtype=dtype),
        "text": torch.randn(3, 7, config.clip_embd, dtype=dtype),
    }


def predict(model: Paella, tokens, r, semantic_latents, text):
    return model(tokens, r, model.context(semantic_latents, text))


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_equals_the_reference(name, randomise, relative_error):
    config, size, latent_size = CONFIGS[name]
    model = randomise(Paella(config)).eval()
    given = inputs(config, size, latent_size)
    exact = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
    with torch.no_grad():
        logits = predict(model, **given)
        exact_logits = predict(model.double(), **exact)
        expected = reference(original_names(model.state_dict()), config, **exact)
    assert logits.shape == expected.shape == (3, config.num_labels, *size)
    assert logits.permute(0, 2, 3, 1).is_contiguous()
    assert relative_error(exact_logits, expected) <= 1e-10
    # The sine amplifies the smallest rounding of r · 10000, in any precision.
    fp32 = reference(original_names(model.float().state_dict()), config, **given)
    assert relative_error(logits, fp32) <= 1e-5


def test_gradients_equal_the_reference(randomise):
    """Including the gradient of the semantic latents, which trained the compressor."""
    model = randomise(Paella(SMALL)).double().eval()
    given = inputs(SMALL, (16, 24), (3, 4), torch.float64)
    given["semantic_latents"].requires_grad_()
    leaves = [*model.parameters(), given["semantic_latents"]]
    direction = torch.randn(3, SMALL.num_labels, 16, 24, dtype=torch.float64)
    ours = torch.autograd.grad((predict(model, **given) * direction).sum(), leaves)
    weights = original_names(dict(model.named_parameters()))
    theirs = torch.autograd.grad((reference(weights, SMALL, **given) * direction).sum(), leaves)
    total = torch.stack([gradient.norm() for gradient in theirs]).norm()
    for gradient, expected in zip(ours, theirs, strict=True):
        assert (gradient - expected).norm() <= 1e-9 * expected.norm() + 1e-13 * total


def test_guided_sampling_equals_the_reference(randomise):
    """Eight guided steps with both networks: every sampled token is the same."""
    model = randomise(Paella(SMALL)).double().eval()
    given = inputs(SMALL, (8, 16), (2, 3), torch.float64)
    latents = torch.cat([given["semantic_latents"], torch.zeros_like(given["semantic_latents"])])
    texts = torch.cat([given["text"], torch.randn_like(given["text"])])
    weights = original_names(model.state_dict())

    def both(x, t):
        logits = [
            reference(weights, SMALL, x, t.double(), latents[part], texts[part])
            for part in (slice(3), slice(3, 6))
        ]
        return 2.0 * logits[0] - logits[1]

    def run(network):
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2, 3)]
        noise = draw_tokens((8, 16), SMALL.num_labels, generators)
        return sample_tokens(network, noise, uniform_timesteps(8), generators)

    with torch.no_grad():
        context = model.context(latents, texts)
        sample = run(guided(lambda x, t: model(x, t.double(), context), 2.0))
        assert torch.equal(sample, run(both))


def test_context_serves_every_step(randomise):
    """The keys and values must not depend on the step they were computed at."""
    model = randomise(Paella(SMALL)).eval()
    given = inputs(SMALL, (8, 8), (3, 3))
    with torch.no_grad():
        context = model.context(given["semantic_latents"], given["text"])
        first = model(given["tokens"], torch.full((3,), 0.9), context)
        model(given["tokens"].flip(1), torch.full((3,), 0.1), context)
        assert torch.equal(first, model(given["tokens"], torch.full((3,), 0.9), context))


def test_half_precision_keeps_the_time_exact(randomise, relative_error):
    """The sampler's times stay fp32 with bf16 weights: in bf16 t·10000 would be off by dozens."""
    model = randomise(Paella(SMALL)).eval()
    given = inputs(SMALL, (8, 8), (3, 3))
    with torch.no_grad():
        exact = predict(model, **given)
        model.bfloat16()
        half = {k: v.bfloat16() if k in ("semantic_latents", "text") else v for k, v in given.items()}
        logits = predict(model, **half)
    assert logits.dtype == torch.bfloat16
    assert relative_error(logits, exact) <= 0.1


def test_published_size():
    with torch.device("meta"):
        model = Paella(PaellaConfig())
    assert sum(p.numel() for p in model.parameters()) == 730_814_336
    state = model.state_dict()
    names = original_names(state)
    assert len(state) == 738
    assert len(names) == 610
    assert names["in_mapper.0.weight"].shape == (8192, 256)
    assert names["out_mapper.1.weight"].shape == (8192, 256, 1, 1)
    assert names["byt5_mapper.weight"].shape == (1024, 1024)
    # The skips enter the first block of the two finer levels, two channels per group.
    grouped = {n: w.shape for n, w in names.items() if n.endswith("depthwise.weight") and w.shape[1] == 2}
    assert grouped == {
        "up_blocks.1.0.depthwise.weight": (1280, 2, 3, 3),
        "up_blocks.2.0.depthwise.weight": (640, 2, 3, 3),
    }
    assert names["down_blocks.1.0.1.weight"].shape == (1280, 640, 2, 2)
    assert names["up_blocks.1.36.1.weight"].shape == (1280, 640, 2, 2)
    assert names["up_blocks.0.2.attention.attn.in_proj_weight"].shape == (3840, 1280)
    assert PaellaConfig().size_multiple == 8


def test_starts_with_equal_probabilities():
    """At initialisation every logit is exactly 0, so the cross entropy is ln(labels)."""
    model = Paella(dataclasses.replace(SMALL, num_labels=8192))
    given = inputs(model.config, (8, 8), (3, 3))
    logits = predict(model, **given)
    assert not logits.any()
    assert F.cross_entropy(logits, given["tokens"]).item() == pytest.approx(9.0109, abs=1e-4)


def test_initial_spread_follows_the_original():
    config = dataclasses.replace(SMALL, num_labels=400, c_token=64, c_hidden=(8, 64, 64), nhead=(-1, 4, 4))
    model = Paella(config)
    bound = (6 / (4 * 64)) ** 0.5
    query = model.down_blocks[1][3].attention.to_q.weight
    assert 0.95 * bound < query.abs().max() <= bound
    last = model.up_blocks[0][0].channelwise[-1].weight
    assert 0.95 < last.abs().max() / ((6 / (5 * 64)) ** 0.5 / 5**0.5) <= 1  # 2 + 2 + 1 blocks
    for mapper in (model.byt5_mapper, model.effnet_mapper):
        assert mapper.weight.std().item() == pytest.approx(0.02, rel=0.25)
    tokens, patches = model.in_mapper[0].weight, model.embedding[1].weight
    assert tokens.std().item() == pytest.approx(400**-0.5, rel=0.05)
    assert 0.95 < patches.abs().max() / (0.02 * (6 / (4 * 64 + 8)) ** 0.5) <= 1
    # A copy of the embedding, not the embedding: each is trained on its own.
    logits = model.out_mapper[1].weight
    assert torch.equal(logits[:, :, 0, 0], tokens)
    assert logits.data_ptr() != tokens.data_ptr()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": (1, 2)}, r"blocks must have one entry for each of the 3 levels .* got \(1, 2\)"),
        ({"num_labels": 0}, r"patch_size, c_cond = \(0, .* All must be at least 1"),
        ({"c_hidden": ()}, r"c_hidden = \(\), .* All must be at least 1"),
        ({"c_r": 3}, "c_r must be at least 4, got 3"),
        ({"nhead": (-1, 3, 3)}, "nhead must divide the level's width 16, got 3"),
        ({"level_config": ("TC", "CTA", "CTA")}, "must start with C, got 'TC'"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SMALL, **change)

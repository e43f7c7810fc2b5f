"""The paper's recipes: shapes, sizes and lengths, and their scaled versions."""

import dataclasses

import pytest
import torch

from wuerstchen.cli import main
from wuerstchen.errors import UserError
from wuerstchen.models.compressor import Compressor, compressor_input, latent_side
from wuerstchen.models.decoder import Decoder
from wuerstchen.models.prior import Prior
from wuerstchen.models.vqgan import VQGAN, Discriminator
from wuerstchen.recipes import RECIPES
from wuerstchen.recipes.mini import mini
from wuerstchen.recipes.scale import scaled
from wuerstchen.recipes.tiny import tiny
from wuerstchen.recipes.v1 import v1_stage_c
from wuerstchen.recipes.v2 import v2, v2_finetune, v2_finetune_2048, v2_stage_a, v2_stage_b, v2_stage_c
from wuerstchen.train.config import phases_of
from wuerstchen.train.feed.images import batch_sizes


def size_of(network):
    return sum(parameter.numel() for parameter in network.parameters())


def test_v2_has_the_published_networks():
    recipe = v2()
    with torch.device("meta"):
        assert size_of(VQGAN(recipe.vqgan)) == 18_406_894
        assert size_of(Compressor(recipe.compressor)) == 20_198_000
        assert size_of(Decoder(recipe.decoder)) == 1_055_365_280
        assert size_of(Prior(recipe.prior)) == 993_636_896
        config = recipe.stage_a
        assert size_of(Discriminator(3, config.discriminator_width, config.discriminator_depth)) == 6_271_105
    for stage in (v2_stage_a(), v2_stage_b(), v2_stage_c(), v2_finetune(), v2_finetune_2048()):
        for part in ("vqgan", "compressor", "decoder", "prior"):
            assert getattr(stage, part) == getattr(recipe, part)


def test_v1_has_the_published_networks():
    with torch.device("meta"):
        assert size_of(Prior(v1_stage_c().prior)) == 993_243_680
        assert size_of(Compressor(v1_stage_c().compressor)) == 117_254_784


def test_stage_c_is_trained_on_the_papers_sizes():
    recipe = v2_stage_c()
    found = []
    for phase in phases_of(recipe.stage_c):
        maps = []
        for width, height in batch_sizes(phase.image_size or recipe.image_size, phase.max_ratio):
            with torch.device("meta"):
                view = compressor_input(torch.zeros(1, 3, height, width))
            maps.append((view.shape[3], view.shape[2]))
        found.append((phase.optimization.images // phase.optimization.batch_size, sorted(maps)))
    assert found == [
        (500_000, [(384, 384)]),
        (364_000, [(768, 768)]),
        (4_000, [(768, 768), (768, 1280), (1280, 768)]),
        (50_000, [(768, 768)]),
    ]
    assert [latent_side(side) for side in (384, 768, 1280)] == [12, 24, 40]
    seen = sum(phase.optimization.images for phase in phases_of(recipe.stage_c))
    assert seen == recipe.stage_c.images == 1_349_376_000


def test_stage_b_is_trained_at_512_and_1024():
    found = [(p.image_size or 1024, p.optimization.images) for p in phases_of(v2_stage_b().stage_b)]
    assert found == [(512, 457_000 * 512), (1024, 300_000 * 128)]


def test_only_published_weights_attend_to_padding():
    for make in RECIPES.values():
        recipe = make()
        published = recipe.start_from and not recipe.start_from.startswith(("runs/", "bundled"))
        assert recipe.text_positions == ("all" if published else "real"), recipe.name


@pytest.mark.parametrize(("width", "depth"), [(0.5, 0.5), (0.25, 1.0), (1.0, 0.1), (0.01, 0.01)])
@pytest.mark.parametrize("make", [v2, mini, tiny])
def test_smaller_networks_keep_the_channels_of_a_head(make, width, depth):
    full = make()
    small = scaled(full, width, depth)
    with torch.device("meta"):
        for network, part in ((Prior, "prior"), (Decoder, "decoder"), (VQGAN, "vqgan")):
            before, after = size_of(network(getattr(full, part))), size_of(network(getattr(small, part)))
            assert after <= before
    assert small.prior.c // small.prior.nhead == full.prior.c // full.prior.nhead
    assert small.prior.depth == max(1, round(full.prior.depth * depth))
    levels = zip(
        full.decoder.c_hidden, full.decoder.nhead, small.decoder.c_hidden, small.decoder.nhead, strict=True
    )
    for wide, many, narrow, few in levels:
        assert narrow <= wide
        assert (few == many == -1) or narrow // few == wide // many
    assert small.compressor == full.compressor
    assert small.stage_c == full.stage_c


def test_half_the_width_is_a_quarter_of_the_prior():
    with torch.device("meta"):
        half = size_of(Prior(scaled(v2(), 0.5).prior))
        assert half / size_of(Prior(v2().prior)) == pytest.approx(0.25, abs=0.01)


def test_only_stages_that_are_trained_are_scaled():
    small = scaled(v2_stage_c(), 0.5, 0.5)
    assert small.decoder == v2().decoder
    assert small.vqgan == v2().vqgan
    assert small.prior.c == 768


@pytest.mark.parametrize("factor", [0.0, -1.0, 1.5, float("nan")])
def test_factors_outside_of_0_to_1_are_refused(factor):
    with pytest.raises(UserError, match=r"--width must be above 0 and at most 1, got"):
        scaled(v2(), width=factor)
    with pytest.raises(UserError, match=r"--depth must be above 0 and at most 1, got"):
        scaled(v2(), depth=factor)


def test_weights_have_a_shape_already(tmp_path, capsys):
    with pytest.raises(UserError, match=r"cannot change Stage C, which starts from the weights of warp-ai"):
        scaled(v2_finetune(), 0.5)
    scaled(dataclasses.replace(v2_finetune(), fresh=("c",)), 0.5)
    run = ["train", "v2-finetune", "--width", "0.5", "--run-dir", str(tmp_path / "run")]
    assert main(run) == 2
    assert "Leave them out, or use --fresh c" in capsys.readouterr().err
    assert main(["train", "tiny", "--depth", "2"]) == 2
    assert "--depth must be above 0 and at most 1, got 2.0" in capsys.readouterr().err


def test_a_smaller_recipe_by_options(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr("wuerstchen.train.run.train", lambda recipe, *_, **__: found.append(recipe))
    main(["train", "v2", "--width", "0.5", "--depth", "0.25", "--prior.depth", "3", "--seed", "7"])
    (recipe,) = found
    assert (recipe.prior.c, recipe.prior.nhead, recipe.prior.depth) == (768, 12, 3)  # what is named holds
    assert recipe.decoder.blocks == (1, 1, 4, 1)
    assert recipe.seed == 7


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("prior", {"c_r": 1}, r"prior\.c_r must be at least 4 to train, got 1"),
        ("decoder", {"c_r": 0}, r"decoder\.c_r must be at least 4 to train, got 0"),
        ("prior", {"dropout": 1.0}, r"prior\.dropout must be below 1 to train, got 1\.0"),
        (
            "decoder",
            {"dropout": (0.0, 0.5, 0.0, 1.0)},
            r"decoder\.dropout must be below 1 to train, got \(.*\)",
        ),
    ],
)
def test_networks_that_can_sample_but_not_train_are_refused(part, change, message):
    """Models of others may be like this."""
    network = dataclasses.replace(getattr(v2(), part), **change)
    with pytest.raises(UserError, match=message):
        dataclasses.replace(v2(), **{part: network})

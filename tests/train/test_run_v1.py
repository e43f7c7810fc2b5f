"""A whole run of v1, tiny: from nothing to a picture, done again in part, and what it refuses."""

import argparse
import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from wuerstchen.checkpoints.native import read_cascade
from wuerstchen.cli import main
from wuerstchen.cli.train import overridden
from wuerstchen.errors import RunFolderError, UserError
from wuerstchen.models.compressor import Compressor
from wuerstchen.models.decoder import DecoderConfig
from wuerstchen.models.paella import Paella, PaellaConfig
from wuerstchen.models.prior import Prior
from wuerstchen.recipes.scale import scaled
from wuerstchen.recipes.tiny import tiny
from wuerstchen.recipes.v1 import v1_stage_b, v1_stage_c
from wuerstchen.train import run, run_phase
from wuerstchen.train.config import as_dict, differing_fields
from wuerstchen.train.engine.checkpoint import newest, read_averages
from wuerstchen.train.engine.loop import Trainer
from wuerstchen.train.stages.paella import StagePaella

from ..configurations import with_optimization

PAELLA = PaellaConfig(
    num_labels=256,
    c_token=16,
    c_cond=32,
    c_hidden=(16, 32),
    nhead=(-1, 2),
    blocks=(1, 1),
    level_config=("CT", "CTA"),
    clip_embd=384,
)


def recipe(data="sample", **changes):
    full = tiny()

    def short(stage, **more):
        return dataclasses.replace(with_optimization(stage, images=16, batch_size=4, warmup=0), **more)

    given = {
        "data": str(data),
        "vqgan": dataclasses.replace(full.vqgan, embed_dim=16),
        "decoder": PAELLA,
        "stage_a": short(full.stage_a, adversarial_from=4),
        "stage_b": short(full.stage_b, refine_images=8),
        "stage_c": short(full.stage_c),
        "statistics_images": 16,
        "prior_steps": 2,
        "decoder_steps": 2,
        "preview_prompts": ("cat",),
        "workers": 0,
        "log_every": 1,
        "checkpoint_seconds": 0.0,
        **changes,
    }
    return dataclasses.replace(full, **given)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Enough images for some of them to be held out."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for n in range(200):
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"picture {n}")
    return folder


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The run folder, and the stages as the loop got them."""
    folder = tmp_path_factory.mktemp("runs") / "v1"
    stages = {}
    with pytest.MonkeyPatch.context() as patch:

        def noting(job):
            stages[job.stage.name] = job.stage
            return Trainer(job)

        patch.setattr(run_phase, "Trainer", noting)
        run.train(recipe(data), folder, device="cpu")
    return folder, stages


def events(folder, kind, stage):
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["event"] == kind and e.get("stage") == stage]


def test_the_log_has_loss_accuracy_and_validation_by_time(finished):
    folder, _ = finished
    first = events(folder, "progress", "b")[0]["loss"]
    assert first == pytest.approx(np.log(256), abs=1e-3)  # all tokens are as likely
    assert events(folder, "progress", "b2")[0]["loss"] < first
    for stage in ("b", "b2"):
        progress = events(folder, "progress", stage)
        assert all(0 <= event["accuracy"] <= 1 for event in progress)
        bins = events(folder, "validation", stage)[-1]["bins"]
        assert len(bins) == 8
        assert all(0 < value < 2 * np.log(256) for value in bins)
        assert list((folder / f"stage_{stage}" / "previews").glob("*.png"))


def test_the_labels_are_those_of_the_averaged_stage_a(finished):
    folder, stages = finished
    checkpoint, _ = newest(folder / "stage_a" / "checkpoints")
    averaged = read_averages(checkpoint, "vqgan")
    trained = stages["a"].vqgan.state_dict()
    model = read_cascade(folder / "model").vqgan.state_dict()
    for stage in ("b", "b2"):
        assert isinstance(stages["b"], StagePaella)
        ours = stages[stage].vqgan.state_dict()
        assert all(torch.equal(ours[key], value) for key, value in averaged.items())
        assert all(torch.equal(ours[key], value) for key, value in model.items())
        assert not torch.equal(ours["vquantizer.embedding.weight"], trained["vquantizer.embedding.weight"])
        assert not stages[stage].vqgan.training


def test_the_model_draws(finished, tmp_path, monkeypatch):
    folder, _ = finished
    cascade = read_cascade(folder / "model")
    assert isinstance(cascade.decoder, Paella)
    assert cascade.settings.prior_equal_steps
    assert cascade.decoder.config == PAELLA
    out = tmp_path / "cat.png"
    command = ["generate", "a cat", "--model", str(folder / "model"), "--out", str(out), "--device", "cpu"]
    assert main(command) == 0
    with Image.open(out) as picture:
        assert picture.size == (128, 128)


@pytest.mark.slow
def test_the_end_done_again_gives_the_same_bits(finished, data, tmp_path):
    folder, _ = finished
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    shutil.rmtree(again / "model")
    shutil.rmtree(again / "stage_c")
    for stage in ("b", "b2"):
        shutil.rmtree(max((again / f"stage_{stage}" / "checkpoints").glob("[0-9]*")))
    run.train(recipe(data), again, device="cpu")
    for name in ("decoder", "compressor", "previewer", "prior"):
        path = f"model/{name}.safetensors"
        assert (again / path).read_bytes() == (folder / path).read_bytes(), name


@pytest.mark.slow
def test_stage_b_alone_on_a_stage_a_that_is_there(finished, data, tmp_path, capsys):
    """As the recipe for the published size does it: from a whole model, of which Stage A is kept."""
    folder, _ = finished
    model = str(folder / "model")
    alone = recipe(data, start_from=model, stages=("b",), fresh=("b",))
    target = run.train(alone, tmp_path / "alone", device="cpu")
    settings = json.loads((target / "model.json").read_text())
    assert "decoder" in settings["parts"]
    assert "prior of" in capsys.readouterr().out.replace("\n", " ")  # it is left out, and that is said
    # And on from there, without fresh.
    goes_on = dataclasses.replace(alone, start_from=str(target), fresh=())
    run.train(goes_on, tmp_path / "on", device="cpu")
    # A Stage C for it.
    prior = recipe(data, start_from=str(target), stages=("c",), fresh=("c",))
    last = run.train(prior, tmp_path / "c", device="cpu")
    assert isinstance(read_cascade(last).decoder, Paella)


def test_a_start_of_the_other_kind_is_refused(finished, data, tmp_path):
    folder, _ = finished
    other = recipe(data, decoder=tiny().decoder, start_from=str(folder / "model"), stages=("b",))
    with pytest.raises(UserError, match=r"v1 Stage B, .* tokens, .* trains a v2 Stage B, .*Use --fresh b"):
        run.train(other, tmp_path / "x", device="cpu")


def test_a_run_of_v2_is_no_run_of_v1(finished, data):
    folder, _ = finished
    with pytest.raises(RunFolderError, match=r"belongs to another recipe: decoder\."):
        run.train(recipe(data, decoder=tiny().decoder), folder, device="cpu")
    v1, v2 = as_dict(recipe()), as_dict(recipe(decoder=tiny().decoder))
    assert any(name.startswith("decoder.num_labels") for name in differing_fields(v1, v2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"decoder": dataclasses.replace(PAELLA, num_labels=255)},
            r"codebook has 256 entries in vqgan\.num_vq_embeddings and 255 in decoder\.num_labels",
        ),
        (
            {"decoder": dataclasses.replace(PAELLA, effnet_embd=8)},
            r"the semantic latents have 16 channels .* 8 in decoder\.effnet_embd",
        ),
        (
            {"stage_b": dataclasses.replace(tiny().stage_b, loss_weight="velocity")},
            r"stage_b\.loss_weight must be p2 for a decoder of tokens, got velocity",
        ),
        (
            {"stage_b": dataclasses.replace(tiny().stage_b, feature_weight=0.5)},
            r"stage_b\.feature_weight must be 0 for a decoder of tokens, got 0\.5",
        ),
        (
            {"stage_b": dataclasses.replace(tiny().stage_b, refine_feature_weight=0.5)},
            r"stage_b\.refine_feature_weight must be 0 for a decoder of tokens, got 0\.5",
        ),
        (
            {"stage_a": dataclasses.replace(tiny().stage_a, refine_images=8)},
            r"stage_a\.refine_images must be 0 with a decoder of tokens, got 8",
        ),
        (
            {"decoder": dataclasses.replace(PAELLA, patch_size=3)},
            r"image_size=128 gives latents of side 32\. .* a multiple of 6\.",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(changes, message):
    with pytest.raises(UserError, match=message):
        recipe(**changes)


def test_text_of_another_width_is_refused(tmp_path):
    wide = recipe(decoder=dataclasses.replace(PAELLA, clip_embd=100))
    with pytest.raises(UserError, match=r"decoder\.clip_embd must be the width .* 384, got 100\. Use 384"):
        run.train(wide, tmp_path / "x", device="cpu")


class TestOptions:
    def override(self, *words):
        given = {"data": None, "seed": None, "compressor_init": None, "overrides": list(words)}
        return overridden(recipe(), argparse.Namespace(**given))

    def test_fields_of_paella_are_options(self):
        changed = self.override("--decoder.c-cond", "64", "--stage-b.label-smoothing", "0.2")
        assert changed.decoder == dataclasses.replace(PAELLA, c_cond=64)
        assert changed.stage_b.label_smoothing == 0.2

    def test_fields_of_the_other_kind_are_not(self):
        with pytest.raises(UserError, match="prediction"):
            self.override("--decoder.prediction", "velocity")

    def test_v2_s_stay(self):
        given = {"data": None, "seed": None, "compressor_init": None, "overrides": ["--decoder.c-cond", "8"]}
        changed = overridden(tiny(), argparse.Namespace(**given))
        assert isinstance(changed.decoder, DecoderConfig)
        assert changed.decoder.c_cond == 8


class TestRecipes:
    def test_the_published_sizes(self):
        for recipe in (v1_stage_b(), v1_stage_c()):
            with torch.device("meta"):
                networks = Paella(recipe.decoder), Compressor(recipe.compressor), Prior(recipe.prior)
            counts = [sum(p.numel() for p in network.parameters()) for network in networks]
            assert counts == [730_814_336, 117_254_784, 993_243_680]
            assert recipe.image_size == 512
            assert (recipe.text_positions, recipe.decoder_steps, recipe.prior_steps) == ("all", 8, 60)

    def test_stage_b_is_trained_as_published(self):
        config = v1_stage_b().stage_b
        optimization = config.optimization
        assert optimization.images == 576_000_000
        assert optimization.warmup == 3_840_000
        assert (optimization.batch_size, optimization.learning_rate) == (384, 1e-4)
        assert (optimization.betas, optimization.weight_decay) == ((0.9, 0.95), 0.01)
        assert (config.map_dropout, config.map_noise, config.caption_dropout) == (0.05, 0.3, 0.05)
        assert config.label_smoothing == 0.1
        assert v1_stage_b().stages == ("b",)

    def test_a_smaller_paella_keeps_the_channels_of_a_head(self):
        small = scaled(v1_stage_b(), 0.5, 0.25).decoder
        assert isinstance(small, PaellaConfig)
        assert (small.c_hidden, small.nhead, small.blocks) == ((320, 640, 640), (-1, 8, 8), (1, 3, 1))
        assert (small.num_labels, small.effnet_embd, small.clip_embd) == (8192, 16, 1024)
        with torch.device("meta"):
            Paella(small)

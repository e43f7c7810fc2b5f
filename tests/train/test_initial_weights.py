"""Runs that start from a model: what is kept, trained and refused, and phases at several sizes."""

import copy
import dataclasses
import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from wuerstchen.checkpoints.backbones import lite0_path, load_backbone
from wuerstchen.checkpoints.native import (
    Provenance,
    read_cascade,
    read_network,
    read_parts,
    write_network,
)
from wuerstchen.checkpoints.original import write_original
from wuerstchen.errors import CheckpointError, RunFolderError, UserError
from wuerstchen.image_files import read_settings
from wuerstchen.models import compressor as compressors
from wuerstchen.models.cascade import PUBLISHED_STATISTICS
from wuerstchen.models.compressor import Compressor, CompressorConfig
from wuerstchen.models.decoder import Decoder
from wuerstchen.models.efficientnet import EFFICIENTNET_V2_S
from wuerstchen.models.paella import Paella
from wuerstchen.models.previewer import PreviewerConfig
from wuerstchen.models.prior import PriorConfig
from wuerstchen.models.vqgan import VQGANConfig
from wuerstchen.recipes.tiny import tiny
from wuerstchen.recipes.v2 import v2_finetune, v2_stage_b, v2_stage_c
from wuerstchen.train.config import Optimization, Phase, StageCConfig
from wuerstchen.train.engine import checkpoint, checkpoint_writer
from wuerstchen.train.engine.checkpoint import newest, read_averages
from wuerstchen.train.initial_weights import fill_compressor, read_start
from wuerstchen.train.run import train

from ..configurations import (
    ORIGINAL_DECODER,
    SMALL_COMPRESSOR,
    SMALL_DECODER,
    SMALL_PREVIEWER,
    SMALL_PRIOR,
    narrow,
    with_lite0,
    write_model,
)

WHENCE = Provenance(recipe="test", seed=1, images=2, data="none", licence="MIT")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for n in range(12):
        Image.effect_noise((150 + n, 140), 90).convert("RGB").save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"picture {n}")
    return folder


@pytest.fixture(scope="module")
def start(small_cascade, tmp_path_factory):
    """A model of our own with a compressor that tells images apart."""
    cascade = with_lite0(copy.deepcopy(small_cascade))
    with torch.no_grad():
        cascade.compressor.mapper[1].weight.mul_(10)
    return write_model(cascade, tmp_path_factory.mktemp("start") / "model", WHENCE)


def learning(images=16, batch_size=4):
    return Optimization(images=images, batch_size=batch_size, learning_rate=1e-3)


def recipe(start, data, **changes):
    """Only Stage C, in three phases at two sizes, the last one with three aspect ratios."""
    phases = (
        Phase(optimization=learning(8)),
        Phase(optimization=learning(12), max_ratio=5 / 3),
    )
    return dataclasses.replace(
        tiny(),
        **{
            "data": str(data),
            "image_size": 256,
            "stages": ("c",),
            "start_from": str(start),
            "fresh": ("c",),
            "compressor": SMALL_COMPRESSOR,
            "decoder": SMALL_DECODER,
            "previewer": SMALL_PREVIEWER,
            "prior": SMALL_PRIOR,
            "stage_c": StageCConfig(optimization=learning(), image_size=128, phases=phases, blend=0.25),
            "statistics_images": 16,
            "prior_steps": 2,
            "decoder_steps": 1,
            "preview_prompts": ("cat",),
            "workers": 0,
            "checkpoint_seconds": 0.0,
            "log_every": 1,
            **changes,
        },
    )


STAGES = ("c", "c2", "c3")


@pytest.fixture(scope="module")
def finished(start, photos, tmp_path_factory):
    """A run of all phases without interruption."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    train(recipe(start, photos), folder, device="cpu")
    return folder


def files_of(run_dir):
    return {s: newest(run_dir / f"stage_{s}" / "checkpoints")[1]["files"] for s in STAGES}


def test_finished_stages_are_read_once(start, photos, finished, tmp_path, monkeypatch):
    """Each file of their last checkpoints was hashed twice, and then restored without need."""
    run_dir = shutil.copytree(finished, tmp_path / "run")
    hashed, sha256 = [], checkpoint.sha256_of
    monkeypatch.setattr(checkpoint, "sha256_of", lambda path: hashed.append(path) or sha256(path))
    monkeypatch.setattr(checkpoint, "restore", None)
    train(recipe(start, photos), run_dir, device="cpu")
    files = [newest(run_dir / f"stage_{stage}" / "checkpoints") for stage in STAGES]
    expected = [path / name for path, state in files for name in state["files"]]
    assert sorted(hashed[: len(expected)]) == sorted(expected)
    assert len(hashed) == 2 * len(expected)  # once more by this test
    lines = map(json.loads, (run_dir / "log.jsonl").read_text().splitlines())
    starts = [event for event in lines if event["event"] == "start"]
    assert [event["resumed"] for event in starts] == [False] * 3 + [True] * 3
    assert starts[3].keys() == starts[0].keys()


@pytest.mark.slow
def test_stage_c_alone_in_phases_survives_kills_and_blends(start, photos, finished, tmp_path, monkeypatch):
    whole, broken = finished, tmp_path / "broken"

    class Killed(BaseException):
        pass

    start_writing, saved = checkpoint_writer.Writer.start, []

    def dies(writer, state, header):
        start_writing(writer, state, header)
        writer.wait()
        saved.append((writer.folder.parent.name, state.images))
        if len(saved) in (2, 5, 8):
            raise Killed

    monkeypatch.setattr(checkpoint_writer.Writer, "start", dies)
    for _ in range(3):
        with pytest.raises(Killed):
            train(recipe(start, photos), broken, device="cpu")
    train(recipe(start, photos), broken, device="cpu")
    assert {name for name, _ in saved} == {"stage_c", "stage_c2", "stage_c3"}
    assert len(saved) == len(set(saved))  # no update was made twice
    assert files_of(broken) == files_of(whole)
    model = (whole / "model" / "prior.safetensors").read_bytes()
    assert model == (broken / "model" / "prior.safetensors").read_bytes()

    # The prior is a quarter of the last phase's average and three quarters of that before.
    before, last = (
        read_averages(newest(whole / f"stage_{s}" / "checkpoints")[0], "prior") for s in STAGES[1:]
    )
    cascade = read_cascade(whole / "model")
    for name, tensor in cascade.prior.state_dict().items():
        torch.testing.assert_close(tensor, 0.25 * last[name] + 0.75 * before[name])
    assert cascade.settings.image_size == 256
    assert cascade.settings.text_mask
    assert min(cascade.settings.latent_statistics.std) > 0.1  # measured: the prior is new

    # Parts that were not trained keep their weights and provenance.
    given = read_cascade(start)
    for name in ("vqgan", "decoder", "compressor"):
        kept = cascade.networks()[name].state_dict()
        assert all(torch.equal(kept[k], t) for k, t in given.networks()[name].state_dict().items())
        assert read_network(whole / "model" / f"{name}.safetensors")[1] == WHENCE
    provenance = read_network(whole / "model" / "prior.safetensors")[1]
    assert (provenance.recipe, provenance.images) == ("tiny", 36)


@pytest.mark.parametrize("part", ["decoder", "text_encoder"])
def test_a_resumed_run_must_start_from_the_same_weights(part, start, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("wuerstchen.train.run.TrainingRun.train", lambda self: self.run_dir / "model")
    train(recipe(start, photos), tmp_path / "run", device="cpu")
    other = read_cascade(start)
    if part == "decoder":
        with torch.no_grad():
            other.decoder.embedding[1].bias += 1
    folder = write_model(other, tmp_path / "model", WHENCE)
    if part == "text_encoder":
        path = folder / "text_encoder" / "model.safetensors"
        tensors = load_file(path)
        name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
        save_file(tensors | {name: tensors[name] * 2}, path)
    stored = json.loads((tmp_path / "run" / "run.json").read_text())
    stored["recipe"]["start_from"] = str(folder)
    (tmp_path / "run" / "run.json").write_text(json.dumps(stored))
    with pytest.raises(RunFolderError, match=r"the weights in .* have changed since"):
        train(recipe(folder, photos), tmp_path / "run", device="cpu")


def test_a_pretrained_stage_keeps_its_weights_and_normalisation(start, photos, tmp_path):
    goes_on = recipe(start, photos, fresh=(), stage_c=StageCConfig(optimization=learning(4)))
    still = dataclasses.replace(goes_on.stage_c.optimization, learning_rate=1e-12)
    goes_on = dataclasses.replace(goes_on, stage_c=StageCConfig(optimization=still))
    train(goes_on, tmp_path / "run", device="cpu")
    given, cascade = read_cascade(start), read_cascade(tmp_path / "run" / "model")
    assert cascade.settings.latent_statistics == given.settings.latent_statistics
    for name, tensor in cascade.prior.state_dict().items():
        torch.testing.assert_close(tensor, given.prior.state_dict()[name])


@pytest.mark.slow  # test_recipes_train.py has the same in small networks
def test_three_runs_train_the_stages_in_turn(photos, tmp_path):
    """Each run starts from the model of the one before. The last model is complete."""
    small = {"image_size": 128, "workers": 0, "statistics_images": 8, "preview_prompts": ("a cat",)}
    small |= {"prior_steps": 1, "decoder_steps": 1, "data": str(photos)}
    first = tiny()
    first = dataclasses.replace(
        first,
        stages=("a",),
        stage_a=dataclasses.replace(first.stage_a, optimization=learning(4)),
        **small,
    )
    train(first, tmp_path / "a", device="cpu")
    assert read_parts(tmp_path / "a" / "model")[1].keys() == {"vqgan"}
    with pytest.raises(CheckpointError, match=r"has no decoder\. Download the model again"):
        read_cascade(tmp_path / "a" / "model")

    config = dataclasses.replace(
        first.stage_b,
        optimization=learning(4),
        phases=(Phase(optimization=learning(8), image_size=256),),
        refine_images=4,
    )
    second = dataclasses.replace(
        first, stages=("b",), start_from=str(tmp_path / "a" / "model"), fresh=("b",), stage_b=config
    )
    train(second, tmp_path / "b", device="cpu")
    assert sorted(p.name for p in (tmp_path / "b").glob("stage_*")) == ["stage_b", "stage_b2", "stage_b3"]
    parts = read_parts(tmp_path / "b" / "model")[1]
    assert parts.keys() == {"vqgan", "decoder", "compressor", "previewer"}
    assert read_network(tmp_path / "b" / "model" / "compressor.safetensors")[1].images == 12

    third = dataclasses.replace(
        second,
        stages=("c",),
        start_from=str(tmp_path / "b" / "model"),
        fresh=("c",),
        stage_c=StageCConfig(optimization=learning(4)),
    )
    train(third, tmp_path / "c", device="cpu")
    cascade = read_cascade(tmp_path / "c" / "model")
    assert cascade.prior is not None
    assert cascade.text_encoder.width == 384
    first_vqgan = read_network(tmp_path / "a" / "model" / "vqgan.safetensors")[0]
    assert cascade.vqgan.config.scale_factor == first_vqgan.config.scale_factor


@pytest.fixture(scope="module")
def published(write_published, tmp_path_factory):
    return write_published(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def compressor_file(tmp_path_factory):
    """A complete compressor in a file of its own, because published diffusers folders have none."""
    compressor = Compressor(CompressorConfig(backbone="efficientnet_lite0", c_latent=4))
    load_backbone(compressor.backbone, lite0_path())
    torch.nn.init.constant_(compressor.mapper[1].weight, 42.0)  # the published normalisation divides by it
    path = tmp_path_factory.mktemp("compressor") / "compressor.safetensors"
    write_network(compressor, path, WHENCE)
    return path


def finetune(published, photos, compressor_file, **changes):
    """The recipe of the same name, on a published model in miniature."""
    full = v2_finetune()
    return dataclasses.replace(
        full,
        **{
            "data": str(photos),
            "start_from": str(published),
            "image_size": 128,
            "vqgan": VQGANConfig(bottleneck_blocks=2, embed_dim=16, num_vq_embeddings=32),
            "compressor": CompressorConfig(backbone="efficientnet_lite0", c_latent=4),
            "decoder": dataclasses.replace(
                full.decoder,
                c_r=16,
                c_cond=12,
                c_hidden=(8, 16, 16, 16),
                nhead=(-1, 2, 2, 2),
                blocks=(1, 1, 2, 1),
                effnet_embd=4,
                clip_embd=12,
            ),
            "previewer": PreviewerConfig(c_in=4),
            "prior": PriorConfig(c_in=4, c=16, c_cond=16, c_r=16, depth=2, nhead=2),
            "stage_b": dataclasses.replace(full.stage_b, compressor_init=str(compressor_file)),
            "stage_c": StageCConfig(optimization=learning(8)),
            "preview_prompts": ("a cat",),
            "acceleration": "none",
            "workers": 0,
            **changes,
        },
    )


def test_fine_tuning_a_published_model(published, photos, compressor_file, tmp_path):
    train(finetune(published, photos, compressor_file), tmp_path / "run", device="cpu")
    cascade = read_cascade(tmp_path / "run" / "model")
    assert cascade.settings.latent_statistics == PUBLISHED_STATISTICS
    assert not cascade.settings.text_mask
    assert cascade.text_encoder.width == 16
    assert cascade.decoder_text_encoder.width == 12
    given = read_start(finetune(published, photos, compressor_file)).parts
    for name in ("vqgan", "decoder", "compressor"):
        kept = cascade.networks()[name].state_dict()
        assert all(torch.equal(kept[k], t) for k, t in getattr(given, name).state_dict().items())
    changed = [
        k for k, t in given.prior.state_dict().items() if not torch.equal(cascade.prior.state_dict()[k], t)
    ]
    assert len(changed) > 20
    largest = max(
        (cascade.prior.state_dict()[k] - t).abs().max() for k, t in given.prior.state_dict().items()
    )
    assert largest < 0.02  # two updates away from the published weights


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"text_positions": "real"},
            r"text_positions=real does not fit .* whose networks attend to padding\. Use all",
        ),
        (
            {"prior": PriorConfig(c_in=4, c=32, c_cond=16, c_r=16, depth=1, nhead=2)},
            r"prior\.c=32, prior\.depth=1 of the recipe does not match .* Use --prior.c 16 --prior.depth 2",
        ),
        ({"start_from": "nowhere"}, "'nowhere' does not exist"),
        ({"stage_b": tiny().stage_b}, r"has no compressor\. Use --compressor-init"),
        (
            {"prior": PriorConfig(c_in=4, c=16, c_cond=24, c_r=16, depth=2, nhead=2), "fresh": ("c",)},
            r"prior\.c_cond must be the width of the text encoder's states, 16, got 24",
        ),
        (
            {"compressor": CompressorConfig(backbone="efficientnet_lite0", c_latent=8)},
            "the semantic latents have 8 channels in compressor.c_latent, 4 in prior.c_in",
        ),
    ],
)
def test_unfit_recipes_are_refused_before_anything_is_written(
    published, photos, compressor_file, tmp_path, changes, message
):
    with pytest.raises((UserError, CheckpointError), match=message):
        train(finetune(published, photos, compressor_file, **changes), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run" / "run.json").exists()


def test_the_originals_file_of_stage_b_gives_the_compressor(tmp_path, published, monkeypatch):
    monkeypatch.setattr(compressors, "EFFICIENTNET_V2_S", narrow(EFFICIENTNET_V2_S))
    theirs = Compressor(CompressorConfig())
    with torch.no_grad():
        theirs.mapper[0].weight.add_(1)
    write_original({"decoder": Decoder(ORIGINAL_DECODER), "compressor": theirs}, tmp_path)

    def named(path):
        full = v2_stage_b()
        return dataclasses.replace(full, stage_b=dataclasses.replace(full.stage_b, compressor_init=str(path)))

    ours = Compressor(CompressorConfig())
    fill_compressor(named(tmp_path / "model_v2_stage_b.pt"), ours)
    assert all(torch.equal(ours.state_dict()[k], t) for k, t in theirs.state_dict().items())
    with pytest.raises(
        UserError,
        match=r"has no compressor\. Use warp-ai/EfficientNetEncoder, the original's file of Stage B",
    ):
        fill_compressor(named(published), ours)
    larger = CompressorConfig(backbone="efficientnet_v2_l")
    other = dataclasses.replace(named(tmp_path / "model_v2_stage_b.pt"), compressor=larger)
    with pytest.raises(
        UserError,
        match=r"compressor\.backbone=efficientnet_v2_l .* does not match .*backbone efficientnet_v2_s",
    ):
        fill_compressor(other, ours)
    for missing in ("none.pth", "weights/none.safetensors"):
        with pytest.raises(CheckpointError, match="none"):
            fill_compressor(named(missing), ours)
    with pytest.raises(
        UserError, match=r"efficientnet_v2_s needs pretrained weights to start from\. Use --comp"
    ):
        fill_compressor(v2_stage_b(), ours)


def test_a_v1_decoder_cannot_train_as_v2(small_v1, tmp_path, photos):
    write_model(small_v1, tmp_path / "v1", WHENCE)
    other = recipe(tmp_path / "v1", photos, stages=("b",), fresh=())
    with pytest.raises(UserError, match="has a v1 Stage B, which works on tokens"):
        train(other, tmp_path / "run", device="cpu")
    # But it can decode a new Stage C, with v1's settings.
    goes_on = recipe(tmp_path / "v1", photos, fresh=(), stage_c=StageCConfig(optimization=learning(4)))
    train(goes_on, tmp_path / "run", device="cpu")
    cascade = read_cascade(tmp_path / "run" / "model")
    assert isinstance(cascade.decoder, Paella)
    assert cascade.settings.prior_equal_steps
    assert cascade.settings.latent_statistics == small_v1.settings.latent_statistics
    (preview,) = (tmp_path / "run" / "stage_c" / "previews").glob("*.png")
    assert read_settings(preview)["prompts"] == list(goes_on.preview_prompts)


def test_parts_after_a_retrained_stage_are_left_out(start, photos):
    found = read_start(recipe(start, photos, stages=("b",), fresh=("b",)))
    assert found.left_out == ("prior",)
    assert found.parts.networks().keys() == {"vqgan"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": ("c",)}, "stages=c builds on a and b, which this run neither trains nor starts from"),
        ({"stages": ()}, "stages must be consecutive, got none"),
        ({"stages": ("a", "c"), "start_from": "x"}, "stages must be consecutive, got a c"),
        ({"stages": ("c", "b"), "start_from": "x"}, "stages must be consecutive, got c b"),
        ({"stages": ("c",), "start_from": "x", "fresh": ("b",)}, "fresh must name trained stages, got b"),
        (
            {"stages": ("a",), "stage_a": dataclasses.replace(tiny().stage_a, refine_images=8)},
            "refine_images needs Stage B to be trained in the same run",
        ),
    ],
)
def test_stages_that_cannot_be_trained_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(tiny(), **changes)


def test_phases_are_checked():
    phase = Phase(optimization=learning())
    for change, message in (
        ({"image_size": 100}, "image_size must be a multiple of 128, got 100"),
        ({"max_ratio": 0.5}, "max_ratio must be between 1 and 4, got 0.5"),
        ({"max_ratio": float("nan")}, "max_ratio must be between 1 and 4, got nan"),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(phase, **change)
    with pytest.raises(UserError, match=r"blend must be 1 without further phases, got 0\.5"):
        StageCConfig(optimization=learning(), blend=0.5)
    wide = dataclasses.replace(phase, max_ratio=2.0)
    config = dataclasses.replace(tiny().stage_c, phases=(wide,))
    with pytest.raises(UserError, match="prepared_images can only hold square images"):
        dataclasses.replace(tiny(), stage_c=config, prepared_images=8)


def test_emoji_are_always_square(tmp_path):
    wide = Phase(optimization=learning(), max_ratio=2.0)
    other = dataclasses.replace(tiny(), stage_c=dataclasses.replace(tiny().stage_c, phases=(wide,)))
    with pytest.raises(UserError, match=r"max_ratio must be 1 for emoji, .* got 2\.0"):
        train(other, tmp_path / "run", device="cpu")


def test_the_last_phase_reads_its_own_data(start, photos, tmp_path):
    """Missing data are found before training, and existing data are read."""
    phases = (Phase(optimization=learning(4), data=str(tmp_path / "fine")),)
    other = recipe(
        start, photos, stage_c=StageCConfig(optimization=learning(4), image_size=128, phases=phases)
    )
    with pytest.raises(UserError, match=r"fine' does not exist\. Use a folder"):
        train(other, tmp_path / "run", device="cpu")
    (tmp_path / "fine").mkdir()
    for n in range(5):
        (tmp_path / "fine" / f"{n}.png").write_bytes(b"no picture")
        (tmp_path / "fine" / f"{n}.txt").write_text("a picture")
    with pytest.raises(UserError, match="none of the 5 images can be read"):
        train(other, tmp_path / "run", device="cpu")
    assert newest(tmp_path / "run" / "stage_c" / "checkpoints") is not None


def test_the_published_model_is_an_average_of_two_phases():
    assert v2_stage_c().stage_c.blend == 0.5
    sizes = [phase.optimization.images for phase in v2_stage_c().stage_c.phases]
    assert sizes == [364_000 * 1536, 4_000 * 768, 50_000 * 384]


def test_a_pretrained_compressor_keeps_its_view_scale(start, photos, tmp_path):
    """At another scale, the semantic latents would differ."""
    folder = tmp_path / "model"
    shutil.copytree(start, folder)
    description = json.loads((folder / "model.json").read_text())
    description["settings"]["view_scale"] = 0.5
    (folder / "model.json").write_text(json.dumps(description))
    prior_alone = recipe(folder, photos)
    assert read_start(prior_alone).resolved(prior_alone).view_scale == 0.5
    goes_on = recipe(folder, photos, stages=("b",), fresh=())
    with pytest.raises(
        UserError, match=r"^view_scale is 0\.75 in the recipe and 0\.5 in .*--view-scale 0\.5"
    ):
        read_start(goes_on)
    assert read_start(dataclasses.replace(goes_on, fresh=("b",))).parts.compressor is None
    with pytest.raises(UserError, match=r"^view_scale must be between 0\.25 and 4, got 5\.0"):
        recipe(folder, photos, view_scale=5.0)

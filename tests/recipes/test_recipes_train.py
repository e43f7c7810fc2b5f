"""The paper's recipes, each stage and phase of them, run to their end: small networks, small pictures."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

import wuerstchen
from wuerstchen.checkpoints.layouts import Sources, convert, read_model
from wuerstchen.checkpoints.native import read_parts
from wuerstchen.checkpoints.original import write_original
from wuerstchen.models import compressor as compressors
from wuerstchen.models.compressor import Compressor
from wuerstchen.models.decoder import Decoder
from wuerstchen.models.efficientnet import EFFICIENTNET_V2_L, EFFICIENTNET_V2_S, EfficientNetV2
from wuerstchen.models.paella import Paella, PaellaConfig
from wuerstchen.models.prior import Prior
from wuerstchen.models.vqgan import VQGAN
from wuerstchen.recipes.scale import scaled
from wuerstchen.recipes.v1 import v1_stage_b, v1_stage_c
from wuerstchen.recipes.v2 import (
    CLIP_BIGG,
    CLIP_H,
    v2,
    v2_finetune,
    v2_finetune_2048,
    v2_stage_a,
    v2_stage_b,
    v2_stage_c,
)
from wuerstchen.train.report.announce import RunMonitor
from wuerstchen.train.run import train

FACTOR = 0.01  # of width and of depth
SMALLER = 4  # times, each side of an image
BATCH = 4
UPDATES = 2  # of each phase


def narrow(config):
    """An EfficientNet that is the same but for widths and repeats. Its stem is what files tell it by."""
    stages = tuple(dataclasses.replace(stage, channels=8, blocks=1) for stage in config.stages)
    return dataclasses.replace(config, stages=stages, head=32)


@pytest.fixture(scope="module", autouse=True)
def narrow_backbones():
    with pytest.MonkeyPatch.context() as patch:
        for name, config in (
            ("EFFICIENTNET_V2_S", EFFICIENTNET_V2_S),
            ("EFFICIENTNET_V2_L", EFFICIENTNET_V2_L),
        ):
            patch.setattr(compressors, name, narrow(config))
        yield


@pytest.fixture(scope="module")
def places(tmp_path_factory, clip_tokenizer):
    """What the recipes name, by the names that they give it."""
    folder = tmp_path_factory.mktemp("places")
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    found = {"data/photos": folder / "photos", "fine": folder / "fine"}
    for data, count in (("data/photos", 200), ("fine", 12)):  # enough to hold some out, and not
        found[data].mkdir()
        for n in range(count):
            pixels = rng.integers(0, 256, (8, 9, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((150, 140)).save(found[data] / f"{n}.png")
            (found[data] / f"{n}.txt").write_text(f"cat {n}")
    for name, width in ((CLIP_BIGG, 1280), (CLIP_H, 1024)):
        found[name] = folder / str(width)
        words = len(clip_tokenizer)
        config = CLIPTextConfig(
            vocab_size=words,
            hidden_size=width,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=16,
            max_position_embeddings=12,
            bos_token_id=words - 2,
            eos_token_id=words - 1,
            pad_token_id=words - 1,
        )
        CLIPTextModel(config).save_pretrained(found[name] / "text_encoder")
        clip_tokenizer.save_pretrained(found[name] / "tokenizer")
    for name, config in (("s.pth", EFFICIENTNET_V2_S), ("l.pth", EFFICIENTNET_V2_L)):
        found[name] = folder / name
        state = awake(EfficientNetV2(narrow(config))).state_dict()
        torch.save({f"features.{key}": tensor for key, tensor in state.items()}, found[name])
    return found


def awake(backbone):
    """The backbone with statistics of its own signal, without which hardly any would pass."""
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        backbone.train()(torch.rand(4, 3, 8, 8).repeat_interleave(24, 2).repeat_interleave(24, 3))
    return backbone.eval()


def published(places, recipe, folder, *parts):
    """The original's files of what a recipe trains, with random weights."""
    recipe = toy(dataclasses.replace(recipe, stages=("a", "b", "c"), start_from="", fresh=()), places)
    v1 = isinstance(recipe.decoder, PaellaConfig)
    made = {
        "vqgan": VQGAN(recipe.vqgan),
        "decoder": Paella(recipe.decoder) if v1 else Decoder(recipe.decoder),
        "compressor": Compressor(recipe.compressor),
        "prior": Prior(recipe.prior),
    }
    awake(made["compressor"].backbone)
    torch.nn.init.constant_(made["compressor"].mapper[1].weight, 42.0)  # v2's normalisation divides by it
    write_original({part: made[part] for part in parts}, folder)
    return folder


def toy(recipe, places, **changes):
    """A recipe with everything but its sizes, lengths and places as it is."""
    if not recipe.start_from or recipe.fresh:
        recipe = scaled(recipe, FACTOR, FACTOR)
    else:  # its start is as small
        recipe = dataclasses.replace(
            recipe, prior=scaled(dataclasses.replace(recipe, fresh=("c",)), FACTOR, FACTOR).prior
        )

    def short(config):
        def less(optimization):
            warmup = min(optimization.warmup, BATCH)
            return dataclasses.replace(optimization, images=UPDATES * BATCH, batch_size=BATCH, warmup=warmup)

        changed = {"optimization": less(config.optimization)}
        if config.image_size is not None:
            changed["image_size"] = max(config.image_size // SMALLER, 128)
        if getattr(config, "phases", ()):
            changed["phases"] = tuple(short(phase) for phase in config.phases)
        return dataclasses.replace(config, **changed)

    given = {
        "image_size": recipe.image_size // SMALLER,
        "vqgan": dataclasses.replace(recipe.vqgan, num_vq_embeddings=64),
        "stage_a": dataclasses.replace(short(recipe.stage_a), discriminator_width=32, adversarial_from=BATCH),
        "stage_b": short(recipe.stage_b),
        "stage_c": short(recipe.stage_c),
        "statistics_images": 8,
        "prior_steps": 2,
        "decoder_steps": 2,
        "preview_prompts": recipe.preview_prompts[:1] or ("a cat",),
        "workers": 0,
        "log_every": 1,
    }
    if isinstance(recipe.decoder, PaellaConfig):
        given["decoder"] = dataclasses.replace(recipe.decoder, num_labels=64, c_token=8)
    for name in ("data", "start_from", "text_encoder", "decoder_text_encoder"):
        place = getattr(recipe, name)
        given[name] = str(places.get(place, place))
    place = recipe.stage_b.compressor_init
    given["stage_b"] = dataclasses.replace(given["stage_b"], compressor_init=str(places.get(place, place)))
    return dataclasses.replace(recipe, **{**given, **changes})


def with_backbone(recipe, path):
    return dataclasses.replace(recipe, stage_b=dataclasses.replace(recipe.stage_b, compressor_init=str(path)))


def trained(recipe, folder, stages, monitor=None):
    """Trains, checks what each phase has left, and returns the model's folder."""
    model = train(recipe, folder, device="cpu", monitor=monitor)
    assert {path.name for path in folder.glob("stage_*")} == {f"stage_{stage}" for stage in stages}
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for stage in stages:
        progress = [e for e in events if e["event"] == "progress" and e["stage"] == stage]
        assert [e["images"] for e in progress] == [BATCH * n for n in range(1, UPDATES + 1)]
        assert all(np.isfinite(e["loss"]) for e in progress)
        validation = [e for e in events if e["event"] == "validation" and e["stage"] == stage]
        fine = stage == "c4" and recipe.stage_c.phases[-1].data  # too few to hold some out
        assert bool(validation) == (stage != "a" and not fine)
        assert list((folder / f"stage_{stage}" / "previews").glob("*.png"))
    return model


@pytest.mark.slow
def test_v2_from_random_weights_in_one_run(places, tmp_path):
    recipe = with_backbone(toy(v2(), places), places["s.pth"])
    stages = ["a", "b", "b2", "c", "c2", "c3", "c4"]
    trained(recipe, tmp_path / "run", stages, RunMonitor(rehearse=True))
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [e["stage"] for e in events if e["event"] == "rehearsed"] == stages


@pytest.mark.slow
def test_v2_stage_by_stage_with_selected_images_at_the_end(places, tmp_path):
    a = trained(toy(v2_stage_a(), places), tmp_path / "a", ["a"])
    places = {**places, "runs/v2-stage-a/model": a}
    b = trained(with_backbone(toy(v2_stage_b(), places), places["s.pth"]), tmp_path / "b", ["b", "b2"])
    places["runs/v2-stage-b/model"] = b
    recipe = toy(v2_stage_c(), places)
    *phases, last = recipe.stage_c.phases
    phases.append(dataclasses.replace(last, data=str(places["fine"])))
    recipe = dataclasses.replace(recipe, stage_c=dataclasses.replace(recipe.stage_c, phases=tuple(phases)))
    model = trained(recipe, tmp_path / "c", ["c", "c2", "c3", "c4"])
    (image,) = wuerstchen.load(model, "cpu").generate("cat")
    assert image.size == (256, 256)


@pytest.mark.parametrize("make", [v2_finetune, pytest.param(v2_finetune_2048, marks=pytest.mark.slow)])
def test_fine_tuning_the_published_prior(places, tmp_path, make):
    every = published(places, v2_finetune(), tmp_path / "every", "vqgan", "decoder", "compressor", "prior")
    sources = Sources(text_encoder=places[CLIP_BIGG], decoder_text_encoder=places[CLIP_H])
    convert(every, tmp_path / "published", "diffusers", sources, leave_out=["compressor"])
    places = {**places, CLIP_H: tmp_path / "published", "dome272/wuerstchen": every}
    model = trained(toy(make(), places), tmp_path / "run", ["c"])
    (image,) = wuerstchen.load(model, "cpu").generate("cat")
    assert image.size == (make().image_size // SMALLER,) * 2
    settings, before = read_parts(model)[0], read_model(tmp_path / "published").settings
    assert (settings.latent_statistics, settings.text_mask) == (before.latent_statistics, before.text_mask)


def test_v1_stage_by_stage(places, tmp_path):
    a = published(places, v2_finetune(), tmp_path / "a", "vqgan", "decoder", "prior")
    sources = Sources(text_encoder=places[CLIP_BIGG], decoder_text_encoder=places[CLIP_H])
    convert(a, tmp_path / "published", "diffusers", sources)
    start = {**places, CLIP_H: tmp_path / "published"}
    b = trained(with_backbone(toy(v1_stage_b(), start), places["l.pth"]), tmp_path / "b", ["b"])
    model = trained(toy(v1_stage_c(), places, start_from=str(b)), tmp_path / "c", ["c"])
    (image,) = wuerstchen.load(model, "cpu").generate("cat")
    assert image.size == (128, 128)


def test_a_prior_for_the_published_v1(places, tmp_path):
    folder = published(places, v1_stage_c(), tmp_path / "v1", "vqgan", "decoder", "compressor")
    places = {**places, "data/models/wuerstchen-v1": folder}
    model = trained(toy(v1_stage_c(), places), tmp_path / "run", ["c"])
    (image,) = wuerstchen.load(model, "cpu").generate("cat")
    assert image.size == (128, 128)

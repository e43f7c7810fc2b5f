"""The student of Stage B: its loss, what it jumps from, its validation, and whole runs."""

import copy
import dataclasses
import json

import pytest
import torch

from wuerstchen.checkpoints.native import read_cascade
from wuerstchen.diffusion.schedule import CosineSchedule
from wuerstchen.errors import UserError
from wuerstchen.models.compressor import compressor_input
from wuerstchen.models.decoder import Decoder
from wuerstchen.models.efficientnet import EfficientNetLite
from wuerstchen.pipeline import load
from wuerstchen.recipes import RECIPES
from wuerstchen.recipes.tiny import tiny
from wuerstchen.sampling import Sampling
from wuerstchen.train.config import Optimization, StageFewBConfig, StageFewConfig
from wuerstchen.train.engine.checkpoint import newest
from wuerstchen.train.engine.ema import make_average
from wuerstchen.train.engine.validation import HeldOut, Jumping, Validation
from wuerstchen.train.feed.random import ImageRandom
from wuerstchen.train.overview import cached_captions
from wuerstchen.train.run import train
from wuerstchen.train.stages.base import Stage, inputs_of
from wuerstchen.train.stages.few_decoder import StageFewDecoder
from wuerstchen.train.stages.perceptual import PerceptualLoss
from wuerstchen.train.stages.vqgan import random_crops

from ...configurations import with_decoder_student, with_lite0, write_model
from .test_base import CPU, make_batch, random_of

PLAIN = {"map_noise": 0.0, "crop": None, "feature_fraction": 1.0}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return EfficientNetLite()


@pytest.fixture
def make_stage(small_cascade, network, randomise):
    def make(**changes) -> StageFewDecoder:
        config = StageFewBConfig(optimization=Optimization(images=8, batch_size=4), **{**PLAIN, **changes})
        recipe = dataclasses.replace(tiny(), stages=("few_b",), start_from="model", stage_few_b=config)
        cascade = copy.deepcopy(small_cascade)
        student = Decoder(dataclasses.replace(cascade.decoder.config, dropout=0.0))
        randomise(student)
        torch.manual_seed(3)
        return StageFewDecoder(config, recipe, cascade, student, network)

    return make


def prepared(stage, batch):
    with torch.no_grad():
        return inputs_of(stage, batch, CPU)


def rms(a, b):
    """The pseudo-Huber distance per root of the number of values."""
    d = a[0].numel()
    c = 0.00054 * d**0.5
    return (((a - b).square().flatten(1).sum(1) + c**2).sqrt() - c) / d**0.5


@torch.no_grad()
def test_the_loss_of_one_step_written_out(make_stage, network):
    """Latents, features and discriminator. Each weight has its own term."""
    stage, batch = make_stage(latent_weight=2.0, feature_weight=3.0, adversarial_weight=0.5), make_batch(128)
    assert isinstance(stage, Stage)
    inputs, random, student = prepared(stage, batch), random_of(batch), stage.student
    (name, loss, terms), (other, judged, _) = stage.losses(inputs, random)
    assert (name, other) == ("decoder_student", "discriminator")

    pixels, cascade = batch.pixels(CPU), stage.frozen
    latents = cascade.vqgan.encode(pixels)
    z = cascade.compressor(compressor_input(pixels))
    noise, t = random.normal("noise", latents.shape[1:]), torch.full((len(pixels),), 0.98)
    output = student(noise, t, student.context(z, tuple(latents.shape[2:])))
    alpha_bar = CosineSchedule().alpha_bar(t)[:, None, None, None]
    clean = (noise - (1 - alpha_bar).sqrt() * output) / alpha_bar.sqrt()
    distance = rms(clean, latents).mean()
    drawn = cascade.vqgan.decode(clean)
    features, verdict = PerceptualLoss(network)(drawn, pixels), -stage.discriminator(drawn).mean()
    torch.testing.assert_close(terms["latents"], distance, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(loss, 2 * distance + 3 * features + 0.5 * verdict, rtol=1e-3, atol=1e-3)
    hinge = (1 - stage.discriminator(pixels)).relu().mean() + (1 + stage.discriminator(drawn)).relu().mean()
    torch.testing.assert_close(judged, hinge, rtol=1e-3, atol=1e-3)


def test_gradients_reach_the_student_through_stage_a_only(make_stage):
    stage = make_stage(latent_weight=0.0, adversarial_weight=0.1)
    losses = stage.losses(prepared(stage, make_batch(128)), random_of(make_batch(128)))
    next(losses)[1].backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in stage.student.parameters())
    stage.student.zero_grad(set_to_none=True)
    next(losses)[1].backward()
    assert all(p.grad is None for p in stage.student.parameters())
    frozen = (stage.vqgan, stage.compressor, stage.perceptual)
    assert all(p.grad is None for network in frozen for p in network.parameters())


def test_the_student_listens_to_the_discriminator_later(make_stage):
    batch = make_batch(128)
    found = []
    for start in (0, 10**6):
        stage = make_stage(feature_weight=0.0, adversarial_weight=1.0, adversarial_from=start)
        found.append(next(stage.losses(prepared(stage, batch), random_of(batch)))[1:])
    (listening, terms), (deaf, _) = found
    torch.testing.assert_close(listening - deaf, terms["adversarial"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(deaf, terms["latents"])


@torch.no_grad()
def test_a_part_of_the_batch_is_decoded_in_matching_squares(make_stage):
    stage, batch = make_stage(crop=64, feature_fraction=0.5), make_batch(128)
    inputs, random = prepared(stage, batch), random_of(batch)
    latents = inputs["latents"]
    drawn, pixels = stage._decoded(latents, inputs["images"], random)
    rows = -(-len(latents) // 2)
    assert drawn.shape == pixels.shape == (rows, 3, 64, 64)
    squares = random_crops(inputs["images"], 64, random, grid=4)[:rows]
    assert torch.equal(pixels, squares.permute(0, 3, 1, 2) / 255)
    numbered = torch.arange(32.0).expand(len(latents), 4, 32, 32)  # of the column
    stage.vqgan.decode = lambda z: z[:, :3].repeat_interleave(4, 2).repeat_interleave(4, 3)
    column = stage._decoded(numbered, inputs["images"], random)[0][:, 0, 0, 0]
    images = torch.arange(128)[:, None].expand(len(latents), 128, 128, 3).to(torch.uint8)
    edge = stage._decoded(numbered, images, random)[1][:, 0, 0, 0] * 255
    assert torch.equal(column * 4, edge)


@torch.no_grad()
def test_later_steps_start_from_latents_or_from_the_student_s_own_estimate(make_stage):
    count = 300
    latents = torch.zeros(count, 4, 4, 4)
    noise, random = torch.randn(count, 4, 4, 4), ImageRandom(1, torch.arange(count))
    for own, scale in ((0.0, 0.0), (1.0, 1.0)):
        stage = make_stage(steps=2, pure_noise=0.25, own_estimates=own)
        stage._jump = lambda student, x, t, context: torch.ones_like(x)
        context = stage.student.context(torch.zeros(count, 2, 3, 3), (4, 4))
        x, t = stage._starts(context, latents, noise, random)
        first = t == stage._times[0]
        assert first.float().mean().item() == pytest.approx(0.25, abs=0.07)
        assert torch.equal(x[first], noise[first])
        assert torch.equal(t[~first], torch.full_like(t[~first], 0.66))
        alpha_bar = CosineSchedule().alpha_bar(torch.tensor(0.66))
        assert x[~first].mean().item() == pytest.approx(scale * alpha_bar.sqrt().item(), abs=0.02)
        assert x[~first].std().item() == pytest.approx((1 - alpha_bar).sqrt().item(), abs=0.02)


@torch.no_grad()
def test_validation_samples_as_the_model_does(make_stage):
    stage, batch = make_stage(steps=2, latent_weight=2.0), make_batch(128)
    assert isinstance(stage, Jumping)
    images = HeldOut(images=batch.images, captions=batch.captions)
    averages = {"decoder_student": make_average(stage.student)}
    found = Validation(stage, images, None, CPU)(averages)
    inputs, student, objective = prepared(stage, batch), averages["decoder_student"], stage.objective
    latents = inputs["latents"]
    random = ImageRandom(0, torch.arange(len(latents)))
    context = student.context(inputs["z"], tuple(latents.shape[2:]))
    times = [torch.full((len(latents),), t) for t in (0.98, 0.66)]
    x = random.normal("validation 0", latents.shape[1:])
    one = objective.to_clean(student(x, times[0], context), x, times[0])
    x = objective.noised(one, random.normal("validation 1", latents.shape[1:]), times[1])
    two = objective.to_clean(student(x, times[1], context), x, times[1])
    expected = [(each - latents).square().mean().item() for each in (one, two)]
    assert found["bins"] == pytest.approx(expected, rel=1e-2)
    assert found["loss"] == pytest.approx(
        float(rms(one, latents).mean() + rms(two, latents).mean()), rel=1e-2
    )


def recipe(model, **changes):
    optimization = Optimization(images=24, batch_size=8, learning_rate=2e-3, ema_decay=0.9)
    config = StageFewBConfig(
        optimization=optimization, **{"steps": 2, "crop": 64, "adversarial_weight": 0.1} | changes
    )
    return dataclasses.replace(
        tiny(),
        stages=("few_b",),
        start_from=str(model),
        stage_few_b=config,
        checkpoint_seconds=0.0,
        log_every=1,
        workers=0,
    )


def test_a_stopped_run_ends_as_a_whole_one_and_its_student_samples(model_folder, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    model = train(recipe(model_folder), whole, device="cpu")
    losses = StageFewDecoder.losses

    def stops(self, inputs, random):
        if 16 in random.indices.tolist():
            raise SystemExit
        yield from losses(self, inputs, random)

    with monkeypatch.context() as patch:
        patch.setattr(StageFewDecoder, "losses", stops)
        with pytest.raises(SystemExit):
            train(recipe(model_folder), broken, device="cpu")
    train(recipe(model_folder), broken, device="cpu")
    states = [newest(run / "stage_few_b" / "checkpoints")[1]["files"] for run in (whole, broken)]
    assert states[0] == states[1]  # checksums of all tensors

    assert json.loads((model / "model.json").read_text())["settings"]["decoder_student_steps"] == 2
    before, after = read_cascade(model_folder), read_cascade(model)
    same, trained = before.decoder.state_dict(), after.decoder_student.state_dict()
    assert all(torch.equal(same[key], tensor) for key, tensor in after.decoder.state_dict().items())
    assert any(not torch.equal(same[key], tensor) for key, tensor in trained.items())
    assert after.decoder_student.config.dropout == 0.0
    pipeline = load(model, device="cpu")
    assert pipeline.settings_of(Sampling())["stage_b"] == "student"
    assert pipeline.generate("a cat")[0].size == (128, 128)
    assert list((whole / "stage_few_b" / "previews").iterdir())


def test_training_lowers_the_distance(small_cascade, tmp_path):
    cascade = with_lite0(copy.deepcopy(small_cascade))
    folder = write_model(cascade, tmp_path / "model")
    given = recipe(folder, steps=1, adversarial_weight=0.0, feature_weight=0.1, map_noise=0.0)
    optimization = dataclasses.replace(given.stage_few_b.optimization, images=8 * 60)
    config = dataclasses.replace(given.stage_few_b, optimization=optimization)
    run = tmp_path / "run"
    train(dataclasses.replace(given, stage_few_b=config, prepared_images=16), run, device="cpu")
    events = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    found = [e["loss"] for e in events if e["event"] == "progress"]
    assert found[-1] < 0.8 * found[0], found


def test_a_student_is_trained_further_and_falls_with_its_decoder(small_cascade, tmp_path, randomise):
    cascade = with_decoder_student(small_cascade)
    randomise(cascade.decoder_student)
    folder = write_model(cascade, tmp_path / "model")
    begun = []
    init = StageFewDecoder.__init__

    def remembered(self, config, recipe, model, student, *more, **options):
        begun.append(copy.deepcopy(student.state_dict()))
        init(self, config, recipe, model, student, *more, **options)

    for fresh, start in (((), cascade.decoder_student), (("few_b",), cascade.decoder)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StageFewDecoder, "__init__", remembered)
            given = recipe(folder, feature_weight=0.0, adversarial_weight=0.0)
            train(dataclasses.replace(given, fresh=fresh), tmp_path / f"run{fresh}", device="cpu")
        expected = start.state_dict()
        assert all(torch.equal(begun[-1][key], tensor) for key, tensor in expected.items()), fresh


def test_a_decoder_of_tokens_has_no_student(small_v1, tmp_path):
    folder = write_model(small_v1, tmp_path / "model")
    with pytest.raises(UserError, match="must not have few_b for a decoder of tokens"):
        train(recipe(folder), tmp_path / "run", device="cpu")


def test_captions_alone_are_not_enough(model_folder, tmp_path):
    data = tmp_path / "captions.txt"
    data.write_text("a cat\na dog\n")
    with pytest.raises(UserError, match="stage few_b reads images"):
        train(dataclasses.replace(recipe(model_folder), data=str(data)), tmp_path / "run", device="cpu")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, r"steps must be at least 1, got 0"),
        ({"own_estimates": 2.0}, r"own_estimates must be"),
        ({"latent_weight": 0.0, "feature_weight": 0.0}, r"are both 0"),
        ({"feature_fraction": 0.0}, r"feature_fraction must be above 0 and at most 1, got 0\.0"),
        ({"crop": 16}, r"crop must be more than 16 pixels with discriminator_depth=4, got 16"),
        ({"pure_noise": 1.0}, r"pure_noise must be from 0 to below 1, got 1\.0"),
        ({"discriminator_width": 4}, r"discriminator_width must be at least 8, got 4"),
    ],
)
def test_settings_are_checked(values, message):
    with pytest.raises(UserError, match=message):
        StageFewBConfig(**values)


def test_a_crop_fits_the_latents(model_folder, tmp_path):
    with pytest.raises(UserError, match=r"stage_few_b\.crop must be a multiple of 4, .* got 66"):
        train(recipe(model_folder, crop=66), tmp_path / "run", device="cpu")


def test_mini_few_trains_both_students_with_a_cache_for_each():
    given = RECIPES["mini-few"]()
    assert given.stages == ("few", "few_b")
    assert (given.prepared_images, cached_captions(given)) == (65_536, 614_400)
    default = dataclasses.replace(given, stage_few=StageFewConfig())
    assert cached_captions(default) == 65_536

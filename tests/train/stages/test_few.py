"""The student of Stage C: trajectories of the teacher, its loss, its validation, and whole runs."""

import copy
import dataclasses
import importlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wuerstchen.checkpoints.native import read_cascade
from wuerstchen.diffusion.objective import FlowMatching, NoisePrediction, VelocityPrediction
from wuerstchen.errors import UserError
from wuerstchen.models.prior import Prior
from wuerstchen.models.text import TextStates
from wuerstchen.pipeline import load
from wuerstchen.recipes import RECIPES
from wuerstchen.recipes.mini import mini
from wuerstchen.sampling import Sampling
from wuerstchen.train.config import StageFewConfig
from wuerstchen.train.engine.checkpoint import newest
from wuerstchen.train.engine.ema import make_average
from wuerstchen.train.engine.validation import Denoising, HeldOut, Jumping, Validation
from wuerstchen.train.feed.images import Batch
from wuerstchen.train.feed.prepared import StoredBatch
from wuerstchen.train.feed.random import ImageRandom
from wuerstchen.train.report.page import write_report
from wuerstchen.train.run import train
from wuerstchen.train.stages.base import ReadsStored, Stage
from wuerstchen.train.stages.few import StageFew, pseudo_huber, teacher_times, trajectories

from ...configurations import (
    SMALL_COMPRESSOR,
    SMALL_DECODER,
    SMALL_PREVIEWER,
    SMALL_VQGAN,
    TOY_PRIOR,
    with_student,
    write_model,
)

CPU = torch.device("cpu")
CAPTIONS = ["a cat", "a red car", "a green tree"]


@pytest.fixture
def few_runs(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    yield importlib.import_module("few_runs")
    del sys.modules["few_runs"]


@pytest.fixture
def make_stage(few_runs, small_cascade):
    def make(**changes) -> StageFew:
        recipe = few_runs.recipe(Path("model"))
        config = dataclasses.replace(recipe.stage_few, **changes)
        recipe = dataclasses.replace(recipe, stage_few=config)
        cascade = copy.deepcopy(small_cascade)
        student = Prior(dataclasses.replace(cascade.prior.config, dropout=0.0))
        student.load_state_dict(cascade.prior.state_dict())
        return StageFew(config, recipe, cascade, student)

    return make


def batch_of(captions, first=0, side=128):
    images = torch.zeros(len(captions), side, side, 3, dtype=torch.uint8)
    return Batch(torch.arange(first, first + len(captions)), images, captions, [])


def texts(count):
    return TextStates(states=torch.randn(count, 5, 8), mask=torch.arange(5) < torch.full((count, 1), 3))


@pytest.mark.parametrize("objective", [VelocityPrediction(), NoisePrediction()], ids=lambda o: o.kind)
def test_a_trajectory_written_out(objective, randomise):
    """DPM-Solver++ with guidance in its form for data prediction, in float64."""
    prior = randomise(Prior(dataclasses.replace(TOY_PRIOR, prediction=objective.kind))).eval()
    text, empty, noise = texts(2), texts(1), torch.randn(2, 4, 3, 3)
    times = teacher_times(objective, 4)
    assert times[0] == {"velocity": 1.0, "noise": 0.98}[objective.kind]
    found = trajectories(prior, objective, text, empty, noise, times, masks=True, guidance=3.0)
    assert found.shape == (2, 5, 4, 3, 3)

    contexts = [prior.context(e.states.expand(2, -1, -1), e.mask.expand(2, -1)) for e in (text, empty)]

    def clean(x, t):
        t = torch.full((2,), t)
        with torch.no_grad():
            yes, no = (objective.to_clean(prior(x, t, c).double(), x.double(), t) for c in contexts)
        return no + 3.0 * (yes - no)

    scales = [[s.item() for s in objective.scales(torch.tensor(t).double())] for t in times]
    x, before = noise.double(), None
    for i in range(4):
        (a, s), (a2, s2) = scales[i], scales[i + 1]
        h = np.log(a2 / s2) - np.log(a / s)
        now = clean(x.float(), times[i])
        direction = now
        if before is not None and i < 3:
            direction = now + h / (2 * (np.log(a / s) - np.log(scales[i - 1][0] / scales[i - 1][1]))) * (
                now - before
            )
        x, before = s2 / s * x - a2 * np.expm1(-h) * direction, now
        error = (found[:, i + 1] - x).norm() / x.norm()
        assert error < 1e-2, i
    assert torch.equal(found[:, 0], noise)


def test_autocast_is_for_the_network_only(randomise, monkeypatch):
    """Near t = 1 the error of ε counts a hundred times in x̂₀: in bf16 it would be larger than x̂₀."""
    objective = VelocityPrediction()
    prior = randomise(Prior(dataclasses.replace(TOY_PRIOR, prediction="velocity"))).eval()
    given = (prior, objective, texts(2), texts(1), torch.randn(2, 4, 3, 3), teacher_times(objective, 4))
    exact = trajectories(*given, masks=True, guidance=2.0)
    forward, seen = Prior.forward, []
    monkeypatch.setattr(
        Prior, "forward", lambda *a: (seen.append(torch.is_autocast_enabled("cpu")), forward(*a))[1]
    )
    half = trajectories(*given, masks=True, guidance=2.0, dtype=torch.bfloat16)
    assert seen == [True] * 4
    assert half.dtype == torch.float32
    errors = (half - exact)[:, 1:].flatten(2).norm(dim=2) / exact[:, 1:].flatten(2).norm(dim=2)
    assert 0 < errors.max() < 0.03, errors


def test_flow_matching_is_followed_by_euler_s_method(randomise):
    objective = FlowMatching()
    prior = randomise(Prior(dataclasses.replace(TOY_PRIOR, prediction="flow"))).eval()
    text, noise = texts(2), torch.randn(2, 4, 3, 3)
    times = teacher_times(objective, 3)
    found = trajectories(prior, objective, text, texts(1), noise, times, masks=True, guidance=1.0)
    x, context = noise, prior.context(text.states, text.mask)
    with torch.no_grad():
        for i in range(3):
            x = x + (times[i + 1] - times[i]) * prior(x, torch.full((2,), times[i]), context)
            torch.testing.assert_close(found[:, i + 1], x, rtol=1e-4, atol=1e-4)


def test_outside_of_the_guidance_interval_the_teacher_is_unguided(randomise):
    objective = VelocityPrediction()
    prior = randomise(Prior(dataclasses.replace(TOY_PRIOR, prediction="velocity"))).eval()
    given = (prior, objective, texts(2), texts(1), torch.randn(2, 4, 3, 3), teacher_times(objective, 4))
    plain = trajectories(*given, masks=True, guidance=1.0)
    found = trajectories(*given, masks=True, guidance=3.0, interval=(0.0, 0.9))
    assert torch.equal(found[:, 1], plain[:, 1])  # the step from t = 1
    assert not torch.allclose(found[:, 2], plain[:, 2])


def test_inputs_depend_on_an_image_s_number_and_caption_only(make_stage):
    stage = make_stage()
    assert isinstance(stage, Stage)
    with torch.no_grad():
        together = stage.prepare(batch_of(CAPTIONS, first=7), CPU)
        alone = stage.prepare(batch_of(CAPTIONS[1:2], first=8), CPU)
        other = stage.prepare(batch_of(CAPTIONS[1:2], first=9), CPU)
        wide = stage.prepare(batch_of(CAPTIONS[:1], side=256), CPU)
    assert together["trajectory"].dtype == torch.float16
    assert together["trajectory"].shape == (3, len(stage.times), 2, 3, 3)
    assert wide["trajectory"].shape[-2:] == (6, 6)
    torch.testing.assert_close(together["trajectory"][1:2], alone["trajectory"], rtol=1e-2, atol=1e-2)
    assert not torch.allclose(alone["trajectory"], other["trajectory"], atol=0.1)
    assert torch.equal(together["states"][1:2], alone["states"])


@pytest.mark.parametrize("points", [1, 3])
def test_the_loss_written_out(make_stage, points):
    stage = make_stage(points=points)
    with torch.no_grad():
        inputs = stage.prepare(batch_of(CAPTIONS), CPU)
    indices = torch.arange(3)
    ((name, loss, _),) = stage.losses(inputs, ImageRandom(5, indices))
    assert name == "prior_student"
    u, student = ImageRandom(5, indices).uniform("point", (points,)), stage.networks["prior_student"]
    expected, steps = [], len(stage.times) - 1
    for image in range(3):
        for number in u[image].tolist():
            i = 0 if number < 0.5 else 1 + int((number - 0.5) / 0.5 * (steps - 1))
            x, end = inputs["trajectory"][image, [i, -1]].float()[:, None]
            text = (inputs["states"][image : image + 1], inputs["mask"][image : image + 1])
            t = torch.tensor([stage.times[i]])
            clean = stage.objective.to_clean(student(x, t, student.context(*text)), x, t)
            c = 0.00054 * 18**0.5
            expected.append(((clean - end).square().sum() + c**2).sqrt() - c)
    torch.testing.assert_close(loss, torch.stack(expected).mean(), rtol=1e-3, atol=1e-3)
    loss.backward()
    assert student.out[1].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in stage.teacher.parameters())


def test_half_of_the_points_are_pure_noise_and_the_others_uniform(make_stage, monkeypatch):
    stage, seen = make_stage(points=50), []
    monkeypatch.setattr(
        StageFew,
        "_jump",
        lambda self, student, x, t, states, mask: (seen.append(t), x * student.out[1].bias[0])[1],
    )
    trajectory = torch.zeros(100, len(stage.times), 2, 3, 3, dtype=torch.float16)
    inputs = {"trajectory": trajectory, "states": torch.zeros(100, 1, 1)}
    list(stage.losses(inputs, ImageRandom(1, torch.arange(100))))
    shares = [(seen[0] == t).float().mean().item() for t in torch.tensor(stage.times[:-1])]
    assert shares == pytest.approx([0.5, *[0.5 / (len(shares) - 1)] * (len(shares) - 1)], abs=0.02)


def test_the_pseudo_huber_loss_is_the_norm_far_away_and_a_square_nearby():
    zero = torch.zeros(1, 2, 3, 3)
    c = 0.00054 * 18**0.5
    far, near = zero + 1.0, zero + 1e-6
    assert pseudo_huber(far, zero).item() == pytest.approx(18**0.5 - c, rel=1e-5)
    near = zero.double() + 1e-5
    assert pseudo_huber(near, zero.double()).item() == pytest.approx(18e-10 / (2 * c), rel=1e-3)


def test_validation_measures_the_error_of_the_end_at_each_time(make_stage, monkeypatch):
    stage = make_stage()
    assert isinstance(stage, Jumping)
    assert not isinstance(stage, Denoising)

    class Held:
        def __len__(self):
            return 3

        def batches(self, size):
            return iter([batch_of(CAPTIONS[:2]), batch_of(CAPTIONS[2:], first=2)])

    averages = {"prior_student": make_average(stage.networks["prior_student"])}
    found = Validation(stage, Held(), None, CPU)(averages)
    with torch.no_grad():
        inputs = stage.prepare(batch_of(CAPTIONS), CPU)
        student, bins, losses = averages["prior_student"], [], []
        for i, time in enumerate(stage.times[:-1]):
            x, t = inputs["trajectory"][:, i].float(), torch.full((3,), time)
            context = student.context(inputs["states"], inputs["mask"])
            clean, end = (
                stage.objective.to_clean(student(x, t, context), x, t),
                inputs["trajectory"][:, -1].float(),
            )
            bins.append((clean - end).square().mean().item())
            losses.append(pseudo_huber(clean, end).mean().item())
    assert found["times"] == stage.times[:-1]
    assert found["bins"] == pytest.approx(bins, rel=1e-2)
    assert found["loss"] == pytest.approx(0.5 * losses[0] + 0.5 * np.mean(losses[1:]), rel=1e-2)
    monkeypatch.setattr(StageFew, "_jump", lambda self, student, x, t, states, mask: inputs["end"])
    inputs["end"] = inputs["trajectory"][:, -1].float()
    errors, _ = stage.endpoint_errors(averages, inputs, 0)
    assert errors.tolist() == [0.0] * 3


def test_a_run_survives_a_kill_and_teaches_the_student(few_runs, model_folder, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    recipe = few_runs.recipe(model_folder)
    model = train(recipe, whole, device="cpu")

    command = [sys.executable, few_runs.__file__, str(model_folder), str(broken)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    folders = [run / "stage_few" / "checkpoints" for run in (whole, broken)]
    assert 0 < int(newest(folders[1])[0].name) < few_runs.IMAGES
    train(recipe, broken, device="cpu")
    states = [newest(folder)[1]["files"] for folder in folders]
    assert states[0] == states[1]  # checksums of all tensors

    described = json.loads((model / "model.json").read_text())["settings"]
    assert described["prior_student_steps"] == 2
    assert described["prior_student_guidance"] == 2.0
    before, after = read_cascade(model_folder), read_cascade(model)
    teacher = after.prior.state_dict()
    assert all(torch.equal(teacher[key], tensor) for key, tensor in before.prior.state_dict().items())
    assert after.prior_student.config.dropout == 0.0
    assert any(
        not torch.equal(teacher[key], tensor) for key, tensor in after.prior_student.state_dict().items()
    )
    (image,) = load(model, device="cpu").generate("a cat", sampling=Sampling(prior_sampler="few"))
    assert image.size == (128, 128)
    assert (whole / "stage_few" / "previews").is_dir()


def validations(run):
    events = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [event for event in events if event["event"] == "validation"]


def test_training_lowers_the_validation_error(few_runs, model_folder, tmp_path, monkeypatch):
    """On captions and noise that training does not see."""
    captions = [f"a noto emoji of {thing}" for thing in ("a dog", "a tree", "an apple", "a ship")]
    kept = HeldOut(images=batch_of(captions * 4).images, captions=captions * 4)
    monkeypatch.setattr("wuerstchen.train.run_phase.held_out", lambda *_, **more: kept)
    recipe = few_runs.recipe(model_folder, prepared_images=32)
    optimization = dataclasses.replace(recipe.stage_few.optimization, images=16 * 120, batch_size=16)
    few = dataclasses.replace(recipe.stage_few, optimization=optimization, points=2)
    run = tmp_path / "run"
    train(dataclasses.replace(recipe, stage_few=few), run, device="cpu")
    first, last = validations(run)[0], validations(run)[-1]
    assert last["images"] == 16 * 120
    assert len(last["bins"]) == len(last["times"])
    assert last["bins"][0] < 0.8 * first["bins"][0], (first, last)
    assert last["loss"] < 0.8 * first["loss"]
    write_report(run)
    page = (run / "report.html").read_text()
    assert all(f"t {str(time)[:5]}<" in page for time in last["times"])


def test_a_student_is_trained_further_and_falls_with_its_teacher(
    few_runs, small_cascade, tmp_path, randomise
):
    cascade = with_student(small_cascade)
    randomise(cascade.prior_student)
    folder = write_model(cascade, tmp_path / "model")
    begun = []
    init = StageFew.__init__

    def remembered(self, config, recipe, model, student, **options):
        begun.append(copy.deepcopy(student.state_dict()))
        init(self, config, recipe, model, student, **options)

    for fresh, start in (((), cascade.prior_student), (("few",), cascade.prior)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StageFew, "__init__", remembered)
            train(few_runs.recipe(folder, fresh=fresh), tmp_path / f"run{fresh}", device="cpu")
        expected = start.state_dict()
        assert all(torch.equal(begun[-1][key], tensor) for key, tensor in expected.items()), fresh

    recipe = few_runs.recipe(folder)
    config = dataclasses.replace(recipe.stage_c, optimization=recipe.stage_few.optimization)
    recipe = dataclasses.replace(
        recipe,
        stages=("c",),
        stage_c=config,
        prior=small_cascade.prior.config,
        compressor=SMALL_COMPRESSOR,
        previewer=SMALL_PREVIEWER,
        decoder=SMALL_DECODER,
        vqgan=SMALL_VQGAN,
    )
    model = train(recipe, tmp_path / "prior", device="cpu")
    assert read_cascade(model).prior_student is None
    assert "student" not in (model / "model.json").read_text()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, r"steps must be at least 1, got 0"),
        ("points", 0, r"points must be at least 1, got 0"),
        ("teacher_steps", 2, r"teacher_steps must be at least 3, got 2"),
        ("pure_noise", 1.0, r"pure_noise must be from 0 to below 1, got 1\.0"),
        ("trajectories", -1, r"trajectories must be at least 0, got -1"),
        ("image_size", 100, r"image_size must be a multiple of 128, got 100"),
    ],
)
def test_settings_are_checked(field, value, message):
    with pytest.raises(UserError, match=message):
        StageFewConfig(**{field: value})


def test_the_recipe_of_the_bundled_model_is_its_own_but_for_the_students():
    recipe = RECIPES["mini-few"]()
    assert recipe.stages[0] == "few"
    own = {"name": "mini", "stages": mini().stages, "start_from": "", "stage_few": StageFewConfig()}
    assert dataclasses.replace(recipe, **own) == mini()


@pytest.mark.parametrize("kind", ["text file", "folder"])
def test_captions_are_enough(few_runs, model_folder, tmp_path, kind):
    """No image is opened: those of the folder cannot be."""
    data = tmp_path / "captions.txt"
    if kind == "text file":
        data.write_text("\n".join(f"thing {number}" for number in range(200)))
    else:
        data = tmp_path / "images"
        data.mkdir()
        for number in range(9):
            Image.new("RGB", (150, 130)).save(data / f"{number}.png")
            (data / f"{number}.png").write_bytes((data / f"{number}.png").read_bytes()[:60])
            (data / f"{number}.txt").write_text(f"thing {number}")
    run = tmp_path / "run"
    train(few_runs.recipe(model_folder, data=str(data)), run, device="cpu")
    assert bool(validations(run)) == (kind == "text file")
    assert '"skipped"' not in (run / "log.jsonl").read_text()
    if kind == "text file":
        recipe = few_runs.recipe(model_folder, data=str(data))
        with pytest.raises(UserError, match=r"has captions without images, and stage a reads images"):
            train(dataclasses.replace(recipe, stages=("a", "b", "c")), tmp_path / "other", device="cpu")


def test_a_prepared_set_gives_the_same_inputs(make_stage):
    stage, batch = make_stage(), batch_of(CAPTIONS)
    tokens = [np.array(stage.text_encoder.tokens(caption), dtype=np.int64) for caption in CAPTIONS]
    latents = torch.full((3, 2, 3, 3), torch.nan, dtype=torch.float16)  # not read
    assert isinstance(stage, ReadsStored)
    with torch.no_grad():
        stored = stage.prepare_stored(StoredBatch(batch.indices, latents, tokens, None, []), CPU)
        expected = stage.prepare(batch, CPU)
    assert stored.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(stored[name], tensor, rtol=1e-2, atol=1e-2)

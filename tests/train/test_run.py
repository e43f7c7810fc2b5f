"""Whole runs: a kill changes nothing, and a run folder is guarded."""

import contextlib
import dataclasses
import errno
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image, ImageCms

from wuerstchen.checkpoints.native import read_cascade, read_network
from wuerstchen.cli import main, make_parser
from wuerstchen.cli.train import overridden
from wuerstchen.data.emoji import EmojiSource, listed_heldout, sample_root
from wuerstchen.data.open import open_source
from wuerstchen.errors import DataError, RunFolderError, UserError
from wuerstchen.models.cascade import PUBLISHED_STATISTICS
from wuerstchen.models.compressor import CompressorConfig
from wuerstchen.recipes import RECIPES
from wuerstchen.recipes.mini import mini
from wuerstchen.recipes.tiny import tiny
from wuerstchen.train import run
from wuerstchen.train.changes import plan
from wuerstchen.train.config import Phase, as_dict, differing_fields, phases_of
from wuerstchen.train.engine.checkpoint import newest
from wuerstchen.train.engine.distributed import Processes
from wuerstchen.train.engine.image_cache import fill_image_cache
from wuerstchen.train.engine.stopping import Interrupted
from wuerstchen.train.feed.images import Feed
from wuerstchen.train.report.announce import RunMonitor
from wuerstchen.train.report.cost import Tariff
from wuerstchen.train.report.events import Log
from wuerstchen.train.report.page import write_report
from wuerstchen.train.run import TrainingRun, _train, train
from wuerstchen.train.stages.base import cascade_settings

from ..configurations import with_optimization

MICRO = [
    word
    for option in (
        "--workers 0 --checkpoint-seconds 0 --statistics-images 16 --prior-steps 2 --decoder-steps 2",
        "--stage-a.optimization.images 24 --stage-a.optimization.batch-size 4 --stage-a.adversarial-from 8",
        "--stage-a.refine-images 12",
        "--stage-b.optimization.images 10 --stage-b.optimization.batch-size 2 --stage-b.refine-images 10",
        "--stage-c.optimization.images 24 --stage-c.optimization.batch-size 4 --preview-prompts cat",
        "--stage-c.phases.0.optimization.images 12 --stage-c.phases.0.optimization.batch-size 4",
    )
    for word in option.split()
]


STAGES = ("a", "b", "b2", "a2", "c", "c2")
PHASED = Path(__file__).with_name("phased_runs.py")


def start(run_dir: Path, images: Path) -> subprocess.Popen:
    command = [sys.executable, str(PHASED), "train", "tiny", "--run-dir", str(run_dir), "--data", str(images)]
    command += ["--no-rehearsal", *MICRO]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def events(run_dir: Path) -> list[dict]:
    path = run_dir / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def kill_in(run_dir: Path, stage: str, images: Path) -> int:
    """Starts the run and kills it without warning after a checkpoint in the middle of ``stage``."""
    before = len(events(run_dir))
    process = start(run_dir, images)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        for event in events(run_dir)[before:]:
            if event["event"] == "checkpoint" and event["stage"] == stage and event["images"] >= 4:
                os.kill(process.pid, signal.SIGKILL)
                process.communicate()
                return event["images"]
        time.sleep(0.02)
    process.kill()
    raise AssertionError(f"no checkpoint in stage {stage}: {process.communicate()[0]}")


def test_a_damaged_last_checkpoint_is_made_again_on_the_same_images(tmp_path):
    """Also where images are composed before: the stage looks finished, and is not."""
    full = tiny()
    stage_a = with_optimization(dataclasses.replace(full.stage_a, refine_images=0), images=24, batch_size=4)
    small = {"workers": 0, "statistics_images": 16, "checkpoint_seconds": 0.0, "prepared_images": 8}
    recipe = dataclasses.replace(full, stage_a=stage_a, stages=("a",), **small)
    digests = []
    for expected in (contextlib.nullcontext(), pytest.warns(UserWarning, match="is damaged")):
        with expected:
            train(recipe, tmp_path, device="cpu")
        path, state = newest(tmp_path / "stage_a" / "checkpoints")
        assert state["images"] == 24
        digests.append(state["files"])
        damaged = bytearray((path / "networks.safetensors").read_bytes())
        damaged[-1] ^= 1
        (path / "networks.safetensors").write_bytes(damaged)
        shutil.rmtree(tmp_path / "model")
    assert digests[0] == digests[1]
    assert [e["images"] for e in events(tmp_path) if e["event"] == "start"][-1] in (16, 20)


def final_files(run_dir: Path) -> dict[str, dict[str, str]]:
    found = {stage: newest(run_dir / f"stage_{stage}" / "checkpoints") for stage in STAGES}
    return {stage: state["files"] for stage, (_, state) in found.items()}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Emoji as a folder of images, enough for some of them to be held out."""
    folder, sample = tmp_path_factory.mktemp("images"), open_source("sample")
    for n in range(110):
        example = sample.example(n % len(sample), np.random.default_rng(n), 128)
        Image.fromarray(example.image).save(folder / f"x{n}.png")
        (folder / f"x{n}.txt").write_text(example.caption)
    return folder


@pytest.fixture(scope="module")
def recipe(images):
    """The recipe of ``start``; checkpoints are written at the end of each stage alone."""
    options = make_parser().parse_known_args(["train", "tiny", "--data", str(images)])[0]
    options.overrides = MICRO
    recipe = overridden(runpy.run_path(str(PHASED))["phased"](), options)
    return dataclasses.replace(recipe, checkpoint_seconds=3600.0)


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> Path:
    """The folder of a run in one go, which nothing watches: no rehearsal, no validation."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wuerstchen.train.run_phase.held_out", lambda *_, **more: None)
        train(recipe, folder)
    assert not [e for e in events(folder) if e["event"] in ("rehearsed", "validation", "tariff")]
    return folder


@pytest.mark.parametrize("stages", [("b",), pytest.param(STAGES, marks=pytest.mark.slow)], ids=["one", "all"])
def test_kills_change_nothing(tmp_path, images, recipe, whole, stages):
    """Networks, averages and optimizers of all three stages, bit for bit; the model too."""
    broken = tmp_path / "broken"
    killed_at = {stage: kill_in(broken, stage, images) for stage in stages}
    train(recipe, broken)
    assert final_files(broken) == final_files(whole)
    for part in ("vqgan", "decoder", "compressor", "prior", "previewer"):
        name = Path("model") / f"{part}.safetensors"
        assert (broken / name).read_bytes() == (whole / name).read_bytes()

    starts = [e for e in events(broken) if e["event"] == "start"]
    for stage, count in killed_at.items():
        first, second = [e for e in starts if e["stage"] == stage][:2]
        assert first["images"] == 0
        assert second["resumed"]
        # The next start goes on from the checkpoint seen, or from one written before the kill arrived.
        assert second["images"] >= count > 0

    # The finished run is left alone by the same command, and the model says where it came from.
    train(recipe, broken)
    assert final_files(broken) == final_files(whole)
    for file in (whole / "model").rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (broken / "model" / file.relative_to(whole / "model")).read_bytes()
    _, provenance = read_network(broken / "model" / "prior.safetensors")
    assert (provenance.recipe, provenance.seed, provenance.images) == ("tiny", 0, 36)
    assert provenance.data == open_source(str(images)).fingerprint()
    assert provenance.versions.keys() == {"wuerstchen", "torch"}
    _, state = newest(broken / "stage_c" / "checkpoints")
    assert state["format"] == 2
    assert state["images"] == 24
    assert {"recipe", "seed", "data", "versions"} <= state.keys()
    assert state["fields"]["stage_b"]["backbone_rate"] == 0.1
    cascade = read_cascade(broken / "model")
    assert min(cascade.settings.latent_statistics.std) > 0.3  # the latents tell images apart
    assert len(cascade.settings.latent_statistics.mean) == 16
    assert cascade.vqgan.config.scale_factor != tiny().vqgan.scale_factor


@pytest.mark.slow
def test_watching_changes_nothing(tmp_path, recipe, whole, capsys):
    """With a rehearsal and validation on the way, and without: the same bits."""
    recipe = dataclasses.replace(recipe, checkpoint_seconds=0.0)  # with a validation after each update
    monitor = RunMonitor(tariff=Tariff(per_hour=2.0), rehearse=True)
    train(recipe, tmp_path / "watched", monitor=monitor)
    found = events(tmp_path / "watched")
    rehearsed = {e["stage"]: e for e in found if e["event"] == "rehearsed"}
    assert rehearsed.keys() == set(STAGES)
    assert {e["total"] for e in rehearsed.values()} == {10, 12, 24}
    assert all(e["seconds"] > 0 and e["kwh"] is None for e in rehearsed.values())
    validated = [e for e in found if e["event"] == "validation"]
    assert {e["stage"] for e in validated} == {"b", "b2", "c", "c2"}
    assert all(0 < value < 100 for e in validated for value in e["bins"])
    said = capsys.readouterr().out
    assert "Remaining cost at the measured speed:\n  Stage A:" in said
    assert said.count("in total:") == 2  # before and after
    assert ", cost " in said

    assert final_files(tmp_path / "watched") == final_files(whole)

    # What was measured once is not measured again, and its pace is that of the log from now on.
    train(recipe, tmp_path / "watched", monitor=monitor)
    found = events(tmp_path / "watched")
    assert sum(e["event"] == "rehearsed" for e in found) == len(STAGES)
    assert sum(e["event"] == "tariff" for e in found) == 1
    page = write_report(tmp_path / "watched").read_text()
    assert "finished" in page
    assert page.count("prediction error by time") == 8  # a title and a label a stage


def test_torch_s_defaults_change_no_bit(tmp_path, foreign_defaults):
    words = "--stages a --statistics-images 8 --workers 0 --preview-prompts cat --prior-steps 2"
    words += " --stage-a.optimization.images 8 --stage-a.optimization.batch-size 4 --stage-a.refine-images 0"
    options = make_parser().parse_known_args(["train", "tiny"])[0]
    options.overrides = words.split()
    recipe = overridden(tiny(), options)
    train(recipe, tmp_path / "plain", device="cpu", monitor=RunMonitor(rehearse=False))
    with foreign_defaults(torch.float64):
        train(recipe, tmp_path / "foreign", device="cpu", monitor=RunMonitor(rehearse=False))
    plain, foreign = (
        newest(tmp_path / name / "stage_a" / "checkpoints")[1]["files"] for name in ("plain", "foreign")
    )
    assert plain == foreign


def test_a_lock_keeps_two_processes_apart(tmp_path):
    with (
        FileLock(tmp_path / "lock"),
        pytest.raises(
            RunFolderError, match=r"in use by another process\. Wait for it, or use another --run-dir"
        ),
    ):
        train(tiny(), tmp_path)


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A run folder that was begun; what trains is left out."""
    monkeypatch.setattr("wuerstchen.train.run.TrainingRun.train", lambda self: self.run_dir / "model")
    train(tiny(), tmp_path)
    return tmp_path


def test_a_run_from_before_colour_profiles_were_read(tmp_path, monkeypatch):
    """It goes on as it was where no image has a profile, and else only if asked to."""
    monkeypatch.setattr("wuerstchen.train.run.TrainingRun.train", lambda self: self.run_dir / "model")
    profile = ImageCms.createProfile("sRGB")
    adobe = runpy.run_path(str(Path(__file__).parents[1] / "test_colour_profiles.py"))
    for name, content in (
        ("none", None),
        ("srgb", ImageCms.ImageCmsProfile(profile).tobytes()),
        ("adobe", adobe["rgb_profile"](adobe["to_xyz"](adobe["ADOBE"], adobe["D65"]), 2.2)),
    ):
        data, run_dir = tmp_path / name, tmp_path / f"run-{name}"
        data.mkdir()
        for number in range(40):
            icc = content if number == 33 else None
            Image.new("RGB", (64, 64), (number, 90, 9)).save(data / f"{number:02}.png", icc_profile=icc)
            (data / f"{number:02}.txt").write_text("a colour")
        recipe = dataclasses.replace(tiny(), data=str(data))
        train(recipe, run_dir)
        stored = json.loads((run_dir / "run.json").read_text())
        del stored["colours"]
        (run_dir / "run.json").write_text(json.dumps(stored))
        if name == "adobe":
            with pytest.raises(RunFolderError, match=r"ignored colour profiles, and image '33\.png' has one"):
                train(recipe, run_dir)
            train(recipe, run_dir, accept_changed_data=True)
            assert [e["now"] for e in events(run_dir) if e["event"] == "accepted changed data"]
        train(recipe, run_dir)


def test_what_is_read_is_said_before_the_first_update_and_once(tmp_path, monkeypatch, capsys):
    order = []
    monkeypatch.setattr(
        "wuerstchen.train.run.TrainingRun.train", lambda self: order.append("train") or self.run_dir
    )
    monkeypatch.setattr("wuerstchen.train.run.TrainingRun.rehearse", lambda self: print("rehearsal"))
    data = tmp_path / "photos"
    data.mkdir()
    for number in range(16):
        Image.new("RGB", (64, 64), (number, 90, 9)).save(data / f"{number}.png")
        (data / f"{number}.txt").write_text("a colour")
    recipe, monitor = dataclasses.replace(tiny(), data=str(data)), RunMonitor(rehearse=True)
    train(recipe, tmp_path / "run", monitor=monitor)
    said = capsys.readouterr().out
    assert f"{data}: 16 images to train on" in said
    assert "Stage C: 2,400 images, 150 epochs" in said
    assert f"Warning: most images of {data} are smaller than 128x128 pixels" in said
    assert said.index("rehearsal") > said.index("Warning")
    train(recipe, tmp_path / "run", monitor=monitor)
    assert "to train on" not in capsys.readouterr().out
    (found,) = [event for event in events(tmp_path / "run") if event["event"] == "data"]
    assert found["warned"]


@pytest.mark.slow
def test_images_are_composed_after_the_costs_are_said_and_no_more_than_are_used(tmp_path, monkeypatch):
    """A few are enough to measure what an update costs."""
    order = []

    def noted(feed, count, workers, device):
        order.append(count)
        return fill_image_cache(feed, count, workers, device)

    monkeypatch.setattr("wuerstchen.train.run_phase.fill_image_cache", noted)
    monkeypatch.setattr("wuerstchen.train.run.print_remaining_cost", lambda log: order.append("costs"))
    full = tiny()
    stage_a = with_optimization(full.stage_a, images=24, batch_size=4)
    changes = {"workers": 0, "statistics_images": 8, "prepared_images": 40, "stages": ("a",)}
    recipe = dataclasses.replace(full, stage_a=stage_a, **changes)
    train(recipe, tmp_path / "run", device="cpu", monitor=RunMonitor(rehearse=True))
    assert order == [4, "costs", 24]
    # A run of an earlier version keeps as many as it began with, which decides on the order of images.
    order.clear()
    described = tmp_path / "run" / "run.json"
    content = json.loads(described.read_text())
    del content["order"]
    described.write_text(json.dumps(content))
    for name in ("model", "stage_a"):
        shutil.rmtree(tmp_path / "run" / name)
    train(dataclasses.replace(recipe), tmp_path / "run", device="cpu")
    assert order == ["costs", 40]
    # Nothing is composed where only the last preview is missing.
    order.clear()
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "run" / "stage_a" / "previews")
    (tmp_path / "run" / "log.jsonl").unlink()
    train(dataclasses.replace(recipe), tmp_path / "run", device="cpu")
    assert list((tmp_path / "run" / "stage_a" / "previews").iterdir())
    assert order == ["costs"]


@pytest.mark.slow
def test_what_the_first_process_does_alone_is_waited_for_as_long_as_it_takes(tmp_path, monkeypatch):
    """Other exchanges fail where a process comes half an hour late: surveys of many images take longer."""
    order = []

    def noted(owner, name, entry, result=None):
        original = getattr(owner, name)

        def call(*given, **named):
            found = original(*given, **named) if result is None else result[0]
            order.append(entry)
            return found

        monkeypatch.setattr(owner, name, call)

    for name in ("any_rank", "any_rank_each", "all_equal", "all_gather", "all_reduce_sum", "barrier"):
        noted(Processes, name, "exchange")
    noted(Processes, "barrier_without_timeout", "barrier_without_timeout")
    noted(TrainingRun, "validation", "held-out images", [None])
    noted(TrainingRun, "write_model_once", "the model")
    noted(run, "overview", "overview")
    noted(run, "first_converted", "colours", [None])
    noted(run, "write_json", "a measurement")
    recipe = tiny()
    stage_a = with_optimization(recipe.stage_a, images=8, batch_size=4)
    changes = {"workers": 0, "statistics_images": 8, "prepared_images": 0, "stages": ("a",)}
    recipe = dataclasses.replace(recipe, stage_a=stage_a, **changes)
    train(recipe, tmp_path / "run", device="cpu")
    described = tmp_path / "run" / "run.json"
    content = json.loads(described.read_text())
    del content["colours"]
    described.write_text(json.dumps(content))
    shutil.rmtree(tmp_path / "run" / "stage_a")
    train(recipe, tmp_path / "run", device="cpu")
    for alone in ("held-out images", "the model", "overview", "colours", "a measurement"):
        places = [place for place, entry in enumerate(order) if entry == alone]
        assert places
        for place in places:
            after = next(entry for entry in order[place:] if entry in ("exchange", "barrier_without_timeout"))
            assert after == "barrier_without_timeout", alone


def test_batches_of_every_phase_are_checked_against_the_processes_at_the_start(tmp_path, monkeypatch):
    """Of later phases too, without a rehearsal, and before anything is read or written."""
    processes = Processes(torch.device("cpu"), 0, 3)
    monkeypatch.setattr("wuerstchen.train.run.read_start", lambda recipe: pytest.fail("too late"))
    recipe = tiny()
    of_three = {
        name: with_optimization(stage, images=48, batch_size=12)
        for name, stage in (
            ("stage_a", recipe.stage_a),
            ("stage_b", recipe.stage_b),
            ("stage_c", recipe.stage_c),
        )
    }
    odd = dataclasses.replace(of_three["stage_c"].optimization, batch_size=16)
    of_three["stage_c"] = dataclasses.replace(of_three["stage_c"], phases=(Phase(optimization=odd),))
    odd = dataclasses.replace(recipe, **of_three)
    with pytest.raises(UserError, match=r"stage_c2: batches of 16 and 48 images .* across 3 processes"):
        _train(odd, plan(odd, None, tmp_path / "run"), tmp_path / "run", processes, False, RunMonitor())
    assert not (tmp_path / "run").exists()


def test_a_folder_of_others_is_not_filled(tmp_path, monkeypatch):
    monkeypatch.setattr("wuerstchen.train.run.TrainingRun.train", lambda self: self.run_dir)
    for name in ("photo.png", "metadata.jsonl", "notes"):
        folder = tmp_path / f"with-{name}"
        folder.mkdir()
        (folder / name).write_text("x")
        with pytest.raises(
            RunFolderError, match=rf"contains other files: '{name}'\. .* a new or empty folder"
        ):
            train(tiny(), folder)
        assert not (folder / "run.json").exists()
    (tmp_path / "fine").mkdir()
    for name in ("slurm-1.out", ".hidden"):
        (tmp_path / "fine" / name).write_text("x")
    train(tiny(), tmp_path / "fine")
    train(tiny(), tmp_path / "fine")


def test_a_finished_run_says_so_and_skipped_captions_are_named(tmp_path, capsys):
    data = tmp_path / "my photos"
    data.mkdir()
    for number in range(16):
        Image.effect_noise((128, 128), 90).convert("RGB").save(data / f"{number}.png")
        (data / f"{number}.txt").write_text("" if number == 3 else f"a colour {number}")
    options = f"train tiny --stages a --workers 0 --device cpu --statistics-images 8 --run-dir {tmp_path}/r"
    options += " --no-rehearsal --stage-a.optimization.images 8 --stage-a.optimization.batch-size 4"
    assert main([*options.split(), "--data", str(data)]) == 0
    said = capsys.readouterr().out
    assert "already finished" not in said
    assert f"It is trained on {data} instead of its own data, sample" in said
    assert "camel" not in said
    assert "skipped: 1 image with an empty caption ('3.png')" in said
    assert "skipped 3.png: its caption is empty" in said
    assert main([*options.split(), "--data", str(data)]) == 0
    assert f"{tmp_path}/r is already finished" in capsys.readouterr().out


def test_the_closing_hint_can_be_pasted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("wuerstchen.train.run._train", lambda given, plan, run_dir, *_: run_dir / "model")
    assert main(["train", "tiny", "--run-dir", str(tmp_path / "my run"), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert f"wuerstchen generate --model '{tmp_path}/my run/model' ..." in said
    assert "All three stages on the bundled sample" in said  # the recipe's own text, on its own data


def test_previews_are_of_captions_of_the_data(tmp_path, monkeypatch):
    """The recipes' prompts are about emoji. Those that a user names stay."""
    stored = []
    monkeypatch.setattr(
        "wuerstchen.train.run.TrainingRun.train",
        lambda self: stored.append(self.recipe.preview_prompts) or self.run_dir / "model",
    )
    data = tmp_path / "photos"
    data.mkdir()
    for number in range(20):
        Image.new("RGB", (128, 128)).save(data / f"{number}.png")
        (data / f"{number}.txt").write_text(f"photo {number}")
    common = ["train", "tiny", "--device", "cpu", "--no-rehearsal", "--run-dir"]
    assert main([*common, str(tmp_path / "1"), "--data", str(data)]) == 0
    assert main([*common, str(tmp_path / "2"), "--data", str(data), "--preview-prompts", "a cat"]) == 0
    assert main([*common, str(tmp_path / "3")]) == 0
    own, named, sample = stored
    assert len(own) == 8
    assert set(own) <= {f"photo {number}" for number in range(20)}
    assert named == ("a cat",)
    assert sample == tiny().preview_prompts
    assert RECIPES["v2-finetune"]().preview_prompts == ()


def test_precisions_have_the_names_of_other_commands_too():
    assert dataclasses.replace(tiny(), precision="float32").precision == "fp32"
    assert as_dict(dataclasses.replace(tiny(), precision="bfloat16"))["precision"] == "bf16"
    parse = make_parser().parse_args
    assert parse(["generate", "a cat", "--precision", "bf16"]).precision == "bfloat16"
    assert parse(["data", "prepare", "x", "y", "--precision", "fp32"]).precision == "float32"


def test_phases_are_added_and_shaped_on_the_command_line(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(
        "wuerstchen.train.run.train", lambda recipe, *_, **__: found.append(recipe) or tmp_path
    )
    options = (
        "--add-phase c --add-phase b --add-phase c --stage-c.max-ratio 1.5 --stage-c.phases.1.max-ratio 2"
    )
    options += " --stage-c.phases.1.optimization.images 320 --stage-c.phases.0.image-size 256"
    options += " --stage-b.phases.0.optimization.learning-rate 1e-5 --data photos"
    assert main(["train", "tiny", *options.split(), "--run-dir", str(tmp_path)]) == 0
    (recipe,) = found
    first, second, third = phases_of(recipe.stage_c)
    assert first.optimization == second.optimization == tiny().stage_c.optimization
    assert (first.max_ratio, second.max_ratio, third.max_ratio) == (1.5, 1.0, 2.0)
    assert (second.image_size, third.image_size) == (256, None)
    assert third.optimization.images == 320
    assert recipe.stage_b.phases[0].optimization.learning_rate == 1e-5
    with pytest.raises(UserError, match=r"max_ratio must be between 1 and 4, got 5\.0"):
        dataclasses.replace(tiny().stage_c, max_ratio=5.0)
    ratio = dataclasses.replace(tiny().stage_b, max_ratio=2.0)
    with pytest.raises(UserError, match=r"max_ratio must be 1 for emoji"):
        train(dataclasses.replace(tiny(), stage_b=ratio), tmp_path / "run", device="cpu")


def test_fields_that_earlier_runs_lack_have_the_value_that_they_went_by():
    stored = as_dict(tiny())
    del stored["stage_c"]["max_ratio"]
    assert differing_fields(stored, as_dict(tiny())) == []
    wide = dataclasses.replace(tiny(), stage_c=dataclasses.replace(tiny().stage_c, max_ratio=2.0))
    assert differing_fields(stored, as_dict(wide)) == ["stage_c.max_ratio (1.0, now 2.0)"]


def test_a_stage_a_that_is_not_trained_may_have_changed():
    """Its fields of earlier versions, in runs that take Stage A from elsewhere."""
    tuned = RECIPES["v2-finetune"]()
    uniform = dataclasses.replace(tuned, stage_a=dataclasses.replace(tuned.stage_a, codebook_init="uniform"))
    assert differing_fields(as_dict(uniform), as_dict(tuned)) == []
    full = tiny()
    uniform = dataclasses.replace(full, stage_a=dataclasses.replace(full.stage_a, codebook_init="uniform"))
    assert differing_fields(as_dict(uniform), as_dict(full)) == [
        "stage_a.codebook_init (uniform, now normal)"
    ]


@pytest.mark.parametrize(("size", "near"), [(100, 128), (1, 128), (200, 256), (1000, 1024)])
def test_the_nearest_size_that_is_allowed_is_named(size, near):
    with pytest.raises(UserError, match=rf"image_size must be a multiple of 128, got {size}\. Use {near}"):
        dataclasses.replace(tiny(), image_size=size)


def test_the_run_folder_of_another_recipe_is_refused(begun):
    recipe = tiny()
    longer = dataclasses.replace(recipe.stage_b.optimization, images=9999)
    other = dataclasses.replace(
        recipe, seed=3, stage_b=dataclasses.replace(recipe.stage_b, optimization=longer)
    )
    said = r"another recipe: seed \(0, now 3\), stage_b\.optimization\.images \(1600, now 9999\) differ"
    with pytest.raises(RunFolderError, match=said):
        train(other, begun)


def test_what_does_not_change_the_result_may_change(begun):
    train(dataclasses.replace(tiny(), workers=0, checkpoint_seconds=5.0, preview_every=100), begun)
    train(dataclasses.replace(tiny(), data=str(sample_root())), begun)  # the same images by another name


def test_what_kills_left_half_written_is_swept_out(begun):
    for name in ("stage_a/checkpoints/.000000000012.partial", ".model.x1y2/model"):
        (begun / name).mkdir(parents=True)
    train(tiny(), begun)
    assert not list(begun.rglob(".*"))


def test_changed_data_are_refused_unless_accepted_and_recorded(begun, monkeypatch):
    monkeypatch.setattr("wuerstchen.data.emoji.EmojiSource.fingerprint", lambda self: "other")
    with pytest.raises(RunFolderError, match=r"data in sample have changed .* --accept-changed-data"):
        train(tiny(), begun)
    train(tiny(), begun, accept_changed_data=True)
    accepted = [e for e in events(begun) if e["event"] == "accepted changed data"]
    assert [e["now"] for e in accepted] == ["other"]
    train(tiny(), begun)  # accepted once is accepted


def test_damaged_files_of_a_run_are_named(begun):
    stored = json.loads((begun / "run.json").read_text())
    (begun / "run.json").write_text(json.dumps({**stored, "recipe": 3}))
    with pytest.raises(RunFolderError, match=r"run\.json is not a run description: it lacks recipe or data"):
        train(tiny(), begun)
    (begun / "run.json").write_text(json.dumps(stored))
    run = TrainingRun.__new__(TrainingRun)
    run.processes = Processes(torch.device("cpu"))
    run.run_dir = begun
    for content in ("{}", "[]", "{", '"x"'):
        (begun / "measured.json").write_text(content)
        with pytest.raises(RunFolderError, match=r"measured\.json .* Remove it, and it will be measured"):
            run.measured_once(".", dict, {})


def test_a_log_edited_by_hand_does_not_stop_a_run(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    log.event("start", stage="a")
    with open(log.path, "ab") as file:
        file.write(b'garbage\n{"no": "event"}\n[1]\n\xff\xfe\n')
    log.event("skipped", name="\u2028 \udcff", reason="odd name")
    assert [event["event"] for event in log.events()] == ["start", "skipped"]
    assert log.events()[1]["name"] == "\u2028 \udcff"


SLOW = """
import sys, time
from wuerstchen import cli
from wuerstchen.train import run, run_phase

def slow(*_, **__):
    print("slow", flush=True)
    time.sleep(60)

owner, _, name = sys.argv[1].rpartition(".")
setattr({"": run, "run_phase": run_phase, "TrainingRun": run.TrainingRun}[owner], name, slow)
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    "name",
    [
        "run_phase.fill_image_cache",
        pytest.param("open_sources", marks=pytest.mark.slow),
        pytest.param("read_start", marks=pytest.mark.slow),
        pytest.param("TrainingRun.write_model", marks=pytest.mark.slow),
    ],
)
def test_sigterm_outside_of_the_loop_is_one_line_and_the_run_goes_on(tmp_path, name):
    """It ended the process without a word."""
    run_dir = tmp_path / "run"
    options = [
        "train",
        "tiny",
        "--run-dir",
        str(run_dir),
        "--no-rehearsal",
        "--stages",
        "a",
        "--device",
        "cpu",
    ]
    options += ["--stage-a.optimization.images", "8", "--workers", "1", "--prepared-images", "16"]
    options += ["--statistics-images", "4"]
    command = [sys.executable, "-c", SLOW, name, *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "slow" not in process.stdout.readline():
        assert process.poll() is None, process.communicate()
    process.terminate()
    said = process.communicate(timeout=30)[1].splitlines()
    assert process.returncode == 128 + signal.SIGTERM
    assert said[-1] == "stopped by SIGTERM. Start the same command again to resume"
    assert not [line for line in said if "Traceback" in line]
    assert main(options) == 0
    assert (run_dir / "model" / "model.json").is_file()


@pytest.mark.parametrize(
    ("images", "said"), [(0, "This stage has no checkpoint yet"), (44, "A checkpoint is saved")]
)
def test_after_a_stop_it_says_whether_there_is_a_checkpoint(tmp_path, monkeypatch, capsys, images, said):
    """At image 0 there is none."""

    def stopped(*_, **__):
        raise Interrupted(f"stopped at image {images} of 120 of stage A", images)

    monkeypatch.setattr(run, "train", stopped)
    assert main(["train", "tiny", "--run-dir", str(tmp_path)]) == 130
    expected = f"stopped at image {images} of 120 of stage A. {said}. Start the same command again to resume"
    assert capsys.readouterr().err.strip() == expected


def test_a_killed_loader_is_one_line(begun, monkeypatch):
    def killed(self):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    monkeypatch.setattr("wuerstchen.train.run.TrainingRun.train", killed)
    with pytest.raises(RunFolderError, match=r"a process that loads images was killed.* Use fewer --workers"):
        train(tiny(), begun)


WRAPPED = (
    "Caught OSError in DataLoader worker process 0.\nOriginal Traceback:\n  x\nOSError: [Errno 5] EIO: '/d/1'"
)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left"),
            RunFolderError,
            "{run} cannot be written: No space left. Free",
        ),
        (
            OSError(errno.ENOSPC, "Full", "{run}/x"),
            RunFolderError,
            "{run} cannot be written: Full. Free some",
        ),
        (
            OSError(errno.EACCES, "Denied", "/d/1.png"),
            UserError,
            "/d/1.png cannot be used: Denied. Fix that",
        ),
        (
            OSError(errno.EACCES, "Denied", b"{run}-2"),
            UserError,
            "{run}-2 cannot be used: Denied. Fix that",
        ),
        (FileNotFoundError(errno.ENOENT, "No temporary folder"), UserError, "cannot be used: No temporary"),
        (OSError(WRAPPED), UserError, "a file cannot be used: OSError: [Errno 5] EIO: '/d/1'. Fix that"),
        (OSError(), UserError, "a file cannot be used: OSError. Fix that"),
    ],
)
def test_an_error_of_the_system_is_of_the_file_that_it_names(begun, monkeypatch, error, kind, message):
    """All of them were blamed on the run folder."""
    if error.filename is not None:
        place = type(error.filename)
        error.filename = place(error.filename).replace(
            *map(os.fsencode if place is bytes else str, ("{run}", begun))
        )

    def failing(self):
        raise error

    monkeypatch.setattr("wuerstchen.train.run.TrainingRun.train", failing)
    with pytest.raises(UserError) as caught:
        train(tiny(), begun)
    assert type(caught.value) is kind
    assert message.replace("{run}", str(begun)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_run_json_and_a_newer_one_are_refused(begun):
    (begun / "run.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"run\.json cannot be read"):
        train(tiny(), begun)
    (begun / "run.json").write_text('{"format": 3}')
    with pytest.raises(UserError, match="--upgrade wuerstchen"):
        train(tiny(), begun)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(RunFolderError, match=r"cannot be written: .* Use another --run-dir"):
        train(tiny(), file / "run")


def test_fewer_images_than_a_batch_are_refused(tmp_path):
    Image.new("RGB", (128, 128)).save(tmp_path / "one.png")
    (tmp_path / "one.txt").write_text("a black square")
    with pytest.raises(UserError, match=r"has 1 images, fewer than a batch of 16\. .*--stage-c\.opt"):
        train(dataclasses.replace(tiny(), data=str(tmp_path)), tmp_path / "run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="contains no images"):
        train(dataclasses.replace(tiny(), data=str(tmp_path / "empty")), tmp_path / "run")


def test_nothing_held_out_is_fed_to_training(tmp_path, monkeypatch):
    """A built set holds the held-out images too: what a run reads of it is written down and compared."""
    built = tmp_path / "emoji"
    shutil.copytree(sample_root(), built)
    lines = (built / "index.jsonl").read_text().splitlines()
    heldout = sorted(listed_heldout())[:40]
    for name in heldout:  # images borrowed from the sample under held-out names
        style, subject = name.split("/")
        record = json.loads(lines[0]) | {"id": name, "style": style, "hex": subject, "split": "heldout"}
        record["license"] = {"noto": "Apache-2.0", "twemoji": "CC-BY-4.0"}.get(style, "MIT")
        lines.append(json.dumps(record))
        shutil.copy(built / f"{json.loads(lines[0])['id']}.webp", built / f"{name}.webp")
    (built / "index.jsonl").write_text("\n".join(lines) + "\n")
    assert len(EmojiSource(built, split="heldout")) == 40

    read = []
    original = EmojiSource.rgba

    def rgba(self, item):
        read.append(self.records[item].id)
        return original(self, item)

    monkeypatch.setattr(EmojiSource, "rgba", rgba)
    source = open_source(str(built))
    feed = Feed(source, 0, 16, captions=True)
    for index in range(2 * len(source)):
        feed[index]
    assert len(set(read)) == 100
    assert not set(read) & listed_heldout()


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_hold_together(name):
    recipe = RECIPES[name]()
    assert recipe.name == name
    assert json.loads(json.dumps(as_dict(recipe))) == as_dict(recipe)
    for word in ("Hardware", "Time", "Cost", "Result"):
        assert f"{word}:" in RECIPES[name].__doc__


def test_mini_is_the_papers_compression():
    recipe = mini()
    assert recipe.image_size == 256
    assert recipe.image_size / 6 == pytest.approx(42.67, abs=0.01)


def test_shares_are_shares():
    with pytest.raises(UserError, match=r"map_dropout must be between 0 and 1, got 1\.5"):
        dataclasses.replace(tiny().stage_b, map_dropout=1.5)
    with pytest.raises(UserError, match=r"clip_norm must be above 0 .* got clip_norm=0\.0"):
        dataclasses.replace(tiny().stage_b.optimization, clip_norm=0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_noise": -1.0}, r"text_noise must be at least 0, got -1\.0"),
        ({"known_fraction": 1.5}, r"known_fraction must be between 0 and 1, got 1\.5"),
        ({"time_shift": 0.0}, "time_shift must be above 0 and at most 100, got 0.0"),
        ({"time_shift": float("nan")}, "time_shift must be above 0 and at most 100, got nan"),
        ({"refine_images": -1}, "refine_images must be at least 0, got -1"),
        ({"refine_rate": 1.0}, "refine_rate must be between 0 and 1, got 1.0"),
        ({"feature_weight": -1.0}, r"feature_weight must be at least 0, got -1\.0"),
        ({"refine_feature_weight": -1.0}, r"refine_feature_weight must be at least 0, got -1\.0"),
        ({"previewer_weight": float("inf")}, "previewer_weight must be at least 0, got inf"),
        ({"feature_fraction": 0.0}, r"feature_fraction must be above 0 and at most 1, got 0\.0"),
        ({"feature_fraction": 1.5}, r"feature_fraction must be above 0 and at most 1, got 1\.5"),
    ],
)
def test_phases_and_shifts_are_checked(change, message):
    for config in (tiny().stage_b, tiny().stage_c):
        if hasattr(config, next(iter(change))):
            with pytest.raises(UserError, match=message):
                dataclasses.replace(config, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"prior": dataclasses.replace(tiny().prior, c_cond=100)},
            r"c_cond must be the width .* 384, got 100\. Use 384",
        ),
        ({"compressor": CompressorConfig(backbone="efficientnet_v2_s")}, "--compressor-init FILE"),
    ],
)
def test_what_stage_b_and_c_need_is_asked_before_stage_a(change, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train(dataclasses.replace(tiny(), **change), tmp_path)
    assert not (tmp_path / "run.json").exists()


def test_sizes_fit_the_decoder_too():
    recipe = dataclasses.replace(tiny(), image_size=256)
    deeper = dataclasses.replace(
        recipe.decoder,
        patch_size=16,
        c_hidden=(8, 8, 8),
        nhead=(-1,) * 3,
        blocks=(1,) * 3,
        level_config=("CT",) * 3,
        inject_effnet=(True,) * 3,
    )
    settings = cascade_settings(dataclasses.replace(recipe, decoder=deeper), PUBLISHED_STATISTICS)
    assert settings.size_multiple == 256


def test_differing_fields_are_named_by_path():
    recipe = as_dict(tiny())
    other = as_dict(dataclasses.replace(tiny(), seed=1, workers=7))
    assert differing_fields(recipe, other) == ["seed (0, now 1)"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop": 0}, "crop must be at least 16, got 0"),
        ({"discriminator_depth": -3}, "discriminator_depth must be at least 1, got -3"),
    ],
)
def test_sizes_of_stage_a_that_are_none_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(tiny().stage_a, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 100}, "image_size must be a multiple of 128, got 100"),
        ({"prior_steps": 0}, "prior_steps must be at least 1, got 0"),
        ({"prior_steps": 5000}, "prior_steps must be an integer from 1 to 1000, got 5000"),
        ({"prior_guidance": float("nan")}, "guidance must be a number from 0 to 100, got nan"),
        ({"prior_sampler": "plms"}, "prior_sampler must be one of ddpm, dpm, ddim, euler, few, got 'plms'"),
        ({"prior_sampler": "euler"}, "prior_sampler=euler is incompatible"),
        ({"prior_guidance_interval": (0.5, 0.5)}, r"0 <= LOW < HIGH <= 1, got \(0\.5, 0\.5\)"),
        ({"decoder_guidance": -1.0}, "decoder_guidance must be a number from 0 to 100, got -1.0"),
        ({"statistics_images": 0}, "statistics_images must be at least 1, got 0"),
        ({"log_every": 0}, "log_every must be at least 1, got 0"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"checkpoint_seconds": float("nan")}, "checkpoint_seconds must be at least 0, got nan"),
        (
            {"prior": dataclasses.replace(tiny().prior, c_in=8)},
            "the semantic latents have 16 channels in compressor.c_latent, 8",
        ),
        ({"vqgan": dataclasses.replace(tiny().vqgan, latent_channels=8)}, "the latents have 8 channels"),
        (
            {"stage_a": dataclasses.replace(tiny().stage_a, crop=16)},
            "for a discriminator of depth 4",
        ),
        ({"stage_a": dataclasses.replace(tiny().stage_a, crop=256)}, "at most image_size=128"),
        (
            {
                "decoder": dataclasses.replace(
                    tiny().decoder,
                    c_hidden=(8,) * 6,
                    nhead=(-1,) * 6,
                    blocks=(1,) * 6,
                    level_config=("CT",) * 6,
                    inject_effnet=(True,) * 6,
                )
            },
            r"gives latents of side 32\. .* a multiple of 64",
        ),
    ],
)
def test_recipes_that_cannot_work_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(tiny(), **change)

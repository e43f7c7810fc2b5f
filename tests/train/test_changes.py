"""Changes in the middle of a run: which are allowed, from which image on, and that a kill does not matter."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from wuerstchen.checkpoints.native import read_network
from wuerstchen.errors import RunFolderError, UserError
from wuerstchen.recipes.tiny import tiny
from wuerstchen.train import stage_table
from wuerstchen.train.changes import check_same, current_recipe, ending_at, plan, run_phases, with_changes
from wuerstchen.train.config import Phase, as_dict
from wuerstchen.train.engine.checkpoint import newest
from wuerstchen.train.recorded_recipe import get
from wuerstchen.train.report.announce import RunMonitor
from wuerstchen.train.report.page import write_report
from wuerstchen.train.run import train
from wuerstchen.train.run_data import fingerprint_of, open_sources
from wuerstchen.train.stages.base import StageKind

from ..configurations import with_optimization

PHASES = ["a", "b", "b2", "a2", "c", "c2"]

CROPPING = StageKind(
    name="cropping",
    short="cropping",
    config="stage_a",
    changeable=frozenset({"crop"}),
    makes=(),
    phases=lambda recipe: [],
    train=lambda run: None,
)


def phased():
    """tiny with a refinement of Stages A and B, and a second phase of Stage C."""
    recipe = tiny()
    second = Phase(optimization=dataclasses.replace(recipe.stage_c.optimization, images=320))
    return dataclasses.replace(
        recipe,
        stage_a=dataclasses.replace(recipe.stage_a, refine_images=160),
        stage_b=dataclasses.replace(recipe.stage_b, refine_images=160),
        stage_c=dataclasses.replace(recipe.stage_c, phases=(second,), blend=0.5),
    )


def trained(run_dir: Path, **images: int) -> Path:
    """A run folder with empty checkpoints."""
    for name, count in images.items():
        (run_dir / f"stage_{name}" / "checkpoints" / f"{count:012d}").mkdir(parents=True)
    return run_dir


def lengths(recipe) -> dict[str, int]:
    return {part.name: part.images for part in run_phases(recipe)}


def until(name: str, **more: int) -> dict[str, int]:
    """The lengths of all phases before ``name``."""
    full = lengths(phased())
    return {part: full[part] for part in PHASES[: PHASES.index(name)]} | more


def test_phases_of_a_run_are_in_order():
    assert list(lengths(phased())) == PHASES
    assert list(lengths(tiny())) == [p for p in PHASES if p in lengths(tiny())]


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("a", "stage_a.optimization.learning_rate"),
        ("b", "stage_b.optimization.learning_rate"),
        ("b2", "stage_b.refine_rate"),
        ("a2", "stage_a.refine_rate"),
        ("c", "stage_c.optimization.learning_rate"),
        ("c2", "stage_c.phases.0.optimization.learning_rate"),
    ],
)
def test_a_bare_name_refers_to_the_current_phase(name, path, tmp_path):
    run_dir = trained(tmp_path, **until(name, **{name: 32}))
    changed, (change,) = with_changes(phased(), run_dir, ["learning_rate=1e-6"])
    assert (change.field, change.after, change.stage, change.images) == (path, 1e-6, name, 32)
    assert with_changes(changed, run_dir, ["learning_rate=1e-6"]) == (changed, [])  # given again
    _, (clip,) = with_changes(phased(), run_dir, ["clip_norm=0.5"])
    of_refinement = path.removesuffix("learning_rate")
    config = f"stage_{name[0]}.optimization." if "refine" in path else of_refinement
    assert clip.field == f"{config}clip_norm"


@pytest.mark.parametrize(("name", "path"), [("c", "stage_c.max_ratio"), ("c2", "stage_c.phases.0.max_ratio")])
def test_max_ratio_refers_to_the_current_phase(name, path, tmp_path):
    run_dir = trained(tmp_path, **until(name, **{name: 32}))
    _, (change,) = with_changes(phased(), run_dir, ["max_ratio=1.5"])
    assert (change.field, change.stage) == (path, name)
    finished = trained(tmp_path / "other", **until("c2", c2=32))
    with pytest.raises(UserError, match="the stages that use it are finished"):
        with_changes(phased(), finished, ["stage_c.max_ratio=1.5"])


def with_own_settings():
    """``phased`` with a phase of the decoder alone that has its own shift."""
    recipe = phased()
    alone = Phase(
        optimization=dataclasses.replace(recipe.stage_b.optimization, images=160),
        time_shift=2.0,
        decoder_only=True,
    )
    return dataclasses.replace(recipe, stage_b=dataclasses.replace(recipe.stage_b, phases=(alone,)))


@pytest.mark.parametrize(
    ("phase", "name", "path"),
    [
        ("b", "time_shift", "stage_b.time_shift"),
        ("b2", "time_shift", "stage_b.phases.0.time_shift"),
        ("b2", "feature_weight", "stage_b.feature_weight"),
        ("b3", "time_shift", "stage_b.refine_shift"),
        ("b3", "feature_weight", "stage_b.refine_feature_weight"),
    ],
)
def test_a_setting_that_a_phase_replaces_changes_in_that_phase(phase, name, path, tmp_path):
    full = lengths(with_own_settings())
    before = {part: full[part] for part in list(full)[: list(full).index(phase)]}
    run_dir = trained(tmp_path, **before, **{phase: 32})
    _, (change,) = with_changes(with_own_settings(), run_dir, [f"{name}=0.5"])
    assert (change.field, change.stage, change.images) == (path, phase, 32)


@pytest.mark.parametrize("name", ["time_shift", "previewer_weight"])
def test_a_setting_that_no_further_phase_uses_cannot_change(name, tmp_path):
    """The phases of the decoder alone have their own shifts, and do not train the compressor."""
    full = lengths(with_own_settings())
    run_dir = trained(tmp_path, a=full["a"], b=full["b"], b2=32)
    with pytest.raises(UserError, match="would have no effect"):
        with_changes(with_own_settings(), run_dir, [f"stage_b.{name}=0.5"])


def test_a_field_of_a_later_phase_applies_from_its_start(tmp_path):
    run_dir = trained(tmp_path, a=32)
    _, (change,) = with_changes(phased(), run_dir, ["stage_c.phases.0.optimization.learning_rate=1e-6"])
    assert (change.stage, change.images) == ("c2", 0)
    _, (seed,) = with_changes(phased(), run_dir, ["seed=7"])
    assert (seed.stage, seed.images) == ("a", 32)
    for text in ("0.2,0.8", "[0.2, 0.8]"):
        changed, _ = with_changes(phased(), run_dir, [f"prior_guidance_interval={text}"])
        assert changed.prior_guidance_interval == (0.2, 0.8)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("learning_rate", "must look like learning_rate=1e-5, got learning_rate"),
        ("betas=0.9", "betas, which must be 2 values separated by commas"),
        ("prior_guidance_interval=0.2", "must be 2 values separated by commas"),
        ("prior_guidance_interval=0.8,0.2", r"0 <= LOW < HIGH <= 1, got \(0\.8, 0\.2\)"),
        ("learning_rate=2", "learning_rate must be between 0 and 1, got 2.0"),
        ("workers=3", "workers can change at any time without --change. Use --workers 3"),
        ("prior.c=3", "prior.c cannot change within a run"),
        ("frozen_stride=8", "cannot change within a run"),
        ("backbone_rate=0.5", "cannot change within a run"),
        ("data_is=3", "cannot change within a run"),
        ("stage_c.phases.7.optimization.images=3", "cannot change within a run"),
        ("precision=auto", "depends on the machine. Use fp32, bf16"),
        ("seed+=1", "only skip is a list"),
        (
            "stage_a.optimization.learning_rate=1e-3",
            "would have no effect: the stages that use it are finished",
        ),
        ("images=8", r"images must be at least 32, which stage B has seen, got 8\. .*--end-now"),
        ("batch_size=24", "batch_size must divide the 32 images that stage B has seen, got 24"),
        ("refine_images=0 images=8", "is not valid for"),
        (
            "stage_a.optimization.images=999999",
            "stage A cannot have more images: it is finished, and stage B was trained on it",
        ),
    ],
)
def test_impossible_changes_are_refused_with_the_reason(request_, message, tmp_path):
    with pytest.raises(UserError, match=message):
        with_changes(phased(), trained(tmp_path, **until("b", b=32)), [request_])


def test_a_stage_says_which_of_its_settings_may_change(tmp_path, monkeypatch):
    """A new row of the table of stages is enough: there is no list of stages in changes.py."""
    run_dir = trained(tmp_path, a=32)
    with pytest.raises(UserError, match="cannot change within a run"):
        with_changes(phased(), run_dir, ["crop=32"])
    monkeypatch.setattr(stage_table, "STAGES", (*stage_table.STAGES, f"{__name__}:CROPPING"))
    _, (change,) = with_changes(phased(), run_dir, ["crop=32"])
    assert (change.field, change.after, change.stage) == ("stage_a.crop", 32, "a")


def test_a_started_phase_cannot_be_left_out(tmp_path):
    run_dir = trained(tmp_path, **until("b2", b2=32))
    with pytest.raises(UserError, match="stage B2 cannot be removed: its training has started"):
        with_changes(phased(), run_dir, ["stage_b.refine_images=0"])
    changed, _ = with_changes(phased(), run_dir, ["stage_a.refine_images=0"])
    assert "a2" not in lengths(changed)


def test_several_changes_can_be_made_at_once(tmp_path):
    """A finished run gets more images and another rate. The rate alone would have no effect."""
    run_dir = trained(tmp_path, **lengths(phased()))
    with pytest.raises(UserError, match=r"would have no effect: .*raise the number of images too"):
        with_changes(phased(), run_dir, ["learning_rate=1e-6"])
    changed, changes = with_changes(phased(), run_dir, ["learning_rate=1e-6", "images=640", "skip+=a, b.png"])
    assert lengths(changed)["c2"] == 640
    assert changed.skip == ("a, b.png",)
    assert {(c.field.rpartition(".")[2], c.stage, c.images) for c in changes} == {
        ("learning_rate", "c2", 320),
        ("images", "c2", 320),
        ("skip", "c2", 320),
    }
    again, more = with_changes(changed, run_dir, ["skip+=c.png", "skip+=a, b.png"])
    assert again.skip == ("a, b.png", "c.png")
    assert len(more) == 1


@pytest.mark.parametrize("name", PHASES)
def test_a_run_can_end_at_any_phase(name, tmp_path):
    run_dir = trained(tmp_path, **until(name, **{name: 32}))
    ended, changes = with_changes(phased(), run_dir, [], end_now=True)
    assert ended == ending_at(phased(), name, 32)
    assert lengths(ended) == until(name, **{name: 32})
    assert {(c.stage, c.images) for c in changes} == {(name, 32)}
    assert with_changes(ended, run_dir, [], end_now=True) == (ended, [])
    # The recorded changes give the same recipe.
    stored = {"recipe": as_dict(phased()), "data": "", "changes": [dataclasses.asdict(c) for c in changes]}
    stored = json.loads(json.dumps(stored))
    assert current_recipe(stored, phased(), "run.json") == ended


def test_without_a_checkpoint_the_run_ends_at_the_previous_phase(tmp_path):
    ended, _ = with_changes(phased(), trained(tmp_path, **until("a2")), [], end_now=True)
    assert list(lengths(ended)) == ["a", "b", "b2"]
    with pytest.raises(UserError, match="has no checkpoint yet"):
        with_changes(phased(), tmp_path / "nothing", [], end_now=True)


def test_a_run_that_has_not_started_takes_options_instead(tmp_path):
    with pytest.raises(
        UserError, match=r"only works on a started run.* as in --stage-c.optimization.learning-rate 1e-5"
    ):
        plan(tiny(), None, tmp_path, ["learning_rate=1e-5"])


def test_the_same_command_resumes_after_a_change_and_another_is_refused(tmp_path):
    run_dir = trained(tmp_path, a=32)
    stored = {"recipe": as_dict(phased()), "data": ""}
    changed = plan(phased(), stored, run_dir, ["learning_rate=1e-6"])
    stored["changes"] = changed.changes
    check_same(stored, phased(), run_dir, changed.recipe)  # as at the start
    check_same(stored, changed.recipe, run_dir, changed.recipe)  # as it is now
    other = dataclasses.replace(phased(), seed=3)
    with pytest.raises(RunFolderError, match=r"seed \(0, now 3\) differ.* add --change seed=3 to change"):
        check_same(stored, other, run_dir, changed.recipe)
    other = dataclasses.replace(other, prior=dataclasses.replace(other.prior, depth=9))
    with pytest.raises(RunFolderError) as caught:
        check_same(stored, other, run_dir, changed.recipe)
    assert "--change" not in str(caught.value)


# Whole runs.

MICRO = [
    word
    for options in (
        "--workers 0 --statistics-images 8 --stages a --stage-a.optimization.images 24 --device cpu",
        "--stage-a.optimization.batch-size 4 --stage-a.refine-images 0 --stage-a.adversarial-from 16",
        "--stage-a.optimization.decay constant --checkpoint-seconds 0 --no-rehearsal",
    )
    for word in options.split()
]
CHANGES = ["images=40", "learning_rate=5e-4", "seed=3", "clip_norm=0.5", "batch_size=8"]


def micro(**changes):
    recipe = tiny()
    config = with_optimization(recipe.stage_a, images=24, batch_size=4, decay="constant", **changes)
    config = dataclasses.replace(config, refine_images=0, adversarial_from=16)
    small = {"workers": 0, "statistics_images": 8, "stages": ("a",), "checkpoint_seconds": 0.0}
    return dataclasses.replace(recipe, stage_a=config, **small)


def events(run_dir: Path, kind: str) -> list[dict]:
    lines = map(json.loads, (run_dir / "log.jsonl").read_text().splitlines())
    return [event for event in lines if event["event"] == kind]


def final(run_dir: Path) -> tuple[int, dict]:
    path, state = newest(run_dir / "stage_a" / "checkpoints")
    return int(path.name), state["files"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(micro(), folder, device="cpu")
    return folder


KILLED = """
import os, signal, sys
from wuerstchen.cli import main
from wuerstchen.train.report.events import Log
writes = Log.event

def event(self, kind, **values):
    writes(self, kind, **values)
    if kind == "checkpoint" and values["images"] == 32:
        os.kill(os.getpid(), signal.SIGKILL)

Log.event = event
main(sys.argv[1:])
"""


def test_a_changed_run_equals_itself_after_a_kill(finished, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for run_dir in (whole, broken):
        shutil.copytree(finished, run_dir)
    before = (whole / "model" / "vqgan.safetensors").read_bytes()
    train(micro(), whole, device="cpu", changes=CHANGES)
    command = [sys.executable, "-c", KILLED, "train", "tiny", "--run-dir", str(broken), *MICRO]
    command += [word for change in CHANGES for word in ("--change", change)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert "Changed seed: 0 -> 3, from image 24 of stage A on" in done.stdout or not done.stdout
    train(micro(), broken, device="cpu")  # the same command, without the changes
    assert final(whole) == final(broken)
    assert final(whole)[0] == 40
    assert [e["images"] for e in events(broken, "start")] == [0, 24, 32]
    for run_dir in (whole, broken):
        assert (run_dir / "model" / "vqgan.safetensors").read_bytes() != before
    files = [(run_dir / "model" / "vqgan.safetensors") for run_dir in (whole, broken)]
    networks, papers = zip(*map(read_network, files), strict=True)
    assert all(
        (tensor == networks[1].state_dict()[key]).all() for key, tensor in networks[0].state_dict().items()
    )

    # The changes are in run.json, the log, the checkpoints, the model and the report.
    stored = json.loads((broken / "run.json").read_text())
    assert {c["field"].rpartition(".")[2] for c in stored["changes"]} == {c.split("=")[0] for c in CHANGES}
    assert len(events(broken, "change")) == len(CHANGES)
    state = newest(broken / "stage_a" / "checkpoints")[1]
    assert state["changes"] == stored["changes"]
    assert state["fields"]["stage_a"]["optimization"]["batch_size"] == 8
    assert papers[1].images == 40
    assert "seed: 0 -> 3, from image 24 of stage A on" in papers[1].changes
    assert len(papers[1].changes) == len(CHANGES)
    assert "Changes to the recipe" in write_report(broken).read_text()
    assert "Changes to the recipe" not in write_report(finished).read_text()


def test_more_images_after_the_end_equal_the_longer_run(finished, tmp_path):
    longer, extended = tmp_path / "longer", tmp_path / "extended"
    shutil.copytree(finished, extended)
    train(micro(), extended, device="cpu", changes=["images=40"])
    recipe = micro()
    recipe = dataclasses.replace(recipe, stage_a=with_optimization(recipe.stage_a, images=40))
    train(recipe, longer, device="cpu")
    assert final(extended) == final(longer)
    # The same command does not change the finished run.
    model = (extended / "model" / "model.json").stat().st_mtime_ns
    train(micro(), extended, device="cpu")
    assert (extended / "model" / "model.json").stat().st_mtime_ns == model
    assert not list(extended.glob(".model*"))
    assert not (extended / "model.new").exists()


def test_a_batch_size_must_divide_the_images_of_the_current_refinement(tmp_path):
    """It was compared with the images of the finished Stage A, and not with those of its refinement."""
    with pytest.raises(UserError, match="must divide the 80 images that stage A2 has seen"):
        with_changes(phased(), trained(tmp_path / "80", **until("a2", a2=80)), ["batch_size=32"])
    changed, _ = with_changes(phased(), trained(tmp_path / "64", **until("a2", a2=64)), ["batch_size=64"])
    assert changed.stage_a.optimization.batch_size == 64


def test_a_run_that_is_ended_early_has_a_usable_model(finished, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    shutil.rmtree(run_dir / "model")
    stored = json.loads((run_dir / "run.json").read_text())
    stored["recipe"]["stage_a"]["optimization"]["images"] = 80
    (run_dir / "run.json").write_text(json.dumps(stored))
    recipe = micro()
    recipe = dataclasses.replace(recipe, stage_a=with_optimization(recipe.stage_a, images=80))
    train(recipe, run_dir, device="cpu", end_now=True)
    assert read_network(run_dir / "model" / "vqgan.safetensors")[1].images == 24
    assert final(run_dir) == final(finished)
    train(recipe, run_dir, device="cpu")
    assert final(run_dir)[0] == 24


def test_a_run_can_end_before_a_phase_with_other_data(finished, tmp_path):
    """Its data are not opened any more: preview prompts were looked for in them, and what they held out of
    the data inside them came back, so that these seemed to have changed; names in ``skip`` were no images,
    and the data had changed again for the recipe without the phase."""
    run_dir, outer = tmp_path / "run", tmp_path / "photos"
    for folder in (outer, outer / "fine"):
        folder.mkdir()
        for number in range(300):
            (folder / f"{number}.png").write_bytes(b"")  # nothing is opened
            (folder / f"{number}.txt").write_text("a thing")
    data = str(outer / "fine")
    recipe = dataclasses.replace(
        micro(), stages=("a", "b", "c"), data=data, precision="fp32", preview_prompts=()
    )
    second = Phase(optimization=recipe.stage_c.optimization, data=str(outer))
    recipe = dataclasses.replace(recipe, stage_c=dataclasses.replace(recipe.stage_c, phases=(second,)))
    later = open_sources(recipe)[str(outer)]
    name = next(name for name in map(later.name, range(len(later))) if name.startswith("fine/"))
    recipe = dataclasses.replace(recipe, skip=(name,))  # an image of the phase that is left out
    shutil.copytree(finished, run_dir)
    shutil.rmtree(run_dir / "model")
    stored = json.loads((run_dir / "run.json").read_text())
    stored |= {"recipe": as_dict(recipe), "data": fingerprint_of(recipe, open_sources(recipe))}
    stored["recipe"]["stage_a"]["optimization"]["images"] = 80
    (run_dir / "run.json").write_text(json.dumps(stored))
    recipe = dataclasses.replace(recipe, stage_a=with_optimization(recipe.stage_a, images=80))
    ended = ending_at(recipe, "a", 24)  # as a user might write it
    for given, end_now in ((recipe, True), (recipe, False), (ended, False)):
        train(given, run_dir, device="cpu", end_now=end_now, monitor=RunMonitor(rehearse=False))
        assert read_network(run_dir / "model" / "vqgan.safetensors")[1].images == 24


def test_a_change_at_a_damaged_checkpoint_is_refused_and_a_recorded_one_moves(finished, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    path = newest(run_dir / "stage_a" / "checkpoints")[0] / "networks.safetensors"
    content = path.read_bytes()
    path.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(RunFolderError, match=r"checkpoint of stage A is damaged.*without --change"),
    ):
        train(micro(), run_dir, device="cpu", changes=["images=32"])
    assert "changes" not in json.loads((run_dir / "run.json").read_text())

    path.write_bytes(content)

    def train_nothing(*_):
        raise SystemExit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wuerstchen.train.run.TrainingRun.train", train_nothing)
        with pytest.raises(SystemExit):
            train(micro(), run_dir, device="cpu", changes=["images=32"])
    path.write_bytes(b"")
    with pytest.warns(UserWarning, match="is damaged"):
        train(micro(), run_dir, device="cpu")
    (change,) = json.loads((run_dir / "run.json").read_text())["changes"]
    assert change["images"] == 20
    assert [e["images"] for e in events(run_dir, "change moved")] == [20]
    assert newest(run_dir / "stage_a" / "checkpoints")[1]["changes"] == [change]


def test_a_change_applies_from_the_resumed_checkpoint_if_several_are_damaged(finished, tmp_path):
    """Only those made at the newest one were corrected: run.json named an image that was trained before."""
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    (newest(run_dir / "stage_a" / "checkpoints")[0] / "networks.safetensors").write_bytes(b"")
    changes = [
        {"field": field, "before": get(as_dict(micro()), field), "after": after, "stage": stage}
        | {"images": images, "time": 0.0}
        for field, after, stage, images in (
            ("stage_a.optimization.clip_norm", 0.5, "a", 8),
            ("seed", 3, "a", 22),  # the checkpoint of that image has gone
        )
    ]
    stored = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps({**stored, "changes": changes}))
    with pytest.warns(UserWarning, match="is damaged"):
        train(micro(), run_dir, device="cpu")
    changes[1]["images"] = 20
    assert json.loads((run_dir / "run.json").read_text())["changes"] == changes
    assert newest(run_dir / "stage_a" / "checkpoints")[1]["changes"] == changes
    assert [(e["field"], e["images"], e["before"]) for e in events(run_dir, "change moved")] == [
        ("seed", 20, 22)
    ]


def test_images_are_skipped_by_name(finished, tmp_path, monkeypatch):
    from wuerstchen.data.emoji import EmojiSource

    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    with pytest.raises(UserError, match=r"skip=nowhere\.png is not an image of sample"):
        train(micro(), run_dir, device="cpu", changes=["skip+=nowhere.png", "images=28"])
    read, original = [], EmojiSource.rgba

    def rgba(self, item):
        read.append(self.name(item))
        return original(self, item)

    monkeypatch.setattr(EmojiSource, "rgba", rgba)
    every = tmp_path / "every"
    shutil.copytree(finished, every)
    train(micro(), every, device="cpu", changes=["images=28"])
    name = read[0]  # of the first update after the change
    read.clear()
    train(micro(), run_dir, device="cpu", changes=[f"skip+={name}", "images=28"])
    assert read
    assert name not in read
    assert final(run_dir) != final(every)


def test_changes_on_the_command_line(finished, tmp_path, capsys):
    from wuerstchen.cli import main

    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    command = ["train", "tiny", "--run-dir", str(run_dir), *MICRO]
    assert main([*command, "--change", "images=28", "--change", "learning_rate=1e-6"]) == 0
    assert "images: 24 -> 28, from image 24 of stage A on" in capsys.readouterr().out
    assert main([*command, "--stage-a.optimization.learning-rate", "1e-2"]) == 2
    assert "--change stage_a.optimization.learning_rate=0.01" in capsys.readouterr().err
    assert main([*command, "--end-now"]) == 0
    assert os.listdir(run_dir / "stage_a" / "checkpoints")

"""The speedrun: what it counts, what it refuses to join, and its page."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def speedrun(script):
    return script("benchmarks/speedrun")


@pytest.fixture
def table(script):
    return script("scripts/speedrun_table")


def options(speedrun, *words):
    return speedrun.parser().parse_args(["fast", "--device", "cpu", *words])


def test_every_configuration_is_a_recipe_and_says_what_differs(speedrun):
    base = speedrun.mini()
    for name, changes in speedrun.CONFIGURATIONS.items():
        given = options(speedrun, "--data", "elsewhere", "--workers", "3")
        given.configuration = name
        recipe = speedrun.recipe_of(given, 7)
        assert (recipe.data, recipe.seed, recipe.workers) == ("elsewhere", 7, 3)
        assert recipe.stages == ("a", "b", "c")
        assert recipe.start_from == ""  # from nothing
        found = speedrun.changed_fields(recipe, base)
        assert found.keys() <= changes.keys()  # some may already be the recipe's
    given = options(speedrun, "--set", "stage_c.time_shift=0.5", "stage_b.optimization.images=2560")
    found = speedrun.changed_fields(speedrun.recipe_of(given, 0), base)
    assert found["stage_c.time_shift"] == 0.5
    assert found["stage_b.optimization.images"] == 2560  # later than the configuration's own


def test_lists_are_pooled_by_their_entries(speedrun):
    """The mean of the two lists would weigh an entry of the shorter one more."""
    found = {"a": {"recall_1": [0.5, 0.7]}, "b": {"recall_1": [0.9, 0.9]}}
    assert speedrun.pooled(found, {"a": 150, "b": 120}) == pytest.approx((0.6 * 150 + 0.9 * 120) / 270)


def test_phases_get_their_minutes_but_not_the_pause_between_two_processes(speedrun):
    def event(kind, seconds, stage=None):
        return {"event": kind, "time": seconds, **({} if stage is None else {"stage": stage})}

    log = [
        event("data", 0),
        event("skipped", 20, "bank"),  # composing images
        event("start", 60, "a"),
        event("checkpoint", 120, "a"),
        event("start", 150, "b"),
        event("progress", 180, "b"),
        event("start", 9000, "a"),  # the next process
        event("start", 9006, "b"),
        event("checkpoint", 9066, "b"),
        event("end", 9100),
    ]
    assert speedrun.stage_minutes(log) == {"a": 2.0, "b": 2.0}


def result(seed, recall, **others):
    common = {
        "date": f"2026-12-0{seed + 1}",
        "machine": "H200",
        "torch": "2.11",
        "commit": "abc",
        "configuration": "fast",
        "changed": {"compressor.depths": [8, 16]},
        "first_seeds": [0, 1000, 2000, 3000],
        "limit": None,
    }
    own = {"minutes": 10.0 + seed, "stages": {"a": 1.0, "b": 6.0 + seed}, "recall_1": recall, "scores": {}}
    return common | {"seed": seed} | own | others


def test_a_row_is_the_mean_of_trainings_with_different_seeds(speedrun):
    row = speedrun.joined([result(0, 0.72), result(1, 0.74)])
    assert (row["minutes"], row["recall_1"], row["reached"], row["date"]) == (10.5, 0.73, True, "2026-12-02")
    assert [training["seed"] for training in row["trainings"]] == [0, 1]
    assert not speedrun.joined([result(0, 0.72), result(1, 0.739)])["reached"]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (result(0, 0.7), result(1, 0.7, commit="abd"), "commit differs: abc, abd"),
        (result(0, 0.7), result(1, 0.7, changed={}), "changed differs"),
        (result(0, 0.7), result(1, 0.7, limit=8), "limit differs"),
        (result(0, 0.7), result(0, 0.8), "different seeds, got"),
    ],
)
def test_other_trainings_are_not_joined(speedrun, first, second, message):
    with pytest.raises(ValueError, match=message):
        speedrun.joined([first, second])


def test_every_process_of_a_training_adds_its_time(speedrun, tmp_path, monkeypatch):
    """A training that was stopped is not faster than one that was not."""
    clock, codes, signals = [0.0], [], []

    def wait(timeout):
        clock[0] += 40
        if clock[0] % 120:
            raise subprocess.TimeoutExpired("train", timeout)
        return codes.pop(0)

    process = SimpleNamespace(wait=wait, send_signal=signals.append)
    monkeypatch.setattr(speedrun.subprocess, "Popen", lambda command, env: process)
    monkeypatch.setattr(speedrun.time, "monotonic", lambda: clock[0])
    given = options(speedrun, "--run-dir", str(tmp_path / "runs"), "--minutes", "1")
    codes[:] = [130, 0]
    with pytest.raises(SystemExit, match=r"fast-0: not finished, exit code 130\. Start the same command"):
        speedrun.time_training(given, 0)
    assert signals == [speedrun.signal.SIGTERM]
    assert speedrun.time_training(given, 0) == pytest.approx(4.0)
    model = tmp_path / "runs" / "fast-0" / "model"
    model.mkdir(parents=True)
    (model / "model.json").touch()
    assert speedrun.time_training(given, 0) == pytest.approx(4.0)  # finished: no process is started


def test_a_run_folder_of_unknown_age_is_refused(speedrun, tmp_path):
    (tmp_path / "fast-0").mkdir()
    with pytest.raises(SystemExit, match="nobody has measured its time"):
        speedrun.time_training(options(speedrun, "--run-dir", str(tmp_path)), 0)


def test_the_page_has_a_line_for_each_row(speedrun, table):
    rows = [speedrun.joined([result(0, 0.7), result(1, 0.72)])]
    rows.append(speedrun.joined([result(0, 0.74, changed={}), result(1, 0.75, changed={})]))
    lines = table.page(rows).splitlines()
    assert "| fast | 2026-12-02 | H200 | abc | 10.5 | 1.0 | 6.5 | 0.710 | 0.700, 0.720 | no |" in lines
    assert "| fast | 2026-12-02 | H200 | abc | 10.5 | 1.0 | 6.5 | 0.745 | 0.740, 0.750 | yes |" in lines
    assert lines[-2:] == [
        "- **fast** (2026-12-02): `compressor.depths=8 16`.",
        "- **fast** (2026-12-02): the recipe as it is.",
    ]
    assert json.loads(json.dumps(rows)) == rows


def test_the_page_is_made_from_its_rows():
    command = [sys.executable, str(ROOT / "scripts" / "speedrun_table.py"), "--check"]
    subprocess.run(command, check=True)

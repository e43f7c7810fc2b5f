"""From ``data prepare`` to a trained Stage C: a kill and the number of processes change nothing."""

import copy
import dataclasses
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from wuerstchen.checkpoints.native import read_cascade
from wuerstchen.data.emoji import sample_root
from wuerstchen.data.prepare import prepare
from wuerstchen.data.prepare_networks import read_networks
from wuerstchen.data.prepare_plan import PrepareConfig
from wuerstchen.data.prepared import PreparedSet
from wuerstchen.data.readers import EmojiReader, FolderReader
from wuerstchen.errors import DataError, RunFolderError, UserError
from wuerstchen.train.engine.checkpoint import newest
from wuerstchen.train.run import TrainingRun, train

from ..configurations import with_lite0, with_optimization, write_model

SCRIPT = Path(__file__).with_name("prepared_runs.py")
recipe = runpy.run_path(str(SCRIPT))["recipe"]


@pytest.fixture(scope="module")
def folder(small_cascade, tmp_path_factory) -> Path:
    """A model that has no trained Stage C, and the sample prepared with it."""
    folder = tmp_path_factory.mktemp("prepared")
    write_model(with_lite0(copy.deepcopy(small_cascade)), folder / "model")
    networks = read_networks(folder / "model")
    prepare(EmojiReader(sample_root(), views=2), folder / "set", networks, PrepareConfig())
    return folder


def run_script(folder: Path, part: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", SCRIPT, folder, part],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.fixture(scope="module")
def runs(folder) -> Path:
    """With runs of 1 and 2 processes."""
    run_script(folder, "whole")
    return folder


@pytest.fixture(scope="module")
def killed(runs) -> Path:
    """With a run that was killed twice."""
    run_script(runs, "killed")
    return runs


def events(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> dict[tuple[str, int], float]:
    return {(e["stage"], e["images"]): e["loss"] for e in events(run_dir) if e["event"] == "progress"}


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(runs):
    one, two = losses(runs / "1"), losses(runs / "2")
    assert len(one) == 6
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert two[key] == pytest.approx(value, rel=1e-5), key
    assert (runs / "1" / "stage_c" / "measured.json").read_bytes() == (
        runs / "2" / "stage_c" / "measured.json"
    ).read_bytes()


@pytest.mark.slow
def test_processes_verify_a_copied_set_once_in_all(runs):
    """Each of them did, and the first once more for the images that are held out."""
    shards = sorted(str(path.relative_to(runs / "set")) for path in (runs / "set").glob("*/*.arrow"))
    assert sorted((runs / "hashed").read_text().split()) == shards


@pytest.mark.slow
def test_kills_change_nothing(killed):
    for stage in ("c", "c2"):
        files = [
            newest(killed / name / f"stage_{stage}" / "checkpoints")[1]["files"] for name in ("1", "killed")
        ]
        assert files[0] == files[1]
    resumed = [e["images"] for e in events(killed / "killed") if e["event"] == "start" and e["resumed"]]
    assert any(0 < images < 32 for images in resumed)
    prior = Path("model") / "prior.safetensors"
    assert (killed / "1" / prior).read_bytes() == (killed / "killed" / prior).read_bytes()


@pytest.mark.slow
def test_the_model_is_whole_and_its_statistics_are_those_of_the_maps(runs):
    prepared = PreparedSet(runs / "set")
    cascade = read_cascade(runs / "1" / "model")
    assert cascade.prior is not None
    before = read_cascade(runs / "model").settings.latent_statistics
    assert cascade.settings.latent_statistics != before
    validated = [e for e in events(runs / "1") if e["event"] == "validation"]
    assert {e["stage"] for e in validated} == {"c", "c2"}  # on what the set holds out
    shown, hidden = (
        {prepared.name(int(row)).split("#")[0] for row in prepared.rows(part)}
        for part in ("train", "heldout")
    )
    assert hidden  # all views of an image or none
    assert not shown & hidden
    prepared.check_model(cascade.compressor, cascade.text_encoder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": ("b", "c"), "fresh": ("b", "c")}, "Stage B trains the compressor that makes them"),
        ({"prepared_images": 16}, "prepared_images must be 0 with a prepared set, got 16"),
        ({"mirrored": 0.5}, r"mirrored must be 0 with a prepared set, got 0\.5"),
        ({"image_size": 256}, r"image_size must be 128 for .* about 128x128 pixels, got 256\. Use 128"),
        ({"data": "sample", "stored_texts": "states"}, "stored_texts=states needs a prepared set"),
    ],
)
def test_pairings_that_make_no_sense(folder, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        train(dataclasses.replace(recipe(folder), **change), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run" / "run.json").exists()


def test_images_that_are_no_whole_batches_and_sets_of_another_model(folder, tmp_path):
    full = recipe(folder)
    odd = dataclasses.replace(full, stage_c=with_optimization(full.stage_c, images=30))
    with pytest.raises(UserError, match=r"images must be a multiple of batch_size=8 .* got 30"):
        train(odd, tmp_path / "run", device="cpu")
    (tmp_path / "unfinished" / "work").mkdir(parents=True)
    (tmp_path / "unfinished" / "work" / "plan.json").write_text("{}")
    with pytest.raises(DataError, match="is not finished"):
        train(dataclasses.replace(full, data=str(tmp_path / "unfinished")), tmp_path / "run", device="cpu")
    cascade = copy.deepcopy(read_cascade(folder / "model"))
    cascade.compressor.requires_grad_(False)
    next(cascade.compressor.parameters()).add_(1)
    write_model(cascade, tmp_path / "model")
    other = dataclasses.replace(full, start_from=str(tmp_path / "model"))
    with pytest.raises(UserError, match=r"made with another compressor\. Prepare it with this model"):
        train(other, tmp_path / "run", device="cpu")


def test_a_run_that_never_showed_small_sizes_does_not_go_on_in_another_order(folder, tmp_path, monkeypatch):
    """Runs of versions that left out sizes with fewer images than a batch have no order in run.json."""
    (tmp_path / "photos").mkdir()
    for number in range(9):  # three wide ones
        size = (300, 128) if number < 3 else (128, 128)
        Image.new("RGB", size, (20 * number, 0, 0)).save(tmp_path / "photos" / f"{number}.png")
        (tmp_path / "photos" / f"{number}.txt").write_text(f"thing {number}")
    networks = read_networks(folder / "model")
    config = PrepareConfig(size=256, max_ratio=4.0)
    prepare(FolderReader(tmp_path / "photos"), tmp_path / "set", networks, config)
    monkeypatch.setattr(TrainingRun, "train", lambda self: self.run_dir)
    full = recipe(folder)

    def begin(batch_size: int) -> None:
        stage = with_optimization(full.stage_c, images=24, batch_size=batch_size)
        stage = dataclasses.replace(stage, phases=())
        changes = {"stage_c": stage, "data": str(tmp_path / "set"), "image_size": 256}
        train(dataclasses.replace(full, **changes), tmp_path / f"run{batch_size}", device="cpu")

    for batch_size in (4, 3):
        begin(batch_size)
        begin(batch_size)
        described = tmp_path / f"run{batch_size}" / "run.json"
        content = json.loads(described.read_text())
        assert content.pop("order") == 2
        described.write_text(json.dumps(content))
    begin(3)  # no size is smaller than that: nothing has changed
    with pytest.raises(RunFolderError, match="version that skips sizes with fewer images than a batch"):
        begin(4)


def test_a_set_that_changed_is_noticed(folder):
    prepared = PreparedSet(folder / "set")
    before = prepared.fingerprint()
    prepared.description["images"]["shards"][0]["sha256"] = "0" * 64
    assert prepared.fingerprint() != before

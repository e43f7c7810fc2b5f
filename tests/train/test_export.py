"""Exporting a model from any checkpoint of a run, and run folders given in place of a model."""

import dataclasses
import json
import shlex
import shutil

import pytest
import torch

from wuerstchen.checkpoints.hub import local_folder
from wuerstchen.checkpoints.native import read_cascade, read_network, read_parts
from wuerstchen.cli import main
from wuerstchen.errors import CheckpointError, RunFolderError, UserError
from wuerstchen.train.changes import run_phases
from wuerstchen.train.engine.checkpoint import newest, read_averages
from wuerstchen.train.export import NotMeasuredWarning, export
from wuerstchen.train.run import train

from ..configurations import with_optimization
from .test_changes import micro, phased

NETWORKS = ("vqgan", "decoder", "compressor", "previewer", "prior")


def short():
    """All phases of a run with a few updates each."""
    recipe = phased()

    def brief(config, **changes):
        return dataclasses.replace(with_optimization(config, images=16, batch_size=8), **changes)

    phases = (brief(recipe.stage_c.phases[0]),)
    return dataclasses.replace(
        recipe,
        stage_a=brief(recipe.stage_a, refine_images=8),
        stage_b=brief(recipe.stage_b, refine_images=8),
        stage_c=brief(recipe.stage_c, phases=phases),
        statistics_images=8,
        prior_steps=1,
        decoder_steps=1,
        preview_prompts=(),
        workers=0,
        checkpoint_seconds=0.0,
    )


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "my run"
    train(short(), folder, device="cpu")
    return folder


def weights_of(folder) -> dict[str, torch.Tensor]:
    parts = read_parts(folder)[1]
    found = {name: network.state_dict() for name, network in parts.items() if name in NETWORKS}
    return {f"{name}/{key}": tensor for name, tensors in found.items() for key, tensor in tensors.items()}


def test_export_of_a_finished_run_equals_its_model(run_dir, tmp_path):
    said = export(run_dir, tmp_path / "model")
    assert said == f"{tmp_path / 'model'}: stage C2 at image 16, average"
    for path in (run_dir / "model").rglob("*"):
        if path.is_file():
            assert (
                tmp_path / "model" / path.relative_to(run_dir / "model")
            ).read_bytes() == path.read_bytes()


def test_only_the_last_phase_has_raw_weights(run_dir, tmp_path):
    export(run_dir, tmp_path / "raw", stage="c", weights="raw")
    checkpoint = newest(run_dir / "stage_c" / "checkpoints")[0]
    raw, averages = (read_averages(checkpoint, "prior", raw=raw) for raw in (True, False))
    network, papers = read_network(tmp_path / "raw" / "prior.safetensors")
    state = network.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in raw.items())
    assert any(not torch.equal(state[key], tensor) for key, tensor in averages.items())
    assert (papers.recipe, papers.images) == ("tiny, not averaged", 16)
    ours, theirs = weights_of(tmp_path / "raw"), weights_of(run_dir / "model")
    assert all(torch.equal(ours[k], theirs[k]) for k in ours if not k.startswith("prior/"))


@pytest.mark.parametrize(
    ("stage", "checkpoint", "parts", "images"),
    [
        ("a", "8", {"vqgan"}, {"vqgan": 8}),
        ("b", "8", {"vqgan", "decoder", "compressor", "previewer"}, {"vqgan": 16, "decoder": 8}),
        ("a2", "newest", {"vqgan", "decoder", "compressor", "previewer"}, {"vqgan": 24, "decoder": 24}),
        ("c2", "8", set(NETWORKS), {"vqgan": 24, "decoder": 24, "prior": 24}),
    ],
)
def test_an_export_has_the_parts_that_existed_then(stage, checkpoint, parts, images, run_dir, tmp_path):
    export(run_dir, tmp_path / "model", stage=stage, checkpoint=checkpoint)
    assert read_parts(tmp_path / "model")[1].keys() & set(NETWORKS) == parts
    for name, count in images.items():
        assert read_network(tmp_path / "model" / f"{name}.safetensors")[1].images == count
    if "prior" in parts:
        assert read_cascade(tmp_path / "model").prior is not None


def test_during_stage_a_the_scale_is_not_known_yet(run_dir, tmp_path):
    unfinished = tmp_path / "run"
    shutil.copytree(
        run_dir, unfinished, ignore=shutil.ignore_patterns("stage_[bc]*", "stage_a2", "measured*")
    )
    with pytest.warns(
        NotMeasuredWarning,
        match="measured at the end of Stage A are not known yet.* of the recipe: scale_factor=",
    ):
        export(unfinished, tmp_path / "model")


def test_the_best_checkpoint_is_exported_by_name(run_dir, tmp_path):
    best = run_dir / "stage_c" / "checkpoints" / "best.json"
    with pytest.raises(UserError, match="--checkpoint best needs a validation loss, and stage C has none"):
        export(run_dir, tmp_path / "none", stage="c", checkpoint="best")
    best.write_text(json.dumps({"images": 8, "loss": 0.5}))
    try:
        assert "at image 8" in export(run_dir, tmp_path / "best", stage="c", checkpoint="best")
    finally:
        best.unlink()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": "d"}, r"--stage d has no checkpoint in .*\. Use a or b or b2 or a2 or c or c2"),
        ({"checkpoint": "9"}, r"stage C2 has no checkpoint 9\. Use newest, best or one of 8, 16"),
        ({"checkpoint": "../x"}, r"stage C2 has no checkpoint \.\./x"),
    ],
)
def test_a_missing_checkpoint_is_refused(options, message, run_dir, tmp_path):
    with pytest.raises(UserError, match=message):
        export(run_dir, tmp_path / "model", **options)
    assert not (tmp_path / "model").exists()


def test_other_folders_and_damaged_checkpoints_are_refused(run_dir, tmp_path):
    with pytest.raises(RunFolderError, match="is not a run folder: it has no run"):
        export(tmp_path, tmp_path / "model")
    other = tmp_path / "run"
    shutil.copytree(run_dir, other)
    path = other / "stage_c2" / "checkpoints" / f"{16:012d}" / "averages.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"000000000016 is damaged: averages.safetensors has changed"):
        export(other, tmp_path / "model", checkpoint="16")


def test_a_run_folder_is_its_model_or_says_what_to_type(run_dir, tmp_path, capsys):
    assert local_folder(run_dir) == run_dir / "model"
    unfinished = tmp_path / "my run"
    shutil.copytree(run_dir, unfinished, ignore=shutil.ignore_patterns("model"))
    start = dataclasses.replace(short(), stages=("c",), start_from=str(unfinished))
    with pytest.raises(CheckpointError, match="is the folder of an unfinished run"):
        train(start, tmp_path / "other", device="cpu")
    out, pictures = str(tmp_path / "out"), str(tmp_path / "pictures")
    for command in (
        ["generate", "a cat", "--model", str(unfinished), "--out", pictures],
        ["convert", str(unfinished), out, "--layout", "native"],
        ["convert", str(unfinished / "stage_c" / "checkpoints" / f"{16:012d}"), out, "--layout", "native"],
    ):
        assert main(command) == 2
        said = capsys.readouterr().err
        typed = shlex.split(said.partition("with: wuerstchen ")[2].partition(", and give")[0])
        assert typed[:2] == ["export", str(unfinished)]
        model = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
        assert main([word if word != "MODEL" else str(model) for word in typed]) == 0
        assert read_cascade(model).prior is not None
    assert main(["convert", str(run_dir), out, "--layout", "native"]) == 0
    shutil.rmtree(unfinished)
    unfinished.mkdir()
    (unfinished / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is a run folder without a checkpoint"):
        local_folder(unfinished)


def test_a_run_stopped_in_stage_c_ends_with_what_export_makes(run_dir, tmp_path):
    """--end-now, with all phases before it."""
    stopped = tmp_path / "stopped"
    shutil.copytree(run_dir, stopped, ignore=shutil.ignore_patterns("model", "stage_c2"))
    shutil.rmtree(newest(stopped / "stage_c" / "checkpoints")[0])
    assert newest(stopped / "stage_c" / "checkpoints")[1]["images"] == 8
    export(stopped, tmp_path / "exported")
    train(short(), stopped, device="cpu", end_now=True)
    for name in NETWORKS:
        (ours, our_papers), (theirs, papers) = (
            read_network(folder / f"{name}.safetensors")
            for folder in (tmp_path / "exported", stopped / "model")
        )
        assert all((ours.state_dict()[key] == tensor).all() for key, tensor in theirs.state_dict().items())
        assert our_papers.images == papers.images
    stored = json.loads((stopped / "run.json").read_text())
    assert {"stages", "stage_c.phases", "stage_c.optimization.images"} >= {
        change["field"] for change in stored["changes"]
    } - {"stage_c.blend"}
    assert run_phases(short())[-1].name == "c2"
    assert not (stopped / "stage_c2").exists()


def test_micro_is_what_its_name_says():
    assert [part.name for part in run_phases(micro())] == ["a"]

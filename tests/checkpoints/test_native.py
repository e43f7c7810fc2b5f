"""The native layout: exact round trips, and errors for unknown or damaged files."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from wuerstchen.checkpoints import files, native
from wuerstchen.checkpoints.files import write_safetensors
from wuerstchen.checkpoints.native import (
    NETWORKS,
    Provenance,
    is_native_network,
    read_cascade,
    read_network,
    read_tensors,
    write_cascade,
    write_network,
    write_tensors,
)
from wuerstchen.diffusion.objective import FlowMatching, VelocityPrediction, make_objective
from wuerstchen.diffusion.schedule import CosineSchedule
from wuerstchen.errors import CheckpointError, UserError
from wuerstchen.models.prior import Prior, PriorConfig
from wuerstchen.pipeline import BUNDLED

from ..configurations import with_student, write_model

PROVENANCE = Provenance(recipe="r", seed=7, images=99, data="abc")
CONFIG = PriorConfig(c_in=2, c=16, c_cond=8, c_r=8, depth=1, nhead=2)


@pytest.fixture
def copy(model_folder, tmp_path) -> Path:
    """A model folder to damage."""
    return shutil.copytree(model_folder, tmp_path / "model")


def test_native_files_are_recognized_without_reading_an_absurd_header(tmp_path, randomise, monkeypatch):
    """safetensors itself parses up to 100 MB."""
    path = tmp_path / "prior.safetensors"
    assert not is_native_network(path)
    write_network(randomise(Prior(CONFIG)), path, PROVENANCE)
    assert is_native_network(path)
    monkeypatch.setattr(files, "MAX_HEADER", 100)
    assert not is_native_network(path)


def test_a_network_keeps_weights_configuration_and_origin(tmp_path, randomise):
    prior = randomise(Prior(CONFIG))
    write_network(prior, tmp_path / "prior.safetensors", PROVENANCE)
    again, provenance = read_network(tmp_path / "prior.safetensors")
    assert again.config == CONFIG
    assert provenance == PROVENANCE
    assert provenance.versions["torch"] == torch.__version__
    assert not again.training
    for name, tensor in prior.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@pytest.mark.parametrize(("storage", "error", "share"), [("float16", 6e-4, 0.6), ("int8", 2e-2, 0.5)])
def test_small_storage_costs_little(storage, error, share, tmp_path, randomise, relative_error):
    prior = randomise(Prior(CONFIG))
    full, small = tmp_path / "full.safetensors", tmp_path / "small.safetensors"
    write_network(prior, full, PROVENANCE)
    write_network(prior, small, PROVENANCE, storage)
    again, _ = read_network(small)
    for name, tensor in prior.state_dict().items():
        assert again.state_dict()[name].dtype == tensor.dtype
        assert relative_error(again.state_dict()[name], tensor) <= error, name
    assert small.stat().st_size < share * full.stat().st_size


def test_a_complete_model_round_trips(model_folder, small_cascade):
    again = read_cascade(model_folder)
    assert again.settings == small_cascade.settings
    ours, theirs = small_cascade.networks(), again.networks()
    assert ours.keys() == theirs.keys() == {"vqgan", "decoder", "compressor", "prior", "text_encoder"}
    for part, network in ours.items():
        for name, tensor in network.state_dict().items():
            assert torch.equal(tensor, theirs[part].state_dict()[name]), (part, name)


@pytest.mark.parametrize(
    ("name", "value"), [("prior_guidance_interval", (0.2, 0.8)), ("prior_known_cells", True)]
)
def test_later_settings_are_stored_only_if_they_are_set(model_folder, small_cascade, tmp_path, name, value):
    """Versions without this setting refuse a ``model.json`` that has it."""
    assert name not in json.loads((model_folder / "model.json").read_text())["settings"]
    settings = dataclasses.replace(small_cascade.settings, **{name: value})
    cascade = dataclasses.replace(small_cascade, settings=settings)
    provenance = dict.fromkeys(cascade.networks(), PROVENANCE)
    write_cascade(cascade, tmp_path / "model", provenance, text_encoder=BUNDLED / "text_encoder")
    assert json.loads((tmp_path / "model" / "model.json").read_text())["settings"][name] in (True, [0.2, 0.8])
    assert read_cascade(tmp_path / "model").settings == settings


def test_an_existing_folder_is_not_overwritten(model_folder, small_cascade):
    with pytest.raises(CheckpointError, match=r"already exists\. Choose another folder"):
        write_cascade(small_cascade, model_folder, {})


def test_folders_are_written_atomically(tmp_path, small_cascade):
    with pytest.raises(KeyError):
        write_cascade(small_cascade, tmp_path / "model", {"vqgan": PROVENANCE})
    assert list(tmp_path.iterdir()) == []


def test_older_formats_are_migrated_step_by_step(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    write_tensors({"a": torch.ones(1)}, path, {"format": 1, "old": 5})
    monkeypatch.setattr(native, "FORMAT", 3)
    steps = {
        1: lambda header: {**header, "format": 2, "new": header["old"] + 1},
        2: lambda header: {**header, "format": 3, "newest": header["new"] + 1},
    }
    monkeypatch.setattr(native, "MIGRATIONS", steps)
    _, header = read_tensors(path)
    assert header == {"format": 3, "old": 5, "new": 6, "newest": 7}


def test_a_newer_format_is_refused_with_upgrade(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors({"a": torch.ones(1)}, path, {"format": 3})
    with pytest.raises(
        CheckpointError,
        match=r"format 3. This version reads formats up to 2. .*pip install --upgrade wuerstchen",
    ):
        read_tensors(path)


class Bomb:
    """Unpickling it would fail the test."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def test_a_pickle_is_never_opened(copy):
    torch.save({"weight": Bomb()}, copy / "prior.safetensors")
    with pytest.raises(CheckpointError, match=r"prior\.safetensors is not a complete safetensors file"):
        read_cascade(copy)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    save_file({"x": torch.ones(2)}, path)


def complex_numbers(path: Path) -> None:
    tensors, header = read_tensors(path)
    write_tensors({name: t.to(torch.complex64) for name, t in tensors.items()}, path, header)


def endless(path: Path) -> None:
    tensors, header = read_tensors(path)
    header["config"]["depth"] = 10**9
    write_tensors(tensors, path, header)


def other_network(path: Path) -> None:
    shutil.copy(path.with_name("vqgan.safetensors"), path)


def without_a_tensor(path: Path) -> None:
    tensors, header = read_tensors(path)
    tensors.popitem()
    write_tensors(tensors, path, header)


def wrong_shape(path: Path) -> None:
    tensors, header = read_tensors(path)
    name = next(iter(tensors))
    write_tensors({**tensors, name: torch.ones(3)}, path, header)


def nested_deep(path: Path) -> None:
    tensors, _ = read_tensors(path)
    write_safetensors(tensors, path, {"wuerstchen": '{"a":' + "[" * 3000 + "]" * 3000 + "}"})


def long_number(path: Path) -> None:
    tensors, header = read_tensors(path)
    header["config"]["c"] = 10**400
    write_tensors(tensors, path, header)


def unknown_field(path: Path) -> None:
    tensors, header = read_tensors(path)
    header["config"]["flux_capacitor"] = 1
    write_tensors(tensors, path, header)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "does not exist"),
        (truncate, "is not a complete safetensors file"),
        (empty, "is not a complete safetensors file"),
        (foreign, "was not written by wuerstchen"),
        (other_network, "contains another network"),
        (without_a_tensor, "does not match its header"),
        (wrong_shape, "does not match its header"),
        (unknown_field, "flux_capacitor"),
        (nested_deep, r"the header of .* cannot be read \(it is nested"),
        (long_number, "an integer of 401 digits"),
        (complex_numbers, "is torch.complex64"),
        (endless, "depth must be at most 333, got 1000000000"),
    ],
)
def test_damaged_and_foreign_files_are_refused(damage, message, copy):
    damage(copy / "prior.safetensors")
    with pytest.raises(CheckpointError, match=message) as raised:
        read_cascade(copy)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[" * 10**5, "cannot be read"),
        ('{"a":' * 3000 + "1" + "}" * 3000, "is nested"),
        ('{"format": 1, "settings": {"image_size": 1' + "0" * 400 + "}}", "integer of 401 digits"),
        ("[]", "is not a JSON object"),
        ('{"format": 1}', "is not a valid model description"),
        ('{"format": "x"}', "format must be an integer of at least 1, got 'x'"),
        ('{"format": 9}', "Upgrade"),
    ],
)
def test_damaged_descriptions_are_refused(content, message, copy):
    (copy / "model.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_cascade(copy)


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": 0},
        {"image_size": "abc"},
        {"image_size": 2**70},
        {"prior_guidance": None},
        {"prior_guidance": 10**400},
        {"prior_guidance_interval": 0.5},
        {"prior_guidance_interval": [0.8, 0.2]},
        {"prior_guidance_interval": [0, "1"]},
        {"view_scale": "x"},
        {"view_scale": 0.0},
        {"view_scale": -1.0},
        {"text_mask": "yes"},
        {"prior_known_cells": 1},
        {"map_statistics": {"mean": [10**400], "std": [1]}},
    ],
)
def test_settings_of_the_wrong_kind_are_refused(change, copy):
    description = json.loads((copy / "model.json").read_text())
    description["settings"] |= change
    (copy / "model.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match=r"model\.json is not a valid model description|401 digits"):
        read_cascade(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size_multiple": 7}, "size_multiple must be a multiple of 16 .*, got 7"),
        ({"map_statistics": {"mean": [0.0] * 3, "std": [1.0] * 3}}, "map_statistics has 3 channels"),
    ],
)
def test_settings_that_do_not_fit_the_networks_are_refused(change, message, copy):
    description = json.loads((copy / "model.json").read_text())
    description["settings"] |= change
    (copy / "model.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=message):
        read_cascade(copy)


def test_a_model_cannot_choose_how_attention_is_computed(copy):
    """transformers would download and run a kernel of that name."""
    path = copy / "text_encoder" / "config.json"
    evil = {"attn_implementation": "evil/kernel", "auto_map": {"AutoModel": "evil.E"}, "return_dict": False}
    path.write_text(json.dumps(json.loads(path.read_text()) | evil | {"chunk_size_feed_forward": 3}))
    encoder = read_cascade(copy).text_encoder
    assert encoder.model.config._attn_implementation == "sdpa"
    assert encoder.encode(["a"]).states.shape == (1, 32, 384)


def test_a_pipe_in_place_of_a_file_does_not_hang(copy):
    (copy / "decoder.safetensors").unlink()
    os.mkfifo(copy / "decoder.safetensors")
    with pytest.raises(CheckpointError, match=r"decoder\.safetensors is not a file"):
        read_cascade(copy)


def test_unknown_parts_missing_parts_and_bad_numbers_are_refused(copy):
    description = json.loads((copy / "model.json").read_text())

    def write(**changes):
        (copy / "model.json").write_text(json.dumps({**description, **changes}))

    write(parts=[*description["parts"], "telepathy"])
    with pytest.raises(CheckpointError, match="unknown part: 'telepathy'"):
        read_cascade(copy)
    write(parts=[["vqgan"], "decoder"])
    with pytest.raises(CheckpointError, match=r"unknown part: \"\['vqgan'\]\""):
        read_cascade(copy)
    write(parts=["prior"])
    with pytest.raises(CheckpointError, match="has no decoder and no vqgan"):
        read_cascade(copy)
    with pytest.raises(CheckpointError, match=r"is not a model folder: it has no model\.json"):
        read_cascade(copy / "text_encoder")


def with_predictions(cascade, prediction, **settings):
    """The cascade with networks for another prediction and random weights."""
    parts = {}
    for part in ("decoder", "prior"):
        network = getattr(cascade, part)
        parts[part] = type(network)(dataclasses.replace(network.config, prediction=prediction))
    return dataclasses.replace(cascade, settings=dataclasses.replace(cascade.settings, **settings), **parts)


def written(cascade, folder):
    parts = {part: PROVENANCE for part in cascade.networks() if part in NETWORKS}
    write_cascade(cascade, folder, parts, text_encoder=BUNDLED / "text_encoder")
    return json.loads((folder / "model.json").read_text())


FLOW = {
    "prior_objective": FlowMatching(time_shift=3.0),
    "decoder_objective": FlowMatching(time_density="uniform"),
    "prior_sampler": "euler",
}


def test_objectives_are_stored_completely(tmp_path, small_cascade):
    """Older versions would mistake flow matching for velocity prediction, so it needs format 2."""
    described = written(with_predictions(small_cascade, "flow", **FLOW), tmp_path / "flow")
    assert described["format"] == 2
    assert described["objectives"] == {
        "decoder": {"kind": "flow", "time_shift": 1.0, "time_density": "uniform"},
        "prior": {"kind": "flow", "time_shift": 3.0, "time_density": "logit_normal"},
    }
    for part in ("prior", "decoder"):
        with safe_open(tmp_path / "flow" / f"{part}.safetensors", framework="pt") as file:
            assert json.loads(file.metadata()["wuerstchen"])["format"] == 2
    again = read_cascade(tmp_path / "flow").settings
    assert again.prior_objective.as_json() == described["objectives"]["prior"]
    assert again.decoder_objective.as_json() == described["objectives"]["decoder"]
    assert again.prior_sampler == "euler"


@pytest.mark.parametrize("kind", ["noise", "velocity"])
def test_models_of_before_objectives_were_stored_are_migrated(tmp_path, small_cascade, kind):
    """Their prediction determines the objective, and older versions still read new files."""
    objective = make_objective(kind, loss_weight="velocity")
    cascade = with_predictions(small_cascade, kind, prior_objective=objective, decoder_objective=objective)
    described = written(cascade, tmp_path / "model")
    assert described["format"] == 1
    assert "prior_objective" not in described["settings"]
    del described["objectives"]
    (tmp_path / "model" / "model.json").write_text(json.dumps(described))
    found = read_cascade(tmp_path / "model").settings
    assert found.prior_objective == found.decoder_objective == make_objective(kind)


def test_another_schedule_needs_the_new_format(tmp_path, small_cascade):
    other = make_objective("noise", schedule=CosineSchedule(s=0.01))
    settings = dataclasses.replace(small_cascade.settings, prior_objective=other)
    described = written(dataclasses.replace(small_cascade, settings=settings), tmp_path / "model")
    assert described["format"] == 2
    assert read_cascade(tmp_path / "model").settings.prior_objective == other


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["objectives"].pop("decoder"), "does not store the objective of the decoder"),
        (
            lambda d: d["objectives"].update(decoder={"kind": "noise"}),
            "stores the objective 'noise' for the decoder",
        ),
        (lambda d: d.pop("objectives"), "prior_sampler=euler is incompatible with"),
        (lambda d: d["objectives"].update(prior={"kind": "x"}), "The objective is unknown: 'x'"),
        (lambda d: d.update(objectives=3), "is not a valid model description"),
    ],
)
def test_objectives_that_do_not_fit_are_refused(tmp_path, small_cascade, change, message):
    described = written(with_predictions(small_cascade, "flow", **FLOW), tmp_path / "model")
    change(described)
    (tmp_path / "model" / "model.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match=message):
        read_cascade(tmp_path / "model")


def test_a_network_with_another_prediction_is_refused(small_cascade):
    with pytest.raises(UserError, match="prior predicts 'noise', but prior_objective is 'velocity'"):
        dataclasses.replace(
            small_cascade,
            settings=dataclasses.replace(small_cascade.settings, prior_objective=VelocityPrediction()),
        )


def test_a_student_of_stage_c_is_a_file_of_its_own(tmp_path, small_cascade, randomise):
    model = with_student(small_cascade, steps=2)
    randomise(model.prior_student)
    folder = write_model(model, tmp_path / "model")
    described = json.loads((folder / "model.json").read_text())
    assert "prior_student" in described["parts"]
    assert described["objectives"].keys() == {"prior", "decoder"}  # the student's is that of the prior
    assert described["settings"]["prior_student_steps"] == 2
    assert described["settings"]["prior_student_guidance"] == 2.5
    again = read_cascade(folder)
    assert again.settings == model.settings
    assert again.prior_student.config == model.prior_student.config
    for name, tensor in model.prior_student.state_dict().items():
        assert torch.equal(again.prior_student.state_dict()[name], tensor), name
    assert not torch.equal(again.prior.out[1].weight, again.prior_student.out[1].weight)


def test_a_model_without_a_student_does_not_mention_one(model_folder):
    """So that earlier versions read it."""
    assert "student" not in (model_folder / "model.json").read_text()
    assert not (model_folder / "prior_student.safetensors").exists()
    assert read_cascade(model_folder).settings.prior_student_steps == 0


def test_a_student_says_how_many_steps_it_takes(small_cascade):
    student = with_student(small_cascade)
    settings = dataclasses.replace(student.settings, prior_student_steps=0)
    with pytest.raises(UserError, match=r"prior_student_steps must be at least 1 .*, got 0"):
        dataclasses.replace(student, settings=settings)
    with pytest.raises(UserError, match=r"prior_student_steps must be an integer of at least 0, got -1"):
        dataclasses.replace(student.settings, prior_student_steps=-1)


def test_a_student_with_another_prediction_is_refused(small_cascade):
    config = dataclasses.replace(small_cascade.prior.config, prediction="velocity")
    settings = dataclasses.replace(small_cascade.settings, prior_student_steps=1)
    with pytest.raises(UserError, match="prior_student predicts 'velocity', but prior_objective is 'noise'"):
        dataclasses.replace(small_cascade, prior_student=Prior(config), settings=settings)

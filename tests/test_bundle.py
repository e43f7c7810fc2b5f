"""The script that puts a trained model into the package."""

import runpy
import shutil
import sys
from pathlib import Path

import torch

from wuerstchen.checkpoints import shards
from wuerstchen.checkpoints.native import read_network, read_settings
from wuerstchen.checkpoints.shards import split_files
from wuerstchen.checkpoints.text_encoder import read_text_encoder

from .configurations import with_student, write_model

SCRIPT = Path(__file__).parents[1] / "scripts" / "bundle.py"


def test_the_weights_of_a_text_encoder_in_shards_replace_the_old_file(model_folder, tmp_path, monkeypatch):
    """Bug: the old file stayed beside the shards, and was read instead of them."""
    monkeypatch.setattr(shards, "LEAST", 1000)
    new, package = shutil.copytree(model_folder, tmp_path / "new"), tmp_path / "package"
    size = (new / "text_encoder" / "model.safetensors").stat().st_size
    split_files(new / "text_encoder", f"{0.75 * size / 1000:.1f}KB")
    shutil.copytree(model_folder, package)
    (package / "text_encoder" / "model.safetensors").write_bytes(b"old")
    main = runpy.run_path(str(SCRIPT))["main"]
    monkeypatch.setitem(main.__globals__, "BUNDLED", package)
    monkeypatch.setattr(sys, "argv", ["bundle.py", str(new)])
    main()
    encoders = [read_text_encoder(folder / "text_encoder") for folder in (package, model_folder)]
    assert torch.equal(*(encoder.encode(["a cat"]).states for encoder in encoders))


def test_a_student_is_stored_as_its_difference(small_cascade, tmp_path, monkeypatch):
    """Bugs: a student that is left out, or one that is a difference to other weights than those stored."""
    cascade = with_student(small_cascade)
    for tensor in cascade.prior_student.state_dict().values():
        tensor.add_(0.01 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)))
    model, package = write_model(cascade, tmp_path / "model"), tmp_path / "package"
    package.mkdir()
    (package / "paella.safetensors").write_bytes(b"of an earlier model")
    main = runpy.run_path(str(SCRIPT))["main"]
    monkeypatch.setitem(main.__globals__, "BUNDLED", package)
    monkeypatch.setattr(sys, "argv", ["bundle.py", str(model)])
    main()
    assert not (package / "paella.safetensors").exists()
    settings, parts = read_settings(package / "model.json")
    assert settings.prior_student_steps == cascade.settings.prior_student_steps == 1
    assert "prior_student" in parts
    base, student = (read_network(package / f"{name}.safetensors")[0] for name in ("prior", "prior_student"))
    size = {name: (package / f"{name}.safetensors").stat().st_size for name in ("prior", "prior_student")}
    assert size["prior_student"] < size["prior"]
    for name, tensor in cascade.prior_student.state_dict().items():
        largest = (tensor - base.state_dict()[name]).abs().max()
        assert (student.state_dict()[name] - tensor).abs().max() <= 0.45 * largest + 1e-3 * tensor.abs().max()

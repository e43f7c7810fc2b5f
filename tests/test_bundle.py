"""The script that puts a trained model into the package."""

import runpy
import shutil
import sys
from pathlib import Path

import torch

from wuerstchen.checkpoints import shards
from wuerstchen.checkpoints.shards import split_files
from wuerstchen.checkpoints.text_encoder import read_text_encoder

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
    monkeypatch.setitem(main.__globals__, "NETWORKS", tuple(file.stem for file in new.glob("*.safetensors")))
    monkeypatch.setattr(sys, "argv", ["bundle.py", str(new)])
    main()
    encoders = [read_text_encoder(folder / "text_encoder") for folder in (package, model_folder)]
    assert torch.equal(*(encoder.encode(["a cat"]).states for encoder in encoders))

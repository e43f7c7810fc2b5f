"""A stage that the package does not know: one file, and a row in the table of stages."""

import importlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from wuerstchen.checkpoints.native import read_cascade
from wuerstchen.train import stage_table
from wuerstchen.train.engine.checkpoint import newest
from wuerstchen.train.run import train


@pytest.fixture
def residual_runs(monkeypatch):
    """The module of the stage, which is in the table while the test runs."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    module = importlib.import_module("residual_runs")
    monkeypatch.setattr(stage_table, "STAGES", module.table())
    yield module
    del sys.modules["residual_runs"]


def last(run_dir: Path) -> tuple[Path, dict]:
    path, state = newest(run_dir / "stage_residual" / "checkpoints")
    return path, state["files"]


def test_it_trains_survives_a_kill_and_stores_only_its_own_tensors(
    residual_runs, model_folder, tmp_path, monkeypatch
):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    begun = []
    uses = residual_runs.ResidualStage.use_averages

    def use_averages(self, averages):
        uses(self, averages)
        begun.append(self)

    monkeypatch.setattr(residual_runs.ResidualStage, "use_averages", use_averages)
    recipe = residual_runs.recipe(model_folder)
    model = train(recipe, whole, device="cpu")

    command = [sys.executable, residual_runs.__file__, str(model_folder), str(broken)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    stopped = int(last(broken)[0].name)
    assert 0 < stopped < residual_runs.IMAGES
    train(recipe, broken, device="cpu")
    assert last(broken)[1] == last(whole)[1]  # checksums of all tensors

    path = last(whole)[0]
    assert path.name == f"{residual_runs.IMAGES:012d}"
    keys = {"0.weight", "0.bias", "3.weight", "3.bias"}
    averages = load_file(path / "averages.safetensors")
    assert averages.keys() == {f"residual/{key}" for key in keys}
    assert load_file(path / "networks.safetensors").keys() == averages.keys()
    stored = load_file(path / "optimizers.safetensors")
    assert stored.keys()
    assert all(name.startswith("residual/") for name in stored)

    result = load_file(model / "residual.safetensors")
    assert all(torch.equal(result[key], averages[f"residual/{key}"]) for key in keys)
    before, after = (read_cascade(folder).prior.state_dict() for folder in (model_folder, model))
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())

    first, resumed = begun
    pairs = zip(first.begun, resumed.begun, strict=True)
    assert any(not torch.equal(one, other) for one, other in pairs)  # a start gets the restored averages
    for stage in begun:  # and they follow the updates
        ours = stage.averages["residual"].state_dict()
        assert all(torch.equal(ours[key], averages[f"residual/{key}"]) for key in keys)

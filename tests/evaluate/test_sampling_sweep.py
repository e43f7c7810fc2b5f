"""benchmarks/sampling_sweep.py: its settings, autoguidance, and a rehearsal with a small model."""

import copy
import json
import sys

import numpy as np
import pytest
import torch

from wuerstchen.checkpoints.native import Provenance, write_network
from wuerstchen.errors import UserError
from wuerstchen.models.prior import Prior
from wuerstchen.pipeline import Sampling, Wuerstchen

CPU = torch.device("cpu")


@pytest.fixture
def sweep(script):
    return script("benchmarks/sampling_sweep")


@pytest.fixture
def table(script):
    return script("scripts/experiments_table")


@pytest.fixture
def weak_file(small_cascade, tmp_path):
    """A prior with other weights."""
    prior = copy.deepcopy(small_cascade.prior)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.mul_(0.5)
    path = tmp_path / "weak" / "prior.safetensors"
    path.parent.mkdir()
    write_network(prior, path, Provenance(recipe="weak", seed=0, images=0, data=""))
    return path


def test_every_setting_has_a_prediction_and_a_name_of_its_own(sweep):
    """A row without a prediction shows nothing about what was understood."""
    changed = [json.dumps(setting.changed) for setting in sweep.SETTINGS.values()]
    assert len(set(changed)) == len(changed) >= 30
    for name, setting in sweep.SETTINGS.items():
        assert name.startswith("s-")
        assert setting.predicted.endswith(".")
        assert (setting.sampling.guidance == 1) == (setting.weight is not None)


def test_autoguidance_goes_from_the_weak_prediction_past_the_strong_one(sweep, small_cascade, weak_file):
    """Bugs: the weight is the wrong way round, or the empty caption takes part."""
    strong = small_cascade.prior
    weak = sweep.weak_prior(weak_file.parent, Wuerstchen(small_cascade, CPU))
    x, t = torch.randn(2, 2, 3, 3), torch.tensor([0.3, 0.8])
    text = small_cascade.text_encoder.encode(["a cat", "a dog"])
    with torch.no_grad():
        both = [prior(x, t, prior.context(text.states, text.mask)) for prior in (weak, strong)]
        for weight in (0.0, 1.0, 2.0):
            guided = sweep.Autoguided(strong, weak, weight)
            found = guided(x, t, guided.context(text.states, text.mask))
            torch.testing.assert_close(found, both[0] + weight * (both[1] - both[0]))
    assert not torch.allclose(*both)


def test_a_model_with_autoguidance_samples_as_usual(sweep, small_cascade):
    """Guided by itself, the prior gives the images without guidance."""
    model = Wuerstchen(small_cascade, CPU)
    itself = sweep.Observed(model, sweep.Autoguided(small_cascade.prior, small_cascade.prior, 3.0))
    images = itself.generate(["a cat", "a dog"], sampling=Sampling(guidance=1.0))
    expected = model.generate(["a cat", "a dog"], sampling=Sampling(guidance=1.0))
    for one, other in zip(images, expected, strict=True):
        assert np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max() <= 1
    assert len(itself.seconds) == 1
    assert itself.images == images


def test_a_weak_prior_of_another_model_is_refused(sweep, small_cascade, tmp_path, randomise):
    config = small_cascade.prior.config
    other = Prior(type(config)(**{**vars(config), "c_in": config.c_in + 1}))
    path = tmp_path / "prior.safetensors"
    write_network(other, path, Provenance(recipe="other", seed=0, images=0, data=""))
    with pytest.raises(UserError, match="is not a prior for this model"):
        sweep.weak_prior(path, Wuerstchen(small_cascade, CPU))


def test_a_sweep_writes_rows_that_make_a_table(
    sweep, table, model_folder, emoji_set, use_simple_judges, weak_file, monkeypatch, tmp_path, capsys
):
    """Bugs: equal settings are scored twice, a row does not fit the table, the weak prior is unused."""
    use_simple_judges(monkeypatch)
    names = ["s-own", "s-ddpm-20", "s-guidance-3-at-0.2-0.8", "s-auto-2"]
    setting = sweep.Setting(Sampling(prior_sampler="ddpm", prior_steps=3), "the model's own, once more.")
    monkeypatch.setitem(sweep.SETTINGS, "s-ddpm-20", setting)
    rows = tmp_path / "rows.jsonl"
    arguments = [
        "--model",
        model_folder,
        "--data",
        emoji_set,
        "--rows",
        rows,
        "--limit",
        4,
        "--device",
        "cpu",
    ]
    arguments += ["--weak-prior", weak_file, "--batch-size", 4]
    monkeypatch.setattr(sys, "argv", ["sampling_sweep.py", *names, *map(str, arguments)])
    sweep.main()
    assert "s-ddpm-20: skipped, for this model it is the same as s-own" in capsys.readouterr().out
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["name"] for row in found] == ["s-own", "s-guidance-3-at-0.2-0.8", "s-auto-2"]
    assert [row["changed"] for row in found] == [
        {},
        {"guidance": 3.0, "guidance_interval": [0.2, 0.8]},
        {"autoguidance": 2.0},
    ]
    for row in found:
        assert row["scores"]["a"]["kid_e3"][0] != row["scores"]["a"]["kid_e3"][1]  # one for each first seed
        assert row["scores"]["b"]["diversity"][0] > 0
    kids = {tuple(row["scores"]["a"]["kid_e3"]) for row in found}
    assert len(kids) == 3
    page = table.page(found)
    assert "## Sampling only" in page
    for row in found:
        assert f"| {row['name']} | " in page
        assert f"Predicted: {row['predicted']}" in page


def test_a_sweep_stops_before_its_limit(
    sweep, model_folder, emoji_set, use_simple_judges, monkeypatch, tmp_path, capsys
):
    use_simple_judges(monkeypatch)
    rows = tmp_path / "rows.jsonl"
    arguments = ["s-own", "s-guidance-3", "--model", model_folder, "--data", emoji_set, "--rows", rows]
    arguments += ["--limit", 4, "--device", "cpu", "--first-seeds", 0, "--minutes", 1e-4]
    monkeypatch.setattr(sys, "argv", ["sampling_sweep.py", *map(str, arguments)])
    sweep.main()
    assert "s-guidance-3: skipped, it needs up to" in capsys.readouterr().out
    (row,) = map(json.loads, rows.read_text().splitlines())
    assert "diversity" not in row["scores"]["a"]  # it needs two seeds

"""Averages of two models' weights: averaged and copied networks, and models that do not match."""

import copy
import dataclasses
import shutil

import pytest
import torch

from wuerstchen.checkpoints.average import average
from wuerstchen.checkpoints.layouts import layout_of, read_model
from wuerstchen.checkpoints.native import read_network, write_cascade
from wuerstchen.cli import main
from wuerstchen.errors import CheckpointError, UserError
from wuerstchen.models.prior import Prior

from ..configurations import PROVENANCE, SMALL_PRIOR, with_student, write_model


@pytest.fixture
def other(small_cascade, tmp_path):
    """The same model with another Stage C."""
    cascade = copy.deepcopy(small_cascade)
    with torch.no_grad():
        for parameter in cascade.prior.parameters():
            parameter.add_(torch.randn_like(parameter))
    return write_model(cascade, tmp_path / "other")


@pytest.mark.parametrize("share", [0.5, 0.25, 0.0, 1.0])
def test_what_differs_is_averaged_and_the_rest_stays(model_folder, other, tmp_path, share):
    assert average(model_folder, other, tmp_path / "out", share) == ["prior"]
    first, second, out = (read_model(path) for path in (model_folder, other, tmp_path / "out"))
    for name, tensor in out.prior.state_dict().items():
        a, b = (m.prior.state_dict()[name].double() for m in (first, second))
        torch.testing.assert_close(tensor.double(), (1 - share) * a + share * b, atol=1e-6, rtol=1e-5)
    for name in ("vqgan", "decoder", "compressor"):
        kept = out.networks()[name].state_dict()
        assert all(torch.equal(kept[k], t) for k, t in first.networks()[name].state_dict().items())
    assert out.settings == first.settings
    assert out.text_encoder.encode(["a cat"]).states.equal(first.text_encoder.encode(["a cat"]).states)
    assert read_network(tmp_path / "out" / "prior.safetensors")[1].recipe.startswith("average of ")


def test_students_are_averaged_but_not_with_their_priors(small_cascade, tmp_path, randomise):
    first = with_student(small_cascade)
    second, third = with_student(small_cascade), copy.deepcopy(first)
    randomise(second.prior_student)
    randomise(third.prior)
    one, two, three = (
        write_model(m, tmp_path / f"{i}") for i, m in enumerate((first, second, third), start=1)
    )
    assert average(one, two, tmp_path / "out", 0.25) == ["prior_student"]
    out = read_model(tmp_path / "out").prior_student.state_dict()
    for name, tensor in out.items():
        a, b = (m.prior_student.state_dict()[name] for m in (first, second))
        torch.testing.assert_close(tensor, 0.75 * a + 0.25 * b, atol=1e-6, rtol=1e-5)
    with pytest.raises(UserError, match="would not be the student of their average"):
        average(one, three, tmp_path / "other")


def test_only_named_files_of_a_text_encoder_are_taken_along(model_folder, other, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("a private key")
    folder = tmp_path / "first"
    shutil.copytree(model_folder, folder)
    (folder / "text_encoder" / "notes.txt").symlink_to(secret)
    (folder / "text_encoder" / "more").mkdir()
    (folder / "text_encoder" / "more" / "file").write_text("private")
    average(folder, other, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out" / "text_encoder").iterdir()}
    assert names == {"config.json", "model.safetensors", "vocab.txt", "LICENSE", "README.md"}


def test_any_layout_goes_in(write_published, tmp_path):
    first = write_published(tmp_path / "one")
    second = write_published(tmp_path / "two", 2026)
    with pytest.raises(UserError, match="have the same weights, so there is nothing to average"):
        average(first, second, tmp_path / "out")
    cascade = read_model(second)
    with torch.no_grad():
        cascade.prior.projection.weight.add_(1.0)
    parts = dict.fromkeys(("vqgan", "decoder", "prior"), PROVENANCE)
    write_cascade(cascade, tmp_path / "native", parts)
    assert average(first, tmp_path / "native", tmp_path / "out") == ["prior"]
    assert layout_of(tmp_path / "out") == "native"
    out = read_model(tmp_path / "out")
    added = out.prior.projection.weight - read_model(first).prior.projection.weight
    torch.testing.assert_close(added, torch.full_like(added, 0.5))
    assert out.text_encoder.width == 16
    assert out.decoder_text_encoder.width == 12


def test_models_that_do_not_match_are_refused(small_cascade, model_folder, tmp_path, capsys):
    changes = {
        "deeper": {"prior": Prior(dataclasses.replace(SMALL_PRIOR, depth=2))},
        "wider": {"prior": Prior(dataclasses.replace(SMALL_PRIOR, c=32))},
        "without": {"prior": None},
        "set": {"settings": dataclasses.replace(small_cascade.settings, text_mask=False)},
    }
    messages = {
        "deeper": r"prior: blocks\.3\S* is missing in .* and \(.*\) in .*. Use models with the same",
        "wider": r"prior: projection\.weight is \(16, 2, 1, 1\) in .* and \(32, 2, 1, 1\) in",
        "without": r"only one of .* has a prior\. Use models with the same parts",
        "set": "text_mask is True in .* and False in",
    }
    for name, change in changes.items():
        folder = tmp_path / name
        cascade = dataclasses.replace(small_cascade, **change)
        write_model(cascade, folder)
        with pytest.raises(UserError, match=messages[name]):
            average(model_folder, folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"must be from 0 to 1, got 1\.5"):
        average(model_folder, model_folder, tmp_path / "out", 1.5)
    with pytest.raises(CheckpointError, match="already exists"):
        average(model_folder, model_folder, tmp_path)
    assert main(["average", str(model_folder), str(model_folder), str(tmp_path / "out")]) == 2
    assert "nothing to average" in capsys.readouterr().err

"""Weights stored in 4 bits as differences to another network."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from wuerstchen.checkpoints.differences import add_differences, quantize_differences
from wuerstchen.checkpoints.native import Provenance, read_network, write_network
from wuerstchen.errors import CheckpointError
from wuerstchen.models.prior import Prior, PriorConfig

PROVENANCE = Provenance(recipe="r", seed=7, images=99, data="abc")
CONFIG = PriorConfig(c_in=2, c=32, c_cond=8, c_r=8, depth=1, nhead=2)


def states(deviation: float = 0.01) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    random = torch.Generator().manual_seed(0)
    base = {
        "matrix": torch.randn(8, 64, generator=random),
        "convolution": torch.randn(6, 16, 2, 2, generator=random),
        "odd": torch.randn(6, 7, generator=random),
        "bias": torch.randn(32, generator=random),
        "steps": torch.tensor(3),
    }
    near = {
        name: tensor + deviation * torch.randn(tensor.shape, generator=random) if tensor.ndim else tensor
        for name, tensor in base.items()
    }
    return near, base


def test_the_error_is_a_sixteenth_of_the_difference():
    """Rounded to 16 levels between the largest differences of a group, not between the largest weights."""
    state, base = states()
    stored = quantize_differences(state, base)
    assert {name for name, tensor in stored.items() if tensor.dtype == torch.uint8} == {
        "matrix",
        "convolution",
    }
    assert sum(tensor.nbytes for name, tensor in stored.items() if name.startswith("matrix")) == 8 * (32 + 4)
    found = add_differences(stored, base)
    assert found.keys() == state.keys()
    for name in ("matrix", "convolution"):
        assert found[name].shape == state[name].shape
        errors = (found[name] - state[name]).flatten(1).unflatten(1, (-1, 32)).abs().amax(-1)
        largest = (state[name] - base[name]).flatten(1).unflatten(1, (-1, 32)).abs().amax(-1)
        assert (errors <= 0.45 * largest).all()  # the best scale may clip the largest value of a group
        assert errors.square().mean().sqrt() <= 0.15 * largest.square().mean().sqrt()
        assert errors.max() > 0
    for name in ("odd", "bias", "steps"):
        torch.testing.assert_close(found[name], state[name], rtol=1e-3, atol=0)
    same = add_differences(quantize_differences(base, base), base)
    assert all(torch.equal(same[name], base[name]) for name in ("matrix", "convolution"))


@pytest.mark.parametrize("change", ["missing", "other", "shape"])
def test_another_base_is_refused(change):
    state, base = states()
    stored, other = quantize_differences(state, base), dict(base)
    if change == "missing":
        del other["matrix"]
    elif change == "other":
        other["more"] = torch.zeros(3)
    else:
        other["matrix"] = torch.zeros(8, 32)
    with pytest.raises(CheckpointError, match="stored as a difference to"):
        add_differences(stored, other)
    with pytest.raises(CheckpointError, match="stored as a difference to"):
        quantize_differences(state, other)


@pytest.fixture
def folder(tmp_path, randomise):
    """A prior in int8 and its student in 4 bits."""
    prior = randomise(Prior(CONFIG))
    student = Prior(CONFIG)
    student.load_state_dict({name: 1.01 * tensor for name, tensor in prior.state_dict().items()})
    write_network(prior, tmp_path / "prior.safetensors", PROVENANCE, "int8")
    write_network(student, tmp_path / "prior_student.safetensors", PROVENANCE, "int4_difference")
    return tmp_path


def test_a_network_is_restored_from_the_stored_weights_of_its_base(folder, randomise):
    """The rounding of the base is corrected too: the difference is to what readers see."""
    student, provenance = read_network(folder / "prior_student.safetensors")
    base = read_network(folder / "prior.safetensors")[0].state_dict()
    exact = randomise(Prior(CONFIG)).state_dict()
    assert provenance == PROVENANCE
    for name, tensor in student.state_dict().items():
        wanted = 1.01 * exact[name]
        assert (tensor - wanted).abs().max() <= 0.45 * (wanted - base[name]).abs().max() + 1e-3
    half, _ = read_network(folder / "prior_student.safetensors", torch.float16)
    assert all(
        torch.equal(half.state_dict()[name], tensor.half()) for name, tensor in student.state_dict().items()
    )


def test_a_changed_base_is_refused(folder, randomise):
    """Bug: noise, drawn without an error."""
    other = randomise(Prior(CONFIG))
    next(other.parameters()).data.mul_(2)
    write_network(other, folder / "prior.safetensors", PROVENANCE, "int8")
    with pytest.raises(CheckpointError, match="differences to another network than the one in its folder"):
        read_network(folder / "prior_student.safetensors")


def test_a_missing_base_and_a_wrong_name_are_reported(folder):
    moved = folder / "student.safetensors"
    (folder / "prior_student.safetensors").rename(moved)
    with pytest.raises(CheckpointError, match=r"Only these files can: prior_student\.safetensors"):
        read_network(moved)
    moved.rename(folder / "prior_student.safetensors")
    (folder / "prior.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"prior\.safetensors does not exist"):
        read_network(folder / "prior_student.safetensors")


def test_a_header_without_its_base_is_damaged(folder):
    path = folder / "prior_student.safetensors"
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["wuerstchen"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del header["base"]
    save_file(tensors, path, {"wuerstchen": json.dumps(header)})
    with pytest.raises(CheckpointError, match="does not match its header"):
        read_network(path)

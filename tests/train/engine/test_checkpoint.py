"""Checkpoints: whole or not there, and damage is noticed."""

import json
import resource
import threading

import pytest
import torch
from torch import nn

from wuerstchen.checkpoints import files
from wuerstchen.errors import CheckpointError
from wuerstchen.train.config import Optimization
from wuerstchen.train.engine import checkpoint, checkpoint_writer
from wuerstchen.train.engine.checkpoint import (
    DamagedCheckpointWarning,
    TrainingState,
    newest,
    read_averages,
    read_verified,
    restore,
)
from wuerstchen.train.engine.checkpoint_writer import Writer, save
from wuerstchen.train.engine.distributed import Processes
from wuerstchen.train.engine.ema import make_average
from wuerstchen.train.engine.optim import make_optimizer, update

CONFIG = Optimization(images=10, batch_size=1)


def make_state(seed: int = 0, width: int = 4) -> TrainingState:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width))
    optimizer = make_optimizer(network, CONFIG)
    network(torch.randn(3, width)).square().mean().backward()
    update(network, optimizer, 1.0, torch.tensor(1.0))
    return TrainingState({"n": network}, {"n": make_average(network)}, {"n": optimizer}, images=8, updates=2)


def test_round_trip_is_exact(tmp_path):
    before, after = make_state(0), make_state(1)
    save(before, tmp_path, {"recipe": "r"})
    restore(after, *newest(tmp_path))
    for kind in ("networks", "averages"):
        a, b = (getattr(s, kind)["n"].state_dict() for s in (before, after))
        assert all(torch.equal(a[key], b[key]) for key in a)
    a, b = (s.optimizers["n"].state_dict()["state"] for s in (before, after))
    assert all(torch.equal(a[i][key], b[i][key]) for i in a for key in a[i])
    assert (after.images, after.updates) == (8, 2)


def test_a_checkpoint_is_of_the_moment_when_it_was_begun(tmp_path, monkeypatch):
    """Training goes on while it is written."""
    state, goes_on, write = make_state(0), threading.Event(), checkpoint_writer.write_tensors
    expected = {name: tensor.clone() for name, tensor in state.networks["n"].state_dict().items()}
    monkeypatch.setattr(
        checkpoint_writer, "write_tensors", lambda *given: (goes_on.wait(60), write(*given))[1]
    )
    writer = Writer(tmp_path, Processes(torch.device("cpu")))
    writer.start(state, {})
    with torch.no_grad():
        for tensor in state.networks["n"].state_dict().values():
            tensor.zero_()
    goes_on.set()
    found = read_averages(writer.wait(), "n", raw=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path):
    state = make_state()
    old = save(state, tmp_path, {})
    state.images = 16
    new = save(state, tmp_path, {})
    file = new / "networks.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # one bit on the disk
    file.write_bytes(content)
    with pytest.warns(DamagedCheckpointWarning, match=r"000000000016 is damaged: networks.safetensors has"):
        path, description = newest(tmp_path)
    assert path == old
    assert description["images"] == 8
    (old / "state.json").write_text("{")
    with (
        pytest.warns(DamagedCheckpointWarning),
        pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged\. .* remove that folder"),
    ):
        newest(tmp_path)


def test_a_checkpoint_that_a_run_removes_meanwhile_is_not_damaged(tmp_path, monkeypatch):
    """An export of a run that is being trained warned of damage, and could say that all were damaged."""
    state, checks = make_state(), checkpoint._damage
    for state.images in (8, 16):
        old = save(state, tmp_path, {})

    def damage(path, description):
        if path == old:
            for state.images in (24, 32):
                save(state, tmp_path, {})
        return checks(path, description)

    monkeypatch.setattr(checkpoint, "_damage", damage)
    assert newest(tmp_path)[1]["images"] == 32
    for read in (lambda: read_averages(old, "n"), lambda: read_verified(old)):
        with pytest.raises(
            CheckpointError, match=r"000000000016 was removed while it was read: its run is still"
        ):
            read()


@pytest.mark.parametrize("change", [{"images": 8}, {"updates": -5}, {"files": {}}, {"sha256": ""}])
def test_a_description_that_has_changed_is_damage_too(change, tmp_path):
    """Another count of images would repeat or leave out a part of the run without a word."""
    state = make_state()
    save(state, tmp_path, {})
    state.images = 16
    path = save(state, tmp_path, {}) / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.warns(DamagedCheckpointWarning, match="state.json has changed since it was written"):
        assert newest(tmp_path)[1]["images"] == 8
    path.write_text("[" * 100_000)
    with pytest.warns(DamagedCheckpointWarning):
        assert newest(tmp_path)[1]["images"] == 8


def test_of_two_that_are_kept_none_was_found_damaged(tmp_path):
    """Else damage to the next one would leave nothing to go on from."""
    state = make_state()
    for state.images in (8, 16):
        save(state, tmp_path, {})
    writer = Writer(tmp_path, Processes(torch.device("cpu")), resumed_at=8)  # 16 is damaged
    kept = []
    for state.images in (24, 32):
        writer.start(state, {})
        writer.wait()
        kept.append(sorted(int(path.name) for path in tmp_path.iterdir()))
    assert kept == [[8, 24], [24, 32]]


def test_a_checkpoint_cut_short_by_a_kill_is_not_seen(tmp_path):
    state = make_state()
    save(state, tmp_path, {})
    (tmp_path / ".000000000099.partial").mkdir()
    assert newest(tmp_path)[1]["images"] == 8


def test_what_was_found_damaged_makes_room(tmp_path):
    """Two whole ones are kept, not a whole one and a damaged one."""
    state = make_state()
    for state.images in (8, 16):
        save(state, tmp_path, {})
    (tmp_path / "000000000016" / "networks.safetensors").write_bytes(b"")
    state.images = 12
    save(state, tmp_path, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000000000008", "000000000012"]


def test_two_are_kept(tmp_path):
    state = make_state()
    for state.images in (8, 16, 24):
        save(state, tmp_path, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000000000016", "000000000024"]


def test_a_full_disk_leaves_the_older_checkpoint_whole(tmp_path):
    """A limit on the size of files stands for the full disk: writing fails half-way, as it would there."""
    state = make_state(width=64)
    save(state, tmp_path, {})
    state.images = 16
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(
            CheckpointError, match=r"cannot be written: .*\. Older checkpoints are not affected\. Free some"
        ):
            save(state, tmp_path, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["000000000008"]
    assert newest(tmp_path)[1]["images"] == 8


def test_a_newer_format_is_refused_with_upgrade(tmp_path):
    path = save(make_state(), tmp_path, {})
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "format": 3}))
    with pytest.raises(CheckpointError, match=r"format 3\. .* up to 2\..*pip install --upgrade wuerstchen"):
        newest(tmp_path)


@pytest.mark.parametrize(("error", "words"), [(KeyError(), "KeyError"), (ValueError("a\nb"), "a")])
def test_an_error_without_a_text_is_named_by_its_type(error, words, tmp_path):
    refused = pytest.raises(CheckpointError, match=rf"incompatible with this recipe: {words}\. .*remove")
    with refused, checkpoint._Reading(None).named(tmp_path):
        raise error


def test_an_absurd_header_is_not_read(tmp_path, monkeypatch):
    save(make_state(), tmp_path, {})
    found = newest(tmp_path)
    monkeypatch.setattr(files, "MAX_HEADER", 100)
    with pytest.raises(CheckpointError, match=r"is not a complete safetensors file: its header has"):
        restore(make_state(), *found)


def test_a_checkpoint_of_other_networks_is_refused(tmp_path):
    save(make_state(), tmp_path, {})
    with pytest.raises(CheckpointError, match="incompatible with this recipe"):
        restore(make_state(width=5), *newest(tmp_path))

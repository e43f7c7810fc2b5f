"""Several processes that share the weights, what they write, and what ends them."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from wuerstchen.errors import CheckpointError
from wuerstchen.train.engine.checkpoint import newest, read_averages, restore, with_checksum

from .test_update import PriorStage, make_step


def run_script(folder: Path, *which: str) -> dict:
    script = Path(__file__).with_name("sharded_runs.py")
    paths = [str(script.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]  # for conftest
    done = subprocess.run(
        [sys.executable, "-W", "error", script, folder, *which],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {**json.loads(done.stdout), "folder": folder}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_script(tmp_path_factory.mktemp("sharded"))


def test_sharded_updates_are_those_of_one_process(found):
    """In one part and in two, with blocks computed again: losses, norms, weights, averages, moments."""
    assert isinstance(found["updates"], list), found["updates"]
    for of_process in found["updates"]:
        for result in of_process:
            assert result["values"] < 1e-4
            assert result["state"] < 2e-6
            assert 0.4 < result["share"] < 0.6
            assert result["copy"]


def test_weights_in_bf16_are_rounded_alike_by_all_processes(found):
    """Random numbers of each process would let their weights drift apart."""
    alone, two = found["memory"]
    assert isinstance(two[0], list), two
    for number, (loss, norm, _) in enumerate(alone[0]):
        of_two = [result[number] for result in two]
        assert len({digest for *_, digest in of_two}) == 1
        assert of_two[0][0] == pytest.approx(loss, rel=0.02)
        assert of_two[0][1] == pytest.approx(norm, rel=0.05)


def test_averages_in_host_memory_are_not_sent(found):
    assert found["host_averages"] == [[True, 0]] * 2


def test_a_checkpoint_of_two_is_read_by_one_two_and_four(found):
    written, *read = found["checkpoints"]
    assert written == [True, True]
    assert read == [[0.0], [0.0] * 2, [0.0] * 4]


def test_processes_divide_what_they_read_of_a_checkpoint(found):
    """Each of 512 read and waited for all of it."""
    assert isinstance(found["divided"], list), found["divided"]
    alone, two, four, refused = found["divided"]
    for results in (alone, two, four):
        assert {(digest, images, same) for *_, digest, images, same in results} == {(alone[0][2], 8, True)}
        for number in (0, 1):
            shares = [result[number] for result in results]
            together = sorted(name for share in shares for name in share)
            assert all(shares) or (number == 1 and len(results) > 3)  # there are three files
            if number == 1:
                assert together == ["averages.safetensors", "networks.safetensors", "optimizers.safetensors"]
            elif len(results) > 1:
                # Each tensor once in restoring; the averages once more for the next stage.
                assert len(together) == len(alone[0][0]) + len(set(alone[0][0]) & AVERAGES)
    assert "incompatible with this recipe: a disk has gone. " in refused[1]
    assert refused[0].startswith("another process cannot read checkpoint")


def test_processes_divide_what_they_look_at_and_wait_for_each_other(found):
    """Each of 512 read all shards that were newer than their set, and half an hour later all had lost the
    first, which looked for colour profiles alone."""
    assert isinstance(found["surveys"], list), found["surveys"]
    first, second = found["surveys"]
    assert sorted(first[0][:2]) == ["images/0.arrow", "images/2.arrow"]
    assert sorted(second[0][:2]) == ["images/1.arrow", "texts/0.arrow"]
    assert first[0][2:] == ["0 of 2"]
    assert second[0][2:] == ["images/1.arrow", "1 of 2"]
    for _, said in (first, second):
        assert "1.arrow' is damaged: it has changed since it was written" in said[0]
        assert "image '0.png' has one" in said[1]


AVERAGES = {
    f"model/{key}"
    for key in (
        *("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"),
        *("1.num_batches_tracked", "3.weight", "3.bias"),
    )
}


def test_a_process_without_memory_for_a_preview_leaves_no_other_waiting(found):
    assert found["lack"] == [["CUDA out of memory", 2.0], ["", 2.0]]


def test_damage_that_one_process_sees_is_damage_to_all(found):
    assert isinstance(found["damaged"], list), found["damaged"]
    ((first, said), (second, silent)), lost, nothing = found["damaged"]
    assert (first, second) == (4, 4)
    assert len(said) == 1
    assert "000000000008 is damaged: networks.safetensors has changed since it was written" in said[0]
    assert not silent
    for process in lost:
        assert "CheckpointError: every checkpoint in" in process
    assert nothing == [None, None]


def test_every_file_of_a_checkpoint_is_safetensors_or_json(found):
    path = found["folder"] / "checkpoints" / "000000000016"
    state = json.loads((path / "state.json").read_text())
    names = {
        f"{group}.{rank}-of-2.safetensors"
        for group in ("networks", "averages", "optimizers")
        for rank in (0, 1)
    }
    assert {file.name for file in path.iterdir()} == {*names, "state.json"}
    assert state["files"].keys() == names
    for name in names:
        assert hashlib.sha256((path / name).read_bytes()).hexdigest() == state["files"][name]
        with safe_open(path / name, framework="pt") as file:
            assert file.keys()
    rows = [state["rows"][f"networks.{rank}-of-2.safetensors"]["prior/projection.weight"] for rank in (0, 1)]
    assert rows == [0, 8]
    assert state["shapes"]["networks/prior/projection.weight"] == [16, 4, 1, 1]


class Planted:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def test_no_pickle_in_a_checkpoint_is_ever_run(found, tmp_path):
    path = tmp_path / "000000000016"
    shutil.copytree(found["folder"] / "checkpoints" / path.name, path)
    for name in (".metadata", "state.pkl", "networks.pt", "networks.2-of-2.safetensors", "2.json"):
        (path / name).write_bytes(pickle.dumps(Planted()))
    step = make_step(PriorStage())
    restore(step.state, *newest(tmp_path))  # what no list names is not opened
    assert read_averages(path, "prior").keys() == step.state.networks["prior"].state_dict().keys()

    # One under the name of a file of tensors, and in the list with the right digest.
    name = "averages.1-of-2.safetensors"
    (path / name).write_bytes(pickle.dumps(Planted()))
    state = json.loads((path / "state.json").read_text())
    state["files"][name] = hashlib.sha256((path / name).read_bytes()).hexdigest()
    (path / "state.json").write_text(json.dumps(with_checksum(state)))
    found = newest(tmp_path)
    for reads in (lambda: restore(step.state, *found), lambda: read_averages(path, "prior")):
        with pytest.raises(CheckpointError, match=r"averages.1-of-2.safetensors is not a complete"):
            reads()
    # And a list that names files elsewhere.
    state["files"]["../../elsewhere.safetensors"] = ""
    (path / "state.json").write_text(json.dumps(with_checksum(state)))
    with pytest.warns(UserWarning, match="the name of a safetensors file"), pytest.raises(CheckpointError):
        newest(tmp_path)


def test_a_process_without_disk_stops_all_in_one_line(found):
    (others, files), (own, _) = found["full_disk"]
    assert "another process could not write its part of checkpoint" in others
    assert own.startswith("checkpoint ")
    assert "cannot be written" in own
    assert own.endswith("Free some disk space and start the same command again.")
    assert files == ["000000000016"]


def test_a_loss_of_one_process_that_is_not_finite_stops_all_before_the_update(found):
    first, second = found["not_finite"]
    assert first == second
    assert first[0].startswith("the loss of model is nan at image 40 of stage A. The weights were not")
    assert first[1]


def test_a_signal_to_one_process_leaves_a_checkpoint_and_a_clean_end_of_all(found):
    assert found["stopped"] == [["stopped at image 44 of 120 of stage A"] * 2, 44]


def test_a_killed_process_ends_the_others(found):
    said, seconds, images = found["dead"]
    assert "Traceback" in said
    assert seconds < 60
    assert images in (32, 36, 40)


def check_kills(result: dict, kills: int) -> None:
    """Bit for bit the unbroken run, and a kill costs what was not yet whole: at most the update whose
    checkpoint was being written, and the one that was computed meanwhile."""
    assert isinstance(result, dict), result
    assert result["same"]
    assert result["starts"] == kills + 1
    assert 60 <= result["updates"] <= 60 + 2 * kills


def test_three_kills_change_nothing(found):
    """One of them in the middle of a checkpoint."""
    check_kills(found["kills"], 3)


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path):
    check_kills(run_script(tmp_path, "slow")["twenty_kills"], 20)

"""A process that has died ends the others soon, and one that only works alone for long does not."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

COUNT = 3


def run(what, which):
    """Exit codes, standard outputs and errors of all processes but one that was stopped; and the seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": str(COUNT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world |= {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, Path(__file__).with_name("alive_runs.py"), what, str(which)]
    processes = [
        subprocess.Popen(
            command, env=os.environ | world | {"RANK": str(rank)}, stdout=-1, stderr=-1, text=True
        )
        for rank in range(COUNT)
    ]
    try:
        assert processes[which].stdout.readline() == "met\n"
        began = time.monotonic()
        others = [process for rank, process in enumerate(processes) if what == "works" or rank != which]
        said = [process.communicate(timeout=60) for process in others]
        return [process.returncode for process in others], said, time.monotonic() - began
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("stopped", [0, 2])  # the first has the store
def test_a_process_that_no_longer_answers_ends_the_others(stopped):
    """They waited for it for half an hour."""
    codes, said, seconds = run("stops", stopped)
    assert codes == [2, 2]
    assert seconds < 20
    # Whichever ends first, the other may lose its connection to that one.
    last = [errors.splitlines()[-1] for _, errors in said]
    assert any(line.startswith(f"Error: process {stopped} of 3 has not answered for 2 s") for line in last)
    assert all("has not answered" in line or "has lost the others" in line for line in last), last


def test_one_that_works_alone_is_waited_for():
    codes, said, _ = run("works", 0)
    assert codes == [0, 0, 0]
    assert all(output.endswith("end\n") and not errors for output, errors in said)

"""A process that has died ends the others soon, and one that only works alone for long does not."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

COUNT = 3


def run(which: int, hasty: int) -> tuple[list[int], list[tuple[str, str]], float]:
    """Exit codes, standard outputs and errors of all processes but the one that stops, and the seconds that
    they took to end.

    The ``hasty`` one waits half as long as the others.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": str(COUNT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world |= {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, Path(__file__).with_name("heartbeat_runs.py"), str(which), str(hasty)]
    processes = [
        subprocess.Popen(
            command, env=os.environ | world | {"RANK": str(rank)}, stdout=-1, stderr=-1, text=True
        )
        for rank in range(COUNT)
    ]
    try:
        assert processes[which].stdout.readline() == "met\n"
        assert processes[which].stdout.readline() == "met again\n"
        began = time.monotonic()
        others = [process for rank, process in enumerate(processes) if rank != which]
        said = [process.communicate(timeout=60) for process in others]
        return [process.returncode for process in others], said, time.monotonic() - began
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    ("stopped", "hasty"),
    [  # the first has the store
        (0, 1),
        (2, 0),
        (2, 1),
    ],
)
@pytest.mark.slow
def test_a_process_that_works_alone_is_waited_for_and_one_that_no_longer_answers_ends_the_others(
    stopped, hasty
):
    """The others waited for a dead process for half an hour."""
    codes, said, seconds = run(stopped, hasty)
    assert codes == [2, 2]
    assert all(output == "met\nmet again\n" for output, _ in said)
    assert seconds < 20
    ranks = [rank for rank in range(COUNT) if rank != stopped]
    last = {rank: errors.splitlines()[-1] for rank, (_, errors) in zip(ranks, said, strict=True)}
    assert last.pop(hasty).startswith(f"Error: process {stopped} of 3 has sent no heartbeat for 2 seconds")
    # The other may talk with the hasty one just then, and loses its connection.
    (other,) = last.values()
    assert "has sent no heartbeat for" in other or "lost its connection to the others" in other

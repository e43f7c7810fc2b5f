"""``wuerstchen serve`` in a process of its own, from its first line to its exit code."""

import os
import re
import signal
import subprocess
import sys
import time

import httpx
import pytest

from wuerstchen.cli import main


@pytest.fixture
def command(tmp_path):
    """Starts ``wuerstchen serve``. Returns the process and its address."""
    started = []

    def start(*options, cwd=tmp_path):
        process = subprocess.Popen(
            [sys.executable, "-m", "wuerstchen", "serve", "--port", "0", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
        )
        started.append(process)
        line = process.stdout.readline()
        return process, line.removeprefix("serving on ").strip()

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_lets_running_jobs_finish(command, number):
    """Bugs: a truncated image, an orphaned worker, a traceback, or an exit code that makes a supervisor
    restart the service."""
    process, url = command()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url)
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
        job = client.post("/v1/jobs", json={"prompts": ["a cat"], "prior_steps": 40}).json()
        workers = children(process.pid)
        assert workers
        with client.stream("GET", f"/v1/jobs/{job['id']}/events") as answer:
            names = []
            for line in answer.iter_lines():
                names += [line[7:]] if line.startswith("event: ") else []
                if line == "event: progress" and names.count("progress") == 1:
                    process.send_signal(number)
    assert names[-2:] == ["image", "done"]
    assert process.wait(15) == 0
    errors = process.stderr.read()
    assert "Traceback" not in errors
    deadline = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{pid}") for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_service_leaves_no_worker_behind(command):
    process, _ = command()
    workers = children(process.pid)
    assert workers
    process.kill()
    deadline = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{pid}") for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children(pid):
    """The child processes of a process. Needs /proc."""
    path = f"/proc/{pid}/task/{pid}/children"
    if not os.path.exists(path):
        pytest.skip("this system does not tell a process's children")
    with open(path) as file:
        return [int(child) for child in file.read().split()]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "host 0.0.0.0 requires tokens"),
        (["--token-file", "nowhere"], "token file nowhere cannot be read"),
        (["--port", "99999"], "0 to 65535, got 99999"),
        (["--filter", "nothing:here"], "filter 'nothing:here' cannot be used"),
        (["--filter", "json:dumps"], "filter 'json:dumps' cannot be used"),
        (["--results-dir", "file/inside"], "cannot be written"),
        (["--model", "nowhere"], "'nowhere' does not exist"),
        (["--prior", "nowhere"], "is a native model, which contains all networks. Do not pass prior"),
        (["--compressor", "nowhere"], "has a compressor, which its Stage B was trained with"),
        (["--device", "toaster"], "device 'toaster' is not available"),
        (["--max-batch", "0"], "max_batch must be above 0, got 0"),
        (["--lora-dir", "file"], "--lora-dir file is not a folder"),
        (["--lora", "nowhere.safetensors"], "nowhere.safetensors does not exist"),
        (["--lora", "file:strong"], "'file:strong' does not end in a number"),
    ],
)
def test_a_bad_option_gets_a_one_line_error(options, words, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    code = main(["serve", "--port", "0", *options])
    _, errors = capfd.readouterr()
    assert code == 2
    assert words in errors
    lines = [line for line in errors.splitlines() if not re.match(r"\d{4}-", line)]
    assert len(lines) == 1, errors


def test_a_port_in_use_gets_a_one_line_error(capsys):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["serve", "--port", str(taken.getsockname()[1])]) == 2
    assert "is not available" in capsys.readouterr().err


def test_a_missing_extra_gets_a_one_line_error():
    code = (
        "import sys; sys.modules['uvicorn'] = None\n"
        "from wuerstchen.cli import main; sys.exit(main(['serve']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert 'pip install "wuerstchen[serve]"' in done.stderr


def test_the_service_itself_loads_no_torch():
    """Only the worker needs torch. In the service it would cost seconds at the start and half a GiB."""
    code = "import wuerstchen.serve.server, sys; print({'torch', 'numpy'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

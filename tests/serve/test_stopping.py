"""A signal ends the service within its grace time, even if something hangs."""

import base64
import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from PIL import Image

from wuerstchen.serve.stopping import closing_seconds, threads_hang

SCRIPT = """
import sys
import fake_worker
from wuerstchen.serve import worker
worker.main = fake_worker.main  # before the service is imported, which has it as a default
from wuerstchen.serve.limits import ServeConfig
from wuerstchen.serve.server import run

if __name__ == "__main__":
    settings = {"filter": "rules:check"} if "filter" in sys.argv else {}
    config = ServeConfig(port=0, grace=4.0, upload_timeout=1000.0, **settings)
    run(config, lambda text: print(text, flush=True))
"""
RULES = """
import time
from pathlib import Path

def check(prompt, image):
    if prompt == "hang":
        Path("hangs").touch()
        time.sleep(1000)
"""


@pytest.fixture
def service(tmp_path):
    """Starts a service with a stand-in for its worker, in a process. Returns the process and its address."""
    (tmp_path / "rules.py").write_text(RULES)
    (tmp_path / "script.py").write_text(SCRIPT)
    started = []

    def start(*arguments):
        paths = [str(Path(__file__).parent), *sys.path]
        process = subprocess.Popen(
            [sys.executable, "script.py", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )
        started.append(process)
        line = process.stdout.readline()
        assert line.startswith("serving on "), process.stderr.read()
        return process, line.removeprefix("serving on ").strip()

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def send(url, path, body, timeout=60):
    """Posts in a thread and ignores the answer."""

    def post():
        with contextlib.suppress(httpx.HTTPError):
            httpx.post(url + path, json=body, timeout=timeout, trust_env=False)

    thread = threading.Thread(target=post, daemon=True)
    thread.start()
    return thread


def slow_image():
    Image.new("RGB", (2000, 2000), (200, 100, 50)).save(buffer := io.BytesIO(), "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data.rindex(b"\xff\xda")
    return base64.b64encode(data[:-2] + data[last:-2] * 5000 + data[-2:]).decode()


def children(pid):
    """The worker and decoder processes of a service. Needs /proc."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    if not path.exists():
        pytest.skip("this system does not tell a process's children")
    found = []
    for child in path.read_text().split():
        with contextlib.suppress(OSError):  # it has ended
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return found


def test_a_signal_ends_a_busy_service(service):
    """With two slow uploads, a stopped worker and a client that reads nothing, SIGTERM had no effect."""
    process, url = service()
    workers = children(process.pid)
    uploads = [send(url, "/v1/jobs", {"kind": "reconstruct", "image": slow_image()}) for _ in range(2)]
    job = httpx.post(url + "/v1/jobs", json={"prompts": ["hang"]}, trust_env=False).json()
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as deaf:
        deaf.sendall(f"GET /v1/jobs/{job['id']}/events HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
        deadline = time.monotonic() + 30
        while len(children(process.pid)) == len(workers):  # until there is a decoder
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        processes = children(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    errors = process.stderr.read()
    assert "Traceback" not in errors
    assert "by force" not in errors
    for thread in uploads:
        thread.join(30)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in processes)


@pytest.mark.parametrize("signals", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_hanging_filter_does_not_prevent_the_exit(service, signals, tmp_path):
    process, url = service("filter")
    send(url, "/v1/jobs", {"prompts": ["hang"]})
    while not (tmp_path / "hangs").exists():
        time.sleep(0.05)
    workers = children(process.pid)
    for _ in range(signals):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    assert process.wait(30) == 1
    errors = process.stderr.read()
    assert "did not stop within its grace time and is killed" in errors
    assert "Traceback" not in errors
    assert not any(os.path.exists(f"/proc/{pid}") for pid in workers)


def test_closing_is_part_of_the_grace_time():
    assert [closing_seconds(grace) for grace in (30.0, 4.0, 0.4)] == [3.0, 1.0, 0.1]


def test_hanging_threads_are_detected():
    event = threading.Event()
    for seconds, hangs in ((0.05, False), (30, True)):
        thread = threading.Thread(target=event.wait, args=(seconds,), name="named here_7")
        thread.start()
        assert threads_hang(("named here",), 10.0 if not hangs else 0.1) == hangs
    event.set()
    thread.join()
    assert not threads_hang(("named here",))

"""Running the service: cleaning up after a failed start."""

import asyncio
import multiprocessing
import signal
from pathlib import Path

import pytest

from wuerstchen.serve import server
from wuerstchen.serve.limits import ServeConfig
from wuerstchen.serve.process import WorkerProcess
from wuerstchen.serve.service import Service
from wuerstchen.serve.stopping import Deadline


def test_a_failed_start_leaves_no_worker_and_no_signal_handler(monkeypatch, tmp_path):
    """The first worker kept running, and Ctrl-C stopped working."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))  # the worker process inherits this path
    import fake_worker

    start = WorkerProcess.start

    def first_only(worker, *arguments):
        if worker.device == "two":
            raise ZeroDivisionError
        start(worker, *arguments)

    monkeypatch.setattr(WorkerProcess, "start", first_only)
    others = set(multiprocessing.active_children())
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    config = ServeConfig(port=0, results_dir=tmp_path, devices=("one", "two"))

    async def run():
        service = Service(config, fake_worker.main)
        deadline = Deadline(service.kill)
        with server.listen(config.host, 0) as listening:
            await server._run(service, listening, print, deadline)

    try:
        with pytest.raises(ZeroDivisionError):
            asyncio.run(run())
        after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        assert after == before
        assert set(multiprocessing.active_children()) <= others
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)
        for child in set(multiprocessing.active_children()) - others:
            child.kill()

"""A worker process and the threads that communicate with it."""

import multiprocessing
import threading
from pathlib import Path

import pytest

from wuerstchen.serve.process import WorkerProcess


def test_no_process_is_left_if_its_thread_cannot_start(monkeypatch):
    """At the system's thread limit, a process without a listener was left, and an unstarted thread was
    joined."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))  # the process inherits this path
    import fake_decoder

    start = threading.Thread.start

    def no_listener(thread):
        if thread.name.startswith("from "):
            raise RuntimeError("can't start new thread")
        start(thread)

    before = set(multiprocessing.active_children())
    worker = WorkerProcess("x", None)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_listener)
        with pytest.raises(OSError, match="no thread can be started"):
            worker.start(fake_decoder.main, 0, lambda process_number, message: None)
    assert worker.process is None
    assert set(multiprocessing.active_children()) <= before
    worker.end()

    heard = threading.Event()
    worker.start(fake_decoder.main, 0, lambda process_number, message: heard.set())
    assert heard.wait(60)
    worker.end()
    assert set(multiprocessing.active_children()) <= before

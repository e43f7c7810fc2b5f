"""A worker's process and the threads that talk to it."""

import multiprocessing
import threading
from pathlib import Path

import pytest

from wuerstchen.serve.process import WorkerProcess


def test_without_a_thread_to_listen_no_process_is_left(monkeypatch):
    """At the system's limit of threads: a process that nobody listened to, and a thread that was joined
    though it had not begun."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))  # the process is handed this path
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
            worker.start(fake_decoder.main, 0, lambda life, message: None)
    assert worker.process is None
    assert set(multiprocessing.active_children()) <= before
    worker.end()

    heard = threading.Event()
    worker.start(fake_decoder.main, 0, lambda life, message: heard.set())
    assert heard.wait(60)
    worker.end()
    assert set(multiprocessing.active_children()) <= before

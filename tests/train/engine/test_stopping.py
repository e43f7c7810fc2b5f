"""A run that waits for data stops when it is asked to."""

import os
import signal
import time

import pytest

from wuerstchen.train.engine import stopping
from wuerstchen.train.engine.checkpoint import newest
from wuerstchen.train.engine.loop import Interrupted
from wuerstchen.train.engine.stopping import StoppedWaiting, StopRequest

from .test_loop import digests, run


def hanging(source, item: int, number: int):
    """The source with one image that never comes; whoever asks for it asks the main process to stop."""
    reads, main = source.image, os.getpid()

    def image(wanted, rng, size):
        if wanted == item:
            os.kill(main, number)
            time.sleep(60)
        return reads(wanted, rng, size)

    source.image = image
    return source


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_wait_for_data_with_a_checkpoint(
    workers, number, tmp_path, toy_stage, toy_source, settings
):
    """The loop looked for signals only after an update, which never came."""
    began = time.monotonic()
    with pytest.raises(Interrupted, match=r"stopped at image \d+ of 120 of stage A"):
        run(tmp_path / "broken", toy_stage(), hanging(toy_source(), 3, number), settings, workers=workers)
    assert time.monotonic() - began < 40
    found = newest(tmp_path / "broken" / "checkpoints")
    assert found is None or found[1]["images"] % 4 == 0
    broken, log = run(tmp_path / "broken", toy_stage(), toy_source(), settings)
    assert [e["images"] for e in log.events() if e["event"] == "stopped"] == [
        found[1]["images"] if found else 0
    ]
    whole, _ = run(tmp_path / "whole", toy_stage(), toy_source(), settings)
    assert digests(broken) == digests(whole)


def test_where_others_wait_for_this_process_data_has_some_time_to_come(monkeypatch):
    """An update that all are in the middle of ends first, if it can."""
    monkeypatch.setattr(stopping, "GRACE", 0.5)
    stop = StopRequest(2)
    with stop.caught():
        with stop.waiting():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        assert stop.requested
        began = time.monotonic()
        with pytest.raises(StoppedWaiting), stop.waiting():
            time.sleep(60)
        assert time.monotonic() - began < 30


def test_outside_of_a_wait_nothing_is_raised():
    before = signal.getsignal(signal.SIGTERM)
    stop = StopRequest(1)
    with stop.caught():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert stop.requested
        with pytest.raises(StoppedWaiting), stop.waiting():
            pass
    assert signal.getsignal(signal.SIGTERM) is before

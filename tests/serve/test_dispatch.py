"""Batches and workers, with a stand-in for the worker process: sharing, crashes, hangs and restarts."""

import io
import multiprocessing
import os
import signal
import time

import pytest
from PIL import Image

from wuerstchen.serve import dispatch


def test_cancelling_one_job_of_a_batch_keeps_the_others(serve):
    running = serve()
    first = running.draw(prompts=["slowly"], prior_steps=3)
    shared = [running.draw(prompts=["a cat"], count=2) for _ in range(3)]
    running.http.delete(f"/v1/jobs/{shared[1]['id']}")
    while running.http.get(f"/v1/jobs/{shared[0]['id']}").json()["state"] == "queued":
        time.sleep(0.01)
    running.http.delete(f"/v1/jobs/{shared[2]['id']}")
    assert running.wait(first)["state"] == "done"
    assert running.wait(shared[0])["state"] == "done"
    assert running.wait(shared[2])["state"] in ("cancelled", "done")
    assert running.wait(shared[1])["images"] == []


def test_waiting_images_are_batched(serve):
    """Batches of one image would cost most of the throughput. A batch must not mix sizes."""
    running = serve(max_batch=4)
    running.draw(prompts=["slowly"], prior_steps=3, seed=0)
    jobs = [running.draw(seed=k, width=64 + 64 * (k % 2), height=64) for k in range(6)]
    shown = [running.wait(job)["images"][0] for job in jobs]
    drawn = [image_of(running, image) for image in shown]
    # The stand-in puts the batch size into the green channel.
    assert [image.size for image in drawn] == [(64, 64), (128, 64)] * 3
    assert [image.getpixel((0, 0))[1] for image in drawn[::2]] == [3, 3, 3]
    # Images with twice as many pixels get batches of half the size.
    assert [image.getpixel((0, 0))[1] for image in drawn[1::2]] == [2, 2, 1]
    assert [image.getpixel((0, 0))[0] for image in drawn] == list(range(6))


def image_of(running, image):
    with Image.open(io.BytesIO(running.http.get(image["url"]).content)) as opened:
        opened.load()
        return opened


def test_a_killed_worker_is_restarted_and_only_its_own_jobs_fail(serve):
    running = serve(max_batch=1)
    victim = running.draw(prompts=["slowly"], prior_steps=50)
    others = [running.draw() for _ in range(5)]
    events = running.events(victim)
    while next(events)[0] != "progress":
        pass
    pid = running.call(lambda: running.service.dispatcher.workers[0].process.pid)
    began = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    name, data = list(events)[-1]
    assert name == "failed"
    assert "ended unexpectedly" in data["message"]
    assert [running.wait(job)["state"] for job in others] == ["done"] * 5
    assert time.monotonic() - began < 30
    assert 'wuerstchen_worker_restarts_total{device="default"} 1.0' in running.http.get("/metrics").text


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="processes cannot be stopped here")
def test_a_stopped_worker_is_not_ready_and_is_replaced(serve, monkeypatch):
    """With a stopped worker, the service reported ready for up to 630 s and took jobs that could not run."""
    monkeypatch.setattr(dispatch, "SILENT_SECONDS", 1.0)
    monkeypatch.setattr(dispatch, "DEAD_SECONDS", 4.0)
    running = serve(max_batch=1)
    job = running.draw(prompts=["slowly"], prior_steps=100)
    events = running.events(job)
    while next(events)[0] != "progress":
        pass
    os.kill(running.call(lambda: running.service.dispatcher.workers[0].process.pid), signal.SIGSTOP)
    status = []
    deadline = time.monotonic() + 40
    while status[-2:] != [503, 200]:  # first not ready, then ready again
        assert time.monotonic() < deadline, status
        now = running.http.get("/readyz").status_code
        status += [now] if status[-1:] != [now] else []
        time.sleep(0.02)
    assert "sent no heartbeat and is being restarted" in running.wait(job)["error"]
    assert running.wait(running.draw())["state"] == "done"


@pytest.mark.slow
def test_a_suspended_service_does_not_kill_its_workers(serve, monkeypatch):
    """After a laptop wakes from sleep, the last heartbeat of every worker is hours old."""
    monkeypatch.setattr(dispatch, "SILENT_SECONDS", 0.6)
    monkeypatch.setattr(dispatch, "DEAD_SECONDS", 0.8)
    running = serve()
    for _ in range(3):
        running.call(lambda: time.sleep(1.5))
        time.sleep(0.3)
    assert running.wait(running.draw())["state"] == "done"
    assert "wuerstchen_worker_restarts_total{" not in running.http.get("/metrics").text


def test_a_worker_that_cannot_be_started_is_started_later(serve, monkeypatch):
    """If a process could not be started once, for lack of descriptors or memory, the worker never came
    back."""
    running = serve()

    start, refused = multiprocessing.context.SpawnProcess.start, []

    def no_room_once(process):
        if not refused:
            refused.append(process)
            raise OSError(24, "Too many open files")
        start(process)

    monkeypatch.setattr(dispatch, "RELAUNCH_SECONDS", 0.2)
    monkeypatch.setattr(multiprocessing.context.SpawnProcess, "start", no_room_once)
    running.call(lambda: running.service.dispatcher.workers[0].process.kill())
    deadline = time.monotonic() + 40
    while not refused or running.http.get("/readyz").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert running.wait(running.draw())["state"] == "done"


def test_a_job_that_crashes_its_worker_does_not_stop_the_service(serve):
    running = serve()
    for _ in range(3):
        assert running.wait(running.draw(prompts=["crash"]))["state"] == "failed"
    assert running.wait(running.draw())["state"] == "done"


def test_a_failed_job_gives_the_reason(serve):
    running = serve()
    job = running.wait(running.draw(prompts=["fail"]))
    assert (job["state"], job["error"]) == ("failed", "it does not fit into memory")
    assert running.wait(running.draw(prompts=["long"]))["notices"] == ["words are lost"]


def test_timeouts(serve, monkeypatch):
    """A batch that hangs, and a job that waits behind it, must both fail."""
    monkeypatch.setattr(dispatch, "STOPPING_SECONDS", 0.5)
    running = serve(run_timeout=1.0, queue_timeout=0.6, max_batch=1)
    hangs = running.draw(prompts=["hang"])
    waits = running.draw()
    assert "timed out: it waited 0.6 s" in running.wait(waits)["error"]
    assert "timed out: it ran for 1 s" in running.wait(hangs)["error"]
    deadline = time.monotonic() + 30
    while (job := running.wait(running.draw()))["state"] != "done":
        assert time.monotonic() < deadline, job


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nowhere", "does not exist"),
        ("dies at once", "exited three times"),
        ("stops", "exited three times"),
        ("loads for ever", "takes too long to load: over 2 s"),
    ],
)
def test_a_model_that_cannot_be_loaded_ends_the_start(serve, monkeypatch, model, message):
    """The service would wait forever for a model that does not exist."""
    if model == "stops":
        monkeypatch.setattr(dispatch, "DEAD_LOADING_SECONDS", 1.0)
    running = serve(model=model, load_timeout=2.0 if model == "loads for ever" else 100.0)
    assert message in running.call(lambda: running.service.failed)


def test_several_devices_run_in_parallel(serve):
    running = serve(devices=("one", "two"), max_batch=1)
    while running.call(lambda: sum(worker.ready for worker in running.service.dispatcher.workers)) < 2:
        time.sleep(0.01)
    jobs = [running.draw(prompts=["slowly"], prior_steps=100)["id"] for _ in range(2)]
    states = []
    while states != ["running"] * 2:
        states = [running.http.get(f"/v1/jobs/{job}").json()["state"] for job in jobs]
        assert set(states) <= {"queued", "running"}
        time.sleep(0.01)
    for job in jobs:
        running.http.delete(f"/v1/jobs/{job}")

"""The queue: limits, fairness and batches. And the events that a job keeps."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wuerstchen.serve.jobs import FairQueue, Job, QueueFull, Shape

SMALL = Shape(
    kind="generate",
    width=64,
    height=64,
    guidance=2.0,
    guidance_interval=(0.0, 1.0),
    prior_steps=6,
    prior_sampler="ddpm",
    decoder_steps=4,
    strength=None,
)
SHAPES = [SMALL, Shape(**{**vars(SMALL), "width": 128}), Shape(**{**vars(SMALL), "strength": 0.7})]


def job(client="a", images=1, shape=SMALL):
    return Job(client=client, shape=shape, prompts=["x"] * images, seeds=range(images))


requests = st.lists(
    st.tuples(st.sampled_from("abcde"), st.integers(1, 6), st.sampled_from(SHAPES)), min_size=1, max_size=25
)


@given(requests, st.integers(1, 8))
def test_every_image_is_taken_once_in_batches_of_one_shape(wanted, most):
    """Bugs: a lost or duplicate task, or a batch of mixed sizes."""
    queue = FairQueue(10_000, 10_000)
    jobs = [job(*request) for request in wanted]
    for one in jobs:
        queue.add(one)
    drawn = []
    while batch := queue.take(lambda _: most):
        assert len(batch) <= most
        assert len({task.job.shape for task in batch}) == 1
        drawn += [(task.job.id, task.index) for task in batch]
    assert sorted(drawn) == sorted((one.id, k) for one in jobs for k in range(one.total))
    assert len(queue) == 0


@given(requests, st.integers(1, 8))
def test_a_client_waits_for_no_more_batches_than_there_are_clients(wanted, most):
    """Bug: a client with many jobs, or with a common shape, starves the others."""
    queue = FairQueue(10_000, 10_000)
    for request in wanted:
        queue.add(job(*request))
    turns = dict.fromkeys((one.client for one in queue.jobs()), 0)
    clients = len(turns)
    while batch := queue.take(lambda _: most):
        served = {task.job.client for task in batch}
        waits = {one.client for one in queue.jobs()}
        for client in turns:
            turns[client] = 0 if client in served or client not in waits else turns[client] + 1
            assert turns[client] < clients


@given(requests)
def test_free_room_in_a_batch_is_divided_evenly(wanted):
    """Bug: one client gets two more images than another one that waits for the same shape."""
    queue = FairQueue(10_000, 10_000)
    for client, images, _ in wanted:
        queue.add(job(client, images))
    waited = {one.client: 0 for one in queue.jobs()}
    for one in queue.jobs():
        waited[one.client] += one.total
    batch = queue.take(lambda _: 8)
    got = {client: sum(p.job.client == client for p in batch) for client in waited}
    for one, other in itertools.permutations(waited, 2):
        assert got[one] <= got[other] + 1 or got[other] == waited[other]


@given(requests, st.integers(1, 40), st.integers(1, 4))
def test_the_queue_is_bounded(wanted, most, each):
    queue = FairQueue(most, each)
    open_jobs = dict.fromkeys("abcde", 0)
    for client, images, shape in wanted:
        full = open_jobs[client] >= each or len(queue) + images > most
        if full:
            with pytest.raises(QueueFull) as refused:
                queue.add(job(client, images, shape))
            assert refused.value.of_client == (open_jobs[client] >= each)
        else:
            queue.add(job(client, images, shape))
            open_jobs[client] += 1
        assert len(queue) <= most
    assert queue.open_jobs() == sum(open_jobs.values())


def test_a_job_counts_against_the_limit_until_it_ends():
    """Bugs: a client is locked out forever, or exceeds its limit while its jobs are running."""
    queue = FairQueue(10, 1)
    one = job()
    queue.add(one)
    queue.take(lambda _: 8)
    with pytest.raises(QueueFull, match="already have 1 open jobs"):
        queue.add(job())
    one.end("done", 1.0)
    queue.close(one)
    queue.add(job())
    assert queue.open_jobs() == 1


def test_a_cancelled_job_leaves_the_queue():
    queue = FairQueue(10, 10)
    one, other = job("a", 3), job("b", 1)
    queue.add(one)
    queue.add(other)
    one.end("cancelled", 1.0)
    queue.close(one)
    assert [task.job for task in queue.take(lambda _: 8)] == [other]
    assert queue.take(lambda _: 8) == []


def test_positions_follow_the_turns():
    queue = FairQueue(99, 99)
    jobs = [job("a"), job("a"), job("b"), job("a"), job("c")]
    for one in jobs:
        queue.add(one)
    places = queue.positions()
    assert [places[one] for one in jobs] == [1, 4, 2, 5, 3]


def test_a_long_job_keeps_few_events():
    """Bugs: memory grows with the number of steps, or a client misses an event that still matters."""
    one = job(images=2)
    one.emit("queued", {"position": 3})
    one.start()
    for step in range(1000):
        one.emit("progress", {"step": step})
        for index in range(2):
            one.emit("preview", {"index": index, "step": step})
    assert [event.name for event in one.events] == ["running", "progress", "preview", "preview"]
    assert one.events[-1].data == {"index": 1, "step": 999}
    seen = one.events[-1].number
    one.add_image(0, "/0")
    assert [event.name for event in one.events] == ["running", "progress", "preview", "image"]
    one.add_image(1, "/1")
    one.end("done", 1.0)
    assert [event.name for event in one.events] == ["running", "image", "image", "done"]
    assert [event.name for event in one.events_after(seen)] == ["image", "image", "done"]
    numbers = [event.number for event in one.events]
    assert numbers == sorted(set(numbers))
    one.end("failed", 2.0, "too late")
    assert (one.state, one.ended) == ("done", 1.0)

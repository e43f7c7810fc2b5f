"""The token buckets, with a fake clock."""

import math
import tracemalloc

import pytest

from wuerstchen.serve import rates
from wuerstchen.serve.limits import ServeConfig
from wuerstchen.serve.rates import RequestRate


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def allowed(rate, number, client="a"):
    """How many of ``number`` requests at once are allowed."""
    return sum(rate.take(client) == 0 for _ in range(number))


def test_a_burst_is_followed_by_the_rate(clock):
    rate = RequestRate(50.0, clock)
    assert rate.burst == 200
    assert allowed(rate, 1000) == 200
    clock.now += 1
    assert allowed(rate, 1000) == 50
    clock.now += 3
    assert allowed(rate, 1000) == 150
    clock.now += 1000
    assert allowed(rate, 1000) == 200  # no more than a burst after any pause


def test_a_client_within_the_rate_is_never_refused(clock):
    rate = RequestRate(50.0, clock)
    for _ in range(5000):
        assert rate.take("a") == 0
        clock.now += 1 / 50


def test_a_refusal_takes_no_token_and_returns_the_wait(clock):
    rate = RequestRate(0.1, clock)
    assert rate.burst == rates.MIN_BURST
    assert allowed(rate, rates.MIN_BURST) == rates.MIN_BURST
    assert [rate.take("a") for _ in range(100)] == pytest.approx([10.0] * 100)
    clock.now += 9
    wait = rate.take("a")
    assert wait == pytest.approx(1.0)
    clock.now += math.ceil(wait)
    assert rate.take("a") == 0
    assert rate.take("a") > 0


def test_each_client_has_its_own_bucket(clock):
    rate = RequestRate(1.0, clock)
    assert allowed(rate, 100, "a") == 30
    assert allowed(rate, 100, "b") == 30


def test_without_a_limit_nothing_is_counted(clock):
    rate = RequestRate(0.0, clock)
    assert allowed(rate, 10_000) == 10_000
    assert len(rate) == 0


def test_full_buckets_are_forgotten(clock):
    rate = RequestRate(50.0, clock)
    for number in range(1000):
        rate.take(f"client {number}")
    assert len(rate) == 1000
    clock.now += 1
    rate.take("a")
    assert len(rate) == 1


def test_memory_is_bounded_and_active_clients_are_remembered(clock):
    """Requests from any number of addresses must not fill the memory."""
    clients = 1000
    rate = RequestRate(50.0, clock, clients)
    assert allowed(rate, 1000, "floods") == 200
    tracemalloc.start()
    try:
        for number in range(3 * clients):
            rate.take(f"address 2001:db8:{number:x}::/64")
            if number % 100 == 0:
                assert rate.take("floods") > 0
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(rate) == clients
    assert used / clients * rates.MAX_CLIENTS < 16 * 2**20
    assert rate.take("floods") > 0


def test_the_limit_is_on_unless_it_is_turned_off():
    assert RequestRate(ServeConfig().max_requests_per_second).burst == 200

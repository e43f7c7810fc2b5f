"""The limits of connections, and which connections are closed."""

import contextlib
import socket
import time
from types import SimpleNamespace

import pytest

from wuerstchen.errors import UserError
from wuerstchen.serve import connections, server
from wuerstchen.serve.connections import Connection, allowed_connections, network_of

GET = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n"


@pytest.fixture
def connect():
    """Opens connections, and closes them at the end of the test."""
    with contextlib.ExitStack() as stack:

        def connect(running, source="127.0.0.1"):
            address = running.listening.getsockname()
            return stack.enter_context(
                socket.create_connection(address, timeout=20, source_address=(source, 0))
            )

        yield connect


def until(holds):
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_open(connection):
    """Whether the service answers on the connection."""
    try:
        connection.sendall(GET)
        answer = b""
        while not answer.endswith(b"}"):
            answer += (more := connection.recv(1000))
            if not more:
                return False
    except OSError:
        return False
    return answer.startswith(b"HTTP/1.1 200")


def room(running):
    return running.server.connections


def test_answers_are_sent_without_delay(serve):
    """Nagle's algorithm delayed every answer on a kept-alive connection from 1 ms to 44 ms."""
    running = serve()
    running.http.get("/healthz")
    flags = running.call(
        lambda: [
            one.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            for one in running.server.server_state.connections
        ]
    )
    assert flags
    assert all(flags)


@pytest.mark.skipif(not hasattr(socket, "TCP_NOTSENT_LOWAT"), reason="the system has no such option")
def test_the_kernel_buffers_little_of_an_answer(serve):
    """The kernel buffered megabytes for each client that reads nothing before the service noticed."""
    running = serve()
    running.http.get("/healthz")
    held = running.call(
        lambda: [
            one.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT)
            for one in running.server.server_state.connections
        ]
    )
    assert set(held) == {server.UNSENT_BYTES}


def test_idle_connections_do_not_block_others(serve, connect):
    """A thousand idle connections used up all file descriptors, and running jobs failed."""
    running = serve(max_connections=8, max_connections_per_address=8)
    most = []
    held = [connect(running) for _ in range(40)]
    for _ in range(20):
        most.append(running.call(lambda: len(room(running))))
        assert running.http.get("/healthz").status_code == 200
        held.append(connect(running))
    assert running.wait(running.draw())["state"] == "done"
    assert max(most) <= 8


def test_one_address_cannot_take_all_connections(serve, connect):
    running = serve(max_connections=20, max_connections_per_address=3)
    honest = [connect(running) for _ in range(3)]
    assert all(is_open(connection) for connection in honest)
    greedy = [connect(running, "127.0.0.2") for _ in range(30)]
    until(lambda: running.call(lambda: len(room(running))) == 6)
    assert all(is_open(connection) for connection in honest)
    assert sum(is_open(connection) for connection in greedy) == 3


def test_the_address_with_the_most_connections_makes_room(serve, connect):
    """When one address has all connections, a new one must replace one of that address."""
    running = serve(max_connections=6, max_connections_per_address=6)
    first = connect(running, "127.0.0.3")
    assert is_open(first)
    greedy = [connect(running, "127.0.0.2") for _ in range(5)]
    until(lambda: running.call(lambda: len(room(running))) == 6)
    another = connect(running, "127.0.0.4")
    assert is_open(another)
    assert is_open(first)
    assert sum(is_open(connection) for connection in greedy) == 4


def test_open_requests_are_not_disconnected(serve, connect):
    running = serve(max_connections=3, max_connections_per_address=2)
    job = running.draw(prompts=["slowly"], prior_steps=100)
    running.http.close()
    streams = [connect(running) for _ in range(2)]
    for stream in streams:
        stream.sendall(f"GET /v1/jobs/{job['id']}/events HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
        assert stream.recv(12) == b"HTTP/1.1 200"
    answer = connect(running).recv(10_000)
    assert answer.startswith(b"HTTP/1.1 503")
    assert b"Too many connections" in answer
    other = connect(running, "127.0.0.2")
    assert is_open(other)
    other.close()
    for stream in streams:
        stream.setblocking(False)
        assert stream.recv(100_000)  # not closed
        stream.close()
    until(lambda: running.call(lambda: len(room(running))) == 0)
    assert 'wuerstchen_refusals_total{reason="connections"} 1.0' in running.service.metrics.text().decode()


def test_trusted_proxies_have_no_limit(serve, connect):
    """All clients share the address of the proxy."""
    running = serve(max_connections=20, max_connections_per_address=2, proxies=("127.0.0.0/30",))
    held = [connect(running, "127.0.0.2") for _ in range(10)]
    assert all(is_open(connection) for connection in held)


def test_a_client_that_never_reads_is_disconnected(serve, monkeypatch):
    """A client that sent requests without reading the answers kept its connection forever."""
    monkeypatch.setattr(connections, "WRITE_SECONDS", 0.5)
    running = serve()
    request = b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n"
    with socket.socket() as greedy:
        greedy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        greedy.settimeout(0.1)
        greedy.connect(running.listening.getsockname())
        deadline = time.monotonic() + 30
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            while True:
                assert time.monotonic() < deadline, "it was not cut off"
                with contextlib.suppress(TimeoutError):
                    greedy.sendall(request * 100)
    until(lambda: running.call(lambda: len(room(running))) == 0)


def test_a_slow_reader_is_given_time():
    """A fixed time limit would disconnect clients on slow lines."""
    connection = Connection.__new__(Connection)
    connection._unsent = None
    unsent = 0
    connection.transport = SimpleNamespace(get_write_buffer_size=lambda: unsent)
    unsent = 1_000_000
    assert not connection.stalls(0.0)
    for second in range(1, 400):  # 2 KB a second
        unsent -= 2000
        assert not connection.stalls(float(second))
    assert not any(connection.stalls(400.0 + second) for second in range(28))
    assert any(connection.stalls(428.0 + second) for second in range(40))


def test_an_ipv6_network_counts_as_one_address():
    assert network_of("10.0.0.1") == network_of("::ffff:10.0.0.1") == "10.0.0.1"
    assert network_of("10.0.0.1") != network_of("10.0.0.2")
    assert network_of("2001:db8:1:2::1") == network_of("2001:db8:1:2:ffff::9%eth0")
    assert network_of("2001:db8:1:2::1") != network_of("2001:db8:1:3::1")
    assert network_of("") == ""


def test_connections_leave_file_descriptors_for_the_service(monkeypatch):
    resource = pytest.importorskip("resource")
    for soft, most in ((1024, 768), (256, 64), (10**6, 4096), (resource.RLIM_INFINITY, 4096)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        assert allowed_connections(None) == most
        assert allowed_connections(50) == 50
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    with pytest.raises(UserError, match=r"file descriptor limit: 800\. The limit of 1024 "):
        allowed_connections(800)


def test_the_file_descriptor_limit_is_raised_as_needed(monkeypatch):
    resource = pytest.importorskip("resource")
    given = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: given.append(limits))
    for limits in ((1024, 10**6), (1024, 2048), (8192, 10**6)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limits=limits: limits)
        connections.raise_descriptor_limit(None)
    assert given == [(4352, 10**6), (2048, 2048)]

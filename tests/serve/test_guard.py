"""The checks on every request, and the headers of every answer."""

import asyncio
import contextlib
import socket
import time
from pathlib import Path

import httpx
import pytest

from wuerstchen.errors import UserError
from wuerstchen.serve import guard
from wuerstchen.serve.limits import ServeConfig, read_tokens
from wuerstchen.serve.metrics import Metrics
from wuerstchen.serve.server import listen

TOKEN = "a-token-of-some-length"
JOB = {"prompts": ["a cat"]}


def test_every_answer_has_the_security_headers(serve):
    running = serve()
    answers = [
        running.http.get("/healthz"),
        running.http.get("/nowhere"),
        running.http.post("/v1/jobs", json={}),
        running.http.post(
            "/v1/jobs", content=b"x" * 20_000_000, headers={"content-type": "application/json"}
        ),
        running.http.get("/healthz", headers={"host": "evil.example"}),
    ]
    assert [answer.status_code for answer in answers] == [200, 404, 400, 413, 403]
    for answer in answers:
        csp = answer.headers["content-security-policy"]
        assert "default-src 'none'" in csp
        assert "unsafe" not in csp
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert not any(name.startswith("access-control") for name in answer.headers)
    assert "server" not in answers[0].headers


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:1", 200),
        ("127.0.0.1:8042", 200),
        ("[::1]:8042", 200),
        ("LOCALHOST.", 200),
        ("localhost:80@evil.example", 403),
        ("localhost:x", 403),
        ("draw.example", 200),
        ("draw.example:443", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example:80", 403),
        ("", 403),
    ],
)
def test_unknown_host_names_are_refused(plain, host, status):
    """DNS rebinding: a malicious page points its own host name at this machine and reads the service."""
    running = plain
    assert running.http.get("/v1/model", headers={"host": host}).status_code == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 202),
        ({"origin": "OWN"}, 202),
        ({"origin": "OWN", "sec-fetch-site": "same-origin"}, 202),
        ({"sec-fetch-site": "none"}, 202),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:1"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": ""}, 415),
    ],
)
def test_pages_of_other_sites_cannot_create_jobs(plain, headers, status):
    """Cross-site request forgery: a page makes its visitors' browsers send jobs to their own service."""
    running = plain
    headers = {name: value.replace("OWN", running.url) for name, value in headers.items()}
    content = b'{"prompts": ["a cat"]}'
    answer = running.http.post(
        "/v1/jobs", content=content, headers={"content-type": "application/json", **headers}
    )
    assert answer.status_code == status
    preflight = running.http.options("/v1/jobs", headers={"origin": "https://evil.example"})
    assert preflight.status_code == 405


def test_json_routes_refuse_other_content_types(plain):
    """Pages of other sites can send forms and plain text without permission, but not JSON."""
    routes = plain.http.get("/openapi.json").json()["paths"]
    posts = [path for path, methods in routes.items() if "requestBody" in methods.get("post", {})]
    assert set(posts) == set(guard.JSON_PATHS)
    for path in posts:
        answer = plain.http.post(path, content=b"{}", headers={"content-type": "text/plain"})
        assert answer.status_code == 415


def test_tokens(serve):
    running = serve(tokens=("another-token-of-all", TOKEN))
    get, post = running.http.get, running.http.post
    for headers in (
        {},
        {"Authorization": "Bearer"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": f"Bearer {TOKEN[:-1]}"},
        {"Authorization": "Bearer ü".encode("latin-1")},
    ):
        for path in (
            "/v1/model",
            "/v1/models",
            "/metrics",
            "/openapi.json",
            "/v1/jobs/x",
            "/v1/jobs/x/events",
        ):
            answer = get(path, headers=headers)
            assert (answer.status_code, answer.json()["error"]["type"]) == (401, "authentication_error"), path
            assert answer.headers["www-authenticate"] == "Bearer"
        assert post("/v1/jobs", json=JOB, headers=headers).status_code == 401
        assert running.http.delete("/v1/jobs/x", headers=headers).status_code == 401
        assert get("/healthz", headers=headers).status_code == 200
        assert get("/readyz", headers=headers).status_code == 200
        assert get("/v1/images/x.png", headers=headers).status_code == 404
    for headers in ({"Authorization": f"Bearer {TOKEN}"}, {"Authorization": f"bearer  {TOKEN}"}):
        assert get("/v1/model", headers=headers).status_code == 200
        assert post("/v1/jobs", json=JOB, headers=headers).status_code == 202


def test_a_public_address_needs_tokens():
    for host in ("0.0.0.0", "::", "192.168.1.5", "draw.example"):
        with pytest.raises(UserError, match="requires tokens"):
            ServeConfig(host=host)
        ServeConfig(host=host, tokens=(TOKEN,))
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        assert ServeConfig(host=host).is_loopback


def test_token_files(tmp_path):
    path = tmp_path / "tokens"
    path.write_text(f"# of the team\n\n  {TOKEN}  \nanother-token-of-all\n")
    assert read_tokens(path) == (TOKEN, "another-token-of-all")
    assert TOKEN not in repr(ServeConfig(tokens=read_tokens(path)))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))  # as on Windows
    assert read_tokens(path) == (TOKEN, "another-token-of-all")
    path.write_text("# none\n")
    with pytest.raises(UserError, match="has no token"):
        read_tokens(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_tokens(tmp_path / "nowhere")
    with pytest.raises(UserError, match="got one of 5 characters"):
        ServeConfig(tokens=("short",))


def test_bodies_are_measured_while_they_arrive(serve):
    """A body without Content-Length could fill the memory."""
    running = serve(upload_bytes=1000)
    sent = 0

    def chunks():
        nonlocal sent
        for _ in range(1000):
            sent += 2**16
            yield b" " * 2**16

    try:
        answer = running.http.post("/v1/jobs", content=chunks(), headers={"content-type": "application/json"})
        assert answer.status_code == 413
    except httpx.WriteError:
        pass  # the service closed the connection early, which is fine too
    assert sent < 2**24
    assert running.http.get("/healthz").status_code == 200


@pytest.fixture
def begin():
    """Sends the head of a request and some bytes of its body, and leaves it open."""
    with contextlib.ExitStack() as stack:

        def begin(running, line, sent=0, *, size=10_000_000, **headers):
            connection = stack.enter_context(
                socket.create_connection(running.listening.getsockname(), timeout=20)
            )
            headers = {"host": "localhost", "content-type": "application/json", **headers}
            head = [f"{line} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
            connection.sendall("\r\n".join([*head, f"content-length: {size}", "", ""]).encode())
            connection.sendall(b" " * sent)
            return connection

        yield begin


def held(running, expected):
    """Waits until this many bytes of bodies are in memory."""
    deadline = time.monotonic() + 20
    while (now := running.call(lambda: running.server.config.app.held.total())) != expected:
        assert time.monotonic() < deadline, now
        time.sleep(0.02)


@pytest.mark.parametrize("line", ["GET /healthz", "GET /v1/model", "DELETE /v1/jobs/x", "POST /nowhere"])
def test_bodies_are_not_read_on_routes_without_one(serve, begin, line):
    """26 connections with GET /healthz and endless bodies used up the memory for all uploads for 28 s."""
    running = serve()
    connection = begin(running, line, 60_000)
    assert connection.recv(12)[9:] in (b"200", b"404")
    held(running, 0)
    assert running.http.request("GET", "/healthz", content=b"x" * 3_000_000).status_code == 200
    assert running.http.get("/healthz").status_code == 200


def test_bodies_without_a_token_use_no_memory(serve, begin):
    running = serve(tokens=(TOKEN,))
    for line, status in (
        ("POST /v1/jobs", b"401"),
        ("GET /", b"200"),
        ("POST /v1/images/generations", b"401"),
    ):
        assert begin(running, line, 60_000).recv(12)[9:] == status
    held(running, 0)


def test_the_total_size_of_bodies_is_limited(serve, monkeypatch, begin):
    """Many uploads at once, each within its own limit."""
    monkeypatch.setattr(guard, "MAX_BODY_BYTES", 100_000)
    tokens = tuple(f"token-number-{number}-of-all" for number in range(6))
    running = serve(upload_bytes=1, tokens=tokens)  # a body then has at most 262,145 bytes
    for token, sent in zip(tokens, [262_000] * 4 + [1000], strict=False):
        begin(running, "POST /v1/jobs", sent, size=262_100, authorization=f"Bearer {token}")
    held(running, 1_049_000)
    honest = {"authorization": f"Bearer {tokens[5]}"}
    refused = running.http.post("/v1/jobs", json=JOB, headers=honest)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    assert running.http.get("/v1/model", headers=honest).status_code == 200


def test_one_client_cannot_use_all_memory_for_bodies(serve, monkeypatch, begin):
    monkeypatch.setattr(guard, "MAX_BODY_BYTES_PER_CLIENT", 100_000)
    greedy, honest = "first-token-of-all", "second-token-of-all"
    running = serve(upload_bytes=1, tokens=(greedy, honest))
    own = {"authorization": f"Bearer {greedy}"}
    for sent in (262_000, 1000):
        begin(running, "POST /v1/jobs", sent, size=262_100, **own)
        time.sleep(0.1)
    held(running, 263_000)
    refused = running.http.post("/v1/jobs", json=JOB, headers=own)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "5")
    assert "too much memory: 263,000 bytes" in refused.json()["error"]["message"]
    answer = running.http.post("/v1/jobs", json=JOB, headers={"authorization": f"Bearer {honest}"})
    assert answer.status_code == 202


def test_addresses_of_one_ipv6_network_are_one_client():
    """Otherwise one person could pose as many clients and get more than a fair turn."""
    clients = []

    async def app(scope, receive, send):
        clients.append(scope["wuerstchen.client"])

    asked = guard.Guard(app, ServeConfig(), Metrics())
    for address in ("2001:db8:1:2::1", "2001:db8:1:2::9", "2001:db8:1:3::1", "10.0.0.1"):
        scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"localhost")]}
        asyncio.run(asked({**scope, "client": (address, 1)}, None, None))
    first, second, third, fourth = clients
    assert first == second != third
    assert fourth == "address 10.0.0.1"


def test_the_request_rate_of_a_client_is_limited(serve):
    """Requests of one client slowed down all others."""
    mine, others = "first-token-of-all", "second-token-of-all"
    running = serve(tokens=(mine, others), max_requests_per_second=0.1)

    def status(token, path="/v1/model"):
        return running.http.get(path, headers={"Authorization": f"Bearer {token}"}).status_code

    assert [status(mine) for _ in range(30)] == [200] * 30
    refused = running.http.get("/v1/model", headers={"Authorization": f"Bearer {mine}"})
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 10
    error = refused.json()["error"]
    assert error["type"] == "rate_limit_error"
    assert "0.1 per second, with bursts of 30" in error["message"]
    assert [status(mine, path) for path in ("/healthz", "/readyz") for _ in range(40)] == [200] * 80
    assert status(others) == 200
    # Wrong tokens count, for the address.
    guesses = [status(f"guess-number-{number}") for number in range(31)]
    assert guesses == [401] * 30 + [429]
    assert running.http.get("/").status_code == 429
    assert status(others) == 200
    metrics = running.http.get("/metrics", headers={"Authorization": f"Bearer {others}"}).text
    assert 'wuerstchen_refusals_total{reason="429"} 3.0' in metrics


def test_clients_behind_a_proxy_have_separate_rate_limits(serve):
    running = serve(proxies=("127.0.0.1",), max_requests_per_second=0.1)

    def statuses(address, number):
        headers = {"X-Forwarded-For": address}
        return [running.http.get("/v1/model", headers=headers).status_code for _ in range(number)]

    assert statuses("10.1.1.1", 31) == [200] * 30 + [429]
    assert statuses("10.1.1.2", 1) == [200]
    assert statuses("2001:db8::1", 15) + statuses("2001:db8::2", 16) == [200] * 30 + [429]


def test_forwarded_headers_are_ignored_without_a_trusted_proxy(serve):
    """Any client could evade the rate limit by sending a proxy's header."""
    running = serve(max_requests_per_second=0.1)
    answers = [running.http.get("/v1/model", headers={"X-Forwarded-For": f"10.1.1.{k}"}) for k in range(31)]
    assert [answer.status_code for answer in answers] == [200] * 30 + [429]


def test_routes_without_uploads_have_a_small_body_limit(serve):
    running = serve()
    padded = b" " * 300_000 + b'{"prompt": "a cat"}'
    headers = {"content-type": "application/json"}
    assert running.http.post("/v1/images/generations", content=padded, headers=headers).status_code == 413
    padded = b" " * 300_000 + b'{"prompts": ["a cat"]}'
    assert running.http.post("/v1/jobs", content=padded, headers=headers).status_code == 202


def test_a_body_that_does_not_arrive_times_out(serve):
    running = serve(body_timeout=0.5)
    host, port = running.listening.getsockname()
    with socket.create_connection((host, port), timeout=40) as connection:
        connection.sendall(
            b"POST /v1/jobs HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b"content-length: 100\r\n\r\n{"
        )
        began = time.monotonic()
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")
        assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    "sent", [b"", b"GET / HTTP/1.1\r\nhost: loc", b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\nGET"]
)
def test_slow_headers_time_out(serve, sent):
    """uvicorn waits for them forever, and file descriptors are scarce."""
    running = serve(body_timeout=0.5)
    host, port = running.listening.getsockname()
    with socket.create_connection((host, port), timeout=40) as connection:
        connection.sendall(sent)
        while connection.recv(1000):
            pass  # until it is closed


def test_the_host_address_is_an_allowed_host(serve):
    running = serve(host="127.0.0.2")
    assert running.http.get("/v1/model").status_code == 200


def test_duplicate_headers_are_refused(serve):
    running = serve()
    answer = running.http.get(
        "/v1/model", headers=[("origin", running.url), ("origin", "https://evil.example")]
    )
    assert answer.status_code == 400


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"port": 70000}, "0 to 65535, got 70000"),
        ({"max_batch": 0}, "max_batch must be above 0, got 0"),
        ({"grace": float("nan")}, "grace must be above 0, got nan"),
        ({"max_requests_per_second": -1.0}, "max_requests_per_second .* got -1"),
        ({"max_requests_per_second": 1e-9}, "max_requests_per_second .* got 1e-09"),
        ({"max_requests_per_second": float("nan")}, "max_requests_per_second .* got nan"),
        ({"max_requests_per_second": float("inf")}, "max_requests_per_second .* got inf"),
        ({"c2pa_key": Path("x")}, "belong together"),
        ({"proxies": ("10.0.0.1", "nginx")}, "got nginx"),
        ({"proxies": ("10.0.0.1/8",)}, "got 10.0.0.1/8"),
        ({"proxies": ("*", "10.0.0.1")}, "got \\*"),
    ],
)
def test_invalid_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        ServeConfig(**settings)


def test_proxies_may_be_addresses_and_networks():
    ServeConfig(proxies=("10.0.0.1", "10.0.0.0/8", "::1", "fd00::/8"))
    ServeConfig(proxies=("*",))


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompts',
        b'{"prompts": ["\xff"]}',
        b"[" * 100_000,
        b'{"prompts": ["x"], "seed": ' + b"9" * 5000 + b"}",
    ],
)
def test_invalid_json_is_reported_as_such(serve, body):
    """A position in the text was reported as a field name, and some parser errors had no readable message."""
    answer = serve().http.post("/v1/jobs", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert "is not valid JSON" in answer.json()["error"]["message"]


def test_an_invalid_host_name_is_a_user_error():
    """It raises TypeError instead of OSError, which caused a traceback."""
    with pytest.raises(UserError, match=r"address é\.\.b:0 is not available"):
        listen("é..b", 0)


def test_head_is_get_without_a_body(serve):
    """A load balancer takes 405 as an unhealthy service."""
    running = serve()
    for path, status in (("/healthz", 200), ("/readyz", 200), ("/v1/model", 200), ("/nowhere", 404)):
        answer = running.http.head(path)
        assert (answer.status_code, answer.content) == (status, b"")
        assert answer.headers["content-length"] == running.http.get(path).headers["content-length"]

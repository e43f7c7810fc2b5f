"""The service behind a reverse proxy: port, path prefix, and trust in headers."""

import asyncio

import pytest

from wuerstchen.serve.guard import Guard
from wuerstchen.serve.limits import ServeConfig
from wuerstchen.serve.metrics import Metrics
from wuerstchen.serve.proxies import BehindProxies, is_origin_of, public_address, split_port

JSON = {"content-type": "application/json"}
JOB = b'{"prompts": ["a cat"]}'


def url_of(running, **headers):
    """The address of an image, as OpenAI's clients are told it."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    answer = running.http.post("/v1/images/generations", json={"prompt": "a cat"}, headers=names)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"][0]["url"].partition("/v1/images/")[0]


def test_urls_are_those_that_the_client_uses(serve):
    """Bugs: a URL without the proxy's port, or without its path prefix."""
    running = serve(proxies=("127.0.0.1",), allowed_hosts=("draw.example",))
    for headers, url in (
        ({"host": "draw.example:8443", "x_forwarded_proto": "https"}, "https://draw.example:8443"),
        ({"host": "draw.example:443", "x_forwarded_proto": "https"}, "https://draw.example"),
        ({"host": "draw.example", "x_forwarded_port": "8443"}, "http://draw.example:8443"),
        (
            {"host": "draw.example", "x_forwarded_port": "443", "x_forwarded_proto": "https"},
            "https://draw.example",
        ),
        # TLS was terminated one hop earlier, and the last proxy got plain HTTP.
        (
            {"host": "draw.example", "x_forwarded_port": "80", "x_forwarded_proto": "https"},
            "https://draw.example",
        ),
        ({"host": "draw.example", "x_forwarded_port": "443"}, "http://draw.example"),
        ({"x_forwarded_host": "pub.example:81"}, "http://pub.example:81"),
        ({"x_forwarded_host": "pub.example", "x_forwarded_port": "81"}, "http://pub.example:81"),
        ({"x_forwarded_host": "one.example, two.example"}, "http://two.example"),
        (
            {"x_forwarded_host": "[2001:db8::1]:81", "x_forwarded_prefix": "/a/b/"},
            "http://[2001:db8::1]:81/a/b",
        ),
        ({"host": "draw.example", "x_forwarded_prefix": "/v1"}, "http://draw.example/v1"),
        ({"host": "draw.example", "x_forwarded_prefix": "/"}, "http://draw.example"),
    ):
        assert url_of(running, **headers) == url, headers


def test_all_urls_have_the_path_prefix(serve):
    """URLs in jobs, events and the OpenAPI schema lacked the prefix."""
    running = serve(proxies=("127.0.0.0/8",))
    running.http.headers["X-Forwarded-Prefix"] = "/draw"
    job = running.draw()
    urls = [data["url"] for name, data in running.events(job) if name == "image"]
    urls += [image["url"] for image in running.wait(job)["images"]]
    assert len(urls) == 2
    assert all(url.startswith("/draw/v1/images/") for url in urls)
    assert running.http.get(urls[0].removeprefix("/draw")).status_code == 200
    assert running.http.get("/openapi.json").json()["servers"] == [{"url": "/draw"}]
    assert running.http.get("/").status_code == 200
    moved = running.http.get("/v1/model/", follow_redirects=False)
    assert moved.headers["location"] == f"{running.url}/draw/v1/model"
    del running.http.headers["X-Forwarded-Prefix"]
    assert running.wait(job)["images"][0]["url"].startswith("/v1/images/")
    assert "servers" not in running.http.get("/openapi.json").json()


@pytest.mark.parametrize("proxies", [(), ("10.0.0.1",)])
def test_forwarded_headers_of_other_clients_are_ignored(serve, proxies):
    """Anybody who reaches the service directly could inject another host into its answers."""
    running = serve(proxies=proxies)
    told = {"x_forwarded_host": "evil.example", "x_forwarded_port": "1", "x_forwarded_prefix": "/evil"}
    assert url_of(running, **told) == running.url
    broken = {"X-Forwarded-Host": "a b", "X-Forwarded-Port": "x", "X-Forwarded-Prefix": "//x"}
    assert running.http.get("/healthz", headers=broken).status_code == 200
    # They do not make a page of another site same-origin either.
    foreign = {"origin": "https://evil.example", "X-Forwarded-Host": "evil.example", **JSON}
    assert running.http.post("/v1/jobs", content=JOB, headers=foreign).status_code == 403


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X-Forwarded-Host", "a b"),
        ("X-Forwarded-Host", "evil.example/x"),
        ("X-Forwarded-Host", "evil@draw.example"),
        ("X-Forwarded-Host", "draw.example:"),
        ("X-Forwarded-Port", "https"),
        ("X-Forwarded-Port", "0"),
        ("X-Forwarded-Port", "65536"),
        ("X-Forwarded-Prefix", "//evil.example"),
        ("X-Forwarded-Prefix", "draw"),
        ("X-Forwarded-Prefix", "/a/../b"),
        ("X-Forwarded-Prefix", "/a?b"),
    ],
)
def test_invalid_forwarded_headers_are_named(name, value):
    """A header that the proxy passes on from a client could inject another site's URL."""
    scope = {"scheme": "http", "wuerstchen.proxied": {name.lower(): value}}
    with pytest.raises(ValueError, match=f"^{name} cannot be used: .*Correct the configuration of the proxy"):
        public_address(scope, "draw.example")


def test_an_invalid_forwarded_header_gets_a_400_with_its_name(serve):
    running = serve(proxies=("127.0.0.1",))
    answer = running.http.get("/healthz", headers={"X-Forwarded-Prefix": "//evil.example"})
    assert answer.status_code == 400
    assert "X-Forwarded-Prefix cannot be used: '//evil.example'" in answer.json()["error"]["message"]


def test_requests_of_the_page_work_behind_a_proxy(serve):
    """The page's own POST counted as cross-site when the proxy dropped the port from the Host header."""
    running = serve(proxies=("127.0.0.1",), allowed_hosts=("draw.example",))

    def status(**headers):
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return running.http.post("/v1/jobs", content=JOB, headers={**JSON, **names}).status_code

    own = {"host": "draw.example", "origin": "https://draw.example:8443"}
    assert status(**own, sec_fetch_site="same-origin") == 202
    # Browsers send Sec-Fetch-Site only with TLS or on localhost. Otherwise the origin is checked.
    assert status(**own) == 403
    assert status(**own, x_forwarded_port="8443") == 202
    plain = {"host": "draw.example", "origin": "https://draw.example", "x_forwarded_proto": "https"}
    assert status(**plain, x_forwarded_port="80") == 202
    assert status(**own, x_forwarded_host="draw.example:8443") == 202
    assert status(**{**own, "host": "draw.example:8443"}) == 202
    assert status(host="draw.example:443", origin="https://draw.example") == 202
    assert status(host="draw.example", origin="https://draw.example:443") == 202
    for foreign in (
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
        {"sec_fetch_site": "none", "origin": "https://evil.example"},
        {"origin": "https://draw.example.evil.example", "x_forwarded_host": "draw.example"},
        {"origin": "null"},
    ):
        assert status(**{"host": "draw.example", **foreign}) == 403, foreign


def test_clients_behind_a_proxy_are_distinguished(serve):
    """Otherwise all of them together may have only sixteen jobs."""
    running = serve(proxies=("127.0.0.1",), max_jobs_per_client=1, max_batch=1)

    def status(address):
        body = {"prompts": ["slowly"], "prior_steps": 50}
        return running.http.post("/v1/jobs", json=body, headers={"X-Forwarded-For": address}).status_code

    assert [status("10.1.1.1"), status("10.1.1.1"), status("10.1.1.2")] == [202, 429, 202]


def test_both_paths_in_the_scope_have_the_prefix():
    """ASGI also has ``raw_path``. Apps that read it would miss the prefix."""
    scopes = []

    async def app(scope, receive, send):
        scopes.append(scope)

    asked = BehindProxies(Guard(app, ServeConfig(), Metrics()), ("127.0.0.1",))
    headers = [(b"host", b"localhost"), (b"x-forwarded-prefix", b"/draw")]
    scope = {
        "type": "http",
        "method": "GET",
        "scheme": "http",
        "client": ("127.0.0.1", 1),
        "headers": headers,
    }
    for paths in (
        {"path": "/a b", "raw_path": b"/a%20b"},
        {"path": "/a b"},
        {"path": "/x", "raw_path": None},
    ):
        asyncio.run(asked({**scope, **paths}, None, None))
    assert [seen["path"] for seen in scopes] == ["/draw/a b", "/draw/a b", "/draw/x"]
    assert [seen.get("raw_path") for seen in scopes] == [b"/draw/a%20b", None, None]


def test_hosts_and_ports():
    assert split_port("a.example") == ("a.example", None)
    assert split_port("a.example:") == ("a.example", None)
    assert split_port("a.example:81") == ("a.example", 81)
    assert split_port("[::1]") == ("[::1]", None)
    assert split_port("[::1]:81") == ("[::1]", 81)
    assert is_origin_of("http://A.example", "a.example:80")
    assert not is_origin_of("http://a.example", "a.example:443")
    assert not is_origin_of("null", "")
    assert not is_origin_of("http://a.example:" + "9" * 5000, "a.example")

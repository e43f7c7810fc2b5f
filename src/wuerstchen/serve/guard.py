"""Checks on every request before a route sees it: client rate, host, origin, token, and body size.

Also sets the headers that every response gets.
"""

import asyncio
import json
import math
import re
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from wuerstchen.serve.connections import network_of
from wuerstchen.serve.limits import LOOPBACK_NAMES, ServeConfig
from wuerstchen.serve.metrics import Metrics
from wuerstchen.serve.proxies import KEY, ForwardedError, PublicAddress, is_origin_of, public_address
from wuerstchen.serve.rates import RequestRate

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
HEADERS = {
    "content-security-policy": CSP,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}
"""Where a route says otherwise, its word counts."""

OPEN_PATHS = ("/", "/healthz", "/readyz")
OPEN_PREFIXES = ("/page/", "/v1/images/")
"""Pictures are open to whoever knows their names; what is not read there needs a token all the same."""

WATCHED_PATHS = ("/healthz", "/readyz")
"""Never refused for a client's rate: a balancer that is told 429 takes the service for ill."""

JSON_PATHS = ("/v1/jobs", "/v1/images/generations")
"""Where a POST holds JSON. Elsewhere no body is read, and its content type does not matter: the route answers
404 or 405."""
UPLOAD_PATH = "/v1/jobs"
TEXT_BYTES = 2**18
"""The most that a body holds where nothing is uploaded."""

READ_AWAY = 4
"""A body up to so many times too large is read, though not kept: clients that are still sending hear no
answer."""

MOST_HELD = 256 * 2**20
"""Bytes of bodies at a time, of all requests."""
MOST_OF_CLIENT = 64 * 2**20
"""Of one client's requests."""

ERROR_TYPES = {
    401: "authentication_error",
    403: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error in the form that OpenAI's clients read."""
    kind = ERROR_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Stop(Exception):
    def __init__(self, status: int, message: str, retry_after: int = 5) -> None:
        """``retry_after``: seconds, told with 429 and 503."""
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry_after = retry_after


class Guard:
    """ASGI middleware around the whole app."""

    def __init__(self, app: App, config: ServeConfig, metrics: Metrics) -> None:
        self.app = app
        self.config = config
        self.metrics = metrics
        self.held: Counter[str] = Counter()
        """Bytes of the bodies of requests that are under way, by client."""
        self.rate = RequestRate(config.max_requests_per_second)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        # Balancers ask so whether a service is well: as GET, but without the body.
        only_head = scope["method"] == "HEAD"
        if only_head:
            scope = {**scope, "method": "GET"}  # a copy: the server must still know

        async def headed(message: Message) -> None:
            if only_head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            if message["type"] == "http.response.start":
                given = list(message.get("headers", []))
                names = {name.lower() for name, _ in given}
                more = [(k.encode(), v.encode()) for k, v in HEADERS.items() if k.encode() not in names]
                message["headers"] = given + more
                if message["status"] >= 400:
                    self.metrics.refusals.labels(str(message["status"])).inc()
            await send(message)

        try:
            headers = _headers(scope)
            owner = self._owner(headers)
            client = scope["wuerstchen.client"] = _address(scope) if owner is None else owner
            self._check_rate(scope, client)
            self._check_host(headers)
            public = _public(scope, headers)
            self._check_origin(scope, headers, public.host)
            self._check_token(scope, owner)
            body = await self._read(scope, headers, client, receive)
        except _Stop as stop:
            await _answer(headed, stop)
            return
        if body is None:
            return  # the client has gone
        self._hold(client, len(body))
        try:
            await self._pass_on(body, _under(public, scope), receive, headed)
        finally:
            self._hold(client, -len(body))

    async def _pass_on(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        sent = False

        async def replayed() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replayed, send)

    def _check_host(self, headers: dict[str, str]) -> None:
        """A page elsewhere can point a name of its own to this machine: only known names are answered."""
        if not self.config.is_loopback and not self.config.allowed_hosts:
            return
        host = headers.get("host", "")
        match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\[\]:@/]+)(:[0-9]*)?", host)
        own = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        allowed = {name.lower() for name in (*self.config.allowed_hosts, *LOOPBACK_NAMES, own)}
        if match is None or match[1].lower().rstrip(".") not in allowed:
            raise _Stop(
                403,
                f"host {host[:100]!a} is none of this service's names; start it with --allowed-host for it",
            )

    def _check_origin(self, scope: Scope, headers: dict[str, str], host: str) -> None:
        """What changes something must not come from another site's page. ``host`` is the public one."""
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        # Browsers set Sec-Fetch-Site themselves, and know the address that a proxy has hidden from us.
        own = site == "same-origin" or (
            site in (None, "none") and (origin is None or is_origin_of(origin, host))
        )
        if not own:
            raise _Stop(
                403,
                f"The request comes from another site's page: {(origin or site or '')[:100]!a}. Only this "
                "service's own page may send it. Behind a proxy, start the service with --proxy and let the "
                "proxy send X-Forwarded-Host.",
            )
        if scope["method"] == "POST" and scope["path"] in JSON_PATHS:
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise _Stop(
                    415, f"content type {kind[:100]!a} is wrong because JSON is read; use application/json"
                )

    def _owner(self, headers: dict[str, str]) -> str | None:
        """The client whose token was sent. None without one, and where tokens are not used."""
        if not self.config.tokens:
            return None
        scheme, _, token = headers.get("authorization", "").partition(" ")
        return self.config.client_of_token(token.strip()) if scheme.lower() == "bearer" else None

    def _check_token(self, scope: Scope, owner: str | None) -> None:
        if owner is not None or not self.config.tokens:
            return
        path = scope["path"]
        reads = scope["method"] in ("GET", "HEAD")
        if not (reads and (path in OPEN_PATHS or path.startswith(OPEN_PREFIXES))):
            raise _Stop(401, "a token is missing or unknown; send the header Authorization: Bearer TOKEN")

    def _check_rate(self, scope: Scope, client: str) -> None:
        """Raises ``_Stop`` where a client has sent too many requests, refused ones among them."""
        if scope["path"] in WATCHED_PATHS:
            return
        wait = self.rate.take(client)
        if wait > 0:
            raise _Stop(
                429,
                f"You send too many requests: {self.rate.burst} at once are allowed, and then "
                f"{self.rate.per_second:g} a second. Wait as long as Retry-After says.",
                retry_after=math.ceil(wait),
            )

    async def _read(
        self, scope: Scope, headers: dict[str, str], client: str, receive: Receive
    ) -> bytes | None:
        """The whole body, which is counted while it comes; None if the client goes away.

        Where a route takes no body nothing is read, so bodies of those without a token take no room: the
        server drops what they send.
        """
        if scope["method"] != "POST" or scope["path"] not in JSON_PATHS:
            return b""
        most = self.config.body_bytes if scope["path"] == UPLOAD_PATH else TEXT_BYTES
        too_large = _Stop(413, f"the body is wrong because it has over {most:,} bytes; send less")
        length = headers.get("content-length", "0")
        if not length.isdecimal():
            raise _Stop(400, "content-length is wrong because it is no number; leave it to your client")
        if int(length) > READ_AWAY * most:
            raise too_large
        chunks: list[bytes] = []
        size = kept = 0
        try:
            async with asyncio.timeout(self.config.body_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunk, more = message.get("body", b""), message.get("more_body", False)
                    size += len(chunk)
                    if chunk:
                        self._check_held(client, most)
                    if size <= most:
                        chunks.append(chunk)
                        kept += len(chunk)
                        self._hold(client, len(chunk))
                    else:
                        chunks.clear()
                    if size > READ_AWAY * most or (size > most and not more):
                        raise too_large
                    if not more:
                        return b"".join(chunks)
        except TimeoutError as error:
            raise _Stop(408, f"the body took over {self.config.body_timeout:g} s; send it faster") from error
        finally:
            self._hold(client, -kept)

    def _hold(self, client: str, size: int) -> None:
        self.held[client] += size
        if not self.held[client]:
            del self.held[client]

    def _check_held(self, client: str, most: int) -> None:
        """Raises ``_Stop`` where bodies take too much memory. One body of ``most`` bytes always fits."""
        if self.held[client] > max(MOST_OF_CLIENT, most):
            raise _Stop(
                429,
                f"Your requests under way hold too many bytes: {self.held[client]:,}. Send the next one when "
                "one of them is answered.",
            )
        if self.held.total() > max(MOST_HELD, 4 * most):
            raise _Stop(503, "too many large requests are under way; try again in a few seconds")


def _address(scope: Scope) -> str:
    """A name for the client without a token: its address, which a trusted proxy may have told."""
    peer = scope.get("client")
    # Of IPv6 one person has a whole network, and could be any number of clients.
    return f"address {network_of(str(peer[0]))}" if peer else "address unknown"


def _public(scope: Scope, headers: dict[str, str]) -> PublicAddress:
    """Where the client finds the service. Raises ``_Stop`` for what a proxy sent and cannot be used."""
    host = headers.get("host", "")
    if KEY not in scope:
        return PublicAddress(host)
    try:
        return public_address(scope, host)
    except ForwardedError as error:
        raise _Stop(400, str(error)) from error


def _under(public: PublicAddress, scope: Scope) -> Scope:
    """The scope as the app sees it: addresses that it makes of it are the public ones."""
    if KEY not in scope:
        return scope
    headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"host"]
    headers.append((b"host", public.host.encode("latin-1")))
    # As ASGI has it, the path begins with the prefix below which the app lies.
    root, path = public.prefix, public.prefix + scope["path"]
    moved = {**scope, "headers": headers, "root_path": root, "path": path}
    if scope.get("raw_path") is not None:  # ASGI leaves it to the server whether there is one
        moved["raw_path"] = root.encode("ascii") + scope["raw_path"]
    return moved


def _headers(scope: Scope) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        key = name.decode("latin-1").lower()
        if key in found and key in ("host", "origin", "authorization", "content-length", "content-type"):
            raise _Stop(400, f"header {key} is wrong because it is there twice; send it once")
        found[key] = value.decode("latin-1")
    return found


async def _answer(send: Send, stop: _Stop) -> None:
    status = stop.status
    body = json.dumps(error_body(status, stop.message)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status in (429, 503):
        headers.append((b"retry-after", str(stop.retry_after).encode()))
    if status in (408, 413):
        headers.append((b"connection", b"close"))  # what is left of the body is not read
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

"""Checks every request before it reaches a route: client rate, host, origin, token and body size.

Also sets the headers of every response.
"""

import asyncio
import json
import math
import re
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from wuerstchen.serve.connections import network_of
from wuerstchen.serve.errors import Refused
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
"""A route may override them."""

OPEN_PATHS = ("/", "/healthz", "/readyz")
OPEN_PREFIXES = ("/page/", "/v1/images/")
"""Paths below these can be read without a token. The names of images cannot be guessed."""

HEALTH_PATHS = ("/healthz", "/readyz")
"""Exempt from rate limits: a load balancer that gets 429 would consider the service unhealthy."""

JSON_PATHS = ("/v1/jobs", "/v1/images/generations")
"""Routes that take JSON by POST. Elsewhere the body is not read: the route answers 404 or 405."""
UPLOAD_PATH = "/v1/jobs"
TEXT_BYTES = 2**18
"""Largest body on routes without uploads."""

DRAIN_FACTOR = 4
"""Bodies up to this many times over the limit are read and discarded, because clients do not read the
response while they are still sending."""

MAX_BODY_BYTES = 256 * 2**20
"""Memory for the bodies of all requests."""
MAX_BODY_BYTES_PER_CLIENT = 64 * 2**20
"""Memory for the bodies of one client's requests."""

RETRY_AFTER = 5
"""Seconds, for refusals with 429 and 503 that name no other time."""

ERROR_TYPES = {
    401: "authentication_error",
    403: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error in OpenAI's format."""
    kind = ERROR_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Guard:
    """ASGI middleware around the whole app."""

    def __init__(self, app: App, config: ServeConfig, metrics: Metrics) -> None:
        self.app = app
        self.config = config
        self.metrics = metrics
        self.held: Counter[str] = Counter()
        """Bytes of request bodies in memory, by client."""
        self.rate = RequestRate(config.max_requests_per_second)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        # Load balancers check health with HEAD: the same as GET, but without the body.
        only_head = scope["method"] == "HEAD"
        if only_head:
            scope = {**scope, "method": "GET"}  # a copy: the server needs the original

        async def headed(message: Message) -> None:
            if only_head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            if message["type"] == "http.response.start":
                given = list(message.get("headers", []))
                names = {name.lower() for name, _ in given}
                missing = [(k.encode(), v.encode()) for k, v in HEADERS.items() if k.encode() not in names]
                message["headers"] = given + missing
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
        except Refused as error:
            await _answer(headed, error)
            return
        if body is None:
            return  # the client has gone
        self._hold(client, len(body))
        try:
            await self._pass_on(body, _with_public_address(public, scope), receive, headed)
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
        """Prevents DNS rebinding: another site can point its own name at this machine."""
        if not self.config.is_loopback and not self.config.allowed_hosts:
            return
        host = headers.get("host", "")
        match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\[\]:@/]+)(:[0-9]*)?", host)
        own = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        allowed = {name.lower() for name in (*self.config.allowed_hosts, *LOOPBACK_NAMES, own)}
        if match is None or match[1].lower().rstrip(".") not in allowed:
            raise Refused(
                403,
                f"host {host[:100]!a} is not allowed. Start the service with --allowed-host to allow it.",
            )

    def _check_origin(self, scope: Scope, headers: dict[str, str], host: str) -> None:
        """Refuses requests from other sites' pages, except reads. ``host``: the public host name."""
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        # Browsers set Sec-Fetch-Site, and know the public address that a proxy hides from us.
        own = site == "same-origin" or (
            site in (None, "none") and (origin is None or is_origin_of(origin, host))
        )
        if not own:
            raise Refused(
                403,
                f"The request comes from another site's page: {(origin or site or '')[:100]!a}. Only this "
                "service's own page may send it. Behind a proxy, start the service with --proxy and let the "
                "proxy send X-Forwarded-Host.",
            )
        if scope["method"] == "POST" and scope["path"] in JSON_PATHS:
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise Refused(415, f"content type must be application/json, got {kind[:100]!a}.")

    def _owner(self, headers: dict[str, str]) -> str | None:
        """The client whose token was sent. None if there is no valid token, or if tokens are not used."""
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
            raise Refused(
                401, "The token is missing or unknown. Send the header Authorization: Bearer TOKEN."
            )

    def _check_rate(self, scope: Scope, client: str) -> None:
        """Raises ``Refused`` if a client sends too many requests. Refused requests count too."""
        if scope["path"] in HEALTH_PATHS:
            return
        wait = self.rate.take(client)
        if wait > 0:
            raise Refused(
                429,
                f"Too many requests. The limit is {self.rate.per_second:g} per second, with bursts "
                f"of {self.rate.burst}. Wait for the time in Retry-After.",
                retry_after=math.ceil(wait),
            )

    async def _read(
        self, scope: Scope, headers: dict[str, str], client: str, receive: Receive
    ) -> bytes | None:
        """Reads the whole body and checks its size on the way. Returns None if the client disconnects.

        On routes that take no body, nothing is read: the server discards it.
        """
        if scope["method"] != "POST" or scope["path"] not in JSON_PATHS:
            return b""
        limit = self.config.body_bytes if scope["path"] == UPLOAD_PATH else TEXT_BYTES
        too_large = Refused(413, f"The body is too large: more than {limit:,} bytes. Send less.")
        length = headers.get("content-length", "0")
        if not length.isdecimal():
            raise Refused(400, f"Content-Length must be a number, got {length[:100]!a}.")
        if int(length) > DRAIN_FACTOR * limit:
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
                        self._check_held(client, limit)
                    if size <= limit:
                        chunks.append(chunk)
                        kept += len(chunk)
                        self._hold(client, len(chunk))
                    else:
                        chunks.clear()
                    if size > DRAIN_FACTOR * limit or (size > limit and not more):
                        raise too_large
                    if not more:
                        return b"".join(chunks)
        except TimeoutError as error:
            raise Refused(
                408, f"The body took longer than {self.config.body_timeout:g} s. Send it faster."
            ) from error
        finally:
            self._hold(client, -kept)

    def _hold(self, client: str, size: int) -> None:
        self.held[client] += size
        if not self.held[client]:
            del self.held[client]

    def _check_held(self, client: str, limit: int) -> None:
        """Raises ``Refused`` if bodies take too much memory. One body of ``limit`` bytes always fits."""
        if self.held[client] > max(MAX_BODY_BYTES_PER_CLIENT, limit):
            raise Refused(
                429,
                f"Your open requests take too much memory: {self.held[client]:,} bytes. Wait for one to "
                "finish.",
            )
        if self.held.total() > max(MAX_BODY_BYTES, 4 * limit):
            raise Refused(503, "Too many large requests are open. Try again in a few seconds.")


def _address(scope: Scope) -> str:
    """The name of a client without a token: its address, which may come from a trusted proxy."""
    peer = scope.get("client")
    # With IPv6, one person has a whole network and could pose as any number of clients.
    return f"address {network_of(str(peer[0]))}" if peer else "address unknown"


def _public(scope: Scope, headers: dict[str, str]) -> PublicAddress:
    """The service's address as the client sees it. Raises ``Refused`` for invalid headers of a proxy."""
    host = headers.get("host", "")
    if KEY not in scope:
        return PublicAddress(host)
    try:
        return public_address(scope, host)
    except ForwardedError as error:
        raise Refused(400, str(error)) from error


def _with_public_address(public: PublicAddress, scope: Scope) -> Scope:
    """The scope with the public host and path prefix, so that URLs built by the app work for the client."""
    if KEY not in scope:
        return scope
    headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"host"]
    headers.append((b"host", public.host.encode("latin-1")))
    # In ASGI, ``path`` includes the ``root_path`` under which the app is mounted.
    root, path = public.prefix, public.prefix + scope["path"]
    moved = {**scope, "headers": headers, "root_path": root, "path": path}
    if scope.get("raw_path") is not None:  # optional in ASGI
        moved["raw_path"] = root.encode("ascii") + scope["raw_path"]
    return moved


def _headers(scope: Scope) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        key = name.decode("latin-1").lower()
        if key in found and key in ("host", "origin", "authorization", "content-length", "content-type"):
            raise Refused(400, f"The header {key} was sent twice. Send it once.")
        found[key] = value.decode("latin-1")
    return found


async def _answer(send: Send, error: Refused) -> None:
    status = error.status
    body = json.dumps(error_body(status, error.message)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status in (429, 503):
        headers.append((b"retry-after", str(error.retry_after or RETRY_AFTER).encode()))
    if status in (408, 413):
        headers.append((b"connection", b"close"))  # what is left of the body is not read
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

"""The service's public address behind a trusted proxy.

uvicorn's middleware reads X-Forwarded-For and X-Forwarded-Proto. Host, port and path prefix are read here.
"""

import ipaddress
import re
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]]

KEY = "wuerstchen.proxied"
"""Key of the request's scope for the headers of a trusted proxy, by name."""
NAMES = ("x-forwarded-host", "x-forwarded-port", "x-forwarded-prefix")
DEFAULT_PORTS = {"http": 80, "https": 443}


class ForwardedError(ValueError):
    """A trusted proxy sent a header that cannot be used."""


@dataclass(frozen=True)
class PublicAddress:
    """The address under which the client knows the service."""

    host: str
    """As in a Host header: name or address, with the port unless it is the scheme's default."""
    prefix: str = ""
    """Path prefix of this service on the proxy: empty, or such as ``/draw``, without a trailing slash."""


class BehindProxies:
    """ASGI middleware around the whole app: uses the forwarded headers of ``proxies`` and ignores all others.

    ``proxies``: addresses or networks, or only ``*`` for all.
    """

    def __init__(self, app: App, proxies: Sequence[str]) -> None:
        # uvicorn's middleware replaces the proxy's address with the client's, so check trust before that.
        self.app: Any = ProxyHeadersMiddleware(cast(Any, app), trusted_hosts=list(proxies))
        self._all = "*" in proxies
        self._networks = [ipaddress.ip_network(proxy) for proxy in proxies if proxy != "*"]

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and self._trusts(scope.get("client")):
            scope[KEY] = {
                name.decode("latin-1").lower(): value.decode("latin-1").strip()
                for name, value in scope["headers"]
                if name.decode("latin-1").lower() in NAMES
            }
        await self.app(scope, receive, send)

    def _trusts(self, peer: Sequence[Any] | None) -> bool:
        if self._all:
            return True
        try:
            address = ipaddress.ip_address(peer[0] if peer else "")
        except ValueError:
            return False
        return any(address in network for network in self._networks)


def public_address(scope: Scope, host: str) -> PublicAddress:
    """The address that the client used: from the headers of a trusted proxy, or else ``host``.

    Raises ``ForwardedError`` for an invalid header of a trusted proxy.
    """
    told = scope.get(KEY, {})
    # Each proxy in a chain may append its value. The last one is from the trusted proxy.
    last = {name: value.rpartition(",")[2].strip() for name, value in told.items()}
    given = last.get("x-forwarded-host", "")
    if given and re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?", given) is None:
        raise ForwardedError(
            f"X-Forwarded-Host cannot be used: {given[:100]!a}. It must be a name or an address, with or "
            "without a port. Correct the configuration of the proxy."
        )
    port = last.get("x-forwarded-port", "")
    if port and not (re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 65536):
        raise ForwardedError(
            f"X-Forwarded-Port cannot be used: {port[:100]!a}. It must be a number from 1 to 65535. "
            "Correct the configuration of the proxy."
        )
    prefix = last.get("x-forwarded-prefix", "").rstrip("/")
    if prefix and (
        re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", prefix) is None or {".", ".."} & {*prefix.split("/")}
    ):
        raise ForwardedError(
            f"X-Forwarded-Prefix cannot be used: {prefix[:100]!a}. It must be a path such as /draw, of "
            "letters, digits and . _ ~ - between slashes. Correct the configuration of the proxy."
        )
    name, own_port = split_port(given or host)
    # A load balancer behind a TLS terminator reports its own HTTP port, which the client did not use.
    if own_port is None and port and int(port) not in _ports_of_others(scope["scheme"]):
        own_port = int(port)
    if own_port is not None and own_port != DEFAULT_PORTS.get(scope["scheme"]):
        name = f"{name}:{own_port}"
    return PublicAddress(name, prefix)


def _ports_of_others(scheme: str) -> set[int]:
    """Default ports of all schemes except ``scheme``. Its clients do not use them."""
    return {port for other, port in DEFAULT_PORTS.items() if other != scheme}


def split_port(host: str) -> tuple[str, int | None]:
    """Splits a Host header into name and port. The port is None if there is none."""
    name, colon, port = host.rpartition(":")
    is_port = port.isdecimal() and len(port) < 6 and (":" not in name or name.startswith("["))
    if not colon or not is_port:
        return host.removesuffix(":"), None
    return name, int(port)


def is_origin_of(origin: str, host: str) -> bool:
    """Whether an Origin header names ``host``. A missing port is the default of the origin's scheme."""
    scheme, _, rest = origin.partition("://")
    default = DEFAULT_PORTS.get(scheme.lower())
    (ours, our_port), (theirs, their_port) = split_port(host), split_port(rest)
    return bool(rest) and (ours.lower(), our_port or default) == (theirs.lower(), their_port or default)

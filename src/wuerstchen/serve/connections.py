"""Limits connections, in total and per address, and closes idle and slow ones.

Anybody who reaches the port can open connections before any token is checked. Each takes a file descriptor,
which the service also needs to save images and to talk to its workers.
"""

import ipaddress
import json
from collections.abc import Callable, Sequence
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from wuerstchen.errors import UserError

MAX_CONNECTIONS = 4096
MAX_PER_ADDRESS = 512
RESERVED_DESCRIPTORS = 256
"""Reserved for the workers' pipes, open files, and accepted connections that are not counted yet."""
WRITE_SECONDS = 30.0
MIN_BYTES_PER_SECOND = 1024
"""A client that reads its answer more slowly than this over ``WRITE_SECONDS`` is disconnected."""
ACCEPTED_AT_ONCE = 32
"""Connections that the event loop accepts before they are counted. Covered by ``RESERVED_DESCRIPTORS``."""

FULL = {
    "error": {
        "message": "Too many connections are open, in total or from your address. Close some, or try again "
        "in a few seconds.",
        "type": "server_error",
        "param": None,
        "code": None,
    }
}


class Connections:
    """The open connections of one server.

    A new connection over a limit replaces an idle one: one from its own address if that is over its limit,
    otherwise one from the address with the most connections. If none is idle, the new one is refused.
    """

    def __init__(
        self,
        max_total: int,
        max_per_address: int,
        *,
        request_timeout: float,
        proxies: Sequence[str] = (),
        refused: Callable[[], object] = lambda: None,
    ) -> None:
        """``request_timeout``: seconds that an idle connection may take to send its next request.

        ``proxies``: addresses and networks without a limit, or ``*``, because many clients are behind them.
        ``refused`` is called for each refused connection.
        """
        self.max_total = max_total
        self.max_per_address = max_per_address
        self.request_timeout = request_timeout
        self._refused = refused
        self._all_proxies = "*" in proxies
        self._proxies = [ipaddress.ip_network(proxy) for proxy in proxies if proxy != "*"]
        self._by_address: dict[str, dict[Connection, None]] = {}
        """Oldest first."""
        self._total = 0

    def __len__(self) -> int:
        return self._total

    def admit(self, connection: "Connection") -> bool:
        """Counts a new connection. Returns False if there is no room for it."""
        address = connection.address
        own = self._by_address.get(address, {})
        if len(own) >= self.max_per_address and not self._is_proxy(connection):
            victim = _idle(own)
        elif self._total >= self.max_total:
            fullest = max(self._by_address.values(), key=len)
            victim = _idle(fullest) or next(filter(None, map(_idle, self._by_address.values())), None)
        else:
            victim = connection  # there is room
        if victim is None:
            self._refused()
            return False
        if victim is not connection:
            self.remove(victim)
            victim.transport.abort()
        self._by_address.setdefault(address, {})[connection] = None
        self._total += 1
        return True

    def remove(self, connection: "Connection") -> None:
        """Removes a closed connection. Does nothing if it is not counted."""
        own = self._by_address.get(connection.address, {})
        if connection in own:
            del own[connection]
            self._total -= 1
            if not own:
                del self._by_address[connection.address]

    def sweep(self, now: float, connections: Sequence["Connection"]) -> None:
        """Closes connections that send no request and those that do not read their answer.

        uvicorn would wait for both forever. ``now``: monotonic time.
        """
        for connection in connections:
            if connection.stalls(now):
                connection.transport.abort()
            elif connection.idle_seconds(now) > self.request_timeout:
                connection.transport.close()

    def _is_proxy(self, connection: "Connection") -> bool:
        if self._all_proxies:
            return True
        try:
            address = ipaddress.ip_address(connection.client[0] if connection.client else "")
        except ValueError:
            return False
        return any(address in network for network in self._proxies)


class Connection(H11Protocol):
    """A uvicorn connection that is counted. ``counted_in`` sets ``limiter``."""

    limiter: Connections

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.address = ""
        self._admitted = False
        self._idle_of: Any = None
        self._idle_since: float | None = None
        self._unsent: tuple[float, int] | None = None
        """When the client started to read too slowly, and how many bytes were unsent at that time."""

    def connection_made(self, transport: Any) -> None:
        peer = transport.get_extra_info("peername")
        self.address = network_of(peer[0] if peer else "")
        self.transport = transport
        self.client = (str(peer[0]), int(peer[1])) if peer else None
        if not self.limiter.admit(self):
            body = json.dumps(FULL).encode()
            head = (
                "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 5\r\n"
                f"connection: close\r\ncontent-length: {len(body)}\r\n\r\n"
            )
            transport.write(head.encode() + body)
            transport.close()
            return
        self._admitted = True
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.limiter.remove(self)
        if self._admitted:
            super().connection_lost(exc)

    @property
    def is_idle(self) -> bool:
        """Whether there is no open request and the last answer has been sent."""
        is_answered = self.cycle is None or self.cycle.response_complete
        return is_answered and not self.transport.get_write_buffer_size()

    def idle_seconds(self, now: float) -> float:
        """For how long there has been no open request, in seconds. Call it regularly."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._idle_since = None
        elif self._idle_since is None or self._idle_of is not self.cycle:
            self._idle_since, self._idle_of = now, self.cycle
        return 0.0 if self._idle_since is None else now - self._idle_since

    def stalls(self, now: float) -> bool:
        """Whether the client reads its answer too slowly. Call it regularly."""
        size = self.transport.get_write_buffer_size()
        if not size:
            self._unsent = None
        elif self._unsent is None or size > self._unsent[1]:
            self._unsent = (now, size)
        elif now - self._unsent[0] > WRITE_SECONDS:
            enough = min(self._unsent[1], int(WRITE_SECONDS * MIN_BYTES_PER_SECOND))
            if self._unsent[1] - size < enough:
                return True
            self._unsent = (now, size)
        return False


def counted_in(limiter: Connections) -> type[Connection]:
    """A uvicorn protocol class whose connections are counted in ``limiter``."""
    return type("Connection", (Connection,), {"limiter": limiter})


def network_of(address: str) -> str:
    """The unit of limits per address: an IPv4 address, or the /64 network of an IPv6 address."""
    try:
        known = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if known.version == 4:
        return str(known)
    if known.ipv4_mapped is not None:
        return str(known.ipv4_mapped)
    return str(ipaddress.ip_network((known, 64), strict=False))


def raise_descriptor_limit(connections: int | None) -> None:
    """Raises the file descriptor limit of this process to what the connections need, as far as allowed."""
    resource = _resource()
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = (connections or MAX_CONNECTIONS) + RESERVED_DESCRIPTORS
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def allowed_connections(wanted: int | None) -> int:
    """The number of connections that the file descriptor limit allows, at most ``wanted``.

    ``wanted``: None for as many as fit, up to ``MAX_CONNECTIONS``. Raises ``UserError`` if fewer fit than
    wanted.
    """
    resource = _resource()
    soft = -1 if resource is None else resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if resource is None or soft == resource.RLIM_INFINITY:
        return wanted or MAX_CONNECTIONS
    fit = max(soft - RESERVED_DESCRIPTORS, soft // 4)
    if wanted is not None and wanted > fit:
        raise UserError(
            f"max_connections is too large for the file descriptor limit: {wanted}. The limit of {soft} "
            f"allows {fit} connections. Raise the limit (ulimit -n), or lower --max-connections."
        )
    return min(wanted or MAX_CONNECTIONS, fit)


def _resource() -> Any:
    try:
        import resource
    except ModuleNotFoundError:  # Windows has no such limit
        return None
    return resource


def _idle(connections: dict[Connection, None]) -> Connection | None:
    """The oldest connection without any request, else the oldest without an open one, else None."""
    idle = [connection for connection in connections if connection.is_idle]
    return next((connection for connection in idle if connection.cycle is None), idle[0] if idle else None)

"""Runs the service behind uvicorn until a signal stops it."""

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import uvicorn

from wuerstchen.errors import UserError
from wuerstchen.serve.app import make_app
from wuerstchen.serve.connections import (
    ACCEPTED_AT_ONCE,
    MAX_PER_ADDRESS,
    Connections,
    allowed_connections,
    counted_in,
    raise_descriptor_limit,
)
from wuerstchen.serve.limits import ServeConfig
from wuerstchen.serve.logs import set_up_logs
from wuerstchen.serve.service import Service
from wuerstchen.serve.stopping import CLOSING_SECONDS, Deadline, threads_hang

WAITING_CONNECTIONS = 1024
"""Connections that wait in the kernel to be accepted."""
UNSENT_BYTES = 128 * 1024
"""Unsent bytes per connection in the kernel. Connections inherit it from the listening socket."""
SERVICE_THREADS = ("save", "asyncio")
"""Name prefixes of the service's threads. Some run code outside its control, such as filters."""


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, connections: Connections) -> None:
        super().__init__(config)
        self.connections = connections

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # asyncio accepts up to ``backlog`` connections at once, so it is small. Let bursts wait in the
        # kernel.
        for listening in sockets or []:
            listening.listen(WAITING_CONNECTIONS)

    async def on_tick(self, counter: int) -> bool:
        if counter % 5 == 0:  # twice a second
            self.connections.sweep(time.monotonic(), cast(Any, list(self.server_state.connections)))
        return await super().on_tick(counter)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to ``run``, which drains the queue first."""
        yield


def run(config: ServeConfig, announce: Callable[[str], object] = print) -> None:
    """Serves until SIGTERM or Ctrl-C, then finishes running jobs. A second signal cuts that short.

    After a signal the process ends within the grace time, by force and with exit code 1 if something hangs.
    ``announce`` is called with the address when the model is ready. Raises ``UserError`` if the service
    cannot start.
    """
    set_up_logs()
    raise_descriptor_limit(config.max_connections)
    allowed_connections(config.max_connections)  # raises before anything is started
    with listen(config.host, config.port) as listening:
        service = Service(config)
        deadline = Deadline(service.kill)
        try:
            asyncio.run(_run(service, listening, announce, deadline))
        finally:
            if not threads_hang(SERVICE_THREADS):
                deadline.cancel()


async def _run(
    service: Service, listening: socket.socket, announce: Callable[[str], object], deadline: Deadline
) -> None:
    server = make_server(service)
    grace = service.config.grace
    loop = asyncio.get_running_loop()
    stopping: list[asyncio.Task[None]] = []

    signals = 0

    async def stop(end: float) -> None:
        await service.drain()
        # How long uvicorn waits for open connections.
        left: Any = max(0.1, min(5.0, (end - time.monotonic()) / 3))
        server.config.timeout_graceful_shutdown = left
        server.should_exit = True

    def on_signal(end: float) -> None:
        if stopping:
            server.should_exit = server.force_exit = True
        else:
            stopping.append(asyncio.create_task(stop(end)))

    def handle(*_: object) -> None:
        nonlocal signals
        signals += 1
        seconds = grace if signals == 1 else min(grace, CLOSING_SECONDS)
        deadline.set(seconds)
        loop.call_soon_threadsafe(on_signal, time.monotonic() + seconds)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        await service.start()
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        started = asyncio.create_task(service.started.wait())
        await asyncio.wait([started, serving], return_when=asyncio.FIRST_COMPLETED)
        started.cancel()
        if service.failed is not None:
            server.should_exit = True
        elif not service.draining:
            announce(f"serving on {address(listening)}")
        await serving
    finally:
        try:
            await service.stop()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
    if service.failed is not None:
        raise UserError(service.failed)


def make_server(service: Service, **options: Any) -> uvicorn.Server:
    """A uvicorn server for the service. Pass its sockets to ``serve``."""
    config = service.config
    max_connections = allowed_connections(config.max_connections)
    connections = Connections(
        max_connections,
        config.max_connections_per_address or min(MAX_PER_ADDRESS, max(1, max_connections // 2)),
        request_timeout=config.body_timeout,
        proxies=config.proxies,
        refused=service.metrics.refusals.labels("connections").inc,
    )
    return _Server(
        uvicorn.Config(
            make_app(service),
            http=counted_in(connections),
            ws="none",
            lifespan="off",
            access_log=False,  # paths contain the names of jobs and images, which are secret
            log_config=None,
            server_header=False,
            proxy_headers=False,  # ``BehindProxies`` reads them
            timeout_graceful_shutdown=5,
            timeout_keep_alive=15,
            backlog=ACCEPTED_AT_ONCE,
            **options,
        ),
        connections,
    )


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises ``UserError`` if the address is not available."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY only if the protocol is given. Without it, answers wait 40 ms for an ACK.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            # Otherwise the kernel buffers megabytes before we notice that a client reads nothing.
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        listening.bind((host, port))
    except (OSError, TypeError) as error:  # TypeError: a name that IDNA cannot encode
        listening.close()
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"address {host}:{port} is not available ({reason}). Choose another --port or --host."
        ) from error
    return listening


def address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"

"""How many requests a client may send: a token bucket for each client, in bounded memory."""

import time
from collections import OrderedDict
from collections.abc import Callable

BURST_SECONDS = 4.0
"""After a pause, a client may send this many seconds' worth of requests at once."""
MIN_BURST = 30
"""Smallest burst. The page itself loads about twenty files."""
MAX_CLIENTS = 20_000
"""How many clients are remembered. Beyond that, the least recently active client is forgotten."""


class RequestRate:
    """Token buckets of size ``burst``, refilled at ``per_second``. A request takes one token.

    Stores only the time at which each client's bucket will be full again, and nothing for full buckets. This
    is the generic cell rate algorithm (ITU-T I.371).
    """

    def __init__(
        self, per_second: float, clock: Callable[[], float] = time.monotonic, max_clients: int = MAX_CLIENTS
    ) -> None:
        """``per_second``: 0 for no limit. ``clock``: a monotonic clock in seconds."""
        self.per_second = per_second
        self.burst = max(MIN_BURST, int(BURST_SECONDS * per_second))
        self._clock = clock
        self._max_clients = max_clients
        self._full_at: OrderedDict[str, float] = OrderedDict()
        """Time by ``clock``, for each client. The most recently active client is last."""

    def __len__(self) -> int:
        """Number of clients that are remembered."""
        return len(self._full_at)

    def take(self, client: str) -> float:
        """Takes a token and returns 0, or returns the seconds until the next token if there is none."""
        if not self.per_second:
            return 0.0
        now = self._clock()
        full_at = max(self._full_at.get(client, now), now) + 1 / self.per_second
        wait = full_at - now - self.burst / self.per_second
        # Ignore rounding errors of the sums.
        allowed = wait < 1e-6
        if allowed:
            self._full_at[client] = full_at
        self._full_at.move_to_end(client)
        self._forget(now)
        return 0.0 if allowed else wait

    def _forget(self, now: float) -> None:
        """Drops the oldest buckets while they are full or there are too many."""
        while self._full_at:
            client, full_at = next(iter(self._full_at.items()))
            if full_at > now and len(self._full_at) <= self._max_clients:
                return
            del self._full_at[client]

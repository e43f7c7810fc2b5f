"""How many requests a client may send: a token bucket for each client, in bounded memory."""

import time
from collections import OrderedDict
from collections.abc import Callable

BURST_SECONDS = 4.0
"""A client that was quiet may send the requests of so many seconds at once,"""
LEAST_BURST = 30
"""and never fewer than this: the page itself is some twenty files."""
MAX_CLIENTS = 20_000
"""Clients whose buckets are not full, that are remembered. Beyond that, the one that was quiet for longest is
forgotten."""


class RequestRate:
    """Buckets of ``burst`` tokens, which fill up by ``per_second``. A request takes one token.

    Of each client only the time at which its bucket is full again is kept, and nothing of a full one. This is
    the generic cell rate algorithm (ITU-T I.371).
    """

    def __init__(
        self, per_second: float, clock: Callable[[], float] = time.monotonic, max_clients: int = MAX_CLIENTS
    ) -> None:
        """``per_second``: 0 is no limit. ``clock`` counts seconds and never goes back."""
        self.per_second = per_second
        self.burst = max(LEAST_BURST, int(BURST_SECONDS * per_second))
        self._clock = clock
        self._max_clients = max_clients
        self._full_at: OrderedDict[str, float] = OrderedDict()
        """By ``clock``; whoever asked last is at the end."""

    def __len__(self) -> int:
        """Clients that are remembered."""
        return len(self._full_at)

    def take(self, client: str) -> float:
        """Takes a token. Returns 0, or how many seconds there is none yet; then none is taken."""
        if not self.per_second:
            return 0.0
        now = self._clock()
        full_at = max(self._full_at.get(client, now), now) + 1 / self.per_second
        wait = full_at - now - self.burst / self.per_second
        # Sums of floats: what is less than rounding is no wait.
        allowed = wait < 1e-6
        if allowed:
            self._full_at[client] = full_at
        self._full_at.move_to_end(client)
        self._forget(now)
        return 0.0 if allowed else wait

    def _forget(self, now: float) -> None:
        """Drops full buckets, as far as they were used before all others, and what is too many."""
        while self._full_at:
            client, full_at = next(iter(self._full_at.items()))
            if full_at > now and len(self._full_at) <= self._max_clients:
                return
            del self._full_at[client]

"""Heartbeats between the processes of a run, and a barrier without a time limit.

A process that waits for a dead one in NCCL does not notice: it waits for the timeout, which has to be long
because rank 0 draws previews and reads checkpoints alone. So a thread of each process increments a counter in
torch's store every few seconds, and another one ends the process if a counter has not moved for a minute.
"""

import contextlib
import datetime
import os
import sys
import threading
import time
from collections.abc import Iterator

import torch.distributed as dist

TICK = 5.0  # seconds
TICKS = 12
"""Ticks without a heartbeat until a process counts as dead. A suspended machine does not tick."""
POLL = 1.0  # seconds between two looks at the barrier, at most


@contextlib.contextmanager
def monitor_peers(rank: int, count: int) -> Iterator[None]:
    """Ends this process with exit code 2 and a line on stderr if another of the ``count`` processes dies.

    Needs a process group that was initialised from the environment. Files that are being written are left as
    after a kill.
    """
    ended = threading.Event()
    counts: list[bytes] = []
    threads = (
        threading.Thread(target=_beat, args=(rank, count, counts, ended), daemon=True),
        # A thread of its own: the first one hangs if the process with the store has died.
        threading.Thread(target=_monitor, args=(rank, count, counts, ended), daemon=True),
    )
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()


def _beat(rank: int, count: int, counts: list[bytes], ended: threading.Event) -> None:
    """Increments this process's counter every tick, and copies the counters of all into ``counts``."""
    names = [str(other) for other in range(count)]
    with contextlib.suppress(RuntimeError):  # the store is gone; the counters stay as they are
        store = _store("heartbeat")
        for name in names:
            store.add(name, 0)  # ``multi_get`` waits for missing keys, so late processes get a counter too
        while not ended.wait(TICK):
            store.add(names[rank], 1)
            counts[:] = store.multi_get(names)


def wait_for_all(name: str, count: int) -> None:
    """Returns when all ``count`` processes have called it with this ``name``, however long that takes.

    If one of them dies, ``monitor_peers`` ends this process.
    """
    store = _store("barriers")
    store.add(name, 1)
    pause = 0.01
    while store.add(name, 0) < count:
        time.sleep(pause)
        pause = min(2 * pause, POLL)


def _store(purpose: str) -> dist.Store:
    """A new connection to the store of the process group, because the existing one may be blocked."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = datetime.timedelta(seconds=TICK * TICKS)
    store = dist.TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)
    return dist.PrefixStore(f"{purpose} {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _monitor(rank: int, count: int, counts: list[bytes], ended: threading.Event) -> None:
    """Ends this process if a counter has not moved for ``TICKS`` ticks."""
    before: list[bytes] = []
    still = [0] * count
    while not ended.wait(TICK):
        now = list(counts)
        for other in range(count):
            still[other] = still[other] + 1 if now[other : other + 1] == before[other : other + 1] else 0
        before = now
        if max(still) < TICKS:
            continue
        # If rank 0 dies, the store goes with it and no counter moves: the first one found is then rank 0.
        lost = still.index(max(still))
        print(  # below the progress bar
            f"\nError: process {lost} of {count} has sent no heartbeat for {TICK * TICKS:.0f} seconds, so "
            f"process {rank} ends too. Start the same command again to resume.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

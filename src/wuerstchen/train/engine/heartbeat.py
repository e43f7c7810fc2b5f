"""Whether the other processes of a run still live, told by threads that no work and no waiting stops; and
meetings of all of them, without a limit of time.

A process that waits for another on GPUs does not see that it has died: NCCL waits as long as it may, and
that has to be long, because the first process draws previews and reads checkpoints alone. So each process
counts up in torch's store every few seconds, and ends itself where another's count has stood still for a
minute.
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
TICKS = 12  # that a count may stand still; counted in ticks, so that a suspended machine is no death
LOOK = 1.0  # seconds between two looks for those who come late to a meeting, at most


@contextlib.contextmanager
def watching_others(rank: int, count: int) -> Iterator[None]:
    """Ends this process with one line and exit code 2 when another of the ``count`` has died meanwhile.

    For inside of a process group that was begun from the environment. What is being written is then left as a
    kill leaves it.
    """
    ended = threading.Event()
    counts: list[bytes] = []
    threads = (
        threading.Thread(target=_count_up, args=(rank, count, counts, ended), daemon=True),
        # On its own, because the first needs the store, which may be what has died.
        threading.Thread(target=_watch, args=(rank, count, counts, ended), daemon=True),
    )
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()


def _count_up(rank: int, count: int, counts: list[bytes], ended: threading.Event) -> None:
    """Adds one to this process's count every tick, and copies those of all into ``counts``."""
    names = [str(other) for other in range(count)]
    with contextlib.suppress(RuntimeError):  # the store has gone, and there is no more news
        store = _store("alive")
        for name in names:
            store.add(name, 0)  # those who are late have a count too: ``multi_get`` waits for what is missing
        while not ended.wait(TICK):
            store.add(names[rank], 1)
            counts[:] = store.multi_get(names)


def meet(name: str, count: int) -> None:
    """Returns when all ``count`` processes have called it with this ``name``, however long that takes.

    ``watching_others`` ends the wait for one that has died.
    """
    store = _store("meetings")
    store.add(name, 1)
    pause = 0.01
    while store.add(name, 0) < count:
        time.sleep(pause)
        pause = min(2 * pause, LOOK)


def _store(purpose: str) -> dist.Store:
    """A connection of our own to the store that the processes have met at: the other may be waiting in it."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    patience = datetime.timedelta(seconds=TICK * TICKS)
    store = dist.TCPStore(address, port, is_master=False, timeout=patience, wait_for_workers=False)
    return dist.PrefixStore(f"{purpose} {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _watch(rank: int, count: int, counts: list[bytes], ended: threading.Event) -> None:
    """Ends this process when a count has stood still."""
    before: list[bytes] = []
    still = [0] * count
    while not ended.wait(TICK):
        now = list(counts)
        for other in range(count):
            still[other] = still[other] + 1 if now[other : other + 1] == before[other : other + 1] else 0
        before = now
        if max(still) < TICKS:
            continue
        # Without the store nothing moves, and it is the first process that has it.
        lost = still.index(max(still))
        print(  # below the progress bar
            f"\nError: process {lost} of {count} has not answered for {TICK * TICKS:.0f} seconds, so process "
            f"{rank} ends too; start the same command again",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

"""The data of a run, as its processes look at them together."""

from collections.abc import Iterable

from wuerstchen.data.prepared import PreparedSet
from wuerstchen.data.prepared_check import DESCRIPTION, mark_verified, verify_newer
from wuerstchen.errors import DataError
from wuerstchen.train.engine.distributed import Processes


def verify_sets(sets: Iterable[PreparedSet], processes: Processes) -> None:
    """Checks the shards of sets that are newer than their ``prepared.json``, each in one process.

    All processes call it, and all raise ``DataError`` where one finds a damaged shard. The processes that see
    the same ``prepared.json`` share the work: a machine may have a copy of its own.
    """
    sets = list(sets)
    described = [(prepared.folder / DESCRIPTION).stat() for prepared in sets]
    mine = [(file.st_ino, file.st_mtime_ns) for file in described]
    found = processes.gathered([(processes.rank, mine)] if mine else [])
    if not found:
        return
    damage: list[str] = []
    verified: list[PreparedSet] = []
    for number, prepared in enumerate(sets):
        ranks = [rank for rank, theirs in found if theirs[number : number + 1] == [mine[number]]]
        place = ranks.index(processes.rank)
        try:
            if verify_newer(prepared.folder, prepared.description, place, len(ranks)) and place == 0:
                verified.append(prepared)
        except DataError as error:
            damage.append(str(error))
    processes.wait_long()
    damage = processes.gathered(damage)
    if damage:
        raise DataError(damage[0])
    for prepared in verified:
        mark_verified(prepared.folder)

"""The data sets of a run: opened and checked, and looked at by all processes together."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from wuerstchen.data.emoji import EmojiSource
from wuerstchen.data.folder import FolderSource
from wuerstchen.data.index import IndexedSource
from wuerstchen.data.open import is_folder_of_images, open_source
from wuerstchen.data.prepared import PreparedSet
from wuerstchen.data.prepared_check import DESCRIPTION, mark_verified, verify_newer
from wuerstchen.data.sources import Source
from wuerstchen.errors import DataError, UserError
from wuerstchen.train.config import Phase, Recipe
from wuerstchen.train.engine.distributed import Processes
from wuerstchen.train.feed.prepared import (
    PreparedFeed,
    refuse_prepared,
)
from wuerstchen.train.overview import (
    refuse_small,
)
from wuerstchen.train.stage_table import trained_kinds, trained_phases


def phases_read(recipe: Recipe) -> list[Phase]:
    """Those of all stages that are trained, without refinements, which read what others read."""
    return [named.phase for named in trained_phases(recipe) if named.path]


def folder_around(data: str, recipe: Recipe) -> Path | None:
    """The largest folder of pictures that a phase reads and ``data`` lies in: what one phase holds out of it
    is not to be trained on in another."""
    folders = [Path(phase.data or recipe.data).resolve() for phase in phases_read(recipe)]
    outer = [folder for folder in folders if folder in Path(data).resolve().parents]
    found = [folder for folder in outer if is_folder_of_images(str(folder))]
    return min(found, key=lambda folder: len(folder.parts), default=None)


def _opened(data: str, recipe: Recipe, begun: Recipe) -> Source | PreparedSet:
    """The training part of a data set that ``recipe`` names. ``begun`` is as in ``open_sources``."""
    return open_source(
        data,
        around=folder_around(data, begun),
        image_column=recipe.image_column or None,
        text_column=recipe.text_column or None,
        verify=False,
    )


def open_sources(recipe: Recipe, begun: Recipe | None = None) -> dict[str, Source | PreparedSet]:
    """The data sets of all phases, by the name that the recipe gives them. Refuses what they cannot serve.

    Prepared sets are still to be verified, by all processes together (``verify_sets``).

    ``begun`` is the recipe that the run was begun with, if it is another: what its phases hold out of each
    other's data stays held out.
    """
    sources: dict[str, Source | PreparedSet] = {}
    for phase in phases_read(recipe):
        data = phase.data or recipe.data
        source = sources.get(data)
        if source is None:
            source = sources[data] = _opened(data, recipe, begun or recipe)
        if phase.max_ratio > 1 and isinstance(source, EmojiSource):
            raise UserError(
                f"max_ratio={phase.max_ratio} needs photographs: emoji are composed as squares; use 1"
            )
        if isinstance(source, PreparedSet):
            for kind in trained_kinds(recipe):
                refuse_prepared(data, kind.needs_images, recipe.prepared_images)
    for data, source in sources.items() if not recipe.prepared_images else ():
        whole = isinstance(source, PreparedSet)
        refuse_small(recipe, data, len(source.rows("train")) if whole else len(source), whole)
    if recipe.stored_texts == "states" and not any(isinstance(s, PreparedSet) for s in sources.values()):
        raise UserError(
            f"stored_texts=states needs a prepared set, and data={recipe.data} is none; use tokens"
        )
    _check_skipped(recipe, sources, begun or recipe)
    return sources


def _check_skipped(recipe: Recipe, sources: dict[str, Source | PreparedSet], begun: Recipe) -> None:
    """Raises ``UserError`` for a name that is no image's: also not one of data that the run was ``begun``
    with and no longer reads."""
    missing = set(recipe.skip)
    for source in all_sources(begun, sources) if missing else ():
        missing -= {source.name(item) for item in range(len(source))}
        if not missing:
            return
    if missing:
        raise UserError(
            f"skip={min(missing)} is no image of {recipe.data}. Images are named as in log.jsonl, by their "
            "place in the folder as a rule"
        )


def all_sources(begun: Recipe, sources: dict[str, Source | PreparedSet]) -> Iterator[Source | PreparedSet]:
    """The data sets of the recipe that a run was begun with, by falling batch size of their phases.

    Those that the run no longer reads are not in ``sources``, and are opened when it is their turn.
    """
    phases = sorted(phases_read(begun), key=lambda phase: -phase.optimization.batch_size)
    for name in dict.fromkeys(phase.data or begun.data for phase in phases):
        yield sources.get(name) or _opened(name, begun, begun)


def first_converted(sources: Iterable[Source | PreparedSet], rank: int, count: int) -> str | None:
    """An image of a process's part whose colours its profile changes, if there is one."""
    folders = (source for source in sources if isinstance(source, FolderSource))
    return next(filter(None, (source.converted(rank, count) for source in folders)), None)


def left_out(source: Source | PreparedSet) -> Iterator[tuple[str, str]]:
    """Name and reason of what a data set holds and training cannot use."""
    if isinstance(source, IndexedSource):
        yield from source.left_out()
    for name in source.without_caption if isinstance(source, FolderSource) else ():
        yield name, "its caption is empty"


def repeats_images(recipe: Recipe, sources: dict[str, Source | PreparedSet]) -> bool:
    """Whether sizes of a prepared set have fewer images than a batch of a phase that reads it."""
    for phase in phases_read(recipe):
        source, optimization = sources[phase.data or recipe.data], phase.optimization
        if isinstance(source, PreparedSet):
            feed = PreparedFeed(source, 0, optimization.images, optimization.batch_size)
            if feed.plan.small:
                return True
    return False


def fingerprint_of(recipe: Recipe, sources: dict[str, Source | PreparedSet]) -> str:
    """Of all data of the recipe that a run was begun with: that of the only set, or one of all of them.

    It depends on their order. A set that the run no longer reads is opened for it.
    """
    found = list(dict.fromkeys(source.fingerprint() for source in all_sources(recipe, sources)))
    return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()


def verify_sets(sets: Iterable[PreparedSet], processes: Processes) -> None:
    """Checks the shards of sets that are newer than their ``prepared.json``, each in one process.

    All processes call it, and all raise ``DataError`` where one finds a damaged shard. The processes that see
    the same ``prepared.json`` share the work: a machine may have a copy of its own.
    """
    sets = list(sets)
    described = [(prepared.folder / DESCRIPTION).stat() for prepared in sets]
    mine = [(file.st_ino, file.st_mtime_ns) for file in described]
    found = processes.all_gather([(processes.rank, mine)] if mine else [])
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
    processes.barrier_without_timeout()
    damage = processes.all_gather(damage)
    if damage:
        raise DataError(damage[0])
    for prepared in verified:
        mark_verified(prepared.folder)

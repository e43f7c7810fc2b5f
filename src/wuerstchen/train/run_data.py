"""Opens and checks the data sets of a run."""

import hashlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from wuerstchen.data.caption_files import CaptionFile
from wuerstchen.data.emoji import EmojiSource
from wuerstchen.data.folder import FolderSource
from wuerstchen.data.index import IndexedSource
from wuerstchen.data.mixture import MixedSource, named_parts, names_of
from wuerstchen.data.open import is_folder_of_images, open_source
from wuerstchen.data.prepared import PreparedSet
from wuerstchen.data.prepared_check import DESCRIPTION, mark_verified, verify_newer
from wuerstchen.data.sources import Source, Subset
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
    """The phases of all trained stages."""
    return [named.phase for named in trained_phases(recipe)]


def folder_around(data: str, recipe: Recipe) -> Path | None:
    """The outermost folder of images that contains ``data`` and that a phase reads. Its held-out images must
    not be trained on in any phase."""
    names = dict.fromkeys(phase.data or recipe.data for phase in phases_read(recipe))
    folders = [Path(part).resolve() for name in names for part in names_of(name)]
    outer = [folder for folder in folders if folder in Path(data).resolve().parents]
    found = [folder for folder in outer if is_folder_of_images(str(folder))]
    return min(found, key=lambda folder: len(folder.parts), default=None)


def open_subset(data: str, subset: Subset, recipe: Recipe, begun: Recipe) -> Source | PreparedSet:
    """The training images or the held-out images of a data set of ``recipe``.

    ``begun`` is as in ``open_sources``. Prepared sets are not verified.
    """
    return open_source(
        data,
        subset,
        around=partial(folder_around, recipe=begun),
        image_column=recipe.image_column or None,
        text_column=recipe.text_column or None,
        caption=recipe.caption,
        held_out=recipe.held_out,
        verify=False,
        captions=recipe.captions,
    )


def open_training_images(recipe: Recipe) -> Source | PreparedSet:
    """The training split of a recipe's own data set."""
    return open_subset(recipe.data, "train", recipe, recipe)


def open_sources(recipe: Recipe, begun: Recipe | None = None) -> dict[str, Source | PreparedSet]:
    """The data sets of all phases by their names in the recipe. Raises ``UserError`` for a recipe that does
    not suit them.

    Prepared sets are not verified yet: all ranks do that together (``verify_sets``).

    ``begun`` is the recipe that the run was started with, if it was changed. What its phases hold out of each
    other's data stays held out.
    """
    sources: dict[str, Source | PreparedSet] = {}
    for phase in phases_read(recipe):
        data = phase.data or recipe.data
        source = sources.get(data)
        if source is None:
            source = sources[data] = open_subset(data, "train", recipe, begun or recipe)
        for name, part in named_parts(data, source):
            if phase.max_ratio > 1 and isinstance(part, EmojiSource):
                raise UserError(
                    f"max_ratio must be 1 for emoji, which are drawn as squares, got {phase.max_ratio}."
                )
            if isinstance(part, CaptionFile):
                _refuse_captions(name, recipe)
        if isinstance(source, PreparedSet):
            for kind in trained_kinds(recipe):
                refuse_prepared(data, kind.needs_images, recipe.prepared_images, recipe.mirrored)
    for data, source in sources.items() if not recipe.prepared_images else ():
        whole = isinstance(source, PreparedSet)
        refuse_small(recipe, data, len(source.rows("train")) if whole else len(source), whole)
    if recipe.stored_texts == "states" and not any(isinstance(s, PreparedSet) for s in sources.values()):
        raise UserError(
            f"stored_texts=states needs a prepared set, got data={recipe.data}. Use stored_texts=tokens."
        )
    _check_skipped(recipe, sources, begun or recipe)
    return sources


def _refuse_captions(data: str, recipe: Recipe) -> None:
    """Raises ``UserError`` if a stage reads more than captions."""
    for kind in trained_kinds(recipe):
        if kind.reads_images:
            raise UserError(
                f"data={data} has captions without images, and stage {kind.short} reads images. Use a data "
                "set with images, or --stages few."
            )


def _check_skipped(recipe: Recipe, sources: dict[str, Source | PreparedSet], begun: Recipe) -> None:
    """Raises ``UserError`` for a name in ``skip`` that no image has, including data that only the recipe
    ``begun`` reads."""
    missing = set(recipe.skip)
    for source in all_sources(begun, sources) if missing else ():
        missing -= {source.name(item) for item in range(len(source))}
        if not missing:
            return
    if missing:
        raise UserError(
            f"skip={min(missing)} is not an image of {recipe.data}. Use a name from log.jsonl, usually the "
            "path inside the data folder."
        )


def all_sources(begun: Recipe, sources: dict[str, Source | PreparedSet]) -> Iterator[Source | PreparedSet]:
    """The data sets of the recipe that a run was started with, by decreasing batch size of their phases.

    Data sets that the run no longer reads are not in ``sources``. They are opened when their turn comes.
    """
    phases = sorted(phases_read(begun), key=lambda phase: -phase.optimization.batch_size)
    for name in dict.fromkeys(phase.data or begun.data for phase in phases):
        yield sources.get(name) or open_subset(name, "train", begun, begun)


def first_converted(sources: Iterable[Source | PreparedSet], rank: int, count: int) -> str | None:
    """An image in this rank's part of the data whose colour profile changes it, or None."""
    parts = (part for source in sources for _, part in named_parts("", source))
    folders = (part for part in parts if isinstance(part, FolderSource))
    return next(filter(None, (source.converted(rank, count) for source in folders)), None)


def left_out(source: Source | PreparedSet) -> Iterator[tuple[str, str]]:
    """Names of the images of a data set that training cannot use, with the reason."""
    for data, part in named_parts("", source):
        start = f"{data}: " if data else ""
        found = part.left_out() if isinstance(part, IndexedSource) else ()
        yield from ((f"{start}{name}", reason) for name, reason in found)
        for name in part.without_caption if isinstance(part, FolderSource) else ():
            yield f"{start}{name}", "its caption is empty"


def repeats_images(recipe: Recipe, sources: dict[str, Source | PreparedSet]) -> bool:
    """Whether a size of a prepared set has fewer images than a batch of a phase that reads it."""
    for phase in phases_read(recipe):
        source, optimization = sources[phase.data or recipe.data], phase.optimization
        if isinstance(source, PreparedSet):
            feed = PreparedFeed(source, 0, optimization.images, optimization.batch_size)
            if feed.plan.small:
                return True
    return False


def fingerprint_of(recipe: Recipe, sources: dict[str, Source | PreparedSet]) -> str:
    """The fingerprint of all data of the recipe that a run was started with.

    For several sets it depends on their order. Sets that the run no longer reads are opened too.
    """
    found = list(dict.fromkeys(source.fingerprint() for source in all_sources(recipe, sources)))
    return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()


def sets_of(recipe: Recipe, sources: dict[str, Source | PreparedSet]) -> list[dict[str, str | int]]:
    """The data sets of the recipe that a run was started with: name, number of images, and fingerprint of
    each part of a mixture. They say which one has changed."""
    found: list[dict[str, str | int]] = []
    names = dict.fromkeys(phase.data or recipe.data for phase in phases_read(recipe))
    for name in names:
        source = sources.get(name)
        if isinstance(source, MixedSource):
            parts = zip(source.names, source.parts, source.fingerprints, strict=True)
            found += [{"data": part, "images": len(one), "hash": key} for part, one, key in parts]
        elif source is not None:
            found.append({"data": name, "images": len(source)})
    return found


def verify_sets(sets: Iterable[PreparedSet], processes: Processes) -> None:
    """Checks the shards that are newer than the ``prepared.json`` of their set, each on one rank.

    All ranks call it, and all raise ``DataError`` if one finds a damaged shard. Ranks that see the same
    ``prepared.json`` share the work. Each machine may have its own copy.
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

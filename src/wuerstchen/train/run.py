"""A whole run: the run folder, its stages one after the other, and the model at the end.

DIR/run.json  log.jsonl  lock
DIR/stage_{a,b,b2,a2,c,c2,...}/{checkpoints,previews}/    a folder for each phase that the recipe has
DIR/model/            the averaged weights as a model folder; appears when all stages are done
"""

import dataclasses
import hashlib
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from wuerstchen.checkpoints.files import write_json
from wuerstchen.checkpoints.native import Provenance, write_parts
from wuerstchen.data.emoji import EmojiSource
from wuerstchen.data.folder import FolderSource
from wuerstchen.data.index import IndexedSource
from wuerstchen.data.open import is_folder_of_images, open_source
from wuerstchen.data.plan import stable_hash
from wuerstchen.data.prepared import PreparedSet
from wuerstchen.data.sources import Source
from wuerstchen.defaults import usual_defaults
from wuerstchen.errors import DataError, RunFolderError, UserError
from wuerstchen.models.cascade import PUBLISHED_MAP, CascadeSettings
from wuerstchen.models.text import PromptTooLongWarning
from wuerstchen.pipeline import default_device
from wuerstchen.train.changes import Change, Plan, plan
from wuerstchen.train.config import Phase, Recipe, as_dict
from wuerstchen.train.engine.checkpoint import load_averages, newest_of_all
from wuerstchen.train.engine.distributed import Processes, distributed
from wuerstchen.train.engine.image_cache import Bank, compose
from wuerstchen.train.engine.loop import Settings, rehearse, run_stage
from wuerstchen.train.engine.observe import looked_at
from wuerstchen.train.engine.validation import Denoising, DenoisingTokens, HeldOut, Validation, held_out
from wuerstchen.train.feed.images import Batch, Feed, batch_sizes, batches
from wuerstchen.train.feed.prepared import (
    HeldOutMaps,
    PreparedFeed,
    refuse_prepared,
)
from wuerstchen.train.initial_weights import Start, read_start, reads_captions, reads_text
from wuerstchen.train.overview import (
    kept_images,
    overview,
    print_overview,
    readings,
    refuse_small,
    with_prompts,
)
from wuerstchen.train.precision import HALVES, best_half
from wuerstchen.train.report.announce import Watch, begin, say_cost, say_costs_to_come
from wuerstchen.train.report.events import Log, check_tensorboard
from wuerstchen.train.run_data import verify_sets
from wuerstchen.train.run_folder import (
    ORDER,
    check_colours,
    check_order,
    check_run,
    locked,
    move_changes,
    named,
    read_json,
    read_run,
)
from wuerstchen.train.stage_table import maker_of, trained_kinds, trained_phases
from wuerstchen.train.stages.base import Averages, N, Stage, cascade_settings


def train(
    recipe: Recipe,
    run_dir: Path,
    *,
    device: str | None = None,
    accept_changed_data: bool = False,
    watch: Watch | None = None,
    changes: Sequence[str] = (),
    end_now: bool = False,
) -> Path:
    """Runs a recipe to its end, from wherever the run folder stands. Returns the finished model's folder.

    ``watch`` changes nothing in the result. ``changes``, as ``learning_rate=1e-5``, change a run that has
    begun from its newest checkpoint on; ``end_now`` ends it there. Both are recorded (``train/changes.py``).

    Raises ``RunFolderError`` for a folder that is in use or belongs to another recipe, ``DataError`` for data
    that cannot be used, ``Interrupted`` after a signal.
    """
    watch = watch or Watch()
    if watch.tensorboard:
        check_tensorboard()
    with usual_defaults(), distributed(default_device(device)) as processes:
        given = _resolved(recipe, processes)
        planned = plan(given, read_run(run_dir), run_dir, changes, end_now=end_now)
        return _train(given, planned, run_dir, processes, accept_changed_data, watch)


def _train(
    given: Recipe,
    planned: Plan,
    run_dir: Path,
    processes: Processes,
    accept_changed_data: bool,
    watch: Watch,
) -> Path:
    """Trains by the recipe of ``planned``; ``given`` is compared with what the run was begun with."""
    recipe, begun = planned.recipe, planned.begun
    for phase in readings(recipe):
        processes.check_batches(phase.stage, phase.images, phase.batch_size, phase.accumulate)
    sources = _open_sources(recipe, begun)
    verify_sets([source for source in sources.values() if isinstance(source, PreparedSet)], processes)
    start = read_start(recipe)
    # Of a run that was ended early, ``begun`` has phases with data that are not open.
    recipe = with_prompts(start.resolved(recipe), sources)
    given = dataclasses.replace(start.resolved(given), preview_prompts=recipe.preview_prompts)
    planned = dataclasses.replace(planned, recipe=recipe)
    with locked(run_dir, processes), warnings.catch_warnings():
        # Captions longer than the encoder reads are cut; a line for each would bury everything else.
        warnings.simplefilter("ignore", PromptTooLongWarning)
        try:
            log = Log(run_dir / "log.jsonl", processes.leads, tensorboard=watch.tensorboard)
            run = _Run(recipe, run_dir, sources, start, processes, log)
            for kind in trained_kinds(recipe):
                if kind.check is not None:
                    kind.check(run)
            run.repeats_images = _repeats_images(recipe, sources)
            run.fingerprint = _fingerprint(begun, sources)
            run.changes = planned.changes
            run.begun = begun
            if not processes.alike(run.fingerprint):
                raise DataError(
                    f"process {processes.rank} has other data in {recipe.data!r} than others of this run; "
                    "give all of them the same pictures and captions"
                )
            weights = start.fingerprint() if processes.leads else ""
            data = run.fingerprint
            check_run(given, run_dir, data, weights, log, accept_changed_data, processes, planned)
            if processes.leads and run.repeats_images:
                check_order(run_dir)
            converted = partial(_converted, sources.values())
            check_colours(run_dir, converted, log, accept_changed_data, processes)
            wanted = False
            if processes.leads:
                begin(log, watch)
                run.say_what_is_read()
                rehearsed = any(event["event"] == "rehearsed" for event in log.events())
                wanted = watch.rehearses and not rehearsed
            processes.wait_long()  # for the first, which has looked at the data
            if processes.agreed(wanted)[0]:
                run.rehearse()
            if processes.leads:
                say_costs_to_come(log)
            return run.train()
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise RunFolderError(
                "a process that loads pictures was killed, for lack of memory as a rule; use fewer --workers "
                "and start the same command again"
            ) from error
        except OSError as error:
            raise named(error, run_dir) from error


def _resolved(recipe: Recipe, processes: Processes) -> Recipe:
    """The recipe with every ``auto`` replaced: what it stands for is part of what a run folder keeps."""
    device = processes.device
    gpu = device.type == "cuda"
    if recipe.precision == "auto":
        lacks = gpu and best_half(device) == "fp16"
        half = "fp16" if processes.agreed(lacks)[0] else "bf16"
        recipe = dataclasses.replace(recipe, precision=half if gpu else "fp32")
    shards = recipe.sharding == "full" and processes.count > 1
    # torch 2.11 draws the masks of compiled, recomputed blocks in a way that cannot be recorded.
    repeats_masks = recipe.recompute == "blocks" and _drops_out(recipe)
    if recipe.acceleration == "auto":
        fast = "compile" if shards or repeats_masks else "graph"
        recipe = dataclasses.replace(recipe, acceleration=fast if gpu else "none")
    if recipe.acceleration == "graph" and not gpu:
        raise UserError(f"acceleration=graph records CUDA graphs, and {device} has none; use compile or none")
    if recipe.acceleration == "graph" and shards:
        raise UserError("acceleration=graph records no updates of networks with sharding=full; use compile")
    if recipe.acceleration == "graph" and repeats_masks:
        raise UserError(
            "acceleration=graph records no updates with recompute=blocks and dropout. Use "
            "acceleration=compile, or a dropout of 0."
        )
    return recipe


def _drops_out(recipe: Recipe) -> bool:
    """Whether a network that is trained, and may be recomputed, has dropout."""
    parts = [part for kind in trained_kinds(recipe) for part in kind.makes]
    rates = [getattr(getattr(recipe, part), "dropout", 0) for part in parts]
    return any(max(rate, default=0) if isinstance(rate, tuple) else rate for rate in rates)


def _phases(recipe: Recipe) -> list[Phase]:
    """Those of all stages that are trained, without refinements, which read what others read."""
    return [named.phase for named in trained_phases(recipe) if named.path]


def _around(data: str, recipe: Recipe) -> Path | None:
    """The largest folder of pictures that a phase reads and ``data`` lies in: what one phase holds out of it
    is not to be trained on in another."""
    folders = [Path(phase.data or recipe.data).resolve() for phase in _phases(recipe)]
    outer = [folder for folder in folders if folder in Path(data).resolve().parents]
    found = [folder for folder in outer if is_folder_of_images(str(folder))]
    return min(found, key=lambda folder: len(folder.parts), default=None)


def _opened(data: str, recipe: Recipe, begun: Recipe) -> Source | PreparedSet:
    """The training part of a data set that ``recipe`` names. ``begun`` is as in ``_open_sources``."""
    return open_source(
        data,
        around=_around(data, begun),
        image_column=recipe.image_column or None,
        text_column=recipe.text_column or None,
        verify=False,
    )


def _open_sources(recipe: Recipe, begun: Recipe | None = None) -> dict[str, Source | PreparedSet]:
    """The data sets of all phases, by the name that the recipe gives them. Refuses what they cannot serve.

    Prepared sets are still to be verified, by all processes together (``verify_sets``).

    ``begun`` is the recipe that the run was begun with, if it is another: what its phases hold out of each
    other's data stays held out.
    """
    sources: dict[str, Source | PreparedSet] = {}
    for phase in _phases(recipe):
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
    for source in _all_sources(begun, sources) if missing else ():
        missing -= {source.name(item) for item in range(len(source))}
        if not missing:
            return
    if missing:
        raise UserError(
            f"skip={min(missing)} is no image of {recipe.data}. Images are named as in log.jsonl, by their "
            "place in the folder as a rule"
        )


def _all_sources(begun: Recipe, sources: dict[str, Source | PreparedSet]) -> Iterator[Source | PreparedSet]:
    """The data sets of the recipe that a run was begun with, by falling batch size of their phases.

    Those that the run no longer reads are not in ``sources``, and are opened when it is their turn.
    """
    phases = sorted(_phases(begun), key=lambda phase: -phase.optimization.batch_size)
    for name in dict.fromkeys(phase.data or begun.data for phase in phases):
        yield sources.get(name) or _opened(name, begun, begun)


def _converted(sources: Iterable[Source | PreparedSet], rank: int, count: int) -> str | None:
    """An image of a process's part whose colours its profile changes, if there is one."""
    folders = (source for source in sources if isinstance(source, FolderSource))
    return next(filter(None, (source.converted(rank, count) for source in folders)), None)


def _left_out(source: Source | PreparedSet) -> Iterator[tuple[str, str]]:
    """Name and reason of what a data set holds and training cannot use."""
    if isinstance(source, IndexedSource):
        yield from source.left_out()
    for name in source.without_caption if isinstance(source, FolderSource) else ():
        yield name, "its caption is empty"


def _repeats_images(recipe: Recipe, sources: dict[str, Source | PreparedSet]) -> bool:
    """Whether sizes of a prepared set have fewer images than a batch of a phase that reads it."""
    for phase in _phases(recipe):
        source, optimization = sources[phase.data or recipe.data], phase.optimization
        if isinstance(source, PreparedSet):
            feed = PreparedFeed(source, 0, optimization.images, optimization.batch_size)
            if feed.plan.small:
                return True
    return False


def _fingerprint(recipe: Recipe, sources: dict[str, Source | PreparedSet]) -> str:
    """Of all data of the recipe that a run was begun with: that of the only set, or one of all of them.

    It depends on their order. A set that the run no longer reads is opened for it.
    """
    found = list(dict.fromkeys(source.fingerprint() for source in _all_sources(recipe, sources)))
    return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()


class _Run:
    """One start of a run: what its stages are handed (``stages.base.Run``), and the model that they make."""

    makes_updates = True

    def __init__(
        self,
        recipe: Recipe,
        run_dir: Path,
        sources: dict[str, Source | PreparedSet],
        start: Start,
        processes: Processes,
        log: Log,
    ) -> None:
        self.recipe = recipe
        self.processes = processes
        self.run_dir = run_dir
        self.sources = sources
        self.fingerprint = ""
        self.changes: list[dict[str, Any]] = []
        """Of the recipe since the run was begun."""
        self.begun = recipe
        """What it was begun with."""
        self.repeats_images = False
        """Whether sizes of a prepared set have fewer images than a batch."""
        self.device = processes.device
        self.log = log
        self.start = start
        self.parts = dataclasses.replace(start.parts)
        self.statistics = PUBLISHED_MAP
        if start.settings is not None and start.parts.prior is not None:
            self.statistics = start.settings.map_statistics
        for name, network in self.parts.networks().items():
            maker = maker_of(name)
            if maker is None or maker.short not in recipe.stages:  # others are copied, not used
                network.eval()  # and stay on the CPU until a stage needs them
        self._bank: tuple[tuple[str, int], Bank] | None = None
        self._held_out: dict[tuple[str, int], HeldOut | HeldOutMaps | None] = {}

    def train(self) -> Path:
        began = time.monotonic()
        target = self.run_dir / "model"
        if self.processes.leads and self.has_its_model(target):
            print(
                f"{self.run_dir} is finished already: nothing is left to train, and its model is in {target}"
            )
        self.train_stages()
        if self.processes.leads:
            self.write_model_once(target)
        self.processes.wait_long()
        if not self.processes.leads:
            return target
        self.say_skipped()
        for kind in trained_kinds(self.recipe):
            found = sorted(self.run_dir.glob(f"stage_{kind.short}*/previews/*.png"))
            if kind.reads_captions and found:
                print(f"{found[-1]}: the preview prompts, drawn at the end of Stage {kind.short.upper()}")
        say_cost(self.log)
        self.log.event("end", seconds=round(time.monotonic() - began, 1))
        return target

    def train_stages(self) -> None:
        for kind in trained_kinds(self.recipe):
            kind.train(self)

    def has_its_model(self, target: Path) -> bool:
        """Whether the model by the recipe in force is there."""
        stored = read_json(self.run_dir / "run.json")
        made_with = stored.get("model", {"changes": 0})["changes"]
        return (target / "model.json").exists() and made_with == len(self.changes)

    def write_model_once(self, target: Path) -> None:
        """Writes the model, unless it is there; an older one makes room for it."""
        if self.has_its_model(target):
            return
        if not (target / "model.json").exists():
            self.write_model(target)
        else:
            new, old = self.run_dir / "model.new", self.run_dir / ".model.old"
            self.write_model(new)
            os.replace(target, old)
            os.replace(new, target)
            shutil.rmtree(old, ignore_errors=True)
        if self.changes:
            path = self.run_dir / "run.json"
            write_json(path, {**read_json(path), "model": {"changes": len(self.changes)}})

    def write_model(self, target: Path) -> None:
        recipe, images = self.recipe, dict.fromkeys(self.parts.networks(), 0)
        for phase in trained_phases(recipe):
            for part in phase.trains:
                images[part] = images.get(part, 0) + phase.phase.optimization.images
        provenance = {
            name: self.provenance(images[name])
            if maker.short in recipe.stages
            else self.start.provenance[name]
            for name in self.parts.networks()
            if (maker := maker_of(name)) is not None
        }
        if self.processes.leads and self.start.left_out:
            lost = " and ".join(self.start.left_out)
            print(
                f"{lost} of {recipe.start_from} would not fit what was trained, and the model is without it"
            )
        networks, settings = self.parts.networks(), self.settings_of_model()
        write_parts(
            settings,
            networks,
            target,
            provenance,
            text_encoder=self.start.text_folder,
            further=self.write_results,
        )

    def write_results(self, folder: Path) -> None:
        """Writes what stages have made beside the parts of the model."""
        for kind in trained_kinds(self.recipe):
            if kind.write is not None:
                kind.write(self, folder)

    def settings_of_model(self, image_size: int | None = None) -> CascadeSettings:
        """Those of the parts as they are, with another picture size by choice."""
        settings = cascade_settings(self.recipe, self.statistics, self.start.settings)
        return dataclasses.replace(settings, image_size=image_size or settings.image_size)

    def rehearse(self) -> None:
        """Measures what an image costs in each phase, with networks that are thrown away."""
        with tempfile.TemporaryDirectory() as folder:
            rehearsal = _Rehearsal(
                self.recipe, Path(folder), self.sources, self.start, self.processes, self.log
            )
            rehearsal.train_stages()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def begins(self, name: str) -> bool:
        """Whether a phase starts from nothing, as opposed to from a checkpoint of its own."""
        return not any((self.run_dir / f"stage_{name}" / "checkpoints").glob("[0-9]*"))

    def source(self, phase: Phase) -> Source | PreparedSet:
        """The data set that a phase reads."""
        return self.sources[phase.data or self.recipe.data]

    def measured_source(self) -> Source | PreparedSet:
        """What is measured on: the recipe's data, or of phases that all have others the first."""
        return self.sources.get(self.recipe.data) or next(iter(self.sources.values()))

    def some_images(self, purpose: str, size: int) -> Iterator[Batch]:
        """Training pictures to measure on, in an order of their own."""
        source = self.measured_source()
        assert not isinstance(source, PreparedSet)
        seed = stable_hash(self.recipe.seed, purpose) >> 1
        feed = Feed(source, seed, size, False, skip=self.recipe.skip)
        return batches(feed, 0, self.recipe.statistics_images, 16, self.recipe.workers)

    @torch.no_grad()
    def measured_once(
        self, folder: str, measure: Callable[[], dict[str, Any]], known: dict[str, Any]
    ) -> dict[str, Any]:
        """What ``measure`` finds, kept beside a stage's checkpoints: later starts read it back."""
        path = self.run_dir / folder / "measured.json"
        if self.processes.leads and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, measure())
        self.processes.wait_long()
        again = "remove it, and it will be measured again"
        found = read_json(path, again)
        if not found:
            raise RunFolderError(f"{path} is empty; {again}")
        return found

    def feed(self, stage: Stage, phase: Phase, multiple: int, seed: int) -> Feed | PreparedFeed:
        """The pictures of a phase, or what is stored of them."""
        recipe, source = self.recipe, self.source(phase)
        if isinstance(source, PreparedSet):
            optimization = phase.optimization
            return PreparedFeed(
                source,
                seed,
                optimization.images,
                optimization.batch_size,
                recipe.stored_texts,
                recipe.skip,
            )
        size = phase.image_size or recipe.image_size
        return Feed(
            source,
            seed,
            size,
            stage.captions,
            sizes=batch_sizes(size, phase.max_ratio, multiple),
            batch_size=phase.optimization.batch_size,
            skip=recipe.skip,
        )

    def settings(self, feed: Feed | PreparedFeed) -> Settings:
        """How the loop runs on a feed."""
        recipe = self.recipe
        return Settings(
            seed=recipe.seed,
            autocast=recipe.precision in HALVES,
            half=HALVES.get(recipe.precision, torch.bfloat16),
            decays_all_axes=self.order() < ORDER,
            compiles=recipe.acceleration in ("compile", "graph"),
            records=recipe.acceleration == "graph",
            shards=recipe.sharding == "full",
            recomputes=recipe.recompute == "blocks",
            workers=recipe.workers,
            checkpoint_seconds=recipe.checkpoint_seconds,
            log_every=recipe.log_every,
            preview_every=recipe.preview_every,
            keep_every=recipe.keep_every,
            preview_size=feed.size,
            previews=min(8, len(feed.source)),
        )

    def train_phase(self, stage: Stage, phase: Phase, *, multiple: int = 1) -> Averages:
        """Trains a phase to its end. Returns what gives a network its averaged weights."""
        return partial(self.averaged, self.run_stage(stage, phase, multiple))

    def run_stage(self, stage: Stage, phase: Phase, multiple: int) -> Path:
        """Trains a phase to its end. Returns its last checkpoint."""
        optimization = stage.optimization
        feed = self.feed(stage, phase, multiple, stable_hash(self.recipe.seed, stage.name, "data") >> 1)
        parameters = sum(p.numel() for n in stage.networks.values() for p in n.parameters())
        if self.processes.leads:
            times = "" if self.processes.count == 1 else f" and {self.processes.count - 1} more"
            print(
                f"Stage {stage.name.upper()}: {optimization.images:,} images, {feed.size} px, in batches of "
                f"{optimization.batch_size}, {parameters / 1e6:.1f} M parameters, on {self.device}{times}"
            )
            if isinstance(feed, PreparedFeed):
                print(f"  {phase.data or self.recipe.data} is prepared; sizes in pixels:")
                print("\n".join(f"    {line}" for line in feed.epoch()))
                if feed.source.maps_precision == "bfloat16":
                    print(
                        "  its maps were made in bfloat16 by an earlier version, with an error of a few "
                        "hundredths of their deviation; prepare it again for exact ones"
                    )
        header = {**dataclasses.asdict(self.provenance(0)), "fields": as_dict(self.recipe)}
        header["changes"] = self.changes
        folder = self.run_dir / f"stage_{stage.name}"
        images = optimization.images
        finished = self._finished(folder, stage, phase)
        if finished is not None:
            seen = {"images": images, "total": images, "resumed": True, "device": str(self.device)}
            self.log.event("start", stage=stage.name, **seen)
            return finished
        validation = self.validation(stage, phase) if self.processes.leads else None
        self.processes.wait_long()  # for the first, which has read images that are held out
        settings, processes = self.settings(feed), self.processes
        bank = partial(self.bank, feed, phase) if self.recipe.prepared_images else None
        goes_on = partial(self.goes_on, stage.name)
        return run_stage(
            stage, feed, folder, settings, self.device, self.log, header, bank, processes, validation, goes_on
        )

    def goes_on(self, stage: str, images: int) -> None:
        """Corrects the changes of the recipe where a stage goes on from before them."""
        move_changes(self.run_dir, self.changes, stage, images, self.log)

    def _finished(self, folder: Path, stage: Stage, phase: Phase) -> Path | None:
        """The last checkpoint of a stage, if it is there and whole, and its last preview and validation were
        made."""
        checkpoints, images = folder / "checkpoints", stage.optimization.images
        (there,) = self.processes.agreed((checkpoints / f"{images:012d}").is_dir())
        if not there:
            return None
        owed = False
        if self.processes.leads:
            previewed, validated = looked_at(self.log, stage.name, images, folder)
            owed = not previewed or not (validated or self.validation(stage, phase) is None)
        self.processes.wait_long()  # for the first, which may have read images that are held out
        if self.processes.agreed(owed)[0]:
            return None
        found = newest_of_all(checkpoints, self.processes)
        return found[0] if found is not None and found[1]["images"] >= images else None

    def validation(self, stage: Stage, phase: Phase) -> Validation | None:
        """The loss of a diffusion stage on held-out pictures; None without any."""
        if not isinstance(stage, Denoising | DenoisingTokens):
            return None
        data, size = key = (phase.data or self.recipe.data, phase.image_size or self.recipe.image_size)
        if key not in self._held_out:
            around = _around(data, self.begun)
            self._held_out[key] = held_out(
                data,
                size,
                texts=self.recipe.stored_texts,
                around=around,
                image_column=self.recipe.image_column or None,
                text_column=self.recipe.text_column or None,
            )
            if self._held_out[key] is None:
                print(f"{data} holds out no pictures, so there is no validation loss")
        pictures = self._held_out[key]
        if pictures is None:
            return None
        precision = self.recipe.precision
        half = HALVES.get(precision, torch.bfloat16)
        return Validation(stage, pictures, precision in HALVES, self.device, half)

    def bank(self, feed: Feed | PreparedFeed, phase: Phase) -> Bank:
        """The pictures that stages train on, composed when one first needs them."""
        assert isinstance(feed, Feed)
        key = (phase.data or self.recipe.data, feed.size)
        if self._bank is None or self._bank[0] != key:
            self._bank = None  # one at a time: they are large
            seed = stable_hash(self.recipe.seed, "bank") >> 1
            pictures = Feed(feed.source, seed, feed.size, captions=True, skip=self.recipe.skip)
            bank = compose(pictures, self.bank_size(*key), self.recipe.workers, self.device)
            self._bank = (key, bank)
            for name, reason in bank.skipped:
                self.log.event("skipped", stage="bank", name=name, reason=reason)
        return self._bank[1]

    def order(self) -> int:
        """Which version's rules the run goes by (``folder.ORDER``)."""
        return read_json(self.run_dir / "run.json").get("order", 1)

    def bank_size(self, data: str, size: int) -> int:
        """How many images of a size are composed: no more than will be used."""
        if self.order() < ORDER:
            return self.recipe.prepared_images  # their number is part of the order that the run began with
        return kept_images(self.recipe, data, size)

    def averaged(self, checkpoint: Path, network: N, name: str) -> N:
        """The network with the averaged weights of a finished stage, frozen."""
        network = network.to(self.device)
        load_averages(network, checkpoint, name, self.processes)
        return network.eval().requires_grad_(False)

    def seed_weights(self, name: str) -> None:
        """Initial weights are a function of the recipe's seed and the stage alone."""
        torch.manual_seed(stable_hash(self.recipe.seed, name, "weights") >> 1)

    def provenance(self, images: int) -> Provenance:
        return Provenance(
            recipe=self.recipe.name,
            seed=self.recipe.seed,
            images=images,
            data=self.fingerprint,
            changes=tuple(str(Change(**change)) for change in self.changes),
        )

    def say_what_is_read(self) -> None:
        """Prints what the data are and how often each image will be seen; once for a run and its data."""
        told = (event for event in self.log.events() if event["event"] == "data")
        if any(event.get("fingerprint") == self.fingerprint for event in told):
            return
        reads = reads_captions(self.recipe) or reads_text(self.recipe, self.start)
        encoder = self.parts.text_encoder or self.parts.decoder_text_encoder
        said, warned = overview(self.recipe, self.sources, encoder if reads else None)
        print_overview(said, warned)
        self.log.event("data", fingerprint=self.fingerprint, said=said, warned=warned)
        for source in self.sources.values():
            for name, reason in _left_out(source):
                self.log.event("skipped", stage="data", name=name, reason=reason)

    def say_skipped(self) -> None:
        """Names the images that could not be used, over all starts of the run."""
        skipped = {e["name"]: e["reason"] for e in self.log.events() if e["event"] == "skipped"}
        for name, reason in sorted(skipped.items()):
            print(f"skipped {name}: {reason}")
        if skipped:
            print(f"{len(skipped)} images could not be used and were skipped")


class _Rehearsal(_Run):
    """A run of a few updates a phase. Nothing is learnt, written, or handed from stage to stage."""

    def run_stage(self, stage: Stage, phase: Phase, multiple: int) -> Path:
        feed = self.feed(stage, phase, multiple, 0)
        bank = self.bank(feed, phase) if self.recipe.prepared_images else None
        nowhere, settings = self.run_dir / "none", self.settings(feed)
        cost = rehearse(stage, feed, nowhere, settings, self.device, bank, self.processes)
        values = {"total": stage.optimization.images, "seconds": cost.seconds, "kwh": cost.kwh}
        self.log.event("rehearsed", stage=stage.name, **values)
        return self.run_dir

    def averaged(self, checkpoint: Path, network: N, name: str) -> N:
        return network.to(self.device).eval().requires_grad_(False)

    def order(self) -> int:
        return ORDER

    def bank_size(self, data: str, size: int) -> int:
        """As many as the largest batch: more of them cost an update no more."""
        sizes = [r.batch_size for r in readings(self.recipe) if (r.data, r.size) == (data, size)]
        return min(kept_images(self.recipe, data, size), max(sizes))

    def measured_once(
        self, folder: str, measure: Callable[[], dict[str, Any]], known: dict[str, Any]
    ) -> dict[str, Any]:
        return known

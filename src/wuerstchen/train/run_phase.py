"""How a run trains its phases: their images, settings and checkpoints."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

from wuerstchen.checkpoints.native import Provenance
from wuerstchen.data.caption_files import CaptionsOnly
from wuerstchen.data.mixture import without_images
from wuerstchen.data.plan import stable_hash
from wuerstchen.data.prepared import PreparedSet
from wuerstchen.data.sources import Source
from wuerstchen.models.cascade import PUBLISHED_STATISTICS
from wuerstchen.train.changes import Change
from wuerstchen.train.config import Phase, Recipe, as_dict
from wuerstchen.train.engine.checkpoint import best_of, load_averages, newest_of_all
from wuerstchen.train.engine.distributed import Processes
from wuerstchen.train.engine.image_cache import Cache, ImageCache, InputCache, fill_image_cache
from wuerstchen.train.engine.job import Settings, StageJob
from wuerstchen.train.engine.loop import Trainer
from wuerstchen.train.engine.observe import observed
from wuerstchen.train.engine.validation import HeldOut, Validated, Validation, held_out
from wuerstchen.train.feed.images import Feed, batch_sizes
from wuerstchen.train.feed.prepared import (
    HeldOutLatents,
    PreparedFeed,
)
from wuerstchen.train.initial_weights import InitialWeights
from wuerstchen.train.overview import (
    cached_captions,
    cached_images,
)
from wuerstchen.train.precision import AUTOCAST_DTYPES
from wuerstchen.train.report.events import Log
from wuerstchen.train.run_data import open_subset
from wuerstchen.train.run_folder import (
    ORDER,
    move_changes,
    read_json,
)
from wuerstchen.train.stage_table import maker_of, result_of
from wuerstchen.train.stages.base import Averages, KeepsBest, N, ReadsOnlyCaptions, Stage


class PhaseRunner:
    """Trains the phases of a run."""

    def __init__(
        self,
        recipe: Recipe,
        run_dir: Path,
        sources: dict[str, Source | PreparedSet],
        start: InitialWeights,
        processes: Processes,
        log: Log,
    ) -> None:
        self.recipe = recipe
        self.processes = processes
        self.run_dir = run_dir
        self.sources = sources
        self.fingerprint = ""
        self.changes: list[dict[str, Any]] = []
        """Changes of the recipe since the run was started."""
        self.begun = recipe
        """The recipe that the run was started with."""
        self.repeats_images = False
        """Whether a size of a prepared set has fewer images than a batch."""
        self.device = processes.device
        self.log = log
        self.start = start
        self.parts = dataclasses.replace(start.parts)
        self.ended_at: dict[str, int] = {}
        self.results: dict[str, Any] = {}
        self.statistics = PUBLISHED_STATISTICS
        if start.settings is not None and start.parts.prior is not None:
            self.statistics = start.settings.latent_statistics
        for name, network in self.parts.networks().items():
            maker = maker_of(name)
            if maker is None or maker.short not in recipe.stages:  # the others are only copied
                network.eval()  # stays on the CPU until a stage needs it
        self._image_cache: tuple[tuple[str, int, bool], ImageCache] | None = None
        self._held_out: dict[tuple[str, int], HeldOut | HeldOutLatents | None] = {}

    def feed(self, stage: Stage, phase: Phase, multiple: int, seed: int) -> Feed | PreparedFeed:
        """The images of a phase, or what a prepared set stores of them."""
        recipe, source = self.recipe, self.source(phase)
        if isinstance(stage, ReadsOnlyCaptions):
            source = without_images(source)
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
            mirrored=recipe.mirrored,
        )

    def settings(self, feed: Feed | PreparedFeed) -> Settings:
        """Settings of the training loop."""
        recipe = self.recipe
        return Settings(
            seed=recipe.seed,
            autocast=AUTOCAST_DTYPES.get(recipe.precision),
            decays_all_axes=self.order() < ORDER,
            compiles=recipe.acceleration in ("compile", "graph"),
            records=recipe.acceleration == "graph",
            shards=recipe.sharding == "full",
            recomputes=recipe.recompute == "blocks",
            memory=recipe.memory,
            workers=recipe.workers,
            checkpoint_seconds=recipe.checkpoint_seconds,
            log_every=recipe.log_every,
            preview_every=recipe.preview_every,
            keep_every=recipe.keep_every,
            validate_every=recipe.validate_every,
            preview_size=feed.size,
            previews=min(8, len(feed.source)),
        )

    def train_phase(self, stage: Stage, phase: Phase, *, multiple: int = 1) -> Averages:
        """Trains a phase to its end. Returns a function that loads its averaged weights."""
        checkpoint = self.run_stage(stage, phase, multiple)
        self.ended_at[stage.name] = int(checkpoint.name) if checkpoint.name.isdigit() else 0
        return partial(self.averaged, checkpoint)

    def run_stage(self, stage: Stage, phase: Phase, multiple: int) -> Path:
        """Trains a phase to its end. Returns its last checkpoint, or its best one if the stage keeps that."""
        optimization = stage.optimization
        feed = self.feed(stage, phase, multiple, stable_hash(self.recipe.seed, stage.name, "data") >> 1)
        parameters = sum(p.numel() for n in stage.networks.values() for p in n.parameters())
        if self.processes.is_main:
            times = "" if self.processes.count == 1 else f" and {self.processes.count - 1} more"
            size = f"{parameters / 1e6:.1f} M" if parameters >= 1e5 else f"{parameters:,}"
            print(
                f"Stage {stage.name.upper()}: {optimization.images:,} images, {feed.size} px, in batches of "
                f"{optimization.batch_size}, {size} parameters, on {self.device}{times}"
            )
            if isinstance(feed, PreparedFeed):
                print(f"  {phase.data or self.recipe.data} is prepared; sizes in pixels:")
                print("\n".join(f"    {line}" for line in feed.epoch()))
                if feed.source.latents_precision == "bfloat16":
                    print(
                        "  its semantic latents were computed in bfloat16 by an earlier version, with errors "
                        "of a few hundredths of their standard deviation. Prepare it again for exact ones."
                    )
        header = {**dataclasses.asdict(self.provenance(0)), "fields": as_dict(self.recipe)}
        header["changes"] = self.changes
        folder = self.run_dir / f"stage_{stage.name}"
        images = optimization.images
        finished = self._finished(folder, stage, phase)
        if finished is not None:
            seen = {"images": images, "total": images, "resumed": True, "device": str(self.device)}
            self.log.event("start", stage=stage.name, **seen)
            return self._kept(stage, finished)
        validation = self.validation(stage, phase) if self.processes.is_main else None
        self.processes.barrier_without_timeout()  # for rank 0, which has read held-out images
        job = self.job(stage, feed, folder)
        trainer = Trainer(dataclasses.replace(job, header=header, validation=validation))
        move_changes(self.run_dir, self.changes, stage.name, trainer.state.images, self.log)
        caches = self.recipe.prepared_images and not trainer.finished
        return self._kept(stage, trainer.train(self.image_cache(feed, phase) if caches else None))

    def _kept(self, stage: Stage, last: Path) -> Path:
        """The checkpoint whose averages a phase ends with."""
        self.processes.barrier_without_timeout()  # for rank 0, which has validated
        best = best_of(last.parent) if isinstance(stage, KeepsBest) and stage.keeps_best else None
        if best is None or best["images"] >= int(last.name):
            return last
        if self.processes.is_main:
            print(
                f"Stage {stage.name.upper()}: the validation loss was lowest at image {best['images']:,} of "
                f"{int(last.name):,}, so the averaged weights at that point are kept"
            )
        return last.parent / f"{best['images']:012d}"

    def job(self, stage: Stage, feed: Feed | PreparedFeed, folder: Path) -> StageJob:
        """What a stage is trained with."""
        return StageJob(
            stage=stage,
            feed=feed,
            folder=folder,
            settings=self.settings(feed),
            processes=self.processes,
            log=self.log,
        )

    def _finished(self, folder: Path, stage: Stage, phase: Phase) -> Path | None:
        """The last checkpoint of a stage, if it is whole and its last preview and validation were made."""
        checkpoints, images = folder / "checkpoints", stage.optimization.images
        if not self.processes.any_rank((checkpoints / f"{images:012d}").is_dir()):
            return None
        owed = False
        if self.processes.is_main:
            previewed, validated = observed(self.log, stage.name, images, folder)
            owed = not previewed or not (validated or self.validation(stage, phase) is None)
        self.processes.barrier_without_timeout()  # for rank 0, which may have read held-out images
        if self.processes.any_rank(owed):
            return None
        found = newest_of_all(checkpoints, self.processes)
        return found[0] if found is not None and found[1]["images"] >= images else None

    def validation(self, stage: Stage, phase: Phase) -> Validation | None:
        """Validation of a diffusion stage; None without held-out images."""
        if not isinstance(stage, Validated):
            return None
        data, size = key = (phase.data or self.recipe.data, phase.image_size or self.recipe.image_size)
        if key not in self._held_out:
            source = open_subset(data, "heldout", self.recipe, self.begun)
            self._held_out[key] = held_out(source, size, texts=self.recipe.stored_texts)
            if self._held_out[key] is None:
                print(f"{data} has no held-out images, so there is no validation loss")
        images = self._held_out[key]
        if images is None:
            return None
        return Validation(stage, images, AUTOCAST_DTYPES.get(self.recipe.precision), self.device)

    def image_cache(self, feed: Feed | PreparedFeed, phase: Phase) -> Cache:
        """The images that stages train on, loaded when a stage first needs them."""
        assert isinstance(feed, Feed)
        key = (phase.data or self.recipe.data, feed.size)
        if result_of(self.recipe):
            seed = stable_hash(self.recipe.seed, "bank") >> 1
            crops = Feed(feed.source, seed, feed.size, captions=True, skip=feed.skip, mirrored=feed.mirrored)
            skipped = partial(self._log_skipped, "bank")
            return InputCache(crops, self.cache_size(*key), self.recipe.workers, self.device, skipped)
        kept = (*key, isinstance(feed.source, CaptionsOnly))
        if self._image_cache is None or self._image_cache[0] != kept:
            self._image_cache = None  # one at a time: they are large
            seed = stable_hash(self.recipe.seed, "bank") >> 1
            images = Feed(feed.source, seed, feed.size, captions=True, skip=feed.skip, mirrored=feed.mirrored)
            count = self.cache_size(*key, captions_only=isinstance(feed.source, CaptionsOnly))
            cache = fill_image_cache(images, count, self.recipe.workers, self.device)
            self._image_cache = (kept, cache)
            for name, reason in cache.skipped:
                self._log_skipped("bank", name, reason)
        return self._image_cache[1]

    def _log_skipped(self, stage: str, name: str, reason: str) -> None:
        self.log.event("skipped", stage=stage, name=name, reason=reason)

    def order(self) -> int:
        """The rules for the order of images and weight decay (``run_folder.ORDER``)."""
        return read_json(self.run_dir / "run.json").get("order", 1)

    def cache_size(self, data: str, size: int, *, captions_only: bool = False) -> int:
        """How many images of a size, or captions without images, are cached: no more than will be used."""
        if captions_only:
            return cached_captions(self.recipe)
        if self.order() < ORDER:
            return self.recipe.prepared_images  # their number determines the order of the images
        return cached_images(self.recipe, data, size)

    def averaged(self, checkpoint: Path, network: N, name: str) -> N:
        """Loads the averaged weights of a finished phase into a network and freezes it."""
        network = network.to(self.device)
        load_averages(network, checkpoint, name, self.processes)
        return network.eval().requires_grad_(False)

    def provenance(self, images: int) -> Provenance:
        return Provenance(
            recipe=self.recipe.name,
            seed=self.recipe.seed,
            images=images,
            data=self.fingerprint,
            changes=tuple(str(Change(**change)) for change in self.changes),
        )

    def source(self, phase: Phase) -> Source | PreparedSet:
        """The data set that a phase reads."""
        return self.sources[phase.data or self.recipe.data]

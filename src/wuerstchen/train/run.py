"""A whole run: the run folder, its three stages one after the other, and the model at the end.

DIR/run.json  log.jsonl  lock
DIR/stage_{a,b,c}/{checkpoints,previews}/
DIR/model/            the averaged weights as a model folder; appears when all three stages are done
"""

import contextlib
import dataclasses
import json
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock, Timeout
from torch import nn

from wuerstchen.checkpoints.backbones import lite0_path, load_backbone
from wuerstchen.checkpoints.native import FORMAT, Provenance, migrate, write_cascade
from wuerstchen.checkpoints.text_encoder import read_text_encoder
from wuerstchen.checkpoints.weights import write_json
from wuerstchen.data.emoji import EmojiSource, sample_root
from wuerstchen.data.folder import FolderSource
from wuerstchen.data.plan import stable_hash
from wuerstchen.data.sources import Source
from wuerstchen.errors import RunFolderError, UserError
from wuerstchen.models.cascade import PUBLISHED_MAP, Cascade, MapStatistics
from wuerstchen.models.compressor import Compressor
from wuerstchen.models.decoder import Decoder
from wuerstchen.models.efficientnet import EfficientNetLite
from wuerstchen.models.previewer import Previewer
from wuerstchen.models.prior import Prior
from wuerstchen.models.text import PromptTooLongWarning, TextEncoder
from wuerstchen.models.vqgan import VQGAN
from wuerstchen.pipeline import BUNDLED, default_device
from wuerstchen.train.bank import Bank, compose
from wuerstchen.train.config import Recipe, as_dict, differing_fields
from wuerstchen.train.feed import Batch, Feed, batches
from wuerstchen.train.loop import Settings, rehearse, run_stage
from wuerstchen.train.parallel import Processes, distributed
from wuerstchen.train.snapshot import read_averages
from wuerstchen.train.stage_a import StageA, StageARefinement
from wuerstchen.train.stage_b import DecoderAndCompressor, StageB, StageBRefinement
from wuerstchen.train.stage_c import StageC, measure_map
from wuerstchen.train.stages import Stage, cascade_settings
from wuerstchen.train.track import Log, check_tensorboard
from wuerstchen.train.validate import Denoising, HeldOut, Validation, held_out
from wuerstchen.train.watch import Watch, begin, say_cost, say_costs_to_come

N = TypeVar("N", bound=nn.Module)
TEXT_ENCODER = BUNDLED / "text_encoder"
CENTRED = 0.7  # of the emoji pictures: what a prompt without a place should give is a subject in the middle


def open_source(data: str) -> Source:
    """The data set that a recipe names: the sample, a built emoji set, or a folder with captions."""
    if data == "sample":
        return EmojiSource(sample_root(), split="train", centred=CENTRED)
    root = Path(data)
    if (root / "index.jsonl").is_file():
        return EmojiSource(root, split="train", centred=CENTRED)
    return FolderSource(root, split="train")


def train(
    recipe: Recipe,
    run_dir: Path,
    *,
    device: str | None = None,
    accept_changed_data: bool = False,
    watch: Watch | None = None,
) -> Path:
    """Runs a recipe to its end, from wherever the run folder stands. Returns the finished model's folder.

    ``watch`` changes nothing in the result.

    Raises ``RunFolderError`` for a folder that is in use or belongs to another recipe, ``DataError`` for data
    that cannot be used, ``Interrupted`` after a signal.
    """
    watch = watch or Watch()
    if watch.tensorboard:
        check_tensorboard()
    with distributed(default_device(device)) as processes:
        return _train(recipe, run_dir, processes, accept_changed_data, watch)


def _train(
    recipe: Recipe, run_dir: Path, processes: Processes, accept_changed_data: bool, watch: Watch
) -> Path:
    recipe = _resolved(recipe, processes)
    source = open_source(recipe.data)
    largest = max(s.optimization.batch_size for s in (recipe.stage_a, recipe.stage_b, recipe.stage_c))
    if len(source) < largest and not recipe.prepared_images:
        raise UserError(
            f"{recipe.data} has {len(source)} images, fewer than a batch of {largest}; use a smaller "
            "batch_size or more images"
        )
    text_encoder = read_text_encoder(TEXT_ENCODER)
    _check_text_width(recipe, text_encoder.width)
    with _locked(run_dir, processes), warnings.catch_warnings():
        # Captions longer than the encoder reads are cut; a line for each would bury everything else.
        warnings.simplefilter("ignore", PromptTooLongWarning)
        try:
            log = Log(run_dir / "log.jsonl", processes.leads, tensorboard=watch.tensorboard)
            run = _Run(recipe, run_dir, source, text_encoder, processes, log)
            run.check_compressor_weights()
            run.fingerprint = _check_run(recipe, run_dir, source, log, accept_changed_data, processes)
            wanted = False
            if processes.leads:
                begin(log, watch)
                rehearsed = any(event["event"] == "rehearsed" for event in log.events())
                wanted = watch.rehearses and not rehearsed
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
            # Reading data has errors of its own, so it is the run folder: a full disk, as a rule.
            raise RunFolderError(
                f"{run_dir} cannot be written ({error.strerror or error}); free some space and start "
                "the same command again"
            ) from error


def _resolved(recipe: Recipe, processes: Processes) -> Recipe:
    """The recipe with every ``auto`` replaced: what it stands for is part of what a run folder keeps."""
    device = processes.device
    gpu = device.type == "cuda"
    if recipe.precision == "auto":
        recipe = dataclasses.replace(recipe, precision="bf16" if gpu else "fp32")
    if recipe.acceleration == "auto":
        graph = gpu and recipe.prepared_images > 0 and processes.count == 1
        recipe = dataclasses.replace(recipe, acceleration="graph" if graph else "none")
    if recipe.acceleration == "graph" and not gpu:
        raise UserError(f"acceleration=graph records CUDA graphs, and {device} has none; use compile or none")
    if recipe.acceleration == "graph" and processes.count > 1:
        raise UserError(
            f"acceleration=graph records the updates of one process, not of {processes.count}; use compile"
        )
    return recipe


def _check_text_width(recipe: Recipe, width: int) -> None:
    for name, value in (
        ("prior.c_cond", recipe.prior.c_cond),
        ("decoder.clip_embd", recipe.decoder.clip_embd),
    ):
        if value not in (width, None):
            raise UserError(f"{name}={value} is not the width of the text encoder's states; use {width}")


@contextlib.contextmanager
def _locked(run_dir: Path, processes: Processes) -> Iterator[None]:
    """Keeps other runs out of the run folder. The lock goes with the process, however it ends."""
    if not processes.leads:
        processes.wait()  # for the lock and the cleaning below
        yield
        return
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(run_dir / "lock").acquire(timeout=0)
    except Timeout as error:
        raise RunFolderError(
            f"{run_dir} is in use by another process; wait for it, or use another --run-dir"
        ) from error
    except OSError as error:
        raise RunFolderError(
            f"{run_dir} cannot be written ({error.strerror}); use another --run-dir"
        ) from error
    with lock:
        for partial in (*run_dir.glob("stage_*/checkpoints/.*.partial"), *run_dir.glob(".model.*")):
            shutil.rmtree(partial, ignore_errors=True)  # what kills left half-written
        processes.wait()
        yield


def _check_run(
    recipe: Recipe,
    run_dir: Path,
    source: Source,
    log: Log,
    accept_changed_data: bool,
    processes: Processes,
) -> str:
    """Compares what the folder was begun with and what is asked now; begins it if it is new."""
    path = run_dir / "run.json"
    given, data = as_dict(recipe), source.fingerprint()
    if not processes.leads:
        return data
    if not path.exists():
        if any(run_dir.glob("stage_*")):
            raise RunFolderError(f"{run_dir} holds stages but no run.json; use another --run-dir")
        write_json(path, {"format": FORMAT, "recipe": given, "data": data})
        return data
    stored = migrate(_read_json(path), path)
    if not (isinstance(stored.get("recipe"), dict) and isinstance(stored.get("data"), str)):
        raise RunFolderError(f"{path} names no recipe and data; use another --run-dir")
    differing = differing_fields(stored["recipe"], given)
    if differing:
        raise RunFolderError(
            f"{run_dir} belongs to another recipe: {', '.join(differing)} differ; use the same settings or "
            "another --run-dir"
        )
    if stored["data"] != data:
        if not accept_changed_data:
            raise RunFolderError(
                f"the data in {recipe.data} have changed since {run_dir} was begun; put them back, or give "
                "--accept-changed-data"
            )
        log.event("accepted changed data", before=stored["data"], now=data)
        write_json(path, {**stored, "data": data})
    return data


def _read_json(path: Path, fix: str = "use another --run-dir") -> dict[str, Any]:
    """A file that this run wrote."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
        return content
    except ValueError as error:
        raise RunFolderError(f"{path} cannot be read ({error}); {fix}") from error


class _Run:
    """One start of a run: builds each stage from the results of those before it."""

    def __init__(
        self,
        recipe: Recipe,
        run_dir: Path,
        source: Source,
        text_encoder: TextEncoder,
        processes: Processes,
        log: Log,
    ) -> None:
        self.recipe = recipe
        self.processes = processes
        self.run_dir = run_dir
        self.source = source
        self.fingerprint = ""
        self.device = processes.device
        self.log = log
        self.text_encoder = text_encoder.to(self.device)
        self._bank: Bank | None = None
        self._looked = False
        self._held_out: HeldOut | None = None
        self.settings = Settings(
            seed=recipe.seed,
            autocast=recipe.precision == "bf16",
            compiles=recipe.acceleration in ("compile", "graph"),
            records=recipe.acceleration == "graph",
            shards=recipe.sharding == "full",
            recomputes=recipe.recompute == "blocks",
            workers=recipe.workers,
            checkpoint_seconds=recipe.checkpoint_seconds,
            log_every=recipe.log_every,
            preview_every=recipe.preview_every,
            preview_size=recipe.image_size,
            previews=min(8, len(source)),
        )

    def train(self) -> Path:
        began = time.monotonic()
        vqgan = self.stage_a()
        decoder, compressor, previewer = self.stage_b(vqgan)
        vqgan = self.stage_a_refined(vqgan, decoder, compressor)
        prior, statistics = self.stage_c(vqgan, decoder, compressor)
        target = self.run_dir / "model"
        if self.processes.leads and not (target / "model.json").exists():
            cascade = Cascade(
                settings=cascade_settings(self.recipe, statistics),
                vqgan=vqgan,
                decoder=decoder,
                compressor=compressor,
                prior=prior,
                previewer=previewer,
            )
            b = self.recipe.stage_b.optimization.images
            c = self.recipe.stage_c.optimization.images + self.recipe.stage_c.refine_images
            a = self.recipe.stage_a.optimization.images + self.recipe.stage_a.refine_images
            provenance = {
                "vqgan": self.provenance(a),
                "decoder": self.provenance(b + self.recipe.stage_b.refine_images),
                "compressor": self.provenance(b),
                "prior": self.provenance(c),
                "previewer": self.provenance(b + self.recipe.stage_b.refine_images),
            }
            write_cascade(cascade, target, provenance, text_encoder=TEXT_ENCODER)
        self.processes.wait()
        if not self.processes.leads:
            return target
        self.say_skipped()
        for picture in sorted(self.run_dir.glob("stage_c*/previews/*.png"))[-1:]:
            print(f"{picture}: the recipe's prompts, drawn at the end of Stage C")
        say_cost(self.log)
        self.log.event("end", seconds=round(time.monotonic() - began, 1))
        return target

    def rehearse(self) -> None:
        """Measures what an image costs in each stage, with networks that are thrown away."""
        with tempfile.TemporaryDirectory() as folder:
            rehearsal = _Rehearsal(
                self.recipe, Path(folder), self.source, self.text_encoder, self.processes, self.log
            )
            vqgan = rehearsal.stage_a()
            decoder, compressor, _ = rehearsal.stage_b(vqgan)
            vqgan = rehearsal.stage_a_refined(vqgan, decoder, compressor)
            rehearsal.stage_c(vqgan, decoder, compressor)
        self._bank = rehearsal._bank
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def stage_a(self) -> VQGAN:
        config = self.recipe.stage_a
        self.seed_weights("a")
        final = self.run_stage(StageA(config, VQGAN(self.recipe.vqgan), self.perceptual()))
        # Into a network of its own: the one that was trained may be compiled.
        trained = self.averaged(VQGAN(self.recipe.vqgan), final, "vqgan")
        if config.measure_scale:
            trained.config = dataclasses.replace(trained.config, scale_factor=self.latent_scale(trained))
        return trained

    def perceptual(self) -> EfficientNetLite | None:
        """The network of Stage A's perceptual loss."""
        if self.recipe.stage_a.perceptual == "none":
            return None
        network = EfficientNetLite()
        load_backbone(network, lite0_path())
        return network.to(self.device)

    def stage_a_refined(self, vqgan: VQGAN, decoder: Decoder, compressor: Compressor) -> VQGAN:
        """Stage A after its second phase, if the recipe has one."""
        config = self.recipe.stage_a
        if not config.refine_images:
            return vqgan
        self.seed_weights("a2")
        frozen = Cascade(
            settings=cascade_settings(self.recipe, PUBLISHED_MAP),
            vqgan=vqgan,
            decoder=decoder,
            compressor=compressor,
        )
        stage = StageARefinement(config, vqgan, self.perceptual(), frozen, self.text_encoder)
        final = self.run_stage(stage)
        # Into a network of its own: the one that was trained may be compiled.
        refined = VQGAN(vqgan.config)
        refined.load_state_dict(vqgan.state_dict())
        self.averaged(refined.decoder_half(), final, "decoder_half")
        return refined.to(self.device).eval().requires_grad_(False)

    def latent_scale(self, vqgan: VQGAN) -> float:
        """The latents' standard deviation, measured once, which becomes their scale factor."""

        def measure() -> dict[str, Any]:
            z = torch.cat([vqgan.embed(b.pixels(self.device)) for b in self.some_images("latents")])
            return {"scale_factor": round(float(z.cpu().double().std()), 6)}

        return self.measured_once("stage_a", measure)["scale_factor"]

    def stage_b(self, vqgan: VQGAN) -> tuple[Decoder, Compressor, Previewer]:
        recipe, config = self.recipe, self.recipe.stage_b
        self.seed_weights("b")
        compressor = Compressor(recipe.compressor)
        if self.begins("b"):
            load_backbone(compressor.backbone, self.compressor_weights())
        compressor.freeze_early_layers(config.frozen_stride)
        decoder, previewer = Decoder(recipe.decoder), Previewer(recipe.previewer)
        parts = (vqgan, decoder, compressor, previewer, self.text_encoder, recipe)
        final = self.run_stage(StageB(config, *parts))
        both = self.averaged(
            DecoderAndCompressor(Decoder(recipe.decoder), Compressor(recipe.compressor)),
            final,
            "decoder_and_compressor",
        )
        decoder, compressor = both.decoder, both.compressor
        previewer = self.averaged(Previewer(recipe.previewer), final, "previewer")
        if config.refine_images:
            for network in (decoder, previewer):
                network.requires_grad_(True)
            parts = (vqgan, decoder, compressor, previewer, self.text_encoder, recipe)
            final = self.run_stage(StageBRefinement(config, *parts))
            decoder = self.averaged(Decoder(recipe.decoder), final, "decoder")
            previewer = self.averaged(Previewer(recipe.previewer), final, "previewer")
        return decoder, compressor, previewer

    def begins(self, stage: str) -> bool:
        """Whether a stage starts from nothing, as opposed to from a checkpoint of its own."""
        return not any((self.run_dir / f"stage_{stage}" / "checkpoints").glob("[0-9]*"))

    def check_compressor_weights(self) -> None:
        """Reads the backbone's weights once before anything is trained: Stage B may be hours away."""
        if self.begins("b"):
            load_backbone(Compressor(self.recipe.compressor).backbone, self.compressor_weights())

    def compressor_weights(self) -> Path:
        """The file that the compressor's backbone starts from."""
        named, backbone = self.recipe.stage_b.compressor_init, self.recipe.compressor.backbone
        if named:
            return Path(named)
        if backbone != "efficientnet_lite0":
            raise UserError(
                f"{backbone} needs pretrained weights to start from; give --compressor-init FILE, "
                "torchvision's .pth or timm's .safetensors"
            )
        return lite0_path()

    def stage_c(self, vqgan: VQGAN, decoder: Decoder, compressor: Compressor) -> tuple[Prior, MapStatistics]:
        recipe, config = self.recipe, self.recipe.stage_c
        self.seed_weights("c")
        prior = Prior(recipe.prior)
        frozen = Cascade(
            settings=cascade_settings(recipe, PUBLISHED_MAP),
            vqgan=vqgan,
            decoder=decoder,
            compressor=compressor,
            text_encoder=self.text_encoder,
        )
        statistics = self.map_statistics(compressor)
        final = self.run_stage(StageC(config, recipe, prior, frozen, statistics))
        prior = self.averaged(Prior(recipe.prior), final, "prior")
        if config.refine_images:
            prior.requires_grad_(True)
            final = self.run_stage(StageC(config, recipe, prior, frozen, statistics, refines=True))
            prior = self.averaged(Prior(recipe.prior), final, "prior")
        return prior, statistics

    def map_statistics(self, compressor: Compressor) -> MapStatistics:
        """Measured once, before Stage C."""

        def measure() -> dict[str, Any]:
            return dataclasses.asdict(measure_map(compressor, self.some_images("map"), self.device))

        return MapStatistics(**{k: tuple(v) for k, v in self.measured_once("stage_c", measure).items()})

    def some_images(self, purpose: str) -> Iterator[Batch]:
        """Training pictures to measure on, in an order of their own."""
        feed = Feed(self.source, stable_hash(self.recipe.seed, purpose) >> 1, self.recipe.image_size, False)
        return batches(feed, 0, self.recipe.statistics_images, 16, self.recipe.workers)

    @torch.no_grad()
    def measured_once(self, stage: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``measure`` finds, kept beside the stage's checkpoints: later starts read it back."""
        path = self.run_dir / stage / "measured.json"
        if self.processes.leads and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, measure())
        self.processes.wait()
        again = "remove it, and it will be measured again"
        found = _read_json(path, again)
        if not found:
            raise RunFolderError(f"{path} is empty; {again}")
        return found

    def run_stage(self, stage: Stage) -> Path:
        optimization = stage.optimization
        parameters = sum(p.numel() for n in stage.networks.values() for p in n.parameters())
        if self.processes.leads:
            times = "" if self.processes.count == 1 else f" and {self.processes.count - 1} more"
            print(
                f"Stage {stage.name.upper()}: {optimization.images:,} images in batches of "
                f"{optimization.batch_size}, {parameters / 1e6:.1f} M parameters, on {self.device}{times}"
            )
        seed = stable_hash(self.recipe.seed, stage.name, "data") >> 1
        feed = Feed(self.source, seed, self.recipe.image_size, stage.captions)
        header = {**dataclasses.asdict(self.provenance(0)), "fields": as_dict(self.recipe)}
        folder = self.run_dir / f"stage_{stage.name}"
        finished = (folder / "checkpoints" / f"{optimization.images:012d}").is_dir()
        bank = None if finished else self.bank()
        validation = self.validation(stage) if self.processes.leads and not finished else None
        processes = self.processes
        return run_stage(
            stage, feed, folder, self.settings, self.device, self.log, header, bank, processes, validation
        )

    def validation(self, stage: Stage) -> Validation | None:
        """The loss of a diffusion stage on held-out pictures; None without any."""
        if not isinstance(stage, Denoising):
            return None
        if not self._looked:
            self._looked, self._held_out = True, held_out(self.recipe.data, self.recipe.image_size)
            if self._held_out is None:
                print(f"{self.recipe.data} holds out no pictures, so there is no validation loss")
        if self._held_out is None:
            return None
        return Validation(stage, self._held_out, self.settings.autocast, self.device)

    def bank(self) -> Bank | None:
        """The pictures that all stages train on, composed when a stage first needs them; None without any."""
        if self._bank is None and self.recipe.prepared_images:
            seed = stable_hash(self.recipe.seed, "bank") >> 1
            feed = Feed(self.source, seed, self.recipe.image_size, captions=True)
            self._bank = compose(feed, self.recipe.prepared_images, self.recipe.workers, self.device)
            for name, reason in self._bank.skipped:
                self.log.event("skipped", stage="bank", name=name, reason=reason)
        return self._bank

    def averaged(self, network: N, checkpoint: Path, name: str) -> N:
        """The network with the averaged weights of a finished stage, frozen."""
        network.load_state_dict(read_averages(checkpoint, name))
        return network.to(self.device).eval().requires_grad_(False)

    def seed_weights(self, stage: str) -> None:
        """Initial weights are a function of the recipe's seed and the stage alone."""
        torch.manual_seed(stable_hash(self.recipe.seed, stage, "weights") >> 1)

    def provenance(self, images: int) -> Provenance:
        return Provenance(
            recipe=self.recipe.name, seed=self.recipe.seed, images=images, data=self.fingerprint
        )

    def say_skipped(self) -> None:
        """Names the images that could not be read, over all starts of the run."""
        skipped = {e["name"]: e["reason"] for e in self.log.events() if e["event"] == "skipped"}
        for name, reason in sorted(skipped.items()):
            print(f"skipped {name}: {reason}")
        if skipped:
            print(f"{len(skipped)} images could not be read and were skipped")


class _Rehearsal(_Run):
    """A run of a few updates a stage. Nothing is learnt, written, or handed from stage to stage."""

    def run_stage(self, stage: Stage) -> Path:
        feed = Feed(self.source, 0, self.recipe.image_size, stage.captions)
        bank = self.bank()
        nowhere = self.run_dir / "none"
        cost = rehearse(stage, feed, nowhere, self.settings, self.device, bank, self.processes)
        values = {"total": stage.optimization.images, "seconds": cost.seconds, "kwh": cost.kwh}
        self.log.event("rehearsed", stage=stage.name, **values)
        return self.run_dir

    def averaged(self, network: N, checkpoint: Path, name: str) -> N:
        return network.to(self.device).eval().requires_grad_(False)

    def latent_scale(self, vqgan: VQGAN) -> float:
        return vqgan.config.scale_factor

    def map_statistics(self, compressor: Compressor) -> MapStatistics:
        channels = self.recipe.compressor.c_latent
        return MapStatistics(mean=(0.0,) * channels, std=(1.0,) * channels)

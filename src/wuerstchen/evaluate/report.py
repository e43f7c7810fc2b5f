"""Evaluates a model on the two lists and on photographs, and compares it with its targets."""

import dataclasses
import hashlib
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from wuerstchen.defaults import usual_defaults
from wuerstchen.errors import DataError, UserError
from wuerstchen.evaluate.lists import LISTS, SPLITS, ListName, Split, select
from wuerstchen.evaluate.photos import PhotoResult, photo_files, score_photos
from wuerstchen.evaluate.references import References
from wuerstchen.evaluate.scoring import COLUMNS, ROWS, ListResult, Renderer, Row, Scorer
from wuerstchen.evaluate.targets import Target, number_text, targets
from wuerstchen.pipeline import Wuerstchen
from wuerstchen.sampling import Sampling
from wuerstchen.version import __version__

FORMAT = 1
"""The format version of ``report.json``. Increment it for changes that break readers."""

SHOWN_ENTRIES = 24
"""Entries of each list and split, and photographs, that the page shows."""


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What is evaluated, and how."""

    lists: Sequence[ListName] = LISTS
    splits: Sequence[Split] = SPLITS
    rows: Sequence[Row] | None = None
    """None for all rows that the models can draw."""
    limit: int | None = None
    """Only the first entries of each list and split, and the first photographs. None for all of them."""
    sampling: Sampling | None = None
    """None for the model's own settings."""
    batch_size: int | None = None
    """Images drawn at once. None for 8 on a CPU and 64 elsewhere."""
    shown: int = SHOWN_ENTRIES
    """Entries of each list and split, and photographs, that the page shows."""
    first_seed: int = 0
    """Added to all seeds."""
    against_targets: bool = False
    """Whether scores are compared with the targets of the bundled model. They are meant for that model and
    for whole lists."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit must be at least 1, got {self.limit}. Nothing would be left to score.")
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {self.batch_size}. Use 8 on a CPU.")


@dataclass(frozen=True, kw_only=True)
class Report:
    """The results of one evaluation."""

    settings: dict[str, Any]
    machine: str
    seconds: float
    lists: dict[ListName, ListResult]
    targets: dict[Split, list[Target]]
    photos: PhotoResult | None


def _no_announcement(line: str) -> None:
    pass


@usual_defaults()
def evaluate(
    model: Wuerstchen,
    data: Path | None = None,
    options: EvaluationOptions | None = None,
    *,
    before: Wuerstchen | None = None,
    photos: Path | None = None,
    references: References | None = None,
    announce: Callable[[str], None] = _no_announcement,
    **changes: Any,
) -> Report:
    """Scores ``model`` on the lists with the emoji set in ``data``, and on the photographs in ``photos``.

    Either may be None, but not both. Fields of ``options`` may also be given by name, as in ``limit=8``.
    ``before`` is the model before its weights were compressed. ``references`` of ``data`` may be shared by
    several evaluations. ``announce`` is called with a line that says how many images will be drawn.

    Raises ``DataError`` for an emoji set that is not built and for a folder without photographs, and
    ``UserError`` for rows that the model cannot draw.
    """
    options = dataclasses.replace(options or EvaluationOptions(), **changes)
    renderer = Renderer(
        model=model,
        sampling=options.sampling or Sampling(),
        before=before,
        first_seed=options.first_seed,
    )
    rows = renderer.rows() if options.rows is None else options.rows
    _check_rows(rows, renderer.rows())
    if data is None and photos is None:
        raise DataError(
            "nothing to evaluate: neither an emoji set nor photographs were given. Give one of them."
        )

    entries = (
        {} if data is None else {name: select(name, options.splits, options.limit) for name in options.lists}
    )
    references = None if data is None else _references(data, model.device, references)
    if references is not None:
        for part in entries.values():
            references.real.check(part)
    files = [] if photos is None else photo_files(photos)[: options.limit]
    batch_size = options.batch_size or (8 if model.device.type == "cpu" else 64)

    count = sum(map(len, entries.values()))
    announce(cost(rows, count, len(files), renderer.rows()))
    started = time.monotonic()
    results: dict[ListName, ListResult] = {}
    photo_result = None
    with _bar(count + len(files)) as bar:
        if references is not None:
            scorer = _scorer(renderer, rows, references, batch_size, options.shown)
            for name, part in entries.items():
                bar.set_description(f"list ({name})")
                results[name] = scorer.score_list(name, part, bar.update)
        if photos is not None:
            bar.set_description("photographs")
            photo_result = score_photos(photos, files, renderer, batch_size, options.shown, bar.update)
    return Report(
        settings={
            "image_size": renderer.size,
            "sampling": model.settings_of(renderer.sampling),
            "splits": list(options.splits),
            "limit": options.limit,
            "batch_size": batch_size,
            "data": None if references is None else references.real.source.fingerprint(),
        },
        machine=machine(model.device),
        seconds=time.monotonic() - started,
        lists=results,
        targets={
            split: targets({name: result.scores.get(split, {}) for name, result in results.items()})
            for split in options.splits
            if results and options.against_targets
        },
        photos=photo_result,
    )


def _check_rows(rows: Sequence[Row], available: Sequence[Row]) -> None:
    """Raises ``UserError`` for a row that the model cannot draw."""
    for row in rows:
        if row not in available:
            missing = "the model before compression" if row == "before" else "a network that this model lacks"
            raise UserError(
                f"row {row!r} needs {missing}. Available rows are {', '.join(available)}. Remove it from "
                "rows."
            )


def _references(data: Path, device: torch.device, shared: References | None) -> References:
    if shared is None:
        return References(data, device, keep=False)
    if Path(shared.data).resolve() != Path(data).resolve():
        raise UserError(
            f"references must be of the evaluated data set, {data}, got those of {shared.data}. "
            "Use References with this data set."
        )
    return shared


def _scorer(
    renderer: Renderer, rows: Sequence[Row], references: References, batch_size: int, shown: int
) -> Scorer:
    """A scorer with the judges and feature networks of the package."""
    return Scorer(
        renderer=renderer,
        rows=tuple(rows),
        real=references.real,
        features=references.features,
        lite0_features=references.lite0_features,
        judge=references.judges,
        batch_size=batch_size,
        shown=shown,
    )


def _bar(total: int) -> "tqdm[Any]":
    return tqdm(
        total=total,
        unit="image",
        smoothing=0,
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 60,  # a log gets one line a minute
    )


def cost(rows: Sequence[Row], entries: int, photos: int, photo_rows: Sequence[Row]) -> str:
    """How many images will be drawn, in one line."""
    from_text = entries * sum(row in ("c_b_a", "before") for row in rows)
    reconstructed = entries * ("a_b" in rows) + photos * ("a_b" in photo_rows)
    return (
        f"{entries} entries and {photos} photographs: {from_text:,} images to draw from text, "
        f"{reconstructed:,} to reconstruct. The progress bar shows the remaining time after the first batch"
    )


def summary(report: Report) -> str:
    """The scores as plain text: a table for each list and split, the targets, and the photographs.

    Targets are those on test if test was scored, and otherwise those on val.
    """
    lines = [line for name, result in report.lists.items() for line in _score_table(name, result)]
    if report.settings["limit"] is not None and report.lists:
        lines.append(
            f"only the first {report.settings['limit']} entries of each list and split: a quick check, not "
            "comparable with full results"
        )
    for split in ("test", "val"):
        if split in report.targets:
            lines.append(f"{'targets on ' + split:55}{'measured':>10}  limit")
            for target in report.targets[split]:
                verdict = {True: "reached", False: "short", None: "not measured"}[target.reached]
                text = f"({target.list}) {target.text}"
                lines.append(f"{text:55}{number_text(target.measured):>10}  {target.limit_text:9} {verdict}")
            break
    if report.photos is not None:
        lines += [f"skipped: {line}" for line in report.photos.unreadable]
        for row, scores in report.photos.scores.items():
            numbers = f"PSNR {scores['psnr'].value:.2f} dB, SSIM {scores['ssim'].value:.3f}"
            lines.append(f"{len(report.photos.names)} photographs, {ROWS[row]}: {numbers}")
    return "\n".join(lines)


def _score_table(name: ListName, result: ListResult) -> Iterator[str]:
    """The scores of a list as a table for each split, with one line per row."""
    for split, scores in result.scores.items():
        columns = [column for column in COLUMNS if any(column in row for row in scores.values())]
        n = sum(entry.split == split for entry in result.entries)
        yield f"{f'list ({name}), {split}, {n} entries':34}" + "".join(f"{c:>13}" for c in columns)
        for row, values in scores.items():
            numbers = (values[c].value if c in values else None for c in columns)
            yield f"{ROWS[row]:34}" + "".join(f"{number_text(value):>13}" for value in numbers)


def machine(device: torch.device) -> str:
    """The machine that computed the scores, in one line."""
    if device.type == "cuda":
        chip = torch.cuda.get_device_name(device)
    else:
        chip = f"{_processor()}, {torch.get_num_threads()} threads"
    return f"{chip}; {platform.system()}, Python {platform.python_version()}, torch {torch.__version__}"


def _processor() -> str:
    try:  # on Linux, platform.processor() knows only the architecture
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def sha256_of(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of a model folder, by its path in the folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def to_json(report: Report, model: Path, before: Path | None) -> dict[str, Any]:
    """The report without its images. ``model`` and ``before`` are the folders of the models."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "wuerstchen": __version__,
        "model": sha256_of(model),
        "before": None if before is None else sha256_of(before),
        "machine": report.machine,
        "seconds": round(report.seconds, 1),
        "settings": report.settings,
        "targets": {
            split: [dataclasses.asdict(target) | {"reached": target.reached} for target in found]
            for split, found in report.targets.items()
        },
        "lists": {
            name: {
                "scores": _plain(result.scores),
                "entries": [
                    dataclasses.asdict(entry)
                    | {"rows": {row: _plain(measured[i]) for row, measured in result.measured.items()}}
                    for i, entry in enumerate(result.entries)
                ],
            }
            for name, result in report.lists.items()
        },
        "photos": None,
    }
    if (photos := report.photos) is not None:
        content["photos"] = {
            "n": len(photos.names),
            "enlarged": photos.enlarged,
            "unreadable": photos.unreadable,
            "scores": _plain(photos.scores),
            "entries": [
                {"name": name, "rows": {row: values[i] for row, values in photos.measured.items()}}
                for i, name in enumerate(photos.names)
            ],
        }
    return content


def _plain(value: Any) -> Any:
    """Dictionaries of dataclasses as dictionaries alone."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return dataclasses.asdict(value)

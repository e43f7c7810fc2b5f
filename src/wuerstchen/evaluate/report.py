"""Scores a model on the two lists and on photographs, and checks it against its targets."""

import dataclasses
import hashlib
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from wuerstchen.data.folder import SUFFIXES
from wuerstchen.defaults import usual_defaults
from wuerstchen.errors import DataError, UserError
from wuerstchen.evaluate.features import FeatureNetwork
from wuerstchen.evaluate.judges import load_judges
from wuerstchen.evaluate.lists import LISTS, SPLITS, Entry, ListName, RealPictures, Split, select
from wuerstchen.evaluate.metrics import Score, mean, psnr, ssim
from wuerstchen.evaluate.scoring import (
    COLUMNS,
    FEATURES,
    LITE0,
    ROWS,
    Artist,
    Column,
    ListResult,
    Row,
    score_list,
    strip,
)
from wuerstchen.images import center_crop_resize, open_image
from wuerstchen.pipeline import Wuerstchen
from wuerstchen.sampling import Sampling
from wuerstchen.version import __version__

FORMAT = 1
"""Of ``report.json``; raised by one whenever programs that read it would misread it."""

PHOTO_ROWS: tuple[Row, ...] = ("stage_a", "stage_a_quantised", "a_b")
SHOWN_ENTRIES = 24
"""Entries of each list and split, and photographs, that the page shows."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A promise about one split, and whether it is kept."""

    text: str
    list: ListName
    measured: float | None
    """None if the rows it needs were not scored."""
    limit: float | None
    at_least: bool
    """Whether ``limit`` is the least allowed value; else it is the most."""

    @property
    def reached(self) -> bool | None:
        if self.measured is None or self.limit is None:
            return None
        over = self.measured - self.limit
        # Shares of 500 that are equal in exact arithmetic may differ in their last bit.
        return over >= -1e-9 if self.at_least else over <= 1e-9

    @property
    def limit_text(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {number_text(self.limit)}"


@dataclass(frozen=True, kw_only=True)
class PhotoResult:
    """How photographs come through Stage A and through the map."""

    names: list[str]
    """Relative to the folder, in order."""
    unreadable: list[str]
    """One line for each file that was skipped."""
    enlarged: int
    """Photographs smaller than the model's pictures: blown up they are easier than they should be."""
    measured: dict[Row, list[tuple[float, float]]]
    """PSNR in dB and SSIM of each photograph."""
    scores: dict[Row, dict[Column, Score]]
    strips: dict[int, bytes]
    """For the page: photograph and rows side by side as WebP, by position."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that one evaluation found."""

    settings: dict[str, Any]
    machine: str
    seconds: float
    lists: dict[ListName, ListResult]
    targets: dict[Split, list[Target]]
    photos: PhotoResult | None


@usual_defaults()
def evaluate(
    model: Wuerstchen,
    data: Path | None = None,
    *,
    lists: Sequence[ListName] = LISTS,
    splits: Sequence[Split] = SPLITS,
    rows: Sequence[Row] | None = None,
    limit: int | None = None,
    sampling: Sampling | None = None,
    before: Wuerstchen | None = None,
    photos: Path | None = None,
    batch_size: int | None = None,
    shown: int = SHOWN_ENTRIES,
    first_seed: int = 0,
    against_targets: bool = False,
    announce: Callable[[str], None] = lambda line: None,
) -> Report:
    """Scores ``model`` on the lists with the emoji set in ``data``, and on the photographs in ``photos``.

    Either may be None, not both. ``rows`` are all that the model and ``before`` allow; ``limit`` takes the
    first entries of each list and split only, and the first photographs. ``batch_size`` is 8 on a CPU and 64
    elsewhere. ``first_seed`` is added to all seeds. ``against_targets`` judges the scores by the targets of
    the model in the package; they are meant for that model and for whole lists. ``announce`` gets a line that
    says what it will cost. Raises ``DataError`` for a set that is not built or a folder without
    photographs, and ``UserError`` for rows that the model cannot draw.
    """
    artist = Artist(model=model, sampling=sampling or Sampling(), before=before, first_seed=first_seed)
    settings = model.settings_of(artist.sampling)
    rows = artist.rows() if rows is None else rows
    if batch_size is None:
        batch_size = 8 if model.device.type == "cpu" else 64
    _check_request(artist, rows, limit, batch_size)
    if data is None and photos is None:
        raise DataError("neither an emoji set nor photographs were given; name one of them")

    entries = {} if data is None else {name: select(name, splits, limit) for name in lists}
    real = None if data is None else RealPictures(data)
    for part in entries.values():
        assert real is not None
        real.check(part)
    photo_files = [] if photos is None else _photo_files(photos)[:limit]

    count = sum(map(len, entries.values()))
    announce(cost(rows, count, len(photo_files), artist.rows()))
    began = time.monotonic()
    results: dict[ListName, ListResult] = {}
    photo_result = None
    with _bar(count + len(photo_files)) as bar:
        if real is not None:
            results = _score_lists(entries, artist, rows, real, batch_size, shown, bar)
        if photos is not None:
            bar.set_description("photographs")
            photo_result = score_photos(photos, photo_files, artist, batch_size, shown, bar.update)
    return Report(
        settings={
            "image_size": artist.size,
            "sampling": settings,
            "splits": list(splits),
            "limit": limit,
            "batch_size": batch_size,
            "data": None if real is None else real.source.fingerprint(),
        },
        machine=machine(model.device),
        seconds=time.monotonic() - began,
        lists=results,
        targets={
            split: targets({name: result.scores.get(split, {}) for name, result in results.items()})
            for split in splits
            if results and against_targets
        },
        photos=photo_result,
    )


def _check_request(artist: Artist, rows: Sequence[Row], limit: int | None, batch_size: int) -> None:
    """Raises ``UserError`` for what cannot be drawn."""
    for row in rows:
        if row not in artist.rows():
            raise UserError(f"row {row!r} needs a part that this model lacks; leave it out")
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit} leaves nothing to score; use at least 1")
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size} draws nothing; use at least 1")


def _bar(total: int) -> "tqdm[Any]":
    return tqdm(
        total=total,
        unit="picture",
        smoothing=0,
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 60,  # a log has a line a minute
    )


def _score_lists(
    entries: Mapping[ListName, Sequence[Entry]],
    artist: Artist,
    rows: Sequence[Row],
    real: RealPictures,
    batch_size: int,
    shown: int,
    bar: "tqdm[Any]",
) -> dict[ListName, ListResult]:
    """Draws and scores every list."""
    device = artist.model.device
    look, look_lite0 = (FeatureNetwork(network, device) for network in (FEATURES, LITE0))
    judge = load_judges(device)
    results: dict[ListName, ListResult] = {}
    for name, part in entries.items():
        bar.set_description(f"list ({name})")
        results[name] = score_list(
            name,
            part,
            artist=artist,
            rows=rows,
            real=real,
            look=look,
            look_lite0=look_lite0,
            judge=judge,
            batch_size=batch_size,
            shown=shown,
            on_batch=bar.update,
        )
    return results


def cost(rows: Sequence[Row], entries: int, photos: int, photo_rows: Sequence[Row]) -> str:
    """What has to be computed, in one line."""
    from_text = entries * sum(row in ("c_b_a", "before") for row in rows)
    through_map = entries * ("a_b" in rows) + photos * ("a_b" in photo_rows)
    return (
        f"{entries} entries and {photos} photographs: {from_text:,} pictures to draw from text, "
        f"{through_map:,} to take through the map; the bar knows how long after the first batch"
    )


def targets(scores: dict[ListName, dict[Row, dict[Column, Score]]]) -> list[Target]:
    """What the model in the package promises, against the scores of one split, by list and row."""

    def value(name: ListName, row: Row, column: Column) -> float:
        score = scores.get(name, {}).get(row, {}).get(column)
        return math.nan if score is None else score.value

    def target(text: str, name: ListName, measured: float, limit: float, *, at_least: bool = True) -> Target:
        return Target(
            text=text,
            list=name,
            measured=None if math.isnan(measured) else measured,
            limit=None if math.isnan(limit) else limit,
            at_least=at_least,
        )

    real_recall, real_style = value("a", "real", "recall_1"), value("a", "real", "style")
    recall, through_map = value("a", "c_b_a", "recall_1"), value("a", "a_b", "kid_e3")
    jpeg_kid = value("a", "jpeg20", "kid_e3")
    lost = value("a", "before", "recall_1") - recall
    return [
        target("Stage A, unquantised: PSNR in dB", "b", value("b", "stage_a", "psnr"), 30.0),
        target("A+B: R@1, 0.85 of real", "a", value("a", "a_b", "recall_1"), 0.85 * real_recall),
        target("A+B: KID×1e3, twice that of JPEG q20", "a", through_map, 2 * jpeg_kid, at_least=False),
        target("C+B+A: R@1, 0.75 of real", "a", recall, 0.75 * real_recall),
        target("C+B+A: style, 0.9 of real", "a", value("a", "c_b_a", "style"), 0.9 * real_style),
        target("C+B+A: background colour", "b", value("b", "c_b_a", "background"), 0.95),
        target("C+B+A: object colour", "b", value("b", "c_b_a", "object"), 0.85),
        target(
            "C+B+A: KID×1e3, that of A+B and of JPEG q20",
            "a",
            value("a", "c_b_a", "kid_e3"),
            through_map + jpeg_kid,
            at_least=False,
        ),
        target("C+B+A: R@1 lost by storing it small", "a", lost, 0.01, at_least=False),
    ]


def score_photos(
    root: Path,
    files: Sequence[Path],
    artist: Artist,
    batch_size: int,
    shown: int,
    on_batch: Callable[[int], None],
) -> PhotoResult:
    """Takes photographs, centre-cropped to the model's size, through Stage A and through the map.

    Files that cannot be read are left out and named in the result. Raises ``DataError`` if none is left.
    """
    rows = tuple(row for row in PHOTO_ROWS if row in artist.rows())
    measured: dict[Row, list[tuple[float, float]]] = {row: [] for row in rows}
    names: list[str] = []
    unreadable: list[str] = []
    strips: dict[int, bytes] = {}
    enlarged = 0
    for start in range(0, len(files), batch_size):
        batch: list[np.ndarray] = []
        first = len(names)
        for path in files[start : start + batch_size]:
            try:
                image = open_image(path)
            except DataError as error:
                unreadable.append(str(error))
                continue
            enlarged += min(image.size) < artist.size
            batch.append(np.asarray(center_crop_resize(image, artist.size)))
            names.append(path.relative_to(root).as_posix())
        if batch:
            originals = np.stack(batch)
            seeds = range(first, len(names))
            drawn = {row: artist.draw(row, originals, None, seeds) for row in rows}
            for row, pictures in drawn.items():
                pairs = zip(psnr(pictures, originals), ssim(pictures, originals), strict=True)
                measured[row] += [(float(p), float(s)) for p, s in pairs]
            for i, number in enumerate(seeds):
                if number < shown:
                    strips[number] = strip([originals[i], *(drawn[row][i] for row in rows)])
        on_batch(len(files[start : start + batch_size]))
    if not names:
        raise DataError(f"{root} holds no photograph that can be read ({unreadable[0]}); give other files")
    scores: dict[Row, dict[Column, Score]] = {
        row: {"psnr": mean([p for p, _ in values]), "ssim": mean([s for _, s in values])}
        for row, values in measured.items()
    }
    return PhotoResult(
        names=names, unreadable=unreadable, enlarged=enlarged, measured=measured, scores=scores, strips=strips
    )


def _photo_files(root: Path) -> list[Path]:
    """The image files under ``root`` by name, hidden ones left out."""
    if not root.is_dir():
        raise DataError(f"photos {str(root)!r} is no folder; give one with images in it")
    files = [
        path
        for path in sorted(root.rglob("*"))
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
    ]
    if not files:
        raise DataError(
            f"photos {str(root)!r} holds no images ({', '.join(sorted(SUFFIXES))}); give a folder that does"
        )
    return files


def summary(report: Report) -> str:
    """The scores as tables of plain text, with the targets on test, or else val, if the model was judged by
    them, and how photographs fare."""
    lines = [line for name, result in report.lists.items() for line in _score_table(name, result)]
    if report.settings["limit"] is not None and report.lists:
        lines.append(
            f"only the first {report.settings['limit']} of each list and split: a quick look, no result"
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
    """A list's scores, a line a row, for each split."""
    for split, scores in result.scores.items():
        columns = [column for column in COLUMNS if any(column in row for row in scores.values())]
        n = sum(entry.split == split for entry in result.entries)
        yield f"{f'list ({name}), {split}, {n} entries':34}" + "".join(f"{c:>13}" for c in columns)
        for row, values in scores.items():
            numbers = (values[c].value if c in values else None for c in columns)
            yield f"{ROWS[row]:34}" + "".join(f"{number_text(value):>13}" for value in numbers)


def number_text(value: float | None) -> str:
    """Three digits, or a dash for what was not measured."""
    return "–" if value is None else f"{value:.3f}"


def machine(device: torch.device) -> str:
    """What the numbers were computed on, as one line."""
    if device.type == "cuda":
        chip = torch.cuda.get_device_name(device)
    else:
        chip = f"{_processor()}, {torch.get_num_threads()} threads"
    return f"{chip}; {platform.system()}, Python {platform.python_version()}, torch {torch.__version__}"


def _processor() -> str:
    try:  # on Linux platform knows only the architecture
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def sha256_of(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of a model folder, by its name in it."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def to_json(report: Report, model: Path, before: Path | None) -> dict[str, Any]:
    """All of the report but its pictures. ``model`` and ``before`` are the folders of the models."""
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
    """Dataclasses in dictionaries as what JSON can hold."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return dataclasses.asdict(value)

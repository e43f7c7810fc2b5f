"""The page of a run, from ``log.jsonl`` and the run folder. Works at any time, also while the run goes on.

The log may end in an incomplete line. After a kill, the resumed run trains the same images again: points
beyond the image at which a later start resumed are left out of the curves.
"""

import html
import json
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wuerstchen.data.emoji import write_whole
from wuerstchen.errors import RunFolderError
from wuerstchen.image_files import check_writable
from wuerstchen.train.report import curves
from wuerstchen.train.report.announce import total
from wuerstchen.train.report.cost import (
    Cost,
    Tariff,
    duration,
    number_in,
    remaining_costs,
    tariff_of,
    total_cost,
)
from wuerstchen.train.report.curves import Line, Point, chart
from wuerstchen.train.report.events import read_events
from wuerstchen.train.report.parts import STYLE, previews, row, table

_NAMES = 5  # images named for each reason
_SKIPPED = "…"
_BEFORE_STARTS = ("rehearsed", "change", "change moved")  # events outside of training

_COLUMNS = (
    "",
    "images",
    "of",
    "loss",
    "validation",
    "img/s",
    "time",
    "kWh",
    "kg CO2",
    "money",
    "remaining",
)
"""Columns of the table of stages."""

_TITLES = {
    "loss": "loss",
    "learning_rate": "learning rate",
    "images_per_second": "images per second",
    "memory_gib": "peak GPU memory, GiB",
    "matrix_share": "MFU (model FLOPs utilisation)",
}
_LAST = ("learning_rate", "images_per_second", "matrix_share", "memory_gib")  # drawn after losses and norms
_NO_CURVES = {"time", "images", "seconds", "kwh", "event", "stage"}


@dataclass
class _Start:
    """One start of a stage."""

    time: float
    stage: str
    images: float
    device: str
    last_time: float
    last_images: float
    stopped: bool = False


@dataclass
class _Stage:
    """The log of one stage."""

    name: str
    images: float = 0.0
    total: float = 0.0
    values: dict[str, list[Point]] = field(default_factory=dict)
    validation: list[tuple[float, list[float | None]]] = field(default_factory=list)
    times: list[str] = field(default_factory=list)
    """The times of validation. Empty for equal bins."""
    starts: list[_Start] = field(default_factory=list)


def write_report(run_dir: Path, out: Path | None = None, tariff: Tariff | None = None) -> Path:
    """Writes the page, ``run_dir/report.html`` unless ``out`` names another file, and returns its path.

    ``tariff`` replaces the tariff of the run. Raises ``RunFolderError`` if ``run_dir`` is not a run folder,
    and ``UserError`` if the page cannot be written.
    """
    log = run_dir / "log.jsonl"
    if not log.is_file():
        raise RunFolderError(
            f"{run_dir} is not a run folder: it has no log.jsonl. Use the --run-dir of a run."
        )
    try:
        events = read_events(log)
    except OSError as error:
        raise RunFolderError(f"{log} cannot be read: {error.strerror}. Change its permissions.") from error
    page = out or run_dir / "report.html"
    check_writable(page.parent)
    text = html_page(run_dir, events, tariff or tariff_of(events))
    write_whole(page, text.encode(errors="replace"))
    return page


def html_page(run_dir: Path, events: Sequence[dict[str, Any]], tariff: Tariff) -> str:
    """The page of a run with these events, as HTML."""
    settings = _settings(run_dir)
    stages = read_stages(events)
    title = html.escape(f"Run {run_dir.absolute().name}")
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}{curves.STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n",
        _facts(run_dir, settings, events),
        "<h2>Stages and cost</h2>" + _stages_table(stages, events, tariff),
    ]
    for stage in stages.values():
        parts.append(_stage_part(stage, run_dir / f"stage_{stage.name}", _prompts(settings)))
    parts += [_starts(stages), _changes(events), _skipped(events), _checkpoints(run_dir)]
    return "\n".join(parts) + "\n</body>\n</html>\n"


def read_stages(events: Sequence[dict[str, Any]]) -> dict[str, _Stage]:
    """The curves of each stage. A start drops points beyond its first image that earlier starts logged."""
    stages: dict[str, _Stage] = {}
    for event in events:
        name, images = event.get("stage"), number_in(event, "images")
        if not isinstance(name, str) or images is None or event["event"] in _BEFORE_STARTS:
            continue
        if not re.fullmatch(r"\w{1,20}", name):
            continue  # the name becomes part of a path
        stage = stages.setdefault(name, _Stage(name))
        when = number_in(event, "time") or 0.0
        if event["event"] == "start":
            device = str(event.get("device", ""))
            stage.starts.append(_Start(when, name, images, device, when, images))
            stage.images, stage.total = images, number_in(event, "total") or stage.total
            stage.values = {key: [p for p in line if p[0] <= images] for key, line in stage.values.items()}
            stage.validation = [entry for entry in stage.validation if entry[0] <= images]
            continue
        stage.images = max(stage.images, images)
        if stage.starts:
            last = stage.starts[-1]
            last.last_time, last.last_images = when, max(last.last_images, images)
            last.stopped = event["event"] == "stopped"
        if event["event"] == "progress":
            for key in event.keys() - _NO_CURVES:
                value = number_in(event, key)
                if value is not None:
                    _append(stage.values.setdefault(key, []), (images, value))
        elif event["event"] == "validation" and isinstance(event.get("bins"), list):
            entry = (images, [number_in({"bin": value}, "bin") for value in event["bins"]])
            _append(stage.validation, entry)
            times = event.get("times")
            stage.times = [*map(str, times)] if isinstance(times, list) else []
            loss = number_in(event, "loss")
            if loss is not None:
                _append(stage.values.setdefault("validation", []), (images, loss))
    return stages


def _append(line: list, entry: tuple) -> None:
    """Appends in order of images. An entry replaces earlier entries for the same or later images."""
    while line and line[-1][0] >= entry[0]:
        line.pop()
    line.append(entry)


def _settings(run_dir: Path) -> dict[str, Any]:
    """The content of ``run.json``. Empty if it cannot be read."""
    try:
        content = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _prompts(settings: Mapping[str, Any]) -> list[str]:
    """The preview prompts of the recipe."""
    recipe = settings.get("recipe")
    found = recipe.get("preview_prompts") if isinstance(recipe, dict) else None
    return [prompt for prompt in found if isinstance(prompt, str)] if isinstance(found, list) else []


def _facts(run_dir: Path, settings: Mapping[str, Any], events: Sequence[dict[str, Any]]) -> str:
    recipe = settings.get("recipe")
    recipe = recipe if isinstance(recipe, dict) else {}
    named = ("name", "data", "image_size", "seed", "precision", "acceleration", "prepared_images")
    facts = {
        "recipe" if key == "name" else key.replace("_", " "): recipe[key] for key in named if key in recipe
    }
    if isinstance(settings.get("data"), str):
        facts["fingerprint of the data"] = settings["data"]
    times = [t for event in events if (t := number_in(event, "time")) is not None]
    if times:
        facts["first line"], facts["last line"] = _date(times[0]), _date(times[-1])
    facts["state"] = _state(run_dir, events)
    facts["page made"] = _date(time.time())
    rows = (f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in facts.items())
    return f"<dl>{''.join(rows)}</dl>"


def _state(run_dir: Path, events: Sequence[dict[str, Any]]) -> str:
    last = events[-1]["event"] if events else ""
    made = (run_dir / "model" / "model.json").is_file() or (run_dir / "lora").is_dir()
    if last == "end" and made:
        return "finished"
    if last == "stopped":
        return "stopped by a signal. The same command resumes it"
    return "not finished: still running, or killed after the last line"


def _date(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (ValueError, OverflowError, OSError):
        return "?"


def _stages_table(stages: Mapping[str, _Stage], events: Sequence[dict[str, Any]], tariff: Tariff) -> str:
    spent, remaining = total_cost(events), remaining_costs(events)
    names = list(dict.fromkeys([*stages, *remaining]))
    rows = ""
    for name in names:
        stage = stages.get(name, _Stage(name))
        lines = stage.values
        ends = [lines[key][-1][1] if lines.get(key) else None for key in ("validation", "images_per_second")]
        loss = curves.smoothed(lines["loss"])[-1][1] if lines.get("loss") else None
        fraction = f" ({stage.images / stage.total:.0%})" if stage.total else ""
        left = remaining.get(name)
        cells = [
            f"Stage {html.escape(name.upper())}",
            f"{stage.images:,.0f}{fraction}" if name in stages else "",
            f"{stage.total:,.0f}" if stage.total else "",
            *("" if value is None else curves.short(value) for value in (loss, *ends)),
            *_cost_cells(spent.get(name), tariff),
            "" if left is None or not left.seconds else duration(left.seconds),
        ]
        rows += row(_COLUMNS, cells)
    so_far = total(spent.values()) if spent else None
    left = total(remaining.values()) if remaining else None
    for title, cost in (
        ("so far", so_far),
        ("remaining", left if left is not None and left.seconds else None),
        ("in total", so_far + left if so_far is not None and left is not None and left.seconds else None),
    ):
        if cost is not None:
            cells = [f"<b>{title}</b>", "", *_cost_cells(cost, tariff), ""]
            rows += row(("", "", *_COLUMNS[6:]), cells).replace("<td></td>", '<td colspan="5"></td>', 1)
    prices = [f"CO2: {tariff.kg_per_kwh:g} kg per kWh ({tariff.grid})"]
    prices += [f"{price:g} per hour"] if (price := tariff.per_hour) is not None else []
    prices += [f"{price:g} per kWh"] if (price := tariff.per_kwh) is not None else []
    notes = ["Energy is that of the GPU only, by its own counter."]
    if any(cost.kwh is None for cost in spent.values()):
        notes.append("A dash means that it was not measured.")
    if any(name not in remaining and stages[name].images < stages[name].total for name in stages):
        notes.append("A stage without a remaining cost has no measured speed yet.")
    notes.append(f"{', '.join(prices)}. Remaining: at the latest speed.")
    return f'{table(_COLUMNS, rows)}<p class="note">{html.escape(" ".join(notes))}</p>'


def _cost_cells(cost: Cost | None, tariff: Tariff) -> list[str]:
    if cost is None:
        return ["", "", "", ""]
    co2, money = tariff.kg_co2(cost), tariff.money(cost)
    return [
        duration(cost.seconds),
        "–" if cost.kwh is None else f"{cost.kwh:.3g}",
        "–" if co2 is None else f"{co2:.3g}",
        "–" if money is None else f"{money:,.2f}",
    ]


def _stage_part(stage: _Stage, folder: Path, prompts: Sequence[str]) -> str:
    starts = [start.images for start in stage.starts[1:] if start.images < stage.total]
    values = stage.values
    losses = [key for key in values if key.startswith("loss_")]
    norms = sorted(key for key in values if key.startswith("gradient_"))
    used = {"loss", "validation", *losses, *norms, *_LAST}
    charts = [chart("loss", [Line(name="loss", points=values.get("loss", []), smooth=True)], starts)]
    charts += [
        chart(_title(k), [Line(name=k, points=values[k], smooth=True)], starts) for k in sorted(losses)
    ]
    charts.append(_validation(stage, starts))
    lines = [Line(name="validation", points=values.get("validation", []))]
    charts.append(chart("validation loss, weighted as in training", lines, starts))
    lines = [Line(name=key.removeprefix("gradient_"), points=values[key], smooth=True) for key in norms]
    charts.append(chart("gradient norm", lines, starts))
    terms = [k for k in values if k not in used and not any(values[k] == values[loss] for loss in losses)]
    for key in sorted(terms):  # a term that equals a loss is already drawn
        charts.append(chart(_title(key), [Line(name=key, points=values[key], smooth=True)], starts))
    for key in _LAST:
        if key in values:
            lines = [Line(name=key, points=values[key], smooth=key == "images_per_second")]
            charts.append(chart(_title(key), lines, starts, log=False))
    drawn = "".join(charts) or '<p class="note">No curves yet: the log has fewer than two lines.</p>'
    note = (
        '<p class="note">Over images seen. Faint lines are the logged values, with the running mean on top.'
    )
    note += " Dotted lines mark where training was resumed.</p>" if starts else "</p>"
    head = f"<h2>Stage {html.escape(stage.name.upper())}</h2>"
    return f'{head}<div class="grid">{drawn}</div>{note}{previews(folder, prompts)}'


def _title(key: str) -> str:
    title = _TITLES.get(key, key.replace("_", " "))
    return f"loss of {title.removeprefix('loss ')}" if key.startswith("loss_") else title


def _validation(stage: _Stage, starts: Sequence[float]) -> str:
    count = max((len(bins) for _, bins in stage.validation), default=0)
    lines = []
    for k in range(min(count, 32)):
        points = [(x, y) for x, bins in stage.validation if k < len(bins) and (y := bins[k]) is not None]
        name = f"t {k / count:.3g}–{(k + 1) / count:.3g}"
        if len(stage.times) == count:
            name = f"t {stage.times[k][:5]}"
        lines.append(Line(name=name, points=points))
    return chart("validation: prediction error by time (0 clean, 1 noise)", lines, starts)


def _starts(stages: Mapping[str, _Stage]) -> str:
    starts = sorted((s for stage in stages.values() for s in stage.starts), key=lambda s: s.time)
    if not starts:
        return "<h2>Starts and stops</h2><p>Nothing has started yet.</p>"
    names = ("start", "stage", "from image", "to image", "device", "last line", "how it ended")
    texts, rows = ("device", "how it ended"), ""
    for number, start in enumerate(starts):
        later = [s for s in starts[number + 1 :] if s.stage == start.stage]
        at_end = start.last_images >= stages[start.stage].total > 0
        if start.stopped:
            end = "stopped by a signal"
        elif at_end:
            end = "finished"
        elif not later:
            end = "running, or killed"
        else:
            lost = start.last_images - later[0].images
            end = "killed" + (f", {lost:,.0f} images trained again" if lost > 0 else "")
        cells = [
            _date(start.time),
            html.escape(start.stage.upper()),
            f"{start.images:,.0f}",
            f"{start.last_images:,.0f}",
            html.escape(start.device),
            _date(start.last_time),
            end,
        ]
        rows += row(names, cells, texts)
    return f"<h2>Starts and stops</h2>{table(names, rows, texts)}"


def _changes(events: Sequence[dict[str, Any]]) -> str:
    """The changes to the recipe since the start of the run. Empty if there are none."""
    names, rows = ("field", "before", "after", "stage", "from image", "requested"), ""
    for event in events:
        stage, images = event.get("stage"), number_in(event, "images")
        if event["event"] != "change" or not isinstance(stage, str) or images is None:
            continue
        cells = [event.get("field"), event.get("before"), event.get("after"), stage.upper(), f"{images:,.0f}"]
        asked = number_in(event, "asked")
        cells.append("?" if asked is None else _date(asked))
        rows += row(names, [html.escape(str(cell)[:200]) for cell in cells], names[:3])
    return f"<h2>Changes to the recipe</h2>{table(names, rows, names[:3])}" if rows else ""


def _skipped(events: Sequence[dict[str, Any]]) -> str:
    reasons: dict[str, str] = {}
    for event in events:
        name, reason = event.get("name"), event.get("reason")
        if event["event"] == "skipped" and isinstance(name, str) and isinstance(reason, str):
            reasons[name] = reason.replace(name, _SKIPPED)
    if not reasons:
        return "<h2>Skipped images</h2><p>None.</p>"
    # The same error differs only in folders and numbers.
    kinds = {name: re.sub(rf"\S*{_SKIPPED}\S*|\d+", _SKIPPED, reason) for name, reason in reasons.items()}
    columns = ("reason", "images", "names")
    texts, rows = ("reason", "names"), ""
    for kind, count in Counter(kinds.values()).most_common():
        names = [name for name, other in kinds.items() if other == kind]
        named = ", ".join(html.escape(name) for name in names[:_NAMES]) + (" …" if count > _NAMES else "")
        rows += row(columns, [html.escape(kind), str(count), named], texts)
    note = f"<p>{len(reasons)} could not be read. The next images took their places.</p>"
    return f"<h2>Skipped images</h2>{note}{table(columns, rows, texts)}"


def _checkpoints(run_dir: Path) -> str:
    names, rows = ("folder", "size", "written"), ""
    for folder in sorted(run_dir.glob("stage_*/checkpoints/[0-9]*")):
        try:
            size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
            written = folder.stat().st_mtime
        except OSError:
            continue  # removed in the meantime
        where = html.escape(str(folder.relative_to(run_dir)))
        rows += row(names, [where, f"{size / 1e6:,.1f} MB", _date(written)])
    if not rows:
        return "<h2>Checkpoints</h2><p>None.</p>"
    return f"<h2>Checkpoints</h2>{table(names, rows)}"

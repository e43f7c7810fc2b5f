"""Curves as inline SVG, without scripts, in colours for light and dark pages."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

Point = tuple[float, float]

_WIDTH, _HEIGHT = 460, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 24  # margins, in SVG units
_POINTS = 400  # maximum per line
_SPAN_OF_LOG = 5  # values with a larger ratio are drawn on a logarithmic scale

STYLE = """
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; font-variant-numeric: tabular-nums; }
svg .axis { stroke: var(--line); stroke-width: 1; } svg .start { stroke: var(--soft); stroke-dasharray: 2 4; }
svg polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; vector-effect: non-scaling-stroke; }
svg .raw { opacity: .3; stroke-width: 1; }
.legend { display: flex; flex-wrap: wrap; gap: 0 .8rem; font-size: .8rem; color: var(--soft); }
.legend i { display: inline-block; width: .9rem; height: .2rem; margin-right: .3rem; vertical-align: middle; }
"""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve: finite points in order of x."""

    name: str
    points: Sequence[Point]
    smooth: bool = False
    """Whether to draw the points faintly, with their running mean on top."""


def chart(title: str, lines: Sequence[Line], starts: Sequence[float] = (), *, log: bool = True) -> str:
    """A figure with the lines over images seen. Empty if no line has two points.

    With ``log``, the y axis is logarithmic if the values are positive and spread widely. ``starts`` are
    marked.
    """
    lines = [replace(line, points=[p for p in line.points if _drawable(p)]) for line in lines]
    lines = [line for line in lines if len(line.points) > 1]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    x_low, x_high = min(xs), max(xs)
    low, high = _range(ys)
    log = log and low > 0 and high / low > _SPAN_OF_LOG
    if not log:
        pad = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
        low, high = (0.0 if 0 <= low < pad * 8 else low - pad), high + pad
    at = math.log if log else float
    y_low, y_high = at(low), at(high)
    if not (math.isfinite(y_low) and math.isfinite(y_high) and y_high > y_low and x_high > x_low):
        return ""

    def place(point: Point) -> tuple[float, float]:
        x = _LEFT + (point[0] - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)
        height = (at(min(max(point[1], low), high)) - y_low) / (y_high - y_low)
        return x, _HEIGHT - _BOTTOM - height * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for value in log_ticks(low, high) if log else ticks(low, high):
        y = place((x_low, value))[1]
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>')
    for value in ticks(x_low, x_high):
        x = place((value, low))[0]
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{short(value)}</text>')
    for start in starts:
        if x_low < start < x_high:
            x = place((start, low))[0]
            y2 = _HEIGHT - _BOTTOM
            parts.append(f'<line class="start" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{y2}"/>')
    for number, line in enumerate(lines):
        colour = f"var(--c{number % 8})"
        if line.smooth:
            parts.append(_polyline(_thinned(line.points, extremes=True), place, colour, ' class="raw"'))
        points = _thinned(smoothed(line.points) if line.smooth else line.points)
        parts.append(_polyline(points, place, colour))
    note = ""
    if len(lines) == 1:
        points = smoothed(lines[0].points) if lines[0].smooth else lines[0].points
        note = f" <small>{short(points[-1][1])} at the end</small>"
    label = html.escape(title, quote=True)
    return (
        f"<figure><figcaption>{html.escape(title)}{note}{' <small>log scale</small>' if log else ''}"
        f'</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg>{_legend(lines)}</figure>"
    )


def _drawable(point: Point) -> bool:
    """Whether the coordinates are 0 or far from overflow and underflow."""
    return all(value == 0 or 1e-100 < abs(value) < 1e100 for value in point)


def _legend(lines: Sequence[Line]) -> str:
    if len(lines) < 2:
        return ""
    entries = (
        f'<span><i style="background:var(--c{number % 8})"></i>{html.escape(line.name)}</span>'
        for number, line in enumerate(lines)
    )
    return f'<div class="legend">{"".join(entries)}</div>'


def _polyline(points: Sequence[Point], place, colour: str, attributes: str = "") -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, points))
    return f'<polyline{attributes} stroke="{colour}" points="{path}"/>'


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The lowest and highest value, without single outliers at the top."""
    ordered = sorted(values)
    if len(ordered) < 50:
        return ordered[0], ordered[-1]
    usual = ordered[int(len(ordered) * 0.995) - 1]
    return ordered[0], min(ordered[-1], usual * 3 if usual > 0 else ordered[-1])


def smoothed(points: Sequence[Point]) -> list[Point]:
    """The running mean over about the last fiftieth of the points, corrected for its start at 0."""
    keep = 1 - 1 / max(1.0, min(len(points) / 10, len(points) / 50 + 4))
    mean, weight, result = 0.0, 0.0, []
    for x, y in points:
        mean, weight = keep * mean + (1 - keep) * y, keep * weight + (1 - keep)
        result.append((x, mean / weight))
    return result


def _thinned(points: Sequence[Point], extremes: bool = False) -> Sequence[Point]:
    """At most ``_POINTS`` points. With ``extremes``, the lowest and highest of each interval."""
    if len(points) <= _POINTS:
        return points
    result: list[Point] = []
    count = _POINTS // 2 if extremes else _POINTS
    for k in range(count):
        interval = points[k * len(points) // count : (k + 1) * len(points) // count]
        if extremes:
            ends = {min(interval, key=lambda p: p[1]), max(interval, key=lambda p: p[1])}
            result += sorted(ends)
        else:
            result.append(interval[-1])
    return result


def ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers between ``low`` and ``high``."""
    rough = (high - low) / 8
    power = 10 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [float(k * step) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between ``low`` and ``high``, and 2 and 5 times these if there is room."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        values = [f * 10.0**e for e in exponents for f in factors]
        inside = [value for value in values if low <= value <= high]
        if len(inside) <= 7:
            return inside
    return inside[:: math.ceil(len(inside) / 7)]


def short(value: float) -> str:
    """A number in a few characters: 0.0123, 12.3, 1.2M, 1e-5."""
    if value == 0:
        return "0"
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            scale = 1e3 if letter == "k" else limit
            return f"{value / scale:.3g}{letter}" if abs(value) < 1e12 else f"{value:.2g}"
    if abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2g}".split("e") if "e" in f"{value:.2g}" else (f"{value:.2g}", "")
        return f"{mantissa}e{int(exponent)}" if exponent else mantissa
    return f"{value:.4g}" if abs(value) >= 1000 else f"{value:.3g}"

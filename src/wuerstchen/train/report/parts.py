"""Parts of a run's page: the style, tables, and previews with their labels."""

import base64
import html
import io
import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from wuerstchen.errors import UserError
from wuerstchen.image_files import read_settings

_PREVIEWS = 6  # maximum per stage
_PREVIEW_SIDE = 900  # maximum, in pixels
_PREVIEW_PIXELS = 100_000_000  # larger files are not opened
_LABELS, _LABEL = 256, 200  # maximum labels of a preview, and characters of a label

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #777; --good: #18794e; --bad: #b4232c;
  --c0: #2563eb; --c1: #d97706; --c2: #059669; --c3: #c026d3; --c4: #dc2626; --c5: #0891b2; --c6: #7c3aed;
  --c7: #65a30d; }
@media (prefers-color-scheme: dark) { :root { --soft: #999; --good: #4cc38a; --bad: #ff8589;
  --c0: #60a5fa; --c1: #fbbf24; --c2: #34d399; --c3: #e879f9; --c4: #f87171; --c5: #22d3ee; --c6: #a78bfa;
  --c7: #a3e635; } }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 75rem; overflow-wrap: anywhere;
  padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; } h3 { font-size: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.text { min-width: 6rem; overflow-wrap: anywhere; text-align: left; white-space: normal; }
@media (max-width: 66rem) {
  table, tbody, tr, th, td { display: block; }
  thead, td:empty, td[data-name]:empty { display: none; }
  tr { border-bottom: 1px solid var(--line); padding: .4rem 0; }
  th, td, .text { border: 0; min-width: 0; overflow-wrap: anywhere; padding: .05rem 0; text-align: left;
    white-space: normal; }
  td[data-name] { display: grid; gap: 0 1rem; grid-template-columns: 8rem 1fr; }
  td[data-name]::before { color: var(--soft); content: attr(data-name); }
  th:first-child, td:first-child { font-weight: 600; }
}
small, .note { color: var(--soft); } small { font-size: .8em; margin-left: .4em; }
.good { color: var(--good); } .bad { color: var(--bad); }
.wide + .grid { margin-top: 1rem; }
.grid { display: grid; gap: 1.4rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
figure { margin: 0; } figure img { display: block; width: 100%; height: auto; border-radius: 4px; }
figcaption { font-size: .9rem; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: auto 1fr; gap: .1rem 1rem; overflow-wrap: anywhere; }
dt { color: var(--soft); } dd { margin: 0; } code { font-size: .8em; }
"""


def table(names: Sequence[str], rows: str, texts: Sequence[str] = ()) -> str:
    """A table of ``rows`` below a header with the column names. Columns in ``texts`` wrap."""
    head = "".join(f"<th{_kind(name, texts)}>{name}</th>" for name in names)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>{rows}</table></div>'


def row(names: Sequence[str], cells: Sequence[str], texts: Sequence[str] = ()) -> str:
    """A row of a table. Cells are HTML. Each has the name of its column, for narrow screens."""
    parts = []
    for name, cell in zip(names, cells, strict=True):
        named = f' data-name="{name}"' if name and parts else ""  # the first cell is the title of the row
        parts.append(f"<td{_kind(name, texts)}{named}>{cell}</td>")
    return f"<tr>{''.join(parts)}</tr>"


def _kind(name: str, texts: Sequence[str]) -> str:
    return ' class="text"' if name in texts else ""


class _Shown(NamedTuple):
    """The labels of a preview, from its file. Either ``rows`` or ``prompts`` is empty."""

    rows: tuple[str, ...]
    """One label per row, from the top."""
    prompts: tuple[str, ...]
    """One prompt per image, row by row."""
    columns: int
    """Images per row. 0 if the file does not say."""


def previews(folder: Path, prompts: Sequence[str]) -> str:
    """Some previews of the stage in ``folder``, including the first and the last, with their labels.

    ``prompts`` are the prompts of the recipe, for previews of Stage C without labels.
    """
    try:
        paths = sorted(p for p in (folder / "previews").glob("*.png") if p.stem.isdecimal() and p.is_file())
    except OSError:
        return ""
    if len(paths) > _PREVIEWS:
        paths = [paths[round(k * (len(paths) - 1) / (_PREVIEWS - 1))] for k in range(_PREVIEWS)]
    drawn = [(_shown(path), figure) for path in paths if (figure := _figure(path))]
    if not drawn:
        return ""
    if not folder.name.startswith("stage_c"):
        prompts = ()
    parts = ["<h3>Previews, from the averaged weights</h3>"]
    for shown, group in itertools.groupby(drawn, lambda item: item[0]):
        parts += [_words(shown, prompts), f'<div class="grid">{"".join(figure for _, figure in group)}</div>']
    return "".join(parts)


def _shown(path: Path) -> _Shown:
    try:
        settings: dict[str, Any] = read_settings(path)
    except (UserError, OSError, ValueError, RecursionError):
        return _Shown((), (), 0)
    rows, prompts = (
        tuple(str(label)[:_LABEL] for label in given[:_LABELS]) if isinstance(given, list) else ()
        for given in (settings.get("rows"), settings.get("prompts"))
    )
    columns = settings.get("columns")
    return _Shown(rows, prompts, columns if isinstance(columns, int) and 0 < columns <= _LABELS else 0)


def _words(shown: _Shown, prompts: Sequence[str]) -> str:
    """The labels of the images: a line, a table with the same layout, or a list."""
    if shown.rows:
        return f'<p class="note">Rows, from the top: {html.escape("; ".join(shown.rows))}.</p>'
    if shown.prompts and shown.columns:
        columns = min(shown.columns, len(shown.prompts))
        names = ["", *(f"image {k}" for k in range(1, columns + 1))]
        rows = ""
        for number, first in enumerate(range(0, len(shown.prompts), columns), 1):
            few = shown.prompts[first : first + columns]
            cells = [html.escape(text) for text in few] + [""] * (columns - len(few))
            rows += row(names, [f"row {number}", *cells], names)
        return f"<p>The prompts, in the same layout as the images:</p>{table(names, rows, names)}"
    if prompts or shown.prompts:
        items = "".join(f"<li>{html.escape(text)}</li>" for text in shown.prompts or prompts)
        return f"<p>The prompts in the order of the images, row by row:</p><ol>{items}</ol>"
    return ""


def _figure(path: Path) -> str:
    """A downscaled preview. Empty if it cannot be read, for instance while it is being written."""
    try:
        with warnings.catch_warnings(), Image.open(path, formats=("PNG",)) as opened:
            warnings.simplefilter("ignore")
            if opened.width * opened.height > _PREVIEW_PIXELS:
                return ""
            image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""
    image.thumbnail((_PREVIEW_SIDE, 2 * _PREVIEW_SIDE), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, "WEBP", quality=80)
    source = f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
    seen = f"after {int(path.stem):,} image{'s' * (int(path.stem) != 1)}"
    return f'<figure><img src="{source}" alt="preview {seen}"><figcaption>{seen}</figcaption></figure>'

"""Writes the report: ``report.json``, and ``report.html``, a self-contained page."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wuerstchen.checkpoints.files import write_json
from wuerstchen.data.emoji import write_whole
from wuerstchen.errors import UserError
from wuerstchen.evaluate.lists import ListName, Split
from wuerstchen.evaluate.metrics import MIN_OBJECT, OBJECT_DISTANCE, Score
from wuerstchen.evaluate.references import FEATURES
from wuerstchen.evaluate.report import PhotoResult, Report, Target, number_text, to_json
from wuerstchen.evaluate.scoring import COLUMNS, ROWS, SHOWN, Column, ListResult, Row
from wuerstchen.image_files import check_writable

_LIST_TITLES: dict[ListName, str] = {
    "a": "List (a): held-out style × subject pairs, plain on white",
    "b": "List (b): composed prompts with colour and background",
}
_COLUMN_TITLES: dict[Column, str] = {
    "recall_1": "R@1",
    "recall_5": "R@5",
    "style": "style",
    "kid_e3": "KID×1e3",
    "kid_lite0_e3": "KID×1e3, Lite0",
    "background": "background",
    "object": "object",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
}
_DIGITS: dict[Column, int] = {"kid_e3": 1, "kid_lite0_e3": 1, "psnr": 2}
_SHORT: dict[Row, str] = {
    "real": "real",
    "stage_a": "A",
    "stage_a_quantised": "A, quantised",
    "a_b": "A+B",
    "c_b_a": "C+B+A",
}

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #888; --good: #18794e; --bad: #b4232c; }
@media (prefers-color-scheme: dark) { :root { --good: #4cc38a; --bad: #ff8589; } }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 75rem; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; } h3 { font-size: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 8rem; }
small, .note { color: var(--soft); } small { font-size: .75em; }
.good { color: var(--good); } .bad { color: var(--bad); }
.grid { display: grid; gap: 1.2rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; } figure img { display: block; width: 100%; height: auto; border-radius: 4px; }
.rows { display: grid; grid-auto-columns: 1fr; grid-auto-flow: column; }
.rows span { color: var(--soft); font-size: .75rem; text-align: center; }
figcaption { font-size: .9rem; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: auto 1fr; gap: .1rem 1rem; overflow-wrap: anywhere; }
dd { margin: 0; } code { font-size: .8em; }
"""

_NOTES = f"""
<p class="note">One image per entry, with the entry's number as seed. The standard error follows ±.
R@k: the entry's caption is among the k best captions of the list, as ranked by a judge that was trained on
the training images. Style: recognised by the judge. KID: compared with the real images of the same entries,
on features of {FEATURES}. For the real images themselves it compares even with odd entries, to show what to
expect from chance. Background: the named colour closest to the median border pixel. Object: the most frequent
named colour among the pixels farther than {OBJECT_DISTANCE:g} in L*a*b* from the background, if they cover
{MIN_OBJECT:.1%} of the image or more. Black glyphs are not counted. PSNR and SSIM are means over images.</p>
"""


def write_report(
    report: Report, out: Path, *, model: Path, before: Path | None = None, name: str
) -> tuple[Path, Path]:
    """Writes ``report.json`` and ``report.html`` into the folder ``out`` and returns their paths.

    The checksums of the files in the folders ``model`` and ``before`` are recorded. ``name`` is the name of
    the model on the page. Raises ``UserError`` if the folder cannot be written.
    """
    check_writable(out)
    content = to_json(report, model, before)
    data, page = out / "report.json", out / "report.html"
    try:
        write_json(data, content)
    except OSError as error:
        raise UserError(f"{data} cannot be written: {error.strerror}. Choose another folder.") from error
    # File names may contain bytes that are not text.
    write_whole(page, html_page(report, content, name).encode(errors="replace"))
    return data, page


def html_page(report: Report, content: Mapping[str, Any], name: str) -> str:
    """The page as HTML. ``content`` is the content of ``report.json``."""
    title = html.escape(f"Evaluation of {name}")
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n",
        _facts(report),
    ]
    if report.settings["limit"] is not None and report.lists:
        parts.append(
            f'<p class="bad">Only the first {report.settings["limit"]} entries of each list and split: '
            "a quick check, not comparable with full results.</p>"
        )
    for split in ("test", "val"):
        if split in report.targets:
            parts.append(_targets(report.targets[split], split))
    for list_name, result in report.lists.items():
        parts.append(f"<h2>{html.escape(_LIST_TITLES[list_name])}</h2>")
        for split in ("test", "val"):
            if split in result.scores:
                n = sum(entry.split == split for entry in result.entries)
                parts.append(f"<h3>{split}, {n} entries</h3>" + _table(result.scores[split]))
    parts.append(_NOTES if report.lists else "")
    if report.photos is not None:
        parts.append(_photos(report.photos))
    for list_name, result in report.lists.items():
        for split in ("test", "val"):
            parts.append(_images(list_name, split, result))
    parts.append(_files(content))
    return "\n".join(parts) + "</body>\n</html>\n"


def _facts(report: Report) -> str:
    facts = {
        **report.settings["sampling"],
        "size": f"{report.settings['image_size']} pixels",
        "machine": report.machine,
        "time": f"{report.seconds:.0f} s",
    }
    return _definitions(facts)


def _definitions(facts: Mapping[str, object]) -> str:
    rows = (f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in facts.items())
    return f"<dl>{''.join(rows)}</dl>"


def _targets(targets: Sequence[Target], split: Split) -> str:
    words = {True: '<span class="good">reached</span>', False: '<span class="bad">short</span>', None: "–"}
    rows = "".join(
        f"<tr><td>{html.escape(target.text)}</td><td>({target.list})</td><td>{number_text(target.measured)}</td>"
        f"<td>{target.limit_text}</td><td>{words[target.reached]}</td></tr>"
        for target in targets
    )
    title = "Targets, on test" if split == "test" else "Targets, on val"
    head = "<tr><th>target</th><th>list</th><th>measured</th><th>limit</th><th></th></tr>"
    return f'<h2>{title}</h2><div class="wide"><table>{head}{rows}</table></div>'


def _table(scores: Mapping[Row, Mapping[Column, Score]]) -> str:
    columns = [column for column in COLUMNS if any(column in of_row for of_row in scores.values())]
    head = "".join(f"<th>{_COLUMN_TITLES[column]}</th>" for column in columns)
    rows = "".join(
        f"<tr><td>{html.escape(ROWS[row])}</td>"
        + "".join(f"<td>{_cell(column, of_row.get(column))}</td>" for column in columns)
        + "</tr>"
        for row, of_row in scores.items()
    )
    return f'<div class="wide"><table><tr><th></th>{head}</tr>{rows}</table></div>'


def _cell(column: Column, score: Score | None) -> str:
    if score is None:
        return ""
    digits = _DIGITS.get(column, 3)
    return f"{score.value:.{digits}f} <small>±{score.error:.{digits}f}</small>"


def _images(name: ListName, split: Split, result: ListResult) -> str:
    shown = [e for e in result.entries if e.split == split and e.number in result.strips]
    if not shown:
        return ""
    rows = [_SHORT[row] for row in SHOWN if row in result.measured]
    figures = "".join(_figure(result.strips[e.number], rows, f"{e.number}. {e.caption}") for e in shown)
    title = f"The first {len(shown)} of list ({name}), {split}"
    return f'<h2>{title}</h2><div class="grid">{figures}</div>'


def _photos(photos: PhotoResult) -> str:
    notes = ""
    if photos.enlarged:
        notes += (
            f'<p class="note">{photos.enlarged} are smaller than the model\'s images and were enlarged.</p>'
        )
    if photos.unreadable:
        lines = "".join(f"<li>{html.escape(line)}</li>" for line in photos.unreadable)
        notes += f"<details><summary>{len(photos.unreadable)} skipped</summary><ul>{lines}</ul></details>"
    rows = ["photograph", *(_SHORT[row] for row in photos.measured)]
    figures = "".join(_figure(data, rows, photos.names[number]) for number, data in photos.strips.items())
    return (
        f"<h2>{len(photos.names)} photographs</h2>{_table(photos.scores)}{notes}"
        f'<div class="grid">{figures}</div>'
    )


def _figure(data: bytes, rows: Sequence[str], caption: str) -> str:
    """Images side by side under their names, with the caption below."""
    names = "".join(f"<span>{html.escape(row)}</span>" for row in rows)
    alt = html.escape(f"{', '.join(rows)} of: {caption}", quote=True)
    source = f"data:image/webp;base64,{base64.b64encode(data).decode()}"
    return (
        f'<figure><div class="rows">{names}</div><img src="{source}" alt="{alt}" loading="lazy">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _files(content: Mapping[str, Any]) -> str:
    parts = []
    for key, title in (
        ("model", "SHA-256 of the model's files"),
        ("before", "SHA-256 of the files before compression"),
    ):
        if content[key] is not None:
            lines = "".join(
                f"<dt>{html.escape(file)}</dt><dd><code>{digest}</code></dd>"
                for file, digest in content[key].items()
            )
            parts.append(f"<details><summary>{title}</summary><dl>{lines}</dl></details>")
    data = content["settings"]["data"]
    if data is not None:
        parts.append(f'<p class="note">Fingerprint of the held-out images: <code>{data}</code></p>')
    return "".join(parts)

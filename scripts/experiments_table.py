"""Makes docs/experiments.md from docs/experiments.jsonl, with a row per training run or sampling setting.

    python scripts/experiments_table.py [--check]

benchmarks/ablation.py, benchmarks/sampling_sweep.py and benchmarks/transfer.py write the rows, with the
prediction that was entered before the run. `kept` and `seen` are added by hand, and may be missing for
sampling settings and rows of transfer.py. With
--check nothing is written, and the exit code is 1 if the page is not up to date.
"""

import statistics
from typing import Any

from pages import shown, write_page

HEAD = """# Experiments on the bundled model

One row per training run, made by `scripts/experiments_table.py` from
[experiments.jsonl](experiments.jsonl). Runs are made by `benchmarks/ablation.py`: it trains one stage of the
recipe `mini` from nothing, with everything else taken from the bundled model or from the start that is named,
and scores it on *val*. *test* is never read. Scores are means over the first seeds; (a) has 150 held-out
style × subject pairs, (b) 120 composed captions. With two seeds an entry the standard error of R@1 is about
0.03 for one list.

*Validation error* is the mean squared error of the predicted noise, averaged over eight fixed noise levels.
It compares runs of one stage on the same latents. It is measured on 2,400 images composed from the emoji of
*val*, with the same noise for every run, and at the same noise levels for every objective. For the bundled
Stage C its standard error is 1.2 %, because *val* has only 150 emoji, but that of the difference between two
priors that differ by 4 % is 0.1 %. It does not include the noise between trainings. Errors marked with an
asterisk were measured on 64 images while training, and can only be compared with each other.

"""
FEW_IMAGES = 64
"""Held-out images of the validation errors that were measured while training."""
STAGES = {
    "b": "Compressor and Stage B, scored by A+B: images through the semantic latents and back",
    "c": "Stage C, scored by C+B+A: drawn from the caption",
}
SAMPLING = """## Sampling only, scored by C+B+A
One row per setting of one model, made by `benchmarks/sampling_sweep.py`. What a row does not name is the
model's own setting. *Diversity* is 1 − the cosine of the features (EfficientNet-Lite1, pooled) of two images
of an entry with different seeds, averaged over entries. *ms/image* is a whole image in the fastest batch:
text encoder, all stages, and the copy to the host.

"""
TRANSFER = """## Stage C of v2 at width 512, on 12×12 latents
One row per training, made by `benchmarks/transfer.py`, and compared by the validation error alone. What a row
does not name is the recipe `v2`'s.

"""
COLUMNS = (
    ("a", "recall_1", "R@1 (a)", 2),
    ("b", "recall_1", "R@1 (b)", 2),
    ("a", "kid_e3", "KID×1e3 (a)", 1),
    ("b", "kid_e3", "KID×1e3 (b)", 1),
    ("a", "style", "style (a)", 2),
    ("b", "object", "object colour (b)", 2),
    ("a", "psnr", "PSNR (a), dB", 1),
)


SAMPLING_COLUMNS = (
    *COLUMNS[:-1],
    ("a", "diversity", "diversity (a)", 3),
    ("b", "diversity", "diversity (b)", 3),
)


def page(rows: list[dict[str, Any]]) -> str:
    """The page: a table for each stage and one for sampling, and what was predicted and seen below each."""
    parts = [HEAD]
    for stage, title in STAGES.items():
        chosen = [row for row in rows if row["name"].split("-")[0].rstrip("0123456789") == stage]
        if not chosen:
            continue
        names = ["run", "images, millions", "minutes", "images/s", "validation error"]
        names += [title for _, _, title, _ in COLUMNS] + ["kept"]
        parts.append(f"## {title}\n")
        parts += [_head(names), *(_line(row) for row in chosen), "\n"]
        parts += [_note(row, _origin(row), "the recipe as it is") for row in chosen]
        parts.append("\n")
    chosen = [row for row in rows if row["name"].startswith("t-")]
    if chosen:
        names = ["run", "images, millions", "minutes", "images/s", "validation error", "kept"]
        parts += [TRANSFER, _head(names)]
        parts += [f"| {' | '.join([*_training(row), row.get('kept', '')])} |\n" for row in chosen]
        parts += ["\n", *(_note(row, f"seed {row['seed']}", "the recipe as it is") for row in chosen), "\n"]
    chosen = [row for row in rows if row["name"].startswith("s-")]
    if chosen:
        titles = [title for _, _, title, _ in SAMPLING_COLUMNS]
        parts += [SAMPLING, _head(["setting", *titles, "ms/image", "kept"])]
        parts += [*(_sampling_line(row) for row in chosen), "\n"]
        parts += [_note(row, f"model {row['model']}", "the model's own settings") for row in chosen]
    return "".join(parts).rstrip() + "\n"


def _head(names: list[str]) -> str:
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}\n"


def _origin(row: dict[str, Any]) -> str:
    start = row.get("start", "bundled")
    return f"seed {row['seed']}" + ("" if start == "bundled" else f", start {start}")


def _note(row: dict[str, Any], of: str, unchanged: str) -> str:
    changed = ", ".join(f"`{name}={shown(value)}`" for name, value in row["changed"].items())
    seen = f" Seen: {row['seen']}" if "seen" in row else ""
    return (
        f"- **{row['name']}** ({row['date']}, {row['machine']}, {of}): {changed or unchanged}. "
        f"Predicted: {row['predicted']}{seen}\n"
    )


def _sampling_line(row: dict[str, Any]) -> str:
    cells = [row["name"], *_scores(row, SAMPLING_COLUMNS), f"{1000 * row['seconds_per_image']:.1f}"]
    return f"| {' | '.join([*cells, row.get('kept', '')])} |\n"


def _scores(row: dict[str, Any], columns: tuple[tuple[str, str, str, int], ...]) -> list[str]:
    """The means over the first seeds. Empty where a row has no such score."""
    values = [(row["scores"][name].get(column), digits) for name, column, _, digits in columns]
    return ["" if found is None else f"{statistics.mean(found):.{digits}f}" for found, digits in values]


def _training(row: dict[str, Any]) -> list[str]:
    error = statistics.mean(row["validation"]["bins"])
    few = row["validation"].get("images") == FEW_IMAGES
    return [
        row["name"],
        f"{row['images'] / 1e6:.2f}",
        f"{row['minutes']:.1f}",
        f"{row['images_per_second']:,.0f}",
        f"{error:.4f}" + few * r" \*",
    ]


def _line(row: dict[str, Any]) -> str:
    return f"| {' | '.join([*_training(row), *_scores(row, COLUMNS), row['kept']])} |\n"


if __name__ == "__main__":
    write_page("experiments", page, __doc__)

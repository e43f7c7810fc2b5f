"""Scores of a model on val, for the benchmarks that write rows of docs/experiments.jsonl."""

from collections.abc import Sequence

from wuerstchen.evaluate.references import References
from wuerstchen.evaluate.report import evaluate
from wuerstchen.evaluate.scoring import Row
from wuerstchen.pipeline import Sampling, Wuerstchen

COLUMNS = ("recall_1", "recall_5", "style", "kid_e3", "object", "background", "psnr", "ssim")

Scores = dict[str, dict[str, list[float]]]
"""By list and column, with a value per first seed."""


def scores(
    model: Wuerstchen,
    references: References,
    row: Row,
    first_seeds: Sequence[int],
    sampling: Sampling,
    *,
    limit: int | None = None,
    batch_size: int | None = None,
) -> Scores:
    """The scores of one row on val, for each first seed. The test lists are never read."""
    found: Scores = {"a": {}, "b": {}}
    for first_seed in first_seeds:
        report = evaluate(
            model,
            references.data,
            references=references,
            splits=("val",),
            rows=(row,),
            sampling=sampling,
            limit=limit,
            batch_size=batch_size,
            shown=0,
            first_seed=first_seed,
        )
        for name, columns in found.items():
            values = report.lists[name].scores["val"][row]  # type: ignore[index]
            for column in COLUMNS:
                if column in values:
                    columns.setdefault(column, []).append(round(values[column].value, 4))
    return found

"""Makes docs/speedrun.md from docs/speedrun.jsonl, with a row per measured configuration.

    python scripts/speedrun_table.py [--check]

benchmarks/speedrun.py writes the rows. With --check nothing is written, and the exit code is 1 if the page is
not up to date.
"""

import statistics
from typing import Any

from pages import shown, write_page

HEAD = """# Speedrun

How many minutes of one GPU it takes to train the bundled model's three stages from nothing to a pooled R@1 of
0.73 on *val*: images drawn from the captions of the lists (a) and (b), 270 in all, each with four first
seeds. A row is the mean of two trainings with two seeds. Its minutes are those of the whole process, from an
empty run folder to the model: composing images, compiling, previews and validation count, scoring does not.
`benchmarks/speedrun.py` trains, scores and writes [speedrun.jsonl](speedrun.jsonl), from which
`scripts/speedrun_table.py` makes this page.

"""
NONE = "No configuration has been measured yet.\n"


def page(rows: list[dict[str, Any]]) -> str:
    """The page: a table in the order of the runs, and below it what differs from the recipe `mini`."""
    if not rows:
        return HEAD + NONE
    phases = list(dict.fromkeys(name for row in rows for t in row["trainings"] for name in t["stages"]))
    phases.sort(key=lambda name: ("abc".index(name[0]), name) if name != "a2" else (1, "z"))
    names = ["configuration", "date", "machine", "commit", "minutes", *phases, "R@1", "of each", "reached"]
    parts = [HEAD, f"| {' | '.join(names)} |\n|{'---|' * len(names)}\n"]
    parts += [_line(row, phases) for row in rows]
    parts.append("\n")
    for row in rows:
        changed = ", ".join(f"`{name}={shown(value)}`" for name, value in row["changed"].items())
        parts.append(f"- **{row['configuration']}** ({row['date']}): {changed or 'the recipe as it is'}.\n")
    return "".join(parts)


def _line(row: dict[str, Any], phases: list[str]) -> str:
    trainings = row["trainings"]
    cells = [row["configuration"], row["date"], row["machine"], row["commit"], f"{row['minutes']:.1f}"]
    for name in phases:
        found = [training["stages"][name] for training in trainings if name in training["stages"]]
        cells.append(f"{statistics.mean(found):.1f}" if found else "")
    cells += [f"{row['recall_1']:.3f}", ", ".join(f"{training['recall_1']:.3f}" for training in trainings)]
    return f"| {' | '.join([*cells, 'yes' if row['reached'] else 'no'])} |\n"


if __name__ == "__main__":
    write_page("speedrun", page, __doc__)

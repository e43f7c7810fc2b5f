"""Plots time by batch size from the output of benchmarks/sampling.py, as docs/speed.webp.

    pip install matplotlib
    python benchmarks/sampling.py --peer-batches 1 2 4 8 --dtypes float16 --json sampling.json
    python scripts/plot_sampling.py sampling.json [MORE.json] [--out docs/speed.webp]

All files must be from the same kind of GPU. Later files override rows of earlier ones.
"""

import argparse
import json
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROW = re.compile(r"(?P<who>.+), float16, 1024×1024, batch (?P<batch>\d+)")
SERIES = {
    "SDXL": ("#999999", "s-"),
    "SDXL, compiled": ("#999999", "s--"),
    "diffusers": ("#2a6fb0", "o-"),
    "diffusers, compiled": ("#2a6fb0", "o--"),
    "wuerstchen": ("#a33a24", "D-"),
}
"""The rows to plot, slowest first. Other rows are ignored."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/speed.webp"))
    options = parser.parse_args()
    seconds: dict[str, dict[int, float]] = {}
    gpus = set()
    for file in options.files:
        found = json.loads(file.read_text(encoding="utf-8"))
        gpus.add(found["gpu"])
        for name, row in found["rows"].items():
            if match := ROW.fullmatch(name):
                seconds.setdefault(match["who"], {})[int(match["batch"])] = row["seconds"]
    if len(gpus) != 1:
        parser.error(
            f"The files are from different GPUs: {', '.join(sorted(gpus))}. Use files from one kind of GPU."
        )

    figure, axes = plt.subplots(figsize=(7, 4), dpi=160)
    for who, (colour, style) in SERIES.items():
        if points := sorted(seconds.get(who, {}).items()):
            axes.plot(*zip(*points, strict=True), style, color=colour, label=who, linewidth=1.6, markersize=5)
    axes.set(xscale="log", yscale="log", xlabel="batch size", ylabel="seconds per batch")
    batches = sorted({batch for points in seconds.values() for batch in points})
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_yticks(ticks := [0.25, 0.5, 1, 2, 4, 8, 16], [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(f"1024×1024, fp16, {gpus.pop()}", fontsize=9)
    figure.tight_layout()
    figure.savefig(options.out)


if __name__ == "__main__":
    main()

"""The tables of many_gpus.py, made from its rows."""

from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]

AGREED = 1e-3  # relative difference of losses


def table(rows: list[Row]) -> str:
    """Markdown: speed, agreement of losses, checkpoints, and resuming. The newest row of a case counts."""
    parts = [_speed(_newest(rows, "speed", "mode", "batch", "gpus"))]
    written = _newest(rows, "checkpoint", "mode", "gpus")
    parts += [_losses(written), _checkpoints(written)]
    parts += [_resumes(_newest(rows, "resume", "gpus", "written_by"), written)]
    return "\n\n".join(filter(None, parts)) + "\n"


def scaling(rows: Iterable[Row]) -> list[Row]:
    """Speed rows with how much faster they are than one GPU, and than replicated weights.

    ``speedup`` and ``efficiency`` compare with the same mode on one GPU, or with replicated weights where one
    GPU cannot have the mode. They are None without such a row.
    """
    rows = list(rows)
    rates = {(r["mode"], r["batch"], r["gpus"]): r["images_per_second"] for r in rows}
    found = []
    for row in rows:
        mode, batch, gpus = row["mode"], row["batch"], row["gpus"]
        one = rates.get((mode, batch, 1), rates.get(("replicated", batch, 1)))
        replicated = rates.get(("replicated", batch, gpus))
        speedup = row["images_per_second"] / one if one else None
        found.append(
            {
                **row,
                "speedup": speedup,
                "efficiency": speedup / gpus if speedup else None,
                "against_replicated": row["images_per_second"] / replicated if replicated else None,
            }
        )
    return found


def difference(losses: list[float], others: list[float]) -> float:
    """The largest relative difference between two runs of losses."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, others, strict=True))


def _newest(rows: list[Row], part: str, *names: str) -> list[Row]:
    found = {tuple(row[name] for name in names): row for row in rows if row["part"] == part}
    return list(found.values())


def _speed(rows: list[Row]) -> str:
    order = sorted(scaling(rows), key=lambda r: (r["batch"], r["mode"] != "replicated", r["mode"], r["gpus"]))
    lines = [
        [
            row["mode"],
            row["batch"],
            row["gpus"],
            f"{row['images_per_second']:.1f}",
            _times(row["speedup"]),
            "" if row["efficiency"] is None else f"{row['efficiency']:.0%}",
            f"{row['mfu']:.1%}",
            f"{row['memory_gib']:.1f}",
            _times(row["against_replicated"]),
        ]
        for row in order
    ]
    head = ["mode", "images per GPU", "GPUs", "images/s", "speedup", "efficiency", "MFU", "GiB per GPU"]
    return _markdown([*head, "against replicated"], lines) if lines else ""


def _losses(rows: list[Row]) -> str:
    if not rows:
        return ""
    first = rows[0]
    lines = []
    for row in rows:
        most = difference(row["losses"], first["losses"])
        verdict = "yes" if most <= AGREED else "no"
        lines.append(
            [row["mode"], row["gpus"], len(row["losses"]), row["losses"][-1], f"{most:.1e}", verdict]
        )
    head = ["mode", "GPUs", "updates", "last loss", "largest difference from the first row"]
    return _markdown([*head, f"within {AGREED:g}"], lines)


def _checkpoints(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        for name, which in (("first", row["first_checkpoint"]), ("later", row["checkpoint"])):
            speed = [f"{row['bytes'] / 1e9:.2f}", which["seconds"], which["start_seconds"]]
            ran = [which["updates_meanwhile"], which["updates_lost"], row["update_seconds"]]
            lines.append([row["mode"], row["gpus"], name, *speed, *ran])
    head = ["mode", "GPUs", "checkpoint", "GB", "seconds", "of them waiting to start", "updates meanwhile"]
    return _markdown([*head, "updates lost", "seconds per update"], lines) if lines else ""


def _resumes(rows: list[Row], written: list[Row]) -> str:
    lines = []
    for row in rows:
        by = [w for w in written if w["gpus"] == row["written_by"]]
        most = difference(row["losses_after"], by[-1]["checkpoint"]["losses_after"]) if by else None
        agree = "" if most is None else f"{most:.1e}"
        lines.append([row["written_by"], row["gpus"], row["seconds"], row["verify_seconds"], agree])
    head = ["written by", "resumed on", "seconds", "of them checking the files"]
    return _markdown([*head, "difference of the next losses"], lines) if lines else ""


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}×"


def _markdown(head: list[str], lines: list[list[Any]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)

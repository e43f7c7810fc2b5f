"""Checks that two checkouts compute the same bits on this machine: images, training and prepared sets.

    python scripts/compare_checkouts.py OLD NEW

Each checkout runs in its own processes, with its ``src`` first on Python's path. Only commands and the files
that they write are compared. Prints a line per comparison, and exits with 1 if one of them differs. Takes
about three minutes on one idle core.
"""

import argparse
import fnmatch
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

PROMPTS = ("a 3D render of a purple camel on a blue background", "a flat illustration of a red apple")
"""The first two of ``make demo``."""
GENERATE = ["generate", "--grid", "--out", "demo.png", *PROMPTS]
TRAIN = shlex.split(
    "train tiny --run-dir run --no-rehearsal --workers 0 --log-every 1"
    " --stage-a.optimization.images 160 --stage-a.adversarial-from 80 --stage-a.refine-images 160"
    " --stage-b.optimization.images 160 --stage-b.refine-images 160 --stage-c.optimization.images 320"
    " --prior-steps 4 --decoder-steps 4 --preview-prompts cat"
)
"""20 updates of each stage, including the refinements."""
PREPARE = shlex.split("data prepare sample prepared --text-states fp16 --crop random --shard-size 64")

LEFT_OUT = ("log.jsonl", "run.json", "state.json", "lock", "tensorboard/*")
"""Files of a run that contain versions or times. Losses are read from log.jsonl."""
TIMES = ("time", "seconds", "kwh", "images_per_second", "matrix_share")
"""Fields of an update in log.jsonl that depend on time."""
VERSIONS = ("versions", "version")
"""Fields of JSON files with versions."""


class Checkout:
    """A checkout, and the folder in which its commands run."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.source = root.resolve() / "src"
        self.folder = folder
        folder.mkdir()
        self.environment = {**os.environ, "PYTHONPATH": str(self.source), "OMP_NUM_THREADS": "1"}
        found = self.python("-c", "import wuerstchen; print(wuerstchen.__file__)").strip()
        if not Path(found).is_relative_to(self.source):
            raise SystemExit(f"{root} is not a checkout: Python imports wuerstchen from {found}.")

    def python(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            command = " ".join(arguments)
            raise SystemExit(f"{self.source.parent}: {command} exited with {done.returncode}\n{done.stderr}")
        return done.stdout

    def run(self, arguments: list[str], device: str) -> None:
        self.python("-m", "wuerstchen", *arguments, "--device", device)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def updates(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The updates and validations in log.jsonl of a run, without times."""
    for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event["event"] in ("progress", "validation"):
            yield event["stage"], {key: value for key, value in event.items() if key not in TIMES}


def without_versions(value: object) -> object:
    if isinstance(value, dict):
        return {key: without_versions(item) for key, item in value.items() if key not in VERSIONS}
    return [without_versions(item) for item in value] if isinstance(value, list) else value


def same_tensors(old: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor]) -> bool:
    """Whether tensors are equal bit for bit, including NaN."""

    def bits(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    return old.keys() == new.keys() and all(
        (old[name].shape, old[name].dtype) == (new[name].shape, new[name].dtype)
        and torch.equal(bits(old[name]), bits(new[name]))
        for name in old
    )


def same_files(old: Path, new: Path) -> bool:
    """Whether two files have the same contents, except headers and texts, which contain versions."""
    if old.suffix == ".safetensors":
        return same_tensors(load_file(old), load_file(new))
    if old.suffix == ".png":
        return np.array_equal(pixels(old), pixels(new))
    if old.suffix == ".json":
        first, second = (json.loads(path.read_text(encoding="utf-8")) for path in (old, new))
        return without_versions(first) == without_versions(second)
    return old.read_bytes() == new.read_bytes()


class Comparison:
    """Prints whether files and losses are equal."""

    def __init__(self) -> None:
        self.differing = 0

    def report(self, same: bool, what: str, detail: str = "") -> None:
        self.differing += not same
        print(f"{'equal  ' if same else 'DIFFERS'} {what}{detail}", flush=True)

    def folders(self, old: Path, new: Path, left_out: tuple[str, ...]) -> None:
        """Prints a line for each file in either folder."""
        names = {
            path.relative_to(folder).as_posix()
            for folder in (old, new)
            for path in folder.rglob("*")
            if path.is_file()
        }
        for name in sorted(names):
            if any(
                fnmatch.fnmatch(name, rule) or fnmatch.fnmatch(Path(name).name, rule) for rule in left_out
            ):
                continue
            missing = [folder for folder in (old, new) if not (folder / name).is_file()]
            what = f"{old.name}/{name}"
            if missing:
                self.report(False, what, f": only in {'NEW' if missing[0] == old else 'OLD'}")
            else:
                self.report(same_files(old / name, new / name), what)

    def losses(self, old: Path, new: Path) -> None:
        """Prints a line for each stage, with the first image at which the logs differ."""
        theirs, ours = list(updates(old)), list(updates(new))
        for stage in dict.fromkeys(stage for stage, _ in (*theirs, *ours)):
            first = [event for name, event in theirs if name == stage]
            second = [event for name, event in ours if name == stage]
            what = f"losses of stage {stage}, {len(first)} events"
            different = next((a for a, b in zip(first, second, strict=False) if a != b), None)
            detail = f": from image {different['images']} on" if different else ""
            self.report(first == second, what, detail)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, metavar="OLD", help="a checkout with its source in src")
    parser.add_argument("new", type=Path, metavar="NEW", help="another checkout")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--leave-out",
        action="append",
        default=[],
        metavar="PATTERN",
        help="files with intended changes, such as stage_*/checkpoints/*; can be repeated",
    )
    options = parser.parse_args()
    compared = Comparison()
    left_out = (*LEFT_OUT, *options.leave_out)
    with tempfile.TemporaryDirectory() as name:
        both = Checkout(options.old, Path(name) / "old"), Checkout(options.new, Path(name) / "new")
        for command in (GENERATE, PREPARE, TRAIN):
            for checkout in both:
                checkout.run(command, options.device)
            old, new = (checkout.folder for checkout in both)
            if command is GENERATE:
                compared.report(same_files(old / "demo.png", new / "demo.png"), "demo.png")
            elif command is PREPARE:
                compared.folders(old / "prepared", new / "prepared", tuple(options.leave_out))
            else:
                compared.losses(old / "run", new / "run")
                compared.folders(old / "run", new / "run", left_out)
    print(f"{compared.differing} comparisons differ" if compared.differing else "all equal")
    return 1 if compared.differing else 0


if __name__ == "__main__":
    sys.exit(main())

"""Mutation testing: breaks the code on purpose, one small fault at a time, and checks that the tests notice.

    python scripts/mutate.py                       # all of scripts/mutations.toml
    python scripts/mutate.py --only train/optim    # only files with this in their path
    python scripts/mutate.py --jobs 2 --json survivors.json

Each mutation replaces one piece of text in src/wuerstchen, and runs its listed tests in a copy of the
repository. If they fail, the mutation is *killed*. If they pass, it *survives*: the tests are too weak, or
the mutation changes nothing that matters. Survivors need a `reason` in the list. The tests first run without
any mutation. Exits with 1 if a mutation without a reason survives, or if one no longer matches the code.
"""

import argparse
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
LIST = Path(__file__).with_name("mutations.toml")
COPIED = ("src", "tests", "scripts", "benchmarks", "notebooks", "docs", "README.md", "pyproject.toml")


@dataclass(frozen=True)
class Mutation:
    """A fault: ``old`` becomes ``new`` in ``file`` below src/wuerstchen."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    """Paths below tests/, optionally followed by :: and the name of a test."""
    reason: str = ""
    """Why it may survive."""

    @property
    def title(self) -> str:
        old, new = (" ".join(text.split())[:60] for text in (self.old, self.new))
        return f"{self.file}: {old!r} → {new!r}"

    def fits(self, source: Path) -> bool:
        return (source / self.file).read_text(encoding="utf-8").count(self.old) == 1


def read_list(path: Path) -> list[Mutation]:
    """Reads a TOML file of tables [[mutation]] with file, old, new, tests, and optionally reason."""
    found = tomllib.loads(path.read_text(encoding="utf-8"))["mutation"]
    return [Mutation(**{**entry, "tests": tuple(entry["tests"])}) for entry in found]


def run_tests(copy: Path, tests: tuple[str, ...], seconds: float) -> int | None:
    """Runs pytest in a copy of the repository. Returns its exit code, or None if it took too long."""
    environment = {**os.environ, "PYTHONPATH": str(copy / "src")}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow and not gpu",
    ]
    command += [f"tests/{test}" for test in tests]
    with subprocess.Popen(
        command,
        cwd=copy,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            return None


def write_source(path: Path, text: str) -> None:
    """Writes a module, and removes its compiled files, whose times have a resolution of only a second."""
    path.write_text(text, encoding="utf-8")
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*"):
        compiled.unlink()


class Copies:
    """Copies of the repository, each used by one thread at a time."""

    def __init__(self, folder: Path, count: int) -> None:
        self._free: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for number in range(count):
            copy = folder / str(number)
            for name in COPIED:
                source = REPOSITORY / name
                if source.is_dir():
                    shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(source, copy / name)
            self._free.put(copy)

    def run(self, mutation: Mutation, seconds: float) -> str:
        """``killed``, ``survived``, ``timed out``, or ``broken`` if no test could run."""
        copy = self._free.get()
        path = copy / "src" / "wuerstchen" / mutation.file
        before = path.read_text(encoding="utf-8")
        try:
            write_source(path, before.replace(mutation.old, mutation.new))
            code = run_tests(copy, mutation.tests, seconds)
        finally:
            write_source(path, before)
            self._free.put(copy)
        # pytest exits with 0 if all passed, 1 if some failed, and 2 to 5 if it could not run them.
        return {0: "survived", 1: "killed", None: "timed out"}.get(code, "broken")

    def run_unchanged(self, tests: tuple[str, ...], seconds: float) -> int | None:
        copy = self._free.get()
        try:
            return run_tests(copy, tests, seconds)
        finally:
            self._free.put(copy)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", type=Path, default=LIST)
    parser.add_argument("--only", default="", help="part of the path of the file to mutate")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=600, help="limit for the tests of one mutation")
    parser.add_argument("--json", type=Path, help="write the outcome of each mutation here")
    options = parser.parse_args()
    mutations = [m for m in read_list(options.list) if options.only in m.file]
    if not mutations:
        parser.error(f"No mutation is in a file with {options.only!r} in its path.")
    source = REPOSITORY / "src" / "wuerstchen"
    unfit = [m for m in mutations if not m.fits(source)]
    for mutation in unfit:
        print(f"does not match the code: {mutation.title}")
    mutations = [m for m in mutations if m not in unfit]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        copies = Copies(Path(folder), options.jobs)
        groups = list(dict.fromkeys(m.tests for m in mutations))
        for tests, code in zip(
            groups, pool.map(lambda t: copies.run_unchanged(t, options.seconds), groups), strict=True
        ):
            if code != 0:
                sys.exit(f"{' '.join(tests)} must pass without mutations, got exit code {code}.")
        outcomes: list[dict[str, Any]] = []
        lock = threading.Lock()

        def one(mutation: Mutation) -> None:
            outcome = copies.run(mutation, options.seconds)
            with lock:
                outcomes.append({"outcome": outcome, "title": mutation.title, "reason": mutation.reason})
                print(f"{len(outcomes)}/{len(mutations)} {outcome}: {mutation.title}", flush=True)

        list(pool.map(one, mutations))
    counts = {
        name: sum(o["outcome"] == name for o in outcomes)
        for name in ("killed", "timed out", "survived", "broken")
    }
    if options.json is not None:
        options.json.write_text(
            json.dumps({"counts": counts, "mutations": outcomes}, indent=1), encoding="utf-8"
        )
    print(
        ", ".join(f"{count} {name}" for name, count in counts.items()),
        f"in {(time.monotonic() - began) / 60:.0f} minutes",
    )
    bad = [
        o for o in outcomes if o["outcome"] == "broken" or (o["outcome"] == "survived" and not o["reason"])
    ]
    sys.exit(1 if bad or unfit else 0)


if __name__ == "__main__":
    main()

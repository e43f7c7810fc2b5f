"""Makes the sample in the package: 100 training images from the built emoji set.

Usage: python scripts/make_sample.py BUILT_SET
"""

import shutil
import sys
from pathlib import Path

from wuerstchen.data.emoji import (
    Record,
    read_index,
    sample_root,
    subject_hash,
    write_attribution,
    write_index,
)

SUBJECTS = 20


def choose(records: list[Record]) -> list[Record]:
    """All images of the first subjects without held-out styles, ordered by hash."""
    heldout = {record.hex for record in records if record.split == "heldout"}
    whole = sorted({record.hex for record in records} - heldout, key=subject_hash)
    chosen = set(whole[:SUBJECTS])
    return [record for record in records if record.hex in chosen]


def main(built: Path) -> None:
    target = sample_root()
    if target.exists():
        for style in target.iterdir():
            if style.is_dir():
                shutil.rmtree(style)
    records = choose(read_index(built))
    for record in records:
        image = target / f"{record.id}.webp"
        image.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(built / f"{record.id}.webp", image)
    write_attribution(target)
    write_index(target, records)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    print(f"{len(records)} images, {size / 1e6:.2f} MB, in {target}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

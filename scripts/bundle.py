"""Puts a trained model into the package in int8.

    python scripts/bundle.py runs/mini/model

All networks are stored in int8 with a scale per row, and students in 4 bits as differences to the networks
that they were trained from. The text encoder is copied as it is. To measure the loss
of quality, run

    wuerstchen evaluate --data data/emoji --before runs/mini/model

It scores the model in the package, and in a separate row the original model.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from wuerstchen.checkpoints.native import (
    BASES,
    NETWORKS,
    PartStorage,
    read_cascade,
    read_network,
    write_cascade,
)
from wuerstchen.pipeline import BUNDLED
from wuerstchen.recipes.mini import mini
from wuerstchen.train.stages.base import cascade_settings


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="model folder of a finished run")
    options = parser.parse_args()
    source: Path = options.model
    with tempfile.TemporaryDirectory(dir=BUNDLED.parent) as folder:
        small = Path(folder) / "model"
        cascade = read_cascade(source)
        parts = [part for part in cascade.networks() if part in NETWORKS]
        provenance = {part: read_network(source / f"{part}.safetensors")[1] for part in parts}
        storage: dict[str, PartStorage] = {
            part: "int4_difference" if part in BASES else "int8" for part in parts
        }
        # Use the sampling settings of the current recipe, which may be newer than the training.
        cascade.settings = cascade_settings(mini(), cascade.settings.latent_statistics, cascade.settings)
        write_cascade(cascade, small, provenance, storage, text_encoder=source / "text_encoder")
        for old in BUNDLED.glob("*.safetensors"):
            old.unlink()
        for name in ("model.json", *(f"{part}.safetensors" for part in parts)):
            shutil.move(small / name, BUNDLED / name)
        _replace_text_encoder(small / "text_encoder", BUNDLED / "text_encoder")
    size = sum(file.stat().st_size for file in BUNDLED.rglob("*") if file.suffix != ".md")
    print(f"{size / 1e6:.1f} MB in {BUNDLED}")


def _replace_text_encoder(new: Path, folder: Path) -> None:
    """Moves the files of the text encoder ``new`` into ``folder``, and removes the old weights there.

    If the new weights are in shards, the old file would be read instead of them.
    """
    folder.mkdir(exist_ok=True)
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    for file in sorted(new.iterdir()):
        shutil.move(file, folder / file.name)


if __name__ == "__main__":
    main()

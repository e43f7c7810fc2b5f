"""Puts a trained model into the package, and says what storing it small costs.

    python scripts/bundle.py runs/mini/model

Stage A is stored in fp16, the larger networks in int8 by row. The pictures of the recipe's prompts are drawn
with the weights before and after, from the same noise, and compared.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import numpy as np

import wuerstchen
from wuerstchen.checkpoints.native import Storage, read_cascade, read_network, write_cascade
from wuerstchen.pipeline import BUNDLED
from wuerstchen.recipes.mini import PROMPTS

STORAGE: dict[str, Storage] = {"vqgan": "float16", "compressor": "int8", "decoder": "int8", "prior": "int8"}


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two 8-bit pictures in dB."""
    return 10 * float(np.log10(255**2 / max(np.square(a.astype(float) - b).mean(), 1e-12)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="model folder of a finished run")
    source: Path = parser.parse_args().model
    provenance = {part: read_network(source / f"{part}.safetensors")[1] for part in STORAGE}
    before = [np.asarray(i) for i in wuerstchen.load(source, device="cpu").generate(PROMPTS)]
    with tempfile.TemporaryDirectory(dir=BUNDLED.parent) as folder:
        small = Path(folder) / "model"
        write_cascade(read_cascade(source), small, provenance, STORAGE, text_encoder=source / "text_encoder")
        after = [np.asarray(i) for i in wuerstchen.load(small, device="cpu").generate(PROMPTS)]
        for name in ("model.json", *(f"{part}.safetensors" for part in STORAGE)):
            shutil.move(small / name, BUNDLED / name)
    for prompt, a, b in zip(PROMPTS, before, after, strict=True):
        print(f"{psnr(a, b):5.1f} dB  {prompt}")
    size = sum(file.stat().st_size for file in BUNDLED.rglob("*.safetensors"))
    print(f"{size / 1e6:.1f} MB of weights in {BUNDLED}")


if __name__ == "__main__":
    main()

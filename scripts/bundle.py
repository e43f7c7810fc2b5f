"""Puts a trained model into the package, and says what storing it small costs.

    python scripts/bundle.py runs/mini/model --data data/emoji

Stage A is stored in fp16, the larger networks in int8 by row. The pictures of the recipe's prompts are drawn
with the weights before and after, from the same noise, and compared. Then the stored model reconstructs the
first held-out pictures of the emoji set, plain on white: by Stage A alone, and by A and B through the map.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import wuerstchen
from wuerstchen.checkpoints.native import Storage, read_cascade, read_network, write_cascade
from wuerstchen.data.emoji import EmojiSource
from wuerstchen.images import to_images, to_tensor
from wuerstchen.pipeline import BUNDLED, Sampling
from wuerstchen.recipes.mini import PROMPTS, mini
from wuerstchen.train.stages import cascade_settings

STORAGE: dict[str, Storage] = {"vqgan": "float16", "compressor": "int8", "decoder": "int8", "prior": "int8"}
HELD_OUT = 64


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two 8-bit pictures in dB."""
    return 10 * float(np.log10(255**2 / max(np.square(a.astype(float) - b).mean(), 1e-12)))


def held_out_psnr(data: Path) -> tuple[float, float]:
    """Mean PSNR of Stage A alone and of A+B, over the first held-out pictures in the order of the index."""
    model, source = wuerstchen.load(device="cpu"), EmojiSource(data, split="heldout")
    vqgan, size = model.cascade.vqgan, model.cascade.settings.image_size
    alone, through_map = [], []
    for item in range(HELD_OUT):
        original = source.plain(item, size).image
        picture = Image.fromarray(original)
        with torch.inference_mode():
            decoded = vqgan.decode(vqgan.encode(to_tensor(picture)[None])).clamp(0, 1)
        alone.append(psnr(original, np.asarray(to_images(decoded)[0])))
        through_map.append(psnr(original, np.asarray(model.reconstruct(picture).image)))
    return float(np.mean(alone)), float(np.mean(through_map))


def drawn(model: Path, sampling: Sampling) -> list[np.ndarray]:
    return [np.asarray(i) for i in wuerstchen.load(model, device="cpu").generate(PROMPTS, sampling=sampling)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="model folder of a finished run")
    parser.add_argument("--data", type=Path, required=True, help="built emoji set")
    options = parser.parse_args()
    source: Path = options.model
    provenance = {part: read_network(source / f"{part}.safetensors")[1] for part in STORAGE}
    sampling = Sampling(decoder_guidance=mini().decoder_guidance)
    before = [
        np.asarray(i) for i in wuerstchen.load(source, device="cpu").generate(PROMPTS, sampling=sampling)
    ]
    with tempfile.TemporaryDirectory(dir=BUNDLED.parent) as folder:
        small = Path(folder) / "model"
        cascade = read_cascade(source)
        # How to sample is the recipe's choice as it stands now; it may have been made after the training.
        cascade.settings = cascade_settings(mini(), cascade.settings.map_statistics)
        write_cascade(cascade, small, provenance, STORAGE, text_encoder=source / "text_encoder")
        after = drawn(small, sampling)
        for name in ("model.json", *(f"{part}.safetensors" for part in STORAGE)):
            shutil.move(small / name, BUNDLED / name)
    for prompt, a, b in zip(PROMPTS, before, after, strict=True):
        print(f"{psnr(a, b):5.1f} dB  {prompt}")
    alone, through_map = held_out_psnr(options.data)
    print(f"{HELD_OUT} held-out pictures: Stage A {alone:.1f} dB, A+B through the map {through_map:.1f} dB")
    size = sum(file.stat().st_size for file in BUNDLED.rglob("*.safetensors"))
    print(f"{size / 1e6:.1f} MB of weights in {BUNDLED}")


if __name__ == "__main__":
    main()

"""How well a model repaints held-out rectangles of real images, and how long an edit takes.

    python benchmarks/editing.py --data data/emoji --images 48 --json editing.json

Repaints a rectangle of 2×2 to 4×4 semantic latents in the middle of real images of the *val* lists, with
their captions as prompts. Prints for each row
- R@1: how often the judge finds the caption of the image,
- the seam: the mean gradient across the border of the mask and of its feather, the larger one, over the mean
  gradient inside, relative to the real images,
- the seconds per image (of all threads on a CPU), and their ratio to those of a drawing without an image.

A row with a grey rectangle shows what R@1 loses without any repainting. If it loses little, the measurement
says nothing about repainting.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import wuerstchen
from wuerstchen import edits
from wuerstchen.data.plan import generator
from wuerstchen.edit_options import EditOptions
from wuerstchen.evaluate.features import FeatureNetwork
from wuerstchen.evaluate.judges import NETWORK, load_judges
from wuerstchen.evaluate.lists import Entry, RealImages, read_list, select
from wuerstchen.evaluate.metrics import recall
from wuerstchen.pipeline import Wuerstchen
from wuerstchen.sampling import Sampling

Box = tuple[int, int, int, int]


def rectangle(number: int, cells: int, side: int) -> Box:
    """The rectangle of an image: two to four of ``cells`` positions per side, around its middle."""
    rng = generator(0, number, "held-out rectangles")
    found = []
    for _ in range(2):
        length = int(rng.integers(2, 5))
        slack = int(rng.integers(0, 2))
        first = min((cells - length) // 2 + slack * ((cells - length) % 2), cells - length)
        found.append((first * side // cells, (first + length) * side // cells))
    (left, right), (top, bottom) = found
    return left, top, right, bottom


def mask_of(box: Box, side: int) -> Image.Image:
    mask = Image.new("L", (side, side), 0)
    mask.paste(255, box)
    return mask


def gradients(image: np.ndarray, box: Box, feather: int) -> tuple[float, float]:
    """The mean gradient across the border of a box or of its feather, the larger one, and inside the box."""
    grey = image.astype(np.float64).mean(2)
    left, top, right, bottom = box
    across, down = np.abs(np.diff(grey, axis=1)), np.abs(np.diff(grey, axis=0))
    borders = []
    for d in {0, feather // 2, feather}:
        columns = [c for c in (left - 1 - d, right - 1 + d) if 0 <= c < across.shape[1]]
        rows = [r for r in (top - 1 - d, bottom - 1 + d) if 0 <= r < down.shape[0]]
        values = [across[top:bottom, c] for c in columns] + [down[r, left:right] for r in rows]
        borders.append(float(np.concatenate(values).mean()) if values else 0.0)
    inside = (across[top:bottom, left : right - 1].mean() + down[top : bottom - 1, left:right].mean()) / 2
    return max(borders), float(inside)


class Measurement:
    """The real images, their rectangles and the judge."""

    def __init__(self, model: Wuerstchen, data: Path, images: int, batch_size: int) -> None:
        self.model, self.batch_size = model, batch_size
        # The CPU may be busy with other programs.
        self.clock = time.process_time if model.device.type == "cpu" else time.perf_counter
        settings = model.cascade.settings
        self.side = settings.image_size
        real = RealImages(data)
        half = -(-images // 2)
        self.entries: list[tuple[str, Entry]] = [
            (name, entry) for name in ("a", "b") for entry in select(name, ("val",), half)
        ]
        real.check([entry for _, entry in self.entries])
        self.real = [real.image(entry, self.side) for _, entry in self.entries]
        cells = settings.latent_size(self.side, self.side)[0]
        self.boxes = [rectangle(number, cells, self.side) for number in range(len(self.entries))]
        self.feather = EditOptions().feather_of(settings.image_size)
        self.features, self.judge = FeatureNetwork(NETWORK), load_judges()

    def ranks(self, images: Sequence[np.ndarray]) -> list[int]:
        found: list[int] = []
        features = self.features(torch.from_numpy(np.stack(images)))
        for i, (name, entry) in enumerate(self.entries):
            captions = list(dict.fromkeys(e.caption for e in read_list(name)))
            one = type(features)(pooled=features.pooled[i : i + 1], detail=features.detail[i : i + 1])
            correct = np.array([captions.index(entry.caption)])
            found.append(int(self.judge.rank(one, captions, correct)[0]))
        return found

    def seam(self, images: Sequence[np.ndarray]) -> float:
        pairs = [gradients(i, b, self.feather) for i, b in zip(images, self.boxes, strict=True)]
        border, inside = np.array(pairs).sum(0)
        return float(border / max(inside, 1e-9))

    def repainted(self, sampling: Sampling) -> tuple[list[np.ndarray], float]:
        """The images with their rectangles repainted, and the seconds per image."""
        drawn: list[np.ndarray] = []
        start = self.clock()
        for first in range(0, len(self.real), self.batch_size):
            rows = slice(first, first + self.batch_size)
            images = self.model.generate(
                [entry.caption for _, entry in self.entries[rows]],
                init=[Image.fromarray(image) for image in self.real[rows]],
                mask=[mask_of(box, self.side) for box in self.boxes[rows]],
                seed=first,
                sampling=sampling,
                batch_size=self.batch_size,
            )
            drawn += [np.asarray(image) for image in images]
        return drawn, (self.clock() - start) / len(drawn)

    def drawing_seconds(self, sampling: Sampling) -> float:
        """Seconds per image of drawings with the same prompts, of one batch after another one."""
        captions = [entry.caption for _, entry in self.entries[: self.batch_size]]
        for _ in range(2):
            start = self.clock()
            self.model.generate(captions, sampling=sampling, batch_size=len(captions))
        return (self.clock() - start) / len(captions)

    def grey(self) -> list[np.ndarray]:
        holed = [image.copy() for image in self.real]
        for image, (left, top, right, bottom) in zip(holed, self.boxes, strict=True):
            image[top:bottom, left:right] = 128
        return holed

    def changed_outside(self, images: Sequence[np.ndarray]) -> int:
        """How many pixels outside the mask and its feather differ from the real image."""
        total = 0
        for image, real, (left, top, right, bottom) in zip(images, self.real, self.boxes, strict=True):
            differs = (image != real).any(2)
            f = self.feather
            differs[max(0, top - f) : bottom + f, max(0, left - f) : right + f] = False
            total += int(differs.sum())
        return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="default: the bundled model")
    parser.add_argument("--data", type=Path, required=True, help="a built emoji set")
    parser.add_argument("--images", type=int, default=270)
    parser.add_argument("--batch-size", type=int, default=6)
    parser.add_argument("--prior-steps", type=int)
    parser.add_argument("--decoder-steps", type=int)
    parser.add_argument("--positions-per-growth", type=int, help="other than POSITIONS_PER_GROWTH of edits")
    parser.add_argument("--device")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--save", type=Path, help="folder for the first images")
    options = parser.parse_args()
    if options.positions_per_growth is not None:
        edits.POSITIONS_PER_GROWTH = options.positions_per_growth
    model = wuerstchen.load(options.model, options.device)
    sampling = Sampling(prior_steps=options.prior_steps, decoder_steps=options.decoder_steps)
    measurement = Measurement(model, options.data, options.images, options.batch_size)
    drawing = measurement.drawing_seconds(sampling)
    repainted, seconds = measurement.repainted(sampling)
    real_seam = measurement.seam(measurement.real)
    rows = {"real": measurement.real, "grey rectangle": measurement.grey(), "repainted": repainted}
    found: dict[str, dict[str, float]] = {}
    for name, images in rows.items():
        score = recall(measurement.ranks(images), 1)
        found[name] = {"recall_1": score.value, "error": score.error}
        found[name]["seam"] = measurement.seam(images) / real_seam
    found["repainted"] |= {
        "changed_outside": measurement.changed_outside(repainted),
        "seconds": seconds,
        "seconds_over_drawing": seconds / drawing,
    }
    for name, values in found.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in values.items()))
    if options.save is not None:
        options.save.mkdir(parents=True, exist_ok=True)
        for number in range(min(24, len(repainted))):
            images = [rows[name][number] for name in rows]
            Image.fromarray(np.concatenate(images, 1)).save(options.save / f"{number}.png")
    if options.json is not None:
        options.json.write_text(json.dumps({"images": len(repainted), **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()

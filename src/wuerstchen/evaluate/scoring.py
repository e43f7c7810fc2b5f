"""Generates every row of the report for the entries of a list and scores it.

A row is a source of images: the real ones, the real ones after JPEG, their reconstructions by Stage A or by
Stages A and B, or images generated from the captions. Only the features needed for the scores are kept from
each batch, so memory does not grow with the length of the lists.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor

from wuerstchen.data.emoji import STYLES
from wuerstchen.errors import UserError
from wuerstchen.evaluate.features import Features
from wuerstchen.evaluate.lists import SPLITS, Entry, ListName, RealImages, Split, read_list
from wuerstchen.evaluate.metrics import (
    Score,
    background_colour,
    jpeg,
    kid,
    mean,
    object_colour,
    psnr,
    recall,
    ssim,
)
from wuerstchen.images import to_images
from wuerstchen.pipeline import Wuerstchen
from wuerstchen.sampling import Sampling

Row = Literal["real", "jpeg20", "stage_a", "stage_a_quantised", "a_b", "c_b_a", "before"]
ROWS: dict[Row, str] = {
    "real": "real images",
    "jpeg20": "real, JPEG quality 20",
    "stage_a": "Stage A, unquantised",
    "stage_a_quantised": "Stage A, quantised",
    "a_b": "A+B, from the real image",
    "c_b_a": "C+B+A, from the caption",
    "before": "C+B+A before compression",
}
RECONSTRUCTIONS: frozenset[Row] = frozenset({"jpeg20", "stage_a", "stage_a_quantised", "a_b"})
"""Rows that reconstruct an original. PSNR and SSIM are computed for these."""

Column = Literal[
    "recall_1", "recall_5", "style", "kid_e3", "kid_lite0_e3", "background", "object", "psnr", "ssim"
]
COLUMNS: tuple[Column, ...] = get_args(Column)
"""PSNR is in dB, and KID is multiplied by 1000. The others are fractions, or at most 1 (SSIM).
``kid_lite0_e3`` uses the network that the bundled model was trained with, so it may be too favourable."""

JPEG_QUALITY = 20
SHOWN: tuple[Row, ...] = ("real", "stage_a", "a_b", "c_b_a")
"""Rows whose images the page shows."""
_SHOWN_SIDE = 256  # maximum height of an image on the page, in pixels

Images = UInt8[np.ndarray, "b h w 3"]


@runtime_checkable
class Judge(Protocol):
    """Finds the caption and the style of an image from its features."""

    def rank(self, features: Features, captions: Sequence[str], correct: Int[np.ndarray, " n"]) -> np.ndarray:
        """How many captions fit each image at least as well as the ``correct`` one, shape (n,)."""
        ...

    def style(self, features: Features) -> np.ndarray:
        """An index into ``data.emoji.STYLES`` for each image, shape (n,)."""
        ...


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Measurements of one image. None where they do not apply to the row or the entry."""

    rank: int
    """How many other captions of the list fit the image at least as well as its own."""
    style: str
    background: str | None
    object: str | None
    psnr: float | None
    ssim: float | None


@dataclass(frozen=True, kw_only=True)
class ListResult:
    """The entries of a list, with the measurements and scores of each row."""

    entries: list[Entry]
    measured: dict[Row, list[Measured]]
    scores: dict[Split, dict[Row, dict[Column, Score]]]
    strips: dict[int, bytes]
    """For the page: the ``SHOWN`` rows side by side as WebP, by entry number."""


@dataclass(frozen=True, kw_only=True)
class Renderer:
    """Draws the rows of the report with a model."""

    model: Wuerstchen
    sampling: Sampling
    before: Wuerstchen | None = None
    """The model before its weights were compressed. It samples with the same settings."""
    first_seed: int = 0
    """Added to the seed of every entry, which is its number. Draws other images for the same list."""

    def __post_init__(self) -> None:
        if self.before is not None and self.before.cascade.settings.image_size != self.size:
            raise UserError(
                f"before must be a model with image_size {self.size}, got "
                f"{self.before.cascade.settings.image_size}. Use the model that was compressed."
            )

    @property
    def size(self) -> int:
        """Side of the images in pixels."""
        return self.model.cascade.settings.image_size

    def rows(self) -> tuple[Row, ...]:
        """The rows that the parts of the model can draw."""
        cascade = self.model.cascade
        missing: set[Row] = set()
        if cascade.compressor is None:
            missing.add("a_b")
        if cascade.prior is None or cascade.text_encoder is None:
            missing.add("c_b_a")
        if self.before is None:
            missing.add("before")
        return tuple(row for row in ROWS if row not in missing)

    def draw(self, row: Row, real: Images, captions: Sequence[str] | None, seeds: Sequence[int]) -> Images:
        """The images of a row for real images and their captions."""
        seeds = [seed + self.first_seed for seed in seeds]
        if row == "real":
            return real
        if row == "jpeg20":
            return np.stack([jpeg(image, JPEG_QUALITY) for image in real])
        if row in ("stage_a", "stage_a_quantised"):
            return self._through_stage_a(real, quantise=row == "stage_a_quantised")
        if row == "a_b":
            images = [Image.fromarray(image) for image in real]
            done = self.model.reconstruct_batch(images, seeds=seeds, sampling=self.sampling)
            return _stacked([reconstruction.image for reconstruction in done])
        model = self.model if row == "c_b_a" else self.before
        assert model is not None
        assert captions is not None
        # The settings of the compressed model: only the weights may differ.
        sampling = self.model.cascade.completed(self.sampling)
        return _stacked(model.generate(captions, seed=seeds, sampling=sampling, batch_size=len(captions)))

    @torch.inference_mode()
    def _through_stage_a(self, real: Images, *, quantise: bool) -> Images:
        pixels = torch.from_numpy(real).permute(0, 3, 1, 2).to(self.model.device).float() / 255
        decoded, _ = self.model.cascade.vqgan(pixels, quantise=quantise)
        return _stacked(to_images(decoded.clamp(0, 1)))


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Draws rows for the entries of a list and scores them."""

    renderer: Renderer
    rows: tuple[Row, ...]
    """The rows to score. The real images are always scored too."""
    real: RealImages
    features: Callable[[Tensor], Features]
    """The features of uint8 images of shape (n, h, w, 3), for the judge and for KID."""
    lite0_features: Callable[[Tensor], Features]
    """The same from Lite0, for a second KID."""
    judge: Judge
    batch_size: int
    shown: int = 0
    """The first entries of each split that get a strip for the page."""

    def score_list(
        self, name: ListName, entries: Sequence[Entry], on_batch: Callable[[int], None] = lambda done: None
    ) -> ListResult:
        """Draws and scores entries of the list ``name``.

        ``on_batch`` is called after each batch with the number of its entries.
        """
        rows = tuple(row for row in ROWS if row in self.rows or row == "real")
        shown = {
            entry.number
            for split in SPLITS
            for entry in [entry for entry in entries if entry.split == split][: self.shown]
        }
        features: dict[Row, list[Features]] = {row: [] for row in rows}
        lite0: dict[Row, list[Tensor]] = {row: [] for row in rows}
        found: dict[Row, list[dict[str, object]]] = {row: [] for row in rows}
        strips: dict[int, bytes] = {}
        for start in range(0, len(entries), self.batch_size):
            batch = entries[start : start + self.batch_size]
            originals = np.stack([self.real.image(entry, self.renderer.size) for entry in batch])
            captions, seeds = [entry.caption for entry in batch], [entry.number for entry in batch]
            drawn = {row: self.renderer.draw(row, originals, captions, seeds) for row in rows}
            for row, images in drawn.items():
                features[row].append(self.features(torch.from_numpy(images)))
                lite0[row].append(self.lite0_features(torch.from_numpy(images)).pooled)
                found[row] += _measured(row, images, originals, batch if name == "b" else None)
            for i, entry in enumerate(batch):
                if entry.number in shown:
                    strips[entry.number] = strip([drawn[row][i] for row in SHOWN if row in drawn])
            on_batch(len(batch))
        joined = {row: Features.joined(parts) for row, parts in features.items()}
        measured = self._judged(name, entries, joined, found)
        networks: dict[Column, dict[Row, Tensor]] = {
            "kid_e3": {row: part.pooled for row, part in joined.items()},
            "kid_lite0_e3": {row: torch.cat(parts) for row, parts in lite0.items()},
        }
        scores = _scores_by_split(entries, measured, networks)
        return ListResult(entries=list(entries), measured=measured, scores=scores, strips=strips)

    def _judged(
        self,
        name: ListName,
        entries: Sequence[Entry],
        features: Mapping[Row, Features],
        found: Mapping[Row, Sequence[dict[str, object]]],
    ) -> dict[Row, list[Measured]]:
        """Adds the judge's caption ranks and styles to the measurements in ``found``."""
        # Two subjects may have the same caption in a style; the judge ranks it once.
        captions = list(dict.fromkeys(entry.caption for entry in read_list(name)))
        correct = np.array([captions.index(entry.caption) for entry in entries])
        measured: dict[Row, list[Measured]] = {}
        for row, seen in features.items():
            ranks, styles = self.judge.rank(seen, captions, correct), self.judge.style(seen)
            measured[row] = [
                Measured(rank=int(rank), style=STYLES[int(style)], **others)  # type: ignore[arg-type]
                for rank, style, others in zip(ranks, styles, found[row], strict=True)
            ]
        return measured


def _scores_by_split(
    entries: Sequence[Entry],
    measured: Mapping[Row, Sequence[Measured]],
    networks: Mapping[Column, Mapping[Row, Tensor]],
) -> dict[Split, dict[Row, dict[Column, Score]]]:
    """The scores of each split that has entries. ``networks`` has the features of each KID."""
    scores: dict[Split, dict[Row, dict[Column, Score]]] = {}
    for split in SPLITS:
        places = [i for i, entry in enumerate(entries) if entry.split == split]
        if not places:
            continue
        scores[split] = {
            row: scores_of(
                row,
                [entries[i] for i in places],
                [of_row[i] for i in places],
                {
                    column: (features[row][places].numpy(), features["real"][places].numpy())
                    for column, features in networks.items()
                },
            )
            for row, of_row in measured.items()
        }
    return scores


def scores_of(
    row: Row,
    entries: Sequence[Entry],
    measured: Sequence[Measured],
    features: dict[Column, tuple[np.ndarray, np.ndarray]],
) -> dict[Column, Score]:
    """The scores of one row over some entries. Columns without anything to score are left out.

    ``features`` has, for each KID, the features of the row's images and of the real images. KID compares
    both for the same entries. For the real images themselves it compares those at even positions with those
    at odd positions, which shows what to expect from chance.
    """
    ranks = [m.rank for m in measured]
    scores: dict[Column, Score] = {
        "recall_1": recall(ranks, 1),
        "recall_5": recall(ranks, 5),
        "style": mean([m.style == e.style for m, e in zip(measured, entries, strict=True)]),
    }
    for column, (drawn, real) in features.items():
        if row == "real":
            half = len(real) // 2
            drawn, real = real[0 : 2 * half : 2], real[1 : 2 * half : 2]
        if len(drawn) >= 3:
            distance = kid(drawn, real)
            scores[column] = Score(value=1e3 * distance.value, error=1e3 * distance.error, n=distance.n)
    backgrounds = [(m.background, e.background) for m, e in zip(measured, entries, strict=True)]
    backgrounds = [(found, asked) for found, asked in backgrounds if found is not None]
    if backgrounds:
        scores["background"] = mean([found == asked for found, asked in backgrounds])
        objects = [(m.object, e.colour) for m, e in zip(measured, entries, strict=True) if e.colour]
        if objects:
            scores["object"] = mean([found == asked for found, asked in objects])
    for column in ("psnr", "ssim"):
        values = [value for m in measured if (value := getattr(m, column)) is not None]
        if values:
            scores[column] = mean(values)
    return scores


def strip(images: Sequence[UInt8[np.ndarray, "h w 3"]]) -> bytes:
    """Images of one size side by side as WebP, at most 256 pixels high."""
    image = Image.fromarray(np.concatenate(list(images), axis=1))
    if image.height > _SHOWN_SIDE:
        size = (_SHOWN_SIDE * len(images), _SHOWN_SIDE)
        image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=85)
    return buffer.getvalue()


def _measured(
    row: Row, images: Images, originals: Images, asked: Sequence[Entry] | None
) -> list[dict[str, object]]:
    """The fields of ``Measured`` that need no features. Colours are measured if the prompt asks for them."""
    like = None
    if row in RECONSTRUCTIONS:
        like = psnr(images, originals), ssim(images, originals)
    return [
        {
            "background": None if asked is None else background_colour(image),
            "object": None if asked is None or asked[i].colour is None else object_colour(image),
            "psnr": None if like is None else float(like[0][i]),
            "ssim": None if like is None else float(like[1][i]),
        }
        for i, image in enumerate(images)
    ]


def _stacked(images: Sequence[Image.Image]) -> Images:
    return np.stack([np.asarray(image) for image in images])

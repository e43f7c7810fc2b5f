"""Draws every row of the report for the entries of a list, and scores it.

A row is a way to come by a picture: the real one, the real one after JPEG, through Stage A, through the map,
or from the caption alone. Batches pass through all rows and only what is scored is kept, so that memory does
not grow with the lists.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor

from wuerstchen.data.emoji import STYLES
from wuerstchen.errors import UserError
from wuerstchen.evaluate.features import FeatureName, Features
from wuerstchen.evaluate.lists import Entry, ListName, RealPictures, Split, read_list
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
    "real": "real pictures",
    "jpeg20": "real, JPEG quality 20",
    "stage_a": "Stage A, unquantised",
    "stage_a_quantised": "Stage A, quantised",
    "a_b": "A+B, through the map",
    "c_b_a": "C+B+A, from the caption",
    "before": "C+B+A before storing",
}
RECONSTRUCTIONS: frozenset[Row] = frozenset({"jpeg20", "stage_a", "stage_a_quantised", "a_b"})
"""Rows with an original: PSNR and SSIM have a meaning there only."""

Column = Literal[
    "recall_1", "recall_5", "style", "kid_e3", "kid_lite0_e3", "background", "object", "psnr", "ssim"
]
COLUMNS: tuple[Column, ...] = get_args(Column)
"""PSNR is in dB, KID times 1000; the others are shares or at most 1. ``kid_lite0_e3`` looks with the network
that the small model itself learnt from, so it may flatter it."""

JPEG_QUALITY = 20
FEATURES: FeatureName = "efficientnet_lite1"
LITE0: FeatureName = "efficientnet_lite0"
SHOWN: tuple[Row, ...] = ("real", "stage_a", "a_b", "c_b_a")
"""Rows of which the page shows pictures."""
_SHOWN_SIDE = 256  # pixels of a picture on the page at most

Pictures = UInt8[np.ndarray, "b h w 3"]


@runtime_checkable
class Judge(Protocol):
    """Reads features: which caption they fit best, and which style they are of."""

    def rank(self, features: Features, captions: Sequence[str], correct: Int[np.ndarray, " n"]) -> np.ndarray:
        """How many captions fit each picture at least as well as the ``correct`` one, shape (n,)."""
        ...

    def style(self, features: Features) -> np.ndarray:
        """An index into ``data.emoji.STYLES`` for each picture, shape (n,)."""
        ...


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was found in one picture; None where the row or the entry has nothing to find."""

    rank: int
    """How many of the list's captions fit the picture as well as its own or better."""
    style: str
    background: str | None
    object: str | None
    psnr: float | None
    ssim: float | None


@dataclass(frozen=True, kw_only=True)
class ListResult:
    """A list's entries and, by row, what was measured on each of them."""

    entries: list[Entry]
    measured: dict[Row, list[Measured]]
    scores: dict[Split, dict[Row, dict[Column, Score]]]
    strips: dict[int, bytes]
    """For the page: the ``SHOWN`` rows side by side as WebP, by the entry's number."""


@dataclass(frozen=True, kw_only=True)
class Artist:
    """A model, how it samples, and the rows it can draw."""

    model: Wuerstchen
    sampling: Sampling
    before: Wuerstchen | None = None
    """The model before it was stored small. It samples in the same way."""
    first_seed: int = 0
    """Added to the seed of every entry, its number: other pictures of the same list."""

    def __post_init__(self) -> None:
        if self.before is not None and self.before.cascade.settings.image_size != self.size:
            raise UserError(
                f"the model before storing draws {self.before.cascade.settings.image_size} pixels and not "
                f"{self.size}; give the folder that the model was made from"
            )

    @property
    def size(self) -> int:
        """Side of the pictures in pixels."""
        return self.model.cascade.settings.image_size

    def rows(self) -> tuple[Row, ...]:
        """What the parts of the model allow."""
        cascade = self.model.cascade
        lacking: set[Row] = set()
        if cascade.compressor is None:
            lacking.add("a_b")
        if cascade.prior is None or cascade.text_encoder is None:
            lacking.add("c_b_a")
        if self.before is None:
            lacking.add("before")
        return tuple(row for row in ROWS if row not in lacking)

    def draw(
        self, row: Row, real: Pictures, captions: Sequence[str] | None, seeds: Sequence[int]
    ) -> Pictures:
        """The row's pictures for real ones and their captions."""
        seeds = [seed + self.first_seed for seed in seeds]
        if row == "real":
            return real
        if row == "jpeg20":
            return np.stack([jpeg(picture, JPEG_QUALITY) for picture in real])
        if row in ("stage_a", "stage_a_quantised"):
            return self._through_stage_a(real, quantise=row == "stage_a_quantised")
        if row == "a_b":
            images = [Image.fromarray(picture) for picture in real]
            done = self.model.reconstruct_batch(images, seeds=seeds, sampling=self.sampling)
            return _stacked([reconstruction.image for reconstruction in done])
        model = self.model if row == "c_b_a" else self.before
        assert model is not None
        assert captions is not None
        # Settings are the shipped model's: nothing but the storing may differ.
        sampling = Sampling(**self.model.settings_of(self.sampling))  # type: ignore[arg-type]
        return _stacked(model.generate(captions, seed=seeds, sampling=sampling, batch_size=len(captions)))

    @torch.inference_mode()
    def _through_stage_a(self, real: Pictures, *, quantise: bool) -> Pictures:
        pixels = torch.from_numpy(real).permute(0, 3, 1, 2).to(self.model.device).float() / 255
        decoded, _ = self.model.cascade.vqgan(pixels, quantise=quantise)
        return _stacked(to_images(decoded.clamp(0, 1)))


def score_list(
    name: ListName,
    entries: Sequence[Entry],
    *,
    artist: Artist,
    rows: Sequence[Row],
    real: RealPictures,
    look: Callable[[Tensor], Features],
    look_lite0: Callable[[Tensor], Features],
    judge: Judge,
    batch_size: int,
    shown: int = 0,
    on_batch: Callable[[int], None] = lambda done: None,
) -> ListResult:
    """Draws and scores ``rows`` for ``entries`` of a list; "real" is always among them.

    ``look`` and ``look_lite0`` give the features of uint8 pictures. Of each split the first ``shown`` entries
    get a strip for the page. ``on_batch`` is told how many entries a batch has finished.
    """
    rows = tuple(row for row in ROWS if row in rows or row == "real")
    strip_of = {
        entry.number
        for split in ("val", "test")
        for entry in [entry for entry in entries if entry.split == split][:shown]
    }
    seen: dict[Row, list[Features]] = {row: [] for row in rows}
    pooled: dict[Row, list[Tensor]] = {row: [] for row in rows}  # Lite0's
    found: dict[Row, list[dict[str, object]]] = {row: [] for row in rows}
    strips: dict[int, bytes] = {}
    for start in range(0, len(entries), batch_size):
        batch = entries[start : start + batch_size]
        originals = np.stack([real.picture(entry, artist.size) for entry in batch])
        captions, seeds = [entry.caption for entry in batch], [entry.number for entry in batch]
        drawn = {row: artist.draw(row, originals, captions, seeds) for row in rows}
        for row, pictures in drawn.items():
            seen[row].append(look(torch.from_numpy(pictures)))
            pooled[row].append(look_lite0(torch.from_numpy(pictures)).pooled)
            found[row] += _measured(row, pictures, originals, batch if name == "b" else None)
        for i, entry in enumerate(batch):
            if entry.number in strip_of:
                strips[entry.number] = strip([drawn[row][i] for row in SHOWN if row in drawn])
        on_batch(len(batch))

    # Two subjects may have the same caption in a style; the judge knows it once.
    captions = list(dict.fromkeys(entry.caption for entry in read_list(name)))
    correct = np.array([captions.index(entry.caption) for entry in entries])
    features = {row: Features.joined(parts) for row, parts in seen.items()}
    networks: dict[Column, dict[Row, Tensor]] = {
        "kid_e3": {row: found.pooled for row, found in features.items()},
        "kid_lite0_e3": {row: torch.cat(parts) for row, parts in pooled.items()},
    }
    measured: dict[Row, list[Measured]] = {}
    for row in rows:
        ranks, styles = judge.rank(features[row], captions, correct), judge.style(features[row])
        measured[row] = [
            Measured(rank=int(rank), style=STYLES[int(style)], **one)  # type: ignore[arg-type]
            for rank, style, one in zip(ranks, styles, found[row], strict=True)
        ]
    scores: dict[Split, dict[Row, dict[Column, Score]]] = {}
    for split in ("val", "test"):
        of_split = [i for i, entry in enumerate(entries) if entry.split == split]
        if of_split:
            scores[split] = {
                row: scores_of(
                    row,
                    [entries[i] for i in of_split],
                    [measured[row][i] for i in of_split],
                    {
                        column: (made[row][of_split].numpy(), made["real"][of_split].numpy())
                        for column, made in networks.items()
                    },
                )
                for row in rows
            }
    return ListResult(entries=list(entries), measured=measured, scores=scores, strips=strips)


def scores_of(
    row: Row,
    entries: Sequence[Entry],
    measured: Sequence[Measured],
    features: dict[Column, tuple[np.ndarray, np.ndarray]],
) -> dict[Column, Score]:
    """The columns of one row over some entries; a column with nothing to score is left out.

    ``features`` are, for each KID, those of the row's pictures and of the real ones.
    KID is against the real pictures of the same entries. Of the real pictures themselves it is between
    entries at even and at odd places: what chance alone gives, with half the pictures.
    """
    ranks = [one.rank for one in measured]
    scores: dict[Column, Score] = {
        "recall_1": recall(ranks, 1),
        "recall_5": recall(ranks, 5),
        "style": mean([one.style == entry.style for one, entry in zip(measured, entries, strict=True)]),
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
        values = [value for one in measured if (value := getattr(one, column)) is not None]
        if values:
            scores[column] = mean(values)
    return scores


def strip(pictures: Sequence[UInt8[np.ndarray, "h w 3"]]) -> bytes:
    """Pictures of one size side by side, at most 256 pixels high, as WebP."""
    image = Image.fromarray(np.concatenate(list(pictures), axis=1))
    if image.height > _SHOWN_SIDE:
        size = (_SHOWN_SIDE * len(pictures), _SHOWN_SIDE)
        image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=85)
    return buffer.getvalue()


def _measured(
    row: Row, pictures: Pictures, originals: Pictures, asked: Sequence[Entry] | None
) -> list[dict[str, object]]:
    """All of ``Measured`` that needs no features. Colours are measured where a prompt asks for them."""
    like = None
    if row in RECONSTRUCTIONS:
        like = psnr(pictures, originals), ssim(pictures, originals)
    return [
        {
            "background": None if asked is None else background_colour(picture),
            "object": None if asked is None or asked[i].colour is None else object_colour(picture),
            "psnr": None if like is None else float(like[0][i]),
            "ssim": None if like is None else float(like[1][i]),
        }
        for i, picture in enumerate(pictures)
    ]


def _stacked(images: Sequence[Image.Image]) -> Pictures:
    return np.stack([np.asarray(image) for image in images])

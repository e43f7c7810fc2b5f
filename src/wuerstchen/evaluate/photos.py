"""Scores reconstructions of photographs, by Stage A alone and through the semantic latents."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wuerstchen.data.folder import SUFFIXES
from wuerstchen.errors import DataError
from wuerstchen.evaluate.metrics import Score, mean, psnr, ssim
from wuerstchen.evaluate.scoring import Column, Renderer, Row, strip
from wuerstchen.images import center_crop_resize, open_image

PHOTO_ROWS: tuple[Row, ...] = ("stage_a", "stage_a_quantised", "a_b")


@dataclass(frozen=True, kw_only=True)
class PhotoResult:
    """The reconstructions of photographs by Stage A and by Stages A and B, and their scores."""

    names: list[str]
    """Paths relative to the folder, in order."""
    unreadable: list[str]
    """Why files were skipped, one line each."""
    enlarged: int
    """Photographs smaller than the model's images. They were enlarged, which makes them easier."""
    measured: dict[Row, list[tuple[float, float]]]
    """PSNR in dB and SSIM of each photograph."""
    scores: dict[Row, dict[Column, Score]]
    strips: dict[int, bytes]
    """For the page: each photograph beside its reconstructions as WebP, by position."""


def score_photos(
    root: Path,
    files: Sequence[Path],
    renderer: Renderer,
    batch_size: int,
    shown: int,
    on_batch: Callable[[int], None],
) -> PhotoResult:
    """Reconstructs photographs, centre-cropped to the model's size, by Stage A and by Stages A and B.

    Files that cannot be read are skipped and named in the result. Raises ``DataError`` if none can be read.
    """
    rows = tuple(row for row in PHOTO_ROWS if row in renderer.rows())
    measured: dict[Row, list[tuple[float, float]]] = {row: [] for row in rows}
    names: list[str] = []
    unreadable: list[str] = []
    strips: dict[int, bytes] = {}
    enlarged = 0
    for start in range(0, len(files), batch_size):
        batch: list[np.ndarray] = []
        first = len(names)
        for path in files[start : start + batch_size]:
            try:
                image = open_image(path)
            except DataError as error:
                unreadable.append(str(error))
                continue
            enlarged += min(image.size) < renderer.size
            batch.append(np.asarray(center_crop_resize(image, renderer.size)))
            names.append(path.relative_to(root).as_posix())
        if batch:
            originals = np.stack(batch)
            seeds = range(first, len(names))
            drawn = {row: renderer.draw(row, originals, None, seeds) for row in rows}
            for row, images in drawn.items():
                pairs = zip(psnr(images, originals), ssim(images, originals), strict=True)
                measured[row] += [(float(p), float(s)) for p, s in pairs]
            for i, number in enumerate(seeds):
                if number < shown:
                    strips[number] = strip([originals[i], *(drawn[row][i] for row in rows)])
        on_batch(len(files[start : start + batch_size]))
    if not names:
        raise DataError(
            f"no photograph in {root} can be read. The first error: {unreadable[0]}. Use other files."
        )
    scores: dict[Row, dict[Column, Score]] = {
        row: {"psnr": mean([p for p, _ in values]), "ssim": mean([s for _, s in values])}
        for row, values in measured.items()
    }
    return PhotoResult(
        names=names, unreadable=unreadable, enlarged=enlarged, measured=measured, scores=scores, strips=strips
    )


def photo_files(root: Path) -> list[Path]:
    """The image files under ``root`` in order of their names, without hidden ones."""
    if not root.is_dir():
        raise DataError(f"photos must be a folder of images, got {str(root)!r}, which is not a folder.")
    files = [
        path
        for path in sorted(root.rglob("*"))
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
    ]
    if not files:
        raise DataError(
            f"photos: {str(root)!r} has no images ({', '.join(sorted(SUFFIXES))}). Use another folder."
        )
    return files

"""Regions of known cells: random ones to train on, and a fixed one to measure."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from wuerstchen.train.feed.random import ImageRandom

LEAST, MOST = 0.1, 0.9
"""Bounds of the fraction of known cells, before sides are rounded to whole cells."""


def random_regions(random: ImageRandom, grid: Sequence[int], fraction: float) -> Bool[Tensor, "b h w"]:
    """Which cells are known: for a ``fraction`` of the images a random rectangle or everything around one,
    with equal probability. For the other images none.

    At least one cell of each image stays unknown.
    """
    height, width = grid
    chosen, inverted, area, shape, y, x = random.uniform("known cells", (6,)).unbind(1)
    area = LEAST + (MOST - LEAST) * area
    rows = (area**shape * height).round().clamp(1, height)  # from a band of full width to one of full height
    most = (MOST * height * width / rows).floor()
    columns = (area * height * width / rows).round().clamp(max=most).clamp(1, width)
    inside = _between(y, rows, height)[:, :, None] & _between(x, columns, width)[:, None, :]
    region = inside ^ (inverted < 0.5)[:, None, None]
    possible = ~region.all(2).all(1)  # on a grid of one row or column the region may have all cells
    return region & ((chosen < fraction) & possible)[:, None, None]


def _between(place: Float[Tensor, " b"], size: Float[Tensor, " b"], side: int) -> Bool[Tensor, "b side"]:
    """Whether each position of a side is in an interval of whole positions, at a ``place`` in [0, 1)."""
    first = (place * (side - size + 1)).floor()[:, None]
    positions = torch.arange(side, device=place.device)
    return (positions >= first) & (positions < first + size[:, None])


def central_region(grid: Sequence[int], device: torch.device) -> Bool[Tensor, "h w"]:
    """The central rectangle with half the sides, rounded down, but at least one cell."""
    inside = []
    for side in grid:
        size = max(1, side // 2)
        positions, first = torch.arange(side, device=device), (side - size) // 2
        inside.append((positions >= first) & (positions < first + size))
    return inside[0][:, None] & inside[1]


def mean_of_unknown(errors: Float[Tensor, "b h w"], known: Bool[Tensor, "b h w"]) -> Float[Tensor, " b"]:
    """The mean error of the unknown cells of each image."""
    return torch.where(known, 0.0, errors).sum((1, 2)) / (~known).sum((1, 2))

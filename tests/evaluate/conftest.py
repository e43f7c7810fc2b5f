"""A small model, a few held-out images, and judges that need no weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wuerstchen.data.emoji import Record, write_index
from wuerstchen.evaluate import references
from wuerstchen.evaluate.features import Features
from wuerstchen.evaluate.lists import select
from wuerstchen.pipeline import Wuerstchen

LIMIT = 4


@pytest.fixture(scope="session")
def small_model(small_cascade) -> Wuerstchen:
    return Wuerstchen(small_cascade, torch.device("cpu"))


@pytest.fixture(scope="session")
def emoji_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of the first four entries of each list and split: discs of one colour or another."""
    root = tmp_path_factory.mktemp("emoji")
    entries = {e.id: e for name in ("a", "b") for e in select(name, limit=LIMIT)}
    y, x = np.mgrid[:256, :256] - 127.5
    for number, entry in enumerate(entries.values()):
        rgba = np.zeros((256, 256, 4), np.uint8)
        rgba[..., :3] = (20 * number % 200, 90, 200 - 20 * number % 200)
        rgba[..., 3] = 255 * (np.hypot(x, y) < 60 + 5 * (number % 10))
        (root / entry.style).mkdir(exist_ok=True)
        Image.fromarray(rgba).save(root / f"{entry.id}.webp", lossless=True, method=0)
    write_index(
        root,
        [
            Record(
                id=entry.id,
                style=entry.style,
                hex=entry.hex,
                names=(entry.name,),
                tags=(),
                group="",
                subgroup="",
                colours=(),
                license="",
                split="heldout",
            )
            for entry in entries.values()
        ],
    )
    return root


class ColourJudge:
    """Ranks by the first feature and always sees the first style."""

    def rank(self, features: Features, captions, correct) -> np.ndarray:
        assert len(captions) == len(set(captions)) > 400  # the whole list's, each once
        return (features.pooled[:, 0].numpy() * 3).astype(int)

    def style(self, features: Features) -> np.ndarray:
        return np.zeros(len(features.pooled), dtype=int)


def coarse_features(images: torch.Tensor) -> Features:
    """The images at 16 × 16."""
    small = torch.nn.functional.interpolate(images.permute(0, 3, 1, 2).float() / 255, (16, 16), mode="area")
    return Features(pooled=small.flatten(1), detail=small.flatten(1)[:, :1])


@pytest.fixture(scope="session")
def use_simple_judges():
    """Puts judges and features in place that need no package of weights."""

    def use(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(references, "load_judges", lambda device: ColourJudge())
        patch.setattr(references, "FeatureNetwork", lambda name, device, batch_size: coarse_features)

    return use

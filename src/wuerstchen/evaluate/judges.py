"""Judges that tell from a picture which caption it was drawn for, and in which style.

They are small maps on frozen features of EfficientNet-Lite1, which no part of a Würstchen model learns from,
and on frozen states of the text encoder in the package. ``scripts/train_judges.py`` trained them on the
training split of the emoji set, and nothing trains them since: a model cannot bend what judges it.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from wuerstchen.checkpoints.native import read_tensors
from wuerstchen.checkpoints.text_encoder import read_text_encoder
from wuerstchen.data.emoji import STYLES
from wuerstchen.defaults import usual_defaults
from wuerstchen.errors import CheckpointError
from wuerstchen.evaluate.features import DETAIL, POOLED, TEXTURE, FeatureName, Features
from wuerstchen.models.text import TextEncoder
from wuerstchen.pipeline import BUNDLED

JUDGES = Path(__file__).parent / "judges.safetensors"
NETWORK: FeatureName = "efficientnet_lite1"
"""Whose features the judges read."""

WIDTH = 256
"""Of the embeddings in which pictures and captions meet."""

_TEXT_WIDTH = 384
_STYLE_HIDDEN, _STYLE_DROPOUT = 256, 0.3
_MOST_DEVIATIONS = 6.0
_CAPTIONS_AT_ONCE = 128


class JudgeHeads(nn.Module):
    """All that is learnt: from standardised features to an embedding and to style scores, and from text."""

    def __init__(self) -> None:
        super().__init__()
        for name, width in (("features", POOLED + DETAIL), ("text", _TEXT_WIDTH)):
            self.register_buffer(f"{name}_mean", torch.zeros(width))
            self.register_buffer(f"{name}_std", torch.ones(width))
        self.image = nn.Linear(POOLED + DETAIL, WIDTH)
        self.text = nn.Linear(_TEXT_WIDTH, WIDTH)
        # From lines and shading alone: with all features it learns which subjects a style has, and is worse.
        self.style = nn.Sequential(
            nn.Linear(TEXTURE, _STYLE_HIDDEN),
            nn.GELU(),
            nn.Dropout(_STYLE_DROPOUT),
            nn.Linear(_STYLE_HIDDEN, len(STYLES)),
        )

    def standardised(self, features: Features) -> Float[Tensor, "n p_plus_d"]:
        """Both vectors as deviations from their mean over training pictures, cut off at 6."""
        x = torch.cat([features.pooled, features.detail], dim=1).to(self.features_mean.device)
        # In a picture unlike any in training one channel could otherwise outweigh all others.
        x = (x - self.features_mean) / self.features_std
        return x.clamp(-_MOST_DEVIATIONS, _MOST_DEVIATIONS)

    def embed_images(self, standardised: Float[Tensor, "n p_plus_d"]) -> Float[Tensor, "n e"]:
        """Embeddings of length 1."""
        return F.normalize(self.image(standardised), dim=1)

    def score_styles(self, standardised: Float[Tensor, "n p_plus_d"]) -> Float[Tensor, "n s"]:
        """A logit for each of ``STYLES``."""
        return self.style(standardised[:, -TEXTURE:])

    def embed_texts(self, pooled: Float[Tensor, "m t"]) -> Float[Tensor, "m e"]:
        """Embeddings of length 1, of what `pooled_states` gives."""
        return F.normalize(self.text((pooled - self.text_mean) / self.text_std), dim=1)


def pooled_states(encoder: TextEncoder, captions: Sequence[str]) -> Float[Tensor, "m t"]:
    """The mean of each caption's token states, padding left out."""
    parts = []
    for start in range(0, len(captions), _CAPTIONS_AT_ONCE):
        text = encoder.encode(captions[start : start + _CAPTIONS_AT_ONCE])
        mask = text.mask[..., None].float()
        parts.append((text.states * mask).sum(1) / mask.sum(1))
    return torch.cat(parts)


class Judges:
    """The trained heads with the text encoder that they read captions with."""

    def __init__(self, heads: JudgeHeads, encoder: TextEncoder) -> None:
        self.heads = heads
        self.encoder = encoder

    @torch.no_grad()
    def similarity(self, features: Features, captions: Sequence[str]) -> Float[Tensor, "n m"]:
        """The cosine between each picture and each caption; equal captions have equal ones."""
        unique = list(dict.fromkeys(captions))
        place = {caption: number for number, caption in enumerate(unique)}
        images = self.heads.embed_images(self.heads.standardised(features))
        texts = self.heads.embed_texts(pooled_states(self.encoder, unique))
        return (images @ texts.T).cpu()[:, [place[caption] for caption in captions]]

    def rank(
        self, features: Features, captions: Sequence[str], correct: Int[np.ndarray, " n"]
    ) -> Int[np.ndarray, " n"]:
        """How many captions fit each picture at least as well as its own, ``captions[correct[i]]``.

        0 is the best. A tie counts against the picture: one that says nothing is right about nothing.
        ``features`` are those of ``NETWORK``.
        """
        similarity = self.similarity(features, captions)
        own = similarity.gather(1, torch.from_numpy(correct).long()[:, None])
        # Written so that NaN counts against the picture too.
        return (~(similarity < own)).sum(1).numpy() - 1

    @torch.no_grad()
    def style(self, features: Features) -> Int[np.ndarray, " n"]:
        """The style of each picture as an index into ``data.emoji.STYLES``."""
        return self.heads.score_styles(self.heads.standardised(features)).argmax(1).cpu().numpy()


@usual_defaults()
def load_judges(device: torch.device | str = "cpu", path: Path = JUDGES) -> Judges:
    """The judges in the package. Raises ``CheckpointError`` for a missing, damaged or foreign file."""
    tensors, header = read_tensors(path)
    if header.get("kind") != "judges":
        raise CheckpointError(f"{path} is wrong because it holds no judges; install the package again")
    heads = JudgeHeads()
    try:
        heads.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path} is wrong because it does not fit ({reason}); install the package again"
        ) from error
    encoder = read_text_encoder(BUNDLED / "text_encoder").to(device)
    return Judges(heads.eval().requires_grad_(False).to(device), encoder)

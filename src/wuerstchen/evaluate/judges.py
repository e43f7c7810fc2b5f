"""Judges that recognise which caption an image was drawn for, and in which style.

They are small heads on frozen features of EfficientNet-Lite1, which no part of a Würstchen model is trained
with, and on frozen states of the bundled text encoder. ``scripts/train_judges.py`` trained them on the
training split of the emoji set. They stay fixed, so no model can influence its judges. The embeddings of the
captions in the fixed lists are stored, because they decide close ranks: a text encoder stored in fewer bits
would change R@1 of the real images by up to 0.013.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from wuerstchen.checkpoints.native import FORMAT, read_tensors, write_tensors
from wuerstchen.checkpoints.text_encoder import read_text_encoder
from wuerstchen.data.emoji import STYLES
from wuerstchen.defaults import usual_defaults
from wuerstchen.errors import CheckpointError
from wuerstchen.evaluate.features import DETAIL, POOLED, TEXTURE, FeatureName, Features
from wuerstchen.evaluate.lists import LISTS, read_list
from wuerstchen.models.text import TextEncoder
from wuerstchen.pipeline import BUNDLED

JUDGES = Path(__file__).parent / "judges.safetensors"
CAPTIONS = "judged_captions.safetensors"
"""The file with the embeddings of the captions in the lists, in the folder of the heads."""
NETWORK: FeatureName = "efficientnet_lite1"
"""The network whose features the judges read."""

WIDTH = 256
"""Width of the joint embeddings of images and captions."""

_TEXT_WIDTH = 384
_STYLE_HIDDEN, _STYLE_DROPOUT = 256, 0.3
_MOST_DEVIATIONS = 6.0
_CAPTIONS_AT_ONCE = 128


class JudgeHeads(nn.Module):
    """The trained heads: image features to an embedding and to style scores, text to an embedding."""

    def __init__(self) -> None:
        super().__init__()
        for name, width in (("features", POOLED + DETAIL), ("text", _TEXT_WIDTH)):
            self.register_buffer(f"{name}_mean", torch.zeros(width))
            self.register_buffer(f"{name}_std", torch.ones(width))
        self.image = nn.Linear(POOLED + DETAIL, WIDTH)
        self.text = nn.Linear(_TEXT_WIDTH, WIDTH)
        # The style head only reads texture. With all features it overfits to the subjects of each style.
        self.style = nn.Sequential(
            nn.Linear(TEXTURE, _STYLE_HIDDEN),
            nn.GELU(),
            nn.Dropout(_STYLE_DROPOUT),
            nn.Linear(_STYLE_HIDDEN, len(STYLES)),
        )

    def standardised(self, features: Features) -> Float[Tensor, "n p_plus_d"]:
        """Both vectors, standardised by their statistics over training images and clamped to ±6."""
        x = torch.cat([features.pooled, features.detail], dim=1).to(self.features_mean.device)
        # In an unusual image, one channel could otherwise outweigh all others.
        x = (x - self.features_mean) / self.features_std
        return x.clamp(-_MOST_DEVIATIONS, _MOST_DEVIATIONS)

    def embed_images(self, standardised: Float[Tensor, "n p_plus_d"]) -> Float[Tensor, "n e"]:
        """Embeddings of length 1."""
        return F.normalize(self.image(standardised), dim=1)

    def score_styles(self, standardised: Float[Tensor, "n p_plus_d"]) -> Float[Tensor, "n s"]:
        """A logit for each of ``STYLES``."""
        return self.style(standardised[:, -TEXTURE:])

    def embed_texts(self, pooled: Float[Tensor, "m t"]) -> Float[Tensor, "m e"]:
        """Embeddings of length 1 of the result of ``pooled_states``."""
        return F.normalize(self.text((pooled - self.text_mean) / self.text_std), dim=1)


def pooled_states(encoder: TextEncoder, captions: Sequence[str]) -> Float[Tensor, "m t"]:
    """The mean of each caption's token states, without padding."""
    parts = []
    for start in range(0, len(captions), _CAPTIONS_AT_ONCE):
        text = encoder.encode(captions[start : start + _CAPTIONS_AT_ONCE])
        mask = text.mask[..., None].float()
        parts.append((text.states * mask).sum(1) / mask.sum(1))
    return torch.cat(parts)


class Judges:
    """The trained heads with their text encoder."""

    def __init__(
        self, heads: JudgeHeads, encoder: TextEncoder, known: Mapping[str, Float[Tensor, " e"]] | None = None
    ) -> None:
        """``known`` has the embeddings of captions that need not be encoded. Others are encoded once."""
        self.heads = heads
        self.encoder = encoder
        self.known = dict(known or {})

    @torch.no_grad()
    def similarity(self, features: Features, captions: Sequence[str]) -> Float[Tensor, "n m"]:
        """The cosine similarity of each image and each caption. Equal captions have equal similarities."""
        unique = list(dict.fromkeys(captions))
        place = {caption: number for number, caption in enumerate(unique)}
        images = self.heads.embed_images(self.heads.standardised(features))
        texts = self.embed_captions(unique).to(images.device)
        return (images @ texts.T).cpu()[:, [place[caption] for caption in captions]]

    @torch.no_grad()
    def embed_captions(self, captions: Sequence[str]) -> Float[Tensor, "m e"]:
        """Embeddings of length 1. Each caption is encoded only once."""
        new = [caption for caption in captions if caption not in self.known]
        if new:
            embedded = self.heads.embed_texts(pooled_states(self.encoder, new))
            self.known |= dict(zip(new, embedded, strict=True))
        return torch.stack([self.known[caption] for caption in captions])

    def rank(
        self, features: Features, captions: Sequence[str], correct: Int[np.ndarray, " n"]
    ) -> Int[np.ndarray, " n"]:
        """How many other captions fit each image at least as well as its own, ``captions[correct[i]]``.

        0 is the best. A tie counts against the image. ``features`` come from ``NETWORK``.
        """
        similarity = self.similarity(features, captions)
        own = similarity.gather(1, torch.from_numpy(correct).long()[:, None])
        # Written so that NaN counts against the image too.
        return (~(similarity < own)).sum(1).numpy() - 1

    @torch.no_grad()
    def style(self, features: Features) -> Int[np.ndarray, " n"]:
        """The style of each image as an index into ``data.emoji.STYLES``."""
        return self.heads.score_styles(self.heads.standardised(features)).argmax(1).cpu().numpy()


@usual_defaults()
def load_judges(device: torch.device | str = "cpu", path: Path = JUDGES) -> Judges:
    """Loads the bundled judges. Raises ``CheckpointError`` for a missing, damaged or foreign file."""
    tensors, header = read_tensors(path)
    if header.get("kind") != "judges":
        raise CheckpointError(f"{path} does not contain the judges. Reinstall the package.")
    heads = JudgeHeads()
    try:
        heads.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path} contains judge weights with unexpected shapes ({reason}). Reinstall the package."
        ) from error
    encoder = read_text_encoder(BUNDLED / "text_encoder").to(device)
    known = {caption: embedding.to(device) for caption, embedding in _read_captions(path).items()}
    return Judges(heads.eval().requires_grad_(False).to(device), encoder, known)


def write_captions(judges: Judges, path: Path) -> None:
    """Stores the embeddings of the captions in the lists in float16, next to the heads in the file ``path``.

    Raises ``CheckpointError`` if the file cannot be written.
    """
    embeddings = judges.embed_captions(_captions_of_lists())
    header = {"format": FORMAT, "kind": "judged captions", **_belongs_to(path)}
    write_tensors({"embeddings": embeddings.half()}, path.with_name(CAPTIONS), header)


def _read_captions(heads: Path) -> dict[str, Tensor]:
    path, captions = heads.with_name(CAPTIONS), _captions_of_lists()
    tensors, header = read_tensors(path)
    embeddings = tensors.get("embeddings")
    if (
        any(header.get(name) != value for name, value in _belongs_to(heads).items())
        or embeddings is None
        or embeddings.shape != (len(captions), WIDTH)
    ):
        raise CheckpointError(
            f"{path} does not contain the captions of the lists for {heads.name}. Reinstall the package."
        )
    return dict(zip(captions, embeddings.float(), strict=True))


def _captions_of_lists() -> list[str]:
    return list(dict.fromkeys(entry.caption for name in LISTS for entry in read_list(name)))


def _belongs_to(heads: Path) -> dict[str, str]:
    captions = json.dumps(_captions_of_lists())
    return {
        "judges": hashlib.sha256(heads.read_bytes()).hexdigest(),
        "captions": hashlib.sha256(captions.encode()).hexdigest(),
    }
